"""From parameters and a configuration to a layout and a plan."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch.nn import Parameter

from gradclip.config import ClipConfig
from gradclip.errors import ConfigError
from gradclip.layouts import Groups, detect, gathered, is_flat, refuse_shared_names
from gradclip.parameters import collect_parameters, facts_of
from gradclip.scopes import Plan, build_plan, needs_places, refuse_scopes
from gradclip.types import Layout, Place

__all__ = ["lay_out"]


def lay_out(
    config: ClipConfig,
    named: Iterable[tuple[str, Parameter]] | None,
    optimizer: Any | None,
    process_group: Groups | None,
    layout: Layout | None,
) -> tuple[Layout, Plan]:
    """Find out which ranks hold what, and cut the parameters into what policies decide on.

    Args:
        config: The policies, and which parameters follow which.
        named: Names of parameters.
        optimizer: Whose parameters; None for all that are named.
        process_group: One more group of ranks that hold other parameters.
        layout: Found out from the parameters if None.

    Raises:
        ConfigError: If the configuration isn't valid for these parameters, or a layout and a
            process group are both given.
        LayoutError: If they are laid out in a way that isn't supported.
    """
    if layout is not None and process_group is not None:
        msg = (
            "layout and process_group are both given, and a layout knows its own groups; "
            "give one of them."
        )
        raise ConfigError(msg)
    parameters = collect_parameters(named, optimizer)
    layout = layout or detect(parameters, process_group)
    places: dict[str, Place] = {}
    if needs_places(config):
        refuse_shared_names(parameters, process_group)
        places = {name: layout.place(name, p) for name, p in parameters.items()}
    shapes = {name: place.shape for name, place in places.items()}
    facts = gathered(facts_of(parameters, optimizer, shapes), process_group)
    plan = build_plan(config, facts, parameters, places, layout.devices[0])
    if any(rule.policy.uses_sizes for rule in plan.rules):
        plan = plan.with_sizes(layout.sizes(plan.slots))
    flat = [name for name, p in parameters.items() if is_flat(p)]
    refuse_scopes(plan, config, grouped=optimizer is not None, flat=flat)
    return layout, plan
