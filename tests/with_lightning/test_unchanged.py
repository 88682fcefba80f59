"""Unchanged scripts that clip because of GRADCLIP_CONFIG: the entry points, and who decides."""

import logging
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tomllib
import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins import MixedPrecision
from support.lit import NAN, Small, grads_of, inputs, norm_of, small_net, trainer_of

import gradclip_factories
import lightning_clip
from gradclip import ClipByNorm, ConfigError
from lightning_clip import GradientClip

ROOT = Path(__file__).parents[2]
JSON = '{"policies": [{"type": "norm", "max_norm": 0.25}]}'


def install(folder):
    """What an installed distribution says of its entry points, from the project's own file."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    info = folder / "gradclip-0.dist-info"
    info.mkdir()
    info.joinpath("METADATA").write_text("Metadata-Version: 2.1\nName: gradclip\nVersion: 0\n")
    lines = [
        f"[{group}]\n{name} = {value}\n"
        for group, points in project["entry-points"].items()
        for name, value in points.items()
    ]
    info.joinpath("entry_points.txt").write_text("".join(lines))


@pytest.fixture
def installed(tmp_path, monkeypatch):
    install(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("GRADCLIP_CONFIG", JSON)
    monkeypatch.chdir(tmp_path)


def fit(*callbacks, batches=3, **options):
    trainer = trainer_of(*callbacks, **options)
    module = Small()
    trainer.fit(module, range(batches))
    return trainer, norm_of(p.grad for p in module.parameters())


SCRIPTS = {
    "trainer": """
import torch
from PACKAGE import LightningModule, Trainer
class Tiny(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(4, 1)
    def training_step(self, batch, _):
        return self.net(torch.full((8, 4), 30.0)).square().mean()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)
model = Tiny()
Trainer(max_epochs=1, accelerator="cpu", logger=False).fit(model, range(2))
""",
    "fabric": """
import torch
from PACKAGE import Fabric
fabric = Fabric(accelerator="cpu", devices=1)
model = torch.nn.Linear(4, 1)
model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.0))
fabric.backward(model(torch.full((8, 4), 30.0)).square().mean())
optimizer.step()
""",
}
NORM = "\nprint(sum(float(p.grad.square().sum()) for p in model.parameters()) ** 0.5)\n"


@pytest.mark.parametrize(
    ("script", "package"),
    [
        ("trainer", "lightning.pytorch"),
        ("trainer", "pytorch_lightning"),
        ("fabric", "lightning.fabric"),
    ],
)
def test_a_script_as_it_is(script, package, tmp_path):
    install(tmp_path)
    path = tmp_path / "train.py"
    path.write_text(SCRIPTS[script].replace("PACKAGE", package) + NORM)
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{tmp_path}", "GRADCLIP_CONFIG": JSON}
    done = subprocess.run(
        [sys.executable, path], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.splitlines()[-1]) == pytest.approx(0.25, rel=1e-4)
    assert "gradclip: norm(max_norm=0.25) on 2 parameters of SGD" in done.stderr


def test_without_the_variable_nothing_of_ours_is_imported():
    code = (
        "import sys, gradclip_factories as factories\n"
        "assert factories.for_trainer() == factories.for_fabric() == []\n"
        "assert not {'gradclip', 'lightning_clip', 'torch'} & set(sys.modules)"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    env.pop("GRADCLIP_CONFIG", None)
    subprocess.run([sys.executable, "-c", code], env=env, check=True, timeout=60)


def test_a_wrong_name_is_an_error_when_the_trainer_is_made(installed, monkeypatch):
    monkeypatch.setenv("GRADCLIP_CONFIG", "zclp")
    for make in (trainer_of, gradclip_factories.for_fabric):
        with pytest.raises(ConfigError, match=r"^GRADCLIP_CONFIG: zclp: .*did you mean 'zclip'"):
            make()


def test_a_callback_of_the_scripts_own_decides(installed, caplog):
    own = GradientClip(ClipByNorm(max_norm=0.5))
    trainer, norm = fit(own)
    assert norm == pytest.approx(0.5, rel=1e-5)
    assert [c for c in trainer.callbacks if isinstance(c, GradientClip)] == [own]
    [said] = [r.message for r in caplog.records if r.levelno == logging.WARNING]
    assert said.startswith("GRADCLIP_CONFIG is set, and this Trainer has a GradientClip of its own")


def test_the_variable_decides_instead_of_the_trainers_own_limit(installed, caplog):
    trainer, norm = fit(gradient_clip_val=0.125)
    assert norm == pytest.approx(0.25, rel=1e-5)
    assert "instead of Trainer(gradient_clip_val=0.125)" in caplog.text
    trainer.fit(Small(), range(2))  # once more
    assert sum(isinstance(c, GradientClip) for c in trainer.callbacks) == 1


def test_checkpoints_are_those_of_a_callback(installed, monkeypatch, tmp_path):
    monkeypatch.setenv("GRADCLIP_CONFIG", "zclip")
    trainer, _ = fit()
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    monkeypatch.delenv("GRADCLIP_CONFIG")
    clip = GradientClip("zclip")
    again = trainer_of(clip, max_epochs=2)
    again.fit(Small(), range(3), ckpt_path=tmp_path / "last.ckpt", weights_only=False)
    assert clip.clippers[0].state_dict()["counts"]["steps"] == 6


class Kept:
    """A logger of Fabric's that keeps what it is given."""

    def __init__(self):
        self.rows = []

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, metrics))


