"""Elements one by one: what is measured of them, what they become, what is remembered of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradclip.devices import has_float64, moved
from gradclip.plan.plan import Plan, Rule
from gradclip.saved import read_mapping, read_numbers
from gradclip.tensors import aligned_chunks, refuse_sparse
from gradclip.types import Edit, Elementwise, Grads, Kernel, Layout, Measurable, Memory
from gradclip.weak import weak

__all__ = ["ElementMemory", "Key"]

# Elements taken at a time: temporaries of some eight times as many stay within the 2 MiB of a step
# on a CPU, and within 32 MiB on an accelerator, where a launch is dear.
CHUNK_SIZE = {"cpu": 1 << 15, "cuda": 1 << 19}
# Steps to wait for an optimizer's moment before keeping one: it comes with the optimizer's first.
PATIENCE = 20

Key = tuple[tuple[int, int], str]
"""Whose memory: the key of a rule and the name of a slot."""


@dataclass(frozen=True, slots=True)
class _Held:
    """Memory of one local gradient; the optimizer's is divided by its bias and never written."""

    tensors: Memory
    bias: Tensor | float | None = None


class ElementMemory:
    """The memory of all element policies on this rank, and the work on elements.

    Args:
        plan: Whose slots are one parameter each, where a policy remembers anything.
        layout: How the parameters lie.
        optimizer: Whose state may stand for a memory.
        before: What is remembered so far, by a plan that this one replaces.
    """

    def __init__(
        self, plan: Plan, layout: Layout, optimizer: Any, before: ElementMemory | None = None
    ) -> None:
        self._plan = plan
        self._layout = layout
        # Its state and groups are other objects after each `load_state_dict`.
        self._optimizer = weak(optimizer if hasattr(optimizer, "state") else None)
        groups = () if self._optimizer() is None else optimizer.param_groups
        self._group_of = {p: i for i, group in enumerate(groups) for p in group["params"]}
        self._own: dict[Key, Memory] = {} if before is None else before._own
        self._missed: dict[Key, int] = {}
        self._undivided = _needed_whole(plan)

    def probes(self, grads: Grads, scale: Tensor | None) -> dict[int, Measurable]:
        """What policies decide on in place of the gradients, by index of their rule.

        Args:
            grads: Those this rank counts, one list per slot.
            scale: 0-d factor that they still carry.

        Raises:
            LayoutError: If a gradient is sparse whose units or elements are told apart.
        """
        held = ((name, grad) for name, p in self._undivided if (grad := p.grad) is not None)
        refuse_sparse(
            held,
            "a policy of scope 'unit', or with a memory of elements, needs every element; "
            "allowed: other scopes, and 'value'",
        )
        return {
            index: _Probe(self, rule, grads, scale)
            for index, rule in enumerate(self._plan.rules)
            if rule.elementwise is not None and rule.elementwise.probes
        }

    def probed(self, rule: Rule, slot: int, grad: Tensor, scale: Tensor | None) -> Iterator[Tensor]:
        """What a policy measures of one local gradient, in chunks."""
        assert rule.elementwise is not None
        held = self._held(rule.key, rule.elementwise, slot, grad)
        for part in _parts(grad, held, scale) if held is not None else ():
            yield rule.elementwise.probe(part.grad, part.memory)

    def edit_(self, edit: Edit, grads: Grads, kernel: Kernel, scale: Tensor | None) -> None:
        """Change elements, and take them in. On a CPU nothing is touched that needn't be.

        Args:
            edit: What to do.
            grads: All local gradients, one list per slot.
            kernel: What clamps.
            scale: 0-d factor that they still carry.
        """
        slots: Sequence[int] = edit.slots
        changes: Sequence[bool | Tensor] = edit.changes.unbind()
        learns: bool | Tensor = edit.learns
        if not kernel.reads_block:
            changes = edit.changes.tolist()
            learns = bool(edit.policy.memory) and bool(edit.learns)
            slots = [slot for slot in slots if changes[slot] or learns]
        if not slots:
            return
        if edit.policy.clamps:
            limit = torch.where(edit.changes, edit.values[0], torch.inf).amin()
            limit = limit if scale is None else limit * scale
            # A CPU clamps twice as fast to a number as to a tensor.
            bound = limit if kernel.reads_block else float(limit)
            kernel.clamp_([grad for slot in slots for grad in grads[slot]], bound)
            return
        values = [value.unbind() for value in edit.values]
        for slot in slots:
            own = tuple(value[slot] for value in values)
            for grad in grads[slot]:
                self._edit_one_(edit, slot, grad, own, changes[slot], learns, scale)

    def _edit_one_(
        self,
        edit: Edit,
        slot: int,
        grad: Tensor,
        values: tuple[Tensor, ...],
        changes: bool | Tensor,
        learns: bool | Tensor,
        scale: Tensor | None,
    ) -> None:
        held = self._held(edit.key, edit.policy, slot, grad)
        if held is None:
            key = (edit.key, self._plan.slot_names[slot])
            self._missed[key] = self._missed.get(key, 0) + 1
            return
        values = tuple(_near(value, grad) for value in values)
        for part in _parts(grad, held, scale):
            new, memory = edit.policy.clip(part.grad, part.memory, values)
            if scale is not None:  # elements that stay keep their bits
                new = torch.where(new == part.grad, part.target, new * _near(scale, grad))
            _write_(part.target, new, changes)
            if held.bias is None:
                for name, value in memory.items():
                    _write_(part.held[name], value, learns)

    def _held(
        self, rule: tuple[int, int], policy: Elementwise, slot: int, grad: Tensor
    ) -> _Held | None:
        """The memory of a local gradient; None if the optimizer's will come with its first step."""
        if not policy.memory:
            return _Held({})
        parameter, key = self._plan.slots[slot][0], (rule, self._plan.slot_names[slot])
        optimizer, betas = self._optimizer(), None
        if policy.borrows is not None and optimizer is not None:
            betas = optimizer.param_groups[self._group_of[parameter]].get("betas")
        if optimizer is not None and betas is not None:
            state = optimizer.state.get(parameter, {})
            if not state and self._missed.get(key, 0) < PATIENCE:
                return None
            moment = state.get(policy.borrows)
            moment = None if moment is None else self._layout.local_part(moment)
            if moment is not None and "step" in state and moment.shape == grad.shape:
                self._own.pop(key, None)
                return _Held({policy.memory[0]: moment}, _bias(betas[1], state["step"]))
        own = self._own.get(key)
        if own is None or next(iter(own.values())).numel() != grad.numel():
            own = {
                name: torch.zeros(grad.numel(), dtype=torch.float32, device=grad.device)
                for name in policy.memory
            }
        own = {name: _near(value, grad) for name, value in own.items()}
        self._own[key] = own
        return _Held({name: value.view(grad.shape) for name, value in own.items()})

    def saved(self, rule: Rule) -> dict[str, dict[str, Tensor]]:
        """Whole tensors of what a policy remembers, put together from all ranks, which all call.

        Returns:
            By parameter and name of the memory, float32 on the layout's first device; empty if
            the policy saves none.
        """
        policy = rule.elementwise
        if policy is None or not policy.saves:
            return {}
        plan, layout = self._plan, self._layout
        device = layout.devices[0]
        names = [plan.slot_names[slot] for slot in rule.covers]
        mine = [(rule.key, name) in self._own for name in names]
        held = layout.max(torch.tensor(mine, dtype=torch.float64, device=device)).tolist()
        found: dict[str, dict[str, Tensor]] = {}
        for slot, name, anywhere in zip(rule.covers, names, held, strict=True):
            if anywhere:
                own = self._own.get((rule.key, name), {})
                found[name] = {kind: self._whole(slot, own.get(kind)) for kind in policy.memory}
        return found

    def _whole(self, slot: int, part: Tensor | None) -> Tensor:
        name, layout = self._plan.slot_names[slot], self._layout
        shape = self._plan.shapes[name]
        whole = torch.zeros(shape, dtype=torch.float32, device=layout.devices[0])
        if part is not None and layout.weights([self._plan.slots[slot]]).counted[0]:
            target = self._plan.regions[name].of(whole)
            target.copy_(part.view(target.shape))
        return layout.sum(whole)

    def loaded(
        self, rule: Rule, saved: object, where: str, device: torch.device
    ) -> dict[Key, Memory]:
        """This rank's parts of what was saved; to be given to `replace` once all is checked.

        Args:
            rule: Whose memory.
            saved: As `saved` gave it.
            where: The entry of the saved state that it is, for errors.
            device: Where to put it.

        Raises:
            ConfigError: If it isn't what a policy remembers of these parameters.
        """
        assert rule.elementwise is not None
        plan, ranges = self._plan, rule.policy.ranges
        names = [plan.slot_names[slot] for slot in rule.covers]
        found: dict[Key, Memory] = {}
        for name, own in read_mapping(saved, where, (), names).items():
            at = f"{where}.{name}"
            for kind, value in read_mapping(own, at, rule.elementwise.memory).items():
                entry = f"{at}.{kind} of {rule.policy.type!r}"
                whole = read_numbers(value, entry, plan.shapes[name], ranges[kind])
                if name in plan.regions:
                    part = plan.regions[name].of(whole).to(device, torch.float32)
                    found.setdefault((rule.key, name), {})[kind] = part.flatten().clone()
        return {key: own for key, own in found.items() if next(iter(own.values())).numel()}

    def take_over(self, before: ElementMemory) -> None:
        """Remember what another one does of these parameters; it forgets that."""
        theirs = {rule.key: rule.policy for rule in before._plan.rules}
        same = {rule.key for rule in self._plan.rules if theirs.get(rule.key) == rule.policy}
        for key in [k for k in before._own if k[0] in same and k[1] in self._plan.slot_names]:
            self._own[key] = before._own.pop(key)

    def replace(self, own: Mapping[Key, Memory]) -> None:
        """Remember this and nothing else."""
        self._own = dict(own)


