"""A short last window: its loss was divided by the full count, its statistics are not."""

import pytest
import torch
from support.prepared import batch, prepared
from torch.utils.data import DataLoader, TensorDataset

from gradclip import ClipByNorm, ZClip

WINDOW = 4


def run(policy, calls, batches, window=WINDOW, way="accelerator"):
    """Records of a run over equal batches, whose parameters don't move."""
    accelerator, clip, model, opt = prepared(policy, gradient_accumulation_steps=window)
    opt.param_groups[0]["lr"] = 0.0
    rows = batch().repeat(batches, 1)
    data = accelerator.prepare(DataLoader(TensorDataset(rows), batch_size=len(batch())))
    records = []
    for (inputs,) in data:
        with accelerator.accumulate(model):
            loss = model(inputs).square().mean()
            if way == "accelerator":
                accelerator.backward(loss)
            else:
                (loss / window).backward()
            if calls and accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), float("inf"))
            opt.step()
            if accelerator.sync_gradients:
                records.append(clip.last_record)
            opt.zero_grad()
    return records, clip.clippers[0].state_dict()["policies"][0]["state"]


def test_statistics_are_those_of_full_windows():
    policy = ZClip(warmup_steps=3, max_norm=None)
    for calls in (True, False):
        (*full, short), state = run(policy, calls, 5 * WINDOW + 1)
        _, wanted = run(policy, calls, 6 * WINDOW)
        assert float(short.grad_norm) == pytest.approx(float(full[0].grad_norm) / WINDOW, rel=1e-5)
        assert float(short.coef) > 0.999
        for name, value in wanted.items():
            torch.testing.assert_close(state[name], value, rtol=1e-5, atol=1e-9, msg=name)


def test_a_fixed_norm_is_absolute():
    for calls in (True, False):
        (full, _), _ = run(ClipByNorm(max_norm=1e9), calls, WINDOW + 2)
        limit = float(full.grad_norm) * 0.25
        (_, short), _ = run(ClipByNorm(max_norm=limit), calls, WINDOW + 2)
        assert float(short.limit) == pytest.approx(limit)
        assert float(short.clipped_norm) == pytest.approx(limit, rel=1e-5)


def test_backwards_that_accelerate_does_not_see_are_a_full_window():
    policy = ZClip(warmup_steps=3, max_norm=None)
    _, state = run(policy, False, 5 * WINDOW + 1, way="loss")
    _, seen = run(policy, False, 5 * WINDOW + 1)
    assert any(not torch.allclose(state[n].double(), v.double()) for n, v in seen.items())


def test_backwards_of_a_step_that_raised_are_not_counted_again():
    limits = []
    for raises in (False, True):
        policy = ZClip(warmup_steps=2, max_norm=None)
        accelerator, clip, model, opt = prepared(policy, gradient_accumulation_steps=WINDOW)
        opt.param_groups[0]["lr"] = 0.0
        for number, length in enumerate([WINDOW] * 3 + [2]):
            accelerator.gradient_state._set_sync_gradients(False)
            for _ in range(length):
                accelerator.backward(model(batch()).square().mean())
            accelerator.gradient_state._set_sync_gradients(True)
            if raises and number == 2:
                fault = opt.optimizer.register_step_pre_hook(_run_out_of_memory)
                with pytest.raises(MemoryError):
                    opt.step()
                fault.remove()
            else:
                opt.step()
            opt.zero_grad()
        limits.append(float(clip.last_record.limit))
    assert limits[0] == pytest.approx(limits[1], rel=1e-5)


def _run_out_of_memory(*_):
    raise MemoryError
