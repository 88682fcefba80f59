"""Groups: who follows which policies, who counts, who is scaled, who is watched."""

import math
from itertools import product

import pytest
import torch
from support.gradients import assert_same_grads, fill, grads, optimizer_for, parameters
from torch import nn

from gradclip import ClipByNorm, ConfigError, GradientClipper, configs_for
from gradclip.config import parse_mapping

MAIN = [{"type": "norm", "max_norm": 0.5, "eps": 0.0}]


def clipped(groups, seed=0, policies=None, optimizer=None, **options):
    params = parameters()
    fill(params, seed, 3.0)
    config = {"policies": policies or MAIN, "groups": groups, **options}
    record = GradientClipper(config, params.items(), optimizer or optimizer_for(params)).clip()
    return params, record


def norm_of(tensors):
    return torch.cat([t.double().reshape(-1) for t in tensors]).norm()


def before():
    params = parameters()
    fill(params, 0, 3.0)
    return grads(params)


def scaled_by(params, name):
    return float(params[name].grad.double().reshape(-1)[0] / before()[name].double().reshape(-1)[0])


EMBED = "embed.weight"
REST = ["layer.weight", "layer.bias", "scale"]


def test_counted_and_scaled_are_separate(subtests):
    old = before()
    for counted, scaled in product((True, False), repeat=2):
        with subtests.test(f"{counted=}, {scaled=}"):
            params, _ = clipped([{"match": "embed.*", "counted": counted, "scaled": scaled}])
            names = [EMBED, *REST] if counted else REST
            coef = 0.5 / float(norm_of([old[name] for name in names]))
            for name in REST:
                assert scaled_by(params, name) == pytest.approx(coef, rel=1e-6)
            assert scaled_by(params, EMBED) == pytest.approx(coef if scaled else 1.0, rel=1e-6)


def test_own_policies_are_left_out_of_the_main_norm_unless_counted():
    own = {"match": "embed.*", "policies": [{"type": "norm", "max_norm": 0.2, "eps": 0.0}]}
    old = before()
    for counted, names in ((None, REST), (False, REST), (True, [EMBED, *REST])):
        params, record = clipped([own | {"counted": counted}])
        coef = 0.5 / float(norm_of([old[name] for name in names]))
        assert scaled_by(params, "scale") == pytest.approx(coef, rel=1e-6)
        assert float(norm_of([params[EMBED].grad])) == pytest.approx(0.2, rel=1e-6)
        assert float(record.grad_norm) == pytest.approx(float(norm_of(old.values())), rel=1e-6)


def test_a_group_that_is_not_scaled_is_only_measured():
    own = [{"type": "norm", "max_norm": 0.2}]
    params, _ = clipped([{"match": "embed.*", "policies": own, "scaled": False}])
    assert torch.equal(params[EMBED].grad, before()[EMBED])


def test_excluding_a_group_leaves_the_others_as_if_it_were_absent():
    zclip = [{"type": "zclip", "warmup_steps": 3, "max_norm": 2.0}]
    out = [{"match": "embed.*", "counted": False, "scaled": False, "watched": False}]
    for groups in (out, [{"match": "embed.*", "policies": []}]):
        params = parameters()
        alone = {name: p for name, p in parameters().items() if name != EMBED}
        both = GradientClipper({"policies": zclip, "groups": groups}, params.items())
        single = GradientClipper({"policies": zclip}, alone.items())
        for step in range(9):
            fill(params, step, 1.0 + step % 4)
            for name, p in alone.items():
                p.grad = params[name].grad.clone()
            both.clip()
            single.clip()
            for name, p in alone.items():
                torch.testing.assert_close(params[name].grad, p.grad, rtol=2e-7, atol=0)


