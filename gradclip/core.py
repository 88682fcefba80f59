"""The three verbs of a clipping step: look, commit, write.

    look    measure this rank's gradients, reduce the measures over ranks, decide. Reads only.
    commit  take over the adaptive states, count the step, add its row to the records.
    write   scale the gradients, hand the factor to the optimizer's step, or withhold the step.

Who calls them, and when, is a driver: `GradientClipper.clip` for the plain step, and
`gradclip/drivers` for closures, micro-batches and DeepSpeed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from torch.nn.parameter import is_lazy

from gradclip.config import ClipConfig
from gradclip.decide import compiled, decide_all, decide_on_host, take_numbers
from gradclip.devices import moved
from gradclip.effect.effect import Effect, apply
from gradclip.effect.elements import ElementMemory
from gradclip.errors import ClipError, ConfigError
from gradclip.kernels import KernelName, kernel_for
from gradclip.layouts import (
    Agreement,
    Groups,
    bits_of,
    detect,
    gathered,
    is_first_rank,
    is_flat,
    is_flattened,
    refuse_shared_names,
    shape_of,
)
from gradclip.measure import measure_each, measure_step
from gradclip.plan.build import build_plan, needs_regions
from gradclip.plan.in_backward import BackwardWatch, refuse_taken
from gradclip.plan.parameters import collect_parameters, facts_of, frozen_names
from gradclip.plan.plan import Plan
from gradclip.plan.rates import rate_of
from gradclip.policies.arithmetic import tensors_of
from gradclip.records.alarm import Spike
from gradclip.records.record import ClipRecord
from gradclip.records.recorder import Recorder, Tally
from gradclip.state import carry_over, fresh_states
from gradclip.steps import follow_while_alive
from gradclip.stops import DeferredStop, refuse_stop, where_nonfinite
from gradclip.types import Beginning, Given, Grads, Kernel, Layout, Region, State, Step
from gradclip.updates import Updates, refuse_unseen_steps
from gradclip.watch import Watch
from gradclip.weak import weak

__all__ = ["Core", "Machinery", "Sources"]


class Sources:
    """What a clipper was built from, and is built from again when parameters change.

    Args:
        named_parameters: The model, or names of its parameters.
        optimizer: Whose parameters; None for all that are named.
        process_group: One more group of ranks that hold other parameters, or one by pattern.
        layout: Found out from the parameters if None.
        kernel: By name; chosen by the device if None.

    Attributes:
        named_parameters: As given; so are `process_group`, `layout` and `kernel`.
        stepper: The name of the optimizer's class; "" without one.
    """

    def __init__(
        self,
        named_parameters: Module | Sequence[tuple[str, Parameter]] | None,
        optimizer: Any | None,
        process_group: Groups | None,
        layout: Layout | None,
        kernel: KernelName | None,
    ) -> None:
        self.named_parameters = named_parameters
        self.process_group = process_group
        self.layout = layout
        self.kernel = kernel
        self._optimizer = weak(optimizer)
        self.stepper = "" if optimizer is None else type(optimizer).__name__
        self.hold()

    @property
    def optimizer(self) -> Any | None:
        """The optimizer; None without one, and once it is gone."""
        return self._optimizer()

    @property
    def is_gone(self) -> bool:
        """Whether there was an optimizer that nothing keeps alive any more."""
        return bool(self.stepper) and self.optimizer is None

    def hold(self) -> None:
        """Keep the optimizer alive."""
        self._held = self.optimizer

    def let_go(self) -> None:
        """Keep it no more, as it keeps the clipper by its hooks: it is to be freed at once."""
        self._held = None

    @property
    def stepped(self) -> list[Parameter]:
        """The optimizer's parameters as they are now; empty without an optimizer."""
        optimizer = self._optimizer()
        groups = () if optimizer is None else optimizer.param_groups
        return list(chain.from_iterable(group["params"] for group in groups))


