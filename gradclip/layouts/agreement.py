"""Whether ranks that share a model were given the same, remember the same and decide the same."""

from __future__ import annotations

import gc
import hashlib
import logging
import math
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import timedelta
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn import Parameter
from torch.nn.parallel import DistributedDataParallel

from gradclip.errors import ConfigError, LayoutError
from gradclip.layouts.deepspeed import DeepSpeedLayout
from gradclip.layouts.detect import Groups, distinct_groups, shardings_of
from gradclip.layouts.fsdp1 import is_flattened, unflattened_shape
from gradclip.layouts.geometry import Axis, Sharding, distinct, reduction_axes
from gradclip.layouts.local import device_of
from gradclip.layouts.meshes import axis_of, is_joining, store_of

__all__ = ["Agreement", "bits_of", "shape_of"]

_logger = logging.getLogger("gradclip")
_CPU = torch.device("cpu")
_FIRST, _AGAIN = timedelta(seconds=1), timedelta(milliseconds=250)
"""How long a step waits for ranks that are late to a comparison: at first, and in later steps."""
TOGETHER = timedelta(seconds=60)
"""How long ranks that build a clipper, or load state, wait for others to do so too."""
_FAILED = 0
_WAYS_OUT = {
    "configuration": "Read it from one file, or from values that don't depend on the rank.",
    "parameters": "Give every rank names that mean the same on all of them: "
    "GradientClipper(policy, named_parameters=model, ...).",
    "state": "Load the same state on every rank.",
    "counts": "Load the same state on every rank.",
}

Facts = Mapping[str, Mapping[str, object]]
"""What is compared: for each part, named as in an error, its values by name."""


class _Exchange(NamedTuple):
    """A comparison under way."""

    step: int
    parts: Sequence[str]
    table: list[Tensor]
    work: dist.Work


