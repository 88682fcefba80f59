"""`debug: true` with an Accelerator: right programs pass, and a fault is an error."""

import pytest
import torch
from support.accelerate_cpu import with_scaler
from support.prepared import batch, net, prepared

import accelerate_clip
from gradclip import ClipByNorm, ClipConfig, DebugError

LIMIT = 0.2


def config_of(**options):
    return ClipConfig(policies=[ClipByNorm(max_norm=LIMIT)], **options)


@pytest.mark.filterwarnings("ignore:Seems like .optimizer.step.* has been overridden")
@pytest.mark.parametrize("apply", ["auto", "fold"])
def test_right_programs_pass_and_end_as_without_it(apply):
    ends = []
    for debug in (False, True):
        accelerator = with_scaler()
        clip = accelerate_clip.enable(accelerator, config_of(debug=debug, apply=apply))
        model = net()
        optimizer = torch.optim.AdamW(model.parameters(), fused=apply == "fold")
        model, opt = accelerator.prepare(model, optimizer)
        for step in range(4):
            opt.zero_grad()
            loss = model(batch(step)).float().square().mean()
            accelerator.backward(loss * (float("inf") if step == 2 else 1.0))
            if step % 2:
                accelerator.clip_grad_norm_(model.parameters(), LIMIT)
            opt.step()
        ends.append([p.detach() for p in model.parameters()])
        assert clip.clippers[0].state_dict()["counts"]["skipped"] == 1
    assert all(map(torch.equal, *ends))


def test_a_step_without_a_backward_is_found():
    accelerator, _, model, opt = prepared(config_of(debug=True))
    accelerator.backward(model(batch()).square().mean())
    opt.step()
    with pytest.raises(DebugError, match="a backward is missing"):
        opt.step()
