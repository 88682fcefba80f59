"""Clipping inside a DeepSpeed engine's step. Read in deepspeed 0.19.8.

Every wrapper does the same: look for an overflow, take the norm, update the loss scale, then for
each flat partition unscale, clip and step. Methods are replaced on the instance: the norm becomes
the moment to decide, the clip the moment to write, both with the loss scale of before its update.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gradclip.errors import ConfigError
from gradclip.layouts.deepspeed import DeepSpeedLayout as ZeroLayout
from gradclip.types import Handle, Verdict

__all__ = ["Halves", "clip_inside_step"]

_logger = logging.getLogger("gradclip")
_MISSING = object()


@dataclass(frozen=True, slots=True)
class Halves:
    """The two halves of a clipping step, which DeepSpeed needs at two moments.

    Attributes:
        config: The clipper's configuration.
        decide: Measure the gradients, decide and record. Takes the loss scale they carry and
            what to do about non-finite ones; gives what was collected, the verdict, the record.
        write: Carry a verdict out on the tensors of one bucket.
    """

    config: Any
    decide: Callable[[Tensor | None, str], tuple[Any, Verdict, Any]]
    write: Callable[[Verdict, int, Sequence[Tensor]], None]


def clip_inside_step(halves: Halves, layout: ZeroLayout, engine: Any) -> Handle:
    """Make the engine clip with these from its next step on, and with nothing else.

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
    _refuse_other_threshold(engine, halves.config)
    step = _Step(halves, layout)
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