class Agreement:
    """Compares what the ranks of one clipper have, over the ranks that share its parameters.

    Args:
        axes: Those ranks, along one axis of their grid after the other; empty to compare nothing.
        wrappers: The DDP modules that reduce the gradients, if any.
        every: Steps between two comparisons while training; 0 for none.
        same_names: Every rank has the same parameters, or parts of them.

    Attributes:
        same_names: As given.
    """

    def __init__(
        self,
        axes: Sequence[Axis] = (),
        wrappers: Sequence[DistributedDataParallel] = (),
        every: int = 0,
        *,
        same_names: bool = True,
    ) -> None:
        whole = math.prod(len(axis.ranks) for axis in axes)
        self._groups: list[ProcessGroup] = [axis.group for axis in axes]
        if len(axes) > 1 and whole == dist.get_world_size() and dist.group.WORLD is not None:
            self._groups = [dist.group.WORLD]
        self._wrappers = [weakref.ref(ddp) for ddp in wrappers]
        self._every = every
        self._steps = 0
        self._aside: ProcessGroup | None = None
        self._ranks: list[int] = []
        self._pending: deque[_Exchange] = deque()
        self._warned = self._is_alone = False
        self.same_names = same_names
        self._in_order = same_names
        self._setup = 0

    @classmethod
    def of(
        cls,
        layout: object,
        parameters: Mapping[str, Tensor],
        groups: Groups | None,
        model: nn.Module | None,
        every: int,
    ) -> Agreement:
        """The agreement of the ranks that share these parameters, as far as they are known.

        Args:
            layout: What the user gave; None if it was found out.
            parameters: By name.
            groups: As for `detect`.
            model: The same.
            every: Steps between two comparisons while training; 0 for none.
        """
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return cls()
        if layout is not None:
            own = layout.ranks if isinstance(layout, DeepSpeedLayout) else None
            return cls([] if own is None else _lasting([axis_of(own)]), (), every)
        shardings = distinct(shardings_of(parameters, model).values())
        lines = [axis for own in shardings for axis in (*own.split, *own.copied)]
        apart = distinct_groups(groups)
        if apart:
            # Other parameters on other ranks: only the ranks of the sums are sure to take part.
            lines = [axis for own in shardings for axis in own.split] + list(map(axis_of, apart))
        axes = _lasting(lines)
        wrappers: list[DistributedDataParallel] = []
        if math.prod(len(axis.ranks) for axis in axes) < dist.get_world_size():
            wrappers = _wrappers_of(parameters.values())
            if not apart:
                axes = _lasting([*lines, *(axis_of(ddp.process_group) for ddp in wrappers)])
        return cls(axes, wrappers, every, same_names=not apart)

    def __reduce__(self) -> tuple[type[Agreement], tuple[()]]:
        """A copy belongs to no ranks: process groups can't be copied."""
        return Agreement, ()

    @property
    def knows_ranks(self) -> bool:
        """Whether there is anyone to compare with."""
        return bool(self._groups)

    def settle(
        self, parameters: dict[str, Parameter], facts: Callable[[], Facts]
    ) -> dict[str, Parameter]:
        """Compare what a clipper is built from, the first time, and find an order for parameters.

        Args:
            parameters: By name, as this rank lists them.
            facts: Gives the configuration and what is known of the parameters.

        Returns:
            The parameters in the order that ranks share: by name, where ranks list them in several
            orders or have different ones.

        Raises:
            ConfigError: As `compare`.
        """
        if not self.knows_ranks:
            return parameters
        found = facts()
        if not self._setup:
            self.compare("GradientClipper", found, parameters if self.same_names else ())
        if not self._in_order:
            parameters = dict(sorted(parameters.items()))
        order = list(parameters) if self.same_names else []
        self._setup = _number([order, *(sorted(own.items()) for own in found.values())])
        return parameters

    def compare(self, where: str, facts: Facts | None, order: Iterable[str] = ()) -> None:
        """Compare facts over ranks, which must all call: one message of 32 bytes.

        If one doesn't, the others say so and compare no more.

        Args:
            where: What the user called, for the error.
            facts: This rank's, in two parts; None if it has none and raises an error of its own.
            order: Names as this rank lists them.

        Raises:
            ConfigError: On every rank, if they differ; names ranks, and what differs.
        """
        if not self._groups or self._is_alone:
            return
        hashes = [_FAILED] * 3
        if facts is not None:
            hashes = [*(_number(sorted(own.items())) for own in facts.values()), _number([*order])]
        table = self._gathered([dist.get_rank(), *hashes])
        if table is None:
            self._is_alone, self._aside = True, None
            _logger.warning(
                "gradclip: %s: some ranks that share the model didn't call it within %d seconds, "
                "so ranks are not compared; call it on all of them.",
                where,
                TOGETHER.total_seconds(),
            )
            return
        self._ranks = sorted(table[:, 0].tolist())
        rows = {rank: row[:2] for rank, *row in sorted(table.tolist())}
        if failed := [rank for rank, row in rows.items() if _FAILED in row]:
            if facts is None:
                return  # its own error says why
            msg = f"{where}: failed on {_shown(failed)}, whose own error says why; nothing changed."
            raise ConfigError(msg)
        self._in_order = self._in_order and len(set(table[:, 3].tolist())) == 1
        if facts is not None and len(set(map(tuple, rows.values()))) > 1:
            raise ConfigError(self._difference(where, facts, rows))
        if self._every:
            # All ranks are here, so nobody is late any more to a comparison of earlier steps. A
            # group of its own: one that is late later must not shift the messages of others.
            self._steps = 0
            self._pending.clear()
            self._aside = dist.new_group(
                self._ranks,
                timeout=timedelta(days=365),
                backend="gloo",
                use_local_synchronization=True,
            )

    def follow(self, facts: Callable[[], Mapping[str, Tensor]]) -> None:
        """Compare what a step was decided by, every so many steps: one message of 32 bytes.

        A rank that makes a step less than others is late to it, so that nobody waits for it for
        long: what comes later is read then.

        Args:
            facts: Gives three values of this step, by what an error calls them.

        Raises:
            ConfigError: On every rank, if they differ; names ranks, and what differs.
        """
        if self._aside is None:
            return
        self._steps += 1
        patience = _AGAIN if self._pending else _FIRST
        if self._steps % self._every == 0:
            self._send(facts())
        while self._pending and self._is_there(self._pending[0], patience):
            self._refuse_difference(self._pending.popleft())

    def refuse_unreduced(self, *, by_steps: bool) -> None:
        """Refuse gradients of DDP that aren't reduced over ranks, as far as that can be seen.

        Args:
            by_steps: Decisions depend on earlier steps, of which ranks may make fewer under `join`.

        Raises:
            ConfigError: If this is within `no_sync`.
        """
        for ddp in filter(None, (known() for known in self._wrappers)):
            if not ddp.require_backward_grad_sync:
                msg = (
                    "clip: called within no_sync() of DistributedDataParallel, where gradients are "
                    "one rank's own, so that ranks would clip differently; allowed: clip() after "
                    "a backward that reduces. Leave no_sync() before the last backward of a step; "
                    "if you reduce by hand, call clip() outside of no_sync()."
                )
                raise ConfigError(msg)
            if by_steps and not self._warned and is_joining(ddp):
                self._warned = True
                _logger.warning(
                    "gradclip: clip: within join() of DistributedDataParallel, and limits depend "
                    "on earlier steps. A rank whose data ends early makes fewer steps, so that "
                    "ranks clip differently afterwards. When join() has ended, load the state_dict "
                    "of the rank with the most steps on every rank (docs/layouts.md), or use a "
                    "fixed limit."
                )

    def _gathered(self, mine: Sequence[int]) -> Tensor | None:
        """What each rank has, in rows; None if not all of them came."""
        table = torch.tensor([mine], dtype=torch.int64, device=_CPU)
        for group in self._groups:
            if not _all_come(group):
                return None
            table = table.to(device_of(group, _CPU))
            parts = [torch.empty_like(table) for _ in range(dist.get_world_size(group))]
            dist.all_gather(parts, table, group)
            table = torch.cat(parts)
        return table.to(_CPU)

    def _difference(self, where: str, facts: Facts, rows: Mapping[int, Sequence[int]]) -> str:
        """The error for facts that differ; every rank must call, as it asks for them."""
        told: list[tuple[int, Facts]] = [(dist.get_rank(), facts)]
        for group in self._groups:
            found = [told] * dist.get_world_size(group)
            dist.all_gather_object(found, told, group)
            told = [one for others in found for one in others]
        by_rank = dict(told)
        parts, usual = _odd_ones(list(facts), rows)
        lines: list[str] = []
        for part, ranks in parts.items():
            ours, theirs = by_rank[usual][part], by_rank[ranks[0]][part]
            names = [n for n in {**ours, **theirs} if ours.get(n) != theirs.get(n)]
            name = names[0]
            lines.append(
                f"{_shown(ranks)} and rank {usual} differ in {part}: {name} is "
                f"{theirs.get(name, 'missing')} on rank {ranks[0]}, {ours.get(name, 'missing')} on "
                f"rank {usual}" + (f" ({len(names) - 1} more differ)" if len(names) > 1 else "")
            )
        ways_out = " ".join(dict.fromkeys(_WAYS_OUT[part] for part in parts))
        return (
            f"{where}: {'; '.join(lines)}; nothing is changed. Allowed: the same on all ranks that "
            f"share a model. {ways_out}"
        )

    def _send(self, facts: Mapping[str, Tensor]) -> None:
        mine = torch.stack([bits_of(value) for value in facts.values()]).to(_CPU)
        mine = torch.cat([torch.tensor([self._setup], dtype=torch.int64, device=_CPU), mine])
        table = [torch.empty_like(mine) for _ in self._ranks]
        work = dist.all_gather(table, mine, self._aside, async_op=True)
        assert work is not None
        parts = ["configuration or parameters", *facts]
        self._pending.append(_Exchange(self._steps, parts, table, work))

    def _is_there(self, exchange: _Exchange, patience: timedelta) -> bool:
        try:
            exchange.work.wait(patience)
        except RuntimeError:
            if exchange.work.is_completed():
                _logger.warning(
                    "gradclip: clip: a rank has ended, so ranks are compared no more (comparison "
                    "%d was the first without an answer).",
                    exchange.step // self._every,
                )
                self._aside = None
                self._pending.clear()
            return False
        return True

    def _refuse_difference(self, exchange: _Exchange) -> None:
        found = [row.tolist() for row in exchange.table]
        rows = dict(zip(self._ranks, found, strict=True))
        if len(set(map(tuple, found))) == 1:
            return
        parts, usual = _odd_ones(exchange.parts, rows)
        lines = [f"{_shown(ranks)} in {part}" for part, ranks in parts.items()]
        msg = (
            f"clip: in comparison {exchange.step // self._every} (verify_every: {self._every}) "
            f"these ranks differ from rank {usual}: {'; '.join(lines)}. Allowed: the same on all "
            "ranks that share a model. Look for a clip() that a rank left out, state that it "
            "loaded alone, gradients that aren't reduced (no_sync, join), or faulty hardware."
        )
        raise ConfigError(msg)


