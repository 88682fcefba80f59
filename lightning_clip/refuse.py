"""Set-ups in which gradients would be clipped twice, wrongly or not at all: an error at start."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from types import CodeType, FunctionType
from typing import Any

from torch.optim import LBFGS, Optimizer

from gradclip import ConfigError, GradientClipper
from lightning_clip.framework import (
    Callback,
    LightningModule,
    Trainer,
    is_lightning,
)

__all__ = [
    "refuse_losses",
    "refuse_micro_batches",
    "refuse_optimizers",
    "refuse_setup",
    "refuse_unreduced",
]

_CLIPPING = {"clip_gradients", "clip_grad_norm_", "clip_grad_value_"}


def refuse_setup(trainer: Trainer, module: LightningModule, kind: type[Callback]) -> None:
    """Check what can be known before anything is built.

    Args:
        trainer: The Trainer that is about to fit.
        module: The module it is to fit.
        kind: The callback class that may stand only once in the Trainer.

    Raises:
        ConfigError: If something else clips too.
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
    _refuse_own_clipping(module)


def refuse_optimizers(trainer: Trainer, module: LightningModule) -> None:
    """Check the optimizers, which exist once the strategy is set up.

    Raises:
        ConfigError: If one holds no parameters, or none that the module still has.
    """
    held = {id(parameter) for parameter in module.parameters()}
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
        if not any(id(p) in held for p in own):
            msg = (
                f"{name} holds no parameter of {type(module).__name__}, so training would change "
                "nothing: sharding may have put others in their place after it was built. Build "
                "it from self.parameters() in configure_optimizers."
            )
            raise ConfigError(msg)


def refuse_losses(clippers: Sequence[GradientClipper]) -> None:
    """Check that a policy that watches the loss is given the right one.

    Raises:
        ConfigError: If there are several optimizers, whose losses can't be told apart.
    """
    if len(clippers) > 1 and any(clipper.watches_loss for clipper in clippers):
        msg = (
            f"GradientClip: a policy has watch 'loss' or 'both', and {len(clippers)} "
            "optimizers have losses that Lightning's on_before_backward doesn't tell apart; "
            "allowed: one optimizer. Set watch to 'norm', or call clipper.clip(loss=...) of a "
            "gradclip.GradientClipper in manual optimization."
        )
        raise ConfigError(msg)


def refuse_micro_batches(trainer: Trainer) -> None:
    """Check that each backward's gradients can be clipped by themselves, once optimizers exist.

    Raises:
        ConfigError: If several optimizers share a backward, one evaluates a closure several times,
            or ranks accumulate before they reduce.
    """
    kinds = [type(optimizer).__name__ for optimizer in trainer.optimizers]
    if len(kinds) > 1 or any(isinstance(o, LBFGS) for o in trainer.optimizers):
        msg = (
            f"GradientClip: stage is 'after_backward', and the optimizers are {', '.join(kinds)}; "
            "allowed: one, other than LBFGS, as a backward doesn't say which optimizer's step it "
            "is for. Set stage to 'step', or in manual optimization use micro_batch of a "
            "gradclip.GradientClipper of your own."
        )
        raise ConfigError(msg)
    refuse_unreduced(trainer)


def refuse_unreduced(trainer: Trainer) -> None:
    """Check that every backward's gradients are those of all ranks.

    Raises:
        ConfigError: If ranks accumulate their own batches before they reduce.
    """
    window = trainer.accumulate_grad_batches
    if trainer.world_size > 1 and window > 1:
        msg = (
            f"GradientClip: stage is 'after_backward', and {trainer.world_size} processes reduce "
            f"gradients only after {window} batches (accumulate_grad_batches), so that none is a "
            "batch's own; allowed: accumulate_grad_batches=1, or one process. Set stage to 'step', "
            "or accumulate in manual optimization."
        )
        raise ConfigError(msg)


def _refuse_own_clipping(module: LightningModule) -> None:
    """The module's own clipping, told from the names its code uses."""
    manual = ("training_step",)
    automatic = ("configure_gradient_clipping", "optimizer_step")
    hooks = automatic if module.automatic_optimization else manual
    for hook in (*hooks, "on_after_backward", "on_before_optimizer_step"):
        for where, function in _overrides(module, hook):
            names = set(_names(function))
            if called := sorted(names & _CLIPPING):
                msg = (
                    f"{where}.{hook} calls {called[0]}, and GradientClip is among the callbacks, "
                    "so gradients would be clipped twice. Remove one of them; an override that "
                    "only logs may stay."
                )
                raise ConfigError(msg)
            if hook not in names:
                break


def _overrides(module: LightningModule, hook: str) -> Iterator[tuple[str, Any]]:
    """A hook as the user wrote it, nearest first; each runs if the one before it calls super."""
    if hook in vars(module):
        yield type(module).__name__, vars(module)[hook]
    for cls in type(module).__mro__:
        if hook in vars(cls) and not is_lightning(cls):
            yield cls.__name__, vars(cls)[hook]


def _names(function: Callable[..., Any]) -> Iterator[str]:
    """Every global and attribute name in a function's code and the functions inside it."""
    function = inspect.unwrap(getattr(function, "__func__", function))
    codes = [function.__code__] if isinstance(function, FunctionType) else []
    while codes:
        code = codes.pop()
        yield from code.co_names
        codes += [const for const in code.co_consts if isinstance(const, CodeType)]
