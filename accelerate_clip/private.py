"""Everything Accelerate and transformers don't offer publicly. Nothing else here.

Read in accelerate 1.15.0 and transformers 5.23.0.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor
from torch.nn import Module, Parameter

from gradclip.adapters import Patches

__all__ = [
    "Versions",
    "around_training",
    "check_launch_file",
    "default_config_file",
    "engine_of",
    "hold_schedule",
    "is_written",
    "launch",
    "launch_parser",
    "prepared_models",
    "prepared_optimizers",
    "tells_of_skips",
    "versions",
]

Versions = Sequence[tuple[Tensor, int]]
"""Gradients, and how often each was written to."""


def prepared_models(accelerator: Accelerator) -> list[Module]:
    """The models prepared so far."""
    return list(accelerator._models)


def prepared_optimizers(accelerator: Accelerator) -> list[AcceleratedOptimizer]:
    """The optimizers prepared so far; `free_memory` forgets them."""
    return list(accelerator._optimizers)


def hold_schedule(optimizer: AcceleratedOptimizer, held: Tensor | bool) -> None:
    """Make `optimizer.step_was_skipped` tell whether the step just made was withheld.

    Prepared schedulers then wait, as they do on an overflow. With a scaler Accelerate decides by
    itself in each step, so this comes after it. A tensor is read only where somebody asks.
    """
    optimizer._is_overflow = held


def engine_of(accelerator: Accelerator) -> Any:
    """The DeepSpeed engine that `accelerator.backward` drives."""
    return accelerator.deepspeed_engine_wrapped.engine


def tells_of_skips(optimizer: AcceleratedOptimizer) -> None:
    """Make `optimizer.step_was_skipped` read DeepSpeed's flag, also where it was added later.

    Accelerate looks for the flag once, when it wraps the optimizer; here it looks again. At stage
    0 in fp32 the optimizer has a flag only once it is clipped.
    """
    type(optimizer).__init__(optimizer, optimizer.optimizer)


def versions(parameters: Iterable[Parameter]) -> Versions:
    """The gradients now in place, and torch's count of the writes to each."""
    return [(p.grad, p.grad._version) for p in parameters if p.grad is not None]


def is_written(parameters: Iterable[Parameter], *, since: Versions) -> bool:
    """Whether any gradient is another, or was written to, since `versions` was taken."""
    now = versions(parameters)
    pairs = zip(since, now, strict=False)
    return len(now) != len(since) or any(a is not b or m != n for (a, m), (b, n) in pairs)


def launch_parser() -> ArgumentParser:
    """The parser of `accelerate launch`."""
    from accelerate.commands.launch import launch_command_parser

    return launch_command_parser()


def launch(arguments: Namespace) -> None:
    """Do what `accelerate launch` does."""
    from accelerate.commands.launch import launch_command

    launch_command(arguments)


def check_launch_file(file: Path) -> None:
    """Raise as `accelerate launch` would.

    Raises:
        ValueError: If a key is missing or unknown, or has an unknown value.
    """
    from accelerate.commands.config.config_args import load_config_from_file

    load_config_from_file(str(file))


def default_config_file() -> Path:
    """Where `accelerate config` writes."""
    from accelerate.commands.config import config_args

    return Path(config_args.default_config_file)


class Training(Protocol):
    """What takes part in one call of a transformers Trainer's `train`."""

    def bind(self) -> None:
        """The Trainer has made a new accelerator, as it does for each trial of a search."""

    def log(self, logs: dict[str, Any]) -> None:
        """Add to what goes to the history and the reporters."""

    def save(self, folder: str) -> None:
        """The optimizer's state was written to this checkpoint; called on every process."""

    def load(self, folder: str) -> None:
        """Everything is prepared, and the optimizer's state was read from this checkpoint."""


def around_training(trainer: Any, training: Training, patches: Patches) -> None:
    """Let something take part in what a Trainer does, until the patches are undone.

    Callback events don't do: `on_log` comes after the row of the history is made, `on_save` after
    the checkpoint is pushed and without its folder, and none says where a run is resumed from.
    """

    def create(method: Callable[[], None]) -> None:
        method()
        training.bind()

    def log(method: Callable[..., None], logs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        training.log(logs)
        method(logs, *args, **kwargs)

    def save(method: Callable[[str], None], output_dir: str) -> None:
        method(output_dir)
        training.save(output_dir)

    def load(method: Callable[[str | None], None], checkpoint: str | None) -> None:
        method(checkpoint)
        if checkpoint is not None:
            training.load(checkpoint)

    patches.wrap(trainer, "create_accelerator_and_postprocess", create)
    patches.wrap(trainer, "log", log)
    patches.wrap(trainer, "_save_optimizer_and_scheduler", save)
    patches.wrap(trainer, "_load_optimizer_and_scheduler", load)
    # What it remembers of its first look; else it would measure, and clip, such gradients itself.
    patches.put(trainer, "_mixed_mesh_grads", False)
