"""Sizes and numbers that all examples share, so that their results can be compared."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from gpt import GPT
from text import HeldOutSamples, Text, TrainingSamples
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

SEED = 1


@dataclass(frozen=True)
class Setting:
    """How large the model is and how long it trains.

    The optimizer is the usual one of small language models: AdamW with betas (0.9, 0.95), weight
    decay 0.1, and a learning rate that rises to 1e-3 in the first steps.
    """

    steps: int = 250
    batch_size: int = 16
    context: int = 128
    width: int = 128
    layers: int = 4
    learning_rate: float = 1e-3
    rising_steps: int = 20

    def model(self, text: Text) -> GPT:
        """A new model; its weights depend on torch's seed."""
        return GPT(len(text.characters), self.context, width=self.width, layers=self.layers)

    def optimizer(self, model: nn.Module) -> AdamW:
        """For all parameters of the model."""
        rate = self.learning_rate
        return AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.1)

    def schedule(self, optimizer: AdamW) -> LambdaLR:
        """The learning rate rises, then stays; to be stepped after every optimizer step."""
        return LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / self.rising_steps))

    def training_samples(self, text: Text) -> TrainingSamples:
        """In a fixed order: read them without shuffling."""
        return TrainingSamples(text, self.steps, self.batch_size, self.context)

    def held_out_samples(self, text: Text) -> HeldOutSamples:
        """To validate on."""
        return HeldOutSamples(text, self.context)


SMALL = Setting(steps=4, batch_size=4, context=16, width=16, layers=1)


def parser(description: str) -> argparse.ArgumentParser:
    """The options that all examples have; `setting_of` reads them."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--steps", type=int, help="optimizer steps")
    options.add_argument("--small", action="store_true", help="a tiny model, for a quick try")
    return options


def setting_of(arguments: argparse.Namespace) -> Setting:
    """The setting that was asked for on the command line."""
    setting = SMALL if arguments.small else Setting()
    steps = setting.steps if arguments.steps is None else arguments.steps
    return Setting(**{**vars(setting), "steps": steps})
