"""`stage: after_backward` in a Trainer: each batch is clipped before it accumulates."""

import pytest
import torch
from lightning.fabric import Fabric
from support.lit import (
    NAN,
    After,
    Before,
    Pair,
    Small,
    inputs,
    norm_of,
    scaled,
    small_net,
    trainer_of,
)
from support.ranks import run_on_ranks

import lightning_clip
from gradclip import ClipByNorm, ClipConfig, ConfigError, ZClip
from lightning_clip import GradientClip

LIMIT = 0.5
CONFIG = ClipConfig(policies=[ClipByNorm(max_norm=LIMIT)], stage="after_backward")


def frozen(parameters):
    return torch.optim.SGD(parameters, lr=0.0)


def alone(batch):
    """One batch's gradient by its own loss, held to the limit."""
    module = Small()
    loss = module.loss(inputs(batch))
    grads = torch.autograd.grad(loss, list(module.parameters()))
    factor = min(1.0, LIMIT / (norm_of(grads) + 1e-6))
    return [grad * factor for grad in grads]


def run(batches, config=CONFIG, module=None, **options):
    clip, before = GradientClip(config), Before()
    after = After(clip)
    options = {"accumulate_grad_batches": 3} | options
    trainer_of(before, clip, after, **options).fit(module or Small(frozen), batches)
    return clip, before, after


@pytest.mark.parametrize("precision", ["32-true", "scaled"])
def test_each_batch_of_a_window_is_clipped_by_itself(precision):
    options = {"plugins": scaled(2.0**10)} if precision == "scaled" else {}
    # 5 and 6 make a short window, whose loss is divided by 3 all the same.
    _, _, after = run([0, 6, 2, 4, 5], **options)
    for grads, batches in zip(after.grads, ([0, 6, 2], [4, 5]), strict=True):
        for grad, *parts in zip(grads, *map(alone, batches), strict=True):
            close = {"rtol": 1e-5, "atol": 1e-7} if not options else {"rtol": 2e-2, "atol": 2e-2}
            torch.testing.assert_close(grad, sum(parts) / 3, **close)
    assert [bool(record.clipped) for record in after.records] == [True, True]


def test_a_bad_batch_is_left_out_of_its_window():
    clip, _, after = run([0, NAN, 2])
    for grad, *parts in zip(after.grads[0], alone(0), alone(2), strict=True):
        torch.testing.assert_close(grad, sum(parts) / 3, rtol=1e-5, atol=1e-7)
    assert after.records[0].dropped == 1
    assert clip.clippers[0].state_dict()["counts"]["taken"] == 1


def test_an_overflow_leaves_the_step_to_the_scaler():
    module = Small(lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    plugin = scaled(2.0**10)
    clip, _, after = run([0, NAN, 2, 3, 4, 5], module=module, plugins=plugin)
    assert [bool(record.skipped) for record in after.records] == [True, False]
    assert plugin.scaler.get_scale() == 2.0**9
    assert all(p.isfinite().all() for p in module.parameters())
    assert clip.clippers[0].state_dict()["counts"]["skipped"] == 1


class ByHand(Small):
    """Two backwards a step."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, _):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        for rows in self.share(inputs(batch)).chunk(2):
            self.manual_backward(self.loss(rows) / 2)
        optimizer.step()


def test_manual_optimization_clips_each_backward():
    clip, _, after = run(range(4), module=ByHand(), accumulate_grad_batches=1)
    assert len(after.records) == 4
    assert all(norm <= LIMIT * 2 * (1 + 1e-6) for norm in after.norms)
    zclip = ClipConfig(policies=[ZClip(warmup_steps=3)], stage="after_backward")
    clip, _, _ = run(range(4), zclip, ByHand(), accumulate_grad_batches=1)
    assert clip.clippers[0].state_dict()["policies"][0]["state"]["seen"] == 8


def test_a_backward_that_raises_leaves_nothing_open():
    class Fails(Small):
        failed = False

        def training_step(self, batch, index):
            loss = super().training_step(batch, index)
            if index == 1 and not Fails.failed:
                Fails.failed = True
                loss.register_hook(lambda _: 1 / 0)
            return loss

    clip, module = GradientClip(CONFIG), Fails()
    with pytest.raises(ZeroDivisionError):
        trainer_of(clip, accumulate_grad_batches=3).fit(module, range(3))
    trainer_of(clip, accumulate_grad_batches=3).fit(module, range(3))
    assert clip.last_record.dropped == 0


def test_a_fabric_loop_clips_each_backward():
    fabric = Fabric(accelerator="cpu", devices=1)
    net = small_net()
    model, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), lr=0.1))
    clipper = lightning_clip.enable(fabric, model, optimizer, CONFIG)
    for batch in (0, 6):
        loss = model(inputs(batch)).square().mean()
        with clipper.micro_batch(share=0.5):
            fabric.backward(loss / 2)
    optimizer.step()
    for p, *parts in zip(net.parameters(), alone(0), alone(6), strict=True):
        torch.testing.assert_close(p.grad, sum(parts) / 2, rtol=1e-5, atol=1e-7)


REFUSED = {
    "several optimizers": (Pair, "which of 2 optimizers it is for"),
    "LBFGS": (lambda: Small(torch.optim.LBFGS), "is LBFGS"),
}


@pytest.mark.parametrize(("module", "says"), REFUSED.values(), ids=REFUSED.keys())
def test_backwards_that_are_of_no_one_step_are_refused(module, says):
    with pytest.raises(ConfigError, match=says):
        trainer_of(GradientClip(CONFIG)).fit(module(), [0])


def on_rank(rank, world):
    from lightning.pytorch.strategies import DDPStrategy

    config = ClipConfig(policies=[ClipByNorm(max_norm=LIMIT)], stage="after_backward")
    options = {"strategy": DDPStrategy(), "devices": world}
    clip = GradientClip(config)
    refused = ""
    try:
        trainer_of(clip, accumulate_grad_batches=2, **options).fit(Small(), range(4))
    except ConfigError as error:
        refused = str(error)
    module = ByHand()
    after = After(clip)
    trainer_of(clip, after, strategy=DDPStrategy(), devices=world).fit(module, range(3))
    norms = [float(record.grad_norm) for record in after.records]
    return refused, norms, [p.detach().clone() for p in module.parameters()]


def test_ranks_reduce_each_backward_or_are_refused():
    (refused, norms, params), (_, others, same) = run_on_ranks(on_rank, 2)
    assert "2 processes reduce gradients only after 2 batches" in refused
    assert norms == others
    assert len(norms) == 3
    assert all(map(torch.equal, params, same))
