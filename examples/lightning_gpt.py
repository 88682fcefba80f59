"""Lightning: clipping is one callback.

python examples/lightning_gpt.py --config auto
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import lightning as L
from gpt import surprise
from lightning.pytorch.loggers import CSVLogger
from runs import Run
from setting import SEED, Setting, parser, setting_of
from text import Sample, Text
from torch import Tensor
from torch.utils.data import DataLoader

from gradclip import PolicyLike
from lightning_clip import GradientClip


class CharacterModel(L.LightningModule):
    """An ordinary LightningModule; clipping isn't its concern."""

    def __init__(self, setting: Setting, text: Text) -> None:
        super().__init__()
        self.setting = setting
        self.model = setting.model(text)

    def training_step(self, batch: Sample) -> dict[str, Tensor]:
        """The loss, and what the history wants to know of it."""
        text, target, scale = batch
        losses = surprise(self.model(text), target)
        plain = losses.detach().mean()
        self.log("loss", plain, prog_bar=True)
        return {"loss": (losses * scale).mean(), "plain": plain, "scale": scale.mean()}

    def validation_step(self, batch: Sample) -> None:
        """Log the loss on held-out text."""
        text, target, _ = batch
        self.log("validation_loss", surprise(self.model(text), target).mean(), batch_size=len(text))

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW with a rising learning rate."""
        optimizer = self.setting.optimizer(self.model)
        schedule = {"scheduler": self.setting.schedule(optimizer), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": schedule}


class History(L.Callback):
    """Keeps what each step did, for the picture."""

    def __init__(self, clip: GradientClip) -> None:
        self.clip = clip
        self.run = Run()

    def on_train_batch_end(self, _trainer: Any, _module: Any, out: Any, *_: Any) -> None:
        """Take this step's loss and clip record."""
        if self.clip.last_record is not None:
            self.run.add(float(out["plain"]), bool(out["scale"] > 1), self.clip.last_record)


def train(policy: PolicyLike, setting: Setting) -> Run:
    """Train with a policy, such as a YAML file, and validate."""
    L.seed_everything(SEED, verbose=False)
    text = Text()
    clip = GradientClip(policy)
    history = History(clip)
    trainer = L.Trainer(
        max_epochs=1,
        log_every_n_steps=10,
        callbacks=[clip, history],
        accelerator="cpu",
        logger=CSVLogger("demo"),  # clip/grad_norm, clip/limit and so on arrive here too
        enable_checkpointing=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    batches = DataLoader(setting.training_samples(text), batch_size=setting.batch_size)
    held_out = DataLoader(setting.held_out_samples(text), batch_size=64)
    start = time.perf_counter()
    trainer.fit(CharacterModel(setting, text), batches, held_out)
    history.run.seconds = time.perf_counter() - start
    history.run.validation_loss = float(trainer.callback_metrics["validation_loss"])
    return history.run


if __name__ == "__main__":
    options = parser("Train a small GPT with Lightning.")
    options.add_argument("--config", default="auto", help="a preset or a file")
    options.add_argument("--out", type=Path, help="a JSON file for the numbers of every step")
    arguments = options.parse_args()
    result = train(arguments.config, setting_of(arguments))
    print(f"validation loss {result.validation_loss:.3f}, clipped {result.clip_rate:.0%} of steps")
    if arguments.out:
        result.save(arguments.out)
