"""Everything Accelerate doesn't offer publicly, read in accelerate 1.15.0. Nothing else here."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor
from torch.nn import Module, Parameter

__all__ = [
    "Prepared",
    "Versions",
    "default_config_file",
    "engine_of",
    "hold_schedule",
    "keep_unscaled",
    "launch",
    "launch_parser",
    "prepared_models",
    "prepared_optimizers",
    "tells_of_skips",
    "unscaled",
    "versions",
]

Prepared = AcceleratedOptimizer
"""What `accelerator.prepare` makes of an optimizer; DeepSpeed's is a kind of it."""

Versions = Sequence[tuple[Tensor, int]]
"""Gradients, and how often each was written to."""


def prepared_models(accelerator: Accelerator) -> list[Module]:
    """The models prepared so far."""
    return list(accelerator._models)


def prepared_optimizers(accelerator: Accelerator) -> list[AcceleratedOptimizer]:
    """The optimizers prepared so far; `free_memory` forgets them."""
    return list(accelerator._optimizers)


def hold_schedule(optimizer: AcceleratedOptimizer, held: bool) -> None:
    """Make `optimizer.step_was_skipped` tell whether this step was withheld.

    Prepared schedulers then wait, as they do on an overflow. Called while the step runs:
    with a scaler, Accelerate decides right after it, by whether the step was called.
    """
    if optimizer.scaler is None:
        optimizer._is_overflow = held
    elif held:
        optimizer._accelerate_step_called = False


def unscaled(optimizer: AcceleratedOptimizer) -> Any:
    """What the scaler (torch 2.13) knows of an optimizer's gradients; for `keep_unscaled`."""
    if optimizer.scaler is None:
        return None
    return optimizer.scaler._per_optimizer_states[id(optimizer.optimizer)]


def keep_unscaled(optimizer: AcceleratedOptimizer, known: Any) -> None:
    """Remind the scaler that this optimizer's gradients are unscaled.

    Accelerate updates the scaler in the step of each optimizer, which makes it forget what was
    unscaled for the others; their steps would divide by the scale once more.
    """
    if optimizer.scaler is not None:
        optimizer.scaler._per_optimizer_states[id(optimizer.optimizer)] = known


def engine_of(accelerator: Accelerator) -> Any:
    """The DeepSpeed engine that `accelerator.backward` drives."""
    return accelerator.deepspeed_engine_wrapped.engine


def tells_of_skips(optimizer: AcceleratedOptimizer) -> None:
    """Make `optimizer.step_was_skipped` read DeepSpeed's flag, also where it was added later.

    At stage 0 in fp32 the optimizer has one only once it is clipped.
    """
    optimizer.__has_overflow__ = hasattr(optimizer.optimizer, "overflow")


def versions(parameters: Iterable[Parameter]) -> Versions:
    """What identifies the gradients now in place: torch counts the writes to each tensor."""
    return [(p.grad, p.grad._version) for p in parameters if p.grad is not None]


def launch_parser() -> ArgumentParser:
    """The parser of `accelerate launch`."""
    from accelerate.commands.launch import launch_command_parser

    return launch_command_parser()


def launch(arguments: Namespace) -> None:
    """Do what `accelerate launch` does."""
    from accelerate.commands.launch import launch_command

    launch_command(arguments)


def default_config_file() -> Path:
    """Where `accelerate config` writes."""
    from accelerate.commands.config import config_args

    return Path(config_args.default_config_file)