@dataclass(frozen=True, slots=True)
class _Part:
    """Some elements: the gradient in single precision or better, and the memory of them."""

    target: Tensor
    grad: Tensor
    memory: Memory
    held: Memory


def _needed_whole(plan: Plan) -> list[tuple[str, Tensor]]:
    """The parameters, with names, whose gradients are taken apart by place."""
    remembered = {
        slot
        for rule in plan.rules
        if rule.elementwise is not None and rule.elementwise.memory
        for slot in rule.covers
    }
    return [
        (name, p)
        for index, (name, slot) in enumerate(zip(plan.slot_names, plan.slots, strict=True))
        if plan.unit_map is not None or index in remembered
        for p in slot
    ]


def _parts(grad: Tensor, held: _Held, scale: Tensor | None) -> Iterator[_Part]:
    limit = CHUNK_SIZE.get(grad.device.type, CHUNK_SIZE["cuda"])
    for target, *values in aligned_chunks([grad, *held.tensors.values()], limit):
        part = _single(target) if scale is None else _single(target) / _near(scale, target)
        own = dict(zip(held.tensors, values, strict=True))
        memory = own
        if held.bias is not None:
            bias = held.bias
            bias = _near(bias, target) if isinstance(bias, Tensor) else bias
            memory = {name: _single(value) / bias for name, value in own.items()}
        yield _Part(target, part, memory, own)


