"""A clipper in a plain PyTorch loop."""

import math

import pytest
import torch
from support.gradients import (
    NORM,
    assert_same_grads,
    backward,
    fill,
    flat,
    grads,
    optimizer_for,
    parameters,
    small_model,
)

from gradclip import (
    AutoClip,
    ClipByNorm,
    ClipConfig,
    ConfigError,
    GradientClipper,
    Spam,
    ZClip,
    load_yaml,
)
from gradclip.adapters import ClipperSet
from gradclip.layouts import LocalLayout


class TestWhatIsClipped:
    def test_scopes(self):
        params = parameters()
        optimizer = optimizer_for(params)
        for scope, parts in (
            ("global", [list(params)]),
            ("group", [list(params)[:2], list(params)[2:]]),
            ("parameter", [[name] for name in params]),
        ):
            fill(params, 0, 3.0)
            before = grads(params)
            policy = ClipByNorm(max_norm=0.5, scope=scope, eps=0.0)
            GradientClipper(policy, params.items(), optimizer).clip()
            for part in parts:
                norm = torch.cat([before[name].reshape(-1) for name in part]).norm()
                assert norm > 0.5
                for name in part:
                    torch.testing.assert_close(params[name].grad, before[name] * (0.5 / norm))

    def test_group_names_come_from_the_optimizer(self):
        params = parameters()
        policy = ZClip(scope="group")
        clipper = GradientClipper(policy, params.items(), optimizer_for(params))
        assert clipper.state_dict()["policies"][0]["slots"] == ["matrices", "group1"]

    def test_only_the_optimizers_parameters(self):
        params = parameters()
        fill(params, 0)
        optimizer = torch.optim.SGD([params["scale"]], lr=0.1)
        expected = float(params["scale"].grad.abs())
        other = params["embed.weight"].grad.clone()
        record = GradientClipper(NORM, params.items(), optimizer).clip()
        assert record.grad_norm == pytest.approx(expected, rel=1e-6)
        assert torch.equal(params["embed.weight"].grad, other)

    def test_frozen_and_later_unfrozen(self):
        model = small_model()
        model[0].requires_grad_(False)
        clipper = GradientClipper(NORM, model.named_parameters())
        backward(model, size=100)
        clipper.clip()
        assert model[0].weight.grad is None
        model[0].requires_grad_(True)
        backward(model, size=100)
        clipper.clip()
        assert flat(dict(model.named_parameters())).norm() == pytest.approx(0.5, rel=1e-5)

    def test_a_parameter_that_takes_the_place_of_another_is_clipped_from_then_on(self):
        """At the same count, as where a head is exchanged or an embedding resized."""
        model = small_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        clipper = GradientClipper(ClipByNorm(max_norm=0.01), model, optimizer)
        backward(model)
        clipper.clip()
        old = model[2].weight
        model[2].weight = torch.nn.Parameter(torch.randn_like(old))
        for group in optimizer.param_groups:
            group["params"] = [model[2].weight if p is old else p for p in group["params"]]
        model.zero_grad()
        backward(model, size=100)
        record = clipper.clip()
        norm = flat(dict(model.named_parameters())).norm()
        assert float(norm) == pytest.approx(0.01, rel=1e-4)
        assert float(record.clipped_norm) == pytest.approx(0.01, rel=1e-4)

    def test_a_parameter_group_added_later_is_clipped_and_state_is_kept(self):
        model = small_model()
        optimizer = torch.optim.SGD(model[2].parameters(), lr=0.1)
        policy = ZClip(warmup_steps=2, scope="parameter", max_norm=0.01)
        clipper = GradientClipper(policy, model.named_parameters(), optimizer)
        for step in range(3):
            backward(model, step)
            clipper.clip()
        before = clipper.state_dict()["policies"][0]
        optimizer.add_param_group({"params": model[0].parameters()})
        backward(model, 3, size=100)
        record = clipper.clip()
        assert model[0].weight.grad.norm() <= 0.01 * (1 + 1e-6)
        after = clipper.state_dict()["policies"][0]
        assert after["slots"] == ["2.weight", "2.bias", "0.weight", "0.bias"]
        assert torch.equal(after["state"]["seen"], torch.tensor([4.0, 4.0, 1.0, 1.0]).double())
        assert before["slots"] == ["2.weight", "2.bias"]
        assert record.clipped

    def test_state_finds_its_parameters_in_whatever_order_an_optimizer_lists_them(self):
        saved = []
        for order in (1, -1):
            model = small_model()
            optimizer = torch.optim.SGD(list(model.parameters())[::order], lr=0.1)
            policies = [AutoClip(warmup_steps=1, window=4, scope="parameter"), Spam(moment="own")]
            clipper = GradientClipper(policies, model.named_parameters(), optimizer)
            if saved:
                clipper.load_state_dict(saved[0])
            else:
                for step in range(3):
                    backward(model, step)
                    clipper.clip()
            saved.append(clipper.state_dict())
        first, second = (state["policies"] for state in saved)
        assert second[0]["slots"] == first[0]["slots"][::-1]
        for name, value in first[0]["state"].items():
            assert torch.equal(second[0]["state"][name].flip(-1), value)
        for name, memory in first[1]["elements"].items():
            assert torch.equal(second[1]["elements"][name]["square"], memory["square"])

    def test_clippers_of_new_optimizers_go_on_by_name(self, subtests):
        """With more parameters, with fewer, and with those of several before or after."""
        policies = [ZClip(warmup_steps=3, scope="parameter"), Spam(warmup_steps=2, moment="own")]
        for before, after in NEW_OPTIMIZERS:
            with subtests.test(f"{before} to {after}"):
                model = small_model()
                earlier = ClipperSet.build(policies, model, sgds(model, before))
                for step in range(5):
                    backward(model, step)
                    for clipper in earlier:
                        clipper.clip()
                known = learnt(earlier)
                now = ClipperSet.build(policies, model, sgds(model, after))
                assert now.go_on_from(earlier, [5] * len(before)) == [5] * len(after)
                wanted = {name for names in after for name in names}
                assert learnt(now) == {
                    name: known.get(name, (0.0, 0.0, None)) for name in sorted(wanted)
                }
                for clipper in now:
                    state = clipper.state_dict()
                    assert state["counts"]["steps"] == state["step"] == 5
                    assert state["policies"][1]["state"]["seen"] == 5
                backward(model, 5, size=1e6)
                for clipper in now:
                    assert clipper.clip().clipped

    def test_a_clipper_of_another_model_or_policy_starts_fresh(self):
        model, policy = small_model(), ZClip(warmup_steps=3, max_norm=None)
        clipper = GradientClipper(policy, model)
        for step in range(5):
            backward(model, step)
            clipper.clip()
        other = GradientClipper(policy, {"far.away": torch.nn.Parameter(torch.ones(2))}.items())
        assert other.go_on_from([clipper]) is None
        assert other.state_dict()["counts"]["steps"] == 0
        wider = GradientClipper(ZClip(warmup_steps=3, z_threshold=9.0), model)
        assert wider.go_on_from([clipper]) is clipper
        state = wider.state_dict()
        assert state["counts"]["steps"] == 5
        assert state["policies"][0]["state"]["seen"] == 0

    def test_names_without_a_model(self):
        model = small_model()
        plain = torch.optim.SGD(model.parameters(), lr=0.1)
        named = torch.optim.SGD(list(model.named_parameters()), lr=0.1)
        policy = ZClip(scope="parameter")
        slots = [
            GradientClipper(policy, optimizer=o).state_dict()["policies"][0]["slots"]
            for o in (plain, named)
        ]
        assert slots == [
            ["group0.0", "group0.1", "group0.2", "group0.3"],
            ["0.weight", "0.bias", "2.weight", "2.bias"],
        ]

    def test_per_parameter_norms_are_recorded_on_request(self):
        params = parameters()
        fill(params, 0, 3.0)
        expected = {f"clip/grad_norms/{n}": p.grad.double().norm() for n, p in params.items()}
        config = ClipConfig(policies=[NORM], log={"per_parameter": True})
        metrics = GradientClipper(config, params.items()).clip().as_metrics()
        for key, norm in expected.items():
            torch.testing.assert_close(metrics[key], norm, rtol=1e-6, atol=0)
        others = ("grad_norm", "limit", "coef", "clipped_norm", "clipped", "skipped", "clip_rate")
        assert set(metrics) - set(expected) == {f"clip/{key}" for key in others}


