"""Private names of torch that gradclip/layouts relies on: where they stand, and that they exist."""

import ast
import math
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support.nets import uneven_net
from support.ranks import run_on_ranks
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp._flat_param import FlatParameter, FlatParamHandle
from torch.distributed.tensor import Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from gradclip import ClipByNorm, GradientClipper
from gradclip.layouts import detect, fsdp1
from gradclip.layouts.meshes import root_of

LAYOUTS = Path(__file__).parents[2] / "gradclip/layouts"
MAY = {"fsdp1.py", "meshes.py", "deepspeed.py", "deepspeed_refusals.py"}
"""Those of DeepSpeed are watched by test_zero_refusals.py."""


def private_names(tree):
    """Attributes of others, modules, and attributes named by a string."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            if getattr(node.value, "id", "") not in ("self", "cls"):
                yield node.attr
        elif isinstance(node, ast.ImportFrom):
            yield from (node.module or "").split(".")
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "hasattr"):
            yield getattr(node.args[1], "value", "")


def test_private_names_stand_in_one_file_for_each_part_of_torch():
    found = {
        path.name
        for path in LAYOUTS.glob("*.py")
        for name in private_names(ast.parse(path.read_text()))
        if re.match(r"_[a-z]", str(name))
    }
    assert found <= MAY
    for name in MAY:
        assert re.search(r"Read in (torch 2\.13|deepspeed 0\.19)", (LAYOUTS / name).read_text())


def test_torch_is_the_version_that_was_read():
    assert torch.__version__.startswith("2.13."), "read gradclip/layouts/{fsdp1,meshes}.py again"


def wrapped(orig):
    net = uneven_net(1)
    net[2] = FullyShardedDataParallel(net[2], device_id=torch.device("cpu"), use_orig_params=orig)
    return net, FullyShardedDataParallel(net, device_id=torch.device("cpu"), use_orig_params=orig)


def names_of_fsdp1(rank, world):
    net, model = wrapped(orig=True)
    for module, layers in ((model, [net[0], net[3]]), (net[2], [net[2]])):
        handle = module._handle
        assert type(handle) is FlatParamHandle
        assert handle.uses_sharded_strategy
        assert handle.process_group.size() == world
        flat = handle.flat_param
        parameters = [p for layer in layers for p in layer.parameters()]
        assert all(p is own for p, own in zip(flat._params, parameters, strict=True))
        assert all(p._fsdp_flattened for p in parameters)
        assert list(flat._param_extensions) == [None] * len(parameters)
        found = torch.zeros(1)
        for info in flat._shard_param_infos:
            if info.intra_param_start_idx is not None:
                found += info.intra_param_end_idx + 1 - info.intra_param_start_idx
        dist.all_reduce(found)
        assert int(found) == sum(math.prod(shape) for shape in flat._shapes)
    flat = wrapped(orig=False)[1]._handle.flat_param
    assert isinstance(flat, FlatParameter)
    assert flat._fsdp_flattened
    assert flat._params is None
    assert flat._shard_numel_padded >= 0


def names_of_meshes(rank, world):
    mesh = init_device_mesh("cpu", (1, world), mesh_dim_names=("a", "b"))
    assert root_of(mesh["b"]) == mesh
    assert isinstance(mesh, DeviceMesh)
    shape, offset = compute_local_shape_and_global_offset((5, 2), mesh["b"], [Shard(0)])
    assert (tuple(shape), tuple(offset)) == (((3, 2), (0, 0)) if rank == 0 else ((2, 2), (3, 0)))


def by_model(rank, world):
    """The model says which handles there are; a part of what one module wraps doesn't."""

    class Search(Exception):
        pass

    def refuse():
        raise Search

    search = fsdp1.gc.get_objects
    for orig in (True, False):
        net, model = wrapped(orig)
        named = dict(model.named_parameters())
        fsdp1.gc.get_objects = refuse
        try:
            with pytest.raises(Search):
                detect(named)
            if orig:
                with pytest.raises(Search):
                    detect(dict(net[0].named_parameters()), model=net[0])
            layout = detect(named, model=model)
        finally:
            fsdp1.gc.get_objects = search
        assert type(layout).__name__ == "ShardedLayout"
        if orig:
            parts = dict(net[0].named_parameters())
            for p in parts.values():
                p.grad = torch.ones_like(p)
            norm = GradientClipper(ClipByNorm(max_norm=1.0), parts.items()).clip().grad_norm
            assert float(norm) == pytest.approx((7 * 5 + 7) ** 0.5)


def everything(rank, world):
    names_of_fsdp1(rank, world)
    names_of_meshes(rank, world)
    by_model(rank, world)


def test_the_names_are_there_and_the_model_says_which_handles_it_has():
    run_on_ranks(everything, 2)
