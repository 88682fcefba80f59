"""What would clip twice, wrongly or not at all is an error at start, with the way out."""

import functools

import pytest
import torch
from support.lit import Small, inputs, trainer_of

from gradclip import ConfigError
from lightning_clip import GradientClip

NORM = {"policies": [{"type": "norm", "max_norm": 0.5}]}


def refused(match, *, module=None, callbacks=(), **options):
    with pytest.raises(ConfigError, match=match):
        trainer_of(GradientClip(NORM), *callbacks, **options).fit(module or Small(), [0, 1])


def runs(module=None, **options):
    clip = GradientClip(NORM)
    trainer_of(clip, **options).fit(module or Small(), [0, 1])
    assert bool(clip.last_record.clipped)


def test_a_trainer_that_clips():
    refused(
        r"Trainer\(gradient_clip_val=1\.5\) and GradientClip.*Remove gradient_clip_val",
        gradient_clip_val=1.5,
    )


def test_zero_is_lightnings_way_to_say_off():
    runs(gradient_clip_val=0)


class Clips(Small):
    def configure_gradient_clipping(self, optimizer, **_):
        self.clip_gradients(optimizer, gradient_clip_val=1.0, gradient_clip_algorithm="norm")


class ClipsByTorch(Small):
    def configure_gradient_clipping(self, *_, **__):
        def inner():
            torch.nn.utils.clip_grad_norm_(self.parameters(), 1.0)

        inner()


class Inherits(Clips):
    pass


class CallsOn(Clips):
    def configure_gradient_clipping(self, optimizer, **options):
        super().configure_gradient_clipping(optimizer, **options)


def wrapped(hook):
    @functools.wraps(hook)
    def outer(*args, **kwargs):
        return hook(*args, **kwargs)

    return outer


class Decorated(Small):
    @wrapped
    def configure_gradient_clipping(self, *_, **__):
        torch.nn.utils.clip_grad_value_(self.parameters(), 1.0)


@pytest.mark.parametrize(
    ("module", "named"),
    [
        (Clips, "Clips.configure_gradient_clipping calls clip_gradients"),
        (ClipsByTorch, "calls clip_grad_norm_"),
        (Inherits, "Clips.configure_gradient_clipping calls clip_gradients"),
        (CallsOn, "Clips.configure_gradient_clipping calls clip_gradients"),
        (Decorated, "calls clip_grad_value_"),
    ],
)
def test_a_module_that_clips(module, named):
    refused(f"{named}, and GradientClip is among the callbacks", module=module())


def test_a_module_that_was_given_a_clipping_hook():
    module = Small()
    module.configure_gradient_clipping = Clips.configure_gradient_clipping.__get__(module)
    refused("Small.configure_gradient_clipping calls clip_gradients", module=module)


class Logs(Small):
    def configure_gradient_clipping(self, *_, **__):
        self.log("norm", torch.nn.utils.get_total_norm([p.grad for p in self.parameters()]))


class OnlySuper(Small):
    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, **options):
        super().configure_gradient_clipping(optimizer, gradient_clip_val, **options)


class Silences(Clips):
    def configure_gradient_clipping(self, *_, **__):
        pass


@pytest.mark.parametrize("module", [Logs, OnlySuper, Silences])
def test_an_override_that_does_not_clip_may_stay(module):
    runs(module())


class ByHand(Small):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, _):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(inputs(batch)))
        self.clip_gradients(optimizer, gradient_clip_val=1.0)
        optimizer.step()


def test_manual_optimisation_that_clips():
    refused("ByHand.training_step calls clip_gradients", module=ByHand())


class AfterBackward(Small):
    def on_after_backward(self):
        torch.nn.utils.clip_grad_norm_(self.parameters(), 1.0)


class BeforeStep(Small):
    def on_before_optimizer_step(self, _):
        torch.nn.utils.clip_grad_value_(self.parameters(), 1.0)


class InStep(Small):
    def optimizer_step(self, _epoch, _batch, optimizer, optimizer_closure=None):
        optimizer_closure()
        self.clip_gradients(optimizer, gradient_clip_val=1.0, gradient_clip_algorithm="norm")
        optimizer.step()


