"""Refusals of what can't be clipped exactly, and a warning."""

from __future__ import annotations

import os
from typing import Any

from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType

from accelerate_clip.private import is_fsdp2
from gradclip import ConfigError, LayoutError

__all__ = [
    "check_accelerator",
    "refuse_closure",
    "refuse_lomo",
    "refuse_stale",
    "refuse_unreduced",
]

_logger = get_logger(__name__)

_SUPPORTED = "supported: one process, DDP, FSDP, tensor parallel, DeepSpeed"
_REFUSED = {
    DistributedType.MEGATRON_LM: (
        "Megatron-LM, which steps inside its own train_step",
        "Let Megatron-LM clip ('gradient_clipping' of MegatronLMPlugin), or use FSDP2 "
        "(distributed_type: FSDP, fsdp_version: 2)",
    ),
    DistributedType.XLA: (
        "XLA, whose gradients are reduced only while the optimizer steps",
        "Run without accelerate_clip there, or train on another device",
    ),
}


def check_accelerator(accelerator: Accelerator) -> None:
    """Refuse an accelerator that can't be clipped, and warn of one that trains alone.

    Raises:
        ConfigError: If it is clipped already.
        LayoutError: For Megatron-LM and XLA.
    """
    if getattr(accelerator, "gradient_clip", None) is not None:
        msg = (
            "accelerate_clip.enable: clipping is enabled on this Accelerator already (by an "
            "earlier call, or by accelerate-clip launch); allowed: once. Remove one of them, or "
            "undo the first one: accelerator.gradient_clip.detach()."
        )
        raise ConfigError(msg)
    kind = accelerator.distributed_type
    if kind in _REFUSED:
        found, way_out = _REFUSED[kind]
        msg = f"accelerate_clip.enable: this Accelerator uses {found}; {_SUPPORTED}. {way_out}."
        raise LayoutError(msg)
    started = os.environ.get("WORLD_SIZE", "1")
    if started != "1" and accelerator.num_processes == 1:
        _logger.warning(
            "%s processes were started, but Accelerate joins none of them: each trains, and "
            "clips, alone. For several processes on the CPU set ACCELERATE_USE_CPU=true.",
            started,
        )


def refuse_lomo(accelerator: Accelerator) -> None:
    """Raise a ConfigError for LOMO and AdaLomo, which update parameters during backward."""
    if accelerator.has_lomo_optimizer:
        msg = (
            "accelerate_clip.enable: LOMO and AdaLomo update parameters during backward, before "
            "a norm over all gradients exists; allowed: optimizers that step after it. Use "
            "LOMO's own clip_grad_norm, or another optimizer."
        )
        raise ConfigError(msg)


def refuse_unreduced(accelerator: Accelerator) -> None:
    """Raise a ConfigError if this backward's gradients are reduced only with later ones."""
    each = accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False)
    if accelerator.num_processes > 1 and not accelerator.sync_gradients and not each:
        msg = (
            f"accelerate_clip: stage is 'after_backward', and {accelerator.num_processes} "
            "processes accumulate gradients before they reduce them, so that none is a batch's "
            "own; allowed: Accelerator(gradient_accumulation_plugin="
            "GradientAccumulationPlugin(num_steps=..., sync_each_batch=True)), no accumulation, "
            "or one process. Set stage to 'step' otherwise."
        )
        raise ConfigError(msg)


def refuse_closure(optimizer: AcceleratedOptimizer, closure: Any = None) -> None:
    """Raise a ConfigError for a closure in a step that a loss scale decides on before."""
    if closure is not None and optimizer.scaler is not None and optimizer.scaler.is_enabled():
        msg = (
            f"accelerate_clip: {type(optimizer.optimizer).__name__}.step was given a closure, and "
            "mixed_precision is 'fp16', whose scaler looks for an overflow before the closure "
            "makes gradients; allowed: a closure without a loss scale. Set mixed_precision to "
            "'bf16' or 'no', or call accelerator.backward before step()."
        )
        raise ConfigError(msg)


def refuse_stale(accelerator: Accelerator, optimizer: str) -> None:
    """Raise a ConfigError for an optimizer without a prepared parameter under flat FSDP1."""
    is_fsdp1 = accelerator.distributed_type == DistributedType.FSDP and not is_fsdp2(accelerator)
    if is_fsdp1 and not accelerator.state.fsdp_plugin.use_orig_params:
        msg = (
            f"accelerate_clip: {optimizer} holds no parameter of a prepared model, and FSDP1 with "
            "use_orig_params false has flat parameters in place of the model's own, so it would "
            "train nothing; allowed: the prepared model's parameters. Prepare the model first and "
            "build the optimizer from it, or set use_orig_params true ('fsdp_use_orig_params' in "
            "fsdp_config)."
        )
        raise ConfigError(msg)
