"""Logs as the frameworks write them become the norms that were logged."""

import gzip
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


def lines_of(line, norms=NORMS, end="\n"):
    """One line for each step, as `str.format` writes it."""
    return "".join(f"{line.format(step=s, norm=n, float=float(s))}{end}" for s, n in norms.items())


def objects(make, norms=NORMS):
    return "".join(f"{json.dumps(make(step, norm))}\n" for step, norm in norms.items())


def rllib(step, norm):
    stats = {"gradients_default_optimizer_global_norm": norm, "total_loss": 2.0}
    return {"training_iteration": step, "config": {"lr": 0.1}, "learners": {"default": stats}}


RED, GREEN, PLAIN = "\x1b[31m", "\x1b[38;2;0;180;0m", "\x1b[39m"
TITAN = "[rank0]:[titan] 2026-01-02 03:04:05,678 - root - INFO - "
MEGATRON = (
    " [2026-01-02 03:04:05] iteration {step:8}/     500 | consumed samples:     72 | elapsed time "
    "per iteration (ms): 1524.6 | learning rate: 1.0E-04 | lm loss: 2.000000E+00 | loss scale: 1.0 "
    "| {norm}number of skipped iterations:   {skipped} | number of nan iterations:   {nan} |\n"
)
FAIRSEQ = "2026-01-02 03:04:05 | INFO | {} | {}\n"
COUNTED = dict(enumerate(NORMS.values()))  # where steps have no number
FORMATS = {  # name of the file, its text, the column of the norm, and that of the loss
    "printed by transformers 4": (
        "train.out",
        "Loading weights: 100%\n"
        + lines_of("{{'loss': 2.0, 'grad_norm': {norm}, 'learning_rate': 5e-05, 'epoch': 0.1}}")
        + "{'train_runtime': 9.0, 'train_loss': 2.0, 'epoch': 1.0}\n",
        "grad_norm", "loss",
    ),
    "printed by transformers 5, after a progress bar": (
        "train.log",
        lines_of("  2%|▏ | 1/60 [00:55<54:36, 55.5s/it]{{'loss': '2', 'grad_norm': '{norm}'}}"),
        "grad_norm", "loss",
    ),
    "ms-swift": (
        "logging.jsonl",
        objects(lambda s, n: {"loss": 2.0, "grad_norm": n, "global_step/max_steps": f"{s}/60"}),
        "grad_norm", "loss",
    ),
    "fairseq": (
        "train.log",
        "2026-01-02 03:04:05 | INFO | fairseq.trainer | NOTE: gradient overflow detected\n"
        + "".join(
            FAIRSEQ.format("train_inner", f'{{"epoch": 1, "update": 0.1, "loss": "2", "gnorm": '
            f'"{norm}", "num_updates": "{step}"}}') for step, norm in NORMS.items()
        )
        + FAIRSEQ.format("train", '{"epoch": 1, "train_gnorm": "9", "train_num_updates": "39"}'),
        "gnorm", "loss",
    ),
    "fairseq, simple": (
        "train.log",
        lines_of("epoch 001: {step:5d} / 60 loss=2.0, gnorm={norm}, num_updates={step}, lr=0.1"),
        "gnorm", "loss",
    ),
    "Megatron": (
        "slurm-7.out",
        "".join(
            MEGATRON.format(step=step, norm="", skipped=1, nan=1) if math.isnan(norm)
            else MEGATRON.format(step=step, norm=f"grad norm: {norm} | ", skipped=0, nan=0)
            for step, norm in NORMS.items()
        )
        + " validation loss at iteration 39 | lm loss value: 1.2E+00 | lm loss PPL: 3.3E+00 |\n",
        "grad norm", "lm loss",
    ),
    "torchtitan": (
        "titan.txt",
        lines_of(TITAN + RED + "step: {step:2}  " + GREEN + "loss:  2.0000  grad_norm:  {norm}  "
                 "memory:  5.04GiB(5.31%)  tps: 12,345  mfu: 12.30%" + PLAIN)
        + TITAN + "validate step: 40  loss:  9.0000  memory:  5.04GiB(5.31%)\n",
        "grad_norm", "loss",
    ),
    "verl": (
        "run.log",
        lines_of("step:{step} - actor/grad_norm:{norm} - actor/pg_loss:-0.1 - timing_s/gen:12.3"),
        "actor/grad_norm", None,
    ),
    "a loop of one's own": (
        "log.txt",
        lines_of("step {step:5d} | loss: 2.0 | lr 6e-04 | norm: {norm} | dt: 12.1ms"),
        "norm", "loss",
    ),
    "composer's console": (
        "console.txt",
        lines_of("[batch={step}/60]:\n\t Train time/batch: {step}\n\t Train loss/train/total: 2.0\n"
                 "\t Train l2_norm/grad/global: {norm}\n\t Train l2_norm/grad/layer.weight: 1.0"),
        "Train l2_norm/grad/global", "Train loss/train/total",
    ),
    "composer's file": (
        "logs-rank0.txt",
        lines_of("[metric][batch={step}]: l2_norm/grad/global: {norm} \n"
                 "[metric][batch={step}]: loss/train/total: 2.0 "),
        "l2_norm/grad/global", "loss/train/total",
    ),
    "levanter": (
        "metrics.jsonl",
        objects(lambda s, n: {"step": s, "metrics": {"train/loss": 2.0, "grad/norm/total": n}}),
        "metrics/grad/norm/total", "metrics/train/loss",
    ),
    "RLlib": (
        "result.json", objects(rllib),
        "learners/default/gradients_default_optimizer_global_norm", "learners/default/total_loss",
    ),
    "RLlib's older names": (
        "progress.csv",
        "training_iteration,info/learner/default_policy/learner_stats/grad_gnorm\n"
        + lines_of("{step},{norm}"),
        "info/learner/default_policy/learner_stats/grad_gnorm", None,
    ),
    "dreamer": (
        "metrics.jsonl",
        objects(lambda s, n: {"step": s, "train/opt/grad_norm": n, "train/opt/loss": 2.0}),
        "train/opt/grad_norm", "train/opt/loss",
    ),
    "dreamer's older names": (
        "metrics.jsonl", objects(lambda s, n: {"step": s, "train/model_opt_grad_norm": n}),
        "train/model_opt_grad_norm", None,
    ),
    "maxtext": (
        "metrics.txt",
        objects(lambda s, n: {"learning/loss": 2.0, "learning/grad_norm": 1.0,
                              "learning/raw_grad_norm": n, "step": float(s), "run_name": "a"}),
        "learning/raw_grad_norm", "learning/loss",
    ),
    "mmengine's older file": (
        "20260102_030405.log.json",
        '{"env_info": "..."}\n'
        + objects(lambda s, n: {"mode": "train", "epoch": 1, "iter": s, "grad_norm": n}),
        "grad_norm", None,
    ),
    "torchtitan's names": (
        "log.csv",
        "step,grad_norm,loss_metrics/global_avg_loss\n" + lines_of("{step},{norm},2.0"),
        "grad_norm", "loss_metrics/global_avg_loss",
    ),
    "a table in a text file": (
        "log.txt", "step\tgrad_norm\n" + lines_of("{step}\t{norm}"), "grad_norm", None,
    ),
    "a list": (
        "log.json",
        json.dumps([{"step": s, "grad_norm": n} for s, n in NORMS.items()], indent=1),
        "grad_norm", None,
    ),
    "a list within": (
        "log.json",
        json.dumps({"args": {"betas": [0.9, 0.99]}, "log": {"train": [
            {"step": s, "optim": {"grad_norm": n}} for s, n in NORMS.items()
        ]}}),
        "optim/grad_norm", None,
    ),
    "columns": (
        "history.json",
        json.dumps({"step": list(NORMS), "grad_norm": list(NORMS.values()), "seeds": [1, 2]}),
        "grad_norm", None,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("name", "text", "norm", "loss"), FORMATS.values(), ids=FORMATS)
def test_what_frameworks_print_and_write(tmp_path, name, text, norm, loss):
    found = import_log(written(tmp_path / name, text))
    assert (found.taken["grad_norm"], found.taken.get("loss")) == (norm, loss)
    same(found.chunk, NORMS if "step" in found.taken else COUNTED)
    assert loss is None or set(found.chunk.loss.tolist()) == {2.0}
    assert found.chunk.skipped.tolist() == [False, "skipped" in found.taken, False, False]


def test_compressed_files_and_what_a_shell_of_windows_writes(tmp_path, subtests):
    for name in ("a.csv", "a.jsonl", "a.out"):
        text = {
            "a.csv": "step,grad_norm\n" + lines_of("{step},{norm}"),
            "a.jsonl": objects(lambda s, n: {"step": s, "grad_norm": n}),
            "a.out": lines_of("step: {step} grad_norm: {norm}", end="\r\n"),
        }[name]
        for end, data in {
            "": text.encode("utf-16"),
            ".gz": gzip.compress(text.encode()),
        }.items():
            with subtests.test(name + end):
                path = tmp_path / (name + end)
                path.write_bytes(data)
                same(import_log(path).chunk)
    text = objects(lambda s, n: {"step": s, "grad_norm": n}) * 999
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(text.encode())[:-200])
    with pytest.raises(ConfigError, match="the compressed file is damaged or was cut off"):
        import_log(tmp_path / "cut.jsonl.gz")


