"""Optimizers that step inside backward are refused with the reason; other hooks may stay."""

import functools
import warnings

import pytest
import torch
from support.gradients import NORM, assert_same_grads, backward, grads, small_model

from gradclip import ConfigError, GradientClipper


def in_backward(parameters):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # importing it uses torch.jit.script
        from torch.distributed.optim import _apply_optimizer_in_backward
    _apply_optimizer_in_backward(torch.optim.SGD, parameters, {"lr": 0.1})


def optimizers_of(model):
    return {p: torch.optim.SGD([p], lr=0.1) for p in model.parameters()}


def by_closure(model):
    optimizers = optimizers_of(model)

    def optimizer_hook(parameter):
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    return optimizer_hook


def by_inner_function(model):
    optimizers = optimizers_of(model)

    def outer(parameter):
        def inner():
            optimizers[parameter].step()

        return inner()

    return outer


def by_partial(model):
    return functools.partial(lambda optimizers, p: optimizers[p].step(), optimizers_of(model))


class Stepper:
    def __init__(self, model):
        self.optimizers = optimizers_of(model)

    def take(self, parameter):
        self.optimizers[parameter].step()

    def __call__(self, parameter):
        self.optimizers[parameter].step()


def by_decorated(model):
    hook = by_closure(model)

    @functools.wraps(hook)
    def traced(*args):
        return hook(*args)

    return traced


STEPPING = {
    "closure": by_closure,
    "inner function": by_inner_function,
    "partial": by_partial,
    "method": lambda model: Stepper(model).take,
    "object": Stepper,
    "decorated": by_decorated,
}


def hooked(make):
    model = small_model()
    hook = make(model)
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(hook)
    return model


def clipper_of(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return GradientClipper(NORM, model.named_parameters(), optimizer)


@pytest.mark.parametrize("kind", STEPPING)
def test_a_hook_that_steps(kind):
    with pytest.raises(ConfigError, match=r"'0\.weight', '0\.bias', '2\.weight' \(and 1 more\)"):
        clipper_of(hooked(STEPPING[kind]))


def test_the_error_says_what_steps_and_the_way_out():
    with pytest.raises(ConfigError) as found:
        clipper_of(hooked(by_closure))
    for part in ("optimizer_hook", "test_in_backward.py", "no gradient is left", "after backward"):
        assert part in str(found.value)


def test_a_hook_on_the_gradient_itself():
    model = small_model()
    optimizers = optimizers_of(model)
    for parameter in model.parameters():
        parameter.register_hook(lambda _, p=parameter: optimizers[p].step())
    with pytest.raises(ConfigError, match="An optimizer steps inside backward"):
        clipper_of(model)


def test_torchs_own_way():
    model = small_model()
    in_backward([model[0].weight])
    with pytest.raises(ConfigError, match=r"'0\.weight' is stepped by SGD of _apply_optimizer_in"):
        clipper_of(model)


def test_parameters_that_are_left_out_may_step():
    model = small_model()
    in_backward([model[0].weight])
    rest = [(name, p) for name, p in model.named_parameters() if name != "0.weight"]
    assert GradientClipper(NORM, rest)


def halve(parameter):
    parameter.grad.mul_(0.5)


class Log:
    """Counts in an attribute called step, which is no call of a method."""

    def __init__(self, _):
        self.step = 0
        self.steps = lambda: None

    def __call__(self, _):
        self.step += 1
        self.steps()


@pytest.mark.parametrize("hook", [Log, lambda _: halve, lambda _: print])
def test_other_hooks_may_stay(hook, capsys):
    model = hooked(hook)
    clipper = clipper_of(model)
    backward(model, size=50)
    assert clipper.clip().clipped
    model.zero_grad()
    assert not clipper.clip().clipped


def hides(model):
    stepper = Stepper(model)

    def through_another(parameter):
        Stepper.take(stepper, parameter)
        parameter.grad = None

    return through_another


def test_gradients_that_never_arrive_are_explained():
    model = hooked(hides)
    clipper = clipper_of(model)
    backward(model)
    before = grads(dict(model.named_parameters()))
    with pytest.raises(ConfigError, match=r"no parameter has had a gradient.*through_another"):
        clipper.clip()
    assert_same_grads(grads(dict(model.named_parameters())), before)
    assert clipper.state_dict()["counts"]["steps"] == 0


def test_a_hook_registered_later():
    model = small_model()
    clipper = clipper_of(model)
    hook = by_closure(model)
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(hook)
    backward(model)
    model.zero_grad()
    with pytest.raises(ConfigError, match="optimizer_hook"):
        clipper.clip()


def test_no_gradients_and_no_hooks_are_a_step_like_any_other():
    assert not clipper_of(small_model()).clip().clipped


def test_where_torch_keeps_hooks():
    """If this fails, gradclip/plan/in_backward.py looks in the wrong place."""
    parameter = torch.nn.Parameter(torch.zeros(2))
    assert parameter._post_accumulate_grad_hooks is None
    assert parameter._backward_hooks is None
    parameter.register_post_accumulate_grad_hook(print)
    parameter.register_hook(print)
    assert list(parameter._post_accumulate_grad_hooks.values()) == [print]
    assert list(parameter._backward_hooks.values()) == [print]
    in_backward([parameter])
    assert [type(o) for o in parameter._in_backward_optimizers] == [torch.optim.SGD]
