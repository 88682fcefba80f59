"""What a step costs the host: operations, and numbers in the place of tensors, with equal bits."""

import math
import subprocess
import sys
from functools import partial

import pytest
import torch
from support.gradients import POLICIES
from support.ops import CountOps
from torch._dynamo.utils import counters
from torch._inductor import config as inductor
from torch._inductor import metrics

from benchmarks.speed.counts import counted, our_step, torchs_step
from benchmarks.speed.gradients import GPT2, SETS
from gradclip import (
    ClipByNorm,
    ClipConfig,
    ConfigError,
    EmaClip,
    GradientClipper,
    SkipNonfinite,
    SkipSpike,
    ZClip,
    after,
)
from gradclip.decide import decide_all, decide_on_host, take_numbers
from gradclip.plan.plan import Rule
from gradclip.policies.arithmetic import tensors_of

CPU = torch.device("cpu")
SCHEDULE = {"schedule": "warmup_cosine", "start": 0.5, "peak": 2.0, "end": 0.1, "steps": 100}
SCHEDULE |= {"warmup_steps": 20, "begin": 3}
LISTS = {
    **{name: [policy] for name, policy in POLICIES.items()},
    "schedule": [ClipByNorm(max_norm=SCHEDULE)],
    "zclip percentile": [ZClip(mode="percentile")],
    "zclip mean": [ZClip(clip_option="mean", skip_update_on_spike=True)],
    "zclip median": [ZClip(warmup="median", warmup_steps=5, escape_after=None)],
    "zclip floor": [ZClip(variance="exact", sigma_floor=0.02, min_norm=0.1, max_norm=SCHEDULE)],
    "zclip escapes": [ZClip(escape_after=3, warmup_steps=4)],
    "ema raw": [EmaClip(update="raw", escape_after=None)],
    "ema skip": [EmaClip(update="skip", escape_after=3, warmup_steps=3)],
    "spike median": [SkipSpike(statistic="median", window=9)],
    "spike clip": [SkipSpike(watch="both", fallback="clip", max_consecutive=2, window=8)],
    "spike loss": [SkipSpike(watch="loss", include_skipped=True, max_consecutive=None)],
    "spike raise": [SkipSpike(fallback="raise", max_consecutive=2, warmup_steps=3)],
    "four": [ZClip(), ClipByNorm(max_norm=0.7), EmaClip(warmup_steps=5), SkipNonfinite()],
    "after": [after(10, ZClip(warmup_steps=3)), ClipByNorm(max_norm=2.0)],
}


def rules_of(policies):
    """Rules of one slot, whatever the scope."""
    owner = torch.zeros(1, dtype=torch.int64)
    return [
        Rule((0, i), p, ("all",), (0,), None, owner, same_slots=True, sizes=torch.ones(1).double())
        for i, p in enumerate(policies)
    ]


TAKEN = {name: policies for name, policies in LISTS.items() if take_numbers(rules_of(policies))}


def observations():
    """200 norms, among them NaN, inf, 0, spikes and a new level; and as many losses."""
    generator = torch.Generator().manual_seed(1)
    norms = torch.empty(200, dtype=torch.float64).log_normal_(-1, 0.7, generator=generator)
    losses = torch.empty(200, dtype=torch.float64).normal_(generator=generator)
    norms[30], norms[31], norms[40], norms[50] = math.nan, math.inf, 0.0, 80.0
    norms[60:75] *= 30
    norms[100:] *= 50
    losses[20], losses[90], losses[120:125] = math.nan, 30.0, 40.0
    return norms, losses


@pytest.mark.parametrize("policies", TAKEN.values(), ids=TAKEN.keys())
def test_numbers_of_the_host_give_the_bits_of_tensors(policies):
    rules = rules_of(policies)
    p = next((p.measured[1] for p in policies if p.measured[1]), 2.0)
    tensors = [policy.init(1, CPU) for policy in policies]
    numbers = [dict(state) for state in tensors]
    step, taken = torch.zeros((), dtype=torch.float64), 0.0
    for index, (norm, loss) in enumerate(zip(*observations(), strict=True)):
        how = {"skip_nonfinite": index % 2 == 0, "share": 0.5 if index % 7 == 0 else 1.0}
        how |= {"weights": None, "rate": None, "held": None, "loss": loss}
        norms = {p: norm.reshape(1)}
        one, tensors = decide_all(rules, norms, tensors, step=step, **how)
        other, known, numbers = decide_on_host(rules, norms, numbers, step=taken, **how)
        step, taken = step + one.keeps, taken + bool(other.keeps)
        assert known.limit == other.limit
        names = ("coef", "limit", "finite", "skip", "stop", "keeps")
        found = [
            {name: getattr(verdict, name) for name in names if getattr(verdict, name) is not None}
            for verdict in (one, other)
        ]
        for a, b in zip([found[0], *tensors], [found[1], *numbers], strict=True):
            b = tensors_of(b, CPU)
            assert list(a) == list(b)
            for name in a:
                torch.testing.assert_close(a[name], b[name], rtol=0, atol=0, equal_nan=True)


