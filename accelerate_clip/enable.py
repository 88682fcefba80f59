"""Turn clipping on for an `Accelerator`."""

from __future__ import annotations

import sys

from accelerate import Accelerator

from accelerate_clip.clipper import AcceleratorClip
from gradclip import PolicyLike

__all__ = ["enable"]


def enable(accelerator: Accelerator, policy: PolicyLike | None = None) -> AcceleratorClip:
    """Clip the gradients of everything this accelerator prepares.

    `accelerator.clip_grad_norm_` and `clip_grad_value_` then apply `policy` instead of their own
    limit, and a loop that calls neither is clipped before each optimizer step all the same,
    once per step. `save_state` and `load_state` include the clipping state, and so do the
    checkpoints of transformers' `Trainer`, if the accelerator is its own.

    Args:
        accelerator: Before or after `prepare`.
        policy: A policy, a list of them (applied in order), the name of a preset ("zclip"), the
            path of a YAML file, a mapping, or a `ClipConfig`; `Auto()` if left out.

    Returns:
        A handle that shows what happened; its `detach` undoes this.

    Raises:
        ConfigError: If the policy isn't valid, or clipping is enabled already.
        LayoutError: If the accelerator uses Megatron-LM or XLA, or DeepSpeed in a way that can't be
            clipped exactly.

    Example:
        >>> from accelerate import Accelerator
        >>> from gradclip import ClipByNorm
        >>> accelerator = Accelerator(cpu=True)
        >>> clip = enable(accelerator, ClipByNorm(max_norm=1.0))
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> model, optimizer = accelerator.prepare(model, optimizer)
        >>> accelerator.backward(model(torch.full((1, 2), 30.0)).sum())
        >>> optimizer.step()
        >>> bool(clip.last_record.clipped), round(float(clip.last_record.clipped_norm), 4)
        (True, 1.0)
    """
    clip = AcceleratorClip(accelerator, policy)
    if "transformers.trainer" in sys.modules:
        from accelerate_clip.trainer import follow_trainers

        clip.call_on_detach(follow_trainers())
    return clip
