"""Geometry: the only place that knows about ranks."""

from torch.distributed import ProcessGroup

from gradclip.layouts.detect import (
    Groups,
    detect,
    gathered,
    refuse_shared_names,
)
from gradclip.layouts.local import LocalLayout, region_of
from gradclip.layouts.partial import completed
from gradclip.layouts.ranks import is_first_rank, mean_loss
from gradclip.layouts.sharded import ShardedLayout
from gradclip.layouts.shardings import is_flat, is_flattened

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
    "refuse_shared_names",
    "region_of",
]
