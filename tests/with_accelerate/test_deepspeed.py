"""DeepSpeed steps inside `accelerator.backward`: clipped there, told by `clip_grad_norm_`."""

import functools
import math
import shutil
import tempfile

import pytest
import torch
from accelerate import Accelerator, DeepSpeedPlugin, InitProcessGroupKwargs
from support.accelerate_cpu import fresh
from support.nets import uneven_net
from support.ranks import run_on_ranks

import accelerate_clip
from gradclip import ClipByNorm, ClipConfig, ConfigError, ZClip

pytest.importorskip("deepspeed")
pytest.importorskip("transformers")

POLICIES = [ZClip(warmup_steps=3, max_norm=None), ClipByNorm(max_norm=4.0)]
STEPS = 8
CASES = {"stage 0": 0, "stage 1": 1, "stage 2": 2, "stage 3": 3}


def with_deepspeed(stage, mixed_precision="no", accumulate=1, **options):
    """A fresh Accelerator on the ranks' own process group."""
    fresh()
    plugin = DeepSpeedPlugin(
        zero_stage=stage,
        gradient_accumulation_steps=accumulate,
        zero3_init_flag=False,
        **options,
    )
    plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = 4
    return Accelerator(
        mixed_precision=mixed_precision,
        gradient_accumulation_steps=accumulate,
        deepspeed_plugin=plugin,
        kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")],
    )


def prepare(accelerator, enable_after=False):
    clip = None if enable_after else accelerate_clip.enable(accelerator, POLICIES)
    model = uneven_net()
    opt = torch.optim.AdamW(model.parameters(), lr=0.02)
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda _: 1.0)
    model, opt, schedule = accelerator.prepare(model, opt, schedule)
    return clip or accelerate_clip.enable(accelerator, POLICIES), model, opt, schedule


def inputs(step):
    return torch.randn(8, 5, generator=torch.Generator().manual_seed(step))


def train(accelerator, clip, model, opt, schedule, steps=range(STEPS)):
    """Norms returned and recorded, limits, moves of the schedule; a spike, a NaN on one rank."""
    rank, world = accelerator.process_index, accelerator.num_processes
    seen = []
    for step in steps:
        mine = inputs(step).view(world, -1, 5)[rank].to(next(model.parameters()).dtype)
        factor = {4: 60.0, 6: math.nan}.get(step, 1.0) if rank == 0 or step == 4 else 1.0
        opt.zero_grad()
        accelerator.backward(model(mine).float().square().mean() * factor)
        norm = accelerator.clip_grad_norm_(model.parameters(), 4.0)
        opt.step()
        schedule.step()
        record = clip.last_record
        assert type(norm) is torch.Tensor
        assert repr(float(norm)) == repr(float(record.grad_norm))
        assert opt.step_was_skipped == bool(record.skipped) == (step == 6)
        # Accelerate moves a schedule once for each process.
        moves = schedule.scheduler.last_epoch / world
        seen.append((float(norm), float(record.limit), moves))
    return seen


def accumulated():
    accelerator = with_deepspeed(2, accumulate=2)
    clip, model, opt, _ = prepare(accelerator)
    norms = []
    for step in range(4):
        with accelerator.accumulate(model):
            mine = inputs(step).view(2, -1, 5)[accelerator.process_index]
            accelerator.backward(model(mine).square().mean())
            norms.append(float(accelerator.clip_grad_norm_(model.parameters(), 4.0)))
            opt.step()
            opt.zero_grad()
    return [math.isnan(norm) for norm in norms], clip.steps[0]


def thresholds():
    """Which thresholds for DeepSpeed are errors: those that someone wrote and ours differ from."""
    for after in (False, True):
        with pytest.raises(ConfigError, match=r"gradient_clipping to 0.3, .*'max_norm': 4.0") as e:
            prepare(with_deepspeed(2, gradient_clipping=0.3), after)
        assert "DeepSpeedPlugin" in str(e.value)
        for options in ({}, {"gradient_clipping": 4.0}):
            _, model, *_ = prepare(with_deepspeed(2, **options), after)
            assert model.gradient_clipping() == model.optimizer.clip_grad == 0
    accelerator = with_deepspeed(2)
    given = accelerator.state.deepspeed_plugin.deepspeed_config
    before = dict(given)
    clip = accelerate_clip.enable(accelerator, ClipConfig(policies=POLICIES))
    assert given["gradient_clipping"] == 0 != before["gradient_clipping"]
    clip.detach()
    assert given == before


