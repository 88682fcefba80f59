"""One run: a cell, a seed and a rival give a final loss."""

from __future__ import annotations

import hashlib
import math
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import SGD, AdamW, Muon, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from benchmarks.outcome.cells import Cell
from benchmarks.outcome.faults import batch_of
from benchmarks.outcome.measures import spike_score, steps_to_follow
from benchmarks.outcome.rivals import Rival, Training
from benchmarks.outcome.tasks import TASKS

WARMUP, LAST_SHARE = 0.1, 0.01
LEARNT = 0.95
CHECK_EVERY = 25
SOURCES = ("cartpole", "data", "faults", "lora", "measures", "models", "tasks", "train")


@dataclass(frozen=True)
class Result:
    """What one run left behind.

    Attributes:
        loss: At the end, on validation samples.
        untrained: The same before the first step.
        diverged: The end is hardly better than the beginning (95 % of it), or isn't a number.
        clip_rate: Share of the steps whose gradients were changed.
        skipped: Steps that were withheld.
        spike_score: Share of the training losses that stand out.
        follow: Steps until a lasting change is no longer fought; -1 without a change.
        seconds: CPU time.
    """

    loss: float
    untrained: float
    diverged: bool
    clip_rate: float
    skipped: int
    spike_score: float
    follow: int
    seconds: float


def share_of_rate(cell: Cell, step: int, steps: int) -> float:
    """The learning rate of a step as a share of the cell's: it rises, then falls to nearly 0."""
    if cell.change == "restart":
        step, steps = step % (steps // 2), steps // 2
    rising = WARMUP * steps
    if step < rising:
        return (step + 1) / rising
    turn = math.pi * (step - rising) / (steps - rising)
    return LAST_SHARE + (1 - LAST_SHARE) * (1 + math.cos(turn)) / 2


def optimizers_of(cell: Cell, model: nn.Module) -> list[Optimizer]:
    """The cell's optimizer; for Muon two of them."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if cell.optimizer == "sgd":
        return [SGD([p for _, p in named], lr=cell.rate, momentum=0.9)]
    hidden, rest = list[nn.Parameter](), list[nn.Parameter]()
    for name, p in named:
        is_hidden = p.ndim == 2 and not name.startswith(("embed", "head"))
        (hidden if is_hidden and cell.optimizer == "muon" else rest).append(p)
    betas, decay = (0.9, cell.beta2), cell.decay
    made: list[Optimizer] = [
        AdamW(rest, lr=cell.rate, betas=betas, eps=cell.eps, weight_decay=decay)
    ]
    if hidden:
        like_adam = "match_rms_adamw"
        made.append(Muon(hidden, lr=cell.rate, weight_decay=decay, adjust_lr_fn=like_adam))
    return made


def run(cell: Cell, seed: int, rival: Rival) -> Result:
    """Train once. Nothing but the rival differs between rivals of a cell and seed."""
    began = time.process_time()
    task = TASKS[cell.task]
    steps, parts = task.steps, cell.accumulate
    model = task.model(seed)
    untrained = task.validate(model)
    optimizers = optimizers_of(cell, model)
    schedules = [LambdaLR(o, lambda step: share_of_rate(cell, step, steps)) for o in optimizers]
    scaler = GradScaler("cpu", growth_interval=25) if cell.fault == "fp16" else None
    guard = rival.start(Training(model, optimizers, scaler))
    frozen = _frozen(cell, model)
    change = steps // 3 if cell.change == "unfreeze" else steps // 2
    losses, clipped, skipped = list[float](), list[bool](), 0
    for step in range(steps):
        for p in frozen:
            p.requires_grad_(step >= change)
        times = 4 if cell.change == "batch" and step >= change else 1
        total = torch.zeros(())
        for part in range(parts):
            batch = batch_of(task, cell.fault, seed, step, part, times=times)
            with guard.micro_batch(1 / parts):
                loss = task.loss(model, batch.inputs, batch.targets)
                weighted = batch.weight / parts * loss
                (weighted if scaler is None else scaler.scale(weighted)).backward()
            total += weighted.detach()
            if not batch.spoilt:
                losses.append(float(loss.detach()))
        if scaler is not None:
            _through_half(model)
        guard.before_step(total)
        for optimizer in optimizers:
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
        if scaler is not None:
            scaler.update()
        was_clipped, was_skipped = guard.did()
        clipped.append(was_clipped)
        skipped += was_skipped
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.zero_grad()
            schedule.step()
        if step % CHECK_EVERY == 0 and not _finite(model):
            break  # it can't recover
    final = task.validate(model)
    return Result(
        loss=final,
        untrained=untrained,
        diverged=not final < LEARNT * untrained,
        clip_rate=sum(clipped) / steps,
        skipped=skipped,
        spike_score=spike_score(losses),
        follow=steps_to_follow(clipped, change) if cell.change != "none" else -1,
        seconds=time.process_time() - began,
    )


@cache
def _code() -> str:
    folder = Path(__file__).parent
    return "".join((folder / f"{name}.py").read_text(encoding="utf-8") for name in SOURCES)


def setup_of(cell: Cell) -> str:
    """Hash of everything but the rival that decides a run's result: cell, code, torch."""
    told = repr({**vars(cell), "why": ""}) + _code() + torch.__version__
    return hashlib.sha256(told.encode()).hexdigest()[:12]


def _frozen(cell: Cell, model: nn.Module) -> list[nn.Parameter]:
    """The first half of what is trained, if the cell unfreezes it later."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return trained[: len(trained) // 2] if cell.change == "unfreeze" else []


def _through_half(model: nn.Module) -> None:
    """Round gradients to float16 and back: what is too large becomes infinite."""
    for p in model.parameters():
        if p.grad is not None:
            p.grad.copy_(p.grad.half())


def _finite(model: nn.Module) -> bool:
    return all(bool(p.isfinite().all()) for p in model.parameters())
