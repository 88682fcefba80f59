"""Whatever steps an optimizer, it is clipped once, refused, or somebody is told."""

import contextlib
import copy
import functools
import io
import pickle
from collections import OrderedDict, defaultdict

import pytest
import torch
from support.freed import kept
from support.gradients import NORM, backward, small_model
from support.program import Program, fused_adamw, sgd
from support.sam import Sam
from torch.nn.utils import parameters_to_vector
from torch.optim import LBFGS, SGD, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from gradclip import ClipByNorm, ConfigError, GradientClipper, SkipSpike, UClip
from gradclip.adapters import OncePerStep

LIMIT = 0.01
POLICY = ClipByNorm(max_norm=LIMIT)


class Calls(SGD):
    """Calls the step of the class that it is made from."""

    def step(self, closure=None):
        return super().step(closure)


class Halves(SGD):
    """Halves its gradients before it steps."""

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            p.grad.mul_(0.5)
        super().step(closure)


class Decays(SGD):
    """Writes to gradients before it steps, and must not see unclipped ones."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            grads = [p.grad for p in group["params"]]
            assert torch.nn.utils.get_total_norm(grads) <= LIMIT * 1.0001
            for grad in grads:
                grad.mul_(0.5)
        super().step(closure)


class Uninitialised(Optimizer):
    """torch's `__init__`, which makes hooks run, isn't called, as timm's Lookahead does."""

    def __init__(self, params):
        self._optimizer_step_pre_hooks = OrderedDict()
        self._optimizer_step_post_hooks = OrderedDict()
        self.param_groups = [{"params": list(params), "lr": 1.0}]
        self.defaults, self.state = {}, defaultdict(dict)

    @torch.no_grad()
    def step(self, closure=None):
        assert closure is None
        for p in self.param_groups[0]["params"]:
            p.sub_(p.grad)


class Wraps(Uninitialised):
    """The same around an optimizer."""

    def __init__(self, params):
        super().__init__(params)
        self.base = SGD(self.param_groups, lr=1.0)

    def step(self, closure=None):
        return self.base.step(closure)


class Scheduled(Uninitialised):
    """The same, and a schedule has put the method that runs no hooks on the instance."""

    def __init__(self, params):
        super().__init__(params)
        self.schedule = LambdaLR(self, lambda _: 1.0)


class Parts(Uninitialised):
    """Two optimizers, the first of which writes to its gradients."""

    def __init__(self, params):
        super().__init__(params)
        held = self.param_groups[0]["params"]
        self.parts = [Halves(held[:2], lr=2.0), SGD(held[2:], lr=1.0)]

    def step(self, closure=None):
        for part in self.parts:
            part.step(closure)


class NoOptimizer:
    """Looks like an optimizer, and steps one."""

    def __init__(self, params):
        self.inner = [SGD(params, lr=1.0)]

    @property
    def param_groups(self):
        return self.inner[0].param_groups

    def step(self):
        self.inner[0].step()


class ClimbsFirst(Sam):
    """Climbs by the gradients that are there, before it evaluates the closure."""

    def step(self, closure=None):
        self.first_step()
        with torch.enable_grad():
            closure()
        self.second_step()


class Ignores(SGD):
    """Takes a closure and doesn't evaluate it."""

    def step(self, closure=None):
        del closure
        super().step()


class Keyword(SGD):
    def step(self, *, closure=None):
        super().step(closure)


class Second(SGD):
    def step(self, model=None, closure=None):
        assert model is None or isinstance(model, torch.nn.Module)
        super().step(closure)


class Anything(SGD):
    def step(self, *args, **kwargs):
        super().step(*args, **kwargs)


class Corrected(SGD):
    """As in federated learning: two lists that have nothing to do with closures."""

    def step(self, server, client):
        assert [len(server), len(client)] == [4, 4]
        super().step()


def plainly(program):
    program.backward()
    program.optimizer.step()


def in_two_calls(program):
    program.backward()
    program.optimizer.first_step()
    program.backward()
    program.optimizer.second_step()


def with_a_closure(program, *args, after_backward=False, name=None):
    if after_backward:
        program.backward()
    call = {name: program.backward} if name else {}
    program.optimizer.step(*args, *(() if name else (program.backward,)), **call)


