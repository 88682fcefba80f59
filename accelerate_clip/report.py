"""From records and configurations to trackers and sentences."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from accelerate_clip.engine import EngineClipper
from accelerate_clip.step import StepClipper
from gradclip import ClipByNorm, ClipConfig

__all__ = ["Reporter", "describe", "is_same_rule"]

Clipper = StepClipper | EngineClipper


class Reporter:
    """Gives what clippers did to the accelerator's trackers, and places the flight record.

    Nothing is read between two entries, nor unless trackers are initialised. In a script that
    calls `accelerator.log` an entry that is due joins the next such call, under its step: W&B
    drops what comes under a step below its last, and no count of ours fits the script's.

    Args:
        accelerator: Whose trackers.
        config: How often, and what.
    """

    def __init__(self, accelerator: Accelerator, config: ClipConfig) -> None:
        self._accelerator = accelerator
        self._log = config.log
        self._folder = accelerator.logging_dir or accelerator.project_dir
        self._clippers: Sequence[Clipper] = ()
        self._due: list[Clipper] = []
        self._script_logs = False
        self._entry_step: int | None = None
        self._rest_step: int | None = None
        self._send = accelerator.log

    def follow(self, clippers: Sequence[Clipper], folder: str | None = None) -> None:
        """Report these from now on.

        Args:
            clippers: One for each optimizer.
            folder: Where the flight record goes if the accelerator has no folder of its own.
        """
        self._clippers = clippers
        self._due = [clipper for clipper in self._due if clipper in clippers]
        self._folder = self._folder or folder
        for index, clipper in enumerate(clippers):
            clipper.recorder.folder = Path(self._folder or Path.cwd()).absolute()
            clipper.recorder.tag = f".optimizer{index}" if len(clippers) > 1 else ""

    def join(self, log: Callable[..., None]) -> Callable[..., None]:
        """`accelerator.log` that adds the entries that are due; the script's own keys win."""

        @functools.wraps(log)
        def log_and_join(
            values: Mapping[str, Any], step: int | None = None, *rest: Any, **options: Any
        ) -> None:
            due = self._due if self._accelerator.trackers else []
            self._script_logs, self._due = True, []
            self._entry_step = step if due else self._entry_step
            # The rest mustn't take the place of an entry: W&B has one row for each step.
            self._rest_step = None if step is None else step + (step == self._entry_step)
            self._give(due, step, lambda ours: log({**ours, **values}, step, *rest, **options))

        return log_and_join

    def step(self, clipper: Clipper) -> None:
        """If this step makes an entry due: give it to the trackers, or hold it for the script."""
        trackers = self._accelerator.trackers
        if not trackers or clipper.steps % (self._log.every_n_steps or 10) != 0:
            return
        # To W&B the first row of a script that logs each epoch, say, would come too late.
        if self._script_logs or any(tracker.name == "wandb" for tracker in trackers):
            self._due = [*(held for held in self._due if held is not clipper), clipper]
        else:
            self._give_alone([clipper], clipper.steps)

    def give_rest(self) -> None:
        """Give what no entry holds yet: under the script's last step, or our count."""
        self._due = []
        if not self._accelerator.trackers:
            return
        if self._script_logs:
            self._give_alone(self._clippers, self._rest_step)
        else:
            for clipper in self._clippers:
                self._give_alone([clipper], clipper.steps)

    def end(self) -> None:
        """Give what no entry holds yet, and write the flight record."""
        self.give_rest()
        for clipper in self._clippers:
            clipper.recorder.close()

    def metrics(self) -> dict[str, float]:
        """Those of the steps since the last call, of every optimizer."""
        return self._metrics(self._clippers)

    def _give_alone(self, clippers: Sequence[Clipper], step: int | None) -> None:
        self._give(clippers, step, lambda ours: self._send(ours, step=step) if ours else None)

    def _give(
        self,
        clippers: Sequence[Clipper],
        step: int | None,
        send: Callable[[dict[str, float]], None],
    ) -> None:
        ours = self._metrics(clippers)
        # To W&B a row without a step is complete once it is sent; one with a step is still open.
        if step is not None:
            send(ours)
        for clipper in clippers if self._log.histograms else ():
            [key] = self._named(clipper, {"clip/grad_norm_histogram": 0.0})
            for tracker in self._accelerator.trackers:
                clipper.recorder.give_histogram(tracker.tracker, key, step)
        if step is None:
            send(ours)

    def _metrics(self, clippers: Sequence[Clipper]) -> dict[str, float]:
        found = [self._named(clipper, clipper.flush()) for clipper in clippers]
        return {key: value for metrics in found for key, value in metrics.items()}

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
