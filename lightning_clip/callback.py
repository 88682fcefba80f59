"""The callback: clip before each optimizer step, log, and travel with the checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from operator import is_
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim import Optimizer

from gradclip import (
    ClipConfig,
    ClipRecord,
    ConfigError,
    GradientClipper,
    PolicyLike,
    Spike,
)
from gradclip.adapters import ClipperSet, Patches, claim_steps, window_share
from lightning_clip.cli import config_of, with_policies
from lightning_clip.framework import (
    Callback,
    LightningModule,
    Trainer,
    deepspeed_engine,
    live_scaler,
    skips_backward,
    unscaled,
)
from lightning_clip.refuse import (
    refuse_micro_batches,
    refuse_optimizers,
    refuse_second_clip,
    refuse_setup,
)
from lightning_clip.report import Reporter
from lightning_clip.schedule import hold_schedule
from lightning_clip.steps import Steps

__all__ = ["GradientClip"]

AsWritten = PolicyLike | None
if not TYPE_CHECKING:
    # So that LightningCLI hands the value over as written. Of Any, or of our own classes, it would
    # import whatever a `class_path` names; config_of builds ours alone, its errors name the key and
    # the nearest right word, and --print_config prints the value back.
    AsWritten = dict | list | str | bool | int | float | None


@with_policies
class GradientClip(Callback):
    """Clips gradients before each optimizer step of a Lightning Trainer.

    Works in automatic and manual optimisation, with gradient accumulation, on one process and
    under DDPStrategy, FSDPStrategy, ModelParallelStrategy (`fully_shard`, tensor parallel) and
    DeepSpeedStrategy (whose engine then clips inside its own step), in 32-bit, bf16 and 16-mixed
    precision, with fused optimizers too. Norms and limits are those of one process and of
    gradients without a loss scale.
    Every optimizer has its own limits and adaptive state, which are saved and restored with the
    Trainer's checkpoints and kept over several `trainer.fit` calls of the same module.

    Metrics (`GradientClipper.flush`: means, maxima and counts over the steps between) go to the
    Trainer's loggers every `Trainer(log_every_n_steps=...)` steps, or every `log.every_n_steps`
    optimizer steps where the configuration says so. With several optimizers each key ends in
    `/optimizer<index>`. The flight record goes to the first logger's folder.

    A withheld step leaves parameters and optimizer state as they are; the Trainer's
    `global_step` advances all the same, and so do learning rate schedules, unless the
    configuration says `schedule_on_skip: hold`.

    Args:
        policy: A policy, a list of them (applied in order), the name of a preset ("zclip"), the
            path of a YAML file, a mapping, or a `ClipConfig`; `Auto()` if left out.
        progress_bar: Also show the norm, the limit and the share of clipped steps in the progress
            bar. Costs a host read of each of them per step.
        restore: Continue from the clip state of a checkpoint; False starts with fresh state, as
            after a change of policies.

    Raises:
        ConfigError: If the configuration isn't valid. When fitting starts, also if something
            else clips too, an optimizer or strategy can't be clipped from a callback, scope
            "parameter" meets the flat parameters of `FSDPStrategy(use_orig_params=False)`, or
            schedules that the Trainer doesn't step are to be held. In a step that Lightning's
            hooks aren't called for.
        LayoutError: When fitting starts, if parameters are laid out in a way that isn't
            supported.

    Example:
        >>> from gradclip import ClipByNorm, ZClip
        >>> GradientClip([ZClip(), ClipByNorm(max_norm=1.0)]).config.policies[1].max_norm
        1.0
    """

    def __init__(
        self, policy: AsWritten = None, *, progress_bar: bool = False, restore: bool = True
    ) -> None:
        self.config: ClipConfig = config_of(policy)
        self._reporter = Reporter(self.config.log, progress_bar=progress_bar)
        self._restore = restore
        self._module: LightningModule | None = None
        self._optimizers: list[Optimizer] = []
        self._clippers = ClipperSet()
        self._engine: Any | None = None
        self._patches = Patches()
        self._finder_patches = Patches()
        self._steps = Steps([], self._patches)
        self._micro_batch = ExitStack()
        self._listeners: list[Callable[[Spike], object]] = []
        self._last_record: ClipRecord | None = None
        self._record_before: ClipRecord | None = None  # this batch
        self._backward_ran = self._zeroed = False  # in this batch
        self._batches = self._backwards = 0  # since the last step
        self._training: tuple[Trainer, LightningModule] | None = None
        self._earlier: tuple[ClipperSet, list[int]] | None = None  # of a fit before, with steps
        self._saved: dict[str, Any] = {}  # waits for training to start
        self._saved_before: dict[str, Any] = {}  # the same, before this fit, validate or test
        self._saved_for: LightningModule | None = None  # None: any module

    def __repr__(self) -> str:
        """What clips, and what is clipped once fitting has started."""
        clipped = "; ".join(clipper.summary for clipper in self._clippers)
        return f"{type(self).__name__}({clipped or self.config.summary})"

    @property
    def clippers(self) -> list[GradientClipper]:
        """One for each of `trainer.optimizers`, in that order; empty before fitting starts."""
        return list(self._clippers)

    @property
    def last_record(self) -> ClipRecord | None:
        """What the last step measured and did; None before the first."""
        return self._last_record

    def on_spike(self, call: Callable[[Spike], object]) -> None:
        """Call this at every alarm, in every fit from now on; see `GradientClipper.on_spike`."""
        self._clippers.on_spike(call)
        self._listeners.append(call)

    @property
    def state_key(self) -> str:
        """The key of this callback's state in a checkpoint, the same for subclasses."""
        return "GradientClip"

    def state_dict(self) -> dict[str, Any]:
        """Adaptive state and counts of every optimizer: plain tensors, numbers and strings."""
        if self._saved or not self._clippers:
            return dict(self._saved)
        clippers, steps = self._earlier or (self._clippers, self._reporter.steps)
        return clippers.state_dict(steps)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a `state_dict`: at once while training, else when training starts.

        Raises:
            ConfigError: If it isn't a mapping; while training, or when it starts, if it is of
                other optimizers, policies or parameters, or holds what no steps lead to. Nothing
                is changed then.
        """
        if not isinstance(state_dict, Mapping):
            msg = (
                f"GradientClip.load_state_dict: got a {type(state_dict).__name__}; allowed: a "
                "mapping as state_dict() gives it. For fresh state: GradientClip(..., "
                "restore=False)."
            )
            raise ConfigError(msg)
        if not self._restore:
            return
        if self._training is None or not state_dict:
            self._saved = dict(state_dict)
        else:
            self._follow_optimizers(*self._training)
            self._take_in(state_dict)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a Trainer that clips too; saved state isn't loaded yet."""
        if stage == "fit":
            refuse_setup(trainer, GradientClip)
        if self._saved_for not in (None, pl_module):
            self._saved = {}
        self._saved_before, self._saved_for = self._saved, None
        if stage == "fit":
            self._finder_patches.undo()
            self._finder_patches = Patches()
            start = partial(self._join_finder, trainer, pl_module)
            self._finder_patches.wrap(pl_module, "on_train_start", start)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Build the clippers; a second fit of the same module goes on with its state."""
        refuse_optimizers(trainer, pl_module)
        if self._module is not pl_module:
            self._earlier = None
        elif self._clippers and self._earlier is None:
            self._earlier = self._clippers, self._reporter.steps
        self._module = pl_module
        self._build(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take in saved state, which some strategies load only after `on_fit_start`.

        Before that other callbacks may have added parameters, too.
        """
        self._batches = self._backwards = 0
        self._follow_optimizers(trainer, pl_module)
        if self._saved:
            self._take_in(self._saved)
            if trainer.ckpt_path:
                self._clippers.saved_to(trainer.ckpt_path)
        elif self._earlier is not None:
            steps = self._clippers.go_on_from(*self._earlier, same_run=False)
            self._reporter.resume(steps)
        self._saved, self._earlier, self._training = {}, None, (trainer, pl_module)
        self._announce(trainer)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, *_: object
    ) -> None:
        """Nothing of this batch has reached the gradients yet."""
        self._follow_optimizers(trainer, pl_module)
        for clipper in self._clippers:
            clipper.batch = trainer.fit_loop.total_batch_idx
        self._record_before = self._clippers[0].last_record
        self._steps.begin_batch()
        self._backward_ran = False
        self._batches += 1

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        """Show policies the loss as `training_step` gave it; put earlier gradients aside.

        The latter for `stage: after_backward`, which clips this backward's by themselves.
        """
        self._follow_optimizers(trainer, pl_module)
        for clipper in self._clippers:
            if clipper.watches_loss:
                loss = unscaled(trainer, pl_module, loss)
                clipper.observe_loss(loss, first=self._zeroed)
                self._zeroed = False
        if self.config.stage == "after_backward":
            refuse_micro_batches(trainer)  # again: accumulate_grad_batches may change while fitting
            automatic = pl_module.automatic_optimization
            share = 1 / trainer.accumulate_grad_batches if automatic else 1.0
            self._micro_batch.enter_context(self._clippers[0].micro_batch(share=share))

    def on_before_zero_grad(self, *_: object) -> None:
        """What follows is the first batch of a step."""
        self._zeroed = True

    def on_after_backward(self, *_: object) -> None:
        """This batch has gradients; clip them now if they are to be clipped by themselves."""
        self._micro_batch.close()
        self._backward_ran = True
        self._backwards += 1

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Clip this optimizer's gradients and log what was done.

        A DeepSpeed engine clips inside its step, which follows; the step before it is logged.
        """
        share = self._share(trainer)
        if self._engine is not None:
            self._report(trainer, pl_module, 0)
            return
        index = self._index(trainer, pl_module, optimizer)
        repeat = self._steps.announce(index)
        if self._has_gradients(trainer, pl_module):
            record = self._clippers[index].clip(share=share, repeat=repeat)
            if repeat:  # a failed evaluation joins the record of the step that was logged
                self._last_record = record
            self._report(trainer, pl_module, index)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        """Log what is due; a DeepSpeed engine made its step, if any, after the last hook."""
        self._steps.end_batch()
        if self._engine is not None:
            self._report(trainer, pl_module, 0)
        self._reporter.end_batch(trainer)

    def on_train_end(self, trainer: Trainer, *_: object) -> None:
        """Log what is left."""
        self._reporter.end(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give module and optimizers their own methods back, and write the flight record.

        State that `validate` or `test` loaded with a checkpoint is dropped.
        """
        del trainer
        self._training = None
        if stage != "fit":
            self._saved = self._saved_before
        elif self._saved:
            self._saved_for = pl_module
        self._patches.undo()
        self._finder_patches.undo()
        self._clippers.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        """As at the end of fitting, which doesn't come then."""
        self._micro_batch = ExitStack()
        self.teardown(trainer, pl_module, trainer.state.fn or "fit")

    def _join_finder(
        self, trainer: Trainer, module: LightningModule, start: Callable[[], None]
    ) -> None:
        """Clip the steps of a finder too, which trains with callbacks of its own for a while.

        Lightning's LearningRateFinder and BatchSizeFinder do. What another clips with begins with
        this one's state and is thrown away, as the finder throws away parameters.
        """
        if self not in trainer.callbacks and self._engine is None:  # an engine clips inside a step
            for known in [c for c in trainer.callbacks if isinstance(c, _ForFinder)]:
                known.teardown(trainer, module, stage="fit")  # of an earlier trial
                trainer.callbacks.remove(known)
            stand_in = _ForFinder(self.config.model_copy(update={"recorder": None, "alarm": None}))
            if self._module in (None, module):
                stand_in.load_state_dict(self.state_dict())
            trainer.callbacks.append(stand_in)
            stand_in.on_fit_start(trainer, module)
            stand_in.on_train_start(trainer, module)
        start()

    def _is_withheld(self) -> bool:
        """Whether this batch made a step that was withheld; read on the host."""
        record = self._clippers[0].last_record
        return record is not None and record is not self._record_before and bool(record.skipped)

    def _report(self, trainer: Trainer, module: LightningModule, index: int) -> None:
        """Log the last step of an optimizer, unless it was logged: engines and LBFGS ask again."""
        record = self._clippers[index].last_record
        if record is not None and record is not self._last_record:
            self._last_record = record
            self._reporter.step(trainer, module, index, record)

    def _build(self, trainer: Trainer, module: LightningModule) -> None:
        self._patches.undo()
        self._patches = Patches()
        self._optimizers = list(trainer.optimizers)
        self._engine = deepspeed_engine(trainer)
        if self._engine is None:
            scaler = live_scaler(trainer.precision_plugin)
            self._clippers = ClipperSet.build(self.config, module, self._optimizers, scaler=scaler)
            self._claim_steps()
            self._steps = Steps(self._optimizers, self._patches)
        else:
            clipper = GradientClipper(self.config, module, self._engine)
            self._patches.callback(clipper.attach(self._engine).remove)
            self._clippers = ClipperSet([clipper])
        after_clip = ["on_before_optimizer_step", "configure_gradient_clipping"]
        if self.config.stage == "after_backward":
            refuse_micro_batches(trainer)
            after_clip.append("on_after_backward")
        self._clippers.refuse_shared_backward(
            "GradientClip", "in manual optimization use a gradclip.GradientClipper for each."
        )
        refuse_second_clip(trainer, module, after_clip, self._patches)
        if self.config.schedule_on_skip == "hold":
            hold_schedule(trainer, module, self._is_withheld, self._patches)
        for call in self._listeners:
            self._clippers.on_spike(call)
        self._patches.wrap(trainer, "save_checkpoint", self._save_checkpoint)
        self._reporter.begin(trainer, self._clippers)

    def _save_checkpoint(
        self,
        save: Callable[..., None],
        filepath: str,
        weights_only: bool | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """`trainer.save_checkpoint`, which checkpoint callbacks call too."""
        save(filepath, weights_only, *args, **kwargs)
        if not weights_only:
            self._clippers.saved_to(filepath)

    def _claim_steps(self) -> None:
        for optimizer in self._optimizers:
            claim_steps(optimizer, self._patches, "GradientClip")

    def _announce(self, trainer: Trainer) -> None:
        self._reporter.announce(trainer)

    def _take_in(self, state: Mapping[str, Any]) -> None:
        try:
            take_in = self._clippers.checked(state, with_steps=True)
        except ConfigError as error:
            msg = f"{error} For fresh state: GradientClip(..., restore=False)."
            raise ConfigError(msg) from None
        self._reporter.resume(take_in())

    def _follow_optimizers(self, trainer: Trainer, module: LightningModule) -> None:
        """If the Trainer got new optimizers while training, clip those from where we are."""
        now = trainer.optimizers
        if len(now) == len(self._optimizers) and all(map(is_, now, self._optimizers)):
            return
        before, steps = self._clippers, self._reporter.steps
        is_in_batch = self._steps.is_in_batch
        self._build(trainer, module)
        if is_in_batch:
            self._steps.begin_batch()
        self._reporter.resume(self._clippers.go_on_from(before, steps))

    def _share(self, trainer: Trainer) -> float:
        """What part of a full window these gradients hold; 1 in manual optimization."""
        # Ranks have to agree, and one whose batch gave no loss doesn't tell the others.
        held = self._backwards if trainer.world_size == 1 else self._batches
        self._batches = self._backwards = 0
        return window_share(held, trainer.accumulate_grad_batches)

    def _has_gradients(self, trainer: Trainer, module: LightningModule) -> bool:
        """False where a scaler is on and `training_step` gave None for this batch.

        Lightning then neither unscales the gradients of earlier batches nor steps. Nor are there
        any where StochasticWeightAveraging runs an epoch for batch norm's statistics alone.
        """
        gave_none = module.automatic_optimization and not self._backward_ran
        is_left_out = gave_none and live_scaler(trainer.precision_plugin) is not None
        return not is_left_out and not skips_backward(trainer)

    def _index(self, trainer: Trainer, module: LightningModule, optimizer: Optimizer) -> int:
        """Which clipper an optimizer has."""
        self._follow_optimizers(trainer, module)
        for index, known in enumerate(self._optimizers):
            if known is optimizer:
                return index
        msg = (
            f"GradientClip: {type(optimizer).__name__} is about to step and isn't among "
            "trainer.optimizers, so it has no clipper. Return it from configure_optimizers."
        )
        raise ConfigError(msg)


class _ForFinder(GradientClip):
    """Stands in for a `GradientClip` while a finder trains."""

    def _claim_steps(self) -> None:
        """They are those of the fit, whose callback has claimed them."""

    def _announce(self, trainer: Trainer) -> None:
        """The fit's callback does."""

    def on_train_end(self, trainer: Trainer, *_: object) -> None:
        """The finder is done."""
        self.teardown(trainer, trainer.lightning_module, "fit")
