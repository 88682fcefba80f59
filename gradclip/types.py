"""What the parts of a clipping step hand to each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from gradclip.saved import Range

__all__ = [
    "Beginning",
    "Collected",
    "Decides",
    "Decision",
    "Edit",
    "Elementwise",
    "Given",
    "Grads",
    "Handle",
    "Kernel",
    "Known",
    "Layout",
    "Measurable",
    "Memory",
    "Region",
    "Scope",
    "State",
    "Stats",
    "Step",
    "UnitSpan",
    "Units",
    "Verdict",
]

Scope = Literal["global", "group", "parameter", "unit"]
"""What one coefficient covers: all parameters, an optimizer's parameter group, one parameter, or
one unit of a parameter: a row of a matrix, a filter of a convolution, a whole vector."""

State = dict[str, Tensor]
"""A policy's memory: a flat mapping of names to tensors whose last dim is the policy's slots."""

Memory = dict[str, Tensor]
"""What an element policy remembers of elements, by name, of the shape of their gradient."""

Grads = Sequence[list[Tensor]]
"""Local gradient tensors, one list per slot. A slot is what one coefficient covers."""


@dataclass(frozen=True, slots=True)
class Region:
    """A part of a parameter: a box of it, or an interval of its elements in memory order.

    Attributes:
        shape: Of the whole parameter.
        start: Offset of the box in each dim.
        size: Of the box in each dim; 0 somewhere if this rank holds nothing.
        interval: First element and the one after the last, of the flattened parameter; the part
            is then one-dimensional and `start` and `size` say nothing.
    """

    shape: tuple[int, ...]
    start: tuple[int, ...]
    size: tuple[int, ...]
    interval: tuple[int, int] | None = None

    @classmethod
    def whole(cls, shape: tuple[int, ...]) -> Region:
        """All of it."""
        return cls(shape, (0,) * len(shape), shape)

    @classmethod
    def between(cls, shape: tuple[int, ...], first: int, stop: int) -> Region:
        """Some elements in a row."""
        return cls(shape, (), (), (first, max(first, stop)))

    def of(self, whole: Tensor) -> Tensor:
        """This part of a whole parameter-shaped tensor, as a view of it if that is contiguous."""
        if self.interval is not None:
            first, stop = self.interval
            return whole.reshape(-1)[first:stop]
        for dim, (start, size) in enumerate(zip(self.start, self.size, strict=True)):
            whole = whole.narrow(dim, min(start, whole.shape[dim]), size)
        return whole


class UnitSpan(NamedTuple):
    """What a local tensor says of units, which it holds wholly or in part.

    Attributes:
        unit_dims: The dims that tell units apart, from the first up to but without the second; the
            others lie within a unit. (0, 0) is one unit.
        start: Index of the first of them among all units.
        units: How many they are.
        row: Elements of each that are here.
    """

    unit_dims: tuple[int, int]
    start: int
    units: int
    row: int


@dataclass(frozen=True, slots=True)
class Units:
    """Local gradients cut into units, in place of one list per slot.

    Attributes:
        tensors: Those on this rank.
        spans: What each of them holds, by rising index; each unit is in one of them at most.
        count: All units, also of those only other ranks hold.
        device: Where measures of them are wanted.
    """

    tensors: Sequence[Tensor]
    spans: Sequence[UnitSpan]
    count: int
    device: torch.device

    def __iter__(self) -> Iterator[tuple[Tensor, UnitSpan]]:
        """Each tensor and what it holds."""
        return zip(self.tensors, self.spans, strict=True)


@dataclass(frozen=True, slots=True)
class Collected:
    """This step's gradients as this rank holds them.

    Attributes:
        all: Every local gradient, to be written.
        counted: Those this rank adds to the norm. They differ from `all` where a parameter is
            replicated over a sharded axis: one rank counts it.
    """

    all: Grads
    counted: Grads


@dataclass(frozen=True, slots=True)
class Stats:
    """What a policy sees: reduced, equal on every rank.

    Numbers of the host stand for tensors where the host decides, if the policy takes them.

    Attributes:
        norms: Shape (slots,), float64. The p-norm of each of the policy's slots, after the
            policies before it and before this one.
        finite: 0-d bool. Every gradient element of the step, on every rank, is finite.
        step: 0-d float64. Optimizer steps taken before this one.
        sizes: Shape (slots,), float64: elements of each slot; None unless the policy asks.
        weights: Shape (slots,), float64: the p-norm of each slot's parameters; None unless the
            policy asks.
        rate: 0-d float64: how far the optimizer's steps move a parameter in all, beside the
            gradient that moves it. None where they don't grow with the gradient (Adam, Lion, Muon),
            where no optimizer is known, and unless the policy asks.
        loss: 0-d float64, the mean over ranks; None where the caller gave none.
        share: What the norms were divided by. A limit that the user gives is a norm of the
            gradients as they are, so a policy divides it by `share` too.
    """

    norms: Tensor
    finite: Tensor
    step: Tensor
    sizes: Tensor | None = None
    weights: Tensor | None = None
    rate: Tensor | None = None
    loss: Tensor | None = None
    share: float = 1.0


@dataclass(frozen=True, slots=True)
class Decision:
    """What a policy answers.

    Attributes:
        coef: Shape (slots,), float64, in (0, 1]. Gradients are multiplied by it.
        limit: Shape (slots,), float64. The norm each slot was held to, inf for none.
        skip: 0-d bool, True to withhold the optimizer step; None if this policy never does.
        stop: 0-d bool, True to raise an error instead, where `skip` is True too; None if never.
        changes: Shape (slots,), bool: some element of the slot will be changed by itself; None
            for a policy that isn't element-wise.
        elements: Numbers of shape (slots,), float64, that an element policy clips with.
    """

    coef: Tensor
    limit: Tensor
    skip: Tensor | None = None
    stop: Tensor | None = None
    changes: Tensor | None = None
    elements: tuple[Tensor, ...] = ()


class Decides(Protocol):
    """What a step asks of a policy (`gradclip.policies.base.Policy`)."""

    @property
    def type(self) -> str:
        """What YAML calls it."""
        ...

    @property
    def after(self) -> int:
        """Optimizer steps before it exists."""
        ...

    @property
    def measured(self) -> tuple[Scope, float | None]:
        """The scope and the p of the norm that it decides on; None if it needs no norm."""
        ...

    @property
    def counters(self) -> frozenset[str]:
        """State that also moves on a step that is withheld or not finite."""
        ...

    @property
    def withholds(self) -> bool:
        """Whether it can withhold a step."""
        ...

    @property
    def uses_weights(self) -> bool:
        """Whether it needs the norms of the parameters themselves."""
        ...

    @property
    def uses_sizes(self) -> bool:
        """Whether it needs the number of elements of each slot."""
        ...

    @property
    def uses_rate(self) -> bool:
        """Whether it needs the optimizer's rate, and with it norms and sizes of parameters."""
        ...

    @property
    def watches_loss(self) -> bool:
        """Whether it needs the loss."""
        ...

    @property
    def ranges(self) -> Mapping[str, Range]:
        """What each entry of its state, and of its memory of elements, may hold when loaded."""
        ...

    def contradictions(self, state: State) -> Mapping[str, Tensor]:
        """By what is wrong with a state, the slots for which it is."""
        ...

    def init(self, slots: int, device: torch.device) -> State:
        """The state before the first step."""
        ...

    def decide(self, stats: Stats, state: State) -> tuple[Decision, State]:
        """This step's decision and the state after it."""
        ...


