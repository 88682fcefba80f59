"""From clippers to the Trainer's loggers, progress bar and folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gradclip import ClipRecord, LogConfig
from gradclip.adapters import ClipperSet
from lightning_clip.framework import LightningModule, Trainer, logger_step, logs_after_batch

__all__ = ["Reporter"]

_SHOWN = ("clip/grad_norm", "clip/limit", "clip/clip_rate")


class Reporter:
    """Hands on what clippers did, reading nothing on the host between two log entries.

    Args:
        log: `every_n_steps` counts optimizer steps between two entries; None goes by the Trainer's
            own interval.
        progress_bar: Show some metrics in the progress bar, which reads them on the host.

    Attributes:
        steps: That each optimizer has made.
    """

    def __init__(self, log: LogConfig, *, progress_bar: bool) -> None:
        self._log = log
        self._progress_bar = progress_bar
        self._clippers = ClipperSet()
        self._written: list[int] = []
        self._filed: list[int] = []
        self.steps: list[int] = []

    def begin(self, trainer: Trainer, clippers: ClipperSet) -> None:
        """Follow these clippers from now on, whose optimizers have made no step.

        Args:
            trainer: About to fit; called on every rank.
            clippers: One for each optimizer.
        """
        self._clippers = clippers
        self._filed = [0] * len(clippers)
        self.resume([0] * len(clippers))
        folder = str(trainer.log_dir or trainer.default_root_dir)  # some loggers give a Path
        is_local = "://" not in folder  # a bucket can't be written to like a folder
        clippers.place_records(folder if is_local else Path.cwd())

    def announce(self, trainer: Trainer) -> None:
        """Say what is clipped, and where entries go."""
        names = ", ".join(type(logger).__name__ for logger in trainer.loggers)
        every = self._log.every_n_steps or trainer.log_every_n_steps
        self._clippers.announce(
            f"{names} every {every} steps" if names else "trainer.callback_metrics"
        )

    def resume(self, steps: Sequence[int]) -> None:
        """Go on after so many steps of each optimizer."""
        self.steps, self._written = list(steps), list(steps)

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
        suffix = self._clippers.suffix(index)
        metrics = {k + suffix: v for k, v in record.as_metrics().items() if k.count("/") == 1}
        # Not log_dict, which takes longer than the rest of the callback.
        trainer.callback_metrics.update(metrics)
        if self._progress_bar:
            shown = {k + suffix: metrics[k + suffix] for k in _SHOWN if k + suffix in metrics}
            module.log_dict(shown, on_step=True, on_epoch=False, prog_bar=True, logger=False)

    def end_batch(self, trainer: Trainer) -> None:
        """Write the entries that are due after this batch."""
        every, pairs = self._log.every_n_steps, zip(self.steps, self._written, strict=True)
        if every is not None:
            self._write(trainer, [made // every > written // every for made, written in pairs])
        elif logs_after_batch(trainer):
            self._filed = [logger_step(trainer)] * len(self.steps)
            self._write(trainer, [made > written for made, written in pairs])

    def end(self, trainer: Trainer) -> None:
        """Write what no entry holds yet."""
        self._write(trainer, [True] * len(self.steps))

    def _write(self, trainer: Trainer, due: Sequence[bool]) -> None:
        for index in (index for index, is_due in enumerate(due) if is_due):
            self._written[index] = self.steps[index]
            if trainer.is_global_zero and (metrics := self._clippers.flush([index])):
                self._give(trainer, index, metrics)

    def _give(self, trainer: Trainer, index: int, metrics: dict[str, float]) -> None:
        step = self._filed[index]
        for logger in trainer.loggers:
            if self._log.histograms:  # first: to W&B it is part of the row that metrics complete
                self._clippers.give_histogram(index, logger.experiment, step)
            logger.log_metrics(metrics=metrics, step=step)  # by name, as Lightning does
            logger.save()
