"""Groups of a configuration that several optimizers share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from torch.nn import Module, Parameter
from torch.optim import Optimizer

from gradclip import ClipConfig, GroupConfig
from gradclip.adapters import group_names

__all__ = ["configs_of", "named_parameters"]


def named_parameters(
    models: Sequence[Module], optimizer: Optimizer, *, prefixed: bool = False
) -> list[tuple[str, Parameter]]:
    """Names for an optimizer's parameters, unique even if it trains several models.

    Args:
        models: Every model, without the wrappers of distributed training.
        optimizer: Whose parameters to name.
        prefixed: Put `model<i>.` before the names of a single model too.

    Returns:
        The model's own names; with several models preceded by `model<i>.`. Also of parameters of
        these models that need no gradient: the optimizer may get them later.
    """
    owned = {p for group in optimizer.param_groups for p in group["params"]}
    found = [
        (index, name, p)
        for index, model in enumerate(models)
        if not owned.isdisjoint(model.parameters())
        for name, p in model.named_parameters()
        if p in owned or not p.requires_grad
    ]
    is_one = len({index for index, *_ in found}) == 1 and not prefixed
    return [(name if is_one else f"model{index}.{name}", p) for index, name, p in found]


def configs_of(
    config: ClipConfig, models: Sequence[Module], optimizers: Sequence[Optimizer]
) -> list[ClipConfig]:
    """The configuration for each optimizer, without the groups that are of the others.

    A pattern on names may begin with `model<i>.` where that model is the only one its optimizer
    trains. Groups that are of none stay in all, to be refused with the nearest names.

    Args:
        config: For all of them.
        models: Every model, without the wrappers of distributed training.
        optimizers: Those that were given to `accelerator.prepare`.

    Returns:
        One for each optimizer.
    """
    if len(optimizers) < 2:
        return [config] * len(optimizers)
    own = [
        [found for group in config.groups if (found := _as_seen_by(group, models, optimizer))]
        for optimizer in optimizers
    ]
    of_none = [
        group
        for group in config.groups
        if not any(_as_seen_by(group, models, optimizer) for optimizer in optimizers)
    ]
    return [config.model_copy(update={"groups": groups + of_none}) for groups in own]


def _as_seen_by(
    group: GroupConfig, models: Sequence[Module], optimizer: Optimizer
) -> GroupConfig | None:
    """The group in the names of this optimizer's parameters; None if it is another's."""
    kinds = [kind.__name__ for kind in type(optimizer).__mro__]
    if not _any(group.optimizer_group, group_names(optimizer)) or not _any(group.optimizer, kinds):
        return None
    own = [name for name, _ in named_parameters(models, optimizer)]
    if _any(group.match, own) or not own:
        return group
    first = named_parameters(models, optimizer, prefixed=True)[0][0]
    model, _, rest = (group.match or "").partition(".")
    # A model that is trained alone keeps its own names.
    if first != own[0] and first.startswith(f"{model}.") and _any(rest, own):
        return group.model_copy(update={"match": rest})
    return None


def _any(pattern: str | None, names: Iterable[str]) -> bool:
    return pattern is None or any(fnmatchcase(name, pattern) for name in names)
