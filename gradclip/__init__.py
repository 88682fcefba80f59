"""Gradient clipping for PyTorch: right under sharding, adaptive, nearly free.

>>> import gradclip
>>> clipper = gradclip.GradientClipper(model, optimizer)  # doctest: +SKIP
>>> record = clipper.clip()  # doctest: +SKIP
"""

from gradclip.clipper import GradientClipper
from gradclip.config import (
    AlarmConfig,
    ClipConfig,
    GroupConfig,
    LogConfig,
    PolicyLike,
    RecorderConfig,
    as_config,
    load_section,
    load_yaml,
)
from gradclip.errors import (
    AlarmError,
    ClipError,
    ConfigError,
    DebugError,
    LayoutError,
    NonFiniteError,
    SkipLimitError,
)
from gradclip.functional import clip_grad_norm_, clip_grad_value_, get_total_norm
from gradclip.plan.parameters import configs_for
from gradclip.policies import (
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
    after,
)
from gradclip.records.alarm import Spike
from gradclip.records.record import ClipRecord

__version__ = "0.1.0"

__all__ = [
    "AGC",
    "AdaGC",
    "AlarmConfig",
    "AlarmError",
    "Auto",
    "AutoClip",
    "ClipByNorm",
    "ClipByRMS",
    "ClipByValue",
    "ClipConfig",
    "ClipError",
    "ClipRecord",
    "ConfigError",
    "DebugError",
    "EmaClip",
    "GradientClipper",
    "GroupConfig",
    "LayoutError",
    "LogConfig",
    "NonFiniteError",
    "PolicyLike",
    "RecorderConfig",
    "Schedule",
    "SkipLarge",
    "SkipLimitError",
    "SkipNonfinite",
    "SkipSpike",
    "Spam",
    "Spike",
    "SpikeMax",
    "UClip",
    "ZClip",
    "after",
    "as_config",
    "clip_grad_norm_",
    "clip_grad_value_",
    "configs_for",
    "get_total_norm",
    "load_section",
    "load_yaml",
]
