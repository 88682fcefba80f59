"""What Lightning shows at each hook, without this project: an upgrade that changes it fails here.

Read in Lightning 2.6.6. The callback's place among the hooks rests on these facts.
"""

import functools

import pytest
import torch
from support.lit import NOTHING, Small, inputs, norm_of, scaled, trainer_of
from torch.optim.lr_scheduler import StepLR

pytestmark = pytest.mark.filterwarnings(
    "ignore:`training_step` returned `None`:UserWarning",
    "ignore:Detected call of `lr_scheduler.step:UserWarning",  # the first step is no step
)

fused = functools.partial(torch.optim.AdamW, lr=0.01, fused=True)
ordinary = functools.partial(torch.optim.AdamW, lr=0.01)


class Noting(Small):
    """Writes down every hook between two steps, with the gradients' norm as it is there.

    `gradients` is None where no parameter has one; parameters with zeros count as having one.
    """

    def __init__(self, optimizer=ordinary, *, automatic=True, same_rows=False):
        super().__init__(optimizer)
        self.automatic_optimization = automatic
        self.same_rows = same_rows
        self.seen = []

    def note(self, where, **more):
        grads = [p.grad for p in self.parameters() if p.grad is not None]
        norm = norm_of(grads) if grads else None
        self.seen.append({"where": where, "norm": norm, "step": self.trainer.global_step, **more})

    def norms(self, where):
        return [entry["norm"] for entry in self.seen if entry["where"] == where]

    @property
    def order(self):
        return [entry["where"] for entry in self.seen]

    def training_step(self, batch, index):
        self.note("training_step")
        if self.same_rows:
            batch = 0
        if self.automatic_optimization:
            return super().training_step(batch, index)
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(inputs(batch)))
        self.note("after manual_backward")
        optimizer.step()
        return None

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        optimizer.register_step_pre_hook(
            lambda opt, *_: self.note("pre-hook", found_inf=getattr(opt, "found_inf", None))
        )
        optimizer.register_step_post_hook(lambda *_: self.note("post-hook"))
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": StepLR(optimizer, 1, 0.5), "interval": "step"},
        }

    def on_before_zero_grad(self, _):
        self.note("on_before_zero_grad")

    def on_before_backward(self, _):
        self.note("on_before_backward")

    def on_after_backward(self):
        self.note("on_after_backward")

    def on_before_optimizer_step(self, _):
        self.note("on_before_optimizer_step")

    def configure_gradient_clipping(self, *_, **__):
        self.note("configure_gradient_clipping")

    def lr_scheduler_step(self, *args):
        self.note("lr_scheduler_step")
        super().lr_scheduler_step(*args)

    def on_train_batch_end(self, *_):
        self.note("on_train_batch_end")


def seen_by(module, batches, **options):
    trainer = trainer_of(**options)
    trainer.fit(module, batches)
    return module, trainer


def test_automatic():
    """A step pre-hook comes before backward, so it can't clip; the callback's hook can."""
    module, _ = seen_by(Noting(), [0, 1])
    once = [
        "pre-hook",
        "training_step",
        "on_before_zero_grad",
        "on_before_backward",
        "on_after_backward",
        "on_before_optimizer_step",
        "configure_gradient_clipping",
        "post-hook",
        "lr_scheduler_step",
        "on_train_batch_end",
    ]
    assert module.order == once * 2
    before, stale = module.norms("pre-hook")
    assert before is None
    assert stale == module.norms("on_before_optimizer_step")[0]
    assert module.norms("on_before_optimizer_step") == module.norms("on_after_backward")
    steps = [entry["step"] for entry in module.seen]
    assert steps == [0] * 8 + [1] * 10 + [2] * 2


def test_manual():
    """The module's own zero_grad shows in no hook, and the pre-hook comes first here, too."""
    module, trainer = seen_by(Noting(automatic=False), [0, 1])
    once = [
        "training_step",
        "on_before_backward",
        "on_after_backward",
        "after manual_backward",
        "pre-hook",
        "on_before_optimizer_step",
        "post-hook",
        "on_train_batch_end",
    ]
    assert module.order == once * 2
    assert module.norms("on_before_optimizer_step") == module.norms("after manual_backward")
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.01