@dataclass(frozen=True, slots=True)
class Machinery:
    """What the verbs work with, built for the parameters as they are now.

    Attributes:
        device: Where measures, decisions and records live.
        layout: Which ranks hold what.
        agreement: Whether ranks that share the parameters have and decide the same.
        plan: What policies decide on.
        kernel: What measures and scales.
        memory: What element policies remember; None where no policy works on elements or units.
        effect: How a verdict is carried out.
        stepped: The optimizer's parameters that it was built for.
        lies: How the first parameter lay.
        lazy: Those that had no shape yet (`torch.nn.LazyLinear`), which a first forward gives.
        on_host: The host decides, in numbers of its own.
    """

    device: torch.device
    layout: Layout
    agreement: Agreement
    plan: Plan
    kernel: Kernel
    memory: ElementMemory | None
    effect: Effect
    stepped: Sequence[Parameter]
    lies: tuple[object, ...]
    lazy: Sequence[Parameter]
    on_host: bool

    def fits(self, sources: Sources) -> bool:
        """Whether the parameters are still those it was built for, each the same object."""
        stepped = sources.stepped
        return (
            len(stepped) == len(self.stepped)
            and all(map(is_, stepped, self.stepped))
            and self.lies == _how_it_lies(self.plan)
            and all(map(is_lazy, self.lazy))
        )


