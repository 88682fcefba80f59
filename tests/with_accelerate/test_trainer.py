"""transformers' Trainer: its own clipping call and its logged norm, under FSDP."""

import contextlib
import os

import pytest
import torch
from support.accelerate_cpu import fresh, sharding_on_cpu
from support.ranks import run_on_ranks

import accelerate_clip

NORM = {"policies": [{"type": "norm", "max_norm": 0.2}], "log": {"every_n_steps": 1}}
WRAPPED = {"transformer_layer_cls_to_wrap": "GPT2Block", "cpu_ram_efficient_loading": False}
SHARDED = {
    "fsdp1": {"fsdp_version": 1, "use_orig_params": True, "sync_module_states": False},
    "fsdp2": {"fsdp_version": 2},
}


class Rows(torch.utils.data.Dataset):
    """Every row is the same, so that any share of a batch has the same gradient."""

    def __len__(self):
        return 24

    def __getitem__(self, _):
        row = torch.arange(8)
        return {"input_ids": row, "labels": row}


def train(folder, world, fsdp=None):
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

    fresh()
    torch.manual_seed(0)
    sizes = {"vocab_size": 16, "n_positions": 8, "n_embd": 16, "n_layer": 1, "n_head": 2}
    no_dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    options = {"fsdp": "full_shard", "fsdp_config": WRAPPED | fsdp} if fsdp else {}
    with sharding_on_cpu() if fsdp else contextlib.nullcontext():
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=3,
            per_device_train_batch_size=4 // world,
            gradient_accumulation_steps=2,
            learning_rate=0.01,
            max_grad_norm=0.2,
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
            **options,
        )
        model = GPT2LMHeadModel(GPT2Config(**sizes, **no_dropout))
        trainer = Trainer(model=model, args=arguments, train_dataset=Rows())
    clip = accelerate_clip.enable(trainer.accelerator, NORM)
    trainer.train()
    assert clip.steps[0] == 3
    norms = [float(row["grad_norm"]) for row in trainer.state.log_history if "grad_norm" in row]
    assert norms[-1] == pytest.approx(float(clip.last_record.grad_norm))
    kinds = {type(module).__name__ for module in trainer.model_wrapped.modules()}
    return norms, bool(clip.last_record.clipped), kinds


def on_rank(rank, world, folder):
    os.environ["ACCELERATE_USE_CPU"] = "true"
    return {name: train(folder, world, options) for name, options in SHARDED.items()}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_the_trainer_logs_the_norm_of_one_process(tmp_path):
    want, clipped, _ = train(str(tmp_path), 1)
    assert clipped
    assert len(want) == 3
    for found in run_on_ranks(on_rank, 2, str(tmp_path)):
        assert "FullyShardedDataParallel" in found["fsdp1"][2]
        assert any(kind.startswith("FSDP") for kind in found["fsdp2"][2])
        for norms, also_clipped, _ in found.values():
            assert also_clipped
            assert norms == pytest.approx(want, rel=1e-4)
