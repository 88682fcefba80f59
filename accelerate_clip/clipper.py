"""One clipper for each optimizer of an `Accelerator`, and its own clip calls."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType
from torch import Tensor
from torch.nn import Module

from accelerate_clip.checkpoint import load_clip, save_clip
from accelerate_clip.engine import EngineClipper, settle_threshold
from accelerate_clip.groups import configs_of, named_parameters
from accelerate_clip.private import prepared_models, prepared_optimizers
from accelerate_clip.refuse import (
    refuse_lomo,
    refuse_several,
    refuse_stale,
)
from accelerate_clip.replaced import Replaced
from accelerate_clip.report import Clipper, Reporter, describe, is_same_rule
from accelerate_clip.step import StepClipper, accumulated_norm, apart, unwrapped
from gradclip import (
    ClipConfig,
    ClipRecord,
    ConfigError,
    GradientClipper,
)

__all__ = ["AcceleratorClip"]

_logger = get_logger(__name__)


class AcceleratorClip:
    """What `enable` returns: one clipper per prepared optimizer, and what they did.

    Args:
        accelerator: Whose optimizers to clip.
        config: What to do.

    Attributes:
        divided_by: By how many batches the script itself divides the loss that it hands to
            `accelerator.backward`: 1, and a window under transformers' `Trainer`.
        owner: The callback that enabled it, if one did.
    """

    def __init__(self, accelerator: Accelerator, config: ClipConfig) -> None:
        self.config = config
        self._accelerator = accelerator
        self._clippers: list[Clipper] = []
        self._reporter = Reporter(accelerator, config)
        self._last_record: ClipRecord | None = None
        self._said: set[str] = set()
        self._watched = False
        self.divided_by: Callable[[], int] = lambda: 1
        self.owner: object | None = None
        self._preparing = 0
        unsettle = settle_threshold(accelerator)
        self._adopt()
        self._replaced = self._take_over()
        self._replaced.also(unsettle)

    @property
    def clippers(self) -> list[GradientClipper]:
        """One for each prepared optimizer, in the order of preparation."""
        return list(self._clippers)

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
            max_norm: Replaced by the configuration, which is said once if they differ; infinity
                leaves it to the configuration.
            norm_type: The same.

        Returns:
            The norm before clipping, of all gradients of those optimizers; a plain 0-d tensor.

        Raises:
            ConfigError: If no prepared optimizer owns any of the parameters.
        """
        # Without a limit the call asks for the norm alone, as the Trainer's with max_grad_norm=0.
        asks = max_norm == math.inf and norm_type == 2
        if not asks and not is_same_rule(self.config, max_norm, norm_type):
            given = "" if norm_type == 2 else f", norm_type={norm_type}"
            self._say(
                "clip_grad_norm_",
                f"accelerator.clip_grad_norm_ was called with max_norm={max_norm}{given}; the "
                f"gradclip configuration decides instead: {describe(self.config)}. Pass math.inf "
                "(transformers' Trainer: max_grad_norm=0) to leave it to the configuration.",
            )
        return self._clip("clip_grad_norm_", parameters)

    def clip_grad_value_(self, parameters: Tensor | Iterable[Tensor], clip_value: float) -> None:
        """`accelerator.clip_grad_value_`: apply the configuration, as `clip_grad_norm_` does.

        Args:
            parameters: As from `model.parameters()`.
            clip_value: Replaced by the configuration, which is said once.

        Raises:
            ConfigError: If no prepared optimizer owns any of the parameters.
        """
        self._say(
            "clip_grad_value_",
            f"accelerator.clip_grad_value_ was called with clip_value={clip_value}; the "
            f"gradclip configuration decides instead: {describe(self.config)}.",
        )
        self._clip("clip_grad_value_", parameters)

    def state_dict(self) -> dict[str, Any]:
        """Adaptive state, counts and steps of every optimizer: plain tensors and numbers."""
        return {
            "clippers": [clipper.state_dict() for clipper in self._clippers],
            "steps": [clipper.steps for clipper in self._clippers],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict`, saved with any number of processes.

        Trackers get what is left of the steps before, and so does their flight record's file.

        Raises:
            ConfigError: If it is of other optimizers, policies or parameters.
        """
        states, steps = state["clippers"], state["steps"]
        if len(states) != len(self._clippers):
            msg = (
                f"The saved clip state is of {len(states)} optimizers, {len(self._clippers)} are "
                "prepared. Prepare the same ones first."
            )
            raise ConfigError(msg)
        self._reporter.give_rest()
        for clipper, saved, count in zip(self._clippers, states, steps, strict=True):
            clipper.load_state_dict(saved)
            clipper.steps = count
            clipper.expect_new()

    def flush(self) -> dict[str, float]:
        """What to log of the steps since the last call: see `gradclip.GradientClipper.flush`.

        With several optimizers each key ends in `/optimizer<index>`. Where the accelerator has
        trackers, they get it every `log.every_n_steps` (10) steps, with the script's next call of
        `accelerator.log` if it makes any, which is such a call.
        """
        return self._reporter.metrics()

    def place_record(self, folder: str) -> None:
        """Where the flight record goes, unless the accelerator has a folder of its own."""
        self._reporter.follow(self._clippers, folder)

    def detach(self) -> None:
        """Undo `enable`: the accelerator is a stock one again, which can be enabled anew.

        Trackers get what is left, and the flight record is written.
        """
        if not self._replaced.is_on:
            return
        self._reporter.end()
        for clipper in self._clippers:
            clipper.detach()
        self._replaced.undo()

    def _take_over(self) -> Replaced:
        accelerator = self._accelerator
        replaced = Replaced(accelerator)
        replaced.put("clip_grad_norm_", self.clip_grad_norm_)
        replaced.put("clip_grad_value_", self.clip_grad_value_)
        replaced.put("backward", self._watch(accelerator.backward))
        replaced.put("log", self._reporter.join(accelerator.log))
        replaced.put("end_training", self._report_before(accelerator.end_training))
        for name in ("prepare", "prepare_optimizer"):
            replaced.put(name, self._adopt_after(getattr(accelerator, name)))
        each_node = accelerator.project_configuration.save_on_each_node
        for handle in (
            accelerator.register_save_state_pre_hook(
                lambda *call: save_clip(self, call[-1], each_node)
            ),
            accelerator.register_load_state_pre_hook(lambda *call: load_clip(self, call[-1])),
        ):
            replaced.also(handle.remove)
        accelerator.gradient_clip = self
        replaced.also(lambda: delattr(accelerator, "gradient_clip"))
        return replaced

    def _clip(self, call: str, parameters: Tensor | Iterable[Tensor]) -> Tensor:
        owners = self._owners(call, parameters)
        if not self._accelerator.sync_gradients:
            norm = accumulated_norm(self._accelerator, owners, owners[0].norm_type)
            if bool(norm.isnan()) and self._accelerator.is_fsdp2:
                self._say(
                    "accumulated",
                    f"accelerator.{call}: the norm of accumulated gradients is NaN, as FSDP2 shows "
                    "none before it reduces them. Call it when accelerator.sync_gradients is true.",
                )
            return norm
        records: list[ClipRecord] = []
        for clipper in owners:
            if not self._watched:
                # The script calls loss.backward() itself: each call here may be a new step.
                clipper.expect_new()
            if len(self._clippers) > 1:
                clipper.unscale()
            records.append(clipper.clip())
        self._last_record = records[-1]
        norms = [record.grad_norm for record in records]
        if len(norms) == 1:
            return norms[0]
        return torch.linalg.vector_norm(torch.stack(norms), records[0].norm_type)

    def _owners(self, call: str, parameters: Tensor | Iterable[Tensor]) -> list[Clipper]:
        listed = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        # By identity: comparing tensors would compare their elements.
        asked = {id(parameter) for parameter in listed}
        owners = [c for c in self._clippers if any(id(p) in asked for p in c.parameters)]
        if not owners:
            msg = (
                f"accelerator.{call} got {len(listed)} parameters, none of which belongs to one "
                f"of the {len(self._clippers)} optimizers prepared with this accelerator; "
                "allowed: parameters of a prepared optimizer. Pass model.parameters() of the "
                "model that accelerator.prepare returned, and prepare its optimizer too."
            )
            raise ConfigError(msg)
        return owners

    def _adopt(self) -> None:
        """Keep one clipper for each optimizer that is prepared now."""
        refuse_lomo(self._accelerator)
        before = {id(clipper.prepared): clipper for clipper in self._clippers}
        models = [
            self._accelerator.unwrap_model(model, keep_torch_compile=False)
            for model in prepared_models(self._accelerator)
        ]
        optimizers = prepared_optimizers(self._accelerator)
        for key in before.keys() - {id(prepared) for prepared in optimizers}:
            before[key].detach()  # first, as the same optimizer may be prepared anew
        self._clippers = [c for c in self._clippers if id(c.prepared) in map(id, optimizers)]
        configs = configs_of(self.config, models, [unwrapped(o) for o in optimizers])
        now: list[Clipper] = []
        try:
            for prepared, config in zip(optimizers, configs, strict=True):
                known = before.get(id(prepared))
                now.append(known or self._build(config, prepared, models))
            refuse_several(now)
        except Exception:
            for clipper in now:
                if clipper not in self._clippers:
                    clipper.detach()
            raise
        self._clippers = now
        self._reporter.follow(now)

    def _build(
        self, config: ClipConfig, prepared: AcceleratedOptimizer, models: list[Module]
    ) -> Clipper:
        if self._accelerator.distributed_type == DistributedType.DEEPSPEED:
            return EngineClipper(config, self._accelerator, prepared, self._after_step)
        named = named_parameters(models, prepared)
        if not named:
            refuse_stale(self._accelerator, type(prepared.optimizer).__name__)
        try:
            return StepClipper(config, named, prepared, self._after_step)
        except ConfigError as error:
            if named:
                raise
            msg = (
                f"{error} (No prepared model names this optimizer's parameters: prepare the "
                "model before its optimizer, or in the same call.)"
            )
            raise ConfigError(msg) from None

    def _adopt_after(self, prepare: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(prepare)
        def prepare_and_adopt(*args: Any, **kwargs: Any) -> Any:
            self._preparing += 1
            try:
                result = prepare(*args, **kwargs)
            finally:
                self._preparing -= 1
            # `prepare` calls `prepare_optimizer`, before it is done with the parameters.
            if not self._preparing:
                self._adopt()
            return result

        return prepare_and_adopt

    def _watch(self, backward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(backward)
        def backward_and_watch(*args: Any, **kwargs: Any) -> Any:
            self._watched = True
            loss = kwargs["loss"] if "loss" in kwargs else args[0] if args else None
            marks = [(clipper, clipper.before_backward(loss)) for clipper in self._clippers]
            with apart(self._accelerator, self._clippers, self.divided_by()):
                result = backward(*args, **kwargs)
            for clipper, mark in marks:
                clipper.after_backward(mark)
            return result

        return backward_and_watch

    def _after_step(self, clipper: Clipper) -> None:
        self._last_record = clipper.last_record
        self._reporter.step(clipper)

    def _report_before(self, end_training: Callable[[], Any]) -> Callable[[], Any]:
        @functools.wraps(end_training)
        def report_and_end() -> Any:
            self._reporter.end()
            return end_training()

        return report_and_end

    def _say(self, what: str, text: str) -> None:
        if what not in self._said:
            self._said.add(what)
            _logger.warning(text)
