"""FullyShardedDataParallel (FSDP1): flat shards that don't say which ranks hold the rest.

Read in torch 2.13. Only the handles know, which modules hold and parameters don't, so they are
looked for among all live objects, once, when a clipper is built.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping

import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp._flat_param import FlatParameter, FlatParamHandle
from torch.utils.weak import WeakIdKeyDictionary

from gradclip.errors import LayoutError
from gradclip.layouts.geometry import Axis, Cut

__all__ = ["flat_cuts", "is_flat", "is_flattened"]

_known: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""Cuts found so far, so that the drop-ins don't look again on every step."""


def is_flattened(parameter: Tensor) -> bool:
    """Whether FSDP1 holds this parameter, as it was or as part of a flat one."""
    return bool(getattr(parameter, "_fsdp_flattened", False))


def is_flat(parameter: Tensor) -> bool:
    """Whether this is several parameters in one (`use_orig_params=False`)."""
    return isinstance(parameter, FlatParameter)


def flat_cuts(flattened: Mapping[str, Tensor]) -> dict[str, Cut]:
    """How the parameters of FSDP1 lie over ranks.

    Raises:
        LayoutError: If one of them belongs to no live FSDP module.
    """
    if any(p not in _known for p in flattened.values()):
        for handle in gc.get_objects():
            if type(handle) is FlatParamHandle:
                for p in handle.flat_param._params or [handle.flat_param]:
                    _known[p] = _cut_by(handle)
    lost = [name for name, p in flattened.items() if p not in _known]
    if lost:
        msg = (
            f"Parameters {lost[:3]} belong to FullyShardedDataParallel (FSDP1), and no live FSDP "
            "module holds them, so nothing says which ranks hold the rest; supported: parameters "
            "of a wrapped model that is in use. Build the optimizer and the clipper from the "
            "wrapped model's parameters, after wrapping."
        )
        raise LayoutError(msg)
    return {name: _known[p] for name, p in flattened.items()}


def _cut_by(handle: FlatParamHandle) -> Cut:
    if not handle.uses_sharded_strategy:
        return Cut()
    group = handle.process_group
    return Cut(split=(Axis(tuple(dist.get_process_group_ranks(group)), group),))
