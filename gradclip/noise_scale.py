"""A statistic for choosing the batch size: how noisy gradients are beside their mean."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from gradclip.errors import ConfigError
from gradclip.kernels import KernelName, kernel_for
from gradclip.layouts import ProcessGroup, refuse_sparse, replicated
from gradclip.records import ClipRecord

__all__ = ["NoiseScale"]

READY = 0.1
"""Share of the full weight that observations need before an estimate is shown."""


class NoiseScale:
    """The gradient noise scale: the batch size beyond which averaging more samples gains little.

    A step's gradient is the mean of J = B / b gradients of micro-batches (b = `small_batch`,
    B = `large_batch`), over accumulation, over ranks under DDP, or both. With A the mean of their
    squared 2-norms and C the squared 2-norm of their mean,

    - |G|^2 = (B C - b A) / (B - b) estimates the squared norm of the true gradient,
    - S = (A - C) / (1/b - 1/B) estimates the trace of the covariance of one sample's gradient,

    both without bias. Each gets a running mean, m' = decay * m + (1 - decay) * x, corrected by
    1 - decay^t for t observations (a running product), and B_simple = S / |G|^2 is the ratio of
    the running means, never a mean of ratios.

    Hooks see the gradient of every micro-batch before it is accumulated and before DDP reduces
    it; they add its squares to one float64 on its device and keep nothing else. Call `update`
    once for every optimizer step, after clipping.

    State: three float64, the two running means and the product. All of it is restored; since
    neither mean depends on the batch size, another one, or another world size, may go on from it.

    Ranks: one message of 8 bytes for each step under DDP, none otherwise; equal on every rank.

    Departures: k-diffusion's GradientNoiseScale (the equations' reference) has no bias
    correction in its ratio, where it cancels, and divides by at least 1e-8; here a |G|^2 that
    isn't positive yet gives inf. A step that isn't finite, is withheld or has no gradient
    leaves no trace, nor does one with another number of micro-batches (the last of an epoch).

    References: McCandlish, Kaplan, Amodei and the OpenAI Dota Team, "An Empirical Model of
    Large-Batch Training", https://arxiv.org/abs/1812.06162 (2018).

    Args:
        parameters: The same as the clipper's whose records are given to `update`. Build it after
            the process group was started.
        small_batch: Samples (or tokens) in the gradient of one micro-batch on one rank.
        large_batch: Samples (or tokens) of a whole optimizer step, over all ranks; a multiple of
            `small_batch`, at least twice it.
        decay: Weight of the past in the running means.
        loss_divided_by: What the loss of a micro-batch is divided by before backward, as the
            number of micro-batches a step by Lightning and Accelerate.
        process_group: The ranks that DDP averages over; all ranks if not given.
        kernel: "cpu", "accelerator" or "reference"; chosen by the device if not given.

    Raises:
        ConfigError: If the batch sizes don't fit each other and the ranks.
        LayoutError: If parameters are sharded, since hooks don't see their gradients.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
        >>> sizes = {"small_batch": 1, "large_batch": 2, "loss_divided_by": 2.0}
        >>> noise = NoiseScale([weight], decay=0.5, **sizes)
        >>> for sample in torch.tensor([[1.0, 0.0], [1.0, 1.0]]).double():
        ...     (weight @ sample / 2).backward()
        >>> noise.update(weight.grad.norm())
        >>> round(float(noise.gradient_sq), 6), round(float(noise.variance), 6)
        (1.0, 0.5)
    """

    def __init__(
        self,
        parameters: Iterable[Parameter],
        *,
        small_batch: int,
        large_batch: int,
        decay: float = 0.99,
        loss_divided_by: float = 1.0,
        process_group: ProcessGroup | None = None,
        kernel: KernelName | None = None,
    ) -> None:
        held = [parameter for parameter in parameters if parameter.requires_grad]
        named = {f"parameter {index}": parameter for index, parameter in enumerate(held)}
        self._layout, self._ranks = replicated(named, process_group)
        _check(small_batch, large_batch, self._ranks)
        if not held or not 0 < decay < 1 or not 0 < loss_divided_by < float("inf"):
            msg = (
                f"NoiseScale got {len(held)} parameters that need a gradient, decay {decay} and "
                f"loss_divided_by {loss_divided_by}; allowed: at least one parameter (a generator "
                "may have been used up), a decay between 0 and 1, and a finite divisor above 0."
            )
            raise ConfigError(msg)
        self.small_batch, self.large_batch, self.decay = small_batch, large_batch, decay
        self.loss_divided_by = loss_divided_by
        self._each = large_batch // small_batch // self._ranks
        self._kernel_name = kernel
        self._sums: dict[torch.device, Tensor] = {}
        self._calls = [0] * len(held)
        self._matched = False
        nothing = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
        self._state = nothing.to(self._layout.devices[0])
        self._hooks = [
            parameter.register_hook(functools.partial(self._see, index))
            for index, parameter in enumerate(held)
        ]

    @torch.no_grad()
    def update(self, norm: ClipRecord | Tensor, *, grad_scale: Tensor | float = 1.0) -> None:
        """Take in an optimizer step. Every rank must call it for every step, after clipping.

        Args:
            norm: The record of the step, or its gradient's 2-norm before clipping and without a
                loss scale, a 0-d tensor that is equal on every rank.
            grad_scale: The loss scale during backward, a number or a 0-d tensor.

        Raises:
            ConfigError: If the record's norm isn't a 2-norm, or the very first step has another
                number of micro-batches than the batch sizes say.
        """
        counted, total = max(self._calls), self._taken()
        skipped: Tensor | None = None
        if isinstance(norm, ClipRecord):
            if norm.norm_type != 2.0:
                msg = (
                    f"update got a record of the {norm.norm_type}-norm, and the noise scale needs "
                    "the 2-norm; put a policy with norm_type 2 first, or pass the 2-norm itself."
                )
                raise ConfigError(msg)
            skipped, norm = norm.skipped, norm.grad_norm
        if counted != self._each:
            total = total * torch.nan  # which every rank then sees
        total = self._layout.sum(total.unsqueeze(0)).squeeze(0).to(norm.device)
        self._stop_if_never(counted)
        scale = grad_scale.double() if isinstance(grad_scale, Tensor) else grad_scale
        small_sq = total * (self.loss_divided_by / scale) ** 2 / (self._each * self._ranks)
        large_sq = (norm.double() * (self.loss_divided_by / self._each)).square()
        taken = torch.isfinite(small_sq) & torch.isfinite(large_sq) & (small_sq > 0)
        if skipped is not None:
            taken = taken & skipped.logical_not()
        self._observe(small_sq, large_sq, taken)

    def _observe(self, small_sq: Tensor, large_sq: Tensor, taken: Tensor) -> None:
        b, big = self.small_batch, self.large_batch
        gradient_sq = (big * large_sq - b * small_sq) / (big - b)
        variance = (small_sq - large_sq) / (1 / b - 1 / big)
        state = self._state.to(small_sq.device)
        seen = torch.stack([gradient_sq, variance, torch.zeros_like(variance)])
        self._state = torch.where(taken, self.decay * state + (1 - self.decay) * seen, state)

    @property
    def gradient_sq(self) -> Tensor:
        """|G|^2, the squared norm of the true gradient, 0-d float64; nan until `READY`."""
        return self._mean(0)

    @property
    def variance(self) -> Tensor:
        """S, the trace of the covariance of one sample's gradient, 0-d float64."""
        return self._mean(1)

    @property
    def scale(self) -> Tensor:
        """B_simple = S / |G|^2 in samples (or tokens), 0-d float64; inf while |G|^2 <= 0."""
        return self.variance.clamp(min=0.0) / self.gradient_sq.clamp(min=0.0)

    def as_metrics(self) -> dict[str, Tensor]:
        """Float64 0-d tensors by metric key, on the device, equal on every rank.

        Returns:
            `clip/noise_scale` (B_simple), `clip/noise` (S) and `clip/gradient_sq` (|G|^2); nan
            until the observations have a tenth of their full weight (11 of them at 0.99).
        """
        return {
            "clip/noise_scale": self.scale,
            "clip/noise": self.variance,
            "clip/gradient_sq": self.gradient_sq,
        }

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors; loads with `torch.load(weights_only=True)`."""
        names = ("gradient_sq", "noise", "product")
        return dict(zip(names, self._state.clone().unbind(), strict=True))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict`, saved with any batch and world size."""
        values = [state[name] for name in ("gradient_sq", "noise", "product")]
        self._state = torch.stack([torch.as_tensor(v) for v in values]).to(self._state)

    def remove(self) -> None:
        """Take the hooks off the parameters."""
        for hook in self._hooks:
            hook.remove()

    @torch.no_grad()
    def _see(self, index: int, grad: Tensor) -> None:
        refuse_sparse([(f"parameters[{index}]", grad)], "hooks see it before its rows are added")
        kernel = kernel_for([grad.device], self._kernel_name)
        squares = kernel.power_sums([[grad.detach()]], 2.0).squeeze(0)
        before = self._sums.get(grad.device)
        self._sums[grad.device] = squares if before is None else before + squares
        self._calls[index] += 1

    def _taken(self) -> Tensor:
        """This rank's sum of squares since the last step, on its first device."""
        home = self._layout.devices[0]
        total = torch.zeros((), dtype=torch.float64, device=home)
        for part in self._sums.values():
            total = total + part.to(home)
        self._sums, self._calls = {}, [0] * len(self._calls)
        return total

    def _mean(self, index: int) -> Tensor:
        weight = 1 - self._state.select(0, 2)
        return torch.where(weight > READY, self._state.select(0, index) / weight, torch.nan)

    def _stop_if_never(self, counted: int) -> None:
        self._matched |= counted == self._each
        if not self._matched:
            msg = (
                f"NoiseScale has small_batch {self.small_batch} and large_batch "
                f"{self.large_batch}, so {self._each} micro-batches a step on each of "
                f"{self._ranks} ranks, and its hooks saw {counted}. Give the batch sizes of one "
                "backward on one rank and of a whole step, and build it after wrapping the model "
                "and starting the process group."
            )
            raise ConfigError(msg)


def _check(small: int, large: int, ranks: int) -> None:
    whole = 0 < small < large and large % small == 0
    if not whole or large // small % ranks:
        msg = (
            f"NoiseScale got small_batch {small} and large_batch {large} on {ranks} ranks; "
            "allowed: a large_batch of 2, 3, ... times the small_batch, the same number of "
            "small ones on every rank. With a single micro-batch a step on one rank there is "
            "nothing to compare: accumulate gradients over two."
        )
        raise ConfigError(msg)
