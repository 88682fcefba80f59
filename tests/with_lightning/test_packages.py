"""Both names under which Lightning is installed, and each alone."""

import sys

import pytest
from support.ranks import run_on_ranks


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

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.Linear(4, 1)

        def training_step(self, *_):
            return self.net(torch.ones(2, 4)).square().mean() * 100

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

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


def with_packages(rank, world, missing, used):
    for name in list(sys.modules):
        if name.split(".")[0] == missing:
            del sys.modules[name]
    if missing:
        sys.modules[missing] = None
        sys.meta_path.insert(0, Blocked(missing))
    return fit(used)


@pytest.mark.parametrize(
    ("missing", "used", "base"),
    [
        ("", "lightning.pytorch", "lightning.pytorch.callbacks.callback"),
        ("", "pytorch_lightning", "lightning.pytorch.callbacks.callback"),
        ("lightning", "pytorch_lightning", "pytorch_lightning.callbacks.callback"),
        ("pytorch_lightning", "lightning.pytorch", "lightning.pytorch.callbacks.callback"),
    ],
)
def test_the_callback_works_in_either_trainer(missing, used, base):
    [(module, clipped, limit)] = run_on_ranks(with_packages, 1, missing, used, fresh=True)
    assert module == base
    assert clipped
    assert limit == 0.5