def advancing():
    """A schedule can't be told withheld steps from DeepSpeed's overflows."""
    accelerator = with_deepspeed(2)
    config = ClipConfig(policies=POLICIES, schedule_on_skip="advance")
    accelerate_clip.enable(accelerator, config)
    model = uneven_net()
    with pytest.raises(ConfigError, match="schedule_on_skip is 'advance', and DeepSpeed"):
        accelerator.prepare(model, torch.optim.AdamW(model.parameters()))


def resumed(folder):
    accelerator = with_deepspeed(2)
    pieces = prepare(accelerator)
    train(accelerator, *pieces, range(4))
    accelerator.save_state(folder)
    straight = train(accelerator, *pieces, range(4, STEPS))
    accelerator = with_deepspeed(2)
    pieces = prepare(accelerator)
    accelerator.load_state(folder)
    return straight, train(accelerator, *pieces, range(4, STEPS)), pieces[0].steps[0]


class Sentences(torch.utils.data.Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, index):
        tokens = torch.arange(16) + index % 32
        return {"input_ids": tokens, "labels": tokens}


def by_trainer(folder):
    """transformers' Trainer, with its own max_grad_norm of 1: norms it logs, and what was done."""
    from accelerate.state import PartialState
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

    fresh()
    backend = PartialState._prepare_backend
    PartialState._prepare_backend = lambda *a, **k: ("gloo", backend(*a, **k)[1])
    settings = {
        "zero_optimization": {"stage": 2},
        "gradient_clipping": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "train_batch_size": "auto",
        "zero_allow_untested_optimizer": True,
    }
    sizes = {"vocab_size": 64, "n_positions": 32, "n_embd": 16, "n_layer": 1, "n_head": 2}
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=3,
        per_device_train_batch_size=4,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        deepspeed=settings,
    )
    trainer = Trainer(GPT2LMHeadModel(GPT2Config(**sizes)), arguments, train_dataset=Sentences())
    clip = accelerate_clip.enable(trainer.accelerator, ClipByNorm(max_norm=0.01))
    trainer.train()
    PartialState._prepare_backend = backend
    logged = [row["grad_norm"] for row in trainer.state.log_history if "grad_norm" in row]
    return logged, float(clip.last_record.grad_norm), float(clip.last_record.clipped_norm)


def on_rank(rank, world, folder):
    from support import deepspeed_cpu  # noqa: F401

    found = {}
    for name, stage in CASES.items():
        accelerator = with_deepspeed(stage)
        assert accelerator.num_processes == world
        found[name] = train(accelerator, *prepare(accelerator, enable_after=stage == 1))
    thresholds()
    advancing()
    found |= {"accumulated": accumulated(), "resumed": resumed(folder)}
    return found | {"trainer": by_trainer(folder)}


@functools.cache
def answers():
    folder = tempfile.mkdtemp()
    try:
        return run_on_ranks(on_rank, 2, folder, timeout=150)
    finally:
        shutil.rmtree(folder)


def test_two_ranks_do_what_one_does():
    accelerator = Accelerator(cpu=True)
    one = train(accelerator, *prepare(accelerator))
    assert any(norm > limit for norm, limit, _ in one)
    for name in CASES:
        first, second = (answer[name] for answer in answers())
        assert repr(first) == repr(second), name
        for got, expected in zip(first, one, strict=True):
            assert got == pytest.approx(expected, rel=1e-5, nan_ok=True), name


def test_nothing_is_recorded_while_gradients_accumulate():
    for unknown, steps in (answer["accumulated"] for answer in answers()):
        assert unknown == [True, False, True, False]
        assert steps == 2


def test_a_resumed_run_goes_on_bitwise():
    for straight, rest, steps in (answer["resumed"] for answer in answers()):
        assert repr(rest) == repr(straight)
        assert steps == STEPS


def test_transformers_trainer_logs_the_norm_that_was_clipped():
    (logged, norm, clipped), (_, other, _) = (answer["trainer"] for answer in answers())
    assert norm == other
    assert logged[-1] == pytest.approx(norm, rel=1e-6)
    assert len(logged) == 3
    assert clipped == pytest.approx(0.01, rel=1e-3)
