"""A DeepSpeed engine: it steps inside `accelerator.backward`, and is clipped inside its step."""

from __future__ import annotations

from collections.abc import Callable

from accelerate import Accelerator
from torch import Tensor
from torch.nn import Parameter

from accelerate_clip.private import Prepared, Versions, engine_of, tells_of_skips
from gradclip import ClipConfig, ClipRecord, ConfigError, GradientClipper

__all__ = ["EngineClipper", "settle_threshold"]


class EngineClipper(GradientClipper):
    """A `GradientClipper` whose step DeepSpeed makes; it shows what was done.

    Args:
        config: What to do.
        accelerator: Whose engine to clip.
        prepared: The optimizer that `accelerator.prepare` returned.
        on_step: Called after each step of the engine.

    Raises:
        ConfigError: If the configuration isn't valid for these parameters, DeepSpeed's has
            another threshold, or schedules are to advance at withheld steps.
        LayoutError: If the engine can't be clipped exactly.
    """

    def __init__(
        self,
        config: ClipConfig,
        accelerator: Accelerator,
        prepared: Prepared,
        on_step: Callable[[EngineClipper], None],
    ) -> None:
        if config.schedule_on_skip == "advance":
            msg = (
                "schedule_on_skip is 'advance', and DeepSpeed makes the steps, with one flag for "
                "withheld steps and overflows at which schedules wait; allowed: 'hold'. Leave "
                "schedule_on_skip out."
            )
            raise ConfigError(msg)
        engine = engine_of(accelerator)
        super().__init__(config, optimizer=engine)
        self.prepared = prepared
        self.parameters: list[Parameter] = list(engine.module.parameters())
        self.steps = 0
        self._on_step = on_step
        self._seen: ClipRecord | None = None
        self._batches = 0
        try:
            self._handle = self.attach(engine)
        except ConfigError as error:
            msg = (
                f"{error} (Accelerate takes it from DeepSpeedPlugin(gradient_clipping=...), a "
                "DeepSpeed config file, or ACCELERATE_GRADIENT_CLIPPING.)"
            )
            raise ConfigError(msg) from None
        tells_of_skips(prepared)

    def clip(
        self,
        *,
        grad_scale: Tensor | None = None,
        loss: Tensor | float | None = None,
        share: float = 1.0,
        repeat: bool = False,
    ) -> ClipRecord:
        """The record of the step that the last `accelerator.backward` made.

        Raises:
            ConfigError: If the engine has made none yet.
        """
        del grad_scale, loss, share, repeat
        if self.last_record is None:
            msg = (
                "accelerator.clip_grad_norm_ was called before DeepSpeed's first step, which "
                "accelerator.backward(loss) makes; call that first."
            )
            raise ConfigError(msg)
        return self.last_record

    def unscale(self) -> None:
        """Nothing to do: the engine has a loss scale of its own."""

    def expect_new(self) -> None:
        """Nothing to do: records come from the engine's steps."""

    def before_backward(self, loss: Tensor | None) -> Versions | None:
        """Observe the loss; nothing else to remember."""
        self.batch, self._batches = self._batches, self._batches + 1
        if loss is not None:
            self.observe_loss(loss)
        return None

    def after_backward(self, before: Versions | None) -> None:
        """Tell of the step, if this backward made one."""
        del before
        if self.last_record is not self._seen:
            self._seen = self.last_record
            self.steps += 1
            self._on_step(self)

    def detach(self) -> None:
        """Give DeepSpeed its own step back."""
        self._handle.remove()


def settle_threshold(accelerator: Accelerator) -> Callable[[], None]:
    """Leave out a threshold for DeepSpeed that nobody wrote down for it.

    Accelerate makes 1.0 of "auto"; transformers' Trainer fills in its `max_grad_norm`, which it
    also passes to `clip_grad_norm_`, where it is answered.

    Returns:
        Puts it back, for engines to come.
    """
    plugin = accelerator.state.deepspeed_plugin
    if plugin is None or "gradient_clipping" not in plugin.deepspeed_config:
        return lambda: None
    config, before = plugin.deepspeed_config, plugin.deepspeed_config["gradient_clipping"]
    if plugin.gradient_clipping == "auto" or hasattr(plugin.hf_ds_config, "trainer_config_process"):
        config["gradient_clipping"] = 0.0
    return lambda: config.update(gradient_clipping=before)
