"""From records and configurations to trackers and sentences."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from gradclip import ClipByNorm, ClipConfig, LogConfig
from gradclip.adapters import ClipperSet, weak, weakly

__all__ = ["Reporter", "is_same_rule"]


_PLAIN = ClipByNorm(max_norm=1.0)
"""A norm's policy with every other field at its default."""


class Reporter:
    """Gives the metrics of clippers to the accelerator's trackers, and places the flight record.

    Nothing is read between two entries, nor unless trackers are initialised. In a script that
    calls `accelerator.log` an entry that is due joins the next such call, under its step: W&B
    drops what comes under a step below its last, and no count of ours fits the script's.

    Args:
        accelerator: Whose trackers.
        log: How often, and what.

    Attributes:
        entries: Where entries go, if not to the trackers; "" if they do.
    """

    def __init__(self, accelerator: Accelerator, log: LogConfig) -> None:
        self._accelerator = weak(accelerator)  # which keeps this
        self._log = log
        self._folder = accelerator.logging_dir or accelerator.project_dir
        self.entries = ""
        self._clippers = ClipperSet()
        self._due: set[int] = set()
        self._script_logs = False
        self._entry_step: int | None = None
        self._rest_step: int | None = None
        self._send = weakly(accelerator.log)

    @property
    def _trackers(self) -> Sequence[Any]:
        """None once the accelerator is gone."""
        accelerator = self._accelerator()
        return () if accelerator is None else accelerator.trackers

    def follow(self, clippers: ClipperSet) -> None:
        """Report these from now on."""
        held = [self._clippers[index] for index in self._due]
        self._due = {index for index, clipper in enumerate(clippers) if clipper in held}
        self._clippers = clippers
        self.place_record(None)

    def announce(self) -> None:
        """Say what is clipped, and where entries go."""
        names = ", ".join(tracker.name for tracker in self._trackers)
        every = self._log.every_n_steps or 10
        self._clippers.announce(
            self.entries or (f"{names} every {every} steps" if names else "clip.flush()")
        )

    def place_record(self, folder: str | None) -> None:
        """Where the flight record goes, if the accelerator has no folder of its own."""
        self._folder = self._folder or folder
        self._clippers.place_records(self._folder or Path.cwd())

    def join(
        self,
        log: Callable[..., None],
        values: Mapping[str, Any],
        step: int | None = None,
        *rest: Any,
        **options: Any,
    ) -> None:
        """`accelerator.log` with the entries that are due; the script's own keys win."""
        due = self._due if self._trackers else set()
        self._script_logs, self._due = True, set()
        self._entry_step = step if due else self._entry_step
        # The rest mustn't take the place of an entry: W&B has one row for each step.
        self._rest_step = None if step is None else step + (step == self._entry_step)
        self._give(due, step, lambda ours: log({**ours, **values}, step, *rest, **options))

    def step(self, index: int, steps: int) -> None:
        """If an optimizer's step makes an entry due: give it, or hold it for the script.

        Args:
            index: Of the optimizer.
            steps: That it has made.
        """
        trackers = self._trackers
        if not trackers or steps % (self._log.every_n_steps or 10) != 0:
            return
        # To W&B the first row of a script that logs each epoch, say, would come too late.
        if self._script_logs or any(tracker.name == "wandb" for tracker in trackers):
            self._due.add(index)
        else:
            self._give_alone({index}, steps)

    def give_rest(self, steps: Sequence[int]) -> None:
        """Give what no entry holds yet: under the script's last step, or our count.

        Args:
            steps: That each optimizer has made.
        """
        self._due = set()
        if not self._trackers:
            return
        if self._script_logs:
            self._give_alone(set(range(len(self._clippers))), self._rest_step)
        else:
            for index, made in enumerate(steps):
                self._give_alone({index}, made)

    def end(self, steps: Sequence[int]) -> None:
        """Give what no entry holds yet, and write the flight record; see `give_rest`."""
        self.give_rest(steps)
        self._clippers.close()

    def _give_alone(self, indices: set[int], step: int | None) -> None:
        self._give(indices, step, lambda ours: self._send(ours, step=step) if ours else None)

    def _give(
        self, indices: set[int], step: int | None, send: Callable[[dict[str, float]], None]
    ) -> None:
        ours = self._clippers.flush(sorted(indices))
        # To W&B a row without a step is complete once it is sent; one with a step is still open.
        if step is not None:
            send(ours)
        for index in sorted(indices) if self._log.histograms else ():
            for tracker in self._trackers:
                self._clippers.give_histogram(index, tracker.tracker, step)
        if step is None:
            send(ours)


def is_same_rule(config: ClipConfig, max_norm: float, norm_type: float) -> bool:
    """Whether a configuration does what these arguments of `clip_grad_norm_` say."""
    if config.groups or len(config.policies) > 1:
        return False
    asked = {**vars(_PLAIN), "max_norm": float(max_norm), "norm_type": float(norm_type)}
    policy = config.policies[0]
    return type(policy) is ClipByNorm and vars(policy) == asked
