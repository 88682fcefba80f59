"""A clipper that is attached to an optimizer clips inside its step."""

import pytest
import torch
from support.gradients import NORM, backward, flat, small_model

from gradclip import ConfigError, GradientClipper, SkipSpike


def train(clip, steps=5):
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    clipper = GradientClipper(NORM, model.named_parameters(), optimizer)
    handle = clipper.attach(optimizer) if clip == "attached" else None
    for step in range(steps):
        backward(model, step, size=50)
        if clip == "called":
            clipper.clip()
        optimizer.step()
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()]), handle, clipper


def test_clips_before_each_step():
    attached, _, clipper = train("attached")
    called, *_ = train("called")
    assert torch.equal(attached, called)
    assert clipper.state_dict()["counts"]["steps"] == 5
    assert clipper.last_record is not None
    assert clipper.last_record.clipped


def test_removed():
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    handle = GradientClipper(NORM, model.named_parameters(), optimizer).attach(optimizer)
    handle.remove()
    backward(model, size=50)
    before = flat(dict(model.named_parameters()))
    optimizer.step()
    assert torch.equal(flat(dict(model.named_parameters())), before)


def test_attached_twice_or_called_as_well_would_count_twice():
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    clipper = GradientClipper(NORM, model.named_parameters(), optimizer)
    handle = clipper.attach(optimizer)
    with pytest.raises(ConfigError, match="attached already"):
        clipper.attach(optimizer)
    backward(model, size=50)
    clipper.clip()
    before = flat(dict(model.named_parameters()))
    with pytest.raises(ConfigError, match=r"clip\(\) was called since the last step"):
        optimizer.step()
    assert torch.equal(flat(dict(model.named_parameters())), before)
    assert clipper.state_dict()["counts"]["steps"] == 1
    handle.remove()
    handle.remove()
    optimizer.step()
    clipper.attach(optimizer)
    backward(model, size=50)
    optimizer.step()
    assert clipper.state_dict()["counts"]["steps"] == 2


def test_what_a_closure_returns_is_the_loss_unless_one_was_observed():
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    policy = SkipSpike(window=4, watch="loss")
    clipper = GradientClipper(policy, model.named_parameters(), optimizer)
    clipper.attach(optimizer)

    def closure():
        backward(model)
        return torch.tensor(7.0)

    optimizer.step(closure)
    clipper.observe_loss(5.0)
    optimizer.step(closure)
    losses = clipper.state_dict()["policies"][0]["state"]["losses"]
    assert losses[-2:, 0].tolist() == [7.0, 5.0]


@pytest.mark.parametrize("keyword", [True, False])
def test_a_closure_is_clipped_after_its_backward(keyword):
    model, twin = small_model(), small_model()
    results = []
    for net, attached in ((model, True), (twin, False)):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
        clipper = GradientClipper(NORM, net.named_parameters(), optimizer)
        if attached:
            clipper.attach(optimizer)

        def closure(net=net, clipper=clipper, attached=attached):
            backward(net, size=50)
            if not attached:
                clipper.clip()
            return torch.tensor(7.0)

        loss = optimizer.step(closure=closure) if keyword else optimizer.step(closure)
        assert loss == 7.0
        results.append(torch.cat([p.detach().reshape(-1) for p in net.parameters()]))
    assert torch.equal(*results)


def test_a_foreign_optimizer_is_refused():
    model = small_model()
    clipper = GradientClipper(NORM, model.named_parameters())
    with pytest.raises(ConfigError, match="shares no parameter with this clipper"):
        clipper.attach(torch.optim.SGD(small_model().parameters(), lr=0.1))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_under_a_grad_scaler_limits_are_those_of_unscaled_gradients(fused, scale):
    results = []
    for loss_scale in (None, scale):
        model = small_model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)
        clipper = GradientClipper(NORM, model.named_parameters(), optimizer)
        clipper.attach(optimizer)
        scaler = torch.amp.GradScaler(
            "cpu", init_scale=loss_scale or 1.0, enabled=loss_scale is not None
        )
        for step in range(4):
            model.zero_grad()
            generator = torch.Generator().manual_seed(step)
            loss = model(torch.randn(16, 4, generator=generator)).square().mean() * 50
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        results.append(torch.cat([p.detach().reshape(-1) for p in model.parameters()]))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fused", [False, True])
def test_an_overflow_under_a_grad_scaler_changes_nothing_and_the_scale_backs_off(fused):
    model = small_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)
    clipper = GradientClipper(NORM, model.named_parameters(), optimizer)
    clipper.attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120)
    before = [p.detach().clone() for p in model.parameters()]

    def step(size):
        model.zero_grad()
        loss = model(torch.ones(16, 4)).square().mean() * size
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    step(1e30)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert scaler.get_scale() == 2.0**119
    assert all(s["step"] == 0 for s in optimizer.state.values())
    scaler.load_state_dict({**scaler.state_dict(), "scale": 1.0})
    step(1.0)
    assert not any(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