def test_two_optimizers_are_for_manual_optimisation():
    class Two(Small):
        def configure_optimizers(self):
            return [ordinary(self.net[0].parameters()), ordinary(self.net[2].parameters())]

    with pytest.raises(RuntimeError, match="multiple optimizers is only supported with manual"):
        trainer_of().fit(Two(), [0])


def test_a_short_last_window_is_divided_by_the_full_count():
    module = Noting(functools.partial(torch.optim.SGD, lr=0.0), same_rows=True)
    seen_by(module, range(5), accumulate_grad_batches=3)
    assert len(module.norms("on_after_backward")) == 5
    full, short = module.norms("on_before_optimizer_step")
    assert short / full == pytest.approx(2 / 3, rel=1e-6)
    # Gradients are zeroed before the first backward of a window, whose hook follows training_step.
    assert module.order.count("on_before_zero_grad") == 2
    first = module.order.index("on_before_zero_grad")
    assert module.order[first - 1] == "training_step"
    assert module.norms("on_after_backward")[:3] == pytest.approx([full / 3, full * 2 / 3, full])


@pytest.mark.parametrize("automatic", [True, False], ids=["automatic", "manual"])
@pytest.mark.parametrize(("optimizer", "factor"), [(ordinary, 1.0), (fused, 256.0)])
def test_a_scaler_leaves_the_scale_in_the_gradients_of_fused_optimizers(
    optimizer, factor, automatic
):
    module, _ = seen_by(Noting(optimizer, automatic=automatic), [0], plugins=[scaled(256.0)])
    plain, _ = seen_by(Noting(optimizer, automatic=automatic), [0])
    [norm], [want] = (m.norms("on_before_optimizer_step") for m in (module, plain))
    assert norm / want == pytest.approx(factor, rel=0.02)
    [after] = module.norms("on_after_backward")
    assert after / want == pytest.approx(256.0, rel=0.02)
    # The scaler steps after the closure, so that a step pre-hook comes last.
    order = module.order
    assert order.index("on_before_optimizer_step") < order.index("pre-hook")


@pytest.mark.parametrize("automatic", [True, False], ids=["automatic", "manual"])
@pytest.mark.parametrize("optimizer", [ordinary, fused], ids=["ordinary", "fused"])
def test_an_overflow_is_a_step_to_lightning(optimizer, automatic):
    plugin = scaled(2.0**40)
    module, trainer = seen_by(Noting(optimizer, automatic=automatic), [0], plugins=[plugin])
    [norm] = module.norms("on_before_optimizer_step")
    assert not norm < float("inf")
    assert plugin.scaler.get_scale() == 2.0**39
    assert trainer.global_step == 1
    assert trainer.optimizers[0].param_groups[0]["lr"] == (0.005 if automatic else 0.01)
    found = [float(entry["found_inf"]) for entry in module.seen if entry["where"] == "pre-hook"]
    assert found == ([1.0] if optimizer is fused else [])
    start = Small()
    assert all(map(torch.equal, module.net.parameters(), start.net.parameters()))


@pytest.mark.parametrize("with_scaler", [False, True])
def test_a_batch_without_a_loss_is_a_step_to_lightning(with_scaler):
    options = {"plugins": [scaled(256.0)]} if with_scaler else {}
    module, trainer = seen_by(Noting(), [NOTHING], **options)
    assert module.norms("on_before_optimizer_step") == [None]
    assert module.norms("on_after_backward") == []
    assert trainer.global_step == 1
    # With a scaler the optimizer isn't stepped at all.
    assert module.order.count("post-hook") == (0 if with_scaler else 1)


def test_lbfgs_shows_every_evaluation_of_its_closure():
    lbfgs = functools.partial(torch.optim.LBFGS, lr=0.1, max_iter=3, tolerance_change=0.0)
    module, trainer = seen_by(Noting(lbfgs), [0, 1])
    for where in ("on_before_optimizer_step", "on_after_backward", "on_before_zero_grad"):
        assert module.order.count(where) == 6
    assert [module.order.count(where) for where in ("pre-hook", "post-hook")] == [2, 2]
    assert trainer.global_step == 2