def test_what_is_not_watched_does_not_withhold():
    for watched in (True, False):
        params = parameters()
        fill(params, 0, 3.0)
        params[EMBED].grad[0, 0] = math.nan
        groups = [{"match": "embed.*", "policies": [], "watched": watched}]
        policy = [{"type": "zclip", "warmup_steps": 2, "max_norm": 0.5}]
        clipper = GradientClipper({"policies": policy, "groups": groups}, params.items())
        record = clipper.clip()
        assert bool(record.skipped) == watched
        state = clipper.state_dict()["policies"][0]["state"]
        assert float(state["seen"]) == (not watched)
        if not watched:
            assert float(norm_of([params[n].grad for n in REST])) == pytest.approx(0.5, rel=1e-5)


def test_an_unwatched_groups_own_state_takes_no_nan():
    params = parameters()
    own = [{"type": "zclip", "warmup_steps": 2, "max_norm": None}]
    groups = [{"match": "embed.*", "policies": own, "watched": False}]
    clipper = GradientClipper({"policies": MAIN, "groups": groups}, params.items())
    for step in range(4):
        fill(params, step)
        if step == 1:
            params[EMBED].grad[0, 0] = math.inf
        clipper.clip()
    state = clipper.state_dict()["policies"][1]["state"]
    assert float(state["seen"]) == 3
    assert torch.isfinite(state["mean"]).all()


def test_groups_are_chosen_by_optimizer_group_and_by_optimizer_too():
    old = before()
    own = [{"type": "norm", "max_norm": 0.2, "eps": 0.0}]
    params, _ = clipped([{"optimizer_group": "matr*", "policies": own}])
    first = [params[EMBED].grad, params["layer.weight"].grad]
    assert float(norm_of(first)) == pytest.approx(0.2, rel=1e-6)
    rest = [old["layer.bias"], old["scale"]]
    assert scaled_by(params, "scale") == pytest.approx(min(1.0, 0.5 / float(norm_of(rest))), 1e-6)
    params, _ = clipped([{"optimizer": "SGD", "policies": own}])
    assert float(norm_of([p.grad for p in params.values()])) == pytest.approx(0.2, rel=1e-6)
    both = {"optimizer": "SGD", "match": "embed.*", "policies": own}
    params, _ = clipped([both])
    assert float(norm_of([params[EMBED].grad])) == pytest.approx(0.2, rel=1e-6)


@pytest.mark.parametrize(
    ("given", "called"),
    [
        (["x", "x"], ["x.0", "x.1"]),
        (["x", "y", "x"], ["x.0", "y", "x.2"]),
        (["group1", None], ["group1.0", "group1.1"]),
        (["x.1", "x", "x"], ["x.1.0", "x.1", "x.2"]),
    ],
)
def test_optimizer_groups_of_one_name_are_told_apart(given, called):
    """Each has a slot, a metric and a pattern of its own."""
    params = {f"p{i}": nn.Parameter(torch.zeros(1)) for i in range(len(given))}
    groups = [{"params": [p]} for p in params.values()]
    for group, name in zip(groups, given, strict=True):
        group |= {} if name is None else {"name": name}
    optimizer = torch.optim.SGD(groups, lr=0.1)
    config = {
        "policies": [{"type": "zclip", "scope": "group", "warmup_steps": 2, "max_norm": 1.0}],
        "groups": [{"optimizer_group": called[-1], "policies": []}],
        "log": {"per_group": True},
    }
    clipper = GradientClipper(config, params, optimizer)
    for number, p in enumerate(params.values()):
        p.grad = torch.full((1,), 0.5 if number else 100.0)
    clipper.clip()
    assert [float(p.grad) for p in params.values()] == [pytest.approx(1.0), *[0.5] * len(given[1:])]
    assert clipper.state_dict()["policies"][0]["slots"] == called[:-1]
    metrics = clipper.flush()
    assert [metrics[f"clip/grad_norms/group/{name}"] for name in called[:2]] == [100.0, 0.5]


def test_a_class_made_from_an_optimizer_is_that_optimizer():
    class Wrapped(torch.optim.SGD):
        pass

    params = parameters()
    fill(params, 0, 3.0)
    groups = [{"optimizer": "SGD", "policies": []}]
    optimizer = Wrapped(params.values(), lr=0.1)
    GradientClipper({"policies": MAIN, "groups": groups}, params.items(), optimizer).clip()
    assert_same_grads(grads(params), before())


