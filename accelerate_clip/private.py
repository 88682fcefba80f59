"""Everything Accelerate and transformers don't offer publicly. Nothing else here.

Read in accelerate 1.15.0 and transformers 5.23.0.
"""

from __future__ import annotations

import functools
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor
from torch.amp.grad_scaler import OptState
from torch.nn import Module, Parameter

__all__ = [
    "Prepared",
    "Versions",
    "around_trainers",
    "check_launch_file",
    "default_config_file",
    "engine_of",
    "hold_schedule",
    "keep_unscaled",
    "launch",
    "launch_parser",
    "prepared_models",
    "prepared_optimizers",
    "tells_of_skips",
    "unscale",
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


def hold_schedule(optimizer: AcceleratedOptimizer, held: Tensor | bool) -> None:
    """Make `optimizer.step_was_skipped` tell whether the step just made was withheld.

    Prepared schedulers then wait, as they do on an overflow. With a scaler Accelerate decides by
    itself in each step, so this comes after it. A tensor is read only where somebody asks.
    """
    optimizer._is_overflow = held


def unscale(optimizer: AcceleratedOptimizer) -> None:
    """Take the loss scale off an optimizer's gradients, unless that was done in this step."""
    scaler = optimizer.scaler
    is_live = scaler is not None and scaler.is_enabled()
    if is_live and unscaled(optimizer)["stage"] is OptState.READY:
        scaler.unscale_(optimizer.optimizer)


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


def around_trainers(
    trainer: type[Any],
    *,
    is_clipped: Callable[[Any], bool],
    before_preparing: Callable[[Any], None],
    before_logging: Callable[[Any, dict[str, Any]], None],
    after_saving: Callable[[Any, str], None],
    after_loading: Callable[[Any, str], None],
) -> None:
    """Take part in what every transformers `Trainer` does; each callable is given the trainer.

    Args:
        trainer: The class.
        is_clipped: Whether `accelerator.clip_grad_norm_` copes with gradients on different meshes,
            for which the Trainer would else measure, and clip, by itself.
        before_preparing: Called in each `train`, once the accelerator is final (a search of
            hyperparameters makes a new one for each trial).
        before_logging: With what goes to the history and the reporters.
        after_saving: With the checkpoint's folder, on every process, where the optimizer's state
            is in it.
        after_loading: The same, once everything is prepared and the optimizer's state is loaded.
    """
    set_up, log, has_mixed = trainer._hp_search_setup, trainer.log, trainer._has_mixed_mesh_grads
    save, load = trainer._save_optimizer_and_scheduler, trainer._load_optimizer_and_scheduler

    @functools.wraps(set_up)
    def set_up_and_tell(self: Any, trial: Any) -> None:
        set_up(self, trial)
        before_preparing(self)

    @functools.wraps(log)
    def tell_and_log(self: Any, logs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        before_logging(self, logs)
        log(self, logs, *args, **kwargs)

    @functools.wraps(has_mixed)
    def has_mixed_unless_clipped(self: Any, model: Any) -> bool:
        return not is_clipped(self) and has_mixed(self, model)

    @functools.wraps(save)
    def save_and_tell(self: Any, output_dir: str) -> None:
        save(self, output_dir)
        after_saving(self, output_dir)

    @functools.wraps(load)
    def load_and_tell(self: Any, checkpoint: str | None) -> None:
        load(self, checkpoint)
        if checkpoint is not None:
            after_loading(self, checkpoint)

    trainer._hp_search_setup, trainer.log = set_up_and_tell, tell_and_log
    trainer._has_mixed_mesh_grads = has_mixed_unless_clipped
    trainer._save_optimizer_and_scheduler = save_and_tell
    trainer._load_optimizer_and_scheduler = load_and_tell
