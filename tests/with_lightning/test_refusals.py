"""What would clip twice, wrongly or not at all is an error, with the way out."""

import copy
import pickle
from types import MethodType

import pytest
import torch
from support.lit import Pair, Small, inputs, trainer_of
from support.sam import Sam

from gradclip import ConfigError, GradientClipper
from lightning_clip import GradientClip

NORM = {"policies": [{"type": "norm", "max_norm": 0.5}]}


def refused(match, *, module=None, config=None, **options):
    """And parameters stay as they were."""
    module = module or Small()
    before = [p.detach().clone() for p in module.parameters()]
    with pytest.raises(ConfigError, match=match):
        trainer_of(GradientClip(NORM | (config or {})), **options).fit(module, [0, 1])
    assert all(map(torch.equal, module.parameters(), before))


def runs(module=None, config=None, **options):
    clip = GradientClip(NORM | (config or {}))
    module = module or Small()
    trainer_of(clip, **options).fit(module, [0, 1])
    assert bool(clip.last_record.clipped)
    assert not {"clip_gradients", "on_before_optimizer_step"} & set(vars(module))


def test_a_trainer_that_clips():
    refused(
        r"Trainer\(gradient_clip_val=1\.5\) and GradientClip.*Remove gradient_clip_val",
        gradient_clip_val=1.5,
    )


def test_zero_is_lightnings_way_to_say_off():
    runs(gradient_clip_val=0)


class ByHand(Small):
    """Steps in `training_step`, which `clip` may do something to gradients in."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, _):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(inputs(batch)))
        self.clip(optimizer)
        optimizer.step()

    def clip(self, optimizer):
        pass


class ClipsByHand(ByHand):
    def clip(self, optimizer):
        self.clip_gradients(optimizer, gradient_clip_val=1.0)


class Configures(Small):
    def configure_gradient_clipping(self, optimizer, **_):
        self.clip_gradients(optimizer, gradient_clip_val=1.0, gradient_clip_algorithm="norm")


class AfterBackward(Small):
    def on_after_backward(self):
        self.clip_gradients(self.optimizers(), gradient_clip_val=1.0)


class InStep(Small):
    def optimizer_step(self, _epoch, _batch, optimizer, optimizer_closure=None):
        optimizer_closure()
        self.clip_gradients(optimizer, gradient_clip_val=1.0, gradient_clip_algorithm="norm")
        optimizer.step()


class TrainersValue(Small):
    def on_train_start(self):
        self.trainer.gradient_clip_val = 1.0


@pytest.mark.parametrize("module", [ClipsByHand, Configures, AfterBackward, InStep, TrainersValue])
def test_lightnings_own_clipping_is_refused_when_it_is_called(module):
    what = rf"^{module.__name__}\.clip_gradients was called, and GradientClip.*Remove the call"
    refused(what, module=module())


def helper(module):
    torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)


class ByAHelper(Small):
    def configure_gradient_clipping(self, *_, **__):
        helper(self)


class Inherits(ByAHelper):
    pass


class CallsOn(ByAHelper):
    def configure_gradient_clipping(self, optimizer, **options):
        super().configure_gradient_clipping(optimizer, **options)


class BeforeStep(Small):
    def on_before_optimizer_step(self, _):
        torch.nn.utils.clip_grad_value_(self.parameters(), 1.0)


class Replaces(Small):
    def on_before_optimizer_step(self, _):
        for p in self.parameters():
            p.grad = p.grad.clamp(-1, 1)


class HasItsOwnWay(Small):
    def clip_gradients(self, *_, **__):
        helper(self)


def given_a_hook():
    module = Small()
    module.configure_gradient_clipping = ByAHelper.configure_gradient_clipping.__get__(module)
    return module


HOOKS = {
    ByAHelper: "ByAHelper.configure_gradient_clipping",
    Inherits: "ByAHelper.configure_gradient_clipping",
    CallsOn: "CallsOn.configure_gradient_clipping",
    BeforeStep: "BeforeStep.on_before_optimizer_step",
    Replaces: "Replaces.on_before_optimizer_step",
    HasItsOwnWay: "HasItsOwnWay.clip_gradients",
    given_a_hook: "Small.configure_gradient_clipping",
}


@pytest.mark.parametrize(("module", "named"), HOOKS.items(), ids=HOOKS.values())
def test_a_hook_that_changes_clipped_gradients_is_named(module, named):
    refused(f"^{named} changed gradients after GradientClip", module=module())


def test_with_a_folded_step_and_with_batches_clipped_by_themselves():
    def fused(parameters):
        return torch.optim.AdamW(parameters, lr=0.01, fused=True)

    refused("^BeforeStep.on_before", module=BeforeStep(fused), config={"apply": "fold"})
    runs(Logs(fused), config={"apply": "fold"})

    class Late(Small):
        def on_after_backward(self):
            helper(self)

    refused("^Late.on_after_backward", module=Late(), config={"stage": "after_backward"})
    runs(Late())  # it comes before the clip of a whole step


class Logs(Small):
    def configure_gradient_clipping(self, *_, **__):
        self.log("norm", torch.nn.utils.get_total_norm([p.grad for p in self.parameters()]))

    def on_before_optimizer_step(self, _):
        self.log("largest", max(p.grad.abs().max() for p in self.parameters()))


class OnlySuper(Small):
    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, **options):
        super().configure_gradient_clipping(optimizer, gradient_clip_val, **options)


class Silences(Configures):
    def configure_gradient_clipping(self, *_, **__):
        pass


class NeverCalled(Small):
    def configure_gradient_clipping(self, *_, **__):
        if self.trainer.gradient_clip_val:
            helper(self)


class Repairs(Small):
    """What comes before the clip may change gradients."""

    def on_after_backward(self):
        for p in self.parameters():
            p.grad.nan_to_num_()


class OtherGradients(Pair):
    """Gradients of the optimizer that doesn't step now are nobody's yet."""

    def on_before_optimizer_step(self, optimizer):
        if optimizer is self.trainer.optimizers[0]:
            for p in self.net[2].parameters():
                p.grad.mul_(2.0)


@pytest.mark.parametrize(
    "module", [Logs, OnlySuper, Silences, NeverCalled, Repairs, OtherGradients]
)
def test_an_override_that_does_not_clip_may_stay(module):
    runs(module())


class IsSaved(Logs):
    def on_train_batch_end(self, *_):
        for again in (pickle.loads(pickle.dumps(self)), copy.deepcopy(self)):
            for name in ("clip_gradients", "on_before_optimizer_step"):
                method = getattr(again, name)
                stock = MethodType(getattr(IsSaved, name), again)
                assert getattr(method, "__wrapped__", method) == stock


def test_a_module_can_be_pickled_while_it_is_watched():
    runs(IsSaved())


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


class SamInTwoCalls(ByHand):
    """The second one steps an optimizer that Lightning doesn't know."""

    def configure_optimizers(self):
        return Sam(self.parameters())

    def training_step(self, batch, _):
        sam = self.optimizers()
        for step in (sam.first_step, sam.second_step):
            self.manual_backward(self.loss(inputs(batch)))
            step()


