"""Parameters are named as in the user's own model, whatever it is wrapped in."""

import copy

import torch
from support.gradients import backward, small_model
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from gradclip import GradientClipper

CONFIG = {
    "policies": [{"type": "zclip", "scope": "parameter"}],
    "groups": [{"match": "2.*", "policies": [{"type": "norm", "max_norm": 0.5}]}],
    "log": {"per_parameter": True},
}
NAMES = ["0.weight", "0.bias", "2.weight", "2.bias"]


def checkpointed(model):
    model[2] = checkpoint_wrapper(model[2])
    return model


def part_compiled(model):
    model[0] = torch.compile(model[0], backend="eager")
    return model


# DistributedDataParallel names its parameters as DataParallel does.
WRAPPERS = {
    "none": lambda model: model,
    "data parallel": nn.DataParallel,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "part compiled": part_compiled,
    "checkpointed": checkpointed,
    "several": lambda model: nn.DataParallel(torch.compile(checkpointed(model), backend="eager")),
}


def test_wrappers_leave_no_trace_in_names(subtests):
    """Groups, metrics and saved state go by the names of the model inside."""
    plain = small_model()
    clipper = GradientClipper(CONFIG, plain.named_parameters())
    backward(plain)
    clipper.clip()
    state = clipper.state_dict()
    for wrapper, wrap in WRAPPERS.items():
        for given in ("model", "optimizer"):
            with subtests.test(f"{wrapper}, names by the {given}"):
                wrapped = wrap(copy.deepcopy(plain))
                names = [name for name, _ in wrapped.named_parameters()]
                assert (names == NAMES) == (wrapper == "none")
                if given == "model":
                    named = {"named_parameters": wrapped.named_parameters()}
                else:
                    named = {"optimizer": torch.optim.SGD(wrapped.named_parameters(), lr=0.1)}
                clipper = GradientClipper(CONFIG, **named)
                clipper.load_state_dict(state)
                for p, original in zip(wrapped.parameters(), plain.parameters(), strict=True):
                    p.grad = original.grad.clone()
                metrics = clipper.clip().as_metrics()
                assert {f"clip/grad_norms/{name}" for name in NAMES} < metrics.keys()
                assert clipper.state_dict()["policies"][0]["slots"] == NAMES[:2]


class Wrapping(nn.Module):
    """A wrapper of one's own, as many write them, whose only child is called `module`."""

    def __init__(self, module):
        super().__init__()
        self.module = module


def encoder_of(module):
    return nn.ModuleDict({"encoder": module, "head": nn.Linear(2, 1)})


NESTED = {
    "plain": (Wrapping, "module.weight"),
    "wrapped": (lambda model: nn.DataParallel(Wrapping(model)), "module.weight"),
    "compiled inside": (
        lambda model: nn.DataParallel(torch.compile(Wrapping(model), backend="eager")),
        "module.weight",
    ),
    "a part wrapped": (lambda model: encoder_of(nn.DataParallel(model)), "encoder.weight"),
    "both": (
        lambda model: nn.DataParallel(encoder_of(nn.DataParallel(Wrapping(model)))),
        "encoder.module.weight",
    ),
}


def test_a_child_of_ones_own_called_module_stays(subtests):
    """Told by the wrappers that live, however the names are given."""
    for case, (wrap, first) in NESTED.items():
        model = wrap(nn.Linear(2, 1))
        forms = {
            "model": model,
            "generator": model.named_parameters(),
            "list": list(model.named_parameters()),
            "mapping": dict(model.named_parameters()),
            "optimizer": torch.optim.SGD(model.named_parameters(), lr=0.1),
        }
        for form, given in forms.items():
            with subtests.test(f"{case}, {form}"):
                clipper = GradientClipper(CONFIG | {"groups": []}, given)
                assert clipper.state_dict()["policies"][0]["slots"][0] == first
