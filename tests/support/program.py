"""A small training program: a model, an optimizer, perhaps a scaler, and their clipper."""

import torch
from torch.amp.grad_scaler import GradScaler
from torch.nn.utils import parameters_to_vector

from gradclip import GradientClipper
from support.gradients import small_model


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


def fused_adamw(parameters):
    return torch.optim.AdamW(parameters, lr=0.01, fused=True)


class Program:
    """Trains `small_model` on batches that follow from a seed, and clips as one script would.

    Args:
        clip: What the clipper is built from. At stage "after_backward" each step makes two
            micro-batches of half its loss.
        make: Builds the optimizer from the parameters.
        call: "called" or "attached", each perhaps followed by " after unscale_".
        scale: What a GradScaler begins with; None for no scaler.
        told: Whether the clipper knows the scaler.
        dtype: Of parameters and inputs.
        **options: Of `GradientClipper`.
    """

    def __init__(
        self,
        clip,
        make=sgd,
        *,
        call="called",
        scale=None,
        told=True,
        dtype=torch.float32,
        **options,
    ):
        self.model = small_model().to(dtype)
        self.optimizer = make(self.model.parameters())
        self.scaler = None if scale is None else GradScaler("cpu", init_scale=scale)
        scaler = self.scaler if told else None
        named = list(self.model.named_parameters())
        self.clipper = GradientClipper(clip, named, self.optimizer, scaler=scaler, **options)
        self.call, self.dtype = call, dtype
        self.handle = self.clipper.attach(self.optimizer) if call.startswith("attached") else None

    def backward(self, seed, size=1.0):
        """Add this batch's gradients, `size` times as large, to what is there."""
        inputs = torch.randn(16, 4, generator=torch.Generator().manual_seed(seed))
        loss = self.model(inputs.to(self.dtype)).square().mean() * size
        loss = loss if self.scaler is None else self.scaler.scale(loss)
        if self.clipper.config.stage == "step":
            loss.backward()
            return
        for _ in range(2):
            with self.clipper.micro_batch(loss=loss.detach(), share=0.5):
                (loss / 2).backward(retain_graph=True)

    def finish(self):
        """Clip and step; returns the step's record."""
        if self.call.endswith("unscale_"):
            self.scaler.unscale_(self.optimizer)
        if self.call.startswith("called"):
            self.clipper.clip()
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        return self.clipper.last_record

    def step(self, seed, size=1.0):
        """One whole step; returns its record."""
        self.optimizer.zero_grad()
        self.backward(seed, size)
        return self.finish()

    def fill(self, value):
        """Set every element of every gradient."""
        for p in self.model.parameters():
            p.grad = torch.full_like(p, value)

    @property
    def counts(self):
        return self.clipper.state_dict()["counts"]

    @property
    def grads(self):
        """Copies, one per parameter."""
        return [p.grad.clone() for p in self.model.parameters()]

    @property
    def weights(self):
        """A copy of all parameters as one vector."""
        return parameters_to_vector(self.model.parameters()).detach()
