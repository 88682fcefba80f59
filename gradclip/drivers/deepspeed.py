"""Clipping inside a DeepSpeed engine's step. Read in deepspeed 0.19.8.

Every wrapper does the same: look for an overflow, take the norm, update the loss scale, then for
each flat partition unscale, clip and step. Methods are replaced on the instance: the norm becomes
the moment to decide, the clip the moment to write, both with the loss scale of before its update.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gradclip.core import Core
from gradclip.errors import ConfigError
from gradclip.layouts.deepspeed import DeepSpeedLayout
from gradclip.patches import Patches
from gradclip.types import Given, Handle, Step

__all__ = ["clip_inside_step"]

_logger = logging.getLogger("gradclip")


def clip_inside_step(
    core: Core, layout: DeepSpeedLayout, engine: Any, given: Callable[[Tensor | None], Given]
) -> Handle:
    """Make the engine clip from its next step on, and with nothing else.

    Args:
        core: Of the clipper; it looks and commits when DeepSpeed asks for the norm, and writes
            when DeepSpeed clips.
        layout: Where the engine keeps its gradients.
        engine: To be the one of the layout.
        given: Gives what is known of a step, from the loss scale that its gradients carry.

    Raises:
        ConfigError: If the engine is another than the clipper's, clips with gradclip already, or
            its own configuration names a threshold that the clipper's doesn't have.
    """
    if engine is not layout.engine:
        msg = (
            "attach got another object than the DeepSpeed engine this clipper was built with; "
            "attach that engine, as in GradientClipper(policy, optimizer=engine).attach(engine)."
        )
        raise ConfigError(msg)
    if getattr(engine, "gradclip_attached", False):
        msg = (
            "attach: this DeepSpeed engine clips with gradclip already, by an earlier attach; "
            "allowed: once. Call handle.remove() of the first one."
        )
        raise ConfigError(msg)
    _refuse_other_threshold(engine, core.config)
    step = _EngineStep(core, layout, given)
    step.install()
    return step


def _refuse_other_threshold(engine: Any, config: Any) -> None:
    """A threshold that was written down is not overruled silently; a default of DeepSpeed's is."""
    written = engine._config._param_dict.get("gradient_clipping")
    ours = [getattr(policy, "max_norm", None) for policy in config.policies]
    if written and written != "auto" and written not in ours:
        policies = [p.model_dump(exclude_defaults=True) | {"type": p.type} for p in config.policies]
        msg = (
            f"DeepSpeed's config sets gradient_clipping to {written}, gradclip's policies are "
            f"{policies}, and only one can clip. Remove 'gradient_clipping' from DeepSpeed's "
            f"config (or set it to 0), or add a policy {{type: norm, max_norm: {written}}}."
        )
        raise ConfigError(msg)


