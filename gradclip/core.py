"""From parameters and a configuration to a layout and a plan."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.nn import Parameter

from gradclip.config import ClipConfig
from gradclip.effect.effect import Effect
from gradclip.effect.elements import ElementMemory
from gradclip.errors import ConfigError
from gradclip.kernels import KernelName, kernel_for
from gradclip.layouts import Groups, detect, gathered, is_flat, is_flattened, refuse_shared_names
from gradclip.plan.build import build_plan, needs_regions
from gradclip.plan.parameters import collect_parameters, facts_of
from gradclip.plan.plan import Plan
from gradclip.types import Kernel, Layout, Region

__all__ = ["LaidOut"]


class LaidOut:
    """How the parameters lie and are cut, and what acts on them accordingly.

    Args:
        config: The policies, and which parameters follow which.
        named: Names of parameters.
        optimizer: Whose parameters; None for all that are named.
        process_group: One more group of ranks that hold other parameters.
        layout: Found out from the parameters if None.
        kernel: By name; chosen by the device if None.
        before: What this reregions, of the same optimizer.

    Attributes:
        layout: Which ranks hold what.
        plan: What policies decide on.
        kernel: What measures and scales.
        memory: What element policies remember.
        effect: How a verdict is carried out.

    Raises:
        ConfigError: If the configuration isn't valid for these parameters, or a layout and a
            process group are both given.
        LayoutError: If they are laid out in a way that isn't supported.
    """

    def __init__(
        self,
        config: ClipConfig,
        named: Iterable[tuple[str, Parameter]] | None,
        optimizer: Any | None,
        process_group: Groups | None,
        layout: Layout | None,
        kernel: KernelName | None,
        before: LaidOut | None = None,
    ) -> None:
        self._given = (config, named, optimizer, process_group, layout, kernel)
        self.layout, self.kernel, self.plan = _lay_out(*self._given)
        memory: ElementMemory | None = None if before is None else before.memory
        self.memory: ElementMemory = ElementMemory(self.plan, self.layout, optimizer, memory)
        effect: Effect | None = None if before is None else before.effect
        stepped = None if layout is not None else optimizer
        reads_block = self.kernel.reads_block
        one_by_one = config.stage == "after_backward"
        self.effect: Effect = Effect(
            config.apply,
            self.plan,
            stepped,
            reads_block=reads_block,
            one_by_one=one_by_one,
            before=effect,
        )
        self._signature = self._what_may_change()

    @property
    def device(self) -> torch.device:
        """Where measures, decisions and records live."""
        return self.layout.devices[0]

    def now(self) -> LaidOut:
        """This; or a new one when parameters were added or moved."""
        if self._signature == self._what_may_change():
            return self
        return LaidOut(*self._given, before=self)

    def _what_may_change(self) -> tuple[object, ...]:
        """Cheap to compare each step: the optimizer's groups, and how the parameters lie."""
        optimizer = self._given[2]
        groups = () if optimizer is None else optimizer.param_groups
        first = next(iter(self.plan.parameters.values()))
        return (first.device, is_flattened(first), *(len(group["params"]) for group in groups))


def _lay_out(
    config: ClipConfig,
    named: Iterable[tuple[str, Parameter]] | None,
    optimizer: Any | None,
    process_group: Groups | None,
    layout: Layout | None,
    kernel: KernelName | None,
) -> tuple[Layout, Kernel, Plan]:
    """Find out which ranks hold what, and cut the parameters into what policies decide on."""
    if layout is not None and process_group is not None:
        msg = (
            "layout and process_group are both given, and a layout knows its own groups; "
            "give one of them."
        )
        raise ConfigError(msg)
    parameters = collect_parameters(named, optimizer)
    layout = layout or detect(parameters, process_group)
    chosen = kernel_for(layout.devices, kernel)
    regions: dict[str, Region] = {}
    if needs_regions(config):
        refuse_shared_names(parameters, process_group)
        regions = {name: layout.region(name, p) for name, p in parameters.items()}
    shapes = {name: place.shape for name, place in regions.items()}
    facts = gathered(facts_of(parameters, optimizer, shapes), process_group)
    # The recorder can't tell on the host when it needs the norm of each, where reading waits.
    fine = config.log.per_parameter or (config.recorder is not None and chosen.reads_block)
    plan = build_plan(config, facts, parameters, regions, layout.devices[0], fine=fine)
    if any(rule.policy.uses_sizes for rule in plan.rules):
        plan = plan.with_sizes(layout.sizes(plan.slots))
    flat = [name for name, p in parameters.items() if is_flat(p)]
    _refuse_scopes(plan, config, grouped=optimizer is not None, flat=flat)
    return layout, chosen, plan


def _refuse_scopes(plan: Plan, config: ClipConfig, *, grouped: bool, flat: Sequence[str]) -> None:
    """Refuse scopes that these parameters can't be told apart by.

    Args:
        plan: With the policies.
        config: Where logging asks for parameters.
        grouped: Whether there is an optimizer, whose parameter groups scope "group" means.
        flat: Names of parameters that are many in one.

    Raises:
        ConfigError: If there is such a scope.
    """
    scopes = {rule.policy.measured[0] for rule in plan.rules}
    if "group" in scopes and not grouped:
        msg = (
            "scope is 'group', and without an optimizer there are no parameter groups; "
            "pass optimizer=..., or use scope 'global' or 'parameter'."
        )
        raise ConfigError(msg)
    if flat and (scopes & {"parameter", "unit"} or config.log.per_parameter):
        msg = (
            f"A scope is 'parameter' or 'unit', or log.per_parameter is true, and {flat[0]!r} "
            "is a FlatParameter of FSDP1, many parameters in one; allowed: scope 'global' or "
            "'group'. Wrap with use_orig_params=True to tell parameters apart."
        )
        raise ConfigError(msg)
