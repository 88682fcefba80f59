"""Geometry: which ranks hold what, and how sums over them are formed.

The only package that names `torch.distributed`, DTensor, FSDP and DeepSpeed. `detect` reads from
the parameters how they lie over ranks (`Sharding`) and returns the layout that collects gradients
and adds up over ranks: `LocalLayout` or `ShardedLayout`; a DeepSpeed engine has its own.
"""

from torch.distributed import ProcessGroup

from gradclip.layouts.agreement import Agreement, bits_of, shape_of
from gradclip.layouts.detect import (
    Groups,
    detect,
    gathered,
    refuse_shared_names,
    shardings_of,
)
from gradclip.layouts.fsdp1 import fsdp1_class, is_flat, is_flattened
from gradclip.layouts.local import LocalLayout, local_part, region_of
from gradclip.layouts.meshes import is_dtensor
from gradclip.layouts.partial import completed
from gradclip.layouts.ranks import is_first_rank, mean_loss, rank_count
from gradclip.layouts.sharded import ShardedLayout

__all__ = [
    "Agreement",
    "Groups",
    "LocalLayout",
    "ProcessGroup",
    "ShardedLayout",
    "bits_of",
    "completed",
    "detect",
    "fsdp1_class",
    "gathered",
    "is_dtensor",
    "is_first_rank",
    "is_flat",
    "is_flattened",
    "local_part",
    "mean_loss",
    "rank_count",
    "refuse_shared_names",
    "region_of",
    "shape_of",
    "shardings_of",
]
