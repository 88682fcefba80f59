"""A DeepSpeed engine: it steps inside `accelerator.backward`, and is clipped inside its step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor
from torch.nn import Parameter

from accelerate_clip.private import engine_of, tells_of_skips
from gradclip import ClipConfig, ClipRecord, ConfigError, GradientClipper
from gradclip.adapters import Patches

__all__ = ["ClippedEngine", "settle_threshold"]


class ClippedEngine:
    """A prepared optimizer whose steps a DeepSpeed engine makes, and its clipper.

    Args:
        config: What to do.
        accelerator: Whose engine to clip.
        prepared: The optimizer that `accelerator.prepare` returned.
        after_step: Called with this after each step of the engine.

    Attributes:
        clipper: What clips it.
        prepared: The optimizer.
        steps: Steps that the engine has made, withheld ones too.
        awaits_step: False: gradients are clipped inside the step.

    Raises:
        ConfigError: If the configuration isn't valid for these parameters, DeepSpeed's has
            another threshold, or schedules are to advance at withheld steps.
        LayoutError: If the engine can't be clipped exactly.
    """

    awaits_step = False

    def __init__(
        self,
        config: ClipConfig,
        accelerator: Accelerator,
        prepared: AcceleratedOptimizer,
        after_step: Callable[[ClippedEngine], object],
    ) -> None:
        if config.schedule_on_skip == "advance":
            msg = (
                "schedule_on_skip is 'advance', and DeepSpeed makes the steps, with one flag for "
                "withheld steps and overflows at which schedules wait; allowed: 'hold'. Leave "
                "schedule_on_skip out."
            )
            raise ConfigError(msg)
        engine = engine_of(accelerator)
        self.clipper = GradientClipper(config, optimizer=engine)
        self.prepared = prepared
        self.parameters: list[Parameter] = list(engine.module.parameters())
        self.steps = 0
        self._after_step = after_step
        self._batches = 0
        try:
            self._handle = self.clipper.attach(engine)
        except ConfigError as error:
            msg = (
                f"{error} (Accelerate takes it from DeepSpeedPlugin(gradient_clipping=...), a "
                "DeepSpeed config file, or ACCELERATE_GRADIENT_CLIPPING.)"
            )
            raise ConfigError(msg) from None
        tells_of_skips(prepared)

    def clip(self) -> ClipRecord:
        """The record of the step that the last `accelerator.backward` made.

        Raises:
            ConfigError: If the engine has made none yet.
        """
        if self.clipper.last_record is None:
            msg = (
                "accelerator.clip_grad_norm_ was called before DeepSpeed's first step, which "
                "accelerator.backward(loss) makes; call that first."
            )
            raise ConfigError(msg)
        return self.clipper.last_record

    def expect_new(self) -> None:
        """Nothing to do: records come from the engine's steps."""

    def resume(self, steps: int) -> None:
        """Go on after this many steps, of another run."""
        self.steps = steps

    @contextmanager
    def backward(self, loss: Tensor | None) -> Iterator[None]:
        """Around one `accelerator.backward`: observe its loss, and see whether it made a step."""
        self.clipper.batch, self._batches = self._batches, self._batches + 1
        if loss is not None:
            self.clipper.observe_loss(loss)
        before = self.clipper.last_record
        yield
        if self.clipper.last_record is not before:
            self.steps += 1
            self._after_step(self)

    def detach(self) -> None:
        """Give DeepSpeed its own step back."""
        self._handle.remove()


def settle_threshold(accelerator: Accelerator, patches: Patches) -> None:
    """Leave out a threshold for DeepSpeed that nobody wrote down for it.

    Accelerate makes 1.0 of "auto"; transformers' Trainer fills in its `max_grad_norm`, which it
    also passes to `clip_grad_norm_`, where it is answered.

    Args:
        accelerator: Before its engine is made, or after.
        patches: Put the threshold back at their end, for engines to come.
    """
    plugin = accelerator.state.deepspeed_plugin
    if plugin is None or "gradient_clipping" not in plugin.deepspeed_config:
        return
    config, before = plugin.deepspeed_config, plugin.deepspeed_config["gradient_clipping"]
    if plugin.gradient_clipping == "auto" or hasattr(plugin.hf_ds_config, "trainer_config_process"):
        config["gradient_clipping"] = 0.0
    patches.callback(lambda: config.update(gradient_clipping=before))