class Loop:
    """A model, an optimizer whose rate is 1, and a clipper that is attached to it."""

    def __init__(
        self, make, attach=lambda optimizer: optimizer, policy=POLICY, adapter=False, **config
    ):
        self.model = small_model()
        self.optimizer = make(self.model.parameters())
        clip = {"policies": [policy], **config}
        self.clipper = GradientClipper(clip, self.model.named_parameters(), self.optimizer)
        attached = attach(self.optimizer)
        once = adapter and OncePerStep(self.clipper, attached)
        self.handle = once or self.clipper.attach(attached)

    def backward(self):
        self.model.zero_grad()
        backward(self.model, size=50)
        return torch.tensor(7.0)

    @property
    def weights(self):
        return parameters_to_vector(self.model.parameters()).detach()


ONCE = {
    "plain": (lambda p: SGD(p, lr=1.0), plainly),
    "calls super().step()": (lambda p: Calls(p, lr=1.0), plainly),
    "the same, fused": (lambda p: Calls(p, lr=1.0, fused=True), plainly),
    "the same, with a closure": (lambda p: Calls(p, lr=1.0), with_a_closure),
    "torch's __init__ not called": (Uninitialised, plainly),
    "the same, with a schedule": (Scheduled, plainly),
    "the same, around an optimizer": (Wraps, plainly),
    "no optimizer of torch's": (NoOptimizer, plainly),
    "two parts": (Parts, plainly),
    "SAM in two calls": (Sam, in_two_calls),
    "SAM with a closure": (Sam, with_a_closure),
    "keyword closure": (lambda p: Keyword(p, lr=1.0), lambda x: with_a_closure(x, name="closure")),
    "second argument": (lambda p: Second(p, lr=1.0), lambda x: with_a_closure(x, x.model)),
    "second by name": (lambda p: Second(p, lr=1.0), lambda x: with_a_closure(x, name="closure")),
    "any arguments": (lambda p: Anything(p, lr=1.0), with_a_closure),
    "not evaluated": (
        lambda p: Ignores(p, lr=1.0),
        lambda x: with_a_closure(x, after_backward=True),
    ),
    "climbs by what is there": (ClimbsFirst, lambda x: with_a_closure(x, after_backward=True)),
    "lists": (
        lambda p: Corrected(p, lr=1.0),
        lambda x: (x.backward(), x.optimizer.step([0] * 4, [0] * 4)),
    ),
}


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("apply", ["auto", "in_place"])
def test_each_step_is_clipped_and_counted_once_whoever_calls_whom(apply, adapter, subtests, caplog):
    for name, (make, step) in ONCE.items():
        with subtests.test(name):
            # torch hooks classes, so a class of its own keeps one case from hiding another.
            made = functools.partial(_made, make)
            loop = Loop(made, apply=apply, adapter=adapter)
            for number in range(1, 4):
                before = loop.weights
                step(loop)
                moved = float((loop.weights - before).norm())
                assert moved == pytest.approx(LIMIT, rel=1e-4)
                assert float(loop.clipper.state_dict()["counts"]["steps"]) == number
            climbed = getattr(loop.optimizer, "climbed", ())
            if name != "SAM in two calls":  # whose first gradient is no step's
                assert all(norm <= LIMIT * 1.0001 for norm in climbed)
            loop.handle.remove()
            before = loop.weights
            step(loop)
            assert float((loop.weights - before).norm()) > 1
    assert not caplog.records


def _made(make, params):
    optimizer = make(params)
    cls = type(optimizer)
    if cls.__module__ == __name__:
        optimizer.__class__ = type(cls.__name__, (cls,), {"step": vars(cls).get("step", cls.step)})
    return optimizer


@pytest.mark.parametrize("attached", [False, True])
def test_a_subclass_that_writes_to_gradients_sees_clipped_ones(attached, caplog):
    """Also if it is fused, whose step could do the clipping; and its step isn't told as two."""
    model = small_model()
    optimizer = Decays(model.parameters(), lr=1.0, fused=True)
    clipper = GradientClipper(POLICY, model, optimizer)
    if attached:
        clipper.attach(optimizer)
    for _ in range(3):
        before = parameters_to_vector(model.parameters()).detach()
        optimizer.zero_grad()
        backward(model, size=50)
        if not attached:
            clipper.clip()
        optimizer.step()
        moved = parameters_to_vector(model.parameters()).detach() - before
        assert float(moved.norm()) == pytest.approx(LIMIT / 2, rel=1e-4)
    assert not caplog.records


def test_parameters_may_move_between_evaluations_that_clip_by_hand(caplog):
    program = Program(NORM, lambda params: LBFGS(params, lr=1e-3, max_iter=4))
    once = OncePerStep(program.clipper, program.optimizer)

    def closure():
        program.optimizer.zero_grad()
        program.backward(0, 50)
        once.clip()
        program.clipper.flush()
        return torch.tensor(1.0)

    for _ in range(2):
        with once.in_step():
            program.optimizer.step(closure)
    assert program.counts["steps"] == once.steps == 2
    assert not caplog.records


