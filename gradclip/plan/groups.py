"""Which list of policies each parameter follows, and what it counts for."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch

from gradclip.config import ClipConfig, GroupConfig
from gradclip.errors import ConfigError

__all__ = ["Fact", "Membership", "for_each", "matched", "members_of"]


class Fact(NamedTuple):
    """What a plan needs to know of a parameter, also of one that only other ranks hold.

    Attributes:
        group: Its optimizer group, by name.
        dtype: Of its gradient's elements.
        kinds: Names of its optimizer's class and the classes that one is made from.
        shape: Of the whole parameter; empty unless units are measured.
    """

    group: str
    dtype: torch.dtype
    kinds: tuple[str, ...] = ()
    shape: tuple[int, ...] = ()


class Membership(NamedTuple):
    """Where a parameter belongs.

    Attributes:
        group: 0, or 1 + the index of the group it is in.
        chain: The list of policies it follows: 0 for the main one, else its group's own.
        counted: It is part of the main list's global and group norms.
        scaled: Its gradient may be changed.
        watched: It may be the reason that a step is withheld.
    """

    group: int = 0
    chain: int = 0
    counted: bool = True
    scaled: bool = True
    watched: bool = True


def members_of(
    config: ClipConfig, facts: Mapping[str, Fact], frozen: Iterable[str] = ()
) -> dict[str, Membership]:
    """Where every parameter belongs; the first group that matches has it.

    Args:
        config: With the groups.
        facts: Of what is clipped, by name.
        frozen: Names of parameters that need no gradient and aren't clipped yet.

    Raises:
        ConfigError: If a group matches no parameter, nor a frozen one.
    """
    found = dict.fromkeys(facts, Membership())
    for index, group in reversed(list(enumerate(config.groups))):
        names = _in_group(f"groups[{index}]", group, facts, frozen)
        own = group.policies is not None
        counted = not own if group.counted is None else group.counted
        member = Membership(
            index + 1, index + 1 if own else 0, counted, group.scaled, group.watched
        )
        found.update(dict.fromkeys(names, member))
    return found


def for_each(
    config: ClipConfig, facts: Sequence[Mapping[str, Fact]], frozen: Iterable[str] = ()
) -> list[ClipConfig]:
    """One configuration for each set of parameters: with the groups that match any of it.

    A group that matches frozen parameters alone goes to all of them.

    Raises:
        ConfigError: If a group matches in none.
    """
    kept: list[list[GroupConfig]] = [[] for _ in facts]
    for index, group in enumerate(config.groups):
        missed: list[ConfigError] = []
        for own, groups in zip(facts, kept, strict=True):
            try:
                _in_group(f"groups[{index}]", group, own, frozen)
            except ConfigError as error:
                missed.append(error)
            else:
                groups.append(group)
        if len(missed) == len(facts):
            raise missed[0]
    return [config.model_copy(update={"groups": groups}) for groups in kept]


def matched(where: str, pattern: str, names: Iterable[str]) -> list[str]:
    """The names that a shell-style pattern matches.

    Raises:
        ConfigError: If there is none; names the nearest.
    """
    names = list(names)
    found = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
    if not found:
        near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3) or names[:3]
        msg = (
            f"{where} is {pattern!r} and matches no parameter; nearest names: "
            f"{', '.join(near)}. Correct the pattern or remove it."
        )
        raise ConfigError(msg)
    return found


def _in_group(
    where: str, group: GroupConfig, facts: Mapping[str, Fact], frozen: Iterable[str]
) -> Sequence[str]:
    names = list(facts)
    if group.match is not None:
        found = matched(f"{where}.match", group.match, [*names, *frozen])
        names = [name for name in found if name in facts]
        if not names:
            return []
    if group.optimizer_group is not None:
        known = dict.fromkeys(facts[name].group for name in names)
        kept = set(matched(f"{where}.optimizer_group", group.optimizer_group, known))
        names = [name for name in names if facts[name].group in kept]
    if group.optimizer is not None:
        kinds = dict.fromkeys(kind for name in names for kind in facts[name].kinds)
        wanted = set(matched(f"{where}.optimizer", group.optimizer, kinds))
        names = [name for name in names if not wanted.isdisjoint(facts[name].kinds)]
    return names
