"""From clippers to the Trainer's loggers, progress bar and folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gradclip import ClipRecord, GradientClipper
from lightning_clip.framework import (
    LightningModule,
    Trainer,
    logger_step,
    logs_after_batch,
)

__all__ = ["Reporter"]

_SHOWN = ("clip/grad_norm", "clip/limit", "clip/clip_rate")


class Reporter:
    """Hands on what clippers did, reading nothing on the host between two log entries.

    Args:
        every: Optimizer steps between two entries; None goes by the Trainer's own interval.
        histograms: Also give the norms to loggers that have histograms.
        progress_bar: Show some metrics in the progress bar, which reads them on the host.
    """

    def __init__(self, every: int | None, *, histograms: bool, progress_bar: bool) -> None:
        self._every = every
        self._histograms = histograms
        self._progress_bar = progress_bar
        self._clippers: Sequence[GradientClipper] = ()
        self._written: list[int] = []
        self._filed: list[int] = []
        self.steps: list[int] = []

    def begin(
        self, trainer: Trainer, clippers: Sequence[GradientClipper], steps: Sequence[int]
    ) -> None:
        """Follow these clippers from now on.

        Args:
            trainer: About to fit; called on every rank.
            clippers: One for each optimizer.
            steps: Those each optimizer has made.
        """
        self._clippers = clippers
        self.steps, self._written = list(steps), list(steps)
        self._filed = [0] * len(steps)
        folder = trainer.log_dir or trainer.default_root_dir
        here = "://" not in folder  # a bucket's, which can't be written to like a file
        for index, clipper in enumerate(clippers):
            clipper.recorder.folder = Path(folder).absolute() if here else Path.cwd()
            clipper.recorder.tag = self._suffix(index).replace("/", ".")

    def step(
        self, trainer: Trainer, module: LightningModule, index: int, record: ClipRecord
    ) -> None:
        """Take in a step: `trainer.callback_metrics` always has the last one's metrics.

        Args:
            trainer: The fitting Trainer.
            module: Its module, inside a hook.
            index: Which optimizer.
            record: What was done.
        """
        self.steps[index] += 1
        self._filed[index] = logger_step(trainer)
        if trainer.barebones:
            return
        suffix = self._suffix(index)
        metrics = {k + suffix: v for k, v in record.as_metrics().items() if k.count("/") == 1}
        # Not log_dict, which takes longer than the rest of the callback.
        trainer.callback_metrics.update(metrics)
        if self._progress_bar:
            shown = {
                key + suffix: metrics[key + suffix] for key in _SHOWN if key + suffix in metrics
            }
            module.log_dict(shown, on_step=True, on_epoch=False, prog_bar=True, logger=False)

    def end_batch(self, trainer: Trainer) -> None:
        """Write the entries that are due after this batch."""
        pairs = zip(self.steps, self._written, strict=True)
        if self._every is not None:
            due = [now // self._every > then // self._every for now, then in pairs]
        elif logs_after_batch(trainer):
            due = [now > then for now, then in pairs]
            self._filed = [logger_step(trainer)] * len(due)
        else:
            return
        self._write(trainer, due)

    def end(self, trainer: Trainer) -> None:
        """Write what no entry holds yet."""
        self._write(trainer, [True] * len(self.steps))

    def close(self) -> None:
        """Write the flight record, also of a run that raised."""
        for clipper in self._clippers:
            clipper.recorder.close()

    def _write(self, trainer: Trainer, due: Sequence[bool]) -> None:
        for index, now in enumerate(due):
            if now:
                self._written[index] = self.steps[index]
                if trainer.is_global_zero:
                    self._give(trainer, index)

    def _give(self, trainer: Trainer, index: int) -> None:
        clipper, suffix, step = self._clippers[index], self._suffix(index), self._filed[index]
        metrics = {key + suffix: value for key, value in clipper.flush().items()}
        if not metrics:
            return
        for logger in trainer.loggers:
            if self._histograms:  # first: to W&B it is part of the row that metrics complete
                key = "clip/grad_norm_histogram" + suffix
                clipper.recorder.give_histogram(logger.experiment, key, step)
            logger.log_metrics(metrics, step=step)
            logger.save()

    def _suffix(self, index: int) -> str:
        return f"/optimizer{index}" if len(self._clippers) > 1 else ""
