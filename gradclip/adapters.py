"""For whoever hooks gradclip into a trainer: clippers of all optimizers, and patches to undo.

`lightning_clip` and `accelerate_clip` are built on it; docs/adapters.md hooks a toy trainer.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.nn import Module
from torch.optim import Optimizer

from gradclip.changes import GradientSnapshot, changes_gradients
from gradclip.clipper import GradientClipper
from gradclip.config import PolicyLike, as_config, config_from_environment
from gradclip.config.presets import preset_text, presets
from gradclip.config.words import fault_in_file, policies_in_words
from gradclip.errors import ConfigError, escaped
from gradclip.layouts import is_first_rank
from gradclip.patches import Patches
from gradclip.plan.parameters import Named, as_pairs, configs_for, group_names
from gradclip.records.alarm import Spike
from gradclip.records.record import ClipRecord
from gradclip.saved import read_list, read_mapping, read_whole, refuse_saved
from gradclip.steps import claim_steps, closure_place, follow_steps
from gradclip.versions import installed_versions
from gradclip.weak import weak, weakly

__all__ = [
    "ClipperSet",
    "GradientSnapshot",
    "OncePerStep",
    "Patches",
    "changes_gradients",
    "claim_steps",
    "closure_place",
    "config_from_environment",
    "fault_in_file",
    "follow_steps",
    "group_names",
    "installed_versions",
    "policies_in_words",
    "preset_text",
    "presets",
    "weak",
    "weakly",
    "window_share",
]

_logger = logging.getLogger("gradclip")


class ClipperSet(Sequence[GradientClipper]):
    """The clippers of one training program, one for each of its optimizers, in their order.

    Args:
        clippers: Built by the caller; see `build`.

    Example:
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> clippers = ClipperSet.build(
        ...     ClipByNorm(max_norm=1.0), model.named_parameters(), [optimizer]
        ... )
        >>> model(torch.full((1, 2), 30.0)).sum().backward()
        >>> bool(clippers[0].clip().clipped)
        True
    """

    def __init__(self, clippers: Iterable[GradientClipper] = ()) -> None:
        self._clippers = list(clippers)

    @classmethod
    def build(
        cls,
        policy: PolicyLike,
        named_parameters: Named,
        optimizers: Sequence[Optimizer | Any],
        *,
        scaler: GradScaler | None = None,
    ) -> ClipperSet:
        """Build a clipper for each optimizer.

        With several optimizers a group of the configuration may match the parameters of one of
        them alone (`match: "generator.*"`).

        Args:
            policy: As for `GradientClipper`.
            named_parameters: The model, or names as from `model.named_parameters()`.
            optimizers: Each with parameters of its own.
            scaler: The `GradScaler` of all of them, if any.

        Raises:
            ConfigError: If the configuration isn't valid for these parameters.
            LayoutError: If the parameters are laid out in a way that isn't supported.
        """
        config, named = as_config(policy), named_parameters
        if not isinstance(named, Module):
            named = as_pairs(named)
        configs = [config] if len(optimizers) == 1 else configs_for(config, named, optimizers)
        pairs = zip(configs, optimizers, strict=True)
        return cls(GradientClipper(own, named, opt, scaler=scaler) for own, opt in pairs)

    def __len__(self) -> int:
        return len(self._clippers)

    def __getitem__(self, index: Any) -> Any:
        return self._clippers[index]

    def __iter__(self) -> Iterator[GradientClipper]:
        return iter(self._clippers)

    def suffix(self, index: int) -> str:
        """What the metric keys of one clipper end in: `/optimizer<index>`, "" for the only one."""
        return f"/optimizer{index}" if len(self) > 1 else ""

    def flush(self, indices: Iterable[int] | None = None) -> dict[str, float]:
        """What to log of the steps since the last call; see `GradientClipper.flush`.

        Args:
            indices: Of which clippers; None for all of them.

        Returns:
            The metrics of each, with its suffix.
        """
        return {
            key + self.suffix(index): value
            for index in (range(len(self)) if indices is None else indices)
            for key, value in self[index].flush().items()
        }

    def announce(self, entries: str) -> None:
        """Say in one line, on the first rank, what is clipped and where entries go.

        The line is logged at INFO by the logger `gradclip`. In a program that set up no logging it
        goes to standard error, as Python does with warnings; a level of the logger above INFO
        (`logging.getLogger("gradclip").setLevel("WARNING")`) switches it off.

        Args:
            entries: Where they go: "TensorBoardLogger every 50 steps".
        """
        if not len(self) or not is_first_rank():
            return
        clipped = "; ".join(clipper.summary for clipper in self)
        line = f"gradclip: {clipped}. Entries: {entries}."
        if _logger.hasHandlers():
            _logger.info(line)
        elif _logger.level <= logging.INFO:
            sys.stderr.write(f"{escaped(line)}\n")

    def give_histogram(self, index: int, writer: Any, step: int | None) -> None:
        """Give the norms of the last `flush` to what has histograms; anything else is left alone.

        The key is `clip/grad_norm_histogram`, with the clipper's suffix.

        Args:
            index: Of which clipper.
            writer: TensorBoard's `SummaryWriter`, or a W&B run.
            step: At which step, if known.
        """
        norms = self[index].recorder.norms
        key = f"clip/grad_norm_histogram{self.suffix(index)}"
        if norms and hasattr(writer, "add_histogram"):
            writer.add_histogram(key, torch.tensor(norms, dtype=torch.float64, device="cpu"), step)
        elif norms and type(writer).__module__.startswith("wandb"):
            import wandb

            writer.log({key: wandb.Histogram(norms)}, commit=False)

    def state_dict(self, steps: Sequence[int] | None = None) -> dict[str, Any]:
        """The state of every clipper: plain tensors, numbers and strings. Every rank calls it.

        Args:
            steps: That each optimizer has made, if the trainer counts them.
        """
        counted = {} if steps is None else {"steps": list(steps)}
        return {"clippers": [clipper.state_dict() for clipper in self], **counted}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict`, saved at any world size.

        Raises:
            ConfigError: If it is of other optimizers, policies or parameters, or holds what no
                steps lead to; nothing is changed then, in any of the clippers.
        """
        self.checked(state)()

    def checked(
        self, state: Mapping[str, Any], *, with_steps: bool = False
    ) -> Callable[[], list[int]]:
        """Check a `state_dict`, and change nothing.

        Args:
            state: From `state_dict`.
            with_steps: It was given `steps`.

        Returns:
            What continues from it, and gives `steps`.

        Raises:
            ConfigError: As `load_state_dict`.
        """
        state = read_mapping(state, "the whole", ("clippers", *(("steps",) if with_steps else ())))
        states = read_list(state["clippers"], "clippers", Mapping)
        if len(states) != len(self):
            msg = (
                f"The saved clip state is of {len(states)} optimizers, this run has {len(self)}. "
                "Use the same optimizers, or start with fresh state."
            )
            raise ConfigError(msg)
        steps = read_list(state["steps"], "steps", int) if with_steps else []
        if with_steps and len(steps) != len(self):
            refuse_saved("steps", f"has {len(steps)} entries", f"{len(self)}, one an optimizer")
        steps = [read_whole(number, f"steps[{i}]") for i, number in enumerate(steps)]
        ready: list[Callable[[], None]] = []
        for index, (clipper, own) in enumerate(zip(self, states, strict=True)):
            try:
                ready.append(clipper.checked(own))
            except ConfigError as error:
                msg = f"{error} (This is of clippers[{index}].)"
                raise ConfigError(msg) from None

        def take_in() -> list[int]:
            for own in ready:
                own()
            return steps

        return take_in

    def go_on_from(
        self, before: Sequence[GradientClipper], steps: Sequence[int], *, same_run: bool = True
    ) -> list[int]:
        """Take the place of the clippers of earlier optimizers; see `GradientClipper.go_on_from`.

        Args:
            before: Those that are done with.
            steps: That each of their optimizers has made.
            same_run: Their flight records go on too.

        Returns:
            What `steps` is for these clippers; 0 where none of the earlier ones fits.
        """
        counted: list[int] = []
        for clipper in self:
            last = clipper.go_on_from(before, same_run=same_run)
            counted.append(0 if last is None else steps[before.index(last)])
        return counted

    def place_records(self, folder: str | Path) -> None:
        """Say where flight records with a relative path go; names hold the optimizer's index.

        Raises:
            ConfigError: If they can't be written there.
        """
        for index, clipper in enumerate(self):
            clipper.recorder.place(folder, self.suffix(index).replace("/", "."))

    def on_spike(self, call: Callable[[Spike], object]) -> None:
        """Call this at every alarm of any of them; see `GradientClipper.on_spike`."""
        for clipper in self:
            clipper.on_spike(call)

    def saved_to(self, path: str | PathLike[str]) -> None:
        """Say where a checkpoint was saved; see `GradientClipper.saved_to`."""
        for clipper in self:
            clipper.saved_to(path)

    def close(self) -> None:
        """End training, also where it raised: see `GradientClipper.close`."""
        for clipper in self:
            clipper.close()

    def refuse_shared_backward(self, who: str, way_out: str) -> None:
        """Refuse what needs a backward of its own where several optimizers share one.

        Args:
            who: Names the caller at the start of the error.
            way_out: The last sentence of the error: what else the user can do.

        Raises:
            ConfigError: If there are several optimizers, and a policy watches the loss or `stage`
                is "after_backward".
        """
        if len(self) < 2:
            return
        found = ""
        if any(clipper.watches_loss for clipper in self):
            found, setting = "a policy has watch 'loss' or 'both'", "watch to 'norm'"
        elif self[0].config.stage == "after_backward":
            found, setting = "stage is 'after_backward'", "stage to 'step'"
        if found:
            msg = (
                f"{who}: {found}, and a backward doesn't tell which of {len(self)} optimizers it "
                f"is for; allowed: one optimizer. Set {setting}, or {way_out}"
            )
            raise ConfigError(msg)


