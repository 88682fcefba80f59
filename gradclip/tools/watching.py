"""Watching the steps of any training program: who clipped, what was asked, what the step got.

Calls of the functions that clip are compared with the gradients that optimizers step with. Nothing
is sent between ranks, and nothing of the program changes.
"""

from __future__ import annotations

import inspect
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from gradclip.adapters import Patches, closure_place
from gradclip.clipper import GradientClipper
from gradclip.errors import LayoutError
from gradclip.layouts import fsdp1_class, is_dtensor, local_part, rank_count, shardings_of

__all__ = ["FOLDER_VARIABLE", "Call", "SeenStep", "Watcher", "read_steps", "watch_process"]

FOLDER_VARIABLE = "GRADCLIP_DOCTOR"
"""The folder that watched processes write to."""

_WAIT = 10.0  # seconds, for other ranks to be done too


@dataclass
class Call:
    """One call of something that clips by a norm.

    Attributes:
        what: Its name.
        limit: The limit of the norm; None where `expected` says what is to come of it.
        norm_type: The p of the norm.
        before: The norm of this process's part of the gradients before the call.
        returned: The norm that the call returned; None if none.
        expected: The factor that gradclip's record tells; None for other functions.
        after: The norm of the same part when the optimizer stepped, and after its step, which may
            clip by itself.
        withheld: The step was to be withheld.
    """

    what: str
    limit: float | None
    norm_type: float
    before: float
    returned: float | None = None
    expected: float | None = None
    after: list[float] = field(default_factory=list)
    withheld: bool = False


@dataclass
class SeenStep:
    """The step of one optimizer in one process.

    Attributes:
        process: Which process.
        optimizer: The class of the optimizer.
        calls: What clipped its gradients since its last step, in order.
        outside: How many of its parameters with a gradient no call got.
        sharded: This process holds parts of parameters.
        engine: DeepSpeed is in use, which clips inside its own step.
    """

    process: int
    optimizer: str
    calls: list[Call]
    outside: int = 0
    sharded: bool = False
    engine: bool = False


