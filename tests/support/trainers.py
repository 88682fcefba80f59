"""A small random-weights GPT-2 for transformers' Trainer, and rows to train it on."""

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

SIZES = {"vocab_size": 16, "n_positions": 8, "n_embd": 16, "n_layer": 1, "n_head": 2}
PLAIN = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
PLAIN |= dict.fromkeys(("bos_token_id", "eos_token_id"))


class Rows(torch.utils.data.Dataset):
    """Batches of four equal rows, so that any share of one has the same gradient."""

    def __len__(self):
        return 48

    def __getitem__(self, index):
        row = torch.arange(8) * (index // 4 + 1) % 16
        return {"input_ids": row, "labels": row}


class Poisoned(GPT2LMHeadModel):
    """Its third backward gives NaN."""

    calls = 0

    def forward(self, input_ids=None, labels=None, **kwargs):
        result = super().forward(input_ids=input_ids, labels=labels, **kwargs)
        self.calls += 1
        if self.calls == 3:
            result.loss.register_hook(lambda grad: grad * float("nan"))
        return result


class Rising(GPT2LMHeadModel):
    """Whose loss is a million times as high from the 25th backward on."""

    calls = 0

    def forward(self, input_ids=None, labels=None, **kwargs):
        result = super().forward(input_ids=input_ids, labels=labels, **kwargs)
        self.calls += 1
        if self.calls > 24:
            result.loss = 1e6 * result.loss
        return result


class InOrder(Trainer):
    """Takes its rows in order; only transformers 5 has an argument for that."""

    def _get_train_sampler(self, *_):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def trainer(folder, world=1, callbacks=(), model=GPT2LMHeadModel, **options):
    """A Trainer of six steps that logs each and saves at the third."""
    torch.manual_seed(0)
    given = {
        "max_steps": 6,
        "save_steps": 3,
        "per_device_train_batch_size": 4 // world,
        "learning_rate": 0.01,
        "logging_steps": 1,
        "use_cpu": True,
    }
    arguments = TrainingArguments(
        output_dir=str(folder), report_to=[], disable_tqdm=True, **given | options
    )
    net = model(GPT2Config(**SIZES, **PLAIN))
    return InOrder(model=net, args=arguments, train_dataset=Rows(), callbacks=list(callbacks))


def logged(trainer):
    """The history's rows of training steps."""
    return [row for row in trainer.state.log_history if "loss" in row]
