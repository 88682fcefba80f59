"""Where DeepSpeed keeps the gradients that its optimizer steps with. Read in deepspeed 0.19.8.

Under ZeRO 1 to 3 each rank owns one partition of the averaged gradients, flat, with padding, and
`parameter.grad` is None when the engine steps. Under stage 0 every rank holds them whole. The
attributes of DeepSpeed that are used are listed in tests/layouts/test_zero_refusals.py, which
fails when one is gone.
"""

from __future__ import annotations

import math
import sys
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate, chain
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import Parameter

from gradclip.devices import decided_on
from gradclip.errors import ConfigError, LayoutError
from gradclip.layouts.deepspeed_refusals import refuse_engine
from gradclip.layouts.local import LocalLayout
from gradclip.types import Collected, Region

__all__ = ["Address", "DeepSpeedLayout", "ModelGroups", "elements", "is_engine", "is_managed"]


def is_engine(value: object) -> bool:
    """Whether this is a DeepSpeed engine."""
    # Without importing deepspeed: an engine exists only if someone else did.
    deepspeed = sys.modules.get("deepspeed")
    return deepspeed is not None and isinstance(value, deepspeed.DeepSpeedEngine)


def is_managed(parameter: Tensor) -> bool:
    """Whether a ZeRO optimizer keeps this parameter's gradient."""
    return hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")


