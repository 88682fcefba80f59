"""What one training run leaves behind, as a JSON file."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gradclip import ClipRecord


@dataclass
class Run:
    """Numbers per step, and the outcome.

    Attributes:
        loss: Training loss of each step, before a corrupted batch multiplies it.
        corrupted: Whether the step's batch was spoilt.
        grad_norm: Norm of all gradients before clipping.
        clipped_norm: The same afterwards.
        limit: The limit of the step; infinite if there was none.
        clip_rate: Share of the steps whose gradients were clipped.
        validation_loss: On held-out text, after the last step.
        seconds: Training time.
    """

    loss: list[float] = field(default_factory=list)
    corrupted: list[bool] = field(default_factory=list)
    grad_norm: list[float] = field(default_factory=list)
    clipped_norm: list[float] = field(default_factory=list)
    limit: list[float] = field(default_factory=list)
    clip_rate: float = 0.0
    validation_loss: float = float("nan")
    seconds: float = 0.0

    def add(self, loss: float, corrupted: bool, record: ClipRecord) -> None:
        """Remember one step."""
        self.loss.append(loss)
        self.corrupted.append(corrupted)
        self.grad_norm.append(float(record.grad_norm))
        self.clipped_norm.append(float(record.clipped_norm))
        self.limit.append(float(record.limit))
        self.clip_rate = float(record.clip_rate)

    def save(self, path: Path) -> None:
        """Write it, making the folder if need be."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Run:
        """Read what `save` wrote."""
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return cls(**content)

    @classmethod
    def from_lines(cls, path: Path) -> Run:
        """Read what an Accelerate run logged through `JsonLines`."""
        run = cls()
        for line in path.read_text(encoding="utf-8").splitlines():
            values = json.loads(line)
            if "loss" in values:
                run.loss.append(values["loss"])
                run.corrupted.append(values["scale"] > 1)
                run.grad_norm.append(values["grad_norm"])
            run.clip_rate = values.get("clip/clip_rate", run.clip_rate)
            run.validation_loss = values.get("validation_loss", run.validation_loss)
            run.seconds = values.get("seconds", run.seconds)
        return run
