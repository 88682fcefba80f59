"""A learning rate schedule that waits while steps are withheld."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gradclip import ConfigError
from gradclip.adapters import Patches
from lightning_clip.framework import LightningModule, Trainer

__all__ = ["hold_schedule"]


def hold_schedule(
    trainer: Trainer, module: LightningModule, is_withheld: Callable[[], bool], patches: Patches
) -> None:
    """Leave out the module's `lr_scheduler_step` after a withheld step.

    Schedules with interval "epoch" go on: they count epochs, not steps.

    Args:
        trainer: It calls that hook after each optimizer step.
        module: Its hook is replaced on the instance.
        is_withheld: Whether the last step was withheld; asked once each time a schedule is due.
        patches: Whose `undo` gives the hook back.

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

    def step_unless_withheld(step: Callable[..., None], scheduler: Any, metric: Any) -> None:
        configs = trainer.lr_scheduler_configs
        by_step = any(c.scheduler is scheduler and c.interval == "step" for c in configs)
        if not (by_step and is_withheld()):
            step(scheduler, metric)

    patches.wrap(module, "lr_scheduler_step", step_unless_withheld)