FIRST, LAST = ("0.weight", "0.bias"), ("2.weight", "2.bias")
NEW_OPTIMIZERS = (  # the names in each of the optimizers before, and after
    ([FIRST + LAST], [FIRST + LAST]),
    ([LAST], [FIRST + LAST]),
    ([FIRST + LAST], [LAST + FIRST[:1]]),
    ([FIRST + LAST], [FIRST, LAST]),
    ([FIRST, LAST], [LAST + FIRST]),
    ([FIRST, LAST], [LAST, FIRST]),
    ([FIRST + LAST[:1], LAST[1:]], [FIRST, LAST]),
)


def sgds(model, names):
    named = dict(model.named_parameters())
    return [torch.optim.SGD([named[name] for name in own], lr=0.1) for own in names]


def learnt(clippers):
    """What is remembered of each parameter: norms seen, their mean, and the squares of elements."""
    found = {}
    for clipper in clippers:
        norms, elements = clipper.state_dict()["policies"]
        squares = elements.get("elements", {})
        for i, name in enumerate(norms["slots"]):
            of_name = squares[name]["square"].tolist() if name in squares else None
            mean, seen = (float(norms["state"][key][i]) for key in ("mean", "seen"))
            found[name] = seen, mean, of_name
    return dict(sorted(found.items()))


