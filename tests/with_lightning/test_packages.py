"""Both names under which Lightning is installed, and each alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


class Blocked:
    """Makes packages look as if they weren't installed."""

    def __init__(self, *names):
        self.names = names

    def find_spec(self, name, *_):
        if name.split(".")[0] in self.names:
            raise ModuleNotFoundError(name)


def fit(package):
    import importlib

    import torch

    pl = importlib.import_module(package)
    from gradclip import ClipByNorm
    from lightning_clip import GradientClip

    torch.manual_seed(0)

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.Linear(4, 1)

        def training_step(self, *_):
            return self.net(torch.ones(2, 4)).square().mean() * 100

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1e-5)

    clip = GradientClip(ClipByNorm(max_norm=0.5))
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        callbacks=[clip],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(), range(3))
    logged = float(trainer.callback_metrics["clip/limit"])
    return GradientClip.__mro__[1].__module__, bool(clip.last_record.clipped), logged


def main(missing, used):
    if missing:
        sys.modules[missing] = None
        sys.meta_path.insert(0, Blocked(missing))
    print(json.dumps(fit(used)))  # noqa: T201


@pytest.mark.parametrize(
    ("missing", "used", "base"),
    [
        ("", "pytorch_lightning", "lightning.pytorch.callbacks.callback"),
        ("lightning", "pytorch_lightning", "pytorch_lightning.callbacks.callback"),
        ("pytorch_lightning", "lightning.pytorch", "lightning.pytorch.callbacks.callback"),
    ],
)
def test_the_callback_works_in_either_trainer(missing, used, base):
    """In a process of its own: what is blocked there is missing for good."""
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, __file__, missing, used]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    module, clipped, limit = json.loads(done.stdout.splitlines()[-1])
    assert module == base
    assert clipped
    assert limit == 0.5


if __name__ == "__main__":
    main(*sys.argv[1:])