def elements(parameter: Tensor) -> int:
    """How many elements a parameter has; a partitioned one (ZeRO 3) holds none itself."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


class Address(NamedTuple):
    """Where this rank's part of a parameter is.

    Attributes:
        bucket: Index of the flat partition that holds it.
        start: Its first element in the partition.
        size: Number of elements; 0 if this rank holds nothing of the parameter.
        within: Its first element in the flattened parameter.
    """

    bucket: int
    start: int
    size: int
    within: int


_FLAT = (
    "DeepSpeedZeroOptimizer",
    "DeepSpeedZeroOptimizer_Stage3",
    "BF16_Optimizer",
    "FP16_Optimizer",
)
"""The wrappers that lay parameters end to end in flat partitions."""


class ModelGroups:
    """Stands for the optimizer where groups of parameters are asked for.

    DeepSpeed puts flat partitions, without names and shapes, into the optimizer's groups; these
    groups hold the model's own parameters.

    Args:
        groups: Options and parameters, as in `torch.optim.Optimizer.param_groups`.
        stepping: The optimizer that DeepSpeed steps.
    """

    def __init__(self, groups: Sequence[Mapping[str, Any]], stepping: Any) -> None:
        self.param_groups = list(groups)
        self.stepping = stepping


class DeepSpeedLayout(LocalLayout):
    """The parts of the gradients that this rank steps with; every element is on one rank.

    Args:
        engine: A DeepSpeed engine that has an optimizer.

    Raises:
        LayoutError: If the engine can't be clipped exactly; says why.
    """

    @classmethod
    def of(cls, optimizer: object, layout: object) -> DeepSpeedLayout | None:
        """The layout of a DeepSpeed engine that was given as the optimizer; None for others.

        Args:
            optimizer: What the user gave as optimizer.
            layout: What the user gave as layout; an engine allows none.

        Raises:
            ConfigError: If another layout was given with it.
            LayoutError: If the engine can't be clipped exactly.
        """
        if not is_engine(optimizer):
            return None
        if layout is not None:
            msg = "layout is given with a DeepSpeed engine, which has its own; leave it out."
            raise ConfigError(msg)
        return cls(optimizer)

    def __init__(self, engine: Any) -> None:
        refuse_engine(engine)
        self.engine = engine
        self.kind = type(engine.optimizer).__name__
        held = _parameters(engine.optimizer, self.kind)
        options = ("params", "param_names")
        self.groups = ModelGroups(
            [
                {**{k: v for k, v in group.items() if k not in options}, "params": params}
                for group, params in zip(engine.optimizer.param_groups, held, strict=True)
            ],
            engine.basic_optimizer,
        )
        self._addresses = dict(_addresses(engine.optimizer, self.kind, held))
        spread = _process_group(engine.optimizer, self.kind)
        self.ranks: ProcessGroup = engine.seq_data_parallel_group
        spread_over = [] if spread is None or dist.get_world_size(spread) == 1 else [spread]
        super().__init__({}, spread_over)
        flat = [group["params"] for group in engine.optimizer.param_groups]
        if self.kind == "DeepSpeedZeroOptimizer_Stage3":
            flat = [engine.optimizer.fp32_partitioned_groups_flat]
        self.devices = decided_on(p.device for p in chain.from_iterable(flat))
        self._slots: Sequence[Sequence[Tensor]] = ()
        self._members: dict[int, list[tuple[int, Address]]] = {}
        self._in_step = False

    @contextmanager
    def in_step(self) -> Iterator[None]:
        """Within this context gradients are averaged and final, so that they can be measured."""
        self._in_step = True
        try:
            yield
        finally:
            self._in_step = False

    def collect(self, slots: Sequence[Sequence[Tensor]]) -> Collected:
        """Take this rank's parts of the gradients, without padding.

        Raises:
            LayoutError: If DeepSpeed isn't inside a step (`in_step`).
        """
        if not self._in_step:
            msg = (
                "clip() was called on a clipper of a DeepSpeed engine, which averages, clips and "
                "steps inside engine.step(). Call clipper.attach(engine) once and leave clip() out."
            )
            raise LayoutError(msg)
        return self._parts_in(self._measured, slots)

    def weights(self, slots: Sequence[Sequence[Tensor]]) -> Collected:
        """Take this rank's parts of the float32 parameters that the optimizer steps."""
        return self._parts_in(self._stepped, slots)

    def _parts_in(
        self, tensors_of: Callable[[int], Sequence[Tensor]], slots: Sequence[Sequence[Tensor]]
    ) -> Collected:
        parts: list[list[Tensor]] = [[] for _ in slots]
        for bucket in self._by_bucket(slots):
            for slot, part in self._parts_of(slots, bucket, tensors_of(bucket)):
                parts[slot].append(part)
        return self.take([[(part, part) for part in slot] for slot in parts])

    def region(self, name: str, parameter: Tensor) -> Region:
        """Which interval of a parameter's elements this rank holds."""
        del name
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
        if self.kind not in _FLAT:
            return Region.whole(shape)
        at = self._addresses.get(parameter)
        if at is None:
            return Region.between(shape, 0, 0)
        return Region.between(shape, at.within, at.within + at.size)

    def held(self, parameter: Tensor) -> list[Tensor]:
        """This rank's parts of one gradient; inside a step only, as `collect`."""
        return self.collect([[parameter]]).all[0]

    def parts(
        self, slots: Sequence[Sequence[Tensor]], bucket: int, tensors: Sequence[Tensor]
    ) -> list[list[Tensor]]:
        """Take the same parts of the tensors that DeepSpeed is about to step with.

        Args:
            slots: As for `collect`.
            bucket: Index of a flat partition (a group, or a sub-group under ZeRO 3).
            tensors: The tensors of that partition, in its order; together they fill it.

        Returns:
            Views, one list per slot; empty for a slot that has no part in this partition.
        """
        found: list[list[Tensor]] = [[] for _ in slots]
        for slot, part in self._parts_of(slots, bucket, tensors):
            found[slot].append(part)
        return found

    def _parts_of(
        self, slots: Sequence[Sequence[Tensor]], bucket: int, tensors: Sequence[Tensor]
    ) -> Iterator[tuple[int, Tensor]]:
        starts = [0, *accumulate(tensor.numel() for tensor in tensors)]
        for slot, at in self._by_bucket(slots).get(bucket, ()):
            index = bisect_right(starts, at.start) - 1
            whole = tensors[index]
            if at.size == whole.numel():
                yield slot, whole
            else:
                yield slot, whole.view(-1).narrow(0, at.start - starts[index], at.size)

    def _by_bucket(self, slots: Sequence[Sequence[Tensor]]) -> dict[int, list[tuple[int, Address]]]:
        if slots is not self._slots:
            members: dict[int, list[tuple[int, Address]]] = {}
            for slot, parameters in enumerate(slots):
                for parameter in parameters:
                    at = self._addresses.get(parameter)
                    if at is not None and at.size:
                        members.setdefault(at.bucket, []).append((slot, at))
            self._slots, self._members = slots, members
        return self._members

    def _measured(self, bucket: int) -> Sequence[Tensor]:
        """A bucket's averaged gradients before the step, still scaled and not clipped."""
        optimizer = self.engine.optimizer
        if self.kind == "DeepSpeedZeroOptimizer":
            if optimizer.cpu_offload:
                return [optimizer.single_partition_of_fp32_groups[bucket].grad]
            return list(optimizer.averaged_gradients[bucket])
        if self.kind == "DeepSpeedZeroOptimizer_Stage3":
            if optimizer.offload_optimizer:
                return [optimizer.fp32_partitioned_groups_flat[bucket].grad]
            return list(optimizer.averaged_gradients[bucket])
        if self.kind == "BF16_Optimizer":
            return [optimizer.fp32_groups_gradient_flat_partition[bucket]]
        return self.whole(bucket)

    def _stepped(self, bucket: int) -> Sequence[Tensor]:
        """The parameters that the optimizer steps, laid out as the gradients are."""
        optimizer = self.engine.optimizer
        if self.kind == "DeepSpeedZeroOptimizer":
            return [optimizer.single_partition_of_fp32_groups[bucket].detach()]
        if self.kind == "DeepSpeedZeroOptimizer_Stage3":
            return [optimizer.fp32_partitioned_groups_flat[bucket].detach()]
        if self.kind == "BF16_Optimizer":
            return [optimizer.fp32_groups_flat_partition[bucket].detach()]
        if self.kind == "FP16_Optimizer":
            return [optimizer.fp32_groups_flat[bucket].detach()]
        if self.kind == "FP16_UnfusedOptimizer":
            return [p.detach() for p in optimizer.fp32_groups[bucket]]
        return [p.detach() for p in self.groups.param_groups[bucket]["params"]]

    def whole(self, bucket: int) -> Sequence[Tensor]:
        """A group's gradients as the model's parameters hold them; zeros where one has none."""
        held = self.groups.param_groups[bucket]["params"]
        return [torch.zeros_like(p) if p.grad is None else p.grad for p in held]


