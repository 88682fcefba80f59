"""The configuration: one schema for Python, YAML, LightningCLI and Accelerate."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, Field

from gradclip.policies import AnyPolicy, ClipByValue, Policy
from gradclip.policies.strict import STRICT

__all__ = ["ClipConfig", "GroupConfig", "LogConfig"]


def _clamps_stand_last(policies: list[Policy]) -> list[Policy]:
    if any(isinstance(policy, ClipByValue) for policy in policies[:-1]):
        msg = (
            "has 'value' before another policy; clamping elements changes norms in a way later "
            "policies can't know. Move it to the end."
        )
        raise ValueError(msg)
    return policies


PolicyList = Annotated[list[AnyPolicy], AfterValidator(_clamps_stand_last)]


class LogConfig(BaseModel):
    """What is logged, and how often."""

    model_config = STRICT

    every_n_steps: Annotated[int, Field(ge=1)] | None = None
    """Optimizer steps between two log entries; null takes the trainer's own interval, or 10."""
    per_parameter: bool = False
    """Also record the norm of each parameter, as `clip/grad_norm/<parameter>`."""


class GroupConfig(BaseModel):
    """Other rules for some parameters, which then don't count for the rest."""

    model_config = STRICT

    match: Annotated[str, Field(min_length=1)]
    """Shell-style pattern on parameter names: `*` any text, `?` one character, `[ab]` a choice."""
    policies: PolicyList
    """Their policies, in order; an empty list leaves them unclipped."""


class ClipConfig(BaseModel):
    """Policies, applied in order, and what goes with them.

    Example:
        >>> ClipConfig.model_validate({"policies": [{"type": "norm", "max_norm": 1.0}]}).log
        LogConfig(every_n_steps=None, per_parameter=False)
    """

    model_config = STRICT

    policies: Annotated[PolicyList, Field(min_length=1)]
    """Applied in order, each to the gradients as those before it leave them."""
    on_nonfinite: Literal["skip", "raise", "ignore"] = "skip"
    """A NaN or infinite gradient: withhold the step, stop with an error, or let it pass."""
    groups: list[GroupConfig] = []
    """First match wins; parameters that match none get `policies`."""
    log: LogConfig = LogConfig()
    """Logging."""
