"""GradientClipCallback, `enable` and the launcher in transformers' Trainer: logs, checkpoints."""

import contextlib
import copy
import functools
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.accelerate_cpu import fresh, sharding_on_cpu
from support.freed import kept
from support.ranks import TESTS, run_on_ranks

import accelerate_clip
from gradclip import AlarmError, ClipConfig, ConfigError

pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

ZCLIP = {"type": "zclip", "warmup_steps": 2, "decay": 0.5, "z_threshold": 0.1, "max_norm": None}
CONFIG = {"policies": [ZCLIP, {"type": "norm", "max_norm": 5.0}]}
KEYS = {"grad_norm", "grad_norm_max", "limit", "coef", "clipped_norm"} | {
    *("clipped", "skipped", "nonfinite", "clip_rate", "clip_rate_window")
}
ZERO = {
    "zero_optimization": {"stage": 2, "reduce_bucket_size": 1000, "allgather_bucket_size": 1000},
    "gradient_clipping": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "train_batch_size": "auto",
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}
WRAPPED = {"transformer_layer_cls_to_wrap": "GPT2Block", "cpu_ram_efficient_loading": False}
OPTIONS = {
    "one": {},
    "ddp": {},
    "fsdp2": {"fsdp": "full_shard", "fsdp_config": WRAPPED | {"fsdp_version": 2}},
    "zero2": {"deepspeed": ZERO, "use_cpu": False},
}


def made(folder, policy=CONFIG, **options):
    from support.trainers import trainer

    fresh()
    callback = accelerate_clip.GradientClipCallback(policy)
    return trainer(folder, callbacks=[callback], **options), callback


def rows_of(trainer):
    from support.trainers import logged

    return logged(trainer)


def valid_json(file):
    def refuse(word):
        raise AssertionError(word)

    return json.loads(Path(file).read_text(), parse_constant=refuse)


def gloo_for_deepspeed():
    """transformers names no backend for it, and Accelerate would choose a GPU's."""
    import support.deepspeed_cpu  # noqa: F401
    from accelerate.state import PartialState

    choose = PartialState._prepare_backend
    PartialState._prepare_backend = lambda *a, **k: ("gloo", choose(*a, **k)[1])


def run_and_resume(folder, world, kind):
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    if kind == "zero2":
        os.environ.pop("ACCELERATE_USE_CPU", None)
        gloo_for_deepspeed()
    elif world > 1:
        os.environ["ACCELERATE_USE_CPU"] = "true"
    given = {"world": world, "gradient_accumulation_steps": 2, **OPTIONS[kind]}
    with sharding_on_cpu() if kind == "fsdp2" else contextlib.nullcontext():
        trainer, callback = made(folder, **copy.deepcopy(given))
    trainer.train()
    assert callback.clip.steps[0] == 6
    with sharding_on_cpu() if kind == "fsdp2" else contextlib.nullcontext():
        again, _ = made(folder, **copy.deepcopy(given))
    again.train(resume_from_checkpoint=f"{folder}/checkpoint-3")
    valid_json(f"{folder}/checkpoint-6/trainer_state.json")
    return rows_of(trainer), rows_of(again)


def on_rank(rank, world, folder, kind):
    return run_and_resume(folder, world, kind)


@functools.cache
def reference(folder):
    return run_and_resume(folder, 1, "one")[0]


@pytest.fixture(scope="module")
def want(tmp_path_factory):
    return reference(str(tmp_path_factory.mktemp("one")))


def test_statistics_join_the_history_as_plain_numbers(want):
    assert [row["step"] for row in want] == [1, 2, 3, 4, 5, 6]
    for row in want:
        assert {key for key in row if key.startswith("clip/")} == {f"clip/{key}" for key in KEYS}
        assert all(type(row[f"clip/{key}"]) is float for key in KEYS)
        assert row["grad_norm"] == pytest.approx(row["clip/grad_norm"], rel=1e-6)
        assert row["clip/clipped_norm"] <= row["clip/limit"] <= 5.0
    assert want[0]["clip/limit"] == 5.0
    assert any(row["clip/clipped"] and row["clip/limit"] < row["grad_norm"] for row in want)


