"""The configuration: one schema for Python, YAML, LightningCLI and Accelerate."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from gradclip.models import MODELS, Model
from gradclip.policies import AnyPolicy, ElementPolicy, Policy

__all__ = ["AlarmConfig", "ClipConfig", "GroupConfig", "LogConfig", "RecorderConfig"]


def _elements_stand_last(policies: list[Policy]) -> list[Policy]:
    early = [policy.type for policy in policies[:-1] if isinstance(policy, ElementPolicy)]
    if early:
        msg = (
            f"has {early[0]!r} before another policy; changing elements one by one changes norms "
            "in a way later policies can't know. Move it to the end; only one can stand there."
        )
        raise ValueError(msg)
    for last in policies[-1:]:
        others = [policy.type for policy in policies[:-1] if not policy.withholds]
        if isinstance(last, ElementPolicy) and last.alone and others:
            msg = (
                f"has {others[0]!r} before {last.type!r}, which clips the gradient plus what it "
                "carries over and can't know how that is scaled; allowed beside it: policies "
                f"that only withhold steps. Remove {others[0]!r}."
            )
            raise ValueError(msg)
    return policies


PolicyList = Annotated[list[AnyPolicy], AfterValidator(_elements_stand_last)]

_OF_FIRST_RANK = ("recorder.file", "log.histograms", "log.warn_after", "log.warn_skips")
"""What may differ by rank: what only the first one writes, shows or says."""


class LogConfig(Model):
    """What is logged, and how often."""

    every_n_steps: Annotated[int, Field(ge=1)] | None = None
    """Optimizer steps between two log entries; null takes the trainer's own interval, or 10."""
    per_parameter: bool = False
    """Also record the norm of each parameter, as `clip/grad_norms/<parameter>`."""
    per_group: bool = False
    """Also log the norm of each of the optimizer's parameter groups, as
    `clip/grad_norms/group/<name>`."""
    update_norm_every: Annotated[int, Field(ge=1)] | None = None
    """Each so many steps also log how far the optimizer's step moved the parameters, as
    `clip/update_norm` and, as a share of their norm, `clip/update_ratio`. Such a step holds a copy
    of the parameters; null never measures it."""
    histograms: bool = False
    """Also give the norms of the last steps to loggers that have histograms."""
    warn_after: Annotated[int, Field(ge=1)] | None = 1000
    """Warn once when the limit bound in none, or in each, of so many steps; null never does."""
    warn_skips: Annotated[int, Field(ge=1)] | None = 5
    """Warn once when so many steps in a row were withheld; null never does."""


class RecorderConfig(Model):
    """The flight recorder: the last steps in a file, with who made the worst of them."""

    steps: Annotated[int, Field(ge=1)] = 512
    """How many of the last steps the file holds; 112 bytes each on the device."""
    worst: Annotated[int, Field(ge=1)] = 16
    """How many of the steps whose norm stood out most keep the norm of every parameter, beside the
    first 8 that weren't finite."""
    file: Annotated[str, Field(min_length=1)] = "gradclip.trace.jsonl"
    """Where, from the trainer's folder for logs, else the working directory; a number is added
    rather than replacing another run's. `.parquet` needs pyarrow. A path that can't be written is
    an error when the clipper is built."""


class AlarmConfig(Model):
    """Alarms: norms that rise, norms that don't come back, too many withheld steps."""

    rise: Annotated[float, Field(gt=0)] = 8.0
    """Early warning: by how many deviations in sum the logarithms of norms have to be above usual,
    of which one a step is free and one step counts for at most three. Lower warns earlier, and
    in vain more often: at 8 once in some million steps."""
    lingers: Annotated[int, Field(ge=1)] = 100
    """After how many steps a rise that hasn't come back is told as lingering."""
    warmup_steps: Annotated[int, Field(ge=2)] = 100
    """Steps that are only learnt from, at the start and after every restart."""
    withheld: Annotated[float, Field(gt=0, le=1)] = 0.1
    """The run ends when more than this share of the last 1000 steps were withheld; 1 never does."""
    stop: Literal["rise", "lingering"] | None = None
    """What else ends the run: any rise, or one that lingers; null only tells."""


class GroupConfig(Model):
    """Parameters that follow other rules. Every condition that is given has to hold.

    Example:
        >>> GroupConfig(match="*.bias", counted=False).policies is None
        True
    """

    match: Annotated[str, Field(min_length=1)] | None = None
    """Shell-style pattern on parameter names: `*` any text, `?` one character, `[ab]` a choice."""
    optimizer_group: Annotated[str, Field(min_length=1)] | None = None
    """Pattern on the `name` of the optimizer's parameter group: `group0` ... where it has none, and
    `<name>.<index>` where several have the same."""
    optimizer: Annotated[str, Field(min_length=1)] | None = None
    """Pattern on the class name of the optimizer that steps them, such as `Muon`."""
    policies: PolicyList | None = None
    """Their own policies, in order (an empty list: none); null leaves them with the main list."""
    counted: bool | None = None
    """Whether they are part of the main list's norms of more than one parameter; null says yes
    without policies of their own, and no with them."""
    scaled: bool = True
    """Whether their gradients may be changed; false only measures them."""
    watched: bool = True
    """Whether a NaN in them, or a policy that withholds steps, may withhold the step for them."""

    @model_validator(mode="after")
    def _says_what_it_means(self) -> GroupConfig:
        if self.match is None and self.optimizer_group is None and self.optimizer is None:
            msg = "names no parameters; give match, optimizer_group or optimizer."
            raise ValueError(msg)
        counted = self.policies is None if self.counted is None else self.counted
        if counted and not self.watched:
            msg = (
                "is counted and not watched, so that a NaN in it would reach the norm unseen; set "
                "counted: false too, or leave watched out."
            )
            raise ValueError(msg)
        return self


