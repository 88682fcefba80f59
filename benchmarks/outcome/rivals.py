"""Who clips: nobody, constants, our policies at their defaults, other packages as they ship."""

from __future__ import annotations

import ast
import hashlib
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from gradclip import (
    AGC,
    AdaGC,
    Auto,
    AutoClip,
    ClipByNorm,
    ClipConfig,
    EmaClip,
    GradientClipper,
    LogConfig,
    SkipNonfinite,
    SkipSpike,
    Spam,
    SpikeMax,
    ZClip,
)
from gradclip.plan import rates
from gradclip.policies import AnyPolicy

GRID = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
"""The norms among which the oracle chooses, and the best constant."""


class Training(NamedTuple):
    """What a rival may touch."""

    model: nn.Module
    optimizers: Sequence[Optimizer]
    scaler: GradScaler | None


class Guard(Protocol):
    """A rival at work in one run."""

    def micro_batch(self, share: float) -> AbstractContextManager[None]:
        """Around each backward."""

    def before_step(self, loss: Tensor) -> None:
        """Called after the last backward of a step."""

    def did(self) -> tuple[bool, bool]:
        """Whether the step's gradients were changed, and whether it was withheld."""


class Ours:
    """`GradientClipper`, attached to the optimizer; with several optimizers called by hand."""

    def __init__(self, config: ClipConfig, training: Training) -> None:
        model, optimizers, scaler = training
        one = optimizers[0] if len(optimizers) == 1 else None
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        names = model if one else trained
        self.clipper = GradientClipper(config, names, one, scaler=scaler if one else None)
        self.by_hand = one is None
        self.each = config.stage == "after_backward"
        if one is not None:
            self.clipper.attach(one)

    def micro_batch(self, share: float) -> AbstractContextManager[None]:
        """Clips this backward's gradients by themselves, if asked to."""
        return self.clipper.micro_batch(share=share) if self.each else nullcontext()

    def before_step(self, loss: Tensor) -> None:
        """Show the loss; clip, unless the optimizer's step will."""
        if self.clipper.watches_loss:
            self.clipper.observe_loss(loss)
        if self.by_hand:
            self.clipper.clip()

    def did(self) -> tuple[bool, bool]:
        """As recorded."""
        record = self.clipper.last_record
        assert record is not None
        return bool(record.clipped), bool(record.skipped) or not bool(record.finite)


class Called:
    """A function that is called before each step, as other packages ask for."""

    def __init__(self, clip: Callable[[], object], training: Training) -> None:
        self.clip, self.training = clip, training
        self.clipped = False

    def micro_batch(self, share: float) -> AbstractContextManager[None]:
        """Nothing."""
        del share
        return nullcontext()

    def before_step(self, loss: Tensor) -> None:
        """Call it; the norms before and after tell whether it clipped."""
        del loss
        if self.training.scaler is not None:
            self.training.scaler.unscale_(self.training.optimizers[0])
        before = self._norm()
        self.clip()
        self.clipped = self._norm() < before * (1 - 1e-5)

    def did(self) -> tuple[bool, bool]:
        """It never withholds a step."""
        return self.clipped, False

    def _norm(self) -> float:
        grads = [p.grad for p in self.training.model.parameters() if p.grad is not None]
        return float(torch.nn.utils.get_total_norm(grads))


@dataclass(frozen=True)
class Rival:
    """One way to clip.

    Attributes:
        start: Makes it ready for one run.
        source: What it is made of; its hash goes into the results.
        accumulating: Only for cells that accumulate gradients.
        candidate: Under test: it must be frozen before it runs on the reporting half.
    """

    start: Callable[[Training], Guard]
    source: str
    accumulating: bool = False
    candidate: bool = False

    @property
    def digest(self) -> str:
        """Hash of its code and constants."""
        return hashlib.sha256(self.source.encode()).hexdigest()[:12]


class _WithoutText(ast.NodeTransformer):
    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        is_text = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        return None if is_text else node


def _said_to_python(module: ModuleType) -> str:
    """A module's code without comments and docstrings, whose wording changes no result."""
    tree = _WithoutText().visit(ast.parse(inspect.getsource(module)))
    return ast.unparse(tree)


def ours(policy: AnyPolicy, *, each: bool = False, candidate: bool = False) -> Rival:
    """One of gradclip's policies; with `each`, clipping every micro-batch by itself."""
    quiet = LogConfig(warn_after=None, warn_skips=None)
    stage: Literal["step", "after_backward"] = "after_backward" if each else "step"
    config = ClipConfig(policies=[policy], stage=stage, log=quiet)
    bases = [base for base in type(policy).__mro__ if base.__module__.startswith("gradclip.")]
    modules = [sys.modules[base.__module__] for base in bases] + [rates] * policy.uses_rate
    source = "".join([policy.model_dump_json(), stage, *map(_said_to_python, modules)])
    return Rival(partial(Ours, config), source, accumulating=each, candidate=candidate)


def _nobody(training: Training) -> Guard:
    return Called(lambda: None, training)


def _zclip(training: Training) -> Guard:
    theirs = import_module("zclip").ZClip()
    return Called(partial(theirs.step, training.model), training)


def _smartclip(training: Training) -> Guard:
    smartclip = import_module("smartclip")
    return Called(partial(smartclip.apply, training.model, smartclip.AutoClip()), training)


def _autoclip(training: Training) -> Guard:
    trained = [p for p in training.model.parameters() if p.requires_grad]
    return Called(import_module("autoclip.torch").QuantileClip(trained).step, training)


PEERS = {"zclip": _zclip, "smartclip": _smartclip, "autoclip": _autoclip}
"""Other packages, called as their README does, with the defaults that they ship."""


def _installed() -> tuple[dict[str, Rival], tuple[str, ...]]:
    found, missing = dict[str, Rival](), list[str]()
    for package, start in PEERS.items():
        try:
            found[f"{package} package"] = Rival(start, f"{package} {version(package)}")
        except PackageNotFoundError:
            missing.append(package)
    return found, tuple(missing)


_PEERS, NOT_INSTALLED = _installed()
CONSTANTS: Mapping[str, float] = {f"norm {limit:g}": limit for limit in GRID}
"""The grid's rivals by name."""

RIVALS: Mapping[str, Rival] = {
    "none": Rival(_nobody, "none"),
    **{name: ours(ClipByNorm(max_norm=limit)) for name, limit in CONSTANTS.items()},
    "auto": ours(Auto(), candidate=True),
    "ZClip": ours(ZClip()),
    "ZClip without ceiling": ours(ZClip(max_norm=None)),
    "EmaClip": ours(EmaClip()),
    "AutoClip": ours(AutoClip()),
    "AdaGC": ours(AdaGC()),
    "AGC": ours(AGC()),
    "Spam": ours(Spam()),
    "SpikeMax": ours(SpikeMax()),
    "SkipSpike": ours(SkipSpike()),
    "SkipNonfinite": ours(SkipNonfinite()),
    "auto, each micro-batch": ours(Auto(), each=True, candidate=True),
    "norm 1, each micro-batch": ours(ClipByNorm(max_norm=1.0), each=True),
    "ZClip, each micro-batch": ours(ZClip(), each=True),
    **_PEERS,
}
"""Every rival by name."""
