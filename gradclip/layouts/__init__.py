"""Geometry: the only place that knows about ranks."""

from torch.distributed import ProcessGroup

from gradclip.layouts.cuts import is_flat, is_flattened
from gradclip.layouts.detect import (
    Groups,
    detect,
    gathered,
    is_first_rank,
    refuse_shared_names,
    replicated,
)
from gradclip.layouts.local import LocalLayout, refuse_sparse
from gradclip.layouts.loss import mean_loss
from gradclip.layouts.partial import completed
from gradclip.layouts.places import place_of
from gradclip.layouts.sharded import ShardedLayout

__all__ = [
    "Groups",
    "LocalLayout",
    "ProcessGroup",
    "ShardedLayout",
    "completed",
    "detect",
    "gathered",
    "is_first_rank",
    "is_flat",
    "is_flattened",
    "mean_loss",
    "place_of",
    "refuse_shared_names",
    "refuse_sparse",
    "replicated",
]
