"""A small Lightning module whose batches are seeds, and callbacks that look on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn

NOTHING = -1
NAN = -2


def inputs(seed: int, rows: int = 8) -> Tensor:
    """The rows of one batch; every seventh is a spike."""
    generator = torch.Generator().manual_seed(1000 + seed)
    return torch.randn(rows, 4, generator=generator) * (6.0 if seed % 7 == 6 else 1.0)


def small_net() -> nn.Sequential:
    """Four inputs, one output, always the same weights."""
    generator = torch.Generator().manual_seed(1)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    for parameter in net.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return net


def adamw(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.01)


class Small(LightningModule):
    """Trains on one seed per batch; NOTHING gives no loss, NAN a loss that isn't finite."""

    def __init__(self, optimizer: Callable[..., Any] = adamw, *, by_step: bool = False) -> None:
        super().__init__()
        self.net = small_net()
        self.make_optimizer = optimizer
        self.by_step = by_step

    def training_step(self, batch: int, _: int) -> Tensor | None:
        if batch == NOTHING:
            return None
        if self.by_step:
            batch = self.trainer.global_step
        loss = self.loss(self.share(inputs(max(batch, 0))))
        return loss * math.nan if batch == NAN else loss

    def share(self, rows: Tensor) -> Tensor:
        return rows[self.global_rank :: self.trainer.world_size]

    def loss(self, rows: Tensor) -> Tensor:
        return self.net(rows.to(next(self.parameters()).dtype)).square().mean()

    def configure_optimizers(self) -> Any:
        return self.make_optimizer([p for p in self.parameters() if p.requires_grad])


class Pair(Small):
    """Two optimizers, both stepped by hand on every batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: int, _: int) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(self.loss(inputs(batch)))
        for optimizer in self.optimizers():
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [adamw(self.net[0].parameters()), adamw(self.net[2].parameters())]


class Before(Callback):
    """Placed before the clipper: keeps the gradients each optimizer is about to step with."""

    def __init__(self) -> None:
        self.grads: list[list[Tensor]] = []

    def on_before_optimizer_step(self, _trainer, _module, optimizer) -> None:
        self.grads.append(grads_of(optimizer))

    @property
    def norms(self) -> list[float]:
        return [norm_of(grads) for grads in self.grads]


class After(Before):
    """Placed after the clipper: what it left, its record, and the parameters after each batch."""

    def __init__(self, clip: Any) -> None:
        super().__init__()
        self.clip = clip
        self.records: list[Any] = []
        self.parameters: list[list[Tensor]] = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        self.records.append(self.clip.last_record)

    def on_train_batch_end(self, _trainer, pl_module, *_: object) -> None:
        self.parameters.append([p.detach().clone() for p in pl_module.parameters()])

    @property
    def limits(self) -> list[float]:
        return [float(record.limit) for record in self.records]


class Logged(Callback):
    """What the Trainer was told about clipping after each step."""

    def __init__(self) -> None:
        self.metrics: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer, *_: object) -> None:
        logged = trainer.callback_metrics
        self.metrics.append({k: v.clone() for k, v in logged.items() if k.startswith("clip/")})


def grads_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Whole gradients of an optimizer's parameters."""
    held = [p.grad for group in optimizer.param_groups for p in group["params"]]
    return [getattr(g, "full_tensor", g.clone)().clone() for g in held if g is not None]


def norm_of(grads: Iterable[Tensor]) -> float:
    """The 2-norm in float64, by torch alone."""
    return math.sqrt(sum(float(g.double().square().sum()) for g in grads))


def scaled(scale: float, growth_interval: int = 10**6) -> MixedPrecision:
    """16-mixed whose scaler works on a CPU, where the stock one would become bf16-mixed."""
    live = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=growth_interval)
    return MixedPrecision("16-mixed", device="cpu", scaler=live)


def trainer_of(*callbacks: Callback, **options: Any) -> Trainer:
    """A quiet Trainer on one CPU."""
    quiet = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(callbacks=list(callbacks), **(quiet | options))
