"""Half precision and the gradient scaler."""

import functools

import pytest
import torch
from support.lit import (
    NAN,
    NOTHING,
    After,
    Before,
    Small,
    inputs,
    norm_of,
    scaled,
    small_net,
    trainer_of,
)

from gradclip import ClipByNorm, NonFiniteError, ZClip
from lightning_clip import GradientClip

pytestmark = pytest.mark.filterwarnings("ignore:`training_step` returned `None`:UserWarning")


def run(policy, batches, **options):
    clip, before = GradientClip(policy), Before()
    after = After(clip)
    trainer_of(before, clip, after, **options).fit(Small(), batches)
    return clip, before, after


def test_gradients_in_bf16_are_held_to_the_limit():
    _, before, after = run(ClipByNorm(max_norm=0.1), range(3), precision="bf16-true")
    assert {g.dtype for g in before.grads[0]} == {torch.bfloat16}
    for norm, record, left in zip(before.norms, after.records, after.norms, strict=True):
        assert float(record.grad_norm) == pytest.approx(norm, rel=1e-6)
        assert left == pytest.approx(0.1, rel=4e-3)  # each element is rounded to 8 bits


def test_an_overflow_is_withheld_and_the_scaler_backs_off():
    plugin = scaled(2.0**24)
    clip, _, after = run(ZClip(warmup_steps=3), range(20), plugins=[plugin])
    skipped = [bool(record.skipped) for record in after.records]
    overflows = skipped.index(False)
    assert overflows > 0
    assert plugin.scaler.get_scale() == 2.0 ** (24 - sum(skipped))
    start = Small()
    for got, want in zip(after.parameters[overflows - 1], start.parameters(), strict=True):
        assert torch.equal(got, want)
    state = clip.clippers[0].state_dict()
    assert state["counts"]["skipped"] == sum(skipped)
    assert state["policies"][0]["state"]["seen"] == 20 - sum(skipped)


@pytest.mark.parametrize(("name", "automatic"), [("sgd", False), ("fused adamw", True)])
def test_an_overflow_is_counted_where_other_gradients_that_are_not_finite_raise(name, automatic):
    policy = {"policies": [{"type": "zclip"}], "on_nonfinite": "raise"}
    clip, plugin = GradientClip(policy), scaled(2.0**40)
    module = (Small if automatic else ByHand)(OPTIMIZERS[name])
    trainer_of(clip, plugins=[plugin]).fit(module, [0, 1])
    counts = clip.clippers[0].state_dict()["counts"]
    assert [int(counts[key]) for key in ("steps", "nonfinite", "taken")] == [2, 2, 0]
    assert plugin.scaler.get_scale() == 2.0**38
    assert all(map(torch.equal, module.parameters(), Small().parameters()))
    with pytest.raises(NonFiniteError):
        trainer_of(GradientClip(policy)).fit(Small(), [NAN])


def test_scaled_gradients_that_lightning_drops_are_not_taken_in():
    # On the second and third micro-batch pairs there is no loss on the last batch, so Lightning
    # neither unscales the first one's gradients nor steps.
    batches = [0, 1, 2, NOTHING, 3, NOTHING, 4, 5]
    clip, _, _ = run(
        ZClip(warmup_steps=3), batches, plugins=[scaled(1024.0)], accumulate_grad_batches=2
    )
    state = clip.clippers[0].state_dict()["policies"][0]["state"]
    assert int(state["seen"]) == 2
    assert float(state["recent"].max()) < 50


OPTIMIZERS = {
    "sgd": functools.partial(torch.optim.SGD, lr=0.01, momentum=0.9),
    "adamw": functools.partial(torch.optim.AdamW, lr=0.01),
    "fused adamw": functools.partial(torch.optim.AdamW, lr=0.01, fused=True),
    "fused sgd": functools.partial(torch.optim.SGD, lr=0.01, momentum=0.9, fused=True),
    "fused adagrad": functools.partial(torch.optim.Adagrad, lr=0.01, fused=True),
}


class ByHand(Small):
    """The same steps in manual optimisation."""

    def __init__(self, optimizer):
        super().__init__(optimizer)
        self.automatic_optimization = False

    def training_step(self, batch, index):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, index))
        optimizer.step()


def plain_loop(optimizer, steps):
    """The reference: float32, one process, torch's own clipping."""
    net = small_net()
    stepping = optimizer(net.parameters())
    norms = []
    for seed in range(steps):
        stepping.zero_grad()
        net(inputs(seed)).square().mean().backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(net.parameters(), 0.5)))
        stepping.step()
    return norms, torch.cat([p.detach().flatten() for p in net.parameters()])


PRECISIONS = {
    "32": ({"precision": "32-true"}, 1e-5),
    "bf16-mixed": ({"precision": "bf16-mixed"}, 3e-2),  # products are rounded to 8 bits
    "16-mixed": ({"scale": 256.0}, 4e-3),  # and to 11 bits
}


def pairs(*tables):
    """Every pair of the first two tables; those of the last alternate."""
    rows, columns, last = map(list, tables)
    return [
        (first, second, last[(i + j) % len(last)])
        for i, first in enumerate(rows)
        for j, second in enumerate(columns)
    ]


