"""`debug: true`: right programs pass, and each thing that it watches is broken once on purpose."""

import pytest
import torch
from support.gradients import POLICIES, small_model
from support.program import Program, fused_adamw
from support.ranks import run_on_ranks

from gradclip import ClipByNorm, ClipConfig, DebugError, GradientClipper, SkipLarge
from gradclip.kernels.accelerator import AcceleratorKernel
from gradclip.kernels.cpu import CpuKernel

LIMIT = 0.05
FOLD = {"make": fused_adamw, "apply": "fold"}
MICRO = {"stage": "after_backward"}
WAYS = {
    "called": {},
    "attached": {"call": "attached"},
    "accelerator": {"kernel": "accelerator"},
    "folded": {"call": "attached", **FOLD},
    "folded by call": FOLD,
    "micro-batches": MICRO,
    "micro-batches on a device": {"kernel": "accelerator", **MICRO},
    "scaled": {"scale": 2.0**16},
    "scaled and folded": {"call": "attached", "scale": 2.0**16, **FOLD},
    "scaled micro-batches": {"scale": 2.0**16, **MICRO},
}


def start(*policies, debug=True, apply="auto", stage="step", make=torch.optim.AdamW, **options):
    policies = list(policies) or [ClipByNorm(max_norm=LIMIT)]
    config = ClipConfig(policies=policies, debug=debug, apply=apply, stage=stage)
    return Program(config, make, **options)


def test_a_right_program_passes_and_ends_bitwise_as_without_debug(subtests):
    for name, way in WAYS.items():
        with subtests.test(name):
            ends = []
            for debug in (False, True):
                program = start(debug=debug, **way)
                for seed, size in enumerate([1.0, 0.01, float("inf"), 50.0, 1.0]):
                    record = program.step(seed, size)
                ends.append(program.weights)
                assert record.coef < 1
            assert torch.equal(*ends)


@pytest.mark.parametrize("stage", ["step", "after_backward"])
def test_a_right_program_passes_with_every_policy(stage, subtests):
    for name, policy in POLICIES.items():
        if getattr(policy, "exclude", None):
            policy = policy.model_copy(update={"exclude": ["0.*"]})
        for dtype in (torch.float32, torch.bfloat16):
            with subtests.test(f"{name} in {dtype}"):
                program = start(policy, stage=stage, dtype=dtype)
                for seed, size in enumerate([1.0, 30.0, float("nan"), 2.0, 1e3, 1.0]):
                    program.clipper.observe_loss(size)
                    program.step(seed, size)


def take_the_factor_away(optimizer, *_):
    optimizer.grad_scale = None


def test_gradients_that_are_not_scaled_are_found(subtests, monkeypatch):
    for name, way in WAYS.items():
        with subtests.test(name), monkeypatch.context() as patch:
            program = start(**way)
            program.step(0)
            if way.get("apply") == "fold":
                program.optimizer.register_step_pre_hook(take_the_factor_away)
            else:
                for kernel in (CpuKernel, AcceleratorKernel):
                    patch.setattr(kernel, "scale_", lambda *_: None)
            with pytest.raises(DebugError, match=r"the norm of .* is .* allowed: at most 0\.0"):
                program.step(1)


def test_one_parameter_that_is_not_scaled_is_named(monkeypatch):
    scale = CpuKernel.scale_

    def all_but_the_first(self, grads, coef):
        scale(self, [[], *grads[1:]], coef)

    monkeypatch.setattr(CpuKernel, "scale_", all_but_the_first)
    program = start(ClipByNorm(max_norm=LIMIT, scope="parameter"))
    with pytest.raises(DebugError, match=r"the norm of '0\.weight'"):
        program.step(0)


def test_a_step_without_a_backward_is_found(subtests):
    for name in ("called", "attached", "folded", "folded by call"):
        program = start(**WAYS[name])
        program.step(0)
        stale = pytest.raises(DebugError, match="all gradients are as the last clip or step left")
        with subtests.test(name), stale:
            program.finish()


def test_clipping_twice_is_found():
    program = start()
    program.backward(0)
    program.clipper.clip()
    with pytest.raises(DebugError, match="clip\\(\\) once a step"):
        program.clipper.clip()


def test_one_gradient_that_stayed_from_the_step_before_is_named():
    program = start()
    program.step(0)
    kept = program.model[2].bias.grad
    program.optimizer.zero_grad()
    program.backward(1)
    program.model[2].bias.grad = kept
    with pytest.raises(DebugError, match=r"the gradients of \['2\.bias'\] are"):
        program.clipper.clip()


def test_micro_batches_upon_what_the_last_step_left_are_found():
    program = start(**MICRO)
    program.step(0)
    with pytest.raises(DebugError, match="zero_grad"):
        program.backward(1)


def test_gradients_that_are_zeroed_in_place_are_new():
    program = start()
    for seed in range(3):
        program.optimizer.zero_grad(set_to_none=False)
        program.backward(seed)
        program.finish()


def on_rank(rank, world):
    """Messages of one step, with and without debug; and what is said of a broken kernel."""
    from support.comms import CountComms
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    policies = [SkipLarge(limit=1e9), ClipByNorm(max_norm=LIMIT)]
    sent, said = {}, ""
    for debug, broken in ((False, False), (True, False), (True, True)):
        model = fully_shard(small_model(), mesh=init_device_mesh("cpu", (world,)))
        config = ClipConfig(policies=policies, debug=debug)
        clipper = GradientClipper(config, model.named_parameters())
        (model(torch.ones(4, 4) * (rank + 1)).square().mean() * 100).backward()
        with pytest.MonkeyPatch.context() as patch, CountComms() as seen:
            if broken:
                patch.setattr(CpuKernel, "scale_", lambda *_: None)
            try:
                clipper.clip()
            except DebugError as error:
                said = str(error)
        if not broken:
            sent[debug] = len(seen.messages)
    return sent, said


def test_every_rank_of_a_sharded_model_finds_the_same():
    (sent, said), other = run_on_ranks(on_rank, 2)
    assert sent == {False: 1, True: 3}
    assert "the norm of" in said
    assert other == (sent, said)
