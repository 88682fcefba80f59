"""transformers' Trainer: a callback that clips. Imports transformers; see `trainer`."""

from __future__ import annotations

import weakref
from typing import Any

from transformers import Trainer

from accelerate_clip.clipper import AcceleratorClip
from accelerate_clip.enable import enable
from accelerate_clip.trainer import BindingCallback, clip_of, follow_trainers
from gradclip import ConfigError, PolicyLike, as_config

__all__ = ["GradientClipCallback"]


class GradientClipCallback(BindingCallback):
    """Clips what a transformers `Trainer` trains: `Trainer(callbacks=[GradientClipCallback(...)])`.

    The policy decides instead of `max_grad_norm`. The Trainer's `grad_norm` is the norm before
    clipping. Its logs and history hold the metrics of `ClipRecord` too, and its checkpoints the
    clipping state. Once the callback is removed, `train` clips by `max_grad_norm` again. It clips
    one Trainer at a time, and starts with fresh state when another trains with it.

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
        weakref.finalize(self, follow_trainers())

    def bind(self, trainer: Trainer) -> None:
        """Clip with this Trainer's accelerator, unless this callback does so already."""
        if self.clip is None or clip_of(trainer) is not self.clip:
            if self.clip is not None:
                self.clip.detach()  # another Trainer's, or an earlier trial's accelerator
            self.clip = enable(trainer.accelerator, self.config)
            self.clip.owner = self

    def on_train_begin(
        self, args: Any, state: Any, control: Any, *, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Refuse a Trainer that prepared its optimizer without this callback.

        Raises:
            ConfigError: If so.
        """
        del args, state, control, kwargs
        if self.clip is None or not self.clip.holds(optimizer):
            msg = (
                f"GradientClipCallback: this Trainer's {type(optimizer).__name__} isn't clipped; "
                "allowed: a Trainer whose train() is, or calls, that of transformers.Trainer. Call "
                "accelerate_clip.enable(trainer.accelerator, policy) before training instead."
            )
            raise ConfigError(msg)