class Core:
    """The machinery of one clipper, and the three verbs.

    Args:
        config: The policies, and which parameters follow which.
        sources: The parameters.

    Attributes:
        config: The validated configuration.
        sources: As given.
        machinery: What the verbs work with; `current` brings it up to date.
        recorder: What happened.
        last_record: What the last `commit` returned; None before it.
        watch: Sees steps that nobody clipped.
        listeners: Called with each spike that an alarm finds.

    Raises:
        ConfigError: If the configuration isn't valid for these parameters, or a layout and a
            process group are both given.
        LayoutError: If the parameters are laid out in a way that isn't supported.
    """

    def __init__(self, config: ClipConfig, sources: Sources) -> None:
        if config.log.update_norm_every is not None:
            refuse_unseen_steps(sources.optimizer, sources.layout)
        self.config = config
        self.sources = sources
        self.machinery = on = _build(config, sources)
        self._states: Sequence[State] = fresh_states(on.plan.rules, on.device)
        self.recorder = Recorder(config, on.device, is_first=is_first_rank())
        self._follow(on)
        self.last_record: ClipRecord | None = None
        self.listeners: list[Callable[[Spike], object]] = []
        self._has_met = False
        self._by_steps = any(self._states) or config.follows_steps
        self._stop = DeferredStop(config.log.every_n_steps or 10)
        self._uses_rate = any(policy.uses_rate for chain in config.lists for policy in chain)
        self.watch = Watch(lacks_rate=self._uses_rate and sources.optimizer is None)
        self._backward_watch = BackwardWatch(on.plan.parameters) if sources.layout is None else None
        self._updates: Updates | None = None
        if config.log.update_norm_every is not None:
            self._updates = Updates(config.log.update_norm_every)
            follow_while_alive(
                self, sources.optimizer, before=Core._begin_step, after=Core._end_step
            )

    def current(self) -> Machinery:
        """The machinery, built anew if parameters were added, replaced, moved or given a shape.

        What is kept by name goes on: states, memory of elements, records. It stays as it is once
        the optimizer is gone.
        """
        if not self.machinery.fits(self.sources) and not self.sources.is_gone:
            self._renew(self.machinery)
        return self.machinery

    def _renew(self, before: Machinery) -> None:
        on = _build(self.config, self.sources, before)
        fresh = fresh_states(on.plan.rules, on.device)
        self.states = carry_over(before.plan.rules, self.states, on.plan.rules, fresh)
        self._follow(on)
        self.machinery = on

    def _follow(self, on: Machinery) -> None:
        reads_block, on_host = on.kernel.reads_block, on.on_host
        self.recorder.follow(on.plan, on.device, reads_block=reads_block, on_host=on_host)

    def _meet(self) -> bool:
        """Whether ranks are known now that weren't when the clipper was built, before DDP was.

        Raises:
            ConfigError: If they differ from this one.
        """
        before, given = self.machinery, self.sources
        if before.agreement.knows_ranks:
            self._has_met = True
            return False
        agreement = Agreement.of(
            given.layout,
            before.plan.parameters,
            given.process_group,
            None,
            self.config.verify_every,
        )
        if agreement.knows_ranks:
            self._renew(replace(before, agreement=agreement))
            tally = self.recorder.tally
            self.compare_loaded((self.states, tally.counts), tally.first, "clip")
        self._has_met = True
        return agreement.knows_ranks

    def go_on_from(self, before: Sequence[Core], *, same_run: bool) -> Core | None:
        """Take over, by name, what others remember of the parameters that are now in this one.

        Args:
            before: Of optimizers that this one's takes the place of. Of several, the one that
                shares most parameters gives what isn't kept by parameter, and the counts.
            same_run: Records go on too, in the same file.

        Returns:
            Which of them gave the counts; None if none shares a parameter.
        """
        on, names = self.current(), self.machinery.plan.shapes.keys()
        shared = {core: len(names & core.machinery.plan.shapes.keys()) for core in before}
        nearest = sorted((core for core in before if shared[core]), key=shared.__getitem__)
        for core in nearest:
            rules = core.machinery.plan.rules
            self.states = carry_over(rules, core.states, on.plan.rules, self.states)
            if on.memory is not None and core.machinery.memory is not None:
                on.memory.take_over(core.machinery.memory)
        if not nearest:
            return None
        own, last = self.recorder, nearest[-1]
        tally = last.recorder.tally
        own.restart(tally.first + tally.made, tally.counts)
        if same_run:
            self.recorder, last.recorder = last.recorder, own
            for core in (self, last):
                there = core.machinery
                core._follow(there)
        return last

    @property
    def states(self) -> Sequence[State]:
        """Of the policies, in the order of the plan's rules; tensors."""
        return [tensors_of(state, self.machinery.device) for state in self._states]

    @states.setter
    def states(self, states: Sequence[State]) -> None:
        self._states = states

    def begin(self) -> Beginning:
        """What the next step begins with, for the parameters as they are now.

        Before it alarms are told, of the steps before: nothing of this one has happened yet.

        Raises:
            AlarmError: If one of them ends the run.
        """
        self.current()
        for spike in self.recorder.spikes():
            for call in self.listeners:
                call(spike)
            self.recorder.report(spike, is_told=bool(self.listeners))
        return Beginning(self._states, self.recorder.tally.taken)

    def look(self, given: Given, since: Beginning | None = None) -> Step:
        """Measure, reduce, decide. Nothing has happened yet when it returns.

        Args:
            given: What is known of the gradients.
            since: What the step began with; None to begin one.

        Raises:
            NonFiniteError: If a gradient isn't finite and that is an error.
            SkipLimitError: If a policy's bound on withheld steps in a row is reached, and it is
                to stop then.
            AlarmError: As `begin`.
            ConfigError: If gradients were lost, or used, before a clip could see them.
        """
        if not self._has_met and self._meet():
            since = None  # its states may be in another order now
        states, taken = since or self.begin()
        on = self.machinery
        on.agreement.refuse_unreduced(by_steps=self._by_steps)
        grads = on.layout.collect(on.plan.slots)
        # Only until every parameter had a gradient: then no optimizer steps in backward.
        watch = self._backward_watch
        if watch is not None and not watch.look(on.plan.parameters):
            self._backward_watch = None
        if given.grad_scale is not None:
            given = replace(given, grad_scale=moved(given.grad_scale, on.device))
        scale, memory = given.grad_scale, on.memory
        probes = {} if memory is None else memory.probes(grads.counted, scale)
        update = None if self._updates is None else self._updates.share(on.layout)
        norms, probed, weights, has_gradient, update = measure_step(
            on.plan, grads, probes, on.layout, on.kernel, update
        )
        if scale is not None:  # policies think in gradients without a loss scale
            norms = {p: norm / scale for p, norm in norms.items()}
        known, rule = None, given.on_nonfinite
        common: dict[str, Any] = {
            "step": taken,
            "weights": weights,
            "rate": self._rate(on),
            "loss": given.loss,
            "skip_nonfinite": rule == "skip",
            "held": self._stop.reached,
            "share": given.share,
        }
        if on.on_host:
            verdict, known, states = decide_on_host(on.plan.rules, norms, states, **common)
            has_gradient = bool(has_gradient)
        else:
            decide = compiled() if self.config.compile else decide_all
            verdict, states = decide(
                on.plan.rules,
                norms,
                states,
                probed=probed,
                watched=on.plan.watched,
                **common,
            )
        each = partial(measure_each, on.plan, on.layout, on.kernel, scale)
        recorded = norms[on.plan.recorded]
        step = Step(given, grads, recorded, verdict, states, has_gradient, each, update, known)
        # On a CPU a read costs nothing, and lets `write` drop gradients of a withheld step.
        return step if self._stays_on_device(given) else self._read_on_host(step)

    def _rate(self, on: Machinery) -> Any:
        """The optimizer's rate, where a policy asks for it; a number where the host decides."""
        if not self._uses_rate:
            return None
        return rate_of(self.sources.optimizer, None if on.on_host else on.device)

    def commit(self, step: Step) -> ClipRecord:
        """Take over the states, count the step and record it.

        Raises:
            NonFiniteError: If steps that aren't finite reached a policy's bound, on a device,
                within the last `log.every_n_steps` steps; all of them were withheld.
            SkipLimitError: The same for other withheld steps.
            ConfigError: If ranks differ, where that is compared (`verify_every`).
        """
        self.adopt(step)
        self.last_record = self.recorder.record(step)
        return self.last_record

    def adopt(self, step: Step) -> None:
        """Take over the states alone: of a micro-batch, whose step is recorded when it ends.

        Raises:
            NonFiniteError: As `commit`.
            SkipLimitError: As `commit`.
            ConfigError: As `commit`.
        """
        self.machinery.agreement.follow(lambda: self._decided(step))
        if self._stays_on_device(step.given):  # else the error was raised while looking
            self._stop.check(step.verdict, self.machinery.plan.rules)
        self._states = step.states
        if self._updates is not None and step.update is not None:
            self._updates.found = None
            self.recorder.add_update(step.update)

    def compare_loaded(
        self,
        loaded: tuple[Sequence[State], Tensor] | None,
        step: int = 0,
        where: str = "load_state_dict",
    ) -> None:
        """Compare state that is about to be taken over; every rank must call.

        Args:
            loaded: States and counts; None if they couldn't be read, which is an error by itself.
            step: Number of the next step.
            where: What the user called.

        Raises:
            ConfigError: If ranks loaded other ones, or a rank could not.
        """
        facts: dict[str, dict[str, object]] | None = None
        agreement = self.machinery.agreement
        if loaded is not None and agreement.knows_ranks:
            states, counts = loaded
            numbers: dict[str, object] = {
                f"{name} of policy {index} ({rule.policy.type})": f"bits {int(bits_of(value)):x}"
                for index, rule in enumerate(self.machinery.plan.rules, 1)
                for name, value in states[index - 1].items()
            }
            counted = dict(zip(Tally.NAMES, counts.tolist(), strict=True))
            facts = {"state": numbers, "counts": {**counted, "step": step}}
        agreement.compare(where, facts)

    def amend(self, step: Step) -> ClipRecord:
        """Join what one more look at the same step found to its record: withheld, or not finite.

        A step of which an evaluation was withheld leaves no trace in adaptive state.
        """
        assert self.last_record is not None
        failed = step.verdict.finite.logical_not()
        if step.verdict.skip is not None:
            failed = failed | step.verdict.skip
        if not self.machinery.kernel.reads_block:
            if not bool(failed):
                return self.last_record
            self._states = step.states
        else:
            pairs = zip(step.states, self._states, strict=True)
            self._states = [
                {name: torch.where(failed, new[name], value) for name, value in old.items()}
                for new, old in pairs
            ]
        self.last_record = self.recorder.amend(self.last_record, step.verdict)
        return self.last_record

    def write(self, step: Step, grads: Grads | None = None) -> None:
        """Do to the gradients, or to the step that follows, what was decided.

        Args:
            step: What was decided.
            grads: Other tensors to write, which hold the same gradients without a loss scale, one
                list per slot of the plan.
        """
        on = self.machinery
        if grads is None:
            on.effect.write(step.verdict, step.grads.all, on.kernel, on.memory, step.given)
        else:
            apply(step.verdict, grads, on.plan, on.kernel, on.memory)
        self.watch.clipped(on.plan.parameters)

    def withhold(self, skip: Tensor | None, given: Given) -> None:
        """Withhold the step if `skip`, 0-d bool, says so, whose gradients are written already."""
        self.machinery.effect.withhold(skip, given)
        self.watch.clipped(self.machinery.plan.parameters)

    def refuse_stale(self) -> None:
        """With `debug: true`: refuse gradients that are left from an earlier step."""

    @torch.no_grad()
    def _begin_step(self) -> None:
        """The optimizer's step begins."""
        assert self._updates is not None
        on, tally = self.machinery, self.recorder.tally
        held = on.plan.parameters.values()
        self._updates.begin(tally.first + tally.made, self.last_record, held, on.layout)

    @torch.no_grad()
    def _end_step(self) -> None:
        """It has ended. Where ranks hold parts, their sums go with the message of the next look."""
        assert self._updates is not None
        on = self.machinery
        self._updates.end(self.last_record, on.kernel)
        if self._updates.found is not None and not on.layout.reduces:
            self.recorder.add_update(self._updates.found.sqrt().to(on.device))
            self._updates.found = None

    def _decided(self, step: Step) -> dict[str, Tensor]:
        """What ranks have to agree on bitwise after a step."""
        verdict, taken = step.verdict, self.recorder.tally.taken
        return {
            "state": _joined([tensors_of(s, step.norms.device) for s in step.states], step.norms),
            "norms": torch.cat([step.norms, verdict.coef, verdict.limit.reshape(1)]),
            "steps": taken if isinstance(taken, Tensor) else step.norms.new_tensor(taken),
        }

    def _stays_on_device(self, given: Given) -> bool:
        """Whether the host needs not know what was decided."""
        return self.machinery.effect.withholds_on_device and given.on_nonfinite != "raise"

    def _read_on_host(self, step: Step) -> Step:
        """The step, with the host knowing whether it is withheld; or the error that it asks for."""
        on, verdict, raises = self.machinery, step.verdict, step.given.on_nonfinite == "raise"
        # The one host read of a step: nothing more is read of a step that is taken.
        bad = verdict.skip
        if raises:
            nonfinite = verdict.finite.logical_not()
            bad = nonfinite if bad is None else bad | nonfinite
        if bad is None or not bool(bad):
            return step
        where = partial(where_nonfinite, on.plan.parameters, on.layout, on.kernel)
        try:
            refuse_stop(verdict, on.plan.rules, where, raises=raises)
        except ClipError:
            self.recorder.witness(step)  # the run ends here, so the file has to say why
            raise
        return replace(step, verdict=replace(verdict, withheld=True))


