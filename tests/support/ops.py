"""Count what a function dispatches."""

from torch.utils._python_dispatch import TorchDispatchMode

VIEWS = {"alias", "detach", "expand", "narrow", "select", "slice", "split", "squeeze"}
VIEWS |= {"transpose", "unbind", "unsqueeze", "view"}


class CountOps(TorchDispatchMode):
    """How many torch operations ran while active, and how many of them weren't views."""

    def __init__(self):
        super().__init__()
        self.count = self.writes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        self.writes += func.name().removeprefix("aten::").partition(".")[0] not in VIEWS
        return func(*args, **(kwargs or {}))
