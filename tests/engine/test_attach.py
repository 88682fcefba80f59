"""A clipper that is attached to an optimizer clips inside its step. Scalers: test_scaler.py."""

import pytest
import torch
from support.gradients import NORM, backward, flat, small_model
from support.program import Program, sgd

from gradclip import ConfigError, GradientClipper, SkipSpike


def test_an_attached_clipper_clips_before_each_step_as_a_call_would():
    attached, called = (Program(NORM, call=call) for call in ("attached", "called"))
    for seed in range(5):
        assert attached.step(seed, 50).clipped
        called.step(seed, 50)
    assert torch.equal(attached.weights, called.weights)
    assert attached.counts["steps"] == 5


def test_a_removed_handle_clips_no_more():
    program = Program(NORM, call="attached")
    program.handle.remove()
    program.backward(0, 50)
    before = program.grads
    program.optimizer.step()
    assert all(map(torch.equal, program.grads, before))


def test_attached_twice_or_called_as_well_would_count_twice():
    program = Program(NORM, call="attached")
    with pytest.raises(ConfigError, match="attached already"):
        program.clipper.attach(program.optimizer)
    program.backward(0, 50)
    program.clipper.clip()
    before = program.grads
    with pytest.raises(ConfigError, match=r"clip\(\) was called since the last step"):
        program.optimizer.step()
    assert all(map(torch.equal, program.grads, before))
    assert program.counts["steps"] == 1
    program.handle.remove()
    program.handle.remove()
    program.optimizer.step()
    program.clipper.attach(program.optimizer)
    program.optimizer.zero_grad()
    program.backward(0, 50)
    program.optimizer.step()
    assert program.counts["steps"] == 2


def test_what_a_closure_returns_is_the_loss_unless_one_was_observed():
    program = Program(SkipSpike(window=4, watch="loss"), call="attached")

    def closure():
        backward(program.model)
        return torch.tensor(7.0)

    program.optimizer.step(closure)
    program.clipper.observe_loss(5.0)
    program.optimizer.step(closure)
    losses = program.clipper.state_dict()["policies"][0]["state"]["losses"]
    assert losses[-2:, 0].tolist() == [7.0, 5.0]
    with pytest.raises(ConfigError, match="a policy watches the loss, and no rank has given one"):
        program.optimizer.step(lambda: (closure(), "and what else it returns"))


def test_a_closures_gradients_are_clipped_after_its_backward():
    for keyword in (True, False):
        ends = []
        for call in ("attached", "called"):
            program = Program(NORM, call=call)

            def closure(program=program):
                backward(program.model, size=50)
                if program.call == "called":
                    program.clipper.clip()
                return torch.tensor(7.0)

            step = program.optimizer.step
            assert (step(closure=closure) if keyword else step(closure)) == 7.0
            ends.append(program.weights)
        assert torch.equal(*ends), f"{keyword=}"
        assert flat(dict(program.model.named_parameters())).norm() <= NORM.max_norm


def test_a_foreign_optimizer_is_refused():
    clipper = GradientClipper(NORM, small_model().named_parameters())
    with pytest.raises(ConfigError, match="shares no parameter with this clipper"):
        clipper.attach(sgd(small_model().parameters()))