class OncePerStep:
    """Clips the gradients of each step the first time it is asked to, and before the step at last.

    For a trainer whose script may clip by itself (`trainer.clip_grad_norm_()`) or leave it to the
    trainer: both end in one clip for each step of the optimizer.

    The optimizer keeps this alive, so what `share` and `after_step` hold isn't to keep the
    optimizer (`weakly`).

    Args:
        clipper: Built with the optimizer; it must not be attached.
        optimizer: Its optimizer. Hooks are registered on it until `remove`.
        share: Gives the share of a full accumulation window that a step holds (`window_share`),
            asked once at each clip.
        after_step: Called after each step of the optimizer, also of a withheld one.

    Attributes:
        clipper: The clipper.
        steps: Steps that the optimizer has made.
    """

    def __init__(
        self,
        clipper: GradientClipper,
        optimizer: Optimizer,
        *,
        share: Callable[[], float] = lambda: 1.0,
        after_step: Callable[[], object] = lambda: None,
    ) -> None:
        self.clipper = clipper
        self.steps = 0
        self._share = share
        self._after_step = after_step
        self._is_done = self._is_done_in_step = False
        self._clips_in_step: int | None = None
        self._patches = Patches()
        # The post-hook first: it has to see the flag of a fused step before the flag is taken back.
        follow_steps(optimizer, self._patches, after=self._end_made_step)
        handle = clipper.attach(optimizer, clip=self._clip_in_step)
        self._patches.callback(weakly(handle.remove))  # the optimizer keeps it

    @property
    def is_done(self) -> bool:
        """Whether the gradients that are in place now have been clipped."""
        return self._is_done

    def clip(self, *, grad_scale: Tensor | None = None, repeat: bool = False) -> ClipRecord:
        """Clip, unless this step's gradients have been clipped already.

        Args:
            grad_scale: 0-d factor that the gradients still carry (a loss scale).
            repeat: One more evaluation of a closure in a step that was clipped.

        Returns:
            This step's record.
        """
        if not self._is_done or repeat:
            # A closure that calls this by itself does so at every evaluation.
            repeat = repeat or bool(self._clips_in_step)
            self.clipper.clip(grad_scale=grad_scale, share=self._share(), repeat=repeat)
            self._is_done = True
            if self._clips_in_step is not None:
                self._clips_in_step += 1
        assert self.clipper.last_record is not None
        return self.clipper.last_record

    def _clip_in_step(
        self, *, grad_scale: Tensor | None = None, repeat: bool = False
    ) -> ClipRecord:
        """Clip from within the step, so also if the step before raised after it had clipped."""
        if self._is_done_in_step and not repeat:
            self.expect_new()
        record = self.clip(grad_scale=grad_scale, repeat=repeat)
        self._is_done_in_step = True
        return record

    def expect_new(self) -> None:
        """Say that other gradients are in place, or will be, than those that were clipped."""
        self._is_done = self._is_done_in_step = False

    @contextmanager
    def in_step(self) -> Iterator[None]:
        """Around the trainer's call that makes the optimizer step.

        Needed where a `GradScaler` may leave the step out at an overflow, which is then counted,
        and where a closure calls `clip` by itself: its evaluations are then one step.
        """
        self._clips_in_step = 0
        try:
            yield
        except BaseException:
            self.expect_new()  # of a step that wasn't finished
            raise
        finally:
            self._clips_in_step = None
        if self._is_done:  # an overflow
            self.end_step()

    def end_step(self) -> None:
        """Say that the step is over; called by itself after each step that the optimizer makes."""
        self.steps += 1
        self.expect_new()
        self._after_step()

    def remove(self) -> None:
        """Clip no more."""
        self._patches.undo()

    def _end_made_step(self, *_: object) -> None:
        self.end_step()


def window_share(batches: int, window: int) -> float:
    """How much of a full window of accumulation the gradients of a step hold.

    The last window of an epoch may hold fewer batches than the loss was divided by, so that its
    gradient is small. `GradientClipper.clip(share=...)` takes this number.

    Args:
        batches: Backward passes since the last step; 0 counts as one.
        window: By how many the trainer divides each loss.

    Returns:
        Above 0, and at most 1.
    """
    return min(1.0, max(batches, 1) / window)