class ClipConfig(Model):
    """Policies, applied in order, and what goes with them.

    Example:
        >>> config = ClipConfig.model_validate({"policies": [{"type": "norm", "max_norm": 1.0}]})
        >>> config.policies[0].type
        'norm'
    """

    policies: Annotated[PolicyList, Field(min_length=1)]
    """Applied in order, each to the gradients as those before it leave them."""
    on_nonfinite: Literal["skip", "raise", "ignore"] = "skip"
    """A NaN or infinite gradient: withhold the step, stop with an error, or let it pass."""
    stage: Literal["step", "after_backward"] = "step"
    """When: once, on what was accumulated for the step, or each backward's own contribution before
    it joins the others (micro-batch clipping: `GradientClipper.micro_batch`)."""
    apply: Literal["auto", "in_place", "fold"] = "auto"
    """How: write the gradients (in_place), hand the coefficient to a fused optimizer's step, which
    multiplies while it reads and withholds on the device (fold), or what is right and fastest."""
    schedule_on_skip: Literal["advance", "hold"] | None = None
    """Whether the learning rate's schedule advances at a withheld step: null does as the trainer
    does by itself (Lightning's advances, Accelerate's waits); a plain loop decides by itself."""
    groups: list[GroupConfig] = []  # noqa: RUF012  pydantic copies it
    """First match wins; parameters that match none get `policies`."""
    log: LogConfig = LogConfig()
    """Logging."""
    recorder: RecorderConfig | None = None
    """The flight recorder; null, the default, writes no file."""
    alarm: AlarmConfig | None = None
    """Alarms of norms that rise and of withheld steps; null, the default, has none."""
    verify_every: Annotated[int, Field(ge=0)] = 0
    """Compare configuration, parameters, state and norms over ranks every so many steps, in one
    message of 32 bytes and with a read on the host; 0, the default, when built and loaded alone."""
    compile: bool = False
    """Where the device decides, decide in one graph of `torch.compile`: few launches in place of
    tens, after some seconds at the first step. Needs Triton or, on a CPU, a C++ compiler."""
    debug: bool = False
    """Check before and after each step that gradients are fresh, and within the limit once clipped.
    Costs two reads of the gradients, a message more for each, and reads on the host."""

    @property
    def summary(self) -> str:
        """The policies in a line: `norm(max_norm=1.0), zclip and groups`."""
        text: list[str] = []
        for policy in self.policies:
            fields = policy.model_dump(exclude_defaults=True, exclude={"type"})
            given = ", ".join(f"{key}={value!r}" for key, value in fields.items())
            text.append(f"{policy.type}({given})" if given else policy.type)
        return ", ".join(text) + (" and groups" if self.groups else "")

    @property
    def names_groups(self) -> bool:
        """Whether anything depends on the optimizer's parameter groups."""
        scopes = {policy.measured[0] for chain in self.lists for policy in chain}
        by_pattern = any(group.optimizer_group is not None for group in self.groups)
        return "group" in scopes or by_pattern or self.log.per_group

    @property
    def follows_steps(self) -> bool:
        """Whether a limit depends on how many steps were taken."""
        places = (".after", ".schedule")
        return any(value and name.endswith(places) for name, value in self.shared().items())

    def shared(self) -> dict[str, object]:
        """What has to be the same on every rank, by its place in a file."""
        found = _leaves("", self.model_dump(mode="json"))
        return {place: value for place, value in found if place not in _OF_FIRST_RANK}

    @property
    def lists(self) -> Sequence[Sequence[Policy]]:
        """The main list, then that of each group; empty for a group without one of its own."""
        return (self.policies, *(group.policies or () for group in self.groups))


def _leaves(place: str, value: object) -> Iterator[tuple[str, object]]:
    if isinstance(value, dict):
        for name, own in value.items():
            yield from _leaves(f"{place}.{name}" if place else name, own)
    elif isinstance(value, list):
        for index, own in enumerate(value):
            yield from _leaves(f"{place}[{index}]", own)
    else:
        yield place, value


MODELS |= {
    "alarm": AlarmConfig,
    "groups": GroupConfig,
    "log": LogConfig,
    "recorder": RecorderConfig,
}