def test_steps_of_a_trainer_without_a_norm_are_not_lost(tmp_path):
    """A usual step, a NaN, gradients of zero, no gradients, and a spike that was withheld."""
    none = {"clip/clipped": 0.0, "clip/skipped": 0.0, "clip/nonfinite": 0.0}
    rows = [
        {"grad_norm": 2.0, "clip/grad_norm": 2.0, **none, "clip/clipped": 1.0},
        {**none, "clip/skipped": 1.0, "clip/nonfinite": 1.0},
        {"grad_norm": 0.0, "clip/grad_norm": 0.0, **none},
        {"grad_norm": 0.0, **none},
        {"grad_norm": 9.0, "clip/grad_norm": 9.0, **none, "clip/skipped": 1.0},
    ]
    history = [{"loss": 2.0, **row, "step": step} for step, row in enumerate(rows, 1)]
    content = {"global_step": 5, "log_history": [*history, {"train_loss": 2.0, "step": 5}]}
    found = import_log(written(tmp_path / "trainer_state.json", json.dumps(content)))
    chunk = found.chunk
    same(chunk, {1: 2.0, 2: math.nan, 3: 0.0, 4: 0.0, 5: 9.0})
    assert chunk.clipped.tolist() == [True, False, False, False, False]
    assert chunk.skipped.tolist() == [False, True, False, False, True]
    assert "1 of the steps have no norm: withheld or not finite" in found.notes