@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "zero2"])
def test_every_layout_logs_and_resumes_as_one_process(kind, want, tmp_path):
    if kind == "zero2":
        pytest.importorskip("deepspeed")
    for rows, resumed in run_on_ranks(on_rank, 2, str(tmp_path), kind):
        assert len(rows) == len(want)
        for row, expected in zip(rows, want, strict=True):
            numbers = {key: row[key] for key in expected if key.startswith(("clip/", "grad"))}
            assert numbers == pytest.approx({key: expected[key] for key in numbers}, rel=1e-3)
        assert resumed == rows


def test_a_resumed_run_is_bitwise_the_uninterrupted_one(tmp_path):
    trainer, _ = made(tmp_path)
    trainer.train()
    again, _ = made(tmp_path)
    again.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-3")
    assert rows_of(again) == rows_of(trainer)
    pairs = zip(trainer.model.parameters(), again.model.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    (tmp_path / "checkpoint-3/gradient_clip.bin").unlink()
    stateless, _ = made(tmp_path)
    stateless.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-3")
    assert rows_of(stateless)[3]["clip/limit"] != rows_of(trainer)[3]["clip/limit"]


def test_enabled_in_the_script_it_is_the_same(want, tmp_path):
    from support.trainers import trainer

    fresh()
    plain = trainer(tmp_path, gradient_accumulation_steps=2)
    accelerate_clip.enable(plain.accelerator, CONFIG)
    plain.train()
    assert rows_of(plain) == want
    assert (tmp_path / "checkpoint-3/gradient_clip.bin").exists()


def test_the_launcher_clips_an_unchanged_script(tmp_path):
    settings = {"use_cpu": True, "num_processes": 1, "distributed_type": "NO"}
    file = tmp_path / "accelerate.yaml"
    file.write_text(json.dumps(settings | {"gradient_clip_config": CONFIG}), encoding="utf-8")
    script = Path(__file__).with_name("hf_train.py")
    command = ["-m", "accelerate_clip.launch", "launch", "--config_file", file, script, tmp_path]
    path = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    first, resumed = valid_json(tmp_path / "rows.json")
    assert resumed == first
    assert first[0]["clip/limit"] == 5.0 > first[5]["clip/limit"]


def test_a_withheld_step_is_valid_json_and_the_schedule_waits(tmp_path):
    from support.trainers import Poisoned

    trainer, _ = made(tmp_path, model=Poisoned)
    trainer.train()
    rows = rows_of(trainer)
    assert [row["clip/skipped"] for row in rows] == [0, 0, 1, 0, 0, 0]
    assert "grad_norm" not in rows[2]
    assert "clip/grad_norm" not in rows[2]
    rates = [row["learning_rate"] for row in rows]
    assert rates[3] == rates[2] < rates[1] < rates[0]
    valid_json(tmp_path / "checkpoint-6/trainer_state.json")
    json.dumps(trainer.state.log_history, allow_nan=False)


def test_a_limit_of_infinity_is_left_out(tmp_path):
    trainer, _ = made(tmp_path, {"policies": [{"type": "norm", "max_norm": float("inf")}]})
    trainer.train()
    assert all("clip/limit" not in row and "clip/coef" in row for row in rows_of(trainer))
    json.dumps(trainer.state.log_history, allow_nan=False)


def test_a_log_holds_the_steps_since_the_last_and_the_flight_record_is_in_the_output(
    tmp_path, want
):
    config = {**CONFIG, "recorder": {}}
    trainer, callback = made(tmp_path, config, logging_steps=3, gradient_accumulation_steps=2)
    trainer.train()
    for row, three in zip(rows_of(trainer), (want[:3], want[3:]), strict=True):
        norms = [one["clip/grad_norm"] for one in three]
        assert row["clip/grad_norm"] == pytest.approx(sum(norms) / 3, rel=1e-5)
        assert row["clip/grad_norm_max"] == pytest.approx(max(norms), rel=1e-5)
        assert row["clip/clipped"] == sum(one["clip/clipped"] for one in three)
        assert row["clip/clip_rate"] == pytest.approx(three[-1]["clip/clip_rate"])
    callback.clip.detach()
    _, *steps = map(json.loads, (tmp_path / "gradclip.trace.jsonl").read_text().splitlines())
    assert [step["batch"] for step in steps] == [1, 3, 5, 7, 9, 11]
    assert all("transformer.wte.weight" in step["per_parameter"] for step in steps)


def test_an_alarm_ends_training_and_names_the_last_good_checkpoint(tmp_path):
    from support.trainers import Rising

    alarm = {"warmup_steps": 12, "stop": "rise"}
    config = {**CONFIG, "log": {"every_n_steps": 6}, "alarm": alarm}
    told = []
    trainer, callback = made(tmp_path, config, model=Rising, max_steps=36, save_steps=12)
    callback.on_spike(told.append)
    with pytest.raises(AlarmError, match="exit code 76") as error:
        trainer.train()
    assert [(spike.kind, spike.step) for spike in told] == [("rise", 24)]
    assert error.value.checkpoint == told[0].checkpoint == str(tmp_path / "checkpoint-24")
    assert trainer.state.global_step == 30


def test_each_parameters_norm_where_asked_for(tmp_path):
    trainer, _ = made(tmp_path, {**CONFIG, "log": {"per_parameter": True}})
    trainer.train()
    assert all(row["clip/grad_norms/transformer.wte.weight"] > 0 for row in rows_of(trainer))


@pytest.mark.parametrize(
    ("max_norm", "times"),
    [(0.5, 1), (1.0, 0), (0, 0), (0.25, 0)],  # 1.0 is what the Trainer passes unasked
)
def test_another_max_grad_norm_is_replaced_and_said_once(max_norm, times, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    policy = {"policies": [{"type": "norm", "max_norm": 0.25}]}
    trainer, callback = made(tmp_path, policy, max_grad_norm=max_norm, save_strategy="no")
    trainer.train()
    assert caplog.text.count("the gradclip configuration decides instead") == times
    assert caplog.text.count("of AdamW, not sharded. Entries: the Trainer's logs.") == 1
    assert float(callback.clip.last_record.clipped_norm) == pytest.approx(0.25, rel=1e-4)


def test_gradients_on_different_meshes_are_clipped_once_and_by_the_policy(tmp_path, monkeypatch):
    policy = {"policies": [{"type": "norm", "max_norm": 0.25}]}
    trainer, _ = made(tmp_path, policy, save_strategy="no")
    if not hasattr(trainer, "_mixed_mesh_grad_norm"):
        pytest.skip("this version of transformers never clips by itself")
    trainer._mixed_mesh_grads = True  # what the Trainer remembers of its first look
    monkeypatch.setattr(
        type(trainer), "_mixed_mesh_grad_norm", lambda *_: pytest.fail("the Trainer's own clip")
    )
    trainer.train()
    for row in rows_of(trainer):
        assert row["grad_norm"] > row["clip/clipped_norm"] == pytest.approx(0.25, rel=1e-4)


def test_added_later_trained_twice_and_searched(tmp_path):
    from support.trainers import trainer
    from transformers.trainer_utils import HPSearchBackend

    fresh()
    plain = trainer(tmp_path, save_strategy="no")
    callback = accelerate_clip.GradientClipCallback(ClipConfig.model_validate(CONFIG))
    plain.add_callback(callback)
    plain.train()
    first = callback.clip
    plain.train()
    assert callback.clip is first
    plain.hp_search_backend = HPSearchBackend.RAY
    plain._hp_search_setup({"learning_rate": 0.1})  # a trial makes a new accelerator
    plain.hp_search_backend = None
    plain.train()
    assert callback.clip is plain.accelerator.gradient_clip is not first
    assert callback.clip.steps[0] == 6


def test_one_that_was_removed_clips_no_more(tmp_path):
    policy = {"policies": [{"type": "norm", "max_norm": 0.25}]}
    trainer, callback = made(
        tmp_path, policy, max_grad_norm=0, save_strategy="no", learning_rate=0.0
    )
    trainer.train()
    [row] = [row for row in rows_of(trainer) if row["step"] == 1]
    assert row["clip/clipped_norm"] == pytest.approx(0.25, rel=1e-4)
    trainer.remove_callback(callback)
    trainer.train()
    assert not any(key.startswith("clip/") for row in trainer.state.log_history for key in row)
    assert callback.clip.steps[0] == 6
    assert not hasattr(trainer.accelerator, "gradient_clip")
    other = accelerate_clip.GradientClipCallback({"policies": [{"type": "norm", "max_norm": 0.1}]})
    trainer.add_callback(other)
    trainer.train()
    [row] = [row for row in rows_of(trainer) if row["step"] == 1]
    assert row["clip/clipped_norm"] == pytest.approx(0.1, rel=1e-4)


def test_one_that_serves_two_trainers_in_turn_clips_each_with_fresh_state(tmp_path):
    first, callback = made(tmp_path / "first", save_strategy="no")
    second, _ = made(tmp_path / "second", save_strategy="no")
    second.remove_callback(accelerate_clip.GradientClipCallback)
    second.add_callback(callback)
    for trainer in (first, second, first):
        trainer.train()
        assert callback.clip is trainer.accelerator.gradient_clip
        assert callback.clip.steps[0] == 6
        assert rows_of(trainer)[0]["clip/limit"] == 5.0


def test_two_that_clip_are_refused(tmp_path):
    trainer, _ = made(tmp_path)
    accelerate_clip.enable(trainer.accelerator, CONFIG)
    with pytest.raises(ConfigError, match="clipping is enabled on this Accelerator already"):
        trainer.train()


def test_a_trainer_that_never_bound_it_is_refused(tmp_path, monkeypatch):
    trainer, _ = made(tmp_path)
    stock = type(trainer).train.__wrapped__
    monkeypatch.setattr(trainer, "train", functools.partial(stock, trainer))
    with pytest.raises(ConfigError, match="AcceleratedOptimizer isn't clipped; allowed"):
        trainer.train()


def test_trainers_are_stock_ones_once_nobody_clips(tmp_path, monkeypatch):
    import gc

    from accelerate_clip import trainer as following

    monkeypatch.setattr(following, "_followers", set())
    monkeypatch.setattr(following, "_on_class", [])
    trainer, callback = made(tmp_path, save_strategy="no", max_steps=1)
    methods = {name for name in vars(trainer) if hasattr(type(trainer), name)}
    trainer.train()
    assert {name for name in vars(trainer) if hasattr(type(trainer), name)} == methods
    stock = type(trainer).train.__wrapped__
    callback.clip.detach()
    assert type(trainer).train is not stock
    trainer.remove_callback(callback)
    del callback
    gc.collect()
    assert type(trainer).train is stock
    clip = accelerate_clip.enable(trainer.accelerator, CONFIG)
    assert type(trainer).train is not stock
    clip.detach()
    assert type(trainer).train is stock


@pytest.mark.parametrize("how", ["callback", "enable"])
def test_a_trainer_that_is_dropped_is_freed_at_once_as_without_it(how, tmp_path):
    from support.trainers import trainer as stock_trainer

    def trained(clips):
        fresh()
        callbacks = [accelerate_clip.GradientClipCallback(CONFIG)] if how == "callback" else []
        callbacks = callbacks if clips else []
        trainer = stock_trainer(tmp_path, callbacks=callbacks, save_strategy="no", max_steps=2)
        if clips and how == "enable":
            accelerate_clip.enable(trainer.accelerator, CONFIG)
        trainer.train()
        fresh()
        parts = {name: getattr(trainer, name) for name in ("model", "accelerator", "optimizer")}
        return {"trainer": trainer, "parameter": next(trainer.model.parameters()), **parts}

    assert kept(trained, True) <= kept(trained, False)


def test_transformers_stays_optional():
    blocked = "import sys; sys.modules['transformers'] = None; import accelerate_clip"
    subprocess.run([sys.executable, "-c", blocked], check=True, cwd=TESTS.parent)
    with pytest.raises(AttributeError, match="no attribute 'Callback'"):
        accelerate_clip.Callback  # noqa: B018
