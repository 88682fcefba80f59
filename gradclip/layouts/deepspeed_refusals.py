"""Which DeepSpeed engines can't be clipped exactly, and why. Read in deepspeed 0.19.8."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.optim import Optimizer

from gradclip.errors import LayoutError

__all__ = ["refuse_engine"]

_WRAPPERS = (
    "DeepSpeedZeroOptimizer",
    "DeepSpeedZeroOptimizer_Stage3",
    "BF16_Optimizer",
    "FP16_Optimizer",
    "FP16_UnfusedOptimizer",
)
_SUPPORTED = (
    "supported: ZeRO 0, 1, 2 and 3 over data parallel ranks, with or without optimizer offload to "
    "the CPU, in fp32, bf16 and (from ZeRO 1 on) fp16"
)


def refuse_engine(engine: Any) -> None:
    """Raise if the engine steps with gradients that can't be measured or clipped exactly.

    Raises:
        LayoutError: Names what was found, what is supported and the way out.
    """
    for found, way_out in _reasons(engine):
        msg = f"A DeepSpeed engine with {found}; {_SUPPORTED}. {way_out}."
        raise LayoutError(msg)


def _reasons(engine: Any) -> Iterator[tuple[str, str]]:
    """Pairs of what was found and the way out."""
    optimizer = engine.optimizer
    name = type(optimizer).__name__
    if type(engine).__name__ == "PipelineEngine":
        yield (
            "pipeline stages, each of which knows its own gradients only",
            "Let DeepSpeed clip ('gradient_clipping' in its config)",
        )
    ours = type(optimizer).__module__.startswith("deepspeed.runtime.") and name in _WRAPPERS
    if not (ours or (isinstance(optimizer, Optimizer) and not engine.zero_optimization())):
        yield (
            f"the optimizer {name} (ZenFlow, SuperOffload, MiCS and parameters without an "
            "optimizer are such), whose step was never read",
            "Choose another zero_optimization setting, or let DeepSpeed clip",
        )
    base = getattr(optimizer, "optimizer", optimizer)
    if any(group.get("use_muon") for group in optimizer.param_groups):
        yield (
            "Muon, which replaces gradients by orthogonalised updates before the norm is taken",
            "Clipping those means little; train with another optimizer or without gradclip",
        )
    if engine.has_moe_layers or len({id(g) for g in _spread(optimizer)}) > 1:
        yield (
            "expert parallel parameters, spread over other ranks than the rest",
            "Let DeepSpeed clip, or use fully_shard (FSDP2)",
        )
    if engine.mpu is not None or (_told(engine, "autotp_size") or 0) > 1:
        yield (
            "model parallelism (mpu, tensor or sequence parallel)",
            "Let DeepSpeed clip, or use fully_shard (FSDP2) with tensor parallelism",
        )
    if getattr(optimizer, "swap_optimizer", False):
        yield (
            "its gradients and optimizer state swapped to NVMe",
            "Offload the optimizer to the CPU (offload_optimizer: {device: cpu})",
        )
    if getattr(optimizer, "low_precision_master_weights_and_grads", False):
        yield (
            "16-bit master weights, whose gradients would be rounded twice",
            "Leave fp16_master_weights_and_grads and bf16_master_weights_and_grads out",
        )
    if name.startswith("FP16_") and engine.fp16_enabled():
        yield (
            "fp16 and stage 0, where DeepSpeed divides gradients by a loss scale that "
            "engine.backward never multiplied them with",
            "Use zero_optimization: {stage: 1}, or bf16",
        )
    if _told(engine, "torch_autocast_enabled") and engine.torch_autocast_dtype() == torch.float16:
        yield (
            "torch_autocast in float16, where DeepSpeed takes the norm of scaled gradients",
            "Use torch_autocast with bfloat16, or fp16: {enabled: true}",
        )
    fused = ("fused_adam_legacy", "fused_lamb_legacy")
    if any(getattr(optimizer, attribute, False) for attribute in fused):
        yield (
            f"the legacy fused step of {type(base).__name__}, which clips in its own kernel",
            "Leave 'legacy_fusion' out, or use another optimizer",
        )
    if name.endswith("_Stage3") and not hasattr(optimizer, "sub_group_process_groups"):
        # Measured on a CPU with 0.16.0; docs/versions.md has what is known of 0.17 and 0.18.
        yield (
            "ZeRO 3 of an older DeepSpeed, whose gradients were measured to be wrong",
            "Use DeepSpeed 0.19.8, or ZeRO 2",
        )
    if name == "BF16_Optimizer" and not hasattr(optimizer, "overflow"):
        yield (
            "the BF16_Optimizer of an older DeepSpeed, which can withhold no step",
            "Use DeepSpeed 0.19.8, or ZeRO 1 to 3 without data_types",
        )
    if not engine.enable_backward_allreduce:
        yield (
            "gradients that are not averaged over ranks (enable_backward_allreduce is off)",
            "Let the engine average them",
        )
    if _told(engine, "is_deepcompile_enabled"):
        yield "DeepCompile, which rewrites its backward", "Leave compile.deepcompile out"


def _told(engine: Any, name: str) -> Any:
    """What an engine's method says; None if this DeepSpeed hasn't got what it asks about."""
    return getattr(engine, name, lambda: None)()


def _spread(optimizer: Any) -> list[object]:
    """The process groups that an optimizer's partitions are spread over."""
    for name in ("real_dp_process_group", "sub_group_process_groups"):
        groups = getattr(optimizer, name, None)
        if groups is not None:
            return list(groups)
    return []