class _EngineStep:
    """The replaced methods of one engine and its optimizer, and the step they are in."""

    def __init__(
        self, core: Core, layout: DeepSpeedLayout, given: Callable[[Tensor | None], Given]
    ) -> None:
        self._core = core
        self._given = given
        self._layout = layout
        self._engine = layout.engine
        self._optimizer = layout.engine.optimizer
        self._patches = Patches()
        self._norm = torch.zeros((), dtype=torch.float64, device="cpu")
        self._step: Step | None = None
        self._scale = 1.0
        self._withheld = False

    def install(self) -> None:
        own = self._engine.gradient_clipping()
        if own and self._engine.global_rank == 0:
            _logger.warning(
                "DeepSpeed's own gradient clipping (gradient_clipping %s) is turned off: "
                "gradclip clips inside engine.step().",
                own,
            )
        self._patches.callback(self._core.watch.end)
        self._patches.put(self._engine._config, "gradient_clipping", 0.0)
        self._patches.put(self._engine, "gradclip_attached", True)
        if hasattr(self._optimizer, "clip_grad"):
            self._patches.put(self._optimizer, "clip_grad", 0.0)
        {
            "DeepSpeedZeroOptimizer": self._install_zero_1_and_2,
            "DeepSpeedZeroOptimizer_Stage3": self._install_zero_3,
            "BF16_Optimizer": self._install_bf16,
            "FP16_Optimizer": self._install_wrapped,
            "FP16_UnfusedOptimizer": self._install_wrapped,
        }.get(self._layout.kind, self._install_bare)()

    def remove(self) -> None:
        """Give the engine its own methods and threshold back."""
        self._patches.undo()

    # The two moments.

    @torch.no_grad()
    def _decide(self, *, withholds: bool = True) -> bool:
        """Measure and decide; True if the step is to be withheld.

        Args:
            withholds: DeepSpeed itself withholds a step that isn't finite.
        """
        scale = getattr(self._optimizer, "loss_scale", None)
        self._scale = 1.0 if scale is None else float(scale)
        rule = self._core.config.on_nonfinite
        scaler = getattr(self._optimizer, "loss_scaler", None)
        if (withholds and rule == "ignore") or getattr(scaler, "dynamic", False):
            rule = "skip"  # an overflow is how a dynamic loss scale finds its value
        grad_scale = None
        if self._scale != 1.0:
            grad_scale = torch.tensor(self._scale, dtype=torch.float64, device="cpu")
        with self._layout.in_step():
            step = self._core.look(replace(self._given(grad_scale), on_nonfinite=rule))
            self._norm = self._core.commit(step).grad_norm
        # DeepSpeed withholds the step by its own path, and asks for no clip then.
        self._withheld = step.verdict.withheld
        self._step = replace(step, verdict=replace(step.verdict, withheld=False))
        return self._withheld

    @torch.no_grad()
    def _write(self, bucket: int, tensors: Sequence[Tensor]) -> None:
        """Unscale and clip what a bucket is about to step with."""
        assert self._step is not None
        if self._scale != 1.0:
            torch._foreach_mul_(list(tensors), 1.0 / self._scale)
        slots = self._core.machinery.plan.slots
        self._core.write(self._step, self._layout.parts(slots, bucket, tensors))
        self._optimizer._global_grad_norm = self._norm.float()

    def _scaled_norm(self) -> Tensor:
        """The norm DeepSpeed asks for; infinite makes it withhold the step by its own path."""
        norm = self._norm.float() * self._scale
        return torch.full_like(norm, torch.inf) if self._withheld else norm

    # What each wrapper calls at these moments.

    def _install_scale(self, *, withholds: bool = True) -> None:
        optimizer = self._optimizer
        step, update = optimizer.step, optimizer._update_scale

        def undecided_step(*args: Any, **kwargs: Any) -> Any:
            self._step = None
            return step(*args, **kwargs)

        def update_scale(has_overflow: bool = False) -> None:
            if self._step is None:  # before DeepSpeed 0.19, which asks for the norm first
                has_overflow = optimizer.overflow = self._decide(withholds=withholds)
            # A step that a policy withholds has finite gradients, so the scale isn't too large.
            assert self._step is not None
            update(has_overflow and not bool(self._step.verdict.finite))

        self._patches.put(optimizer, "step", undecided_step)
        self._patches.put(optimizer, "_update_scale", update_scale)
        # Our measure sees what this check looks for, so its pass and its collective are saved.
        self._patches.put(optimizer, "check_overflow", lambda *_, **__: None)

    def _install_zero_1_and_2(self) -> None:
        optimizer = self._optimizer
        checked = getattr(optimizer, "check_grad_overflow", optimizer.dtype == torch.float16)
        # Without the check, bf16 steps with whatever it has.
        checks = checked or optimizer.dtype != torch.bfloat16

        def scaled_global_norm(norm_type: int = 2) -> Tensor:
            del norm_type
            if self._step is None:
                optimizer.check_grad_overflow = self._decide(withholds=checks)
            return self._scaled_norm()

        def unscale_and_clip_grads(grad_groups_flat: list[Tensor], total_norm: object) -> None:
            del total_norm
            held = optimizer.single_partition_of_fp32_groups
            for flat in grad_groups_flat:
                bucket = next(i for i, partition in enumerate(held) if partition.grad is flat)
                self._write(bucket, [flat])

        self._install_scale(withholds=checks)
        self._patches.put(optimizer, "compute_grad_norm", True)
        self._patches.put(optimizer, "check_grad_overflow", checked)
        self._patches.put(optimizer, "scaled_global_norm", scaled_global_norm)
        self._patches.put(optimizer, "unscale_and_clip_grads", unscale_and_clip_grads)

    def _install_zero_3(self) -> None:
        optimizer = self._optimizer

        def norm_groups() -> list[Tensor]:
            self._decide()
            return [self._scaled_norm()]

        def unscale_and_clip_grads(sub_group_id: int, total_norm: object) -> None:
            del total_norm
            flat = optimizer.fp32_partitioned_groups_flat[sub_group_id].grad
            self._write(sub_group_id, [flat])

        self._install_scale()
        self._patches.put(optimizer, "_get_norm_groups", norm_groups)
        self._patches.put(optimizer, "unscale_and_clip_grads", unscale_and_clip_grads)

    def _install_bf16(self) -> None:
        optimizer = self._optimizer

        def grads_for_norm(for_clipping: bool = False) -> Any:
            if for_clipping:  # a checkpoint brought a threshold of DeepSpeed's back
                return []
            if not self._decide():
                for bucket, flat in enumerate(optimizer.fp32_groups_gradient_flat_partition):
                    self._write(bucket, [flat])
            return [self._scaled_norm().reshape(1)], {}

        self._patches.put(optimizer, "get_grads_for_norm", grads_for_norm)

    def _install_wrapped(self) -> None:
        optimizer = self._optimizer
        fused = self._layout.kind == "FP16_Optimizer"

        def has_overflow(params: object, has_moe_params: object = None) -> bool:
            del params, has_moe_params
            return self._decide()

        def unscale_and_clip_grads(*_: object, **__: object) -> float:
            flats = optimizer.fp32_groups_flat if fused else optimizer.fp32_groups
            for bucket, held in enumerate(flats):
                self._write(bucket, [p.grad for p in ([held] if fused else held)])
            return 1.0

        self._patches.put(optimizer.overflow_checker, "has_overflow", has_overflow)
        self._patches.put(optimizer, "unscale_and_clip_grads", unscale_and_clip_grads)

    def _install_bare(self) -> None:
        """Stage 0 in fp32: torch's optimizer, whose attributes tell the engine what was done."""
        optimizer = self._optimizer

        def before_step(*_: object) -> None:
            optimizer.overflow = self._decide(withholds=False)
            for bucket, group in enumerate(optimizer.param_groups):
                if self._withheld:
                    for parameter in group["params"]:
                        parameter.grad = None
                else:
                    self._write(bucket, self._layout.whole(bucket))

        self._patches.put(optimizer, "overflow", False)
        self._patches.put(optimizer, "_global_grad_norm", None)
        self._patches.callback(optimizer.register_step_pre_hook(before_step).remove)