class Elementwise(Protocol):
    """The part of an element policy that works on elements (`gradclip.policies.elements`)."""

    memory: ClassVar[tuple[str, ...]]
    probes: ClassVar[bool]
    clamps: ClassVar[bool]

    @property
    def saves(self) -> bool:
        """Whether the memory of elements is part of the saved state."""
        ...

    @property
    def borrows(self) -> str | None:
        """What the optimizer may have that stands for the first memory."""
        ...

    def probe(self, grad: Tensor, memory: Memory) -> Tensor:
        """What to measure before deciding."""
        ...

    def clip(
        self, grad: Tensor, memory: Memory, values: tuple[Tensor, ...]
    ) -> tuple[Tensor, Memory]:
        """A part of a gradient as it shall be, and the memory after it."""
        ...


@dataclass(frozen=True, slots=True)
class Edit:
    """What an element policy does to elements this step.

    Attributes:
        policy: What clips.
        key: Of the policy's rule.
        slots: Indices of the plan's slots that it may change.
        values: What it clips with, each of shape (plan's slots,), float64.
        changes: Shape (plan's slots,), bool: some element of the slot changes.
        learns: 0-d bool, memory takes this step in.
    """

    policy: Elementwise
    key: tuple[int, int]
    slots: tuple[int, ...]
    values: tuple[Tensor, ...]
    changes: Tensor
    learns: Tensor