PAST = r"Optimizer 0 \((AdamW|Sam)\) makes a step.*use_pl_optimizer=False"


@pytest.mark.parametrize("kind", [PastTheHooks, PastTheHooksByItself])
def test_a_step_that_the_callback_is_not_told_of_changes_nothing(kind):
    refused(PAST, module=kind())


def test_a_step_of_what_an_optimizer_wraps():
    """It is told at that step; the climb before it is no step of an optimizer's."""
    with pytest.raises(ConfigError, match=PAST):
        trainer_of(GradientClip(NORM)).fit(SamInTwoCalls(), [0])


def test_a_clipper_that_is_attached_to_the_same_optimizer():
    module = Small()
    made = module.configure_optimizers()
    module.configure_optimizers = lambda: made
    handle = GradientClipper(NORM, module, made).attach(made)
    with pytest.raises(ConfigError, match="clipped already, by a GradientClipper that is attached"):
        trainer_of(GradientClip(NORM)).fit(module, [0])
    handle.remove()
    trainer_of(GradientClip(NORM)).fit(module, [0])


def test_such_a_step_with_a_closure():
    with pytest.raises(ConfigError, match=PAST):  # told once it was made
        trainer_of(GradientClip(NORM)).fit(PastTheHooksWithAClosure(), [0])


def test_an_optimizer_is_free_after_fitting():
    module = Small()
    trainer = trainer_of(GradientClip(NORM))
    trainer.fit(module, [0])
    module.loss(inputs(1)).backward()
    trainer.optimizers[0].step()


@pytest.mark.filterwarnings("ignore:`LightningModule.configure_optimizers` returned `None`")
def test_no_optimizer_at_all():
    refused("holds no parameters.*configure_optimizers returns None", module=Small(lambda _: None))


def test_an_empty_list_of_optimizers():
    class Manual(Small):
        def __init__(self):
            super().__init__(lambda _: [])
            self.automatic_optimization = False

        def training_step(self, batch):
            del batch

    refused("returned no optimizer, so there is nothing to clip", module=Manual())


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

            def step_and_drop(parameter):
                each[parameter].step()
                parameter.grad = None

            for parameter in self.parameters():
                parameter.register_post_accumulate_grad_hook(step_and_drop)
            return super().configure_optimizers()

    with pytest.raises(ConfigError, match=r"An optimizer steps inside backward: 'net\.0\.weight'"):
        trainer_of(GradientClip(NORM)).fit(InBackward(), [0])


def test_validating_is_never_refused():
    class Validates(Configures):
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
