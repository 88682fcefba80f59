"""Mathematics: what limit each step gets. Pure functions of reduced norms and state."""

from typing import Annotated

from pydantic import Field

from gradclip.policies.base import AdaptivePolicy, NormPolicy, Policy, after
from gradclip.policies.chain import Rule, combine, decide_all
from gradclip.policies.fixed import ClipByNorm, ClipByValue, SkipNonfinite
from gradclip.policies.schedule import Schedule
from gradclip.policies.zclip import ZClip

__all__ = [
    "AdaptivePolicy",
    "AnyPolicy",
    "ClipByNorm",
    "ClipByValue",
    "NormPolicy",
    "Policy",
    "Rule",
    "Schedule",
    "SkipNonfinite",
    "ZClip",
    "after",
    "combine",
    "decide_all",
]

AnyPolicy = Annotated[ClipByNorm | ClipByValue | ZClip | SkipNonfinite, Field(discriminator="type")]
"""Every policy that YAML can name, told apart by `type`."""
