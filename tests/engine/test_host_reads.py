"""The accelerator path never waits for the device, but for the one read that withholding needs."""

import pytest
import torch
from support.gradients import POLICIES, SHAPES
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from gradclip import ClipByNorm, ClipConfig, GradientClipper, SkipNonfinite, SkipSpike

UNSTEADY = ("cumsum", "put_", "histc", "bincount", "median", "nanmedian", "kthvalue")
"""What raises on CUDA under `torch.use_deterministic_algorithms`; sums of whole numbers don't."""


class Copies(TorchDispatchMode):
    """Notes what fake tensors let pass: copies between kinds of device, and what may raise."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if str(func).startswith(("aten._to_copy", "aten.copy_")):
            source = args[1] if "copy_" in str(func) and "_to_copy" not in str(func) else args[0]
            if source.device.type != result.device.type:
                self.seen.append(f"{func}: {source.device.type} to {result.device.type}")
        name = func.name().removeprefix("aten::").partition(".")[0]
        if name in UNSTEADY and args[0].is_cuda and args[0].is_floating_point():
            self.seen.append(f"{func} isn't deterministic")
        return result


class Reads(TorchDispatchMode):
    """Counts values that cross to the host, in a real run on a CPU."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += str(func).startswith(
            ("aten._local_scalar_dense", "aten.equal", "aten.nonzero")
        )
        return func(*args, **(kwargs or {}))


FREE = {name: policy for name, policy in POLICIES.items() if not policy.withholds}


@pytest.mark.parametrize("policy", FREE.values(), ids=FREE.keys())
def test_a_step_on_fake_cuda_tensors_neither_syncs_nor_copies(policy):
    with FakeTensorMode():
        params = {
            name: torch.nn.Parameter(torch.empty(shape, device="cuda"))
            for name, shape in SHAPES.items()
        }
        values = list(params.values())
        optimizer = torch.optim.SGD([{"params": values[:2]}, {"params": values[2:]}], lr=0.1)
        config = ClipConfig(policies=[policy], on_nonfinite="ignore", log={"per_parameter": True})
        clipper = GradientClipper(config, params.items(), optimizer)
        for parameter in params.values():
            parameter.grad = torch.empty_like(parameter)
        with Copies() as copies:
            record = clipper.clip()
            record.as_metrics()
        assert copies.seen == []
        assert record.grad_norm.device.type == "cuda"


def test_withholding_reads_the_host_once_a_step():
    for name, policy in POLICIES.items():
        params = {key: torch.nn.Parameter(torch.zeros(shape)) for key, shape in SHAPES.items()}
        values = list(params.values())
        optimizer = torch.optim.SGD([{"params": values[:2]}, {"params": values[2:]}], lr=0.1)
        clipper = GradientClipper(policy, params.items(), optimizer, kernel="accelerator")
        for parameter in values:
            parameter.grad = torch.ones_like(parameter)
        with Reads() as reads:
            clipper.clip()
        assert reads.count == 1, name


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())
def test_a_fused_optimizer_reads_nothing_between_flushes(policy):
    """Clipped once a step, and with every micro-batch of a step."""
    for micro_batches in (0, 3):
        params = {name: torch.nn.Parameter(torch.ones(shape)) for name, shape in SHAPES.items()}
        values = list(params.values())
        optimizer = torch.optim.AdamW([{"params": values[:2]}, {"params": values[2:]}], fused=True)
        config = ClipConfig(
            policies=[policy],
            stage="after_backward" if micro_batches else "step",
            log={"every_n_steps": 10, "per_parameter": True},
        )
        clipper = GradientClipper(config, params.items(), optimizer, kernel="accelerator")
        clipper.attach(optimizer)
        steps = 3 if micro_batches else 9
        with Reads() as reads:
            for step in range(steps):
                optimizer.zero_grad()
                for micro in range(max(1, micro_batches)):
                    spike = step + micro == 3 if micro_batches else step == 7
                    loss = sum((p * p).sum() for p in values) * (10.0 if spike else 1.0)
                    if micro_batches:
                        with clipper.micro_batch(loss=loss.detach(), share=1 / micro_batches):
                            (loss / micro_batches).backward()
                    else:
                        clipper.observe_loss(loss.detach())
                        loss.backward()
                optimizer.step()
                metrics = clipper.last_record.as_metrics()
        assert reads.count == 0
        assert len(metrics) > (8 if micro_batches else 7)
        assert clipper.state_dict()["counts"]["steps"] == steps


def test_micro_batches_on_fake_cuda_tensors_neither_sync_nor_copy():
    with FakeTensorMode():
        params = {
            name: torch.nn.Parameter(torch.empty(shape, device="cuda"))
            for name, shape in SHAPES.items()
        }
        optimizer = torch.optim.SGD(params.values(), lr=0.1)
        config = ClipConfig(policies=[FREE["zclip"]], stage="after_backward", on_nonfinite="ignore")
        clipper = GradientClipper(config, params.items(), optimizer)
        with Copies() as copies:
            for _ in range(2):
                with clipper.micro_batch(share=0.5):
                    for parameter in params.values():
                        parameter.grad = torch.empty_like(parameter)
            record = clipper.clip()
        assert copies.seen == []
        assert record.grad_norm.device.type == "cuda"


@pytest.mark.parametrize("on_nonfinite", ["skip", "raise", "ignore"])
def test_a_loss_and_a_bound_add_no_read(on_nonfinite):
    params = {name: torch.nn.Parameter(torch.zeros(shape)) for name, shape in SHAPES.items()}
    policies = [SkipSpike(watch="both", fallback="raise"), SkipNonfinite(max_consecutive=3)]
    config = ClipConfig(policies=policies, on_nonfinite=on_nonfinite)
    clipper = GradientClipper(config, params.items(), kernel="accelerator")
    for parameter in params.values():
        parameter.grad = torch.ones_like(parameter)
    loss = torch.tensor(2.0)
    with Reads() as reads:
        clipper.clip(loss=loss)
    assert reads.count == 1


@pytest.mark.parametrize("kind", [{"fused": True}, {"foreach": True}, {"foreach": False}], ids=str)
def test_an_attached_step_of_a_capturable_optimizer_neither_syncs_nor_copies(kind):
    with FakeTensorMode():
        params = {
            name: torch.nn.Parameter(torch.empty(shape, device="cuda"))
            for name, shape in SHAPES.items()
        }
        optimizer = torch.optim.AdamW(params.values(), capturable=True, **kind)
        rule = "skip" if "fused" in kind else "ignore"
        log = {"update_norm_every": 1}
        config = ClipConfig(policies=[ClipByNorm(max_norm=1.0)], on_nonfinite=rule, log=log)
        GradientClipper(config, params.items(), optimizer).attach(optimizer)
        for step in range(2):
            for p in params.values():
                p.grad = torch.empty_like(p)
            with Copies() as copies:
                optimizer.step()
            assert copies.seen == [] or step == 0  # the first makes the optimizer's state


def test_fake_tensors_do_notice_a_read():
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):
        bool(torch.ones((), device="cuda") > 0)
