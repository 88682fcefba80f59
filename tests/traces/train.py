"""Trains the small models whose traces lie beside this file; they were only measured, not clipped.

OMP_NUM_THREADS=1 PYTHONPATH=.:examples python tests/traces/train.py [name ...]
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from gpt import GPT, surprise
from text import Text
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from gradclip import ClipByNorm, GradientClipper
from gradclip.records.trace_file import TraceHeader, write_trace

STEPS = 5600
Made = tuple[nn.Module, Optimizer, LRScheduler, Callable[[], Tensor]]


def rising_then_flat(optimizer: Optimizer) -> LRScheduler:
    return LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 100))


def rising_then_cosine(optimizer: Optimizer) -> LRScheduler:
    def rate(step: int) -> float:
        turn = torch.pi * min(step, STEPS) / STEPS
        return min(1.0, (step + 1) / 100) * float(0.55 + 0.45 * torch.cos(torch.tensor(turn)))

    return LambdaLR(optimizer, rate)


def gpt() -> Made:
    """A small GPT on English text; AdamW at a flat rate."""
    text, batch, context = Text(), 8, 32
    model = GPT(len(text.characters), context, width=32, layers=2)
    optimizer = AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)

    def loss() -> Tensor:
        starts = torch.randint(len(text.training) - context - 1, (batch, 1))
        window = text.training[starts + torch.arange(context + 1)]
        return surprise(model(window[:, :-1]), window[:, 1:]).mean()

    return model, optimizer, rising_then_flat(optimizer), loss


def mlp(schedule: Callable[[Optimizer], LRScheduler] = rising_then_cosine) -> Made:
    """A network of three layers on a made function with noise; AdamW, cosine rate."""
    teacher = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 1)).requires_grad_(False)
    model = nn.Sequential(
        nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1)
    )
    optimizer = AdamW(model.parameters(), lr=2e-3)

    def loss() -> Tensor:
        x = torch.randn(32, 16)
        return mse_loss(model(x), 5 * teacher(x) + 0.5 * torch.randn(32, 1))

    return model, optimizer, schedule(optimizer), loss


def late() -> Made:
    """The same at a flat rate, recorded only once it has long been trained."""
    return mlp(rising_then_flat)


def conv() -> Made:
    """A small convolutional network on noisy patterns of ten kinds; SGD with momentum."""
    patterns = torch.randn(10, 1, 12, 12)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(144, 10),
    )
    optimizer = SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=5e-4)

    def loss() -> Tensor:
        kinds = torch.randint(10, (16,))
        return cross_entropy(model(patterns[kinds] + 2.0 * torch.randn(16, 1, 12, 12)), kinds)

    return model, optimizer, rising_then_cosine(optimizer), loss


class Adder(nn.Module):
    """Reads pairs of a number and a mark; says what the two marked numbers add up to."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(2, 32, batch_first=True)
        self.head = nn.Linear(32, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1]).squeeze(-1)


def lstm() -> Made:
    """An LSTM on the adding problem of length 20; AdamW at a flat rate."""
    model = Adder()
    optimizer = AdamW(model.parameters(), lr=2e-3)

    def loss() -> Tensor:
        numbers, marks = torch.rand(32, 20), torch.zeros(32, 20)
        places = torch.rand(32, 20).topk(2).indices
        marks.scatter_(1, places, 1.0)
        return mse_loss(model(torch.stack([numbers, marks], -1)), (numbers * marks).sum(1))

    return model, optimizer, rising_then_flat(optimizer), loss


RUNS: dict[str, tuple[Callable[[], Made], int]] = {
    "gpt": (gpt, 0),
    "mlp": (mlp, 0),
    "late": (late, 20_000),
    "conv": (conv, 0),
    "lstm": (lstm, 0),
}
"""How each is made, and the step that its trace begins at."""


def train(made: Callable[[], Made], first: int) -> Iterator[dict[str, float]]:
    torch.manual_seed(1)
    model, optimizer, schedule, loss_of = made()
    clipper = GradientClipper(
        ClipByNorm(max_norm=float("inf")), model.named_parameters(), optimizer
    )
    for step in range(first + STEPS):
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        norm = float(clipper.clip().grad_norm)
        optimizer.step()
        schedule.step()
        if step >= first:
            yield {"step": step, "grad_norm": float(f"{norm:.6g}"), "loss": float(f"{loss:.5g}")}


if __name__ == "__main__":
    for name in sys.argv[1:] or RUNS:
        path = Path(__file__).with_name(f"{name}.jsonl")
        write_trace(path, TraceHeader(), train(*RUNS[name]))