def _build(config: ClipConfig, sources: Sources, before: Machinery | None = None) -> Machinery:
    """Find out which ranks hold what, plan the slots, and choose what acts on them."""
    if sources.layout is not None and sources.process_group is not None:
        msg = (
            "layout and process_group are both given, and a layout knows its own groups; "
            "give one of them."
        )
        raise ConfigError(msg)
    optimizer, group = sources.optimizer, sources.process_group
    parameters = collect_parameters(sources.named_parameters, optimizer)
    model = sources.named_parameters if isinstance(sources.named_parameters, Module) else None
    refuse_taken(parameters, optimizer, model)
    shaped = {name: p for name, p in parameters.items() if not is_lazy(p)}
    layout = sources.layout or detect(shaped, group, model)
    agreement = (
        Agreement.of(sources.layout, shaped, group, model, config.verify_every)
        if before is None
        else before.agreement
    )
    parameters = agreement.settle(
        parameters, lambda: _given_to(config, parameters, optimizer, agreement)
    )
    kernel = kernel_for(layout.devices, sources.kernel)
    regions: dict[str, Region] = {}
    if needs_regions(config):
        refuse_shared_names(parameters, group)
        regions = {name: layout.region(name, p) for name, p in shaped.items()}
    shapes = {name: region.shape for name, region in regions.items()}
    facts = gathered(facts_of(parameters, optimizer, shapes), group)
    # Where a host read waits, the recorder can't ask on the host when it needs each norm.
    fine = config.log.per_parameter or (config.recorder is not None and kernel.reads_block)
    # Ranks that hold other parameters don't know each other's frozen ones.
    known = [] if group or optimizer is None else [optimizer]
    frozen = frozen_names(sources.named_parameters, known)
    plan = build_plan(
        config, facts, parameters, regions, layout.devices[0], fine=fine, frozen=frozen
    )
    if any(rule.policy.uses_sizes or rule.policy.uses_rate for rule in plan.rules):
        plan = plan.with_sizes(layout.sizes(plan.slots))
    flat = [name for name, p in parameters.items() if is_flat(p)]
    _refuse_scopes(plan, config, grouped=optimizer is not None, flat=flat)
    memory = None
    if plan.unit_map is not None or any(rule.elementwise is not None for rule in plan.rules):
        memory = ElementMemory(plan, layout, optimizer, None if before is None else before.memory)
    effect = Effect(
        config.apply,
        plan,
        None if sources.layout is not None else optimizer,
        reads_block=kernel.reads_block,
        one_by_one=config.stage == "after_backward",
        before=None if before is None else before.effect,
    )
    return Machinery(
        device=layout.devices[0],
        layout=layout,
        agreement=agreement,
        plan=plan,
        kernel=kernel,
        memory=memory,
        effect=effect,
        stepped=sources.stepped,
        lies=_how_it_lies(plan),
        lazy=[p for p in parameters.values() if is_lazy(p)],
        on_host=not kernel.reads_block
        and layout.devices[0].type == "cpu"
        and plan.watched is None
        and take_numbers(plan.rules),
    )


