"""gradclip doctor: programs that clip as asked, and programs whose clipping does something else."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.nets import uneven_net
from support.ranks import run_on_ranks
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

from gradclip import ClipByNorm, ClipByValue, GradientClipper, SkipNonfinite
from gradclip.tools.doctor import judge
from gradclip.tools.main import main
from gradclip.tools.watching import Call, SeenStep, Watcher

ROOT = Path(__file__).parents[2]
clip = torch.nn.utils  # the watcher replaces functions of this module


def run(*arguments):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    return stop.value.code


def test_every_installed_framework_does_what_it_is_asked(capsys):
    code = run("doctor")
    shown = capsys.readouterr().out
    assert code == 0, shown
    rows = [line for line in shown.splitlines() if "  ok" in line]
    assert len(rows) == 13
    assert all(line.split()[-3:] == ["0.1", "0.1", "ok"] for line in rows)


class Program:
    """A gradient of norm 10, a limit of 1, and SGD."""

    def __init__(self):
        self.w = torch.nn.Parameter(torch.zeros(2))
        self.optimizer, self.closure = torch.optim.SGD([self.w], lr=1.0), None

    def backward(self, times=1.0):
        (times * self.w * torch.tensor([6.0, 8.0])).sum().backward()

    def clip(self, limit=1.0, held=None):
        return clip.clip_grad_norm_([self.w] if held is None else held, limit)


def right(p):
    p.backward()
    p.clip()


def in_a_closure(p):
    def closure():
        p.optimizer.zero_grad()
        p.backward()
        p.clip()
        return torch.zeros(())

    p.closure = closure


def by_two_calls(p):
    p.backward()
    clip.clip_grads_with_norm_([p.w], 1.0, torch.tensor(10.0))


def by_gradclip(p):
    clipper = GradientClipper(ClipByNorm(max_norm=1.0), optimizer=p.optimizer)
    p.handle = clipper.attach(p.optimizer)
    p.backward()


def by_value(p):
    p.backward()
    GradientClipper(ClipByValue(clip_value=1.0), optimizer=p.optimizer).clip()


def folded(p):
    p.optimizer = torch.optim.AdamW([p.w], lr=1.0, fused=True)
    policy = {"policies": [{"type": "norm", "max_norm": 1.0}], "apply": "fold"}
    p.handle = GradientClipper(policy, optimizer=p.optimizer).attach(p.optimizer)
    p.backward()


def below_the_limit(p):
    p.backward()
    p.clip(20.0)


def with_others_left_out(p):
    bias = torch.nn.Parameter(torch.zeros(1))
    bias.grad = torch.ones(1)
    p.optimizer.add_param_group({"params": [bias]})
    p.backward()
    p.clip()


def withheld(p):
    policy = [ClipByNorm(max_norm=1.0), SkipNonfinite()]
    clipper = GradientClipper(policy, optimizer=p.optimizer)
    p.backward(math.inf)
    clipper.clip()


def nobody(p):
    p.backward()


def gradients_in_place_of_parameters(p):
    p.backward()
    p.clip(held=[p.w.grad])


def before_backward(p):
    p.backward()
    p.clip()
    p.optimizer.zero_grad()
    p.backward()


def before_unscaling(p):
    p.backward(1024.0)
    p.clip()
    p.w.grad.div_(1024.0)


def each_batch(p):
    for _ in range(2):
        p.backward()
        p.clip()


def wrong_norm(p):
    p.backward()
    clip.clip_grads_with_norm_([p.w], 1.0, torch.tensor(14.1))


RIGHT = [right, in_a_closure, by_two_calls, by_gradclip, folded, by_value]
NOTED = {
    below_the_limit: "the norm is below the limit, so this step says little",
    with_others_left_out: "parameters with a gradient that no call got: 1",
    withheld: "gradclip withheld this step",
}
WRONG = {
    nobody: "nothing known to clip was called before",
    gradients_in_place_of_parameters: "such as gradients in place of parameters",
    before_backward: "the call had no effect on what the optimizer stepped with",
    before_unscaling: "stepped with gradients 0.0009766 times what the call left",
    each_batch: "clipped 2 times before one step",
    wrong_norm: "the norm is 10, and the call took it for 14.1",
}


def verdict_of(program):
    p, seen = Program(), []
    watcher = Watcher(seen.append)
    try:
        program(p)
        p.optimizer.step(p.closure)
    finally:
        watcher.stop()
    [step] = seen
    return judge("SGD", [step])


@pytest.mark.parametrize("program", RIGHT, ids=lambda program: program.__name__)
def test_what_is_right(program):
    verdict = verdict_of(program)
    assert verdict.fault == ""
    if program is not by_value:  # whose factor differs by element
        assert verdict.expected == pytest.approx(0.1, rel=1e-5)
        assert verdict.applied == pytest.approx(0.1, rel=1e-5)


@pytest.mark.parametrize("program", NOTED, ids=lambda program: program.__name__)
def test_what_is_right_and_worth_a_note(program):
    verdict = verdict_of(program)
    assert verdict.fault == ""
    assert NOTED[program] in verdict.note


@pytest.mark.parametrize("program", WRONG, ids=lambda program: program.__name__)
def test_what_is_wrong(program):
    assert WRONG[program] in verdict_of(program).fault


def test_watching_leaves_nothing_behind():
    before = torch.nn.utils.clip_grad_norm_, GradientClipper.clip
    Watcher(lambda _: None).stop()
    assert (torch.nn.utils.clip_grad_norm_, GradientClipper.clip) == before


ENDLESS = """
import torch
from torch.nn.utils import clip_grad_norm_
w = torch.nn.Parameter(torch.zeros(2))
optimizer = torch.optim.SGD([w], lr=1.0)
while True:
    optimizer.zero_grad()
    (w * torch.tensor([6.0, 8.0])).sum().backward()
    CLIP
    optimizer.step()