@dataclass(frozen=True, slots=True)
class Verdict:
    """What all policies together decided about one step.

    Attributes:
        coef: Shape (measured slots,), float64, in (0, 1].
        limit: 0-d float64, the tightest limit any slot was held to.
        finite: 0-d bool, every gradient element on every rank is finite.
        skip: 0-d bool; None if nothing configured can withhold a step.
        stop: 0-d bool, an error is wanted instead; None if nothing configured ever does.
        keeps: 0-d bool, the step is finite and no policy withholds it.
        edits: What element policies do, in order.
        withheld: `skip`, read on the host; False until it is.
    """

    coef: Tensor
    limit: Tensor
    finite: Tensor
    skip: Tensor | None
    stop: Tensor | None
    keeps: Tensor
    edits: tuple[Edit, ...] = ()
    withheld: bool = False

    @property
    def edited(self) -> Tensor:
        """0-d bool, some element is changed by itself; only where there are edits."""
        return torch.cat([edit.changes for edit in self.edits]).any()


class Known(NamedTuple):
    """A verdict where the host decided, in its own numbers.

    Attributes:
        norm: The recorded norm of all gradients.
        limit: As in `Verdict`.
        coef: The only one.
        finite: As in `Verdict`.
        skip: As in `Verdict`.
    """

    norm: float
    limit: float
    coef: float
    finite: bool
    skip: bool | None


@dataclass(frozen=True, slots=True)
class Given:
    """What the caller knows of the gradients that are in place.

    Attributes:
        grad_scale: 0-d factor that they still carry; None for none.
        loss: 0-d float64, equal on every rank; None where nobody watches it.
        share: Batches that were accumulated, as a share of those of a full window.
        batch: Index of the last batch; None if unknown.
        on_nonfinite: What a NaN or infinite gradient means: the step is withheld, an error, or
            taken as it is.
        in_step: The optimizer's step is under way, so nobody reads gradients before it does.
        scaler_steps: A `GradScaler` makes the step, and looks at the gradients before it.
    """

    grad_scale: Tensor | None = None
    loss: Tensor | None = None
    share: float = 1.0
    batch: int | None = None
    on_nonfinite: Literal["skip", "raise", "ignore"] = "skip"
    in_step: bool = False
    scaler_steps: bool = False


@dataclass(frozen=True, slots=True)
class Step:
    """What one look found.

    Attributes:
        given: What the caller knew.
        grads: This rank's gradients.
        norms: Float64 of shape (measured slots or units,): the recorded norm, without a loss
            scale.
        verdict: What the policies decided.
        states: The states of the policies after it, in the order of the plan's rules.
        has_gradient: Bool, equal on every rank: some rank has a gradient, of zeros or not. A 0-d
            tensor where ranks hold parts.
        measure_each: Gives the norm of each parameter, float64 of shape (parameters,): one more
            read of the gradients, and a message where ranks share them. Every rank calls it.
        update: Float64 of shape (2,): the norms of what an earlier step changed, and of the
            parameters before it; 0 if no step was measured, None where its norm needs no message.
        known: The verdict in numbers; None where a device decided.
    """

    given: Given
    grads: Collected
    norms: Tensor
    verdict: Verdict
    states: Sequence[State]
    has_gradient: Tensor | bool
    measure_each: Callable[[], Tensor]
    update: Tensor | None
    known: Known | None = None


