"""One tiny step in each framework that is installed: a gradient of norm 10, and a limit of 1."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gradclip.clipper import GradientClipper
from gradclip.policies import ClipByNorm

__all__ = ["Missing", "Stack", "stacks"]

_LIMIT = 1.0


class Missing(Exception):
    """What a stack needs isn't there."""


class Stack(NamedTuple):
    """A framework and how it is asked to clip.

    Attributes:
        name: For the reader.
        run: Makes one step.
    """

    name: str
    run: Callable[[], object]


def stacks() -> list[Stack]:
    """Those that are tried, in order."""
    precisions = ["32-true", "bf16-mixed", *(["16-mixed"] if torch.cuda.is_available() else [])]
    found = [
        Stack("torch: clip_grad_norm_", partial(_plain, _clip_by_torch)),
        Stack("torch: clip_grad_norm_, fp16 with a GradScaler", _scaled),
        Stack("gradclip: attach", partial(_plain, None)),
    ]
    for precision in precisions:
        found += [
            Stack(
                f"Lightning, {precision}: gradient_clip_val",
                partial(_trainer, precision, ours=False),
            ),
            Stack(f"Lightning, {precision}: GradientClip", partial(_trainer, precision, ours=True)),
        ]
    return [
        *found,
        Stack("Lightning Fabric: clip_gradients", partial(_fabric, ours=False)),
        Stack("Lightning Fabric: lightning_clip.enable", partial(_fabric, ours=True)),
        Stack("Accelerate: clip_grad_norm_", partial(_accelerate, ours=False)),
        Stack("Accelerate: accelerate_clip.enable", partial(_accelerate, ours=True)),
        Stack("transformers Trainer: max_grad_norm", partial(_transformers, ours=False)),
        Stack("transformers Trainer: GradientClipCallback", partial(_transformers, ours=True)),
    ]


class _Tiny(nn.Module):
    """Its gradient is its input: (6, 8, 0, 0), whose norm is 10."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 1, bias=False, device="cpu", dtype=torch.float32)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"loss": self.linear(x).float().sum()}


def _input(device: torch.device | str = "cpu") -> Tensor:
    return torch.tensor([[6.0, 8.0, 0.0, 0.0]], device=device, dtype=torch.float32)


def _sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def _needs(*names: str) -> None:
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        msg = f"{missing[0]} isn't installed"
        raise Missing(msg)


def _clip_by_torch(model: nn.Module) -> None:
    torch.nn.utils.clip_grad_norm_(model.parameters(), _LIMIT)


def _plain(clip: Callable[[nn.Module], object] | None) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = _Tiny().to(device)
    optimizer = _sgd(model)
    if clip is None:
        GradientClipper(ClipByNorm(max_norm=_LIMIT), model, optimizer).attach(optimizer)
    model(_input(device))["loss"].backward()
    if clip is not None:
        clip(model)
    optimizer.step()


def _scaled() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = _Tiny().to(device)
    optimizer, scaler = _sgd(model), torch.amp.GradScaler(device, init_scale=1024.0)
    with torch.autocast(device, torch.float16):
        loss = model(_input(device))["loss"]
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    _clip_by_torch(model)
    scaler.step(optimizer)


def _trainer(precision: str, *, ours: bool) -> None:
    _needs("lightning")
    from lightning.pytorch import LightningModule, Trainer

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = _Tiny()

        def training_step(self, *_: object) -> Tensor:
            loss: Tensor = self.net(_input(self.device))["loss"]
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return _sgd(self)

    callbacks: list[Any] = []
    if ours:
        from lightning_clip import GradientClip

        callbacks = [GradientClip(ClipByNorm(max_norm=_LIMIT))]
    trainer = Trainer(
        max_steps=1,
        devices=1,
        precision=precision,
        gradient_clip_val=None if ours else _LIMIT,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(), range(1))


def _fabric(*, ours: bool) -> None:
    _needs("lightning")
    from lightning.fabric import Fabric

    fabric = Fabric(devices=1)
    fabric.launch()
    net = _Tiny()
    model, optimizer = fabric.setup(net, _sgd(net))
    if ours:
        import lightning_clip

        lightning_clip.enable(fabric, model, optimizer, ClipByNorm(max_norm=_LIMIT))
    fabric.backward(model(_input(fabric.device))["loss"])
    if not ours:
        fabric.clip_gradients(model, optimizer, max_norm=_LIMIT)
    optimizer.step()


def _accelerate(*, ours: bool) -> None:
    _needs("accelerate")
    from accelerate import Accelerator

    accelerator = Accelerator()
    if ours:
        import accelerate_clip

        accelerate_clip.enable(accelerator, ClipByNorm(max_norm=_LIMIT))
    net = _Tiny()
    model, optimizer = accelerator.prepare(net, _sgd(net))
    accelerator.backward(model(_input(accelerator.device))["loss"])
    if not ours:
        accelerator.clip_grad_norm_(model.parameters(), _LIMIT)
    optimizer.step()


def _transformers(*, ours: bool) -> None:
    _needs("transformers", "accelerate")
    from transformers import Trainer, TrainingArguments

    callbacks: list[Any] = []
    if ours:
        from accelerate_clip import GradientClipCallback

        callbacks = [GradientClipCallback(ClipByNorm(max_norm=_LIMIT))]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=1,
            max_grad_norm=_LIMIT,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        net = _Tiny()
        Trainer(
            model=net,
            args=arguments,
            train_dataset=[{"x": _input()[0]}],
            optimizers=(_sgd(net), None),
            callbacks=callbacks,
        ).train()