@pytest.mark.parametrize(
    ("precision", "name", "module"),
    pairs(PRECISIONS, ["sgd", "adamw", "fused adamw"], [Small, ByHand]),
)
def test_steps_equal_a_plain_loop_in_float32(precision, name, module):
    options, rtol = PRECISIONS[precision]
    if "scale" in options:
        options = {"plugins": [scaled(options["scale"])]}
    clip, before = GradientClip(ClipByNorm(max_norm=0.5)), Before()
    after, fitted = After(clip), module(OPTIMIZERS[name])
    trainer_of(before, clip, after, **options).fit(fitted, range(8))
    norms, want = plain_loop(OPTIMIZERS[name], 8)
    assert min(norms) > 0.5
    found = [float(record.grad_norm) for record in after.records]
    assert found == pytest.approx(norms, rel=rtol)
    if (precision, name) != ("16-mixed", "fused adamw"):  # whose gradients carry the scale
        assert found == pytest.approx(before.norms, rel=1e-6)
    assert after.norms == pytest.approx([0.5] * 8, rel=1e-5)
    got = torch.cat([p.detach().flatten() for p in fitted.parameters()])
    start = torch.cat([p.detach().flatten() for p in small_net().parameters()])
    assert float((got - want).norm() / (want - start).norm()) < rtol


class InFloat32(ByHand):
    """Autocast is off, so that a scale of a power of two changes no bit of the result."""

    def __init__(self, optimizer, *, automatic):
        super().__init__(optimizer)
        self.automatic_optimization = automatic

    def training_step(self, batch, index):
        step = Small.training_step if self.automatic_optimization else ByHand.training_step
        return step(self, batch, index)

    def loss(self, rows):
        with torch.autocast("cpu", enabled=False):
            return super().loss(rows)

    def manual_backward(self, *args):
        """Backward takes after where it is called: here, inside `training_step`'s autocast."""
        with torch.autocast("cpu", enabled=False):
            super().manual_backward(*args)


def in_float32(name, scale, *, automatic=True, batches=range(20), apply="auto"):
    plugins = [] if scale is None else [scaled(scale)]
    clip = GradientClip({"policies": [{"type": "zclip", "warmup_steps": 3}], "apply": apply})
    after = After(clip)
    module = InFloat32(OPTIMIZERS[name], automatic=automatic)
    trainer_of(clip, after, plugins=plugins).fit(module, batches)
    left = plugins[0].scaler.get_scale() if plugins else None
    return after, clip.clippers[0].state_dict(), left


@pytest.mark.parametrize(
    ("name", "automatic"), [(name, i % 2 == 0) for i, name in enumerate(OPTIMIZERS)]
)
def test_the_scale_changes_nothing(name, automatic):
    one, _, _ = in_float32(name, 1.0, automatic=automatic)
    large, _, _ = in_float32(name, 65536.0, automatic=automatic)
    assert any(bool(record.clipped) for record in one.records)
    assert large.limits == one.limits
    for got, want in zip(large.grads, one.grads, strict=True):
        assert all(map(torch.equal, got, want))


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_a_fused_optimizer_steps_like_an_ordinary_one(kind):
    ordinary, _, _ = in_float32(kind, 1024.0)
    fused, _, _ = in_float32(f"fused {kind}", 1024.0)
    for got, want in zip(fused.parameters[-1], ordinary.parameters[-1], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "scale", "automatic"), pairs(OPTIMIZERS, [None, 1024.0], [True, False])
)
def test_a_withheld_step_leaves_no_trace(name, automatic, scale):
    """With the first step among them, which a fused SGD's momentum buffer must survive."""
    batches = [NAN, *range(9), NAN, *range(9, 19)]
    plain, plain_state, _ = in_float32(name, scale, automatic=automatic, batches=range(19))
    found, state, left = in_float32(name, scale, automatic=automatic, batches=batches)
    assert left == (scale and scale / 4)  # it backed off twice
    assert [i for i, r in enumerate(found.records) if bool(r.skipped)] == [0, 10]
    assert state["counts"]["skipped"] == 2
    for got, want in zip(found.parameters[-1], plain.parameters[-1], strict=True):
        assert torch.equal(got, want)
    for got, want in zip(state["policies"], plain_state["policies"], strict=True):
        assert got["state"].keys() == want["state"].keys()
        assert all(torch.equal(got["state"][key], want["state"][key]) for key in want["state"])


@pytest.mark.parametrize(
    ("name", "scale", "automatic"),
    pairs(["fused sgd", "fused adamw", "fused adagrad"], [None, 1024.0], [True, False]),
)
def test_folded_steps_end_where_those_in_place_end(name, automatic, scale):
    """Lightning runs the closure, and so the clipping, inside the step, or before a scaler's."""
    batches = [NAN, *range(24), NAN, *range(24, 48)]
    cell = {"automatic": automatic, "batches": batches}
    folded, state, left = in_float32(name, scale, apply="fold", **cell)
    in_place, want, also = in_float32(name, scale, apply="in_place", **cell)
    assert left == also
    assert want["counts"] == state["counts"]
    assert want["counts"]["clipped"] > 3
    assert want["counts"]["skipped"] == 2
    for got, expected in zip(folded.parameters[-1], in_place.parameters[-1], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    late = [i for i, record in enumerate(folded.records) if i > 25 and bool(record.clipped)]
    assert late
    for i in late:  # what the hooks after the callback see is left to the step
        norm = float(folded.records[i].grad_norm) * (left or 1.0)
        assert norm_of(folded.grads[i]) == pytest.approx(norm, rel=1e-5)
