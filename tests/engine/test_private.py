"""If one of these fails, torch keeps something elsewhere than gradclip/private.py looks for it."""

import warnings

import torch

from gradclip.adapters import GradientSnapshot
from gradclip.private import (
    end_to_end,
    gradient_hooks,
    is_unscaled,
    is_view,
    optimizers_in_backward,
    takes_scale,
    unhooked,
    writes,
)
from gradclip.steps import _calls_another_step


def test_writes_and_views_of_a_tensor():
    tensor = torch.zeros(4)
    row = tensor[:2]
    before = writes(tensor)
    row.add_(1)
    torch._foreach_mul_([tensor], 2.0)
    assert writes(tensor) == before + 2
    assert is_view(row)
    assert not is_view(tensor)


def test_tensors_end_to_end():
    tensors = [torch.arange(6.0).view(2, 3).t(), torch.tensor(6.0), torch.tensor([7.0, 8.0])]
    assert end_to_end(tensors).tolist() == [0, 3, 1, 4, 2, 5, 6, 7, 8]
    assert end_to_end(tensors[-1:]).tolist() == [7, 8]


def test_every_write_to_a_gradient_shows():
    parameter = torch.nn.Parameter(torch.ones(3))
    for grad in (None, torch.ones(3), torch.ones(3)):
        before = GradientSnapshot([parameter])
        assert not before.is_changed
        parameter.grad = grad
        assert before.is_changed == (grad is not None)
    for write in (lambda: parameter.sum().backward(), lambda: grad.mul_(1.0)):
        before = GradientSnapshot([parameter])
        write()
        assert parameter.grad is grad
        assert before.is_changed


def test_hooks_on_a_parameters_gradient():
    for register in ("register_hook", "register_post_accumulate_grad_hook"):
        parameter = torch.nn.Parameter(torch.zeros(2))
        assert gradient_hooks(parameter) == []
        getattr(parameter, register)(print)
        assert gradient_hooks(parameter) == [print]


def test_optimizers_that_torch_applies_in_backward():
    parameter = torch.nn.Parameter(torch.zeros(2))
    assert optimizers_in_backward(parameter) == []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # importing it uses torch.jit.script
        from torch.distributed.optim import _apply_optimizer_in_backward
    _apply_optimizer_in_backward(torch.optim.SGD, [parameter], {"lr": 0.1})
    assert [type(o) for o in optimizers_in_backward(parameter)] == [torch.optim.SGD]


def test_which_steps_take_a_scale_and_what_a_scaler_has_unscaled():
    parameter = torch.nn.Parameter(torch.zeros(2))
    assert takes_scale(torch.optim.AdamW([parameter], fused=True))
    optimizer = torch.optim.AdamW([parameter])
    assert not takes_scale(optimizer)
    scaler = torch.amp.GradScaler("cpu")
    assert not is_unscaled(scaler, optimizer)
    scaler.scale(parameter.sum()).backward()
    scaler.unscale_(optimizer)
    assert is_unscaled(scaler, optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert not is_unscaled(scaler, optimizer)


def test_a_step_without_the_hooks_that_torch_put_around_it():
    class Inherits(torch.optim.SGD):
        pass

    class Own(torch.optim.SGD):
        def step(self, closure=None):
            return super().step(closure)

    own = Own.step
    for made in (torch.optim.SGD, Inherits, Own):
        made([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    assert unhooked(Inherits.step) is unhooked(torch.optim.SGD.step)
    assert unhooked(Own.step) is own
    assert unhooked(own) is own
    # AdamW inherits Adam's step, which calls none; what is made here calls SGD's.
    weights = [torch.nn.Parameter(torch.zeros(1))]
    assert not _calls_another_step(torch.optim.AdamW(weights))
    assert _calls_another_step(Own(weights, lr=0.1))
