"""Optimizers that step inside backward are refused with the reason; other hooks may stay."""

import functools
import warnings

import pytest
import torch
from support.gradients import NORM, backward, small_model

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


class Stepper:
    def __init__(self, model):
        self.optimizers = optimizers_of(model)

    def __call__(self, parameter):
        self.optimizers[parameter].step()
        parameter.grad = None


STEPPING = {
    "closure": by_closure,
    "partial": lambda model: functools.partial(Stepper.__call__, Stepper(model)),
    "object": Stepper,
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
@pytest.mark.parametrize("is_late", [False, True])
def test_a_hook_that_steps_is_seen_by_what_it_does(kind, is_late):
    model = small_model() if is_late else hooked(STEPPING[kind])
    clipper = clipper_of(model)
    if is_late:
        hook = STEPPING[kind](model)
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(hook)
    backward(model)
    with pytest.raises(ConfigError) as found:
        clipper.clip()
    for part in ("'0.weight', '0.bias', '2.weight' (and 1 more)", "no gradient is left to clip"):
        assert part in str(found.value)
    assert clipper.state_dict()["counts"]["steps"] == 0


def test_some_parameters_that_a_hook_steps_are_named_in_a_warning(caplog):
    model = small_model()
    optimizer = torch.optim.SGD([model[0].weight], lr=0.1)

    def step(parameter):
        optimizer.step()
        parameter.grad = None

    model[0].weight.register_post_accumulate_grad_hook(step)
    clipper = clipper_of(model)
    for _ in range(2):
        backward(model)
        clipper.clip()
    [message] = [record.getMessage() for record in caplog.records]
    assert "'0.weight' is written to" in message


def test_code_that_never_runs_is_no_step():
    def may_step(parameter):
        if parameter.numel() == 0:
            torch.optim.SGD([parameter]).step()

    clipper = clipper_of(model := hooked(lambda _: may_step))
    backward(model)
    clipper.clip()


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
