"""transformers' Trainer: a callback that clips; statistics in its logs, state in its checkpoints.

The last two hold for every Trainer whose accelerator is clipped, whoever enabled that. Imports
transformers, so that nothing else here may import it.
"""

from __future__ import annotations

import functools
import math
from typing import Any

from accelerate import Accelerator
from transformers import Trainer, TrainerCallback

from accelerate_clip.checkpoint import load_clip, save_clip
from accelerate_clip.clipper import AcceleratorClip
from accelerate_clip.enable import enable
from accelerate_clip.private import around_trainers, prepared_optimizers
from gradclip import ConfigError, PolicyLike, as_config

__all__ = ["GradientClipCallback", "follow_trainers"]


class GradientClipCallback(TrainerCallback):
    """Clips what a transformers `Trainer` trains: `Trainer(callbacks=[GradientClipCallback(...)])`.

    The policy decides instead of `max_grad_norm`. The Trainer's `grad_norm` is the norm before
    clipping, its logs and history hold the metrics of `ClipRecord` too, and its checkpoints
    the clipping state. Once it is removed, `train` clips by `max_grad_norm` again. It clips one
    Trainer at a time, and starts with fresh state when another trains with it.

    Args:
        policy: A policy, a list of them (applied in order), a `ClipConfig`, a mapping, or the
            path of a YAML file.

    Attributes:
        config: The validated configuration.
        clip: What `accelerate_clip.enable` returned for the Trainer; None before it trains.

    Raises:
        ConfigError: If the policy isn't valid, and, when training starts, if clipping is enabled
            already.
    """

    def __init__(self, policy: PolicyLike) -> None:
        self.config = as_config(policy)
        self.clip: AcceleratorClip | None = None
        self._accelerator: Accelerator | None = None
        follow_trainers()

    def bind(self, trainer: Trainer) -> None:
        """Clip with this Trainer's accelerator, unless this callback does so already."""
        if self.clip is None or _clip_of(trainer) is not self.clip:
            if self.clip is not None:
                self.clip.detach()  # another Trainer's, or an earlier trial's accelerator
            self.clip = enable(trainer.accelerator, self.config)
            self.clip.owner = self
            self._accelerator = trainer.accelerator

    def on_train_begin(
        self, args: Any, state: Any, control: Any, *, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Refuse a Trainer that prepared its optimizer without this callback.

        Raises:
            ConfigError: If so.
        """
        del args, state, control, kwargs
        known = [] if self._accelerator is None else prepared_optimizers(self._accelerator)
        if not any(prepared is optimizer for prepared in known):
            msg = (
                f"GradientClipCallback: this Trainer's {type(optimizer).__name__} isn't clipped; "
                "allowed: a Trainer whose train() is, or calls, that of transformers.Trainer. Call "
                "accelerate_clip.enable(trainer.accelerator, policy) before training instead."
            )
            raise ConfigError(msg)


@functools.cache
def follow_trainers() -> None:
    """Let Trainers log statistics and save state where their accelerator is clipped; once."""
    around_trainers(
        Trainer,
        is_clipped=lambda trainer: _clip_of(trainer) is not None,
        before_preparing=_bind,
        before_logging=_log,
        after_saving=_save,
        after_loading=_load,
    )


def _clip_of(trainer: Trainer) -> AcceleratorClip | None:
    return getattr(trainer.accelerator, "gradient_clip", None)


def _bind(trainer: Trainer) -> None:
    listed = trainer.callback_handler.callbacks
    callbacks = [callback for callback in listed if isinstance(callback, GradientClipCallback)]
    clip = _clip_of(trainer)
    if clip is not None and clip.owner is not None and clip.owner not in callbacks:
        clip.detach()
    for callback in callbacks:
        callback.bind(trainer)
    clip = _clip_of(trainer)
    if clip is not None:
        clip.place_record(trainer.args.output_dir)
        clip.divided_by = lambda: trainer.current_gradient_accumulation_steps


def _log(trainer: Trainer, logs: dict[str, Any]) -> None:
    """Add the metrics of the steps since its last log, reading the device as it just did."""
    clip = _clip_of(trainer)
    # Only the logs of training steps hold it; not those of an evaluation, or the summary.
    if clip is None or "grad_norm" not in logs:
        return
    logs.update(clip.flush())
    # trainer_state.json would hold NaN and Infinity, which aren't JSON.
    for key in [key for key in logs if key == "grad_norm" or key.startswith("clip/")]:
        if not math.isfinite(logs[key]):
            del logs[key]


def _save(trainer: Trainer, folder: str) -> None:
    clip = _clip_of(trainer)
    if clip is not None:
        save_clip(clip, folder, trainer.args.save_on_each_node)


def _load(trainer: Trainer, folder: str) -> None:
    clip = _clip_of(trainer)
    if clip is not None:
        load_clip(clip, folder)
