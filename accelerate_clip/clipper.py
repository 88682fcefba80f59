"""One clipper for each optimizer of an `Accelerator`, behind the accelerator's own calls."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from accelerate_clip.checkpoint import load_state, save_state
from accelerate_clip.engine import ClippedEngine, settle_threshold
from accelerate_clip.groups import configs_of, named_parameters
from accelerate_clip.private import is_fsdp2, prepared_models, prepared_optimizers, unwrapped_model
from accelerate_clip.refuse import check_accelerator, refuse_lomo, refuse_stale
from accelerate_clip.report import Reporter, is_same_rule
from accelerate_clip.scaler import SharedScaler
from accelerate_clip.step import (
    Clipped,
    ClippedOptimizer,
    accumulated_norm,
    micro_batch_contexts,
    unwrapped,
)
from gradclip import (
    ClipConfig,
    ClipRecord,
    ConfigError,
    GradientClipper,
    PolicyLike,
    Spike,
    as_config,
)
from gradclip.adapters import ClipperSet, Patches, weak, weakly

__all__ = ["AcceleratorClip"]

_logger = get_logger(__name__)


class AcceleratorClip:
    """What `enable` returns: one clipper for each prepared optimizer, and what they did.

    Args:
        accelerator: Whose optimizers to clip.
        policy: As for `enable`.

    Attributes:
        config: The validated configuration.
        divided_by: Gives by how many batches the script itself divides the loss that it hands to
            `accelerator.backward`: 1, and a window under transformers' `Trainer`.
        default_norm: The `max_norm` that a trainer passes if its user gave none; it isn't warned
            about. None outside of a trainer.
        of_callback: A callback of a trainer's enabled it.

    Raises:
        ConfigError: As `enable`.
        LayoutError: As `enable`.
    """

    def __init__(self, accelerator: Accelerator, policy: PolicyLike | None) -> None:
        self.config = as_config(policy)
        check_accelerator(accelerator)
        self.divided_by: Callable[[], int] = lambda: 1
        self.default_norm: float | None = None
        self.of_callback = False
        self._known = weak(accelerator)  # which keeps this
        self._clipped: list[Clipped] = []
        self._gone: list[Clipped] = []  # until others are prepared, which may go on from them
        self._set = ClipperSet()
        self._reporter = Reporter(accelerator, self.config.log)
        self._listeners: list[Callable[[Spike], object]] = []
        self._last_record: ClipRecord | None = None
        self._said: set[str] = set()
        self._sees_backwards = False
        self._preparing = 0
        self._patches = Patches()
        self._scaler = SharedScaler(accelerator.scaler, self._patches)
        settle_threshold(accelerator, self._patches)
        try:
            self._adopt()
        except Exception:
            self._patches.undo()
            raise
        self._take_over()

    @property
    def _accelerator(self) -> Accelerator:
        accelerator = self._known()
        if accelerator is None:
            msg = (
                "accelerate_clip: the Accelerator that enable was called with is gone; allowed: "
                "calls while it is alive. Keep it in a variable, too."
            )
            raise ConfigError(msg)
        return accelerator

    def __repr__(self) -> str:
        """What clips, and what is clipped once optimizers are prepared."""
        clipped = "; ".join(clipper.summary for clipper in self._set)
        return f"AcceleratorClip({clipped or self.config.summary})"

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of the accelerator, which this is an attribute of, is a stock one, without it."""
        self._say(
            "copied",
            "An accelerator that accelerate_clip.enable was called for was copied or pickled. The "
            "copy is a stock one and doesn't clip; call enable for it too, if it trains.",
        )
        return _none, ()

    @property
    def clippers(self) -> list[GradientClipper]:
        """One for each prepared optimizer, in the order of preparation."""
        return list(self._set)

    @property
    def steps(self) -> list[int]:
        """How many steps each prepared optimizer has made: resumed and withheld ones count."""
        return [one.steps for one in self._clipped]

    @property
    def last_record(self) -> ClipRecord | None:
        """What the last clipped step measured and did; None before the first."""
        return self._last_record

    def clip_grad_norm_(
        self, parameters: Tensor | Iterable[Tensor], max_norm: float, norm_type: float = 2
    ) -> Tensor:
        """`accelerator.clip_grad_norm_`: clip each optimizer that owns one of the parameters.

        While gradients are being accumulated (`accelerator.sync_gradients` is false), nothing
        is clipped, and the norm of what has been accumulated on this process is returned (of all
        processes' with `sync_each_batch`; NaN under FSDP2, which shows no gradients then, and
        under DeepSpeed, which clips and steps inside `accelerator.backward`).

        Args:
            parameters: As from `model.parameters()`.
            max_norm: Replaced by the configuration, which one warning says if they differ;
                infinity leaves it to the configuration.
            norm_type: The same.

        Returns:
            The norm before clipping, of all gradients of those optimizers; a plain 0-d tensor. 0
            without parameters that require gradients, as Accelerate's own: each optimizer is then
            clipped before its step.

        Raises:
            ConfigError: If there are such parameters, and no prepared optimizer owns any of them.
        """
        # Without a limit the call asks for the norm alone, as the Trainer's with max_grad_norm=0.
        asks = max_norm in (math.inf, self.default_norm) and norm_type == 2
        if not asks and not is_same_rule(self.config, max_norm, norm_type):
            given = "" if norm_type == 2 else f", norm_type={norm_type}"
            self._say(
                "clip_grad_norm_",
                f"accelerator.clip_grad_norm_ was called with max_norm={max_norm}{given}; the "
                f"gradclip configuration decides instead: {self.config.summary}. Pass math.inf "
                "(transformers' Trainer: max_grad_norm=0) to leave it to the configuration.",
            )
        return self._clip("clip_grad_norm_", parameters)

    def clip_grad_value_(self, parameters: Tensor | Iterable[Tensor], clip_value: float) -> None:
        """`accelerator.clip_grad_value_`: apply the configuration, as `clip_grad_norm_` does.

        Args:
            parameters: As from `model.parameters()`.
            clip_value: Replaced by the configuration, which one warning says.

        Raises:
            ConfigError: If no prepared optimizer owns any of the parameters.
        """
        self._say(
            "clip_grad_value_",
            f"accelerator.clip_grad_value_ was called with clip_value={clip_value}; the "
            f"gradclip configuration decides instead: {self.config.summary}.",
        )
        self._clip("clip_grad_value_", parameters)

    def state_dict(self) -> dict[str, Any]:
        """Adaptive state, counts and steps of every optimizer: plain tensors and numbers."""
        return self._set.state_dict(self.steps)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict`, saved with any number of processes.

        Before that trackers get the metrics of the steps so far, and the flight record is written.

        Raises:
            ConfigError: If it is of other optimizers, policies or parameters, or holds what no
                steps lead to; nothing is changed then.
        """
        take_in = self._set.checked(state, with_steps=True)
        self._reporter.give_rest(self.steps)
        for one, steps in zip(self._clipped, take_in(), strict=True):
            one.resume(steps)

    def flush(self) -> dict[str, float]:
        """What to log of the steps since the last call: see `gradclip.GradientClipper.flush`.

        With several optimizers each key ends in `/optimizer<index>`. Where the accelerator has
        trackers, they get the metrics every `log.every_n_steps` (10) steps; in a script that calls
        `accelerator.log`, with its next call.
        """
        return self._set.flush()

    def on_spike(self, call: Callable[[Spike], object]) -> None:
        """Call this at every alarm of any optimizer; see `gradclip.GradientClipper.on_spike`."""
        self._set.on_spike(call)
        self._listeners.append(call)

    def saved_to(self, path: str) -> None:
        """Say where a checkpoint was saved; see `gradclip.GradientClipper.saved_to`.

        `accelerator.save_state` and transformers' `Trainer` say so by themselves.
        """
        self._set.saved_to(path)

    def place_record(self, folder: str) -> None:
        """Where the flight record goes, unless the accelerator has a folder of its own."""
        self._reporter.place_record(folder)

    def place_entries(self, where: str) -> None:
        """What the first step's line says of where entries go, if not to trackers."""
        self._reporter.entries = where

    def holds(self, optimizer: Optimizer) -> bool:
        """Whether this prepared optimizer is clipped."""
        return any(one.prepared is optimizer for one in self._clipped)

    def detach(self) -> None:
        """Undo `enable`: the accelerator is a stock one again, which can be enabled anew.

        Trackers get the metrics of the last steps, and the flight record is written.
        """
        if not self._patches.is_on:
            return
        self._reporter.end(self.steps)
        for one in self._clipped:
            one.detach()
        self._patches.undo()

    def call_on_detach(self, undo: Callable[[], object]) -> None:
        """Call this too when `detach` is called."""
        self._patches.callback(undo)

    def _take_over(self) -> None:
        accelerator, patches = self._accelerator, self._patches
        for name, around in {
            "clip_grad_norm_": lambda _, *args, **kwargs: self.clip_grad_norm_(*args, **kwargs),
            "clip_grad_value_": lambda _, *args, **kwargs: self.clip_grad_value_(*args, **kwargs),
            "backward": self._backward,
            "log": self._reporter.join,
            "end_training": self._end_training,
            "prepare": self._prepare,
            "prepare_optimizer": self._prepare,
        }.items():
            patches.wrap(accelerator, name, around)
        patches.put(accelerator, "gradient_clip", self)
        save, load = patches.hook(self._save), patches.hook(self._load)
        patches.callback(accelerator.register_save_state_pre_hook(save).remove)
        patches.callback(accelerator.register_load_state_pre_hook(load).remove)

    def _clip(self, call: str, parameters: Tensor | Iterable[Tensor]) -> Tensor:
        owners = self._owners(call, parameters)
        if not owners:
            return torch.zeros((), dtype=torch.float32, device=self._accelerator.device)
        if not self._accelerator.sync_gradients:
            norm = accumulated_norm(self._accelerator, owners)
            if bool(norm.isnan()) and is_fsdp2(self._accelerator):
                self._say(
                    "accumulated",
                    f"accelerator.{call}: the norm of accumulated gradients is NaN, as FSDP2 shows "
                    "none before it reduces them. Call it when accelerator.sync_gradients is true.",
                )
            return norm
        if not self._sees_backwards:
            # The script calls loss.backward() itself: each call here may be a new step.
            for one in owners:
                one.expect_new()
        records = [one.clip() for one in owners]
        self._last_record = records[-1]
        if len(records) == 1:
            return records[0].grad_norm
        norms = torch.stack([record.grad_norm for record in records])
        return torch.linalg.vector_norm(norms, records[0].norm_type)

    def _owners(self, call: str, parameters: Tensor | Iterable[Tensor]) -> list[Clipped]:
        given = [parameters] if isinstance(parameters, Tensor) else parameters
        asked = {id(p) for p in given if p.requires_grad}
        if not asked:  # an iterator that was used up, or a frozen model: stock clips nothing then
            return []
        count = len(asked)
        owners: list[Clipped] = []
        for one in reversed(self._clipped):  # the latest that was prepared with a parameter
            held = set(map(id, one.parameters))
            if not asked.isdisjoint(held):
                owners.insert(0, one)
                asked -= held
        if not owners:
            msg = (
                f"accelerator.{call} got {count} parameters, none of which belongs to one "
                f"of the {len(self._clipped)} optimizers prepared with this accelerator; "
                "allowed: parameters of a prepared optimizer. Pass model.parameters() of the "
                "model that accelerator.prepare returned, and prepare its optimizer too."
            )
            raise ConfigError(msg)
        return owners

    def _adopt(self) -> None:
        """Keep one clipper for each optimizer that is prepared now."""
        refuse_lomo(self._accelerator)
        models = [
            unwrapped_model(self._accelerator, model)
            for model in prepared_models(self._accelerator)
        ]
        optimizers = prepared_optimizers(self._accelerator)
        for one in [one for one in self._clipped if one.prepared not in optimizers]:
            self._clipped.remove(one)
            self._gone.append(one)
            one.detach()  # first, as the same optimizer may be prepared anew
        known = {one.prepared: one for one in self._clipped}
        configs = configs_of(self.config, models, [unwrapped(o) for o in optimizers])
        now: list[Clipped] = []
        try:
            for prepared, config in zip(optimizers, configs, strict=True):
                now.append(known.get(prepared) or self._build(config, prepared, models))
            clippers = ClipperSet(one.clipper for one in now)
            clippers.refuse_shared_backward(
                "accelerate_clip",
                "give each optimizer a gradclip.GradientClipper and call it yourself.",
            )
        except Exception:
            for one in now:
                if one not in self._clipped:
                    one.detach()
            raise
        new = [one for one in now if one not in self._clipped]
        for one in new:
            self._go_on(one)
            for call in self._listeners:
                one.clipper.on_spike(call)
        self._gone = [] if new else self._gone
        self._clipped, self._set = now, clippers
        self._reporter.follow(clippers)
        self._scaler.follow(now)

    def _go_on(self, one: Clipped) -> None:
        """Let a new optimizer go on from those whose parameters, the very same, it has now.

        Those of another model, of the same names, are trained from the beginning.
        """
        mine = set(one.parameters)
        earlier = [*self._gone, *self._clipped]
        before = [other for other in earlier if not mine.isdisjoint(other.parameters)]
        clippers = [other.clipper for other in before]
        (steps,) = ClipperSet([one.clipper]).go_on_from(clippers, [o.steps for o in before])
        one.resume(steps)

    def _build(
        self, config: ClipConfig, prepared: AcceleratedOptimizer, models: list[Module]
    ) -> Clipped:
        after_step = weakly(self._after_step)  # the optimizer keeps what is built, and this does
        if self._accelerator.distributed_type == DistributedType.DEEPSPEED:
            return ClippedEngine(config, self._accelerator, prepared, after_step)
        named = named_parameters(models, prepared)
        if not named:
            refuse_stale(self._accelerator, type(prepared.optimizer).__name__)
        try:
            return ClippedOptimizer(config, named, prepared, self._scaler.step, after_step)
        except ConfigError as error:
            if named:
                raise
            msg = (
                f"{error} (No prepared model names this optimizer's parameters: prepare the "
                "model before its optimizer, or in the same call.)"
            )
            raise ConfigError(msg) from None

    def _prepare(self, prepare: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._preparing += 1
        try:
            result = prepare(*args, **kwargs)
        finally:
            self._preparing -= 1
        # `prepare` calls `prepare_optimizer`, before it is done with the parameters.
        if not self._preparing:
            self._adopt()
        return result

    def _backward(self, backward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._sees_backwards = True
        self._scaler.catch_up()
        loss = kwargs.get("loss", args[0] if args else None)
        with ExitStack() as stack:
            for one in self._clipped:
                stack.enter_context(one.backward(loss))
            with micro_batch_contexts(self._accelerator, self._clipped, self.divided_by()):
                return backward(*args, **kwargs)

    def _after_step(self, one: Clipped) -> None:
        if "started" not in self._said:
            self._said.add("started")
            self._reporter.announce()
        self._last_record = one.clipper.last_record
        self._reporter.step(self._clipped.index(one), one.steps)

    def _end_training(self, end_training: Callable[[], Any]) -> Any:
        self._reporter.end(self.steps)
        return end_training()

    def _save(self, *call: Any) -> None:
        """What `accelerator.save_state` calls, with models, weights and the folder."""
        self._scaler.catch_up()
        each_node = self._accelerator.project_configuration.save_on_each_node
        save_state(self, call[-1], each_node=each_node)

    def _load(self, *call: Any) -> None:
        """What `accelerator.load_state` calls, with models and the folder."""
        load_state(self, call[-1])

    def _say(self, what: str, text: str) -> None:
        if what not in self._said:
            self._said.add(what)
            _logger.warning(text)


def _none() -> None:
    """What a copy has in the place of an `AcceleratorClip`."""