def bits_of(values: Tensor) -> Tensor:
    """A number for the bits of float64 values, 0-d int64, made where they are.

    Any NaN is one. One value that differs gives another number.
    """
    values = torch.where(values.isnan(), math.nan, values.double()).flatten()
    bits = _mixed(values.view(torch.int64))
    places = torch.arange(len(bits), dtype=torch.int64, device=bits.device)
    return (bits * (2 * places + 1)).sum()


def shape_of(parameter: Tensor) -> tuple[int, ...] | None:
    """The shape of a whole parameter; None where a rank doesn't know it."""
    if is_flattened(parameter):
        return unflattened_shape(parameter)
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _all_come(group: ProcessGroup) -> bool:
    """Whether all ranks of a group come to a comparison; the same answer on those that do.

    A collective would hang where they don't, so they meet in the group's store first.
    """
    store, number = store_of(group), _meetings.get(group, 0)
    _meetings[group] = number + 1
    come, decided = f"gradclip/{number}/come", f"gradclip/{number}/decided"
    try:
        if store.add(come, 1) == dist.get_world_size(group):
            store.compare_set(decided, "", "all")
    except RuntimeError:  # torch's fake process group has no store
        return True
    pause, until = 0.001, time.monotonic() + TOGETHER.total_seconds()
    while not store.check([decided]):  # a file store's own wait looks once a second
        if time.monotonic() > until:
            store.compare_set(decided, "", "not all")
        time.sleep(pause)
        pause = min(2 * pause, 0.1)
    return store.get(decided) == b"all"


