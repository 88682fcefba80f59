"""A learning rate schedule that waits while steps are withheld."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from gradclip import ConfigError
from lightning_clip.framework import LightningModule, Trainer

__all__ = ["hold_schedule"]


def hold_schedule(
    trainer: Trainer, module: LightningModule, withheld: Callable[[], bool]
) -> Callable[[], None]:
    """Leave out the module's `lr_scheduler_step` after a withheld step.

    Schedules with interval "epoch" count epochs, not steps, and go on.

    Args:
        trainer: Which calls that hook after each optimizer step.
        module: Its hook is replaced on the instance.
        withheld: Whether the last step was; asked once each time a schedule is due.

    Returns:
        What undoes it.

    Raises:
        ConfigError: If the Trainer doesn't call the hook, or not after each step.
    """
    if not module.automatic_optimization:
        msg = (
            "GradientClip: schedule_on_skip is 'hold', and in manual optimization "
            f"{type(module).__name__} steps its schedules by itself; allowed: 'advance' "
            "or nothing. Write `if not clip.last_record.skipped: scheduler.step()`."
        )
        raise ConfigError(msg)
    for config in trainer.lr_scheduler_configs:
        if config.interval == "step" and config.frequency != 1:
            msg = (
                "GradientClip: schedule_on_skip is 'hold', and a schedule "
                f"({type(config.scheduler).__name__}) has interval 'step' and frequency "
                f"{config.frequency}, so it could wait for one step in {config.frequency} alone; "
                "allowed: frequency 1. Set schedule_on_skip to 'advance'."
            )
            raise ConfigError(msg)
    was_own = "lr_scheduler_step" in vars(module)
    step = module.lr_scheduler_step

    @functools.wraps(step)
    def step_unless_withheld(scheduler: Any, metric: Any | None) -> None:
        known = [c for c in trainer.lr_scheduler_configs if c.scheduler is scheduler]
        by_step = any(config.interval == "step" for config in known)
        if not (by_step and withheld()):
            step(scheduler, metric)

    module.lr_scheduler_step = step_unless_withheld

    def undo() -> None:
        if was_own:
            module.lr_scheduler_step = step
        else:
            del module.lr_scheduler_step

    return undo
