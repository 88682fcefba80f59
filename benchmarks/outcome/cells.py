"""The cells: a task, an optimizer, a learning rate, and what goes wrong. Chosen, not a product."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from benchmarks.outcome.faults import Fault
from benchmarks.outcome.tasks import TASKS, Half

OptimizerName = Literal["adamw", "sgd", "muon"]
Change = Literal["none", "batch", "restart", "unfreeze"]


@dataclass(frozen=True)
class Cell:
    """One situation to train in. The learning rate rises for a tenth of the run, then falls to 0.

    Attributes:
        task: A name in `TASKS`.
        optimizer: "sgd" has momentum 0.9; "muon" takes hidden matrices, AdamW the rest.
        level: Where the rate lies: "low", "middle", or "high", past where unclipped training ends
            well.
        rate: The highest learning rate.
        why: What this cell can tell.
        fault: What goes wrong.
        change: What changes for good, at half of the run; "unfreeze" at a third of it.
        accumulate: Micro-batches of a step.
        decay: Weight decay of AdamW and Muon.
        beta2: AdamW's.
        eps: AdamW's.
        note: Tells apart cells that differ in decay, beta2 or eps.
    """

    task: str
    optimizer: OptimizerName
    level: Literal["low", "middle", "high"]
    rate: float
    why: str
    fault: Fault = "none"
    change: Change = "none"
    accumulate: int = 1
    decay: float = 0.01
    beta2: float = 0.95
    eps: float = 1e-8
    note: str = ""

    @property
    def name(self) -> str:
        """What tells it apart, such as "gpt_pre-adamw-middle-drift"."""
        accumulated = "accumulated" if self.accumulate > 1 else ""
        special = [
            x for x in (self.fault, self.change, accumulated, self.note) if x and x != "none"
        ]
        return "-".join([self.task, self.optimizer, self.level, *special])

    @property
    def half(self) -> Half:
        """The half of its task."""
        return TASKS[self.task].half

    @property
    def family(self) -> str:
        """Cells of one family differ in nothing but the rate."""
        return replace(self, level="low", rate=0, why="").name


CHOSEN = (
    # Tuning half.
    Cell("gpt_pre", "adamw", "low", 2e-3, "a language model as most train it: the false alarms"),
    Cell("gpt_pre", "adamw", "middle", 1e-2, "near the best rate"),
    Cell("gpt_pre", "adamw", "high", 0.1, "attention without normalised queries, past the edge"),
    Cell("gpt_pre", "muon", "high", 0.3, "Muon past the edge"),
    Cell("gpt_pre", "adamw", "middle", 1e-2, "broken files in the data", "corrupted"),
    Cell("gpt_pre", "adamw", "middle", 1e-2, "Adam must follow a growing loss", "drift"),
    Cell("gpt_pre", "adamw", "high", 3e-2, "AdaGC's trigger", beta2=0.999, eps=1e-15, note="eps"),
    Cell("gpt_pre", "adamw", "middle", 1e-2, "the second rise must not be cut", change="restart"),
    Cell(
        "gpt_pre", "adamw", "middle", 1e-2, "one bad micro-batch of four", "corrupted", accumulate=4
    ),
    Cell("lstm", "sgd", "low", 0.5, "Pascanu's case, tame"),
    Cell("lstm", "sgd", "middle", 5.0, "Pascanu's case, near the best rate"),
    Cell("lstm", "sgd", "high", 40.0, "gradients that explode through time"),
    Cell("lstm", "adamw", "middle", 3e-2, "NaN batches", "nan"),
    Cell("lstm", "adamw", "middle", 3e-2, "tails that have no variance", "heavy"),
    Cell("signals", "sgd", "low", 0.02, "clean classification: nothing to guard"),
    Cell("signals", "sgd", "middle", 0.1, "clean, near the best rate"),
    Cell("signals", "sgd", "high", 0.3, "past the edge"),
    Cell("signals", "sgd", "middle", 0.1, "broken batches under SGD move far", "corrupted"),
    Cell("signals", "sgd", "middle", 0.1, "with SGD a growing loss is a growing rate", "drift"),
    Cell("signals", "sgd", "middle", 0.1, "norms fall by half for good", change="batch"),
    Cell("signals", "adamw", "middle", 1e-2, "overflows of a loss scale", "fp16"),
    Cell("regression", "sgd", "low", 1e-3, "theory's case: tails without variance, low rate"),
    Cell("regression", "sgd", "middle", 1e-2, "the same, near the best rate"),
    Cell("regression", "sgd", "high", 0.1, "the same, past the edge"),
    Cell("regression", "adamw", "middle", 3e-3, "the same under Adam"),
    # Reporting half.
    Cell("gpt_post", "adamw", "low", 2e-3, "post-norm, tame"),
    Cell("gpt_post", "adamw", "middle", 1e-2, "post-norm, near the best rate"),
    Cell("gpt_post", "adamw", "high", 0.015, "post-norm, unstable by nature"),
    Cell("gpt_post", "muon", "middle", 1e-2, "Muon, one batch that ruins all", "catastrophe"),
    Cell("gpt_post", "adamw", "middle", 1e-2, "norms rise at the end", decay=3.0, note="decay"),
    Cell("moe", "adamw", "middle", 1e-2, "experts with rare gradients"),
    Cell("moe", "adamw", "high", 0.1, "routers past the edge"),
    Cell("moe", "muon", "middle", 1e-2, "Muon, broken files in the data", "corrupted"),
    Cell("moe", "adamw", "middle", 1e-2, "one bad micro-batch of four", "corrupted", accumulate=4),
    Cell("lora", "adamw", "low", 2e-3, "the commonest fine-tuning"),
    Cell("lora", "adamw", "middle", 1e-2, "the same, near the best rate"),
    Cell("lora", "adamw", "high", 0.1, "the same, past the edge"),
    Cell("lora", "adamw", "middle", 1e-2, "NaN batches while tuning", "nan"),
    Cell("resnet", "sgd", "low", 5e-3, "AGC's home: no normalisation, tame"),
    Cell("resnet", "sgd", "middle", 3e-2, "near the best rate"),
    Cell("resnet", "sgd", "high", 0.3, "past the edge"),
    Cell("resnet", "sgd", "middle", 3e-2, "one batch that ruins all", "catastrophe"),
    Cell("resnet", "sgd", "middle", 3e-2, "with SGD a growing loss is a growing rate", "drift"),
    Cell("resnet", "sgd", "middle", 3e-2, "norms jump when layers join", change="unfreeze"),
    Cell("resnet", "adamw", "middle", 5e-3, "tails that have no variance", "heavy"),
    Cell("cartpole", "adamw", "middle", 2e-3, "rewards are noisy and norms fall a lot"),
    Cell("cartpole", "adamw", "middle", 2e-3, "rewards on a growing scale", "drift"),
    Cell("cartpole", "sgd", "middle", 3e-3, "a policy that one step can ruin"),
    Cell("cartpole", "sgd", "high", 0.03, "the same, past the edge"),
)
CELLS: Mapping[str, Cell] = {cell.name: cell for cell in CHOSEN}
"""Every cell by name."""

QUICK = (
    *("gpt_pre-adamw-middle-corrupted", "signals-sgd-high", "regression-sgd-middle"),
    *("resnet-sgd-middle-drift", "cartpole-adamw-middle"),
)
"""Cells of `--quick`."""
