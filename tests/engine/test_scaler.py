"""A GradScaler that the clipper knows: unscaled once, and overflows seen."""

import pytest
import torch
from support.gradients import small_model
from torch.amp.grad_scaler import GradScaler, OptState

from gradclip import ClipByNorm, ClipConfig, ConfigError, GradientClipper, ZClip

OPTIMIZERS = {
    "ordinary": lambda p: torch.optim.SGD(p, lr=0.1),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
}
CALLS = ("called", "called after unscale_", "attached", "attached after unscale_")
NORM = ClipByNorm(max_norm=0.005)


class Program:
    def __init__(self, policy, kind, call, scale):
        self.model = small_model()
        self.optimizer = OPTIMIZERS[kind](self.model.parameters())
        self.scaler = GradScaler("cpu", init_scale=scale)
        named = self.model.named_parameters()
        self.clipper = GradientClipper(policy, named, self.optimizer, scaler=self.scaler)
        self.call = call
        if call.startswith("attached"):
            self.handle = self.clipper.attach(self.optimizer)

    def step(self, number, spoil=False):
        self.model.zero_grad()
        inputs = torch.randn(16, 4, generator=torch.Generator().manual_seed(number))
        self.scaler.scale(self.model(inputs).square().mean()).backward()
        if spoil:
            next(self.model.parameters()).grad[0] = torch.inf
        if self.call.endswith("unscale_"):
            self.scaler.unscale_(self.optimizer)
        if self.call.startswith("called"):
            self.clipper.clip()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return self.clipper.last_record


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_norm_limit_and_result_are_the_same_at_every_scale(kind, call):
    programs = [Program(NORM, kind, call, scale) for scale in (1.0, 2.0**16)]
    for number in range(10):
        one, other = (program.step(number) for program in programs)
        assert float(one.grad_norm) == pytest.approx(float(other.grad_norm), rel=1e-5)
        assert other.clipped
        assert float(other.clipped_norm) <= 0.005
    for p, q in zip(*(program.model.parameters() for program in programs), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("on_nonfinite", ["skip", "raise", "ignore"])
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_an_overflow_is_counted_and_leaves_no_trace(kind, call, on_nonfinite):
    config = ClipConfig(policies=[ZClip(warmup_steps=4), NORM], on_nonfinite=on_nonfinite)
    spoiled, clean = (Program(config, kind, call, 1024.0) for _ in range(2))
    for number in range(8):
        spoiled.step(number)
        clean.step(number)
        if number == 4:
            before = [p.detach().clone() for p in spoiled.model.parameters()]
            record = spoiled.step(99, spoil=True)
            assert not record.finite
            assert record.skipped
            assert spoiled.scaler.get_scale() == 512.0
            assert all(map(torch.equal, before, spoiled.model.parameters()))
    saved, other = spoiled.clipper.state_dict(), clean.clipper.state_dict()
    assert saved["counts"]["nonfinite"] == saved["counts"]["skipped"] == 1
    assert saved["counts"]["taken"] == other["counts"]["taken"] == 8
    for name, value in saved["policies"][0]["state"].items():
        wanted = other["policies"][0]["state"][name]
        torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-6)


def test_two_optimizers_share_a_scaler_and_removing_one_leaves_the_other():
    models = [small_model(), small_model()]
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in models]
    scaler = GradScaler("cpu", init_scale=1024.0)
    clippers, handles = [], []
    for model, optimizer in zip(models, optimizers, strict=True):
        clipper = GradientClipper(NORM, model.named_parameters(), optimizer, scaler=scaler)
        clippers.append(clipper)
        handles.append(clipper.attach(optimizer))

    def step():
        loss = sum(m.zero_grad() or m(torch.ones(8, 4)).square().mean() for m in models)
        scaler.scale(loss).backward()
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()
        return [int(c.state_dict()["counts"]["steps"]) for c in clippers]

    assert step() == [1, 1]
    handles[0].remove()
    assert step() == [1, 2]
    handles[1].remove()
    assert step() == [1, 2]
    assert "step" not in vars(scaler)


def test_after_an_overflow_a_step_without_the_scaler_is_clipped():
    program = Program(NORM, "ordinary", "attached", 1024.0)
    program.step(0, spoil=True)
    program.model.zero_grad()
    program.model(torch.full((8, 4), 9.0)).square().mean().backward()
    program.optimizer.step()
    assert program.clipper.state_dict()["counts"]["steps"] == 2
    assert program.clipper.last_record.clipped


@pytest.mark.parametrize("apply", ["auto", "fold"])
def test_other_hooks_of_the_optimizer_stand_where_they_like(apply):
    model = small_model()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    config = ClipConfig(policies=[NORM], apply=apply)
    GradientClipper(config, model.named_parameters(), optimizer).attach(optimizer)
    optimizer.register_step_pre_hook(lambda *_: seen.append("after"))
    model(torch.full((8, 4), 9.0)).square().mean().backward()
    optimizer.step()
    assert seen == ["before", "after"]


def test_a_disabled_scaler_is_none():
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = GradScaler("cpu", enabled=False)
    clipper = GradientClipper(NORM, model.named_parameters(), optimizer, scaler=scaler)
    clipper.attach(optimizer)
    model(torch.ones(8, 4)).square().mean().backward()
    scaler.step(optimizer)
    assert clipper.state_dict()["counts"]["steps"] == 1


def test_a_scaler_needs_an_optimizer():
    with pytest.raises(ConfigError, match="scaler is given with no optimizer"):
        GradientClipper(NORM, small_model().named_parameters(), scaler=GradScaler("cpu"))


def test_torch_s_scaler_still_keeps_its_stages_where_we_read_them():
    scaler = GradScaler("cpu")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1)
    scaler.scale(optimizer.param_groups[0]["params"][0].sum()).backward()
    states = scaler._per_optimizer_states
    assert states[id(optimizer)]["stage"] is OptState.READY
    scaler.unscale_(optimizer)
    assert states[id(optimizer)]["stage"] is OptState.UNSCALED
