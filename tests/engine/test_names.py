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


def test_a_child_of_ones_own_called_module_stays():
    model = nn.ModuleDict({"module": nn.Linear(2, 1), "other": nn.Linear(2, 1)})
    optimizer = torch.optim.SGD(model["module"].parameters(), lr=0.1)
    config = CONFIG | {"groups": []}
    clipper = GradientClipper(config, model.named_parameters(), optimizer)
    assert clipper.state_dict()["policies"][0]["slots"] == ["module.weight", "module.bias"]
