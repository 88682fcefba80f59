"""Precision x optimizer, accumulated with a short last window: the steps of a plain fp32 loop."""

import copy
import itertools
import math

import pytest
import torch
from accelerate import Accelerator
from support.accelerate_cpu import with_scaler
from support.prepared import batch, net, norm_of
from torch.utils.data import DataLoader, TensorDataset

import accelerate_clip
from gradclip import ClipByNorm

# Accelerate replaces the optimizer's step while a scaler is on, and silences this itself.
pytestmark = pytest.mark.filterwarnings("ignore:Seems like .optimizer.step.* has been overridden")

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "fused sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "fused adamw": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
}
FIRST = dict(zip(OPTIMIZERS, (0, 0, 1, 1), strict=True))
"""Which steps the loop clips by itself: the first and the third, or the second."""
# Without a loss scale bf16 takes the way of "no".
CELLS = [(precision, name) for precision in ("no", "fp16") for name in OPTIMIZERS]
CELLS.append(("bf16", "adamw"))
LIMIT, WINDOW, SIZE = 4.0, 4, 3
# Autocast computes forward and backward passes in two or three digits.
CLOSE = {"no": (1e-6, 1e-6), "bf16": (2e-2, 1e-2), "fp16": (3e-3, 2e-3)}


def rows():
    """Ten batches; the middle window is a spike, the last one short."""
    return torch.cat([batch(i, SIZE) * (4.0 if 4 <= i < 8 else 0.5) for i in range(10)])


def plain(optimizer):
    """Norms and parameters after each step, in fp32, each window as one big batch."""
    model = net()
    opt = OPTIMIZERS[optimizer](model.parameters())
    norms, after = [], []
    for window in rows().split(WINDOW * SIZE):
        loss = model(window).square().mean() * (len(window) / (WINDOW * SIZE))
        opt.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), LIMIT)))
        opt.step()
        after.append([p.detach().clone() for p in model.parameters()])
    return norms, after


def accelerator_of(precision, scale=1024.0):
    if precision == "fp16":
        return with_scaler(scale)
    return Accelerator(cpu=True, mixed_precision=precision)


def clipped(accelerator, optimizer, factor=1.0):
    """The same of a loop with Accelerate, and the gradients as each step leaves them.

    The loop clips every other step by itself.
    """
    accelerator.gradient_accumulation_steps = WINDOW
    clip = accelerate_clip.enable(accelerator, ClipByNorm(max_norm=LIMIT * factor))
    model = net()
    data = DataLoader(TensorDataset(rows()), batch_size=SIZE)
    opt = OPTIMIZERS[optimizer](model.parameters())
    model, opt, data = accelerator.prepare(model, opt, data)
    norms, after, grads = [], [], []
    for (inputs,) in data:
        with accelerator.accumulate(model):
            accelerator.backward(model(inputs).float().square().mean() * factor)
            if accelerator.sync_gradients and len(norms) % 2 == FIRST[optimizer]:
                accelerator.clip_grad_norm_(model.parameters(), LIMIT * factor)
            opt.step()
            if accelerator.sync_gradients:
                norms.append(float(clip.last_record.grad_norm))
                after.append([p.detach().clone() for p in model.parameters()])
                grads.append([p.grad.clone() for p in model.parameters()])
            opt.zero_grad()
    assert clip.steps[0] == 3
    return norms, after, grads


@pytest.mark.parametrize(("precision", "optimizer"), CELLS)
def test_every_step_is_that_of_a_plain_loop(precision, optimizer):
    want, then = plain(optimizer)
    assert [norm > LIMIT for norm in want] == [True, True, False]
    norms, now, grads = clipped(accelerator_of(precision), optimizer)
    rel, near = CLOSE[precision]
    assert norms == pytest.approx(want, rel=rel)
    assert [norm_of(g) for g in grads] == pytest.approx([min(n, LIMIT) for n in want], rel=rel)
    for step, parameters in enumerate(now):
        for got, one in zip(parameters, then[step], strict=True):
            torch.testing.assert_close(got, one, rtol=0, atol=near)


@pytest.mark.parametrize("optimizer", ["adamw", "fused adamw"])
def test_limits_and_gradients_do_not_depend_on_the_loss_scale(optimizer):
    # A smaller loss leaves room in fp16 for the larger scale.
    scales = (1.0, 65536.0)
    one, many = (clipped(accelerator_of("fp16", s), optimizer, 1 / 256) for s in scales)
    torch.testing.assert_close(one, many, rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("scaled", [False, True], ids=["unscaled", "scaled"])
def test_a_withheld_step_leaves_parameters_and_state_bit_by_bit(optimizer, scaled):
    """Of a momentum and second moments that are there, and of an optimizer that never stepped."""
    for first, calls in itertools.product((0, 2), (True, False)):
        states = []
        accelerator = accelerator_of("fp16" if scaled else "no")
        accelerate_clip.enable(accelerator, ClipByNorm(max_norm=LIMIT))
        model = net()
        model, opt = accelerator.prepare(model, OPTIMIZERS[optimizer](model.parameters()))
        schedule = accelerator.prepare(torch.optim.lr_scheduler.StepLR(opt.optimizer, 1, 0.5))
        rates = []
        for step in range(first + 1):
            opt.zero_grad()
            factor = math.nan if step == first else 1.0
            accelerator.backward(model(batch(step)).float().square().mean() * factor)
            states.append(copy.deepcopy(([*model.parameters()], opt.state_dict()["state"])))
            if calls:
                accelerator.clip_grad_norm_(model.parameters(), LIMIT)
            rates.append(opt.param_groups[0]["lr"])
            opt.step()
            schedule.step()
        assert rates[-1] == opt.param_groups[0]["lr"] == rates[0] * 0.5**first
        (old, before), after = states[-1], opt.state_dict()["state"]
        assert accelerator.optimizer_step_was_skipped
        assert all(map(torch.equal, old, model.parameters()))
        assert len(before) == (4 if first else 0)
        for index, known in before.items():
            for name, value in known.items():
                assert torch.equal(value, after[index][name]), name
        assert first or not any(state.values() for state in after.values())
