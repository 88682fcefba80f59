"""Mathematics: what limit each step gets. Pure functions of reduced norms and state."""

from typing import Annotated, get_args

from pydantic import Field

from gradclip.models import MODELS, POLICIES
from gradclip.policies.adagc import AdaGC
from gradclip.policies.agc import AGC
from gradclip.policies.auto import Auto
from gradclip.policies.autoclip import AutoClip
from gradclip.policies.base import AdaptivePolicy, NormPolicy, Policy, after
from gradclip.policies.elements import ClipByValue, ElementPolicy
from gradclip.policies.ema import EmaClip
from gradclip.policies.fixed import ClipByNorm, ClipByRMS
from gradclip.policies.schedule import Schedule
from gradclip.policies.skip import SkipNonfinite, SkipSpike
from gradclip.policies.skip_large import SkipLarge
from gradclip.policies.spam import Spam
from gradclip.policies.spike_max import SpikeMax
from gradclip.policies.uclip import UClip
from gradclip.policies.zclip import ZClip

__all__ = [
    "AGC",
    "AdaGC",
    "AdaptivePolicy",
    "AnyPolicy",
    "Auto",
    "AutoClip",
    "ClipByNorm",
    "ClipByRMS",
    "ClipByValue",
    "ElementPolicy",
    "EmaClip",
    "NormPolicy",
    "Policy",
    "Schedule",
    "SkipLarge",
    "SkipNonfinite",
    "SkipSpike",
    "Spam",
    "SpikeMax",
    "UClip",
    "ZClip",
    "after",
]

AnyPolicy = Annotated[
    Auto
    | ClipByNorm
    | ClipByValue
    | ClipByRMS
    | AGC
    | AutoClip
    | ZClip
    | EmaClip
    | AdaGC
    | Spam
    | SpikeMax
    | UClip
    | SkipNonfinite
    | SkipSpike
    | SkipLarge,
    Field(discriminator="type"),
]
"""Every policy that YAML can name, by its `type`."""

POLICIES |= {str(p.model_fields["type"].default): p for p in get_args(get_args(AnyPolicy)[0])}
MODELS["schedule"] = Schedule