def test_a_closure_that_is_not_evaluated_after_a_clip_by_hand_and_without_one():
    program = Program(NORM, lambda params: Ignores(params, lr=1.0))
    once = OncePerStep(program.clipper, program.optimizer)
    for number in range(1, 5):
        before = program.weights
        program.optimizer.zero_grad()
        program.backward(number, 50)
        if number % 2:
            once.clip()
        program.optimizer.step(lambda: torch.tensor(1.0))
        assert float((program.weights - before).norm()) <= NORM.max_norm * 1.0001
        assert program.counts["steps"] == once.steps == number


def test_a_wrapper_and_what_it_wraps_are_one():
    loop = Loop(Sam, attach=lambda sam: sam.base)
    for number in range(1, 3):
        before = loop.weights
        loop.optimizer.step(loop.backward)
        assert float((loop.weights - before).norm()) == pytest.approx(LIMIT, rel=1e-4)
        assert float(loop.clipper.state_dict()["counts"]["steps"]) == number
    second = GradientClipper(POLICY, loop.model.named_parameters(), loop.optimizer)
    with pytest.raises(ConfigError, match="are clipped already, by a GradientClipper"):
        second.attach(loop.optimizer)
    loop.handle.remove()
    second.attach(loop.optimizer)


def test_a_failed_evaluation_of_gradients_that_were_there_joins_the_record():
    loop = Loop(ClimbsFirst)
    loop.backward()
    next(loop.model.parameters()).grad.fill_(torch.nan)
    before = loop.weights
    loop.optimizer.first_step = lambda: None  # its gradients are dropped, so that it can't climb
    loop.optimizer.second_step = lambda: loop.optimizer.base.step()
    loop.optimizer.step(loop.backward)
    assert loop.clipper.last_record.skipped
    assert not loop.clipper.last_record.finite
    assert float((loop.weights - before).norm()) <= LIMIT * 1.0001
    assert loop.clipper.state_dict()["counts"]["taken"] == 0


def test_a_closure_that_is_not_evaluated_hides_its_loss():
    loop = Loop(lambda p: Ignores(p, lr=1.0), policy=SkipSpike(window=4, watch="loss"))
    loop.backward()
    with pytest.raises(ConfigError, match="without evaluating its closure, and a policy watches"):
        loop.optimizer.step(loop.backward)


class Offloads(Optimizer):
    """Copies gradients while backward runs, and steps with the copies."""

    def __init__(self, params):
        super().__init__(params, {"lr": 1.0})
        self.copies = {}
        for p in self.param_groups[0]["params"]:
            p.register_post_accumulate_grad_hook(self.copy if p.ndim == 1 else self.copier())

    def copy(self, p):
        self.copies[p] = p.grad.clone()

    def copier(self):
        return lambda p: self.copy(p)


class Bare:
    """No hooks, and it holds no optimizer."""

    def __init__(self, params):
        self.param_groups = [{"params": list(params)}]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Offloads, "Offloads has a hook of its own on the gradient of '0.weight'"),
        (Bare, "Bare runs no step hooks"),
    ],
)
def test_what_cannot_be_clipped_is_refused_by_name(make, message):
    with pytest.raises(ConfigError, match=message):
        Loop(make)


def by_hand(loop):
    loop.backward()
    with torch.no_grad():
        for p in loop.model.parameters():
            p.sub_(p.grad)


def replaced_method(loop):
    loop.backward()
    loop.optimizer.step = lambda: by_hand(loop)
    loop.optimizer.step()


def another_optimizer(loop):
    loop.backward()
    sgd(loop.model.parameters()).step()


@pytest.mark.parametrize("look", ["clip", "flush"])
@pytest.mark.parametrize(
    ("slip", "message"),
    [
        (by_hand, "SGD, which this clipper is attached to, made no step"),
        (replaced_method, "SGD, which this clipper is attached to, made no step"),
        (another_optimizer, "SGD stepped with gradients that weren't clipped"),
    ],
)
def test_a_step_that_went_past_the_clipper_is_told_once(slip, message, look, caplog):
    loop = Loop(lambda p: SGD(p, lr=1.0))
    if look == "clip":
        loop.backward()
        loop.clipper.clip()
    for _ in range(2):
        slip(loop)
        if look == "flush":
            loop.clipper.flush()
        else:
            loop.backward()
            loop.clipper.clip()
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1
    assert message in said[0]
    assert "said once" in said[0]