def _single(part: Tensor) -> Tensor:
    """In single precision or better."""
    return part if part.element_size() >= 4 else part.float()


def _write_(target: Tensor, new: Tensor, wanted: bool | Tensor) -> None:
    """Overwrite if wanted, without asking the device whether it is."""
    if isinstance(wanted, Tensor):
        torch._foreach_copy_([target], [torch.where(_near(wanted, target), new, target)])
    elif wanted:
        target.copy_(new)


def _near(value: Tensor, like: Tensor) -> Tensor:
    return moved(value, like.device)


class _Probe:
    """Elements that a policy makes of gradients and memory while they are measured."""

    def __init__(
        self, memory: ElementMemory, rule: Rule, grads: Grads, scale: Tensor | None
    ) -> None:
        self._memory = memory
        self._rule = rule
        self._grads = grads
        self._scale = scale
        self._covers = set(rule.covers)

    def peaks(self, kernel: Kernel) -> Tensor:
        """Largest magnitude per slot; see `gradclip.types.Kernel`."""
        found = [
            [kernel.peaks([[chunk]]) for chunk in self._of(slot)]
            for slot in range(len(self._grads))
        ]
        return _combined(found, torch.amax)

    def power_sums(self, kernel: Kernel, norm_type: float, scale: Tensor | None = None) -> Tensor:
        """Sum of powers per slot; see `gradclip.types.Kernel`."""
        scales = [None] * len(self._grads) if scale is None else scale.split(1)
        found = [
            [kernel.power_sums([[chunk]], norm_type, scales[slot]) for chunk in self._of(slot)]
            for slot in range(len(self._grads))
        ]
        return _combined(found, torch.sum)

    def _of(self, slot: int) -> Iterator[Tensor]:
        for grad in self._grads[slot] if slot in self._covers else ():
            yield from self._memory.probed(self._rule, slot, grad, self._scale)


def _combined(found: Sequence[Sequence[Tensor]], how: Callable[[Tensor], Tensor]) -> Tensor:
    """Measures of chunks, put together by slot; 0 for a slot without any."""
    device = next((part.device for parts in found for part in parts), torch.device("cpu"))
    nothing = torch.zeros((), dtype=torch.float64, device=device)
    return torch.stack([how(torch.cat(list(parts))) if parts else nothing for parts in found])


def _bias(beta: Any, step: Any) -> Tensor | float:
    """What a running mean from 0 has to be divided by after so many steps."""
    if isinstance(step, Tensor):
        step = step if has_float64(step.device) else step.cpu()
        return (1 - beta ** step.double()).clamp(min=1e-30)
    return float(max(1 - beta**step, 1e-30))