@pytest.mark.parametrize(
    ("module", "hook"),
    [
        (AfterBackward, "on_after_backward"),
        (BeforeStep, "on_before_optimizer_step"),
        (InStep, "optimizer_step"),
    ],
)
def test_other_hooks_that_clip(module, hook):
    refused(rf"{module.__name__}\.{hook} calls clip_gra", module=module())


class Named(ByHand):
    """Has a setting of the name, and doesn't clip."""

    clip_grad_norm = 1.0

    def training_step(self, batch, _):
        assert self.clip_grad_norm
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(inputs(batch)))
        optimizer.step()


def test_a_setting_is_no_call():
    runs(Named())


class PastTheHooks(ByHand):
    def training_step(self, batch, _):
        optimizer = self.optimizers(use_pl_optimizer=False)
        optimizer.zero_grad()
        self.manual_backward(self.loss(inputs(batch)))
        optimizer.step()


class PastTheHooksByItself(Small):
    def optimizer_step(self, _epoch, _batch, optimizer, optimizer_closure=None):
        optimizer_closure()
        optimizer.optimizer.step()


class PastTheHooksWithAClosure(ByHand):
    def training_step(self, batch, _):
        def closure():
            self.manual_backward(self.loss(inputs(batch)))

        self.optimizers(use_pl_optimizer=False).step(closure)


PAST = r"Optimizer 0 \(AdamW\) makes a step.*use_pl_optimizer=False"


@pytest.mark.parametrize("kind", [PastTheHooks, PastTheHooksByItself])
def test_a_step_that_the_callback_is_not_told_of_changes_nothing(kind):
    module = kind()
    before = [p.detach().clone() for p in module.parameters()]
    refused(PAST, module=module)
    assert all(map(torch.equal, module.parameters(), before))


def test_such_a_step_with_a_closure():
    refused(PAST, module=PastTheHooksWithAClosure())


def test_an_optimizer_is_free_after_fitting():
    module = Small()
    trainer = trainer_of(GradientClip(NORM))
    trainer.fit(module, [0])
    module.loss(inputs(1)).backward()
    trainer.optimizers[0].step()


@pytest.mark.filterwarnings("ignore:`LightningModule.configure_optimizers` returned `None`")
def test_no_optimizer_at_all():
    refused("holds no parameters.*configure_optimizers returns None", module=Small(lambda _: None))


def test_two_of_them():
    trainer = trainer_of(GradientClip(NORM))
    trainer.callbacks.append(GradientClip(NORM))
    with pytest.raises(ConfigError, match=r"holds 2 GradientClip .*give it a list of policies"):
        trainer.fit(Small(), [0])
    # Lightning itself refuses two in Trainer(callbacks=...), whose state would share a key.
    with pytest.raises(RuntimeError, match="more than one stateful callback of type"):
        trainer_of(GradientClip(NORM), GradientClip(NORM))


def test_an_optimizer_that_steps_inside_backward():
    class InBackward(Small):
        def configure_optimizers(self):
            each = {p: torch.optim.SGD([p], lr=0.1) for p in self.parameters()}
            for parameter in self.parameters():
                parameter.register_post_accumulate_grad_hook(lambda p: each[p].step())
            return super().configure_optimizers()

    refused("An optimizer steps inside backward: 'net.0.weight'", module=InBackward())


def test_validating_is_never_refused():
    class Validates(Clips):
        def validation_step(self, batch, _):
            return self.loss(inputs(batch))

    trainer_of(GradientClip(NORM)).validate(Validates(), [0], verbose=False)


def test_an_optimizer_that_the_trainer_does_not_know():
    clip = GradientClip(NORM)
    module = Small()
    trainer = trainer_of(clip)
    trainer.fit(module, [0])
    with pytest.raises(ConfigError, match="Return it from configure_optimizers"):
        clip.on_before_optimizer_step(trainer, module, torch.optim.SGD(module.parameters()))