def test_an_entry_on_several_steps_of_which_one_was_not_finite_keeps_its_norm(tmp_path):
    text = "step,clip/grad_norm,clip/nonfinite\n9,3.5,1\n19,0.5,0\n"
    chunk = import_log(written(tmp_path / "log.csv", text)).chunk
    assert chunk.grad_norm.tolist() == [3.5, 0.5]
    assert chunk.finite.tolist() == [False, True]


EPOCHS = {  # rows of step and epoch, and the numbers that come out
    "with a column of epochs": ([(1, 0), (2, 0), (3, 0), (1, 1), (2, 1)], [1, 2, 3, 4, 5]),
    "without": ([(0, ""), (10, ""), (20, ""), (0, ""), (10, "")], [0, 10, 20, 30, 40]),
    "epochs that begin with another step": ([(5, 1), (9, 1), (3, 2), (9, 2)], [5, 9, 13, 19]),
    "a run resumed within an epoch": ([(1, 0), (2, 0), (3, 0), (2, 0), (3, 0)], [1, 2, 3]),
    "a run resumed in an earlier epoch": (
        [(1, 0), (2, 0), (1, 1), (2, 1), (1, 2), (1, 1), (2, 1), (1, 2)], [1, 2, 3, 4, 5],
    ),
    "a run resumed, with fractions of epochs": (
        [(10, 0.1), (20, 0.2), (30, 0.3), (20, 0.2), (30, 0.3)], [10, 20, 30],
    ),
    "a run resumed, without epochs": ([(0, ""), (1, ""), (2, ""), (1, "")], [0, 1, 2]),
}  # fmt: skip


