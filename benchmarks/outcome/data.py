"""Training samples that need no download: text, signals, images, a noisy function."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import avg_pool1d, interpolate

TEXT = Path(__file__).with_name("text.txt")
TEXT_SHA256 = "57551e71f86ce9d702cbe26f9e8dc0cc6d4d9fe0af30c8d1ad1e67c2d28ccd2a"
KINDS = 10
SIGNAL_LENGTH, TEMPLATE_LENGTH = 40, 12
IMAGE_SIDE = 12
FEATURES = 16
DEGREES = 1.5
Samples = tuple[Tensor, Tensor]


@cache
def characters() -> tuple[Tensor, Tensor, int]:
    """The text as numbers: training part, held-out last tenth, how many different characters."""
    content = TEXT.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != TEXT_SHA256:
        msg = (
            f"{TEXT}: SHA-256 is {found}, expected {TEXT_SHA256}: losses on another text can't be "
            "compared. Restore the file with git checkout."
        )
        raise ValueError(msg)
    number = {byte: i for i, byte in enumerate(sorted(set(content)))}
    encoded = torch.tensor([number[byte] for byte in content])
    cut = len(encoded) * 9 // 10
    return encoded[:cut], encoded[cut:], len(number)


def text(generator: Generator, count: int, context: int) -> Samples:
    """Pieces of the training text and their continuations, both (count, context)."""
    training = characters()[0]
    starts = torch.randint(len(training) - context, (count, 1), generator=generator)
    window = training[starts + torch.arange(context + 1)]
    return window[:, :-1], window[:, 1:]


def held_out_text(count: int, context: int) -> Samples:
    """Pieces at even distances in the held-out text."""
    held_out = characters()[1]
    starts = torch.linspace(0, len(held_out) - context - 1, count).long()[:, None]
    window = held_out[starts + torch.arange(context + 1)]
    return window[:, :-1], window[:, 1:]


@cache
def _templates(*shape: int) -> Tensor:
    return torch.randn(KINDS, *shape, generator=torch.Generator().manual_seed(7))


def signals(generator: Generator, count: int) -> Samples:
    """One of ten short shapes somewhere in a noisy signal, (count, 1, 40), as in MNIST-1D."""
    kinds = torch.randint(KINDS, (count,), generator=generator)
    shapes = torch.nn.functional.pad(_templates(TEMPLATE_LENGTH)[kinds], (0, 1))
    offsets = torch.randint(SIGNAL_LENGTH - TEMPLATE_LENGTH, (count, 1), generator=generator)
    places = torch.arange(SIGNAL_LENGTH) - offsets
    outside = (places < 0) | (places >= TEMPLATE_LENGTH)
    clean = shapes.gather(1, places.masked_fill(outside, TEMPLATE_LENGTH))
    size = 1 + 0.3 * torch.randn(count, 1, generator=generator)
    noise = torch.randn(count, 1, SIGNAL_LENGTH + 4, generator=generator)
    return (size * clean)[:, None] + avg_pool1d(noise, 5, 1), kinds


def images(generator: Generator, count: int) -> Samples:
    """One of ten smooth patterns, moved and noisy, (count, 1, 12, 12)."""
    kinds = torch.randint(KINDS, (count,), generator=generator)
    patterns = interpolate(_templates(1, 4, 4), IMAGE_SIDE, mode="bilinear")[kinds, 0]
    moved = torch.randint(-2, 3, (count, 2, 1), generator=generator)
    rows, columns = ((torch.arange(IMAGE_SIDE) + moved[:, i]) % IMAGE_SIDE for i in (0, 1))
    placed = patterns[torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None]]
    noise = torch.randn(placed.shape, generator=generator)
    return (placed + noise)[:, None], kinds


@cache
def _teacher() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        layers = nn.Sequential(nn.Linear(FEATURES, 32), nn.Tanh(), nn.Linear(32, 1))
    return layers.requires_grad_(False)


def function(generator: Generator, count: int, noise: float) -> Samples:
    """Points (count, 16) and a teacher's values (count, 1) with Student-t noise.

    With 1.5 degrees of freedom the noise has no variance, so some gradients are enormous.

    Args:
        generator: Where randomness comes from.
        count: Samples.
        noise: What the noise is multiplied by; 0 gives the teacher's values.
    """
    points = torch.randn(count, FEATURES, generator=generator)
    radius, turn = torch.rand(2, count, 1, generator=generator)
    # Bailey's polar form of Student's t.
    t = (DEGREES * (radius.clamp(min=1e-6) ** (-2 / DEGREES) - 1)).sqrt() * (
        2 * torch.pi * turn
    ).cos()
    return points, 5 * _teacher()(points) + noise * t
