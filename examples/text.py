"""Real English text that is always there, cut into training samples, a few of them spoilt."""

from __future__ import annotations

from pydoc_data.topics import topics

import torch
from torch import Tensor
from torch.utils.data import Dataset

CORRUPTED_PER_HUNDRED = 3
CORRUPTED_LOSS_SCALE = 50.0
Sample = tuple[Tensor, Tensor, Tensor]


def is_corrupted(step: int) -> bool:
    """Whether the batch of this step is spoilt: three of every hundred, the same in every run."""
    century, place = divmod(step, 100)
    order = torch.randperm(100, generator=torch.Generator().manual_seed(century))
    return place in order[:CORRUPTED_PER_HUNDRED].tolist()


class Text:
    """The reference text that comes with Python, as numbers; the last tenth is held out."""

    def __init__(self) -> None:
        text = "\n".join(topics.values())
        self.characters = sorted(set(text))
        number = {character: i for i, character in enumerate(self.characters)}
        encoded = torch.tensor([number[character] for character in text])
        cut = len(encoded) * 9 // 10
        self.training, self.held_out = encoded[:cut], encoded[cut:]


class TrainingSamples(Dataset[Sample]):
    """Samples at random places, in a fixed order: sample i belongs to step i // batch_size.

    In a corrupted step the targets are random characters and the loss counts fifty-fold, as if
    a broken file had come into the data.

    Args:
        text: Where to read.
        steps: Batches to give.
        batch_size: Samples of one step, over all processes.
        context: Characters of one sample.
    """

    def __init__(self, text: Text, steps: int, batch_size: int, context: int) -> None:
        self.text, self.batch_size, self.context = text, batch_size, context
        self.corrupted = [is_corrupted(step) for step in range(steps)]
        places = len(text.training) - context - 1
        generator = torch.Generator().manual_seed(7)
        self.starts = torch.randint(places, (steps * batch_size,), generator=generator)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> Sample:
        """Text and its continuation, both (context,), and what the loss is multiplied by."""
        start = int(self.starts[index])
        window = self.text.training[start : start + self.context + 1]
        text, target = window[:-1], window[1:]
        if not self.corrupted[index // self.batch_size]:
            return text, target, torch.tensor(1.0)
        generator = torch.Generator().manual_seed(index)
        noise = torch.randint(len(self.text.characters), target.shape, generator=generator)
        return text, noise, torch.tensor(CORRUPTED_LOSS_SCALE)


class HeldOutSamples(Dataset[Sample]):
    """The held-out text from end to end, never spoilt.

    Args:
        text: Where to read.
        context: Characters of one sample.
    """

    def __init__(self, text: Text, context: int) -> None:
        self.text, self.context = text, context

    def __len__(self) -> int:
        return (len(self.text.held_out) - 1) // self.context

    def __getitem__(self, index: int) -> Sample:
        """As a training sample; the loss always counts once."""
        start = index * self.context
        window = self.text.held_out[start : start + self.context + 1]
        return window[:-1], window[1:], torch.tensor(1.0)