_meetings: WeakKeyDictionary[ProcessGroup, int] = WeakKeyDictionary()
"""How many there were, by group."""


def _mixed(bits: Tensor) -> Tensor:
    """Spread differences over all bits; one to one."""
    for shift, factor in ((32, 0x6A09E667F3BCC909), (29, 0x3C6EF372FE94F82B)):
        bits = (bits ^ ((bits >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return bits


def _number(values: object) -> int:
    """A positive number of 63 bits for what has a plain `repr`."""
    digest = hashlib.blake2b(repr(values).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1 | 1


def _odd_ones(
    parts: Sequence[str], rows: Mapping[int, Sequence[int]]
) -> tuple[dict[str, list[int]], int]:
    """For each part the ranks that differ from most others, and the first rank that is usual."""
    found = [tuple(row) for row in rows.values()]
    most = max(found, key=found.count)  # of several the first, whose rank is the lowest
    usual = min(rank for rank, row in rows.items() if tuple(row) == most)
    odd = {
        part: sorted(rank for rank, row in rows.items() if row[column] != most[column])
        for column, part in enumerate(parts)
    }
    return {part: ranks for part, ranks in odd.items() if ranks}, usual


def _shown(ranks: Sequence[int]) -> str:
    more = f" and {len(ranks) - 5} more" if len(ranks) > 5 else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks[:5]))}{more}"


def _lasting(lines: Sequence[Axis]) -> list[Axis]:
    """The axes of the grid that these span; none if they span none."""
    try:
        return reduction_axes([Sharding(tuple(lines))])
    except LayoutError:
        return []


def _wrappers_of(parameters: Iterable[Tensor]) -> list[DistributedDataParallel]:
    """The DDP modules that reduce these parameters, in the order of the parameters.

    Neither a parameter nor torch knows them, so Python's objects are searched.
    """
    found = [x for x in gc.get_objects() if issubclass(type(x), DistributedDataParallel)]
    by_parameter = {p: ddp for ddp in found for p in ddp.parameters()}
    return list(dict.fromkeys(by_parameter[p] for p in parameters if p in by_parameter))
