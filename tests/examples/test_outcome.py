"""The benchmark of outcomes: pairing, the same bits twice, honest regret, resuming."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.outcome import freeze, regret, report, rivals, rows, run, train
from benchmarks.outcome.cells import CELLS, CHOSEN, QUICK
from benchmarks.outcome.data import TEXT, characters
from benchmarks.outcome.faults import batch_of
from benchmarks.outcome.measures import spike_score, steps_to_follow
from benchmarks.outcome.tasks import TASKS
from gradclip import ClipByNorm

STEPS = 6


@pytest.fixture
def short(monkeypatch):
    """All tasks, of a few steps."""
    tasks = {name: replace(task, steps=STEPS) for name, task in TASKS.items()}
    monkeypatch.setattr(train, "TASKS", tasks)
    return tasks


def test_every_cell_has_a_name_of_its_own_and_a_reason():
    assert len(CELLS) == len(CHOSEN)
    assert all(cell.why for cell in CHOSEN)
    assert set(QUICK) <= set(CELLS)
    assert {cell.task for cell in CHOSEN} == set(TASKS)
    assert {cell.half for cell in CHOSEN} == {"tuning", "reporting"}


def test_another_text_is_refused(monkeypatch, tmp_path):
    other = tmp_path / "text.txt"
    other.write_bytes(TEXT.read_bytes() + b".")
    monkeypatch.setattr("benchmarks.outcome.data.TEXT", other)
    with pytest.raises(ValueError, match="SHA-256"):
        characters.__wrapped__()


@pytest.mark.parametrize("name", TASKS)
def test_models_and_batches_depend_on_the_seed_alone(name):
    task = TASKS[name]
    for seed in (0, 1):
        once, again = (task.model(seed).state_dict() for _ in range(2))
        assert all(torch.equal(once[key], again[key]) for key in once)
    batches = [batch_of(task, "corrupted", 0, step, part) for step in (3, 4) for part in (0, 1)]
    again = [batch_of(task, "corrupted", 0, step, part) for step in (3, 4) for part in (0, 1)]
    for batch, same in zip(batches, again, strict=True):
        assert torch.equal(batch.inputs, same.inputs)
        assert torch.equal(batch.targets, same.targets)
        assert batch[2:] == same[2:]
    for other in batches[1:]:
        assert not torch.equal(batches[0].inputs, other.inputs)


def test_two_rivals_see_the_same(short, monkeypatch):
    seen = []

    def watched(task, fault, seed, step, part=0, *, times=1):
        batch = batch_of(task, fault, seed, step, part, times=times)
        seen.append(batch)
        return batch

    monkeypatch.setattr(train, "batch_of", watched)
    cell = replace(CELLS["signals-sgd-middle"], fault="corrupted")
    found = [train.run(cell, 3, rivals.RIVALS[name]) for name in ("none", "norm 0.03")]
    for ours, theirs in zip(seen[:STEPS], seen[STEPS:], strict=True):
        assert torch.equal(ours.inputs, theirs.inputs)
        assert torch.equal(ours.targets, theirs.targets)
        assert ours.weight == theirs.weight
    assert found[0].untrained == found[1].untrained
    assert found[0].loss != found[1].loss
    assert (found[0].clip_rate, found[1].clip_rate) == (0.0, 1.0)


@pytest.mark.parametrize(
    "name",
    [
        *("gpt_pre-adamw-middle-corrupted-accumulated", "lstm-adamw-middle-nan"),
        *("signals-adamw-middle-fp16", "resnet-sgd-middle-unfreeze", "moe-muon-middle-corrupted"),
        *("cartpole-adamw-middle", "lora-adamw-middle"),
    ],
)
def test_the_same_run_gives_the_same_bits(short, name):
    cell = CELLS[name]
    rival = rivals.RIVALS["norm 1, each micro-batch" if cell.accumulate > 1 else "AdaGC"]
    once, again = (replace(train.run(cell, 1, rival), seconds=0.0) for _ in range(2))
    assert repr(once) == repr(again)  # repr: NaN is NaN


def test_every_fault_happens_as_often_as_it_says():
    task, steps = TASKS["regression"], TASKS["regression"].steps
    weights = {
        fault: [batch_of(task, fault, 5, step) for step in range(steps)]
        for fault in ("none", "corrupted", "catastrophe", "nan", "heavy", "drift")
    }
    spoilt = {fault: sum(batch.spoilt for batch in found) for fault, found in weights.items()}
    hundreds = steps // 100
    assert spoilt == {
        "none": 0,
        "corrupted": 3 * hundreds,
        "catastrophe": 1,
        "nan": hundreds,
        "heavy": 0,
        "drift": 0,
    }
    assert max(batch.weight for batch in weights["heavy"]) > 20
    assert weights["drift"][0].weight == 1 < 90 < weights["drift"][-1].weight


def test_the_learning_rate_rises_and_ends_near_zero():
    cell = CELLS["gpt_pre-adamw-middle"]
    rates = [train.share_of_rate(cell, step, 200) for step in range(200)]
    assert rates[0] == 0.05
    assert max(rates) == rates[20] == 1
    assert rates[-1] < 0.011
    again = [train.share_of_rate(replace(cell, change="restart"), s, 200) for s in range(200)]
    assert again[:100] == again[100:]
    assert again[99] < 0.02


def test_measures():
    calm = [1.0 + 0.01 * (i % 3) for i in range(200)]
    assert spike_score(calm) == 0
    assert spike_score([*calm[:100], 2.0, *calm[100:]]) == 1 / 181
    clipped = [i % 10 == 0 for i in range(100)] + [True] * 7 + [False] * 20
    assert steps_to_follow(clipped, 100) == 5
    assert steps_to_follow([False] * 50 + [True] * 30, 50) == 30
    assert steps_to_follow([False] * 50, 50) == -1


def grid_of(cells, seeds, better=0.0):
    """Six norms of equal worth and a rival, whose losses differ by chance alone."""
    random = np.random.default_rng(0)
    losses = 1 + 0.02 * random.standard_normal((7, cells, seeds))
    return losses[:6], losses[6] - better


def test_the_oracle_has_no_winners_curse():
    grid, rival = grid_of(500, 6)
    untrained = np.full(rival.shape, 4.0)
    fixed = regret.fixed_norms(grid, untrained)
    found = regret.summary(regret.regret(rival, fixed))
    assert found.low < 0 < found.high
    assert abs(found.mean) < 0.002
    same_seeds = (rival.mean(1) - grid.mean(2).min(0)).mean()
    assert same_seeds > 0.005  # what choosing and scoring on the same seeds would claim
    assert 0.005 < fixed.rerun.mean() < 0.03
    better = regret.summary(regret.regret(rival - 0.01, fixed))
    assert better.high < 0


def test_regret_on_rows_made_by_hand():
    untrained = np.full((2, 2), 4.0)
    grid = np.array([[[1.0, 1.0], [0.1, 0.1]], [[2.0, 2.0], [0.01, 0.01]]])
    fixed = regret.fixed_norms(grid, untrained)
    assert fixed.oracle.tolist() == [[1.0, 1.0], [0.01, 0.01]]
    assert fixed.unit.tolist() == [[1.0, 1.0], [0.2, 0.2]]  # at least 5 % of the untrained loss
    assert fixed.rerun.tolist() == [0, 0]
    assert fixed.chosen == (0, 0)  # loses 0.09 / 0.2 in one cell; the other 1 / 1
    found = regret.regret(np.array([[1.1, 1.3], [0.01, 0.01]]), fixed)
    np.testing.assert_allclose(found, [[0.1, 0.3], [0, 0]])
    told = regret.summary(found)
    assert (round(told.mean, 6), round(told.worst, 6), told.close) == (0.1, 0.2, 0.5)
    swapped = regret.fixed_norms(np.array([[[1.0, 3.0]], [[2.0, 2.0]]]), untrained[:1])
    assert swapped.oracle.tolist() == [[2.0, 3.0]]  # each with what was best on the other seed


def test_runs_that_diverged_count_as_untrained():
    losses = np.array([1.0, 5.0, float("inf"), float("nan")])
    assert regret.worth(losses, np.full(4, 4.0)).tolist() == [1.0, 4.0, 4.0, 4.0]


def test_sensitivity_is_the_mean_excess_over_the_best_rate():
    losses = {"a": np.array([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]])}
    assert regret.sensitivity(losses, {"a": np.full((3, 2), 4.0)}) == 1.0


def test_a_run_that_is_there_is_not_run_again(tmp_path, monkeypatch):
    ran = []

    def told(job):
        ran.append(job)
        result = train.Result(1.0 / 3, 2.0, False, 0.5, 0, 0.0, -1, 0.1)
        return rows.Row(job, result)

    monkeypatch.setattr(run, "done", told)
    path = tmp_path / "new" / "rows.csv"
    wanted = list(run.jobs([CELLS["signals-sgd-low"]], range(2), ["none", "norm 1", "ZClip"]))
    assert run.run_missing(wanted[:4], path, workers=0) == 4
    whole = path.read_text()
    path.write_text(whole[:-9])  # killed while it wrote
    assert run.run_missing(wanted, path, workers=0) == 3
    assert ran == [*wanted[:4], *wanted[3:]]
    assert [row.job for row in rows.read(path)] == wanted
    assert rows.read(path)[0].result.loss == 1.0 / 3
    changed = [job._replace(constants="other") for job in wanted]
    assert run.run_missing(changed, path, workers=0) == 6


def test_hashes_follow_constants_and_cells():
    one, two = (rivals.ours(ClipByNorm(max_norm=limit)) for limit in (1.0, 2.0))
    assert one.digest == rivals.RIVALS["norm 1"].digest != two.digest
    assert ".where(exceeds" in one.source  # code counts, wording doesn't
    assert ClipByNorm.__doc__.splitlines()[0] not in one.source
    assert "def rate_of" in rivals.RIVALS["auto"].source
    cell = CELLS["signals-sgd-low"]
    assert train.setup_of(cell) == train.setup_of(replace(cell, why="told otherwise"))
    assert train.setup_of(cell) != train.setup_of(replace(cell, rate=1.0))


def test_a_candidate_runs_on_the_reporting_half_only_when_frozen(tmp_path, monkeypatch):
    candidate = rivals.ours(ClipByNorm(max_norm=1.0), candidate=True)
    monkeypatch.setitem(rivals.RIVALS, "auto", candidate)
    monkeypatch.setattr(freeze, "FROZEN", tmp_path / "frozen.json")
    (tmp_path / "frozen.json").write_text("{}")
    assert freeze.is_frozen("none")
    assert not freeze.is_frozen("auto")
    out = tmp_path / "rows.csv"
    with pytest.raises(run.typer.BadParameter, match="not frozen"):
        run.main(out=out, half="reporting", rivals="auto")
    freeze.freeze("auto")
    assert freeze.is_frozen("auto")
    changed = rivals.ours(ClipByNorm(max_norm=2.0), candidate=True)
    monkeypatch.setitem(rivals.RIVALS, "auto", changed)
    assert not freeze.is_frozen("auto")


def made_up(cell, seed, name, loss):
    job = rows.job_of(cell, seed, name, rivals.RIVALS[name])
    return rows.Row(job, train.Result(loss, 4.0, loss >= 4, 0.25, 0, 0.0, -1, 0.1))


def test_the_report_writes_table_and_picture(tmp_path, monkeypatch):
    cells = [CELLS["signals-sgd-low"], CELLS["signals-sgd-middle"]]
    names = ["none", *rivals.CONSTANTS, "ZClip"]
    made = [
        made_up(c, s, n, 4.0 if n == "none" else 1.0)
        for c in cells
        for s in (0, 1, 2)
        for n in (names if s < 2 else names[:-1])
    ]
    path, readme = tmp_path / "rows.csv", tmp_path / "README.md"
    rows.append(path, made)
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    monkeypatch.setattr(report, "README", readme)
    monkeypatch.setattr(report, "PICTURE", tmp_path / "regret.png")
    monkeypatch.setattr(report, "BY_CELL", tmp_path / "regret.csv")
    report.main(path)
    told = readme.read_text()
    assert told.startswith("before\n")
    assert told.endswith("after\n")
    assert "old" not in told
    all_seeds, fewer = told.split("with rivals that were run on 2 seeds")
    assert "2 cells, 3 seeds each." in all_seeds
    assert "| none | 2 | 300.0 % |" in all_seeds
    assert "ZClip" not in all_seeds
    assert "| ZClip | 2 | 0.0 % |" in fewer
    assert (tmp_path / "regret.png").stat().st_size > 5000
    heads, *cells_of = (tmp_path / "regret.csv").read_text().splitlines()
    assert heads.startswith("cell,seeds,oracle's loss,rerun,none,norm 0.03,")
    assert cells_of[0].startswith("signals-sgd-low,3,1.0000,0.0000,3.0000,0.0000,")
    for other, name in (
        ({"setup": "other"}, "cell signals-sgd-low"),
        ({"constants": ""}, "rival none"),
    ):
        job = made[0].job._replace(**other)
        with pytest.raises(ValueError, match=f"^{name}: rows come from different versions"):
            report.newest([*made, rows.Row(job, made[0].result)])
