"""`auto`: what its limit follows, where it starts, and what an optimizer has to do with it."""

import math
from itertools import pairwise

import pytest
import torch
from support.gradients import SIZES, fill, parameters
from torch import nn

from gradclip import Auto, ClipConfig, GradientClipper, as_config
from gradclip.plan.rates import rate_of

CPU = torch.device("cpu")
MODEL = nn.Linear(3, 2)
SGD = torch.optim.SGD(MODEL.parameters(), lr=0.1)


class OwnSGD(torch.optim.SGD):
    """A user's subclass."""


class Holding:
    """What DeepSpeed's layout shows of its optimizer."""

    def __init__(self, optimizer):
        self.stepping, self.param_groups = optimizer, optimizer.param_groups


def groups(*options):
    return [{"params": [nn.Parameter(torch.ones(2))], **group} for group in options]


RATES = {
    "SGD": (torch.optim.SGD(groups({}), lr=0.1), 0.1),
    "momentum": (torch.optim.SGD(groups({}), lr=0.1, momentum=0.9), 1.0),
    "dampening": (torch.optim.SGD(groups({}), lr=0.1, momentum=0.9, dampening=0.9), 0.1),
    "endless momentum": (torch.optim.SGD(groups({}), lr=0.1, momentum=1.0), 100.0),
    "the largest of its groups": (torch.optim.SGD(groups({"lr": 0.3}, {}), lr=0.1), 0.3),
    "a tensor": (torch.optim.SGD(groups({"lr": torch.tensor(0.5)}, {}), lr=0.1), 0.5),
    "a subclass": (OwnSGD(groups({}), lr=0.1), 0.1),
    "within DeepSpeed": (Holding(torch.optim.SGD(groups({}), lr=0.1)), 0.1),
    "a pause": (torch.optim.SGD(groups({}), lr=0.0), 0.0),
    "AdamW": (torch.optim.AdamW(groups({}), lr=0.1), None),
    "Muon": (torch.optim.Muon([nn.Parameter(torch.ones(2, 2))], lr=0.1), None),
    "none": (None, None),
}


def test_rate_of_an_optimizer(subtests):
    for name, (optimizer, expected) in RATES.items():
        with subtests.test(name):
            rate, number = rate_of(optimizer, CPU), rate_of(optimizer, None)
            if expected is None:
                assert rate is number is None
            else:
                assert (rate.dtype, rate.shape) == (torch.float64, ())
                assert float(rate) == number == pytest.approx(expected)


def by_hand(norms, size=None, rates=None):
    """The limits of these norms; `size` and `rates` with SGD alone."""
    mean, most, limits = 0.0, 0.0, []
    for step, norm in enumerate(norms):
        mean = mean or (norm if rates else 0.1 * norm)
        limit = 1.2 * mean
        if rates:
            most = max(most, rates[step])
            limit = min(limit, 0.07 * size / most)
        mean = 0.98 * mean + 0.02 * min(norm, limit)
        limits.append(limit)
    return limits


def taken(optimizer_of, rates=None, sizes=SIZES, policy=None):
    """Norms and limits of a run whose gradients have these sizes; parameters stay as they are."""
    params = parameters()
    for seed, parameter in enumerate(params.values()):
        generator = torch.Generator().manual_seed(seed)
        parameter.data.normal_(generator=generator)
    optimizer = optimizer_of(list(params.values()))
    clipper = GradientClipper(policy, params.items(), optimizer)
    records = []
    for step, size in enumerate(sizes):
        if rates:
            optimizer.param_groups[0]["lr"] = rates[step]
        fill(params, step, size)
        records.append(clipper.clip())
    norms, limits = ([float(getattr(r, name)) for r in records] for name in ("grad_norm", "limit"))
    size = math.sqrt(sum(float(p.detach().double().square().sum()) for p in params.values()))
    return norms, limits, size


