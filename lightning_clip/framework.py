"""What is taken from Lightning and torch beyond their documented names. Read in Lightning 2.6.6."""

from __future__ import annotations

import importlib.util
import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING or importlib.util.find_spec("lightning") is not None:
    from lightning.fabric import Fabric
    from lightning.pytorch import Callback, LightningModule, Trainer
else:
    from lightning_fabric import Fabric
    from pytorch_lightning import Callback, LightningModule, Trainer

__all__ = [
    "Callback",
    "Fabric",
    "LightningModule",
    "Trainer",
    "deepspeed_engine",
    "is_lightning",
    "is_set_up",
    "live_scaler",
    "logger_step",
    "logs_after_batch",
    "skips_backward",
    "steps_by_engine",
    "unscaled",
]


def deepspeed_engine(trainer: Trainer) -> Any | None:
    """The engine that DeepSpeedStrategy trains with, once the strategy is set up; else None."""
    return getattr(trainer.strategy, "deepspeed_engine", None)


def is_lightning(cls: type) -> bool:
    """Whether a class is the framework's own, of either package, and not a user's."""
    return cls.__module__.split(".")[0] in ("lightning", "pytorch_lightning")


def is_set_up(fabric: Fabric, found: object) -> bool:
    """Whether Fabric wrapped a module or an optimizer, as told by the package it is from."""
    homes = ("lightning.fabric.fabric", "lightning_fabric.fabric")
    home = next(cls.__module__ for cls in type(fabric).__mro__ if cls.__module__ in homes)
    return bool(sys.modules[home.rpartition(".")[0]].is_wrapped(found))


def steps_by_engine(fabric: Fabric) -> bool:
    """Whether Fabric leaves steps to a DeepSpeed engine: only its strategy has a model."""
    return hasattr(fabric.strategy, "model")


def live_scaler(program: Trainer | Fabric) -> Any | None:
    """The gradient scaler that is in use, if any: an attribute of the mixed precision plugins."""
    fabric = isinstance(program, Fabric)
    plugin = program.strategy.precision if fabric else program.precision_plugin
    scaler = getattr(plugin, "scaler", None)
    return scaler if scaler is not None and scaler.is_enabled() else None


def unscaled(trainer: Trainer, module: LightningModule, loss: Tensor) -> Tensor:
    """A loss as `training_step` gave it, from what `on_before_backward` is handed.

    That was divided by the batches of a step, in automatic optimization, and multiplied by the
    scale of a live scaler, which `scale` tells without reading it on the host.
    """
    loss = loss.detach().to(torch.promote_types(loss.dtype, torch.float32))
    if module.automatic_optimization:
        loss = loss * trainer.accumulate_grad_batches
    scaler = live_scaler(trainer)
    return loss if scaler is None else loss / scaler.scale(torch.ones_like(loss))


def logger_step(trainer: Trainer) -> int:
    """The step under which the Trainer's loggers file what is logged now.

    Lightning's own LearningRateMonitor reads the same attribute; `trainer.global_step` counts
    every optimizer's steps and is not it.
    """
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)


def logs_after_batch(trainer: Trainer) -> bool:
    """Whether the Trainer logs what came up to the batch that ends, the last of its window."""
    every = trainer.log_every_n_steps
    due = every > 0 and (logger_step(trainer) + 1) % every == 0
    return due and not trainer.fit_loop._should_accumulate()


def skips_backward(trainer: Trainer) -> bool:
    """Whether StochasticWeightAveraging has this epoch run without a backward."""
    return bool(trainer.fit_loop._skip_backward)