"""


@pytest.fixture
def python_path(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def test_a_command_is_watched_for_one_step(tmp_path, python_path, capfd):
    script = tmp_path / "train.py"
    script.write_text(ENDLESS.replace("CLIP", "clip_grad_norm_([w], 1.0)"))
    assert run("doctor", "--", sys.executable, str(script)) == 0
    assert "torch's clip_grad_norm_  0.1    0.1      ok" in capfd.readouterr().out
    script.write_text(ENDLESS.replace("CLIP", "pass"))
    assert run("doctor", "--", sys.executable, str(script)) == 1
    assert "if clipping was asked for, it does nothing" in capfd.readouterr().out


RANKS = """
import math
import subprocess
import sys
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.fsdp import fully_shard


def train(rank, file):
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    model = torch.nn.Linear(4, 4, bias=False)
    fully_shard(model, mesh=torch.distributed.init_device_mesh("cpu", (2,)))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    while True:
        optimizer.zero_grad()
        model(torch.full((2, 4), 10.0)).sum().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


if __name__ == "__main__":
    mp.spawn(train, (sys.argv[1],), nprocs=2)
"""


def test_ranks_count_as_one(tmp_path, python_path):
    script = tmp_path / "train.py"
    script.write_text(RANKS)
    command = ["-m", "gradclip.tools.main", "doctor", "--", sys.executable, script]
    done = subprocess.run(
        [sys.executable, *command, tmp_path / "meet"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "SGD, 2 processes  torch's clip_grad_norm_" in done.stdout


@pytest.mark.parametrize(
    ("returned", "after", "fault"),
    [
        ((5.0, 5.0), (0.6, 0.8), ""),
        ((5.0, 5.0), (0.6, 1.6), "different factors: 0.2, 0.4"),
        ((3.0, 4.0), (1.0, 1.0), "each process used the norm of its own part"),
    ],
)
def test_what_ranks_with_parts_show(returned, after, fault):
    parts = zip((3.0, 4.0), returned, after, strict=True)
    calls = [Call("clip", 1.0, 2.0, norm, told, after=[left]) for norm, told, left in parts]
    steps = [SeenStep(rank, "SGD", [call], sharded=True) for rank, call in enumerate(calls)]
    found = judge("SGD", steps).fault
    assert fault in found
    assert bool(fault) == bool(found)


def by_fsdp1(rank, world, strategy="FULL_SHARD"):
    """One process, or NO_SHARD, shards nothing, and FSDP calls torch's function then."""
    del rank
    net = FullyShardedDataParallel(
        uneven_net(1),
        device_id=torch.device("cpu"),
        sharding_strategy=ShardingStrategy[strategy],
    )
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    seen = []
    watcher = Watcher(seen.append)
    net(torch.ones(2, 5)).sum().backward()
    norm = float(net.clip_grad_norm_(0.1))
    optimizer.step()
    watcher.stop()
    [step] = seen
    assert step.sharded == (world > 1 and strategy != "NO_SHARD")
    verdict = judge("SGD", [step])
    assert verdict.clipped_by == "FSDP's clip_grad_norm_"
    assert verdict.fault == ""
    assert verdict.applied == pytest.approx(0.1 / norm, rel=1e-3)


def by_fsdp1_in_both_ways(rank, world):
    for strategy in ("FULL_SHARD", "NO_SHARD"):
        by_fsdp1(rank, world, strategy)


def test_fsdps_own_method_is_one_call():
    run_on_ranks(by_fsdp1, 1)
    run_on_ranks(by_fsdp1_in_both_ways, 2)


def test_what_never_steps_or_starts(tmp_path, python_path, capfd):
    assert run("doctor", "--", sys.executable, "-c", "raise SystemExit(3)") == 1
    assert "ended with exit code 3; is gradclip installed" in capfd.readouterr().out
    assert run("doctor", "--", str(tmp_path / "nowhere")) == 2


def test_gradclip_checks_itself_while_it_is_watched(monkeypatch):
    monkeypatch.setenv("GRADCLIP_DEBUG", "1")
    p = Program()
    clipper = GradientClipper(ClipByNorm(max_norm=1.0), optimizer=p.optimizer)
    p.backward()
    clipper.clip()
    with pytest.raises(Exception, match="as the last clip or step left them"):
        clipper.clip()