def test_a_step_without_a_clip_is_told_where_the_script_clips(caplog):
    for told in (False, True):
        program = Program(NORM)
        for number in range(4):
            program.optimizer.zero_grad()
            program.backward(number)
            if number < 2 or not told:
                program.clipper.clip()
            program.optimizer.step()
        said = [record.getMessage() for record in caplog.records]
        assert len(said) == told
    assert "SGD stepped with gradients that weren't clipped" in said[0]


def average(program):
    kept = copy.deepcopy(program.model.state_dict())
    program.model.load_state_dict(kept)


def bound_weights(program):
    with torch.no_grad():
        for p in program.model.parameters():
            p.clamp_(-1, 1)


def make_state(program):
    """As torch's distributed checkpoint does before it loads an optimizer."""
    for p in program.model.parameters():
        p.grad = torch.zeros_like(p)
    for group in program.optimizer.param_groups:
        group["lr"] = 0.0
    for _ in range(2):
        program.optimizer.step()
    program.optimizer.zero_grad()


def no_gradients(program):
    program.optimizer.zero_grad()
    for _ in range(2):
        program.optimizer.step()


def same_gradients(program):
    program.optimizer.step()


def other_parameters(program):
    other = small_model()
    optimizer = sgd(other.parameters())
    for _ in range(2):
        backward(other)
        optimizer.step()
    del program


def another_clipper(program):
    """Clips the same parameters for a while, and another optimizer steps them."""
    other = sgd(program.model.parameters())
    clipper = GradientClipper(NORM, program.model, other)
    for seed in range(3):
        program.optimizer.zero_grad()
        program.backward(seed)
        clipper.clip()
        other.step()


def closed(program):
    program.clipper.close()
    for _ in range(2):
        program.optimizer.zero_grad()
        program.backward(0)
        if program.handle is not None:
            program.handle.remove()
        program.optimizer.step()


@pytest.mark.parametrize("call", ["attached", "called"])
def test_what_is_no_step_is_not_told(call, subtests, caplog):
    harmless = [average, bound_weights, no_gradients, other_parameters, another_clipper, closed]
    # An attached clipper clips these as well.
    harmless += [] if call == "attached" else [make_state, same_gradients]
    for what in harmless:
        with subtests.test(what.__name__):
            program = Program(NORM, call=call)
            what(program) if what is average else None  # a checkpoint, before the first clip
            program.step(0)
            what(program)
            if what is not closed:
                program.step(1)
            program.clipper.flush()
            assert not caplog.records


def saved(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
    "torch.save": saved,
}
CLIPS = {
    "fixed": ({"policies": [NORM]}, sgd),
    "adaptive": ({"policies": [{"type": "zclip", "warmup_steps": 2}]}, sgd),
    "fused": ({"policies": [NORM]}, fused_adamw),
    "debug": ({"policies": [NORM], "debug": True}, sgd),
    "micro-batches": ({"policies": [NORM], "stage": "after_backward"}, sgd),
    "elements": ({"policies": [UClip(limit=0.1, save=True)]}, sgd),
}


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_is_not_attached_says_so_and_goes_on_alike(how, subtests, caplog):
    for name, (config, make) in CLIPS.items():
        with subtests.test(name):
            caplog.clear()
            program = Program(config, make, call="attached")
            program.step(0, 50)
            twin = copy.copy(program)
            parts = (program.model, program.optimizer, program.clipper)
            twin.model, twin.optimizer, twin.clipper = COPIES[how](parts)
            assert "its copy isn't attached" in caplog.text
            twin.handle = twin.clipper.attach(twin.optimizer)
            for seed in range(1, 4):
                program.step(seed, 50)
                twin.step(seed, 50)
            # Not bitwise: torch's copy of a fused optimizer takes no factors, so none is folded.
            torch.testing.assert_close(program.weights, twin.weights, rtol=1e-6, atol=1e-6)
            assert program.counts == twin.counts
            caplog.clear()
            program.handle.remove()
            COPIES[how]((program.model, program.optimizer, program.clipper))
            assert not caplog.records


FREED = {
    **CLIPS,
    "folded": ({"policies": [NORM], "apply": "fold"}, fused_adamw),
    "updates": ({"policies": [NORM], "log": {"update_norm_every": 1}}, sgd),
}


@pytest.mark.parametrize("scale", [None, 1024.0])
@pytest.mark.parametrize("call", ["called", "attached"])
def test_a_program_that_is_dropped_is_freed_at_once(call, scale, subtests):
    def trained(config, make):
        program = Program(config, make, call=call, scale=scale)
        for seed in range(2):
            program.step(seed, 50)
        parts = {"model", "optimizer", "scaler", "clipper", "handle"}
        found = {name: part for name, part in vars(program).items() if name in parts}
        found["parameter"] = next(program.model.parameters())
        return {name: part for name, part in found.items() if part is not None}

    for name, (config, make) in FREED.items():
        with subtests.test(name):
            assert kept(trained, config, make) == set()


