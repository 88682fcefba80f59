"""What is taken from Lightning beyond its documented names. Read in Lightning 2.6.6.

tests/with_lightning/test_framework.py notices when one of them changes.
"""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING or importlib.util.find_spec("lightning") is not None:
    from lightning.fabric import Fabric
    from lightning.pytorch import Callback, LightningModule, Trainer
else:
    try:
        from lightning_fabric import Fabric
        from pytorch_lightning import Callback, LightningModule, Trainer
    except ModuleNotFoundError as error:
        if error.name not in ("lightning_fabric", "pytorch_lightning"):
            raise
        msg = (
            "lightning_clip needs Lightning, which isn't installed. Install it: "
            'pip install "gradclip[lightning]"'
        )
        raise ModuleNotFoundError(msg, name=error.name) from None

__all__ = [
    "Callback",
    "Fabric",
    "LightningModule",
    "Trainer",
    "deepspeed_engine",
    "is_set_up",
    "live_scaler",
    "logger_step",
    "logs_after_batch",
    "overriding",
    "skips_backward",
    "steps_by_engine",
    "unscaled",
]


def deepspeed_engine(trainer: Trainer) -> Any | None:
    """The engine that DeepSpeedStrategy trains with, once the strategy is set up; else None."""
    return getattr(trainer.strategy, "deepspeed_engine", None)


def overriding(module: LightningModule, hook: str) -> str | None:
    """The name of the user's class that overrides a hook; None if Lightning's own runs."""
    if hook in vars(module):
        return type(module).__name__
    cls = next(cls for cls in type(module).__mro__ if hook in vars(cls))
    is_lightning = cls.__module__.split(".")[0] in ("lightning", "pytorch_lightning")
    return None if is_lightning else cls.__name__


def is_set_up(fabric: Fabric, found: object) -> bool:
    """Whether Fabric wrapped a module or an optimizer."""
    return bool(_package(fabric).is_wrapped(found))


def steps_by_engine(fabric: Fabric) -> bool:
    """Whether Fabric leaves steps to a DeepSpeed engine."""
    return isinstance(fabric.strategy, _package(fabric).strategies.DeepSpeedStrategy)


def _package(fabric: Fabric) -> ModuleType:
    """`lightning.fabric` or `lightning_fabric`: both may be installed, with their own classes."""
    homes = ("lightning.fabric.fabric", "lightning_fabric.fabric")
    home = next(cls.__module__ for cls in type(fabric).__mro__ if cls.__module__ in homes)
    return sys.modules[home.rpartition(".")[0]]


def live_scaler(precision: Any) -> Any | None:
    """The gradient scaler of a precision plugin, if it has one and it is enabled."""
    scaler = getattr(precision, "scaler", None)
    return scaler if scaler is not None and scaler.is_enabled() else None


def unscaled(trainer: Trainer, module: LightningModule, loss: Tensor) -> Tensor:
    """The loss as `training_step` returned it, from the one that `on_before_backward` gets.

    In automatic optimization that one is divided by the batches of a step. A live scaler has
    multiplied it by its scale, which `scale` tells without a host read.
    """
    loss = loss.detach().to(torch.promote_types(loss.dtype, torch.float32))
    if module.automatic_optimization:
        loss = loss * trainer.accumulate_grad_batches
    scaler = live_scaler(trainer.precision_plugin)
    return loss if scaler is None else loss / scaler.scale(torch.ones_like(loss))


def logger_step(trainer: Trainer) -> int:
    """The step under which the Trainer's loggers file what is logged now.

    Lightning's own LearningRateMonitor reads the same attribute; `trainer.global_step` differs: it
    counts every optimizer's steps.
    """
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)


def logs_after_batch(trainer: Trainer) -> bool:
    """Whether the Trainer logs when this batch ends: it is the last of a window that is due."""
    every = trainer.log_every_n_steps
    due = every > 0 and (logger_step(trainer) + 1) % every == 0
    return due and not trainer.fit_loop._should_accumulate()


def skips_backward(trainer: Trainer) -> bool:
    """Whether StochasticWeightAveraging has this epoch run without a backward."""
    return bool(trainer.fit_loop._skip_backward)