def test_with_adam_it_starts_low_and_takes_clipped_norms_in():
    norms, limits, _ = taken(torch.optim.AdamW)
    assert limits == pytest.approx(by_hand(norms), rel=1e-6)
    assert limits[0] == pytest.approx(0.12 * norms[0])
    assert max(b / a for a, b in pairwise(limits)) <= 1.004 + 1e-9


def test_with_sgd_it_starts_at_the_first_norm_below_what_moves_the_parameters():
    rates = [0.001, 0.002, 0.3, 0.1, 0.01, 1e-3, 0.2, 0.3, 0.1, 0.5, 0.01, 0.001]
    norms, limits, size = taken(torch.optim.SGD, rates)
    assert limits == pytest.approx(by_hand(norms, size, rates), rel=1e-6)
    assert limits[0] == pytest.approx(1.2 * norms[0])  # the rate is small yet
    assert limits[9:] == pytest.approx([0.07 * size / 0.5] * 3)  # the largest rate so far holds


def test_a_loss_that_grows_raises_no_limit_of_sgd():
    growing = [1.01**step for step in range(1000)]
    _, limits, size = taken(lambda p: torch.optim.SGD(p, lr=0.1), sizes=growing)
    assert limits[-1] == pytest.approx(0.07 * size / 0.1)
    _, limits, _ = taken(torch.optim.AdamW, sizes=growing)
    assert limits[-1] > 10 * limits[0]  # while Adam's follows


def test_parameters_of_zeros_can_be_trained():
    params = parameters()
    optimizer = torch.optim.SGD(params.values(), lr=1.0)
    fill(params, 0, 100.0)
    record = GradientClipper(params.items(), optimizer).clip()
    elements = sum(p.numel() for p in params.values())
    assert float(record.limit) == pytest.approx(0.07 * 0.01 * math.sqrt(elements))


def test_a_share_of_a_window_has_the_same_reach():
    params = parameters()
    optimizer = torch.optim.SGD(params.values(), lr=1.0)
    fill(params, 0, 100.0)
    whole = GradientClipper(params.items(), optimizer).clip()
    fill(params, 0, 100.0)
    part = GradientClipper(params.items(), optimizer).clip(share=0.25)
    assert float(part.limit) == pytest.approx(float(whole.limit))


def test_what_never_had_a_gradient_has_no_limit():
    params = parameters()
    clipper = GradientClipper(Auto(scope="parameter"), params.items())
    fill(params, 0)
    params["scale"].grad = None
    assert 0 < float(clipper.clip().limit) < math.inf


@pytest.mark.parametrize(
    ("optimizer_of", "is_known", "told"),
    [(torch.optim.SGD, False, 1), (torch.optim.SGD, True, 0), (torch.optim.AdamW, False, 0)],
)
def test_an_optimizer_that_it_should_know_is_named_once(optimizer_of, is_known, told, caplog):
    model = nn.Linear(3, 2)
    optimizer = optimizer_of(model.parameters(), lr=0.1)
    clipper = GradientClipper(model, optimizer if is_known else None)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.ones(1, 3)).sum().backward()
        clipper.clip()
        optimizer.step()
    assert caplog.text.count("without the SGD that steps its parameters") == told


DEFAULTS = {
    "a model": lambda: GradientClipper(MODEL),
    "an optimizer": lambda: GradientClipper(SGD),
    "an optimizer by name": lambda: GradientClipper(optimizer=SGD),
    "both": lambda: GradientClipper(MODEL, SGD),
    "names, and the optimizer by name": lambda: GradientClipper(
        MODEL.named_parameters(), optimizer=SGD
    ),
    "a list in YAML": lambda: GradientClipper({"policies": [{"type": "auto"}]}, MODEL, SGD),
}


def test_without_a_policy_it_is_auto(subtests):
    assert as_config(None) == ClipConfig(policies=[Auto()])
    for name, make in DEFAULTS.items():
        with subtests.test(name):
            assert make().config == ClipConfig(policies=[Auto()])
