"""A run that is killed and resumed is the run that never died; `kill.py` does it more often."""

from faults.kill import differences, run


def test_a_killed_run_goes_on_bit_by_bit(tmp_path):
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    whole, _ = run(str(tmp_path / "whole"))
    resumed, starts = run(str(tmp_path / "killed"), kills=2, seed=3)
    assert starts == 3
    assert not differences(whole, resumed)
    assert whole["clip"]["counts"]["skipped"] == 1
    assert differences(whole, resumed | {"step": 0}) == ["/step"]