class TestRefused:
    def test_what_a_clipper_cannot_be_built_from(self, subtests):
        named, twin = small_model().named_parameters(), small_model().named_parameters()
        used_up = small_model().named_parameters()
        list(used_up)
        by_group = ClipByNorm(max_norm=1.0, scope="group")
        params = parameters()
        both = {"layout": LocalLayout(params), "process_group": object()}
        for given, options, message in (
            ((NORM,), {}, "neither named_parameters nor optimizer"),
            ((NORM, used_up), {}, "got no parameters: a generator may have been used"),
            ((NORM, [*named, *twin]), {}, r"Two parameters are named '0\.weight'; every"),
            ((NORM, params.items()), both, "layout and process_group are both given"),
            ((by_group, params.items()), {}, "scope is 'group', and without an optimizer"),
            (
                (NORM, params.items()),
                {"kernel": "gpu"},
                "kernel is 'gpu'; allowed: 'cpu', 'accelerator'",
            ),
        ):
            with subtests.test(message), pytest.raises(ConfigError, match=message):
                GradientClipper(*given, **options)

    def test_state_of_another_configuration(self):
        params = parameters()
        zclip = GradientClipper(ZClip(), params.items())
        fixed = GradientClipper(NORM, params.items())
        with pytest.raises(ConfigError, match=r"of policies \['norm'\], this .* has \['zclip'\]"):
            zclip.load_state_dict(fixed.state_dict())
        other = GradientClipper(ZClip(scope="parameter"), params.items())
        with pytest.raises(ConfigError, match=r"has slots \['embed.weight', .*\['global'\]"):
            zclip.load_state_dict(other.state_dict())
        shorter = GradientClipper(ZClip(warmup_steps=40), params.items())
        with pytest.raises(ConfigError, match="a length such as warmup_steps differs"):
            zclip.load_state_dict(shorter.state_dict())
        with pytest.raises(ConfigError, match="format 7; this version reads 2"):
            zclip.load_state_dict({"format": 7})


class TestNonfinite:
    def test_ignore_lets_the_step_through(self):
        params = parameters()
        fill(params, 0, 5.0)
        params["scale"].grad.fill_(math.inf)
        before = grads(params)
        config = ClipConfig(policies=[NORM], on_nonfinite="ignore")
        record = GradientClipper(config, params.items()).clip()
        assert_same_grads(grads(params), before)
        assert not record.skipped
        assert not record.clipped


class TestResume:
    def test_fifty_steps_after_a_restart_are_bitwise_the_same(self, tmp_path):
        def start():
            model = small_model()
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
            policy = [ZClip(warmup_steps=10, max_norm=None), ClipByNorm(max_norm=50.0)]
            return model, optimizer, GradientClipper(policy, model.named_parameters(), optimizer)

        def train(model, optimizer, clipper, steps):
            limits = []
            for step in steps:
                backward(model, step, size=60.0 if step % 13 == 5 else 1.0)
                limits.append(clipper.clip().limit)
                optimizer.step()
            return limits

        first = start()
        train(*first, range(8))  # still warming up
        torch.save([part.state_dict() for part in first], tmp_path / "checkpoint.pt")
        expected = train(*first, range(8, 58))

        second = start()
        saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
        for part, state in zip(second, saved, strict=True):
            part.load_state_dict(state)
        assert train(*second, range(8, 58)) == expected
        assert len(set(map(float, expected))) > 10
        for left, right in zip(first[0].parameters(), second[0].parameters(), strict=True):
            assert torch.equal(left, right)


def test_a_yaml_path_a_mapping_and_a_policy_mean_the_same(tmp_path):
    path = tmp_path / "clip.yaml"
    path.write_text("policies:\n  - type: norm\n    max_norm: 0.5\n")
    configs = [
        GradientClipper(given, parameters().items()).config
        for given in (NORM, [NORM], str(path), path, {"policies": [NORM]}, load_yaml(path))
    ]
    assert all(config == configs[0] for config in configs)
