"""What one of 1024 ranks sends is what one of 4 sends."""

import pytest
import torch
import torch.distributed as dist
from support.comms import CountComms
from support.ranks import run_on_ranks
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.speed.grid import shards
from gradclip import ClipByNorm, GradientClipper
from gradclip.layouts import LocalLayout


def messages(rank, world, dp, tp):
    del rank, world
    dist.destroy_process_group()  # this process plays one rank of many
    named = shards(dp, tp, shrink=64, layers=4)
    found = {}
    for scope in ("global", "parameter"):
        clipper = GradientClipper(ClipByNorm(max_norm=1.0, scope=scope), named)
        with CountComms() as comms:
            clipper.clip()
        found[scope] = comms.messages
    return found, len(named)


@pytest.mark.parametrize(("dp", "tp"), [(2, 2), (128, 8)])
def test_one_message_of_8_bytes_a_slot_and_8_more_whatever_the_number_of_ranks(dp, tp):
    ((found, parameters),) = run_on_ranks(messages, 1, dp, tp, fresh=True)
    assert found == {"global": [16], "parameter": [8 * parameters + 8]}


def in_a_larger_job(rank, world):
    """Two axes of eight ranks, then all three."""
    del rank, world
    dist.destroy_process_group()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    mesh = init_device_mesh("cpu", (2, 2, 2), mesh_dim_names=("pp", "dp", "tp"))
    w = torch.nn.Parameter(DTensor.from_local(torch.ones(2), mesh["dp", "tp"], [Shard(0)] * 2))
    w.grad = torch.ones_like(w)
    found = []
    for groups in ({}, mesh["pp"].get_group()):
        policy = ClipByNorm(max_norm=1.0)
        clipper = GradientClipper(policy, [("w", w)], process_group=groups)
        with CountComms() as comms:
            clipper.clip()
        found.append(comms.messages)
    return found


def test_axes_are_summed_one_by_one_unless_they_span_all_ranks():
    assert run_on_ranks(in_a_larger_job, 1, fresh=True) == [[[16, 16], [16]]]


class Devices(TorchDispatchMode):
    """Where the tensors of collectives are."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            self.seen += [t.device.type for t in args[0]]
        return func(*args, **(kwargs or {}))


def offloaded(rank, world):
    """Shards on the CPU, ranks that talk over a device alone: as with NCCL, on fake tensors."""
    del rank, world
    dist.destroy_process_group()
    dist.init_process_group("cuda:fake", store=FakeStore(), rank=0, world_size=4)
    dist.group.WORLD.bound_device_id = torch.device("cuda:0")
    with FakeTensorMode(), Devices() as devices:
        layout = LocalLayout({"w": torch.ones(3)}, [dist.group.WORLD])
        values = torch.ones(2, dtype=torch.float64)
        home = [layout.sum(values).device.type, layout.max(values).device.type]
    return layout.devices[0].type, home, devices.seen


def test_only_the_accumulator_moves_to_where_ranks_can_talk():
    assert run_on_ranks(offloaded, 1, fresh=True) == [("cpu", ["cpu", "cpu"], ["cuda", "cuda"])]