@pytest.mark.parametrize("adapter", [False, True])
def test_every_optimizer_is_freed_as_without_a_clipper(adapter, subtests):
    def trained(make, step, clips):
        loop = Loop(functools.partial(_made, make), adapter=adapter)
        if not clips:
            loop.handle.remove()
            del loop.clipper, loop.handle
        step(loop)
        return {**vars(loop), "parameter": next(loop.model.parameters())}

    for name, (make, step) in ONCE.items():
        with subtests.test(name):
            ours, stock = (kept(trained, make, step, clips) for clips in (True, False))
            assert ours <= (stock | {"clipper", "handle"} if stock else stock)


def test_a_scaler_that_is_kept_keeps_no_program():
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)

    def trained():
        program = Program(NORM, call="attached", scale=1.0)
        program.handle.remove()
        program.scaler = scaler
        named = program.model.named_parameters()
        program.clipper = GradientClipper(NORM, named, program.optimizer, scaler=scaler)
        program.handle = program.clipper.attach(program.optimizer)
        program.step(0, 50)
        parts = {name: getattr(program, name) for name in ("model", "optimizer", "clipper")}
        return {**parts, "parameter": next(program.model.parameters())}

    assert kept(trained) == set()
    program = Program(NORM)
    program.scaler = scaler
    program.step(0, 50)


def test_an_optimizer_keeps_the_clipper_that_is_attached():
    program = Program(NORM, call="attached")
    program.handle = program.clipper = None
    backward(program.model, size=50)
    program.optimizer.step()
    norm = torch.nn.utils.get_total_norm([p.grad for p in program.model.parameters()])
    assert float(norm) <= NORM.max_norm * 1.0001


def test_what_a_clipper_tells_once_its_optimizer_is_gone(caplog):
    for config, make in FREED.values():
        program = Program(config, make, call="attached")
        program.step(0, 50)
        before, says = program.clipper.state_dict(), repr(program.clipper)
        program.optimizer = None
        with torch.no_grad():  # as where a checkpoint is loaded
            for parameter in program.model.parameters():
                parameter.add_(1)
        assert repr(program.clipper) == says
        assert program.clipper.flush()["clip/grad_norm"] > 0
        assert str(program.clipper.state_dict()) == str(before)
        program.clipper.load_state_dict(before)
        program.handle.remove()
        with pytest.raises(ConfigError, match="whose optimizer is gone, and a copy is built"):
            copy.copy(program.clipper)
    assert not caplog.records


def test_a_handle_that_was_removed_gives_the_clipper_its_optimizer_back():
    program = Program(NORM, call="attached")
    program.handle.remove()
    program.optimizer = None
    program.backward(0, 50)
    assert program.clipper.clip().clipped
    assert repr(copy.copy(program.clipper)) == repr(program.clipper)


def test_nothing_is_left_on_an_optimizer_by_a_handle_that_was_removed():
    for make in (sgd, fused_adamw):
        program = Program(NORM, make, call="attached")
        program.step(0, 50)
        program.handle.remove()
        hooks = (
            program.optimizer._optimizer_step_pre_hooks,
            program.optimizer._optimizer_step_post_hooks,
        )
        assert not any(hooks)
        assert {"grad_scale", "found_inf", "step"}.isdisjoint(vars(program.optimizer))


@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("clips_by_hand", [False, True])
def test_a_step_that_raised_leaves_the_next_one_to_be_clipped(clips_by_hand, told):
    """Also where the trainer's call around the step isn't told."""
    program = Program(NORM)
    once = OncePerStep(program.clipper, program.optimizer)
    raises = program.optimizer.register_step_pre_hook(_run_out_of_memory)
    program.backward(0, 50)
    if clips_by_hand:
        once.clip()
    with pytest.raises(MemoryError), once.in_step() if told else contextlib.nullcontext():
        program.optimizer.step()
    raises.remove()
    program.optimizer.zero_grad()
    program.backward(1, 70)
    if clips_by_hand and told:
        stale = program.clipper.last_record
        assert once.clip() is not stale
    program.optimizer.step()
    assert once.steps == 1
    norm = torch.nn.utils.get_total_norm([p.grad for p in program.model.parameters()])
    assert float(norm) <= NORM.max_norm * 1.0001


def _run_out_of_memory(*_):
    raise MemoryError
