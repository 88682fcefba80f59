"""transformers' Trainer: a callback that clips; metrics in its logs, state in its checkpoints.

The last two hold for every Trainer whose accelerator is clipped, whoever enabled that.

Imports transformers, so that nothing may import it before a script does.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

from transformers import Trainer, TrainerCallback

from accelerate_clip.checkpoint import load_state, save_state
from accelerate_clip.clipper import AcceleratorClip
from accelerate_clip.private import around_training
from gradclip import ConfigError, PolicyLike, Spike, as_config
from gradclip.adapters import Patches, weak

__all__ = ["GradientClipCallback", "follow_trainers"]


class GradientClipCallback(TrainerCallback):
    """Clips what a transformers `Trainer` trains: `Trainer(callbacks=[GradientClipCallback(...)])`.

    The policy decides instead of `max_grad_norm`. The Trainer's `grad_norm` is the norm before
    clipping. Its logs and history hold the metrics of `ClipRecord` too, and its checkpoints the
    clipping state. Once the callback is removed, `train` clips by `max_grad_norm` again. It clips
    one Trainer at a time, and starts with fresh state when another trains with it.

    Args:
        policy: A policy, a list of them (applied in order), the name of a preset ("zclip"), the
            path of a YAML file, a mapping, or a `ClipConfig`; `Auto()` if left out.

    Attributes:
        config: The validated configuration.
        clip: What `accelerate_clip.enable` returns, for the Trainer; None before it trains.

    Raises:
        ConfigError: If the policy isn't valid, and, when training starts, if clipping is enabled
            already.
    """

    def __init__(self, policy: PolicyLike | None = None) -> None:
        self.config = as_config(policy)
        self.clip: AcceleratorClip | None = None
        self._listeners: list[Callable[[Spike], object]] = []
        weakref.finalize(self, follow_trainers())

    def on_spike(self, call: Callable[[Spike], object]) -> None:
        """Call this at every alarm, from the next `train` on; see `GradientClipper.on_spike`."""
        self._listeners.append(call)

    def __repr__(self) -> str:
        """What clips."""
        return f"GradientClipCallback({self.clip or self.config.summary})"

    def bind(self, trainer: Trainer) -> None:
        """Clip with this Trainer's accelerator, unless this callback does so already."""
        if self.clip is None or _clip_of(trainer) is not self.clip:
            if self.clip is not None:
                self.clip.detach()  # another Trainer's, or an earlier trial's accelerator
            self.clip = AcceleratorClip(trainer.accelerator, self.config)
            self.clip.of_callback = True
            for call in self._listeners:
                self.clip.on_spike(call)

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


def _clip_of(trainer: Trainer) -> AcceleratorClip | None:
    """What clips with this Trainer's accelerator, if anything does."""
    return getattr(trainer.accelerator, "gradient_clip", None)


_followers: set[object] = set()
_on_class: list[Patches] = []


def follow_trainers() -> Callable[[], None]:
    """Take part in every `Trainer.train` from now on.

    Neither a callback's events nor an accelerator tell which Trainer they belong to. So this one
    method is replaced on the class, until everybody who asked for it has ended it; during `train`
    the rest is replaced on the Trainer itself.

    Returns:
        Ends it.
    """
    follower = object()
    if not _followers:
        _on_class.append(Patches())
        _on_class[-1].wrap(Trainer, "train", _train)
    _followers.add(follower)
    return partial(_unfollow, follower)


def _unfollow(follower: object) -> None:
    _followers.discard(follower)
    if not _followers and _on_class:
        _on_class.pop().undo()


def _train(train: Callable[..., Any], trainer: Trainer, *args: Any, **kwargs: Any) -> Any:
    training, patches = _Training(trainer), Patches()
    training.bind()
    if _clip_of(trainer) is not None:
        around_training(trainer, training, patches)
    try:
        return train(trainer, *args, **kwargs)
    finally:
        patches.undo()


class _Training:
    """One call of `train` of a Trainer, which may change its accelerator meanwhile."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    def bind(self) -> None:
        """Let the Trainer's callbacks, and no others, clip with its accelerator."""
        trainer, clip = self._trainer, _clip_of(self._trainer)
        listed = trainer.callback_handler.callbacks
        callbacks = [callback for callback in listed if isinstance(callback, GradientClipCallback)]
        ours = any(callback.clip is clip for callback in callbacks)
        if clip is not None and clip.of_callback and not ours:
            clip.detach()
        for callback in callbacks:
            callback.bind(trainer)
        clip = _clip_of(trainer)
        if clip is not None:
            clip.place_record(trainer.args.output_dir)
            clip.place_entries("the Trainer's logs")
            clip.divided_by = partial(_window, weak(trainer))  # whose accelerator keeps it
            clip.default_norm = getattr(type(trainer.args), "max_grad_norm", None)

    def log(self, logs: dict[str, Any]) -> None:
        """Add the metrics of the steps since its last log, reading the device as it just did."""
        clip = _clip_of(self._trainer)
        # Only the logs of training steps hold it; not those of an evaluation, or the summary.
        # Not `grad_norm`: transformers 4 leaves that out where max_grad_norm is 0.
        if clip is None or "learning_rate" not in logs:
            return
        logs.update(clip.flush())
        # trainer_state.json would hold NaN and Infinity, which aren't JSON.
        for key in [key for key in logs if key == "grad_norm" or key.startswith("clip/")]:
            if not math.isfinite(logs[key]):
                del logs[key]

    def save(self, output_dir: str) -> None:
        """Write the clipping state beside the optimizer's."""
        clip = _clip_of(self._trainer)
        if clip is not None:
            save_state(clip, output_dir, each_node=self._trainer.args.save_on_each_node)

    def load(self, checkpoint: str | None) -> None:
        """Continue from the clipping state beside the optimizer's."""
        clip = _clip_of(self._trainer)
        if clip is not None and checkpoint is not None:
            load_state(clip, checkpoint)


def _window(known: Callable[[], Trainer | None]) -> int:
    """By how many batches a Trainer divides each loss."""
    trainer = known()
    return 1 if trainer is None else trainer.current_gradient_accumulation_steps
