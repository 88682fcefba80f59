"""Accelerate: an ordinary script. Its clipping is chosen when it is launched.

accelerate-clip launch --config_file configs/accelerate/two_processes.yaml \
    examples/accelerate_gpt.py
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed, tqdm
from gpt import surprise
from json_lines import JsonLines
from setting import SEED, parser, setting_of
from text import Text
from torch import Tensor
from torch.utils.data import DataLoader


def main() -> None:
    """Train, validate, log."""
    options = parser("Train a small GPT with Accelerate.")
    options.add_argument("--out", type=Path, default=Path("demo/accelerate.jsonl"))
    arguments = options.parse_args()
    setting, text = setting_of(arguments), Text()
    set_seed(SEED)
    accelerator = Accelerator(
        log_with=JsonLines(arguments.out),
        dataloader_config=DataLoaderConfiguration(split_batches=True),
    )
    accelerator.init_trackers("gpt")
    model = setting.model(text)
    optimizer = setting.optimizer(model)
    model, optimizer, schedule, batches, held_out = accelerator.prepare(
        model,
        optimizer,
        setting.schedule(optimizer),
        DataLoader(setting.training_samples(text), batch_size=setting.batch_size),
        DataLoader(setting.held_out_samples(text), batch_size=64),
    )
    start = time.perf_counter()
    for step, (inputs, target, scale) in enumerate(tqdm(batches, desc="Accelerate")):
        losses = surprise(model(inputs), target)
        accelerator.backward((losses * scale).mean())
        norm = accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        loss = accelerator.reduce(losses.detach().mean(), "mean")
        accelerator.log({"loss": loss, "scale": scale.mean(), "grad_norm": norm}, step)

    found: list[Tensor] = []
    with torch.no_grad():
        for inputs, target, _ in held_out:
            found.append(accelerator.gather_for_metrics(surprise(model(inputs), target)))
    validation_loss = float(torch.cat(found).mean())
    seconds = time.perf_counter() - start
    accelerator.log({"validation_loss": validation_loss, "seconds": seconds})
    accelerator.print(f"validation loss {validation_loss:.3f}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
