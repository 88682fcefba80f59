"""Each name of Lightning and torch that isn't documented, where `framework.py` relies on it.

Read in Lightning 2.6.6 and torch 2.13: an upgrade that changes one fails here, under its name.
"""

import pytest
import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.fabric.strategies import DeepSpeedStrategy as FabricDeepSpeedStrategy
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DeepSpeedStrategy
from support.lit import After, Small, scaled, trainer_of
from support.logged import table_entries
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from gradclip.adapters import changes_gradients
from lightning_clip import framework


class Looks(After):
    """What the Trainer's loops say in each batch, just before its step and at its end."""

    def __init__(self):
        super().__init__(None)
        self.skips, self.due = [], []

    def on_before_optimizer_step(self, trainer, pl_module, _):
        pl_module.log("step_seen", float(framework.logger_step(trainer)))
        self.skips.append(framework.skips_backward(trainer))

    def on_train_batch_end(self, trainer, *_):
        self.due.append(framework.logs_after_batch(trainer))


def test_the_step_and_the_batch_that_the_trainer_logs_under(tmp_path):
    """`_batches_that_stepped` and `_should_accumulate`, against what a logger wrote."""
    looks, table = Looks(), CSVLogger(tmp_path)
    trainer_of(looks, logger=table, log_every_n_steps=2, accumulate_grad_batches=2).fit(
        Small(), range(8)
    )
    written = {step: row["step_seen"] for step, row in table_entries(table.log_dir).items()}
    assert written == {1: 1.0, 3: 3.0}
    assert looks.due == [i in (3, 7) for i in range(8)]


def test_the_epoch_that_runs_without_a_backward():
    """`_skip_backward`, which StochasticWeightAveraging sets."""

    class Normed(Small):
        def __init__(self):
            super().__init__()
            self.net.insert(1, torch.nn.BatchNorm1d(8))

        def train_dataloader(self):
            return range(2)

    looks = Looks()
    averaging = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1, annealing_epochs=1)
    trainer_of(averaging, looks, max_epochs=3).fit(Normed())
    assert looks.skips == [False] * 6 + [True]  # one window


def test_strategies_and_precision_plugins():
    """`deepspeed_engine`, `scaler`, and that only one strategy of Fabric has an engine."""
    assert isinstance(DeepSpeedStrategy.deepspeed_engine, property)
    assert framework.deepspeed_engine(trainer_of()) is None
    fabric = Fabric(accelerator="cpu", devices=1)
    assert not framework.steps_by_engine(fabric)
    fabric._strategy = object.__new__(FabricDeepSpeedStrategy)
    assert framework.steps_by_engine(fabric)
    assert framework.live_scaler(trainer_of().precision_plugin) is None
    plugin = scaled(2.0)
    assert framework.live_scaler(trainer_of(plugins=[plugin]).precision_plugin) is plugin.scaler
    plugin.scaler._enabled = False
    assert framework.live_scaler(plugin) is None


def test_who_overrides_a_hook():
    class Mine(Small):
        def on_after_backward(self):
            pass

    class Inherits(Mine):
        pass

    module = Inherits()
    assert framework.overriding(module, "on_after_backward") == "Mine"
    assert framework.overriding(module, "clip_gradients") is None
    module.clip_gradients = LightningModule.clip_gradients.__get__(module)
    assert framework.overriding(module, "clip_gradients") == "Inherits"


WRITES = {
    "norm": lambda ps: torch.nn.utils.clip_grad_norm_(ps, 0.1),
    "value": lambda ps: torch.nn.utils.clip_grad_value_(ps, 0.1),
    "norm, one by one": lambda ps: torch.nn.utils.clip_grad_norm_(ps, 0.1, foreach=False),
    "in place": lambda ps: ps[0].grad.mul_(0.5),
    "detached": lambda ps: ps[0].grad.detach().mul_(0.5),
    "another": lambda ps: setattr(ps[0], "grad", ps[0].grad * 0.5),
    "none": lambda ps: setattr(ps[0], "grad", None),
}
READS = {
    "nothing": lambda _: None,
    "norms": lambda ps: torch.nn.utils.get_total_norm([p.grad for p in ps]),
    "a sum": lambda ps: torch.zeros_like(ps[0].grad).add_(ps[0].grad),
}


@pytest.fixture(scope="module")
def mesh(tmp_path_factory):
    store = f"file://{tmp_path_factory.mktemp('ranks')}/store"
    dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("is_sharded", [False, True])
def test_changes_of_gradients_are_seen(mesh, is_sharded):
    """`Tensor._version`, which foreach operations on DTensors leave alone."""
    for cases, want in ((WRITES, True), (READS, False)):
        for name, run in cases.items():
            if is_sharded and name == "detached":
                continue  # a DTensor's own: torch tells neither
            start = torch.ones(4, 4)
            whole = distribute_tensor(start, mesh, [Shard(0)]) if is_sharded else start
            held = [torch.nn.Parameter(whole), torch.nn.Parameter(torch.ones(2))]
            (held[0] * held[0]).sum().backward()  # the second has no gradient
            answer, changed = changes_gradients(
                lambda run=run, held=held: (run([held[0]]), "done"), held
            )
            assert changed == want, name
            assert answer[1] == "done"
