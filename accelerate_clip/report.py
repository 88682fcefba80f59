"""From records and configurations to trackers and sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from accelerate import Accelerator

from accelerate_clip.engine import EngineClipper
from accelerate_clip.step import StepClipper
from gradclip import ClipByNorm, ClipConfig

__all__ = ["Reporter", "describe", "is_same_rule"]

Clipper = StepClipper | EngineClipper


class Reporter:
    """Gives what clippers did to the accelerator's trackers, and places the flight record.

    Nothing is read between two entries, nor unless trackers are initialised.

    Args:
        accelerator: Whose trackers.
        config: How often, and what.
    """

    def __init__(self, accelerator: Accelerator, config: ClipConfig) -> None:
        self._accelerator = accelerator
        self._log = config.log
        self._folder = accelerator.logging_dir or accelerator.project_dir
        self._clippers: Sequence[Clipper] = ()

    def follow(self, clippers: Sequence[Clipper], folder: str | None = None) -> None:
        """Report these from now on.

        Args:
            clippers: One for each optimizer.
            folder: Where the flight record goes if the accelerator has no folder of its own.
        """
        self._clippers = clippers
        self._folder = self._folder or folder
        for index, clipper in enumerate(clippers):
            clipper.recorder.folder = Path(self._folder or Path.cwd()).absolute()
            clipper.recorder.tag = f".optimizer{index}" if len(clippers) > 1 else ""

    def step(self, clipper: Clipper) -> None:
        """Give an entry to the trackers if this step makes it due."""
        if clipper.steps % (self._log.every_n_steps or 10) == 0:
            self._give(clipper)

    def end(self) -> None:
        """Give what no entry holds yet, and write the flight record."""
        for clipper in self._clippers:
            self._give(clipper)
            clipper.recorder.close()

    def metrics(self) -> dict[str, float]:
        """Those of the steps since the last call, of every optimizer."""
        found = [self._named(clipper, clipper.flush()) for clipper in self._clippers]
        return {key: value for metrics in found for key, value in metrics.items()}

    def _give(self, clipper: Clipper) -> None:
        trackers = self._accelerator.trackers
        if not trackers:
            return
        metrics = self._named(clipper, clipper.flush())
        if metrics:
            self._accelerator.log(metrics, step=clipper.steps)
        if self._log.histograms:
            [key] = self._named(clipper, {"clip/grad_norm_histogram": 0.0})
            for tracker in trackers:
                clipper.recorder.give_histogram(tracker.tracker, key, clipper.steps)

    def _named(self, clipper: Clipper, metrics: Mapping[str, float]) -> dict[str, float]:
        if len(self._clippers) == 1:
            return dict(metrics)
        index = self._clippers.index(clipper)
        return {f"{key}/optimizer{index}": value for key, value in metrics.items()}


def describe(config: ClipConfig) -> str:
    """The policies in one line: `norm(max_norm=1.0), zclip(decay=0.9)`."""
    text: list[str] = []
    for policy in config.policies:
        fields = policy.model_dump(exclude_defaults=True, exclude={"type"})
        text.append(f"{policy.type}({', '.join(f'{k}={v!r}' for k, v in fields.items())})")
    return ", ".join(text) + (" and groups" if config.groups else "")


def is_same_rule(config: ClipConfig, max_norm: float, norm_type: float) -> bool:
    """Whether a configuration does what these arguments of `clip_grad_norm_` say."""
    if config.groups or len(config.policies) > 1:
        return False
    asked = ClipByNorm.model_construct(max_norm=float(max_norm), norm_type=float(norm_type))
    return config.policies[0] == asked