def _given_to(
    config: ClipConfig,
    parameters: Mapping[str, Parameter],
    optimizer: Any | None,
    agreement: Agreement,
) -> dict[str, dict[str, object]]:
    """What a clipper was built from, to compare over ranks."""
    facts = facts_of(parameters, optimizer, {})
    known: dict[str, object] = {
        name: f"{fact.dtype} of shape {shape_of(parameters[name])}"
        + (f" in group {fact.group!r}" if config.names_groups else "")
        for name, fact in facts.items()
        if agreement.same_names
    }
    return {"configuration": config.shared(), "parameters": known}


def _joined(states: Sequence[State], like: Tensor) -> Tensor:
    """All values of states in one."""
    values = [value.flatten() for state in states for value in state.values()]
    return torch.cat(values) if values else like.new_zeros(1)


def _how_it_lies(plan: Plan) -> tuple[object, ...]:
    """What `module.to(device)`, or flattening by FSDP1, changes of every parameter at once."""
    first = next(iter(plan.parameters.values()))
    return first.device, is_flattened(first)


def _refuse_scopes(plan: Plan, config: ClipConfig, *, grouped: bool, flat: Sequence[str]) -> None:
    """Refuse scopes that need parameters which are not there one by one.

    Args:
        plan: With the policies.
        config: Where logging asks for parameters.
        grouped: Whether there is an optimizer, whose parameter groups scope "group" means.
        flat: Names of parameters that are many in one.

    Raises:
        ConfigError: If there is such a scope.
    """
    scopes = {rule.policy.measured[0] for rule in plan.rules}
    if "group" in scopes and not grouped:
        msg = (
            "scope is 'group', and without an optimizer there are no parameter groups; "
            "pass optimizer=..., or use scope 'global' or 'parameter'."
        )
        raise ConfigError(msg)
    if flat and (scopes & {"parameter", "unit"} or config.log.per_parameter):
        msg = (
            f"A scope is 'parameter' or 'unit', or log.per_parameter is true, and {flat[0]!r} "
            "is a FlatParameter of FSDP1, many parameters in one; allowed: scope 'global' or "
            "'group'. Wrap with use_orig_params=True to tell parameters apart."
        )
        raise ConfigError(msg)
