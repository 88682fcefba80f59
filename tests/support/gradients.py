"""Small models with chosen gradients."""

import torch
from torch import nn

from gradclip import (
    AGC,
    AdaGC,
    Auto,
    AutoClip,
    ClipByNorm,
    ClipByRMS,
    ClipByValue,
    EmaClip,
    Schedule,
    SkipLarge,
    SkipNonfinite,
    SkipSpike,
    Spam,
    SpikeMax,
    UClip,
    ZClip,
)

POLICIES = {
    "auto": Auto(),
    "auto_parameter": Auto(scope="parameter", max_norm=5.0, min_norm=0.01),
    "norm": ClipByNorm(max_norm=1.0),
    "norm_parameter": ClipByNorm(max_norm=0.5, scope="parameter"),
    "norm_inf": ClipByNorm(max_norm=0.3, norm_type=float("inf")),
    "norm_p3_group": ClipByNorm(max_norm=0.7, norm_type=3.0, scope="group"),
    "norm_unit": ClipByNorm(max_norm=0.4, scope="unit"),
    "norm_p3_unit": ClipByNorm(max_norm=0.4, norm_type=3.0, scope="unit"),
    "norm_budget": ClipByNorm(max_norm=1.0, scope="parameter", budget="size"),
    "norm_schedule": ClipByNorm(
        max_norm=Schedule(schedule="cosine", start=3.0, end=0.5, steps=6), after=2
    ),
    "rms": ClipByRMS(max_rms=0.5),
    "rms_global": ClipByRMS(max_rms=0.5, scope="global"),
    "agc": AGC(clip_factor=0.5),
    "agc_parameter": AGC(clip_factor=0.5, scope="parameter", exclude=["embed.*"]),
    "autoclip": AutoClip(window=6, warmup_steps=3, percentile=80.0),
    "autoclip_all": AutoClip(history="all", warmup_steps=3, inclusive=True, max_norm=9.0),
    "autoclip_parameter": AutoClip(window=6, warmup_steps=2, scope="parameter", min_norm=0.1),
    "value": ClipByValue(clip_value=0.2),
    "zclip": ZClip(warmup_steps=4, max_norm=None, escape_after=6),
    "zclip_capped": ZClip(warmup_steps=4, max_norm=2.0, variance="exact", sigma_floor=0.02),
    "zclip_median": ZClip(warmup_steps=4, warmup="median", mode="percentile", max_norm=None),
    "zclip_parameter": ZClip(warmup_steps=4, scope="parameter", clip_option="mean"),
    "ema": EmaClip(warmup_steps=4, escape_after=5),
    "ema_group": EmaClip(warmup_steps=3, scope="group", update="raw", escape_after=None),
    "ema_skip": EmaClip(warmup_steps=3, factor=1.5, decay=0.8, update="skip", max_norm=20.0),
    "adagc": AdaGC(warmup_steps=4, escape_after=5),
    "adagc_min": AdaGC(
        warmup_steps=4, warmup="min", mean_floor=0.0, escape_after=None, warmup_norm=None
    ),
    "adagc_global": AdaGC(warmup_steps=3, factor=1.2, scope="global", max_norm=4.0),
    "adagc_unit": AdaGC(warmup_steps=3, scope="unit", mean_floor=0.3),
    "spam": Spam(theta=4.0, warmup_steps=3),
    "spam_reference": Spam(
        theta=9.0, warmup_steps=2, bias_correction=False, moment="own", reset_every=7
    ),
    "spike_max": SpikeMax(decay=0.9),
    "uclip": UClip(limit=0.4),
    "uclip_norm": UClip(limit=1.0, kind="norm", carry_decay=0.9, max_carry=2.0),
    "skip_nonfinite": SkipNonfinite(),
    "skip_nonfinite_bounded": SkipNonfinite(max_consecutive=3),
    "skip_spike": SkipSpike(window=6, warmup_steps=3, z_threshold=4.0),
    "skip_spike_median": SkipSpike(
        window=6, warmup_steps=3, statistic="median", max_consecutive=1, fallback="clip"
    ),
    "skip_large": SkipLarge(limit=50.0),
    "skip_large_inf": SkipLarge(limit=20.0, norm_type=float("inf"), max_consecutive=1),
    "skip_large_ema": SkipLarge(limit=3.0, relative_to="ema", warmup_steps=3, max_consecutive=1),
    "skip_large_percentile": SkipLarge(
        limit=2.0, relative_to="percentile", window=5, warmup_steps=3
    ),
}
"""At least one of every policy type; a test checks that none is missing."""

SHAPES = {"embed.weight": (6, 4), "layer.weight": (3, 4), "layer.bias": (3,), "scale": ()}


def parameters(dtype=torch.float32):
    return {name: nn.Parameter(torch.zeros(shape, dtype=dtype)) for name, shape in SHAPES.items()}


def optimizer_for(params, cls=torch.optim.SGD, **options):
    """Two parameter groups, the first of them named."""
    values = list(params.values())
    groups = [{"params": values[:2], "name": "matrices"}, {"params": values[2:]}]
    return cls(groups, lr=0.1, **options)


def fill(params, seed, size=1.0):
    """Set every gradient to normal values, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in params.values():
        value = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * size
        parameter.grad = value.to(parameter.dtype)


def grads(params):
    return {name: None if p.grad is None else p.grad.clone() for name, p in params.items()}


def assert_same_grads(left, right):
    assert left.keys() == right.keys()
    for name, value in left.items():
        if value is None or right[name] is None:
            assert value is right[name], name
        else:
            assert torch.equal(value, right[name]), name


def flat(params):
    """All gradients as one float64 vector."""
    return torch.cat([p.grad.double().reshape(-1) for p in params.values() if p.grad is not None])


SIZES = [1.0, 1.3, 0.8, 1.1, 0.9, 30.0, 1.2, 1.0, 9.0, 1.0, 1.1, 0.7]
"""Gradient sizes of a short run with two spikes."""


NORM = ClipByNorm(max_norm=0.5)


def small_model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


def backward(model, step=0, size=1.0):
    generator = torch.Generator().manual_seed(step)
    model.zero_grad()
    (model(torch.randn(16, 4, generator=generator)).square().mean() * size).backward()