class _Step:
    """The replaced methods of one engine and its optimizer, and the step they are in."""

    def __init__(self, halves: Halves, layout: ZeroLayout) -> None:
        self._halves = halves
        self._layout = layout
        self._engine = layout.engine
        self._optimizer = layout.engine.optimizer
        self._undo: list[Callable[[], None]] = []
        self._norm = torch.zeros(())
        self._verdict: Verdict | None = None
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
        self._set(self._engine._config, "gradient_clipping", 0.0)
        self._set(self._engine, "gradclip_attached", True)
        if hasattr(self._optimizer, "clip_grad"):
            self._set(self._optimizer, "clip_grad", 0.0)
        {
            "DeepSpeedZeroOptimizer": self._install_zero_1_and_2,
            "DeepSpeedZeroOptimizer_Stage3": self._install_zero_3,
            "BF16_Optimizer": self._install_bf16,
            "FP16_Optimizer": self._install_wrapped,
            "FP16_UnfusedOptimizer": self._install_wrapped,
        }.get(self._layout.kind, self._install_bare)()

    def remove(self) -> None:
        """Give the engine its own methods and threshold back."""
        while self._undo:
            self._undo.pop()()

    def _set(self, owner: Any, name: str, value: Any) -> None:
        before = vars(owner).get(name, _MISSING)
        setattr(owner, name, value)
        if before is _MISSING:
            self._undo.append(lambda: delattr(owner, name))
        else:
            self._undo.append(lambda: setattr(owner, name, before))

    # The two moments.

    @torch.no_grad()
    def _decide(self, *, withholds: bool = True) -> bool:
        """Measure and decide; True if the step is to be withheld.

        Args:
            withholds: DeepSpeed itself withholds a step that isn't finite.
        """
        scale = getattr(self._optimizer, "loss_scale", None)
        self._scale = 1.0 if scale is None else float(scale)
        rule = self._halves.config.on_nonfinite
        scaler = getattr(self._optimizer, "loss_scaler", None)
        if (withholds and rule == "ignore") or getattr(scaler, "dynamic", False):
            rule = "skip"  # an overflow is how a dynamic loss scale finds its value
        grad_scale = None if self._scale == 1.0 else torch.tensor(self._scale)
        with self._layout.in_step():
            _, verdict, record = self._halves.decide(grad_scale, rule)
        self._norm = record.grad_norm
        self._withheld = verdict.withheld
        self._verdict = replace(verdict, withheld=False)
        return self._withheld

    @torch.no_grad()
    def _write(self, bucket: int, tensors: Sequence[Tensor]) -> None:
        """Unscale and clip what a bucket is about to step with."""
        assert self._verdict is not None
        if self._scale != 1.0:
            torch._foreach_mul_(list(tensors), 1.0 / self._scale)
        self._halves.write(self._verdict, bucket, tensors)
        self._optimizer._global_grad_norm = self._norm.float()

    def _scaled_norm(self) -> Tensor:
        """The norm DeepSpeed asks for; infinite makes it withhold the step by its own path."""
        norm = self._norm.float() * self._scale
        return torch.full_like(norm, torch.inf) if self._withheld else norm

    # What each wrapper calls at these moments.

    def _install_scale(self) -> None:
        update = self._optimizer._update_scale

        def update_scale(has_overflow: bool = False) -> None:
            # A step that a policy withholds has finite gradients, so the scale isn't too large.
            assert self._verdict is not None
            update(has_overflow and not bool(self._verdict.finite))

        self._set(self._optimizer, "_update_scale", update_scale)
        # Our measure sees what this check looks for, so its pass and its collective are saved.
        self._set(self._optimizer, "check_overflow", lambda *_, **__: None)

    def _install_zero_1_and_2(self) -> None:
        optimizer = self._optimizer
        # Without the check, bf16 steps with whatever it has.
        checks = optimizer.check_grad_overflow or optimizer.dtype != torch.bfloat16

        def scaled_global_norm(norm_type: int = 2) -> Tensor:
            del norm_type
            optimizer.check_grad_overflow = self._decide(withholds=checks)
            return self._scaled_norm()

        def unscale_and_clip_grads(grad_groups_flat: list[Tensor], total_norm: object) -> None:
            del total_norm
            held = optimizer.single_partition_of_fp32_groups
            for flat in grad_groups_flat:
                bucket = next(i for i, partition in enumerate(held) if partition.grad is flat)
                self._write(bucket, [flat])

        self._install_scale()
        self._set(optimizer, "compute_grad_norm", True)
        self._set(optimizer, "check_grad_overflow", optimizer.check_grad_overflow)
        self._set(optimizer, "scaled_global_norm", scaled_global_norm)
        self._set(optimizer, "unscale_and_clip_grads", unscale_and_clip_grads)

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
        self._set(optimizer, "_get_norm_groups", norm_groups)
        self._set(optimizer, "unscale_and_clip_grads", unscale_and_clip_grads)

    def _install_bf16(self) -> None:
        optimizer = self._optimizer

        def grads_for_norm(for_clipping: bool = False) -> Any:
            if for_clipping:  # a checkpoint brought a threshold of DeepSpeed's back
                return []
            if not self._decide():
                for bucket, flat in enumerate(optimizer.fp32_groups_gradient_flat_partition):
                    self._write(bucket, [flat])
            return [self._scaled_norm().reshape(1)], {}

        self._set(optimizer, "get_grads_for_norm", grads_for_norm)

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

        self._set(optimizer.overflow_checker, "has_overflow", has_overflow)
        self._set(optimizer, "unscale_and_clip_grads", unscale_and_clip_grads)

    def _install_bare(self) -> None:
        """Stage 0 in fp32: torch's optimizer, told to the engine by attributes it looks for."""
        optimizer = self._optimizer

        def before_step(*_: object) -> None:
            optimizer.overflow = self._decide(withholds=False)
            for bucket, group in enumerate(optimizer.param_groups):
                if self._withheld:
                    for parameter in group["params"]:
                        parameter.grad = None
                else:
                    self._write(bucket, self._layout.whole(bucket))

        self._set(optimizer, "overflow", False)
        self._set(optimizer, "_global_grad_norm", None)
        self._undo.append(optimizer.register_step_pre_hook(before_step).remove)