class OnTensors(ZClip):
    """A policy of a user's that overrides one of ours, and knows tensors alone."""

    def decide(self, stats, state):
        assert isinstance(stats.norms, torch.Tensor)
        return super().decide(stats, {name: value.clone() for name, value in state.items()})


def test_policies_that_say_nothing_of_numbers_get_tensors():
    assert {"norm", "zclip", "ema", "skip_nonfinite", "skip_spike"} <= TAKEN.keys()
    assert not TAKEN.keys() & {"adagc", "agc", "spam", "uclip", "value"}
    assert not take_numbers(rules_of([ClipByNorm(max_norm=1.0), OnTensors()]))


@pytest.mark.parametrize(
    ("name", "kernel", "most"),
    [
        ("norm", "cpu", 10),  # torch's clip_grad_norm_: 8
        ("four", "cpu", 14),
        ("norm", "accelerator", 21),
        ("zclip", "accelerator", 90),
    ],
)
def test_a_step_of_20_tensors_dispatches_few_operations(name, kernel, most):
    params = {str(index): torch.nn.Parameter(torch.ones(8)) for index in range(20)}
    optimizer = torch.optim.AdamW(params.values(), fused=kernel == "accelerator")
    clipper = GradientClipper(ClipConfig(policies=LISTS[name]), params, optimizer, kernel=kernel)
    for _ in range(3):
        for parameter in params.values():
            parameter.grad = torch.full_like(parameter, 0.01)
        with CountOps() as made:
            clipper.clip()
    assert made.writes <= most


def steps_of(name, **how):
    """What 30 steps decide on the accelerator path, among them one with NaN and one large one."""
    params = {str(index): torch.nn.Parameter(torch.ones(8)) for index in range(4)}
    optimizer = torch.optim.AdamW(params.values(), fused=True)
    config = ClipConfig(policies=LISTS[name], **how)
    clipper = GradientClipper(config, params, optimizer, kernel="accelerator")
    generator = torch.Generator().manual_seed(2)
    for index in range(30):
        size = {11: math.nan, 20: 100.0}.get(index, 1.0)
        for parameter in params.values():
            parameter.grad = size * torch.randn(8, generator=generator)
        clipper.clip()
        optimizer.step()
    names = ("grad_norm", "limit", "coef", "clipped_norm", "clipped", "skipped", "finite")
    return torch.tensor([[float(row[n]) for n in names] for row in clipper.recorder.steps()])


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # inductor's own
def test_a_compiled_decision_is_the_eager_one_in_few_kernels():
    torch.compiler.reset()
    metrics.reset()
    counters.clear()
    compiled = steps_of("four", compile=True)
    torch.testing.assert_close(compiled, steps_of("four"), rtol=1e-12, atol=0, equal_nan=True)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    assert 1 <= metrics.generated_kernel_count <= 20


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # inductor's own
def test_compile_without_a_compiler_is_refused_at_the_first_step():
    torch.compiler.reset()
    said = pytest.raises(ConfigError, match=r"compile is true, and torch can't compile.*Set com")
    with inductor.patch("cpp.cxx", ("no-such-compiler",)), said:
        steps_of("four", compile=True)
    torch.compiler.reset()


@pytest.mark.parametrize(("name", "most"), [("norm", 29), ("zclip", 94)])
def test_a_step_of_gpt2_on_an_accelerator_launches_few_kernels(name, most):
    """With the bytes of torch's, which launches 10; counted on fake CUDA tensors."""
    ours = counted(SETS[GPT2], partial(our_step, LISTS[name]))
    theirs = counted(SETS[GPT2], torchs_step)
    assert ours.launches <= most
    assert ours.bytes <= 1.0001 * theirs.bytes


def test_importing_gradclip_is_light_and_numpy_is_optional():
    code = """
import sys
sys.modules["numpy"] = None
import torch, gradclip
model = torch.nn.Linear(2, 1)
clipper = gradclip.GradientClipper(gradclip.ZClip(), model)
model(torch.ones(1, 2)).sum().backward()
assert clipper.clip().finite
heavy = {"torch.distributed.tensor", "torch.distributed.fsdp", "sympy", "pyarrow", "typer"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
