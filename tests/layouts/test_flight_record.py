"""Parameters that ranks share: their norms in log entries, and who went wrong on one rank."""

import functools
import math

import pytest
import torch
from support.comms import CountComms
from support.layouts import CPU, build, loss, network
from support.nets import uneven_net
from support.ranks import run_on_ranks
from support.spikes import blamed, flight, spike_in
from support.zero_engines import backward, start
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from gradclip import GradientClipper

SPIKE, NAN, STEPS = 9, 14, 20
CONFIG = {"policies": [{"type": "norm", "max_norm": 1.0}], "recorder": {"worst": 3}}
CONFIG["log"] = {"histograms": True}


class Fault:
    """What the gradients of a layer are multiplied by on the last rank."""

    def __init__(self, last, at, factor):
        self.step, self.last, self.at, self.factor = 0, last, at, factor

    def __call__(self):
        return self.factor if self.last and self.step == self.at else 1.0


def ddp(net, world):
    return DistributedDataParallel(net)


def fsdp1(net, world):
    wrap = functools.partial(FullyShardedDataParallel, device_id=CPU, use_orig_params=True)
    for index in (0, 1):
        net[index] = wrap(net[index])
    return wrap(net)


def fsdp2(net, world):
    mesh = init_device_mesh("cpu", (world,))
    for module in (net[0], net[1], net):
        fully_shard(module, mesh=mesh)
    return net


WRAPS = {"DDP": ddp, "FSDP1": fsdp1, "FSDP2": fsdp2}
LAYERS = dict.fromkeys(WRAPS, ("1.up", "0.down")) | {"ZeRO-2": ("2", "0")}


def faults_in(net, layers, last):
    faults = Fault(last, SPIKE, 1000.0), Fault(last, NAN, math.nan)
    for layer, fault in zip(layers, faults, strict=True):
        spike_in(net.get_submodule(layer), fault)
    return faults


def train(rank, world, name, folder):
    net = network()
    faults = faults_in(net, LAYERS[name], rank == world - 1)
    wrapped = WRAPS[name](net, world)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.01)
    clipper = GradientClipper(CONFIG, wrapped.named_parameters(), optimizer)
    clipper.recorder.folder = folder
    clipper.attach(optimizer)
    for step in range(STEPS):
        for fault in faults:
            fault.step = step
        optimizer.zero_grad()
        generator = torch.Generator().manual_seed(step * world + rank)
        loss(wrapped(torch.randn(4, 8, generator=generator))).backward()
        optimizer.step()
    clipper.recorder.close()
    clipper.flush()
    return len(clipper.recorder.norms)


def train_engine(rank, world, folder):
    net = uneven_net(1)
    faults = faults_in(net, LAYERS["ZeRO-2"], rank == world - 1)
    engine = start("zero 2", net)
    clipper = GradientClipper(CONFIG, optimizer=engine)
    clipper.recorder.folder = folder
    clipper.attach(engine)
    for step in range(STEPS):
        for fault in faults:
            fault.step = step
        backward(engine, rank, step)
        engine.step()
    clipper.recorder.close()


def entry(rank, world, name):
    """A log entry with every norm, those norms by whole gradients, and what a step sent."""
    cell = build(name, rank, world)
    values = [p for _, p in cell.named]
    groups = [{"params": values[:5], "name": "early"}, {"params": values[5:], "name": "late"}]
    optimizer = torch.optim.SGD(groups)
    norms = {name: float(grad.norm()) for name, grad in cell.whole().items()}
    numbers = list(norms.values())
    wanted = norms | {
        "group/early": math.hypot(*numbers[:5]),
        "group/late": math.hypot(*numbers[5:]),
    }
    sent = []
    for log in ({}, {"per_parameter": True, "per_group": True}):
        config = {"policies": [{"type": "norm", "max_norm": 1e9}], "log": log}
        clipper = GradientClipper(config, cell.named, optimizer, **cell.options)
        clipper.clip()  # the first step also agrees on a few things
        comms = CountComms()
        with comms:
            clipper.clip()
            metrics = clipper.flush()
        sent.append(len(comms.messages))
    key = "clip/grad_norms/"
    found = {k.removeprefix(key): v for k, v in metrics.items() if k.startswith(key)}
    return found, wanted, sent


def on_rank(rank, world, folder):
    kept = {train(rank, world, name, folder / name / str(rank)) for name in WRAPS}
    train(rank, world, "FSDP2", folder / "a file")  # rank 0 can't write there, and goes on
    train_engine(rank, world, folder / "ZeRO-2" / str(rank))
    return kept, {name: entry(rank, world, name) for name in WRAPS}


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "a file").touch()
    return folder, run_on_ranks(on_rank, 2, folder, timeout=300, fresh=True)


def test_norms_for_histograms_are_kept_on_the_first_rank_alone(ran):
    assert [kept for kept, _ in ran[1]] == [{STEPS - 1}, {0}]


@pytest.mark.parametrize("name", WRAPS)
def test_an_entry_has_whole_norms_and_no_message_more(name, ran):
    for _, entries in ran[1]:
        found, wanted, (without, with_norms) = entries[name]
        assert found == pytest.approx(wanted, rel=1e-6)
        assert with_norms == without == (name != "DDP")


@pytest.mark.parametrize("name", LAYERS)
def test_the_layer_and_the_step_are_named_by_the_first_rank_alone(name, ran):
    folder = ran[0]
    files = [path for path in (folder / name).rglob("*") if path.is_file()]
    assert files == [folder / name / "0" / "gradclip.trace.jsonl"]
    header, steps = flight(files[0])
    assert list(steps) == list(range(STEPS))
    assert header["counts"]["nonfinite"] == header["counts"]["skipped"] == 1
    worst = max((row["grad_norm"], step) for step, row in steps.items() if row["finite"])
    assert worst[1] == SPIKE
    assert [step for step, row in steps.items() if not row["finite"]] == [NAN]
    spiked, broken = LAYERS[name]
    share, odd = blamed(header, steps[SPIKE], spiked)
    assert share > 0.99
    assert not odd
    assert blamed(header, steps[NAN], spiked)[1] == {f"{broken}.weight", f"{broken}.bias"}
    others = [step for step, row in steps.items() if row["finite"] and "per_parameter" in row]
    assert all(blamed(header, steps[step], spiked)[0] < 0.9 for step in others if step != SPIKE)