def test_patterns_that_match_nothing_or_leave_nothing_are_refused(subtests):
    for group, message in (
        ({"match": "embd.*"}, r"groups\[0\]\.match is 'embd.\*' .*nearest names: embed.weight"),
        (
            {"optimizer_group": "matrixes"},
            r"groups\[0\]\.optimizer_group is 'matrixes' .*nearest names: matrices",
        ),
        ({"optimizer": "Muon"}, r"groups\[0\]\.optimizer is 'Muon' .*nearest names: SGD"),
        ({"match": "*", "counted": False}, "groups leave 'norm' nothing to measure"),
    ):
        with subtests.test(str(group)), pytest.raises(ConfigError, match=message):
            clipped([group])


def test_groups_and_budgets_that_contradict_themselves_are_refused(subtests):
    budget = [{"type": "norm", "max_norm": 1.0, "budget": "size"}]
    for config, message in (
        ({"groups": [{"policies": []}]}, r"groups\[0\] names no parameters; give match"),
        (
            {"groups": [{"match": "*", "watched": False}]},
            r"groups\[0\] is counted and not watched",
        ),
        (
            {"groups": [{"match": "*", "policies": [], "counted": True, "watched": False}]},
            "not watched",
        ),
        ({"policies": budget}, "one slot with nothing to share; set scope"),
    ):
        with subtests.test(message), pytest.raises(ConfigError, match=message):
            parse_mapping({"policies": MAIN} | config)


def test_with_a_budget_the_norm_of_all_stays_at_the_limit(subtests):
    scopes, orders = ("group", "parameter", "unit"), (1.0, 2.0, 3.0, math.inf)
    for budget, scope, p in product(("uniform", "size"), scopes, orders):
        with subtests.test(f"{budget} by {scope}, {p=}"):
            params = parameters()
            fill(params, 0, 9.0)
            policy = ClipByNorm(max_norm=0.7, norm_type=p, scope=scope, budget=budget, eps=0.0)
            GradientClipper(policy, params.items(), optimizer_for(params)).clip()
            after = torch.cat([g.double().reshape(-1) for g in grads(params).values()])
            assert float(torch.linalg.vector_norm(after, p)) == pytest.approx(0.7, rel=1e-5)


def test_a_budget_gives_each_parameter_its_share():
    assert before()[EMBED].norm() > 0.5
    for budget, share in (("uniform", 0.25), ("size", 24 / 40)):
        policies = [{"type": "norm", "max_norm": 0.5, "scope": "parameter", "budget": budget}]
        params, _ = clipped([], policies=policies)
        want = 0.5 * math.sqrt(share)
        assert float(params[EMBED].grad.norm()) == pytest.approx(want, rel=1e-4), budget


def test_a_group_may_name_layers_that_are_unfrozen_later():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 1))
    for parameter in model[0].parameters():
        parameter.requires_grad_(False)
    optimizer = torch.optim.SGD(model[1].parameters(), lr=0.0)
    config = {
        "policies": [{"type": "norm", "max_norm": 1.0}],
        "groups": [{"match": "0.*", "policies": [{"type": "norm", "max_norm": 0.25}]}],
    }
    clipper = GradientClipper(config, model, optimizer)
    configs_for(clipper.config, model, [optimizer, optimizer])

    def norms():
        optimizer.zero_grad()
        model(torch.full((8, 4), 30.0)).sum().backward()
        clipper.clip()
        grads = [
            [p.grad.flatten() for p in layer.parameters() if p.grad is not None] for layer in model
        ]
        return [float(torch.cat(each).norm()) if each else None for each in grads]

    assert norms() == [None, pytest.approx(1.0, rel=1e-5)]
    model[0].requires_grad_(True)
    optimizer.add_param_group({"params": list(model[0].parameters())})
    assert norms() == pytest.approx([0.25, 1.0], rel=1e-5)
    config["groups"][0]["match"] = "2.*"
    with pytest.raises(ConfigError, match="matches no parameter"):
        GradientClipper(config, model, optimizer)
