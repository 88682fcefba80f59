"""The tasks: a model, batches, the loss of a batch, and the loss at the end."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from benchmarks.outcome import cartpole, data
from benchmarks.outcome.lora import AdaptedLlama
from benchmarks.outcome.models import GPT, FreeResNet, Recurrent, SignalNet, pilot, student

Half = Literal["tuning", "reporting"]
Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]
CONTEXT, LONG = 48, 256


@dataclass(frozen=True)
class Task:
    """One thing to learn. All randomness comes from torch's seed or a generator.

    Attributes:
        half: Whether policies may be tuned on it, or are only reported on it.
        steps: Optimizer steps of a run.
        size: Samples of a batch.
        build: Makes the model, from torch's seed.
        draw: Inputs and targets of a batch.
        loss: The training loss of a batch.
        validate: The loss at the end, on samples that are always the same; lower is better.
    """

    half: Half
    steps: int
    size: int
    build: Callable[[], nn.Module]
    draw: Callable[[Generator, int], data.Samples]
    loss: Loss
    validate: Callable[[nn.Module], float]

    def model(self, seed: int) -> nn.Module:
        """The untrained model of a seed."""
        torch.manual_seed(seed)
        return self.build()


def surprise(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats."""
    return cross_entropy(model(inputs).flatten(0, -2), targets.flatten())


def distance(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean square."""
    return mse_loss(model(inputs), targets)


@torch.no_grad()
def validated(loss: Loss, samples: Callable[[], data.Samples], model: nn.Module) -> float:
    """The loss on samples that don't depend on the run."""
    return float(loss(model, *samples()))


def _fixed(
    draw: Callable[[Generator, int], data.Samples], count: int
) -> Callable[[], data.Samples]:
    return lambda: draw(torch.Generator().manual_seed(1_000_003), count)


def _text(
    half: Half, steps: int, build: Callable[[int], nn.Module], size: int = 8, context: int = CONTEXT
) -> Task:
    held_out = partial(data.held_out_text, 4096 // context, context)
    return Task(
        half=half,
        steps=steps,
        size=size,
        build=lambda: build(data.characters()[2]),
        draw=partial(data.text, context=context),
        loss=surprise,
        validate=partial(validated, surprise, held_out),
    )


TASKS: Mapping[str, Task] = {
    "gpt_pre": _text("tuning", 350, partial(GPT, context=CONTEXT)),
    "lstm": _text("tuning", 500, Recurrent, size=6, context=LONG),
    "signals": Task(
        "tuning",
        700,
        32,
        SignalNet,
        data.signals,
        surprise,
        partial(validated, surprise, _fixed(data.signals, 2000)),
    ),
    "regression": Task(
        "tuning",
        1500,
        32,
        student,
        partial(data.function, noise=0.5),
        distance,
        partial(validated, distance, _fixed(partial(data.function, noise=0.0), 2000)),
    ),
    "gpt_post": _text("reporting", 350, partial(GPT, context=CONTEXT, post_norm=True)),
    "moe": _text("reporting", 250, partial(GPT, context=CONTEXT, experts=8)),
    "lora": _text("reporting", 300, partial(AdaptedLlama, context=CONTEXT)),
    "resnet": Task(
        "reporting",
        500,
        32,
        FreeResNet,
        data.images,
        surprise,
        partial(validated, surprise, _fixed(data.images, 2000)),
    ),
    "cartpole": Task(
        "reporting",
        150,
        8,
        pilot,
        cartpole.episodes,
        cartpole.loss,
        cartpole.missed,
    ),
}
"""Every task by name. Tuning and reporting share no task."""
