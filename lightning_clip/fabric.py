"""Fabric: one call after `fabric.setup`."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from torch.nn import Module
from torch.optim import Optimizer

from gradclip import ConfigError, GradientClipper, PolicyLike
from gradclip.adapters import ClipperSet, Patches, weak
from lightning_clip.framework import Fabric, is_set_up, live_scaler, steps_by_engine

__all__ = ["UNASKED", "build", "disable", "enable"]

UNASKED = "gradient_clip_unasked"
"""Marks an optimizer that is clipped because of an environment variable."""

_MARK = "gradient_clip"
_logger = logging.getLogger("gradclip")


def enable(
    fabric: Fabric, model: Module, optimizer: Optimizer, policy: PolicyLike | None = None
) -> GradientClipper:
    """Clip before every `optimizer.step()` of a Fabric program.

    Works with accumulation (once per step), under DDP, FSDP and ModelParallelStrategy, and with a
    gradient scaler, whose overflows are counted as steps that aren't finite. Call it once for each
    optimizer. The clipper can be part of what `fabric.save` is given; hand what `fabric.load`
    returns for it to `clipper.load_state_dict`: where checkpoints are sharded, Lightning doesn't.

    Args:
        fabric: Which set up the model and the optimizer. Its `clip_gradients` then raises for this
            optimizer.
        model: What `fabric.setup` or `fabric.setup_module` returned.
        optimizer: What `fabric.setup` or `fabric.setup_optimizers` returned.
        policy: A policy, a list of them (applied in order), the name of a preset ("zclip"), the
            path of a YAML file, a mapping, or a `ClipConfig`; `Auto()` if left out.

    Returns:
        The clipper, which is attached to the optimizer already; `disable` undoes that.

    Raises:
        ConfigError: If the configuration isn't valid for these parameters, the model or the
            optimizer isn't set up, is clipped already, or is stepped by a DeepSpeed engine.
        LayoutError: If the parameters are laid out in a way that isn't supported.

    Example:
        >>> import torch
        >>> from lightning.fabric import Fabric
        >>> from gradclip import ClipByNorm
        >>> fabric = Fabric(accelerator="cpu", devices=1)
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> model, optimizer = fabric.setup(model, optimizer)
        >>> clipper = enable(fabric, model, optimizer, ClipByNorm(max_norm=1.0))
        >>> fabric.backward(model(torch.full((1, 2), 30.0)).sum())
        >>> _ = optimizer.step()
        >>> bool(clipper.last_record.clipped), round(float(clipper.last_record.clipped_norm), 4)
        (True, 1.0)
    """
    if hasattr(getattr(optimizer, "optimizer", optimizer), UNASKED):
        _logger.warning(
            "GRADCLIP_CONFIG is set, and this script calls lightning_clip.enable itself, which "
            "decides. Unset the variable, or leave the call out."
        )
        disable(optimizer)
    clipper, patches, raw = build(fabric, model, optimizer, policy)
    patches.callback(clipper.attach(raw).remove)

    known = weak(raw)  # Fabric keeps this, and outlives optimizers

    def refuse(
        clip: Callable[..., Any], module: Any, optimizer: Any, *rest: Any, **more: Any
    ) -> Any:
        stepped = getattr(optimizer, "optimizer", optimizer)
        if stepped is known():
            msg = (
                f"fabric.clip_gradients was called for a {type(stepped).__name__} that "
                "lightning_clip.enable clips before each step, so gradients would be clipped "
                "twice. Remove the call; the norm is in clipper.last_record.grad_norm."
            )
            raise ConfigError(msg)
        return clip(module, optimizer, *rest, **more)

    patches.wrap(fabric, "clip_gradients", refuse)
    ClipperSet([clipper]).announce("clipper.flush()")
    return clipper


def build(
    fabric: Fabric, model: Module, optimizer: Optimizer, policy: PolicyLike | None
) -> tuple[GradientClipper, Patches, Optimizer]:
    """Mark an optimizer as clipped.

    Args:
        fabric: As for `enable`, as the others are.
        model: Whose names the parameters have.
        optimizer: Set up by Fabric.
        policy: What to do.

    Returns:
        The clipper, which isn't attached; what `disable` undoes; the optimizer that Fabric wraps.

    Raises:
        ConfigError: As `enable`.
        LayoutError: As `enable`.
    """
    for what, found, kind in (("model", model, Module), ("optimizer", optimizer, Optimizer)):
        if not is_set_up(fabric, found) or not isinstance(found, kind):
            msg = (
                f"lightning_clip.enable: the {what} ({type(found).__name__}) isn't set up by "
                "Fabric; allowed: what fabric.setup (or setup_module, setup_optimizers) returned. "
                "Call enable(fabric, model, optimizer, policy) after it."
            )
            raise ConfigError(msg)
    if steps_by_engine(fabric):
        msg = (
            "lightning_clip.enable: a DeepSpeed engine makes this program's steps; allowed: other "
            "strategies. Clip inside the engine's step: "
            "gradclip.GradientClipper(policy, optimizer=fabric.strategy.model), and its attach."
        )
        raise ConfigError(msg)
    raw: Optimizer = optimizer.optimizer  # type: ignore[attr-defined]  # of Fabric's wrapper
    if hasattr(raw, _MARK):
        msg = (
            f"lightning_clip.enable: this {type(raw).__name__} is clipped already, and would be "
            "twice; allowed: one call for each optimizer. Give it a list of policies, or call "
            "lightning_clip.disable first."
        )
        raise ConfigError(msg)
    named: list[Any] = list(model.module.named_parameters())  # type: ignore[union-attr]
    scaler = live_scaler(fabric.strategy.precision)
    clipper = GradientClipper(policy, named, raw, scaler=scaler)
    patches = Patches()
    patches.callback(clipper.recorder.close)
    patches.put(raw, _MARK, patches)
    return clipper, patches, raw


def disable(optimizer: Optimizer) -> None:
    """Undo `enable`: the optimizer steps unclipped, `fabric.clip_gradients` takes it again.

    The flight record is written. `enable` may be called anew, also with another policy; its clipper
    starts with fresh state unless it is given the old one's `state_dict`.

    Args:
        optimizer: What `enable` was called with.

    Raises:
        ConfigError: If it isn't clipped.
    """
    raw = getattr(optimizer, "optimizer", optimizer)
    if not hasattr(raw, _MARK):
        msg = (
            f"lightning_clip.disable: this {type(raw).__name__} isn't clipped by "
            "lightning_clip.enable; allowed: an optimizer that is. Leave the call out."
        )
        raise ConfigError(msg)
    getattr(raw, _MARK).undo()
