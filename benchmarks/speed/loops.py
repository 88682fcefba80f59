"""Whole training loops of a small MLP, with gradclip and with what users have without it.

On one thread: the model is so small that what is left is the host's work.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from benchmarks.speed.pairs import Effort, in_turn
from benchmarks.speed.rows import Row
from gradclip import Auto, ClipByNorm, GradientClipper, ZClip
from gradclip.policies import AnyPolicy

PART = "loops"
WIDTH, LAYERS, BATCH = 64, 10, 32
POLICIES: dict[str, AnyPolicy] = {
    "norm": ClipByNorm(max_norm=1.0),
    "zclip": ZClip(),
    "auto": Auto(),
}
AIMS = {"norm": 1.00, "zclip": 1.05}
PLAIN_AIMS = {"norm": 1.00, "zclip": 1.10}
STEPS = 50
"""Steps of one call in loops that can be called again and again."""


def steps_of_a_fit(effort: Effort) -> int:
    """Of a whole training, which is set up anew for each call."""
    return 20 if effort.quick else 300


def mlp() -> nn.Sequential:
    """Ten layers, 20 tensors, 42 000 values; the same weights each time."""
    torch.manual_seed(0)
    layers = [layer for _ in range(LAYERS) for layer in (nn.Linear(WIDTH, WIDTH), nn.Tanh())]
    return nn.Sequential(*layers)


def data(batches: int) -> TensorDataset:
    """So many batches of rows; the model learns to give them back."""
    rows = torch.randn(batches * BATCH, WIDTH, generator=torch.Generator().manual_seed(1))
    return TensorDataset(rows)


def loss_of(model: nn.Module, rows: Tensor) -> Tensor:
    return (model(rows) - rows).square().mean()


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3)


def plain(policy: AnyPolicy | None) -> Callable[[], None]:
    """A loop in plain PyTorch; torch's `clip_grad_norm_` if there is no policy."""
    model, batches = mlp(), data(STEPS).tensors[0].split(BATCH)
    optimizer = adamw(model)
    clipper = None if policy is None else GradientClipper(policy, model, optimizer)

    def steps() -> None:
        for rows in batches:
            optimizer.zero_grad()
            loss_of(model, rows).backward()
            if clipper is None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            else:
                clipper.clip()
            optimizer.step()

    return steps


def accelerated(policy: AnyPolicy | None) -> Callable[[], None]:
    """A loop with Accelerate, which calls `accelerator.clip_grad_norm_` with and without us."""
    from accelerate import Accelerator

    import accelerate_clip

    accelerator = Accelerator(cpu=True)
    if policy is not None:
        accelerate_clip.enable(accelerator, policy)
    model = mlp()
    batches = DataLoader(data(STEPS), BATCH)
    model, optimizer, batches = accelerator.prepare(model, adamw(model), batches)

    def steps() -> None:
        for (rows,) in batches:
            optimizer.zero_grad()
            accelerator.backward(loss_of(model, rows))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()

    return steps


def lightning(policy: AnyPolicy | None, steps: int, folder: str) -> Callable[[], None]:
    """A whole `Trainer.fit`, with the logger that a Trainer has by default."""
    from lightning.pytorch import LightningModule, Trainer

    from lightning_clip import GradientClip

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = mlp()

        def training_step(self, batch: Any, _: int) -> Tensor:
            return loss_of(self.model, batch[0])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return adamw(self.model)

    rows = DataLoader(data(steps), BATCH)
    clipping = {"gradient_clip_val": 1.0} if policy is None else {}

    def fit() -> None:
        callbacks = [] if policy is None else [GradientClip(policy)]
        trainer = Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=1,
            callbacks=callbacks,
            default_root_dir=folder,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **clipping,
        )
        trainer.fit(Module(), rows)

    return fit


class Rows(Dataset[dict[str, Tensor]]):
    """Rows by the name of an argument, as transformers' `Trainer` wants them."""

    def __init__(self, steps: int) -> None:
        self.rows = data(steps).tensors[0]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"rows": self.rows[index]}


class WithLoss(nn.Module):
    """A model that returns its loss, as transformers' models do."""

    def __init__(self) -> None:
        super().__init__()
        self.model = mlp()

    def forward(self, rows: Tensor) -> dict[str, Tensor]:
        """The loss of a batch."""
        return {"loss": loss_of(self.model, rows)}


def transformers(policy: AnyPolicy | None, steps: int, folder: str) -> Callable[[], None]:
    """A whole `Trainer.train` of transformers, with its own logging."""
    from transformers import Trainer, TrainingArguments

    from accelerate_clip import GradientClipCallback

    rows = Rows(steps)

    def train() -> None:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=BATCH,
            num_train_epochs=1,
            max_grad_norm=1.0,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            remove_unused_columns=False,
        )
        callbacks = [] if policy is None else [GradientClipCallback(policy)]
        trainer = Trainer(WithLoss(), arguments, train_dataset=rows, callbacks=callbacks)
        trainer.train()

    return train


def one_thread(rows: Callable[[Effort], Iterator[Row]], effort: Effort) -> Iterator[Row]:
    """These rows, measured on one thread."""
    torch.set_num_threads(1)
    yield from rows(effort)


def plain_rows(effort: Effort) -> Iterator[Row]:
    """`norm`, `zclip` and `auto` against torch's function."""
    for name, policy in POLICIES.items():
        timed = in_turn(plain(policy), plain(None), effort)
        aim = PLAIN_AIMS.get(name)
        yield timed.row(PART, f"plain loop, {name}", "clip_grad_norm_", calls=STEPS, aim=aim)


def accelerate_rows(effort: Effort) -> Iterator[Row]:
    """The same script with and without `enable`."""
    for name, policy in POLICIES.items():
        timed = in_turn(accelerated(policy), accelerated(None), effort)
        aim = 1.0 if name == "norm" else None
        peer = "accelerator.clip_grad_norm_"
        yield timed.row(PART, f"Accelerate loop, {name}", peer, calls=STEPS, aim=aim)


def trainer_rows(
    start: Callable[[AnyPolicy | None, int, str], Callable[[], None]],
    title: str,
    peer: str,
    aims: dict[str, float],
    effort: Effort,
) -> Iterator[Row]:
    """A trainer with our callback and with its own option."""
    for name in ("lightning", "lightning.pytorch", "lightning.fabric", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    steps = steps_of_a_fit(effort)
    with tempfile.TemporaryDirectory() as folder:
        for name, policy in POLICIES.items():
            ours, theirs = start(policy, steps, folder), start(None, steps, folder)
            timed = in_turn(ours, theirs, effort._replace(seconds=3 * effort.seconds))
            aim = aims.get(name)
            yield timed.row(PART, f"{title}, {name}", peer, calls=steps, aim=aim)


CASES: dict[str, Callable[[Effort], Iterator[Row]]] = {
    name: partial(one_thread, rows)
    for name, rows in {
        "loop plain": plain_rows,
        "loop Accelerate": accelerate_rows,
        "loop Lightning": partial(
            trainer_rows, lightning, "Trainer.fit", "gradient_clip_val", AIMS
        ),
        "loop transformers": partial(
            trainer_rows, transformers, "transformers' Trainer", "max_grad_norm", {"norm": 1.0}
        ),
    }.items()
}
