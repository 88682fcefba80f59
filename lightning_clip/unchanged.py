"""Unchanged scripts: with `GRADCLIP_CONFIG` set, Trainers and Fabric programs clip.

The variable holds the name of a preset, the path of a YAML file, or JSON. `gradclip_factories`,
which Lightning calls for every Trainer and every Fabric, imports this only if it is set.
"""

from __future__ import annotations

import logging
import sys
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from gradclip import ClipConfig, ConfigError, GradientClipper
from gradclip.adapters import ClipperSet, OncePerStep, Patches, config_from_environment, weak
from lightning_clip.callback import GradientClip
from lightning_clip.fabric import UNASKED, build
from lightning_clip.framework import Callback, Fabric, LightningModule, Trainer

__all__ = ["CONFIG_VARIABLE", "UnchangedFabric", "UnchangedTrainer", "for_fabric", "for_trainer"]

CONFIG_VARIABLE = "GRADCLIP_CONFIG"

_EVERY = 10  # steps between two log entries of a Fabric program
_logger = logging.getLogger("gradclip")


def for_trainer() -> list[Callback]:
    """What is to stand among the callbacks of a new Trainer: nothing unless the variable is set.

    Raises:
        ConfigError: If the variable names no valid configuration.
    """
    config = config_from_environment(CONFIG_VARIABLE)
    return [] if config is None else [UnchangedTrainer(config)]


def for_fabric() -> list[Any]:
    """The same for a new Fabric.

    Raises:
        ConfigError: As `for_trainer`.
    """
    config = config_from_environment(CONFIG_VARIABLE)
    if config is None:
        return []
    _follow_fabric()
    return [UnchangedFabric(config)]


class UnchangedTrainer(Callback):
    """Puts a `GradientClip` in its own place once the Trainer knows all its callbacks.

    A `GradientClip` of the script's own decides instead.

    Args:
        config: What to do.
    """

    def __init__(self, config: ClipConfig) -> None:
        self._config = config

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find out whether the script clips by itself."""
        own = [callback for callback in trainer.callbacks if isinstance(callback, GradientClip)]
        if own:
            _tell(
                f"{CONFIG_VARIABLE} is set, and this Trainer has a GradientClip of its own, which "
                f"decides: {own[0].config.summary}. Unset the variable, or remove the callback.",
                trainer.is_global_zero,
            )
            return
        if trainer.gradient_clip_val:
            _tell(
                f"{CONFIG_VARIABLE} decides how to clip, instead of "
                f"Trainer(gradient_clip_val={trainer.gradient_clip_val!r}): "
                f"{self._config.summary}.",
                trainer.is_global_zero,
            )
            trainer.gradient_clip_val = None
        clip = GradientClip(self._config)
        trainer.callbacks[trainer.callbacks.index(self)] = clip
        clip.setup(trainer, pl_module, stage)


class UnchangedFabric:
    """One Fabric program: clips what each optimizer that it sets up steps with.

    Metrics go to Fabric's loggers, with the steps of the first optimizer.

    Args:
        config: What to do.
    """

    def __init__(self, config: ClipConfig) -> None:
        self._config = config
        self._models: weakref.WeakSet[Module] = weakref.WeakSet()
        self._kept: list[Callable[[], OncePerStep | None]] = []  # by their optimizers
        self._said = False

    @property
    def clippers(self) -> list[GradientClipper]:
        """One for each optimizer that was set up, in that order, and is alive."""
        return [once.clipper for once in self._clipped]

    @property
    def _clipped(self) -> list[OncePerStep]:
        return [once for known in self._kept if (once := known()) is not None]

    def on_gradclip_set_up(self, fabric: Fabric, made: tuple[Any, ...]) -> None:
        """Called after `fabric.setup`, `setup_module` and `setup_optimizers`.

        Args:
            fabric: The program.
            made: What the call returned.

        Raises:
            ConfigError: As `lightning_clip.enable`; if an optimizer's module isn't set up yet.
            LayoutError: As `lightning_clip.enable`.
        """
        self._models.update(one for one in made if isinstance(one, Module))
        for optimizer in (one for one in made if isinstance(one, Optimizer)):
            self._clip(fabric, optimizer)

    def _clip(self, fabric: Fabric, optimizer: Optimizer) -> None:
        held = {p for group in optimizer.param_groups for p in group["params"]}
        owners = [model for model in self._models if not held.isdisjoint(model.parameters())]
        if not owners:
            msg = (
                f"{CONFIG_VARIABLE} is set, and {type(optimizer).__name__} was set up before the "
                "module of its parameters; allowed: fabric.setup of both, or "
                "setup_module(...) first. Change the order, or unset the variable."
            )
            raise ConfigError(msg)
        clipper, patches, raw = build(fabric, owners[0], optimizer, self._config)
        patches.put(raw, UNASKED, True)
        log = partial(self._log, fabric) if not self._clipped else lambda: None
        once = OncePerStep(clipper, raw, after_step=log)
        patches.callback(once.remove)
        # Fabric keeps them, and outlives optimizers.
        known, known_raw, is_first = weak(once), weak(raw), fabric.is_global_zero
        patches.callback(partial(self._kept.remove, known))
        self._kept.append(known)

        def step(stock: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            with once.in_step():
                return stock(*args, **kwargs)

        def clip(
            stock: Callable[..., Tensor | None],
            module: Any,
            optimizer: Any,
            *args: Any,
            **kwargs: Any,
        ) -> Tensor | None:
            one = known()
            if one is None or getattr(optimizer, "optimizer", optimizer) is not known_raw():
                return stock(module, optimizer, *args, **kwargs)
            if not self._said:
                self._said = True
                _tell(
                    f"{CONFIG_VARIABLE} decides how to clip, instead of the limits given to "
                    f"fabric.clip_gradients: {self._config.summary}.",
                    is_first,
                )
            return one.clip().grad_norm

        patches.wrap(optimizer, "step", step)
        patches.wrap(fabric, "clip_gradients", clip)
        names = ", ".join(type(logger).__name__ for logger in fabric.loggers)
        entries = f"{names} every {self._every} steps" if names else "none, Fabric has no loggers"
        ClipperSet([clipper]).announce(entries)

    @property
    def _every(self) -> int:
        return self._config.log.every_n_steps or _EVERY

    def _log(self, fabric: Fabric) -> None:
        """After each step of the first optimizer."""
        steps = self._clipped[0].steps
        if steps % self._every == 0:
            metrics = ClipperSet(self.clippers).flush()
            if fabric.is_global_zero:
                fabric.log_dict(metrics, step=steps)


_followed: list[type] = []


def _follow_fabric() -> None:
    """Tell every program of what it set up; `lightning.fabric` and `lightning_fabric` differ."""
    packages = (sys.modules.get(name) for name in ("lightning.fabric", "lightning_fabric"))
    for kind in [package.Fabric for package in packages if package is not None]:
        if kind not in _followed:
            _followed.append(kind)
            for name in ("setup", "setup_module", "setup_optimizers"):
                Patches().wrap(kind, name, _then_tell)


def _then_tell(set_up: Callable[..., Any], fabric: Fabric, *args: Any, **kwargs: Any) -> Any:
    result = set_up(fabric, *args, **kwargs)
    made = result if isinstance(result, tuple) else (result,)
    fabric.call("on_gradclip_set_up", fabric=fabric, made=made)
    return result


def _tell(text: str, is_first: bool) -> None:
    if is_first:
        _logger.warning(text)
