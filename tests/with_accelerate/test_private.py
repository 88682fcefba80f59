"""Notices when Accelerate or transformers change what private.py touches (1.15.0; 5.23.0)."""

import inspect

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.scheduler import AcceleratedScheduler
from support.accelerate_cpu import with_scaler
from torch import nn

from accelerate_clip import launch, private


def test_prepared_objects_are_listed():
    accelerator = Accelerator(cpu=True)
    model = nn.Linear(2, 1)
    model, opt = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert private.prepared_models(accelerator) == [model]
    assert private.prepared_optimizers(accelerator) == [opt]
    accelerator.free_memory()
    assert private.prepared_models(accelerator) == []
    assert private.prepared_optimizers(accelerator) == []


@pytest.mark.filterwarnings("ignore:Seems like .optimizer.step.* has been overridden")
@pytest.mark.parametrize("scaled", [False, True])
def test_a_held_step_is_a_skipped_step(scaled):
    accelerator = with_scaler() if scaled else Accelerator(cpu=True)
    model = nn.Linear(2, 1)
    model, opt = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    schedule = accelerator.prepare(torch.optim.lr_scheduler.StepLR(opt.optimizer, 1, 0.5))
    for held in (torch.tensor(True), True, torch.tensor(False), False):
        opt.zero_grad()
        accelerator.backward(model(torch.ones(1, 2)).float().sum())
        opt.step()
        private.hold_schedule(opt, held)
        assert bool(accelerator.optimizer_step_was_skipped) == bool(held)
        rate = opt.param_groups[0]["lr"]
        schedule.step()
        assert (opt.param_groups[0]["lr"] == rate) == bool(held)


def test_the_scheduler_asks_step_was_skipped():
    assert "opt.step_was_skipped" in inspect.getsource(AcceleratedScheduler.step)
    assert isinstance(AcceleratedOptimizer.step_was_skipped, property)


def test_the_launcher_is_where_it_was():
    arguments = launch.launch_command_parser().parse_args(
        ["--num_processes", "2", "a.py", "--lr", "1"]
    )
    assert (arguments.training_script, arguments.training_script_args) == ("a.py", ["--lr", "1"])
    for name in ("cpu", "module", "no_python", "config_file", "num_processes", "mpirun_hostfile"):
        assert hasattr(arguments, name)
    for name in ("use_deepspeed", "use_fsdp", "use_megatron_lm", "multi_gpu", "tpu"):
        assert getattr(arguments, name) is False
    assert launch.default_config_file.endswith(".yaml")


def test_accelerate_prepares_optimizers_through_the_public_method():
    assert "self.prepare_optimizer(" in inspect.getsource(Accelerator._prepare_one)


def test_the_trainer_calls_what_is_replaced():
    trainer = pytest.importorskip("transformers").Trainer
    loads, steps = "_prepare_for_training", "_run_epoch"
    if not hasattr(trainer, loads):  # transformers 4 does both in one
        loads = steps = "_inner_training_loop"
    for caller, call in (
        ("train", "self._hp_search_setup(trial)"),
        ("_hp_search_setup", "self.create_accelerator_and_postprocess()"),
        ("_maybe_log_save_evaluate", "self.log(logs, start_time)"),
        ("_save_checkpoint", "self._save_optimizer_and_scheduler(output_dir)"),
        (loads, "self._load_optimizer_and_scheduler(resume_from_checkpoint)"),
        (steps, "if not self.accelerator.optimizer_step_was_skipped"),
        ("log", "self.state.log_history.append(output)"),
    ):
        assert call in inspect.getsource(getattr(trainer, caller)), caller
    if hasattr(trainer, "_has_mixed_mesh_grads"):  # since transformers 5
        measures = "self._has_mixed_mesh_grads(model)"
        assert "if self._mixed_mesh_grads is None:" in inspect.getsource(
            trainer._has_mixed_mesh_grads
        )
        for caller in (trainer._clip_grad_norm, trainer._get_grad_norm):
            assert measures in inspect.getsource(caller)
    assert 'logs["grad_norm"]' in inspect.getsource(trainer._maybe_log_save_evaluate)
    assert list(inspect.signature(trainer.log).parameters)[:2] == ["self", "logs"]