@pytest.mark.parametrize(("rows", "steps"), EPOCHS.values(), ids=EPOCHS)
def test_steps_that_begin_again_with_each_epoch_go_on(tmp_path, rows, steps):
    text = "step,epoch,grad_norm,val_loss\n" + "".join(f"{s},{e},1.0,\n" for s, e in rows)
    found = import_log(written(tmp_path / "log.csv", text))
    assert found.chunk.step.tolist() == steps
    assert any("begins again" in note for note in found.notes) == (steps[3:] != [])


CUT = {  # and where
    "log.csv": ("step,grad_norm,lr\n" + lines_of("{step},{norm},1") + "49,8.", "line 6"),
    "log.jsonl": (objects(lambda s, n: {"step": s, "gnorm": n}) + '{"step": 49, "gno', "line 5"),
    "grad_norm": (lines_of("1700000000000 {norm} {step}") + "1700000000000 8.", "line 5"),
}


@pytest.mark.parametrize("name", CUT)
def test_a_last_line_that_was_cut_off_is_a_warning(tmp_path, name):
    text, where = CUT[name]
    with pytest.warns(UserWarning, match=f"{where}: the file was cut off here") as said:
        same(import_log(written(tmp_path / name, text)).chunk)
    assert len(said) == 1


def test_an_output_folder_of_a_trainer(tmp_path):
    """The checkpoint with the most steps, by what it says itself; at the end, the folder's own."""
    for step in (9, 10, 100):
        rows = [{"step": i, "grad_norm": float(i)} for i in range(1, step + 1)]
        text = json.dumps({"global_step": step, "log_history": rows})
        written(tmp_path / f"checkpoint-{step}" / "trainer_state.json", text)
    assert len(import_log(tmp_path).chunk) == 100
    assert len(import_log(tmp_path / "checkpoint-10").chunk) == 10
    written(tmp_path / "trainer_state.json", text)
    assert import_log(tmp_path).path == tmp_path / "trainer_state.json"


def test_a_folder_with_the_same_log_twice(tmp_path):
    written(tmp_path / "result.json", objects(rllib))
    with SummaryWriter(tmp_path) as writer:
        writer.add_scalar("ray/tune/grad_norm", 1.0, 0)
    same(import_log(tmp_path).chunk)


def test_a_limit_known_from_elsewhere(tmp_path):
    path = written(tmp_path / "log.csv", "step,grad_norm\n0,3.5\n1,0.5\n")
    assert import_log(path, limit=1.0).chunk.limit.tolist() == [1.0, 1.0]
    with pytest.raises(ConfigError, match="--limit is 0; allowed: a number above 0"):
        import_log(path, limit=0.0)
    path = written(tmp_path / "log.csv", "step,grad_norm,clip/limit\n0,3.5,1\n")
    with pytest.raises(ConfigError, match="holds the limits of its steps already"):
        import_log(path, limit=1.0)


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
    ("a.json", '{"epoch": 1}', "a list of entries with names and values is missing"),
    ("a.json", '{"log_history": 1}', "a list 'log_history' with names and values is missing"),
    ("a.json", '{"log_history": [{"step": 1, "loss": 2}]}', "logs grad_norm since version 4.38"),
    ("a.jsonl", '{"current_steps": 1, "total_steps": 9}', "norms to trainer_state.json, beside"),
    ("a.csv", "version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "git lfs pull"),
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
