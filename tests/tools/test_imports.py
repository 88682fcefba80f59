"""Logs as the frameworks write them become the norms that were logged."""

import json
import math

import pytest
from lightning.pytorch.loggers import CSVLogger
from torch.utils.tensorboard import SummaryWriter
from transformers import TrainerState

from gradclip import ConfigError
from gradclip.tools.imports import import_log
from gradclip.tools.main import main
from gradclip.tools.trace import Trace

NORMS = {9: 3.5, 19: math.nan, 29: 0.25, 39: 8.0}


def written(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def same(chunk, norms=NORMS):
    assert chunk.step.tolist() == list(norms)
    assert chunk.grad_norm.tolist() == pytest.approx(list(norms.values()), nan_ok=True)
    assert chunk.finite.tolist() == [math.isfinite(norm) for norm in norms.values()]


def test_a_csv_of_lightning_with_empty_cells(tmp_path):
    logger = CSVLogger(tmp_path, name="run")
    for step, norm in NORMS.items():
        logger.log_metrics({"clip/grad_norm": norm, "clip/limit": 1.0, "clip/skipped": 0.0}, step)
        logger.log_metrics({"train_loss": step / 10, "val_loss": 7.0}, step)
    logger.save()
    found = import_log(tmp_path)
    same(found.chunk)
    assert found.chunk.limit.tolist() == [1.0] * 4
    assert found.chunk.loss.tolist() == [0.9, 1.9, 2.9, 3.9]
    assert found.taken["loss"] == "train_loss"
    assert found.chunk.columns >= {"limit", "loss", "skipped"}
    assert "coef" not in found.chunk.columns
    assert found.header.source == "import:csv"


def test_means_over_several_steps_are_said(tmp_path):
    text = "step,clip/grad_norm,clip/grad_norm_max,clip/clipped\n9,1.0,5.0,2.0\n19,1.0,1.5,0.0\n"
    found = import_log(written(tmp_path / "log.csv", text))
    assert found.chunk.clipped.tolist() == [True, False]
    [note] = found.notes
    assert note.startswith("clip/grad_norm is a mean over the steps between two entries")
    largest = import_log(tmp_path / "log.csv", norm_column="clip/grad_norm_max")
    same(largest.chunk, {9: 5.0, 19: 1.5})


def test_event_files_of_a_resumed_run(tmp_path):
    for part, norms in enumerate([{**NORMS, 29: 99.0}, {29: 0.25, 39: 8.0}]):
        with SummaryWriter(tmp_path, filename_suffix=f".{part}") as writer:
            for step, norm in norms.items():
                writer.add_scalar("train/grad_norm", norm, step)
                writer.add_scalar("train/loss", 2.0, step)
    found = import_log(tmp_path)
    same(found.chunk)
    assert found.notes == ["2 steps were logged again; the last value of each stands"]


def test_more_events_than_tensorboard_shows(tmp_path):
    with SummaryWriter(tmp_path) as writer:
        for step in range(12_000):
            writer.add_scalar("grad_norm", 1.0, step)
    assert len(import_log(tmp_path).chunk) == 12_000


def test_the_state_of_a_transformers_trainer(tmp_path):
    history = [{"grad_norm": n, "loss": 2.0, "epoch": 0.1, "step": s} for s, n in NORMS.items()]
    ends = [{"eval_loss": 2.0, "step": 39}, {"train_loss": 1.0, "train_runtime": 9.0, "step": 39}]
    state = TrainerState(log_history=[*history, *ends])
    state.save_to_json(str(tmp_path / "trainer_state.json"))
    found = import_log(tmp_path / "trainer_state.json")
    same(found.chunk)
    assert found.chunk.loss.tolist() == [2.0] * 4


WANDB = """"Step","run 7 - train/grad_norm","run 7 - train/grad_norm__MIN","run 7 - train/loss"
"9","3.5","3.5","2"
"19","NaN","NaN","2"
"29","0.25","0.25",""
"39","8.0","8.0","2"
"""


def test_a_table_of_wandb(tmp_path):
    found = import_log(written(tmp_path / "export.csv", WANDB))
    same(found.chunk)
    assert found.taken == {
        "grad_norm": "run 7 - train/grad_norm",
        "step": "Step",
        "loss": "run 7 - train/loss",
    }
    assert math.isnan(found.chunk.loss[2])


def test_a_history_of_wandb(tmp_path):
    rows = [
        {"_step": step // 10, "trainer/global_step": step, "clip/grad_norm": norm}
        for step, norm in {**NORMS, 19: "NaN"}.items()
    ]
    rows.insert(1, {"_step": 0, "trainer/global_step": 9, "val_loss": 3.0})
    text = "".join(json.dumps(row) + "\n" for row in rows)
    same(import_log(written(tmp_path / "history.jsonl", text)).chunk)


def test_flags_in_a_history_may_be_json(tmp_path):
    norms = '"clip/grad_norm": 3.5, "clip/limit": 1.0'
    lines = f'{{"_step": 0, {norms}, "clip/clipped": true, "clip/skipped": false}}\n'
    chunk = import_log(written(tmp_path / "history.jsonl", lines)).chunk
    assert (chunk.clipped.tolist(), chunk.skipped.tolist()) == ([True], [False])


def test_metric_files_of_mlflow(tmp_path):
    run = tmp_path / "mlruns" / "1" / "abc"
    lines = "".join(f"1700000000000 {norm} {step}\n" for step, norm in NORMS.items())
    written(run / "metrics" / "clip" / "grad_norm", lines)
    written(run / "metrics" / "clip" / "limit", "1700000000000 1.5 9\n")
    written(run / "meta.yaml", "run_id: abc\n")
    found = import_log(tmp_path / "mlruns")
    same(found.chunk)
    assert found.chunk.limit.tolist() == pytest.approx([1.5] + [math.nan] * 3, nan_ok=True)
    same(import_log(run / "metrics" / "clip" / "grad_norm").chunk)


NAMES = (
    "grad_norm",
    "clip/grad_norm",
    "train/grad_norm",
    "grad_norm_step",
    "gradient_norm",
    "grad_2.0_norm_total",
    "Gradient Norm",
    "grad-norm",
    "gnorm",
    "optim/total_grad_norm",
    "actor/grad_norm",
    "clip/grad_norm/optimizer1",
)


def test_names_that_mean_the_norm(tmp_path, subtests):
    others = "lr,grad_norm_epoch,clip/grad_norm/layer.weight,grad_2.0_norm/layer.weight,param_norm"
    for name in NAMES:
        with subtests.test(name):
            path = written(tmp_path / "log.csv", f"step,{name},{others}\n0,3.5,,,,,\n")
            assert import_log(path).taken["grad_norm"] == name


def test_a_limit_of_ours_beside_another_norm(tmp_path):
    for run in ("", "run 7 - "):
        path = written(tmp_path / "log.csv", f"step,{run}grad_norm,{run}clip/limit\n0,3.5,1.5\n")
        assert import_log(path).chunk.limit.tolist() == [1.5]
        assert import_log(path, limit_column="step").chunk.limit.tolist() == [0]


def test_the_exponent_is_read_from_the_name(tmp_path):
    path = written(tmp_path / "log.csv", "step,grad_inf_norm_total\n0,3.5\n")
    assert import_log(path).header.norm_type == math.inf


def test_columns_of_any_name(tmp_path):
    path = written(tmp_path / "log.csv", "when;how big;cap;cost\n4;3.5;1;2\n8;-1;inf;3\n")
    found = import_log(
        path, norm_column="how big", step_column="when", limit_column="cap", loss_column="cost"
    )
    same(found.chunk, {4: 3.5, 8: math.nan})
    assert found.chunk.limit.tolist() == [1.0, math.inf]
    assert found.chunk.loss.tolist() == [2.0, 3.0]
    assert "below 0" in found.notes[0]


def test_rows_without_a_step_are_counted(tmp_path):
    found = import_log(written(tmp_path / "log.csv", "grad_norm,loss\n3.5,1\n,2\n0.5,3\n"))
    same(found.chunk, {0: 3.5, 1: 0.5})
    assert found.chunk.loss.tolist() == [1.0, 3.0]
    assert "counted from 0" in found.notes[0]


REFUSED = [
    (
        "a.csv",
        "Step,r1 - grad_norm,r2 - grad_norm\n0,1,1\n",
        r"several .*'r1 - grad_norm', 'r2 - grad_norm'\. .* gradclip import LOG --norm-col",
    ),
    ("a.csv", "step,lr,loss\n0,1,1\n", "no column is named like .* found: 'step', 'lr', 'los"),
    ("a.csv", "step,loss\n0,1\n", "no column is named like .* found: 'step', 'loss'"),
    ("a.csv", "step,grad_norm\n0,big\n", "line 2: 'grad_norm' is 'big'; allowed: a number"),
    ("a.csv", "step,grad_norm\n0.5,1\n", r"line 2: the step 'step' is '0.5'; allowed: whole"),
    ("a.csv", "step,grad_norm\n0,\n", "'grad_norm' has no values"),
    ("a.csv", f"step,grad_norm\n0,{'1' * 200_000}\n", "line 2: this isn't CSV: field larger"),
    ("a.csv", "step,x,x\n0,1,1\n", "several columns are named 'x'"),
    ("a.jsonl", '{"format":"gradclip-trace"}\n', "this is a trace already"),
    ("a.jsonl", '{"step": 1}\n{"step"\n', "line 2: this isn't JSON"),
    ("a.jsonl", f'{{"step":1,"gnorm":{"1" * 400}}}\n', "line 1: 'gnorm' is 1+; allowed: a num"),
    ("a.jsonl", f'{{"step":{"1" * 5000},"gnorm":1}}\n', "line 1: this isn't JSON: number out"),
    ("a.jsonl", '{"x":' + "[" * 3000, "line 1: this isn't JSON: recursion limit"),
    ("a.json", "[" * 3000, "a.json: this isn't JSON: recursion limit"),
    ("a.jsonl", "", "no column is named like .*; found: no columns"),
    ("a.json", '{"epoch": 1}', "a list 'log_history' is missing"),
    ("run.wandb", "x", "Export the run's history"),
    ("a.bin", "x", "this isn't a log that can be read"),
]


def test_what_cannot_be_told_is_refused(tmp_path, subtests):
    for name, text, message in REFUSED:
        path = written(tmp_path / name, text)
        with subtests.test(message), pytest.raises(ConfigError, match=message):
            import_log(path)


def test_other_encodings_do_not_matter(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b"\xef\xbb\xbfstep,grad_norm,gr\xf6\xdfe\r\n0,3.5,\xe4\r\n")
    same(import_log(path).chunk, {0: 3.5})


def test_a_misspelt_column_is_answered_with_the_nearest(tmp_path):
    path = written(tmp_path / "a.csv", "step,grad_norm\n0,1\n")
    with pytest.raises(ConfigError, match="no column 'gradnorm' for grad_norm; did you mean 'gra"):
        import_log(path, norm_column="gradnorm")


def test_a_folder_of_several_logs_lists_them(tmp_path):
    for version in ("version_0", "version_1"):
        written(tmp_path / version / "metrics.csv", "step,grad_norm\n0,1\n")
    with pytest.raises(ConfigError, match=r"holds 2 logs(?s:.*)version_0(?s:.*)version_1"):
        import_log(tmp_path)
    with pytest.raises(ConfigError, match="no log in this folder"):
        import_log(written(tmp_path / "empty" / "x.txt", "").parent)


def test_the_command_writes_a_trace_and_says_what_it_took(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "export.csv", WANDB)
    with pytest.raises(SystemExit) as stop:
        main(["import", "export.csv", "--out", "run.jsonl"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    assert "4 steps from 9 to 39, 1 not finite" in said
    assert "grad_norm: run 7 - train/grad_norm" in said
    same(Trace.open("run.jsonl").read())
    with pytest.raises(SystemExit) as stop:
        main(["import", "export.csv", "--out", "run.jsonl"])
    assert stop.value.code == 2
    assert "run.jsonl exists" in capsys.readouterr().err
