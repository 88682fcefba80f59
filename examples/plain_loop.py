"""Plain PyTorch: attach a clipper to the optimizer, and every step is clipped.

python examples/plain_loop.py
"""

from __future__ import annotations

import torch
from gpt import surprise
from setting import SEED, parser, setting_of
from text import Text
from torch.utils.data import DataLoader

from gradclip import GradientClipper


def main() -> None:
    """Train for fifty steps and say what was clipped."""
    options = parser("Train a small GPT in a plain loop.")
    options.add_argument("--config", default="auto", help="a preset or a file")
    options.set_defaults(steps=50)
    arguments = options.parse_args()
    setting, text = setting_of(arguments), Text()
    torch.manual_seed(SEED)
    model = setting.model(text)
    optimizer = setting.optimizer(model)
    schedule = setting.schedule(optimizer)

    clipper = GradientClipper(arguments.config, model.named_parameters(), optimizer)
    clipper.attach(optimizer)

    batches = DataLoader(setting.training_samples(text), batch_size=setting.batch_size)
    for step, (inputs, target, scale) in enumerate(batches):
        losses = surprise(model(inputs), target)
        optimizer.zero_grad()
        (losses * scale).mean().backward()
        optimizer.step()
        schedule.step()
        if step % 10 == 9:
            norm = float(clipper.last_record.grad_norm)  # the one read of the host, when wanted
            print(f"step {step + 1:3d}  loss {losses.mean():.3f}  norm {norm:.2f}", flush=True)
    print(f"{float(clipper.last_record.clip_rate):.0%} of the steps were clipped")


if __name__ == "__main__":
    main()