def backward(fabric, model, seed):
    fabric.backward(model(inputs(seed)).float().square().mean())


def test_fabric_clips_once_however_the_script_goes_about_it(installed, monkeypatch, caplog):
    monkeypatch.setenv("GRADCLIP_CONFIG", JSON[:-1] + ', "log": {"every_n_steps": 2}}')
    kept = Kept()
    fabric = Fabric(accelerator="cpu", devices=1, loggers=[kept])
    model = fabric.setup_module(small_net())
    optimizers = fabric.setup_optimizers(
        torch.optim.SGD(model.module[0].parameters(), lr=0.0),
        torch.optim.SGD(model.module[2].parameters(), lr=0.0),
    )
    for step in range(4):
        backward(fabric, model, step)
        for index, optimizer in enumerate(optimizers):
            before = norm_of(grads_of(optimizer.optimizer))
            if index:
                found = fabric.clip_gradients(model, optimizer, max_norm=0.125)
                assert float(found) == pytest.approx(before, rel=1e-5)
            optimizer.step()
            assert norm_of(grads_of(optimizer.optimizer)) == pytest.approx(0.25, rel=1e-5)
            optimizer.zero_grad()
    assert [step for step, _ in kept.rows] == [2, 4]
    assert kept.rows[0][1]["clip/clipped/optimizer1"] == 1
    assert caplog.text.count("instead of the limits") == 1
    clipper = lightning_clip.enable(fabric, model, optimizers[0], ClipByNorm(max_norm=0.5))
    assert "itself, which decides" in caplog.text
    backward(fabric, model, 0)
    optimizers[0].step()
    assert norm_of(grads_of(optimizers[0].optimizer)) == pytest.approx(0.5, rel=1e-5)
    assert clipper.state_dict()["counts"]["steps"] == 1


def test_fabric_counts_an_overflow(installed):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    precision = MixedPrecision("16-mixed", device="cpu", scaler=scaler)
    fabric = Fabric(accelerator="cpu", devices=1, plugins=[precision])
    net = small_net()
    model, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), lr=0.0))
    [program] = [c for c in fabric._callbacks if hasattr(c, "on_gradclip_set_up")]
    for batch in (0, NAN, 0):  # the last is clipped anew
        optimizer.zero_grad()
        loss = model(inputs(0)).float().square().mean()
        fabric.backward(loss * math.nan if batch == NAN else loss)
        norm = fabric.clip_gradients(model, optimizer, max_norm=1.0)
        optimizer.step()
    assert norm.isfinite()
    counts = program.clippers[0].state_dict()["counts"]
    assert counts["steps"] == 3
    assert counts["nonfinite"] == 1


def test_fabric_wants_the_module_first(installed):
    fabric = Fabric(accelerator="cpu", devices=1)
    net = small_net()
    with pytest.raises(ConfigError, match="SGD was set up before the module of its parameters"):
        fabric.setup_optimizers(torch.optim.SGD(net.parameters(), lr=0.1))
