"""transformers' Trainers whose accelerator is clipped: metrics in logs, state in checkpoints.

Imports transformers, so that nothing may import it before a script does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from transformers import Trainer, TrainerCallback

from accelerate_clip.checkpoint import load_state, save_state
from accelerate_clip.clipper import AcceleratorClip
from accelerate_clip.private import around_training
from gradclip.adapters import Patches

__all__ = ["BindingCallback", "clip_of", "follow_trainers"]


class BindingCallback(TrainerCallback):
    """A callback that clips with the Trainer that trains."""

    def bind(self, trainer: Trainer) -> None:
        """Clip with this Trainer's accelerator, unless this callback does so already."""
        raise NotImplementedError


def clip_of(trainer: Trainer) -> AcceleratorClip | None:
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
    if clip_of(trainer) is not None:
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
        trainer, clip = self._trainer, clip_of(self._trainer)
        listed = trainer.callback_handler.callbacks
        callbacks = [callback for callback in listed if isinstance(callback, BindingCallback)]
        if clip is not None and clip.owner is not None and clip.owner not in callbacks:
            clip.detach()
        for callback in callbacks:
            callback.bind(trainer)
        clip = clip_of(trainer)
        if clip is not None:
            clip.place_record(trainer.args.output_dir)
            clip.divided_by = self._window

    def log(self, logs: dict[str, Any]) -> None:
        """Add the metrics of the steps since its last log, reading the device as it just did."""
        clip = clip_of(self._trainer)
        # Only the logs of training steps hold it; not those of an evaluation, or the summary.
        if clip is None or "grad_norm" not in logs:
            return
        logs.update(clip.flush())
        # trainer_state.json would hold NaN and Infinity, which aren't JSON.
        for key in [key for key in logs if key == "grad_norm" or key.startswith("clip/")]:
            if not math.isfinite(logs[key]):
                del logs[key]

    def save(self, output_dir: str) -> None:
        """Write the clipping state beside the optimizer's."""
        clip = clip_of(self._trainer)
        if clip is not None:
            save_state(clip, output_dir, each_node=self._trainer.args.save_on_each_node)

    def load(self, checkpoint: str | None) -> None:
        """Continue from the clipping state beside the optimizer's."""
        clip = clip_of(self._trainer)
        if clip is not None and checkpoint is not None:
            load_state(clip, checkpoint)

    def _window(self) -> int:
        """By how many batches the Trainer divides each loss."""
        return self._trainer.current_gradient_accumulation_steps
