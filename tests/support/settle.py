"""What a test on kept ranks may change: put back for the next one, or noticed."""

from __future__ import annotations

import contextlib
import gc
import os
import random
import sys
import warnings
from collections.abc import Iterator

import torch
import torch.distributed as dist

LASTING = ("transformers.trainer", "wandb", "mlflow")
"""Modules whose users patch classes or start services."""


@contextlib.contextmanager
def settled() -> Iterator[None]:
    """Start from the same random numbers, and leave nothing of these behind.

    Environment, warnings already shown, torch's default type and device, Accelerate's singletons
    and what was assigned on its class, and models that only cycles of references keep alive.
    """
    environment = dict(os.environ)
    accelerate = sys.modules.get("accelerate")
    methods = dict(vars(accelerate.Accelerator)) if accelerate else {}
    torch.manual_seed(0)
    random.seed(0)
    try:
        with warnings.catch_warnings():
            yield
    finally:
        if dict(os.environ) != environment:
            os.environ.clear()
            os.environ.update(environment)
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
        if accelerate and sys.modules.get("accelerate") is accelerate:
            _forget(accelerate, methods)
        gc.collect()


def _forget(accelerate, methods) -> None:
    now = dict(vars(accelerate.Accelerator))
    for name in now.keys() | methods.keys():
        if name not in methods:
            delattr(accelerate.Accelerator, name)
        elif now.get(name) is not methods[name]:
            setattr(accelerate.Accelerator, name, methods[name])
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


_finders = list(sys.meta_path)
_lasting = [name for name in LASTING if name not in sys.modules]


def is_spent() -> bool:
    """Whether these ranks can't serve another test, as something lasting happened in one.

    The process group was destroyed, packages were hidden, DeepSpeed was started (it keeps groups
    and engines in globals), or one of `LASTING` was imported first.
    """
    deepspeed = sys.modules.get("deepspeed")
    return (
        not dist.is_initialized()
        or sys.meta_path != _finders
        or (deepspeed is not None and deepspeed.comm.is_initialized())
        or any(name in sys.modules for name in _lasting)
    )
