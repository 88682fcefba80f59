"""From records to the Trainer's loggers and progress bar."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_clip.framework import LightningModule, Trainer, logger_step

__all__ = ["report"]

_SHOWN = ("clip/grad_norm", "clip/limit", "clip/clip_rate")


def report(
    trainer: Trainer,
    module: LightningModule,
    metrics: Mapping[str, Tensor],
    *,
    suffix: str,
    due: bool | None,
    progress_bar: bool,
) -> None:
    """Hand one step's metrics to Lightning, without reading them on the host.

    `trainer.callback_metrics` always has them. The loggers get them when the Trainer logs; or,
    where the configuration has its own interval, when this step is due. They are then written
    here: what is passed to `log_dict` once is written again on every later step that the Trainer
    logs, with the value it had.

    Args:
        trainer: The fitting Trainer.
        module: Its module, inside a hook.
        metrics: 0-d float64 tensors by key.
        suffix: Added to every key.
        due: Whether to write to the loggers now; None leaves that to the Trainer.
        progress_bar: Also show some of them in the progress bar, which reads them on the host.
    """
    if trainer.barebones:
        return
    shown = {key + suffix: metrics[key] for key in _SHOWN} if progress_bar else {}
    named = {key + suffix: value for key, value in metrics.items()}
    rest = {key: value for key, value in named.items() if key not in shown}
    by_trainer = due is None and bool(trainer.loggers)
    module.log_dict(rest, on_step=True, on_epoch=False, logger=by_trainer)
    if shown:
        module.log_dict(shown, on_step=True, on_epoch=False, logger=by_trainer, prog_bar=True)
    if due and trainer.is_global_zero and trainer.loggers:
        values = torch.stack(list(named.values())).tolist()
        for logger in trainer.loggers:
            logger.log_metrics(dict(zip(named, values, strict=True)), step=logger_step(trainer))
            logger.save()
