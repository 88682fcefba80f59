"""Where a rank's part lies in a whole parameter: that region of the whole gradient is its part."""

import re

import pytest
import torch

from gradclip.errors import LayoutError
from gradclip.layouts import region_of
from gradclip.layouts.local import local_part

REFUSED = {"FSDP1 flat", "FSDP1 NO_SHARD flat", "FSDP1 HYBRID_SHARD flat", "FSDP1 x TP"}


def check(built, name):
    if {"EP", "PP", "partial", "sequence"} & set(re.findall(r"\w+", name)):
        return None
    built.renew()
    built.clipper({"policies": [{"type": "norm", "max_norm": 1.0}]})
    if name in REFUSED:
        with pytest.raises(LayoutError, match=r"use_orig_params=True|fully_shard"):
            [region_of(*named) for named in built.named]
        return "refused"
    whole, held = built.whole(), 0
    for parameter, p in built.named:
        part = region_of(parameter, p).of(whole[parameter])
        if p.grad is None:
            assert part.numel() == 0, parameter
            continue
        local = local_part(p.grad).double()
        assert torch.equal(part, local.view(part.shape)), parameter
        held += part.numel()
    return held
