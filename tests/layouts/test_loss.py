"""The loss over ranks: one small message, one decision, whichever ranks have a loss."""

import math

import pytest
import torch
from support.comms import CountComms
from support.gradients import small_model
from support.ranks import run_on_ranks

from gradclip import ClipByNorm, ConfigError, GradientClipper, SkipSpike

LOSSES = [(2.0, 2.2), (1.9, 2.1), (2.1, 1.9), (2.0, 2.0), (2.0, 60.0), (1.0, math.nan), (2.1, 2.1)]
POLICY = SkipSpike(window=4, watch="loss", warmup_steps=3)


def clipper_of(policy):
    model = small_model()
    optimizer = torch.optim.AdamW(model.parameters())
    return model, optimizer, GradientClipper(policy, model.named_parameters(), optimizer)


def fill(model):
    for p in model.parameters():
        p.grad = torch.ones_like(p)


def train(rank, world, without):
    model, optimizer, clipper = clipper_of(POLICY)
    skipped, messages, moved = [], [], []
    for losses in LOSSES:
        fill(model)
        before = [p.detach().clone() for p in model.parameters()]
        with CountComms() as comms:
            record = clipper.clip(loss=None if rank == without else losses[rank])
        optimizer.step()
        messages.append(comms.messages)
        skipped.append(bool(record.skipped))
        moved.append(not all(map(torch.equal, before, model.parameters())))
    state = clipper.state_dict()["policies"][0]["state"]
    return skipped, messages, moved, state["losses"].squeeze(1).tolist()


def test_ranks_agree_on_the_mean_of_their_losses():
    first, second = run_on_ranks(train, 2, None)
    assert first == second
    skipped, messages, moved, seen = first
    assert skipped == [False] * 4 + [True, True, False]
    assert messages == [[16]] * len(LOSSES)
    assert moved == [not skip for skip in skipped]
    assert seen == pytest.approx([2.0, 2.0, 2.0, 2.1])


def test_a_rank_without_a_loss_follows_those_that_have_one():
    first, second = run_on_ranks(train, 2, 0)
    assert first == second
    assert first[0] == [False] * 4 + [True, True, False]
    assert first[3] == pytest.approx([2.1, 1.9, 2.0, 2.1])


def nobody(rank, world):
    model, _, clipper = clipper_of(POLICY)
    fill(model)
    with pytest.raises(ConfigError, match="no rank has given one"):
        clipper.clip()
    assert all((p.grad == 1).all() for p in model.parameters())
    model, _, clipper = clipper_of(ClipByNorm(max_norm=1.0))
    fill(model)
    with CountComms() as comms:
        clipper.clip(loss=torch.tensor(float(rank)))
    return comms.messages


def test_no_loss_is_an_error_and_no_watcher_sends_nothing():
    assert run_on_ranks(nobody, 2) == [[], []]
