"""`debug: true`: each thing that it watches is broken once on purpose."""

import pytest
import torch
from support.gradients import POLICIES, small_model
from support.ranks import run_on_ranks
from torch.amp.grad_scaler import GradScaler

from gradclip import ClipByNorm, ClipConfig, DebugError, GradientClipper, SkipLarge
from gradclip.effect.fused import FusedStep

LIMIT = 0.05
WAYS = {
    "called": {},
    "attached": {"attached": True},
    "accelerator": {"kernel": "accelerator"},
    "folded": {"attached": True, "fused": True, "apply": "fold"},
    "folded by call": {"fused": True, "apply": "fold"},
    "micro-batches": {"stage": "after_backward"},
    "micro-batches on a device": {"stage": "after_backward", "kernel": "accelerator"},
    "scaled": {"scale": 2.0**16},
    "scaled and folded": {"attached": True, "fused": True, "apply": "fold", "scale": 2.0**16},
    "scaled micro-batches": {"stage": "after_backward", "scale": 2.0**16},
}
HALF = {"dtype": torch.bfloat16}


class Program:
    def __init__(
        self,
        *policies,
        attached=False,
        fused=False,
        kernel=None,
        scale=None,
        told=True,
        debug=True,
        dtype=torch.float32,
        **config,
    ):
        self.model = small_model().to(dtype)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=fused)
        self.scaler = None if scale is None else GradScaler("cpu", init_scale=scale)
        policies = policies or (ClipByNorm(max_norm=LIMIT),)
        config = ClipConfig(policies=list(policies), debug=debug, **config)
        scaler = self.scaler if told else None
        named = list(self.model.named_parameters())
        self.clipper = GradientClipper(config, named, self.optimizer, kernel=kernel, scaler=scaler)
        self.calls = not attached
        if attached:
            self.clipper.attach(self.optimizer)

    def backward(self, seed, size=1.0):
        inputs = torch.randn(16, 4, generator=torch.Generator().manual_seed(seed))
        dtype = next(self.model.parameters()).dtype
        loss = self.model(inputs.to(dtype)).square().mean() * size
        loss = loss if self.scaler is None else self.scaler.scale(loss)
        if self.clipper.config.stage == "step":
            loss.backward()
            return
        for _ in range(2):
            with self.clipper.micro_batch(loss=loss.detach(), share=0.5):
                (loss / 2).backward(retain_graph=True)

    def finish(self):
        if self.calls:
            self.clipper.clip()
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()

    def step(self, seed, size=1.0):
        self.optimizer.zero_grad()
        self.clipper.observe_loss(size)
        self.backward(seed, size)
        self.finish()

    @property
    def params(self):
        return [p.detach().clone() for p in self.model.parameters()]


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_a_right_program_passes_and_ends_as_without_it(way):
    ends = []
    for debug in (False, True):
        program = Program(debug=debug, **way)
        for seed, size in enumerate([1.0, 0.01, float("inf"), 50.0, 1.0]):
            program.step(seed, size)
        ends.append(program.params)
        assert program.clipper.last_record.coef < 1
    assert all(map(torch.equal, *ends))


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())
@pytest.mark.parametrize("stage", ["step", "after_backward"])
def test_every_policy_passes(policy, stage):
    if getattr(policy, "exclude", None):
        policy = policy.model_copy(update={"exclude": ["0.*"]})
    for way in ({}, HALF):
        program = Program(policy, stage=stage, **way)
        for seed, size in enumerate([1.0, 30.0, float("nan"), 2.0, 1e3, 1.0]):
            program.step(seed, size)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_scaling_that_does_not_happen(way, monkeypatch):
    program = Program(**way)
    program.step(0)
    if way.get("apply") == "fold":
        monkeypatch.setattr(FusedStep, "ask", lambda *_, **__: None)
    else:
        monkeypatch.setattr(program.clipper._on.kernel, "scale_", lambda *_: None, raising=False)
    with pytest.raises(DebugError, match=r"the norm of .* is .* allowed: at most 0\.0"):
        program.step(1)


def test_one_parameter_that_is_not_scaled(monkeypatch):
    program = Program(ClipByNorm(max_norm=LIMIT, scope="parameter"))
    scale = program.clipper._on.kernel.scale_
    monkeypatch.setattr(
        program.clipper._on.kernel,
        "scale_",
        lambda grads, coef: scale([[], *grads[1:]], coef),
        raising=False,
    )
    with pytest.raises(DebugError, match=r"the norm of '0\.weight'"):
        program.step(0)


@pytest.mark.parametrize("way", ["called", "attached", "folded", "folded by call"])
def test_a_step_without_a_backward(way):
    program = Program(**WAYS[way])
    program.step(0)
    with pytest.raises(DebugError, match="all gradients are as the last clip or step left them"):
        program.finish()


def test_clipping_twice():
    program = Program()
    program.backward(0)
    program.clipper.clip()
    with pytest.raises(DebugError, match="clip\\(\\) once a step"):
        program.clipper.clip()


def test_a_gradient_that_stayed_from_the_step_before():
    program = Program()
    program.step(0)
    kept = program.model[2].bias.grad
    program.optimizer.zero_grad()
    program.backward(1)
    program.model[2].bias.grad = kept
    with pytest.raises(DebugError, match=r"the gradients of \['2\.bias'\] are"):
        program.clipper.clip()


def test_micro_batches_upon_what_the_last_step_left():
    program = Program(stage="after_backward")
    program.step(0)
    with pytest.raises(DebugError, match="zero_grad"):
        program.backward(1)


def test_zeros_that_stay_in_place_are_written_to():
    program = Program()
    for seed in range(3):
        program.optimizer.zero_grad(set_to_none=False)
        program.backward(seed)
        program.finish()


@pytest.mark.parametrize("stage", ["step", "after_backward"])
def test_a_scaler_that_the_clipper_does_not_know(stage):
    program = Program(scale=2.0**16, told=False, stage=stage)
    with pytest.raises(DebugError, match="multiplies losses by 65536"):
        program.step(0)


def test_gradients_that_were_unscaled_are_fine():
    program = Program(scale=2.0**16, told=False)
    for seed in range(2):
        program.optimizer.zero_grad()
        program.backward(seed)
        program.scaler.unscale_(program.optimizer)
        program.finish()
    scaled = Program(scale=2.0**16, told=False)
    scaled.backward(0)
    record = scaled.clipper.clip(grad_scale=torch.tensor(2.0**16))
    assert record.clipped


def on_rank(rank, world):
    """Messages of one step, with and without debug; and whether a broken kernel is told."""
    from support.comms import CountComms
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    sent, told = {}, ""
    for debug in (False, True):
        model = fully_shard(small_model(), mesh=init_device_mesh("cpu", (world,)))
        config = ClipConfig(
            policies=[SkipLarge(limit=1e9), ClipByNorm(max_norm=LIMIT)], debug=debug
        )
        clipper = GradientClipper(config, model.named_parameters())
        for broken in (False, True):
            model.zero_grad()
            (model(torch.ones(4, 4) * (rank + 1)).square().mean() * 100).backward()
            if broken and debug:
                clipper._on.kernel.scale_ = lambda *_: None
            try:
                with CountComms() as seen:
                    clipper.clip()
                sent[debug] = len(seen.messages)
            except DebugError as error:
                told = str(error)
    return sent, told


def test_every_rank_of_a_sharded_model_finds_the_same():
    (sent, told), other = run_on_ranks(on_rank, 2)
    assert sent[False] == 1
    assert sent[True] == 3
    assert "the norm of" in told
    assert other == (sent, told)