class Watcher:
    """Watches every optimizer of this process until `stop`.

    Args:
        tell: Called with each step.
        end: Called before an optimizer makes another step than its first.
    """

    def __init__(
        self, tell: Callable[[SeenStep], object], end: Callable[[], object] = lambda: None
    ) -> None:
        self._tell, self._end = tell, end
        self._calls: list[tuple[Call, list[Tensor]]] = []
        self._done: set[int] = set()
        self._patches = Patches()
        for module in (torch.nn.utils, torch.nn.utils.clip_grad):
            for name in ("clip_grad_norm_", "clip_grads_with_norm_"):
                if hasattr(module, name):  # the second is of torch 2.7
                    self._patches.wrap(module, name, partial(self._clip, f"torch's {name}"))
        fsdp = fsdp1_class()
        if fsdp is not None:
            self._patches.wrap(fsdp, "clip_grad_norm_", self._clip_fsdp1)
        self._patches.wrap(GradientClipper, "clip", self._clip_ours)
        for handle in (
            register_optimizer_step_pre_hook(self._before_step),
            register_optimizer_step_post_hook(self._after_step),
        ):
            self._patches.callback(handle.remove)

    def stop(self) -> None:
        """Watch no more."""
        self._patches.undo()

    def _clip(
        self,
        what: str,
        clip: Callable[..., Any],
        parameters: Tensor | Iterable[Tensor],
        max_norm: float,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        held = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        known = kwargs.get("total_norm", args[0] if args else None)
        norm_type = 2.0
        if what.endswith("clip_grad_norm_"):
            norm_type = float(kwargs.get("norm_type", args[0] if args else 2.0))
            known = None
        call = self._begin(what, float(max_norm), norm_type, held)
        result = clip(held, max_norm, *args, **kwargs)
        call.returned = _number(result if known is None else known)
        return result

    def _clip_fsdp1(
        self, clip: Callable[..., Any], module: Any, max_norm: float, norm_type: float = 2.0
    ) -> Any:
        parameters = list(module.parameters())
        call = self._begin("FSDP's clip_grad_norm_", float(max_norm), norm_type, parameters)
        known = len(self._calls)
        result = clip(module, max_norm, norm_type)
        del self._calls[known:]  # of torch's function, which it calls if it shards nothing
        call.returned = _number(result)
        return result

    def _clip_ours(
        self, clip: Callable[..., Any], clipper: GradientClipper, *args: Any, **kwargs: Any
    ) -> Any:
        call = self._begin("gradclip", None, clipper.norm_type, clipper.parameters)
        record = clip(clipper, *args, **kwargs)
        call.returned = _number(record.grad_norm)
        call.withheld = bool(record.skipped)
        share = _number(record.clipped_norm / record.grad_norm)
        call.expected = share if share is not None and math.isfinite(share) else None
        return record

    def _begin(
        self, what: str, limit: float | None, norm_type: float, parameters: Sequence[Tensor]
    ) -> Call:
        call = Call(what, limit, norm_type, _norm(parameters, norm_type))
        self._calls.append((call, list(parameters)))
        return call

    def _before_step(
        self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if id(optimizer) in self._done:
            self._end()
            return None
        place = closure_place(type(optimizer).step, args, kwargs)
        if place is None:
            self._measure(optimizer)
            return None
        closure = kwargs[place] if isinstance(place, str) else args[place]

        def measured() -> Any:
            loss = closure()
            self._measure(optimizer)
            return loss

        if isinstance(place, str):
            return args, kwargs | {place: measured}
        return (*args[:place], measured, *args[place + 1 :]), kwargs

    def _after_step(self, optimizer: Any, *_: object) -> None:
        if id(optimizer) in self._done:
            return
        self._done.add(id(optimizer))
        self._measure(optimizer)
        held = _parameters(optimizer)
        mine = [one for one in self._calls if _share_any(one[1], held)]
        mine = mine or [one for one in self._calls if not one[0].before]  # of nothing
        self._calls = [one for one in self._calls if one not in mine]
        clipped = {id(p) for _, parameters in mine for p in parameters}
        self._tell(
            SeenStep(
                process=os.getpid(),
                optimizer=type(optimizer).__name__,
                calls=[call for call, _ in mine],
                outside=sum(p.grad is not None and id(p) not in clipped for p in held),
                sharded=_are_parts(held),
                engine=not mine and _is_in_deepspeed(),
            )
        )

    def _measure(self, optimizer: Optimizer) -> None:
        held = _parameters(optimizer)
        for call, parameters in self._calls:
            if _share_any(parameters, held):
                call.after.append(_norm(parameters, call.norm_type))


def _are_parts(parameters: Sequence[Tensor]) -> bool:
    """Whether other processes hold the rest of some of them."""
    try:
        found = shardings_of({str(index): p for index, p in enumerate(parameters)})
    except LayoutError:  # of a kind that gradclip doesn't clip
        return True
    return any(len(axis.ranks) > 1 for sharding in found.values() for axis in sharding.split)


def _share_any(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return not {id(p) for p in one}.isdisjoint(id(p) for p in other)


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


@torch.no_grad()
def _norm(parameters: Iterable[Tensor], norm_type: float) -> float:
    """Of this process's part of the gradients."""
    total = 0.0
    for parameter in parameters:
        if parameter.grad is None:
            continue
        grad = local_part(parameter.grad).detach()
        grad = (grad.coalesce().values() if grad.is_sparse else grad).to("cpu", torch.float64)
        norm = float(torch.linalg.vector_norm(grad, norm_type)) if grad.numel() else 0.0
        total = max(total, norm) if math.isinf(norm_type) else total + norm**norm_type
    return total if math.isinf(norm_type) else total ** (1 / norm_type)


def _number(value: Any) -> float | None:
    if isinstance(value, Tensor):
        value = value.full_tensor() if is_dtensor(value) else value
        return float(value)
    return float(value) if isinstance(value, float | int) else None


def _is_in_deepspeed() -> bool:
    """Whether DeepSpeed's code is what makes this step."""
    frame = inspect.currentframe()
    while frame is not None:
        if str(frame.f_globals.get("__name__")).startswith("deepspeed."):
            return True
        frame = frame.f_back
    return False


def watch_process() -> None:
    """Watch this process, and end it before its second step. Called as Python starts."""
    folder = Path(os.environ[FOLDER_VARIABLE])

    def tell(step: SeenStep) -> None:
        with (folder / f"{os.getpid()}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(step)) + "\n")

    def end() -> None:
        folder.joinpath(f"{os.getpid()}.done").touch()
        until = time.monotonic() + _WAIT  # others may be in the middle of a message
        while len(list(folder.glob("*.done"))) < rank_count() and time.monotonic() < until:
            time.sleep(0.05)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)

    Watcher(tell, end)


def read_steps(folder: Path) -> list[SeenStep]:
    """What watched processes wrote."""
    lines = (
        line for path in sorted(folder.glob("*.jsonl")) for line in path.read_text().splitlines()
    )
    return [_step(json.loads(line)) for line in lines]


def _step(found: Mapping[str, Any]) -> SeenStep:
    return SeenStep(**{**found, "calls": [Call(**call) for call in found["calls"]]})
