"""What goes wrong in a run: which steps, and what happens to their batches."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Generator, Tensor

from benchmarks.outcome.tasks import Task

Fault = Literal["none", "corrupted", "catastrophe", "nan", "heavy", "drift", "fp16"]
CORRUPTED_PER_HUNDRED, CORRUPTED_WEIGHT = 3, 30.0
CATASTROPHE_WEIGHT = 1e4
DRIFT = 100.0
TAIL = 1.2  # below 2: weights without variance


class Batch(NamedTuple):
    """What one backward is made from.

    Attributes:
        weight: What the loss is multiplied by.
        spoilt: Whether something was done to it.
    """

    inputs: Tensor
    targets: Tensor
    weight: float
    spoilt: bool


def generator_of(*numbers: int) -> Generator:
    """Randomness of its own for each seed, step and micro-batch."""
    seed = 0
    for number in numbers:
        seed = seed * 1_000_003 + number + 1
    return torch.Generator().manual_seed(seed % 2**63)


def batch_of(
    task: Task, fault: Fault, seed: int, step: int, part: int = 0, *, times: int = 1
) -> Batch:
    """The batch of a step, and its fault; it depends on nothing else, so all rivals see the same.

    Args:
        task: What to learn.
        fault: What goes wrong; only in the first micro-batch of a step, but for a drift.
        seed: The run's.
        step: The optimizer step.
        part: The micro-batch of the step.
        times: How many usual batches it holds.
    """
    generator = generator_of(seed, step, part)
    inputs, targets = task.draw(generator, times * task.size)
    if fault == "drift":
        return Batch(inputs, targets, DRIFT ** (step / task.steps), spoilt=False)
    if part == 0:
        if fault == "corrupted" and _is_corrupted(seed, step):
            return Batch(inputs, _noise(targets, generator), CORRUPTED_WEIGHT, spoilt=True)
        if fault == "catastrophe" and step == _catastrophe(seed, task.steps):
            return Batch(inputs, _noise(targets, generator), CATASTROPHE_WEIGHT, spoilt=True)
        if fault == "nan" and step % 100 == _place(seed, step):
            return Batch(inputs, targets, float("nan"), spoilt=True)
        if fault == "heavy":
            chance = float(torch.rand((), generator=generator).clamp(min=1e-6))
            return Batch(inputs, targets, (2 * chance) ** (-1 / TAIL), spoilt=False)
    return Batch(inputs, targets, 1.0, spoilt=False)


def _noise(targets: Tensor, generator: Generator) -> Tensor:
    """Targets that have nothing to do with the inputs."""
    if targets.is_floating_point():
        return 10 * torch.randn(targets.shape, generator=generator)
    return torch.randint(int(targets.max()) + 1, targets.shape, generator=generator)


def _is_corrupted(seed: int, step: int) -> bool:
    """Three of every hundred steps."""
    order = torch.randperm(100, generator=generator_of(seed, step // 100))
    return step % 100 in order[:CORRUPTED_PER_HUNDRED].tolist()


def _place(seed: int, step: int) -> int:
    return int(torch.randint(100, (), generator=generator_of(seed, step // 100)))


def _catastrophe(seed: int, steps: int) -> int:
    """One step between four and six tenths of the run."""
    return int(steps * (0.4 + 0.2 * float(torch.rand((), generator=generator_of(seed)))))