class Beginning(NamedTuple):
    """What a step began with, for gradients that are made again in the same step.

    Attributes:
        states: Of the policies, in the order of the plan's rules.
        taken: Float64, the optimizer steps taken before it: 0-d on the device.
    """

    states: Sequence[State]
    taken: Tensor | float


class Layout(Protocol):
    """Geometry: which ranks hold what, and how their measures combine."""

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """Where local gradients are; measures, decisions and records live on the first.

        That is the CPU, with or without gradients, if the first of theirs has no float64.
        """
        ...

    @property
    def reduces(self) -> bool:
        """Whether `sum` and `max` send messages: other ranks hold other gradients."""
        ...

    def collect(self, slots: Sequence[Sequence[Tensor]]) -> Collected:
        """Take the local part of `.grad` of each slot's parameters, without a copy."""
        ...

    def weights(self, slots: Sequence[Sequence[Tensor]]) -> Collected:
        """Take the local part of each parameter itself, as `collect` does of its gradient."""
        ...

    def sizes(self, slots: Sequence[Sequence[Tensor]]) -> Tensor:
        """Elements of each slot over all ranks, float64 of shape (slots,)."""
        ...

    def region(self, name: str, parameter: Tensor) -> Region:
        """Where the local part of a parameter lies in it."""
        ...

    def held(self, parameter: Tensor) -> list[Tensor]:
        """The local parts of one gradient, without a collective; none if there is no gradient."""
        ...

    def local_part(self, tensor: Tensor) -> Tensor:
        """What this rank holds of a tensor that lies as a parameter does."""
        ...

    def sum(self, values: Tensor) -> Tensor:
        """Add float64 values of shape (n,) over the ranks that hold other parts."""
        ...

    def max(self, values: Tensor) -> Tensor:
        """Take the largest of float64 values of shape (n,) over the same ranks; NaN wins."""
        ...


class Kernel(Protocol):
    """Arithmetic on one device's local gradients; non-finite elements show in every result.

    A slot of `Units` is a unit.

    Attributes:
        reads_block: Reading a value on the host waits for the device, so nothing is read that
            needn't be.
    """

    reads_block: bool

    def peaks(self, grads: Grads | Units) -> Tensor:
        """Largest |g| of each slot, float64 of shape (slots,); 0 for an empty slot."""
        ...

    def power_sums(
        self, grads: Grads | Units, norm_type: float, scale: Tensor | None = None
    ) -> Tensor:
        """Sum of |scale * g|^p of each slot, float64 of shape (slots,), p finite."""
        ...

    def scale_(self, grads: Grads | Units, coef: Tensor) -> None:
        """Multiply each slot's gradients in place by its coefficient, coef of shape (slots,)."""
        ...

    def clamp_(self, grads: list[Tensor], limit: float | Tensor) -> None:
        """Clamp elements in place to [-limit, limit]; NaN stays NaN."""
        ...


class Measurable(Protocol):
    """What measures itself with a kernel: elements that are made when they are needed."""

    def peaks(self, kernel: Kernel) -> Tensor:
        """As `Kernel.peaks` of the elements."""
        ...

    def power_sums(self, kernel: Kernel, norm_type: float, scale: Tensor | None = None) -> Tensor:
        """As `Kernel.power_sums` of the elements."""
        ...


class Handle(Protocol):
    """What undoes something."""

    def remove(self) -> None:
        """Undo it."""
        ...
