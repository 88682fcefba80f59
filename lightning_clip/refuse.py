"""Set-ups in which gradients would be clipped twice, wrongly or not at all: an error says so."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch.optim import LBFGS, Optimizer

from gradclip import ConfigError
from gradclip.adapters import Patches, changes_gradients
from lightning_clip.framework import Callback, LightningModule, Trainer, overriding

__all__ = ["refuse_micro_batches", "refuse_optimizers", "refuse_second_clip", "refuse_setup"]


def refuse_setup(trainer: Trainer, kind: type[Callback]) -> None:
    """Check that the Trainer itself doesn't clip too.

    Args:
        trainer: The Trainer that is about to fit.
        kind: The callback class that may stand only once in the Trainer.

    Raises:
        ConfigError: If it has a `gradient_clip_val`, or several such callbacks.
    """
    if trainer.gradient_clip_val:
        msg = (
            f"Trainer(gradient_clip_val={trainer.gradient_clip_val!r}) and GradientClip are both "
            "set, so gradients would be clipped twice. Remove gradient_clip_val; a policy "
            "{type: norm, max_norm: ...} or {type: value, clip_value: ...} does the same."
        )
        raise ConfigError(msg)
    found = [type(c).__name__ for c in trainer.callbacks if isinstance(c, kind)]
    if len(found) > 1:
        msg = (
            f"Trainer(callbacks=...) holds {len(found)} GradientClip callbacks ({', '.join(found)})"
            ", so gradients would be clipped twice. Keep one and give it a list of policies."
        )
        raise ConfigError(msg)


def refuse_second_clip(
    trainer: Trainer, module: LightningModule, hooks: Sequence[str], patches: Patches
) -> None:
    """From now on refuse a module that clips too, when it does.

    `clip_gradients` is refused before it changes anything. Around hooks that the user overrides,
    gradients of the optimizer about to step are compared; other modules pay nothing.

    Args:
        trainer: The fitting Trainer.
        module: Its methods are replaced on the instance.
        hooks: The module's hooks that run between the callback's clip and the step.
        patches: Whose `undo` gives the methods back.
    """
    name = type(module).__name__

    def refuse_call(
        clip: Callable[..., None],
        optimizer: Any,
        gradient_clip_val: Any = None,
        *rest: Any,
        **more: Any,
    ) -> None:
        # Lightning calls it in each step, without a value or with 0 where nothing is to be clipped.
        if gradient_clip_val or (gradient_clip_val is None and trainer.gradient_clip_val):
            msg = (
                f"{name}.clip_gradients was called, and GradientClip is among the callbacks, so "
                "gradients would be clipped twice. Remove the call, or GradientClip."
            )
            raise ConfigError(msg)
        clip(optimizer, gradient_clip_val, *rest, **more)

    def compare(where: str, hook: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        stepping = args[:1] or trainer.optimizers
        held = [p for opt in stepping for group in opt.param_groups for p in group["params"]]
        result, changed = changes_gradients(partial(hook, *args, **kwargs), held)
        if changed:
            msg = (
                f"{where} changed gradients after GradientClip had clipped them, so they would be "
                "clipped twice. Remove one of them; an override that only reads gradients may "
                "stay. What is to change gradients before they are clipped belongs into a callback "
                "listed before GradientClip."
            )
            raise ConfigError(msg)
        return result

    for hook in (*hooks, "clip_gradients"):
        if (owner := overriding(module, hook)) is not None:
            patches.wrap(module, hook, partial(compare, f"{owner}.{hook}"))
    patches.wrap(module, "clip_gradients", refuse_call)


def refuse_optimizers(trainer: Trainer, module: LightningModule) -> None:
    """Check the optimizers, which exist once the strategy is set up.

    Raises:
        ConfigError: If there is none, or one holds no parameters, or none that the module still
            has.
    """
    if not trainer.optimizers:
        msg = (
            "configure_optimizers returned no optimizer, so there is nothing to clip, and steps of "
            "others would go unclipped; allowed: the optimizers that train the module. Return "
            "them, or remove GradientClip."
        )
        raise ConfigError(msg)
    held = set(module.parameters())
    for index, optimizer in enumerate(trainer.optimizers):
        if not isinstance(optimizer, Optimizer):
            continue  # a wrapper, which has parameters of its own making
        name = f"Optimizer {index} ({type(optimizer).__name__})"
        own = [p for group in optimizer.param_groups for p in group["params"]]
        if not own:
            msg = (
                f"{name} holds no parameters, so there is nothing to clip, as where "
                "configure_optimizers returns None; allowed: an optimizer with parameters. Return "
                "one, or remove GradientClip."
            )
            raise ConfigError(msg)
        if held.isdisjoint(own):
            msg = (
                f"{name} holds no parameter of {type(module).__name__}, so training would change "
                "nothing: sharding may have put others in their place after it was built. Build "
                "it from self.parameters() in configure_optimizers."
            )
            raise ConfigError(msg)


def refuse_micro_batches(trainer: Trainer) -> None:
    """Check that each backward's gradients can be clipped by themselves.

    Raises:
        ConfigError: If an optimizer evaluates its closure several times a step, or ranks accumulate
            their own batches before they reduce.
    """
    if any(isinstance(optimizer, LBFGS) for optimizer in trainer.optimizers):
        msg = (
            "GradientClip: stage is 'after_backward', and the optimizer is LBFGS, which makes "
            "several backwards a step; allowed: other optimizers. Set stage to 'step'."
        )
        raise ConfigError(msg)
    window = trainer.accumulate_grad_batches
    if trainer.world_size > 1 and window > 1:
        msg = (
            f"GradientClip: stage is 'after_backward', and {trainer.world_size} processes reduce "
            f"gradients only after {window} batches (accumulate_grad_batches), so that none is a "
            "batch's own; allowed: accumulate_grad_batches=1, or one process. Set stage to 'step', "
            "or accumulate in manual optimization."
        )
        raise ConfigError(msg)