def _parameters(optimizer: Any, kind: str) -> list[list[Parameter]]:
    """The model's parameters in each of the optimizer's groups."""
    if kind == "DeepSpeedZeroOptimizer":
        return list(optimizer.bit16_groups)
    if kind == "BF16_Optimizer":
        return list(optimizer.bf16_groups)
    if kind == "DeepSpeedZeroOptimizer_Stage3":
        groups: list[list[Parameter]] = [[] for _ in optimizer.param_groups]
        for index, sub_group in enumerate(optimizer.fp16_groups):
            groups[optimizer.sub_group_to_group_id[index]].extend(sub_group)
        return groups
    if kind in ("FP16_Optimizer", "FP16_UnfusedOptimizer"):
        return list(optimizer.fp16_groups)
    return [list(group["params"]) for group in optimizer.param_groups]


def _addresses(
    optimizer: Any, kind: str, groups: Sequence[Sequence[Tensor]]
) -> Iterator[tuple[Tensor, Address]]:
    """Where this rank's part of each parameter is; size 0 for parameters it holds nothing of."""
    for index, parameters in enumerate(groups):
        offsets = [0, *accumulate(map(elements, parameters))]
        if kind == "DeepSpeedZeroOptimizer":
            # Not by `parameter._hp_mapping`, whose order is another under round_robin_gradients.
            parameters = optimizer.round_robin_bit16_groups[index]
            offsets = [0, *accumulate(map(elements, parameters))]
            if hasattr(optimizer, "round_robin_bit16_offsets"):  # DeepSpeed 0.19 pads between them
                offsets = optimizer.round_robin_bit16_offsets[index]
        first, last = 0, math.inf
        if kind in ("DeepSpeedZeroOptimizer", "BF16_Optimizer"):
            flat = optimizer.optimizer.param_groups[index]["params"][0]
            first = flat.numel() * dist.get_rank(optimizer.real_dp_process_group[index])
            last = first + flat.numel()
        for parameter, offset in zip(parameters, offsets, strict=False):
            if kind == "DeepSpeedZeroOptimizer_Stage3":
                bucket, start, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
                before = size * optimizer._get_param_partition_rank(parameter)
                real = max(0, min(size, elements(parameter) - before))
                yield parameter, Address(bucket, start, real, before)
            else:
                start, stop = max(offset, first), min(offset + elements(parameter), last)
                size = max(0, int(stop) - start)
                yield parameter, Address(index, start - first, size, start - offset)


def _process_group(optimizer: Any, kind: str) -> ProcessGroup | None:
    """The ranks over which partitions are spread; None if every rank holds everything."""
    if kind in ("DeepSpeedZeroOptimizer", "BF16_Optimizer"):
        return optimizer.real_dp_process_group[0]
    if kind == "DeepSpeedZeroOptimizer_Stage3":
        return optimizer.sub_group_process_groups[0]
    return None
