"""Everything that Accelerate and transformers don't offer publicly, and nothing else.

Read in accelerate 1.15.0 and transformers 5.23.0. tests/with_accelerate/test_private.py notices
changes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor
from torch.nn import Module

from gradclip.adapters import Patches

__all__ = [
    "around_training",
    "engine_of",
    "hold_schedule",
    "is_fsdp2",
    "prepared_models",
    "prepared_optimizers",
    "tells_of_skips",
    "unwrapped_model",
]


def prepared_models(accelerator: Accelerator) -> list[Module]:
    """The models prepared so far."""
    return list(accelerator._models)


def is_fsdp2(accelerator: Accelerator) -> bool:
    """Whether models are sharded with `fully_shard`, which Accelerate before 1.6 doesn't do."""
    return bool(getattr(accelerator, "is_fsdp2", False))


def unwrapped_model(accelerator: Accelerator, model: Module) -> Any:
    """The user's module, without what `prepare` and `torch.compile` put around it."""
    if "keep_torch_compile" in inspect.signature(accelerator.unwrap_model).parameters:
        return accelerator.unwrap_model(model, keep_torch_compile=False)
    # Accelerate 1.1 would put what it unwraps back into the compiled module.
    return accelerator.unwrap_model(getattr(model, "_orig_mod", model))


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


def around_training(trainer: Any, training: Any, patches: Patches) -> None:
    """Let an object take part in what a Trainer does, until the patches are undone.

    Callback events don't do: `on_log` comes after the row of the history is made, `on_save` after
    the checkpoint is pushed and without its folder, and none says where a run is resumed from.

    Args:
        trainer: The Trainer.
        training: Its `log` is called with what goes to the history and the reporters, before; its
            `save` and `load` with the checkpoint's folder (None if there is none to load), after
            the optimizer's state, on every process; its `bind` after the Trainer has made a new
            accelerator, as for each trial of a search.
        patches: What undoes this.
    """
    patches.wrap(trainer, "create_accelerator_and_postprocess", _then(training.bind))
    patches.wrap(trainer, "_save_optimizer_and_scheduler", _then(training.save))
    patches.wrap(trainer, "_load_optimizer_and_scheduler", _then(training.load))
    patches.wrap(trainer, "log", partial(_log, training.log))
    # What it remembers of its first look; else it would measure, and clip, such gradients itself.
    patches.put(trainer, "_mixed_mesh_grads", False)


def _then(call: Callable[..., None]) -> Callable[..., None]:
    def around(method: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        method(*args, **kwargs)
        call(*args, **kwargs)

    return around


def _log(
    add: Callable[..., None], log: Callable[..., None], logs: Any, *args: Any, **kwargs: Any
) -> None:
    add(logs)
    log(logs, *args, **kwargs)
