"""A clipper in a plain PyTorch loop."""

import math
from itertools import pairwise

import pytest
import torch
from support.gradients import assert_same_grads, fill, flat, grads, optimizer_for, parameters
from torch import nn

from gradclip import (
    ClipByNorm,
    ClipConfig,
    ConfigError,
    GradientClipper,
    LayoutError,
    SkipNonfinite,
    ZClip,
    load_yaml,
)
from gradclip.layouts import LocalLayout

NORM = ClipByNorm(max_norm=0.5)


def small_model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


def backward(model, step=0, size=1.0):
    generator = torch.Generator().manual_seed(step)
    model.zero_grad()
    (model(torch.randn(16, 4, generator=generator)).square().mean() * size).backward()


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

    def test_shared_parameters_count_once(self):
        model = small_model()
        model[0].weight.grad = torch.ones(8, 4)
        named = [*model.named_parameters(), ("again.weight", model[0].weight)]
        assert GradientClipper(NORM, named).clip().grad_norm == pytest.approx(math.sqrt(32))

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
        expected = {f"clip/grad_norm/{n}": p.grad.double().norm() for n, p in params.items()}
        config = ClipConfig(policies=[NORM], log={"per_parameter": True})
        metrics = GradientClipper(config, params.items()).clip().as_metrics()
        for key, norm in expected.items():
            torch.testing.assert_close(metrics[key], norm, rtol=1e-6, atol=0)
        assert set(metrics) - set(expected) == {
            f"clip/{key}"
            for key in (
                "grad_norm",
                "limit",
                "coef",
                "clipped_norm",
                "clipped",
                "skipped",
                "clip_rate",
            )
        }


class TestRefused:
    def test_nothing_to_clip(self):
        with pytest.raises(ConfigError, match="neither named_parameters nor optimizer"):
            GradientClipper(NORM)
        used_up = small_model().named_parameters()
        list(used_up)
        with pytest.raises(ConfigError, match="got no parameters: a generator may have been used"):
            GradientClipper(NORM, used_up)

    def test_two_parameters_of_one_name(self):
        named = [*small_model().named_parameters(), *small_model(1).named_parameters()]
        with pytest.raises(ConfigError, match=r"Two parameters are named '0\.weight'; every"):
            GradientClipper(NORM, named)

    def test_a_layout_and_a_process_group(self):
        layout = LocalLayout(parameters())
        with pytest.raises(ConfigError, match="layout and process_group are both given"):
            GradientClipper(NORM, parameters().items(), layout=layout, process_group=object())

    def test_scope_group_without_an_optimizer(self):
        with pytest.raises(ConfigError, match="scope is 'group', and without an optimizer"):
            GradientClipper(ClipByNorm(max_norm=1.0, scope="group"), parameters().items())

    def test_sparse_gradients(self):
        embedding = nn.Embedding(5, 2, sparse=True)
        clipper = GradientClipper(NORM, embedding.named_parameters())
        embedding(torch.tensor([1])).sum().backward()
        with pytest.raises(LayoutError, match=r"A gradient is sparse.*sparse=False"):
            clipper.clip()

    def test_complex_parameters(self):
        parameter = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
        with pytest.raises(LayoutError, match=r"Parameters \['z'\] are complex"):
            GradientClipper(NORM, [("z", parameter)])

    def test_unknown_kernel(self):
        with pytest.raises(ConfigError, match="kernel is 'gpu'; allowed: 'cpu', 'accelerator'"):
            GradientClipper(NORM, parameters().items(), kernel="gpu")

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
        with pytest.raises(ConfigError, match="format 7; this version reads 1"):
            zclip.load_state_dict({"format": 7})


class TestWithholding:
    @pytest.mark.parametrize(
        ("cls", "options"),
        [
            (torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.1}),
            (torch.optim.AdamW, {"weight_decay": 0.1}),
            (torch.optim.AdamW, {"fused": True}),
            (torch.optim.AdamW, {"foreach": True}),
        ],
    )
    def test_parameters_and_optimizer_state_stay_bit_identical(self, cls, options):
        params = parameters()
        optimizer = cls(params.values(), lr=0.1, **options)
        GradientClipper(ZClip(), params.items(), optimizer).attach(optimizer)
        for step in range(3):
            fill(params, step)
            optimizer.step()
        values = {name: p.detach().clone() for name, p in params.items()}
        state = [
            {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in s.items()}
            for s in optimizer.state.values()
        ]
        fill(params, 9)
        params["scale"].grad.fill_(math.nan)
        optimizer.step()
        for name, value in values.items():
            assert torch.equal(params[name], value)
        for now, before in zip(optimizer.state.values(), state, strict=True):
            for key, value in before.items():
                assert value is now[key] or torch.equal(now[key], value)

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

    def test_skip_nonfinite_as_a_policy(self):
        params = parameters()
        fill(params, 0, 5.0)
        params["scale"].grad.fill_(math.inf)
        config = ClipConfig(policies=[NORM, SkipNonfinite()], on_nonfinite="ignore")
        assert GradientClipper(config, params.items()).clip().skipped
        assert all(p.grad is None for p in params.values())


class TestAttach:
    def train(self, clip, steps=5):
        model = small_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        clipper = GradientClipper(NORM, model.named_parameters(), optimizer)
        handle = clipper.attach(optimizer) if clip == "attached" else None
        for step in range(steps):
            backward(model, step, size=50)
            if clip == "called":
                clipper.clip()
            optimizer.step()
        return torch.cat([p.detach().reshape(-1) for p in model.parameters()]), handle, clipper

    def test_clips_before_each_step(self):
        attached, _, clipper = self.train("attached")
        called, *_ = self.train("called")
        assert torch.equal(attached, called)
        assert clipper.state_dict()["counts"]["steps"] == 5
        assert clipper.last_record is not None
        assert clipper.last_record.clipped

    def test_removed(self):
        model = small_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        handle = GradientClipper(NORM, model.named_parameters(), optimizer).attach(optimizer)
        handle.remove()
        backward(model, size=50)
        before = flat(dict(model.named_parameters()))
        optimizer.step()
        assert torch.equal(flat(dict(model.named_parameters())), before)

    @pytest.mark.parametrize("keyword", [True, False])
    def test_a_closure_is_clipped_after_its_backward(self, keyword):
        model, twin = small_model(), small_model()
        results = []
        for net, attached in ((model, True), (twin, False)):
            optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
            clipper = GradientClipper(NORM, net.named_parameters(), optimizer)
            if attached:
                clipper.attach(optimizer)

            def closure(net=net, clipper=clipper, attached=attached):
                backward(net, size=50)
                if not attached:
                    clipper.clip()
                return torch.tensor(7.0)

            loss = optimizer.step(closure=closure) if keyword else optimizer.step(closure)
            assert loss == 7.0
            results.append(torch.cat([p.detach().reshape(-1) for p in net.parameters()]))
        assert torch.equal(*results)

    def test_a_foreign_optimizer_and_lbfgs_are_refused(self):
        model = small_model()
        clipper = GradientClipper(NORM, model.named_parameters())
        with pytest.raises(ConfigError, match="shares no parameter with this clipper"):
            clipper.attach(torch.optim.SGD(small_model().parameters(), lr=0.1))
        with pytest.raises(ConfigError, match="LBFGS, which evaluates its closure several times"):
            clipper.attach(torch.optim.LBFGS(model.parameters()))

    @pytest.mark.parametrize("fused", [False, True])
    @pytest.mark.parametrize("scale", [1.0, 1024.0])
    def test_under_a_grad_scaler_limits_are_those_of_unscaled_gradients(self, fused, scale):
        results = []
        for loss_scale in (None, scale):
            model = small_model()
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)
            clipper = GradientClipper(NORM, model.named_parameters(), optimizer)
            clipper.attach(optimizer)
            scaler = torch.amp.GradScaler(
                "cpu", init_scale=loss_scale or 1.0, enabled=loss_scale is not None
            )
            for step in range(4):
                model.zero_grad()
                generator = torch.Generator().manual_seed(step)
                loss = model(torch.randn(16, 4, generator=generator)).square().mean() * 50
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
            results.append(torch.cat([p.detach().reshape(-1) for p in model.parameters()]))
        torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)


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


class TestZClip:
    def limits(self, policy, norms):
        parameter = nn.Parameter(torch.zeros(1))
        clipper = GradientClipper(policy, [("p", parameter)])
        records = []
        for norm in norms:
            parameter.grad = torch.tensor([norm])
            records.append(clipper.clip())
        return records

    def steady(self, count, level=1.0, seed=0):
        generator = torch.Generator().manual_seed(seed)
        return (level * torch.exp(0.1 * torch.randn(count, generator=generator))).tolist()

    @pytest.mark.parametrize("factor", [2.0, 5.0, 0.2])
    def test_a_lasting_change_of_level_is_followed(self, factor):
        norms = self.steady(200) + self.steady(200, factor, seed=1)
        policy = ZClip(max_norm=None)
        after = self.limits(policy, norms)[200 + 30 :]
        assert sum(bool(r.clipped) for r in after) < 20
        if factor >= 2:
            locked = self.limits(policy.model_copy(update={"escape_after": None}), norms)
            assert all(r.clipped for r in locked[230:])

    def test_rare_spikes_never_look_like_a_new_level(self):
        norms = self.steady(1500)
        spikes = range(30, 1500, 33)
        for step in spikes:
            norms[step] *= 40
        records = self.limits(ZClip(max_norm=None), norms)
        for step in spikes:
            assert records[step].clipped
            assert records[step].clipped_norm < 2.0

    def test_a_spike_in_the_warmup_does_not_blind_a_median_start(self):
        norms = self.steady(25)
        norms[7] = 500.0
        later = [*norms, 1.0, 1.1, 8.0]
        assert not self.limits(ZClip(max_norm=None), later)[-1].clipped
        assert self.limits(ZClip(max_norm=None, warmup="median"), later)[-1].clipped

    def test_a_larger_spike_is_pulled_closer_to_the_mean(self):
        records = [
            self.limits(ZClip(max_norm=None), [*self.steady(25), x])[-1] for x in (2.0, 4.0, 16.0)
        ]
        assert all(r.clipped for r in records)
        assert all(a.clipped_norm > b.clipped_norm for a, b in pairwise(records))

    def test_exact_variance_is_the_exponentially_weighted_one(self):
        norms = self.steady(60)
        parameter = nn.Parameter(torch.zeros(1))
        policy = ZClip(max_norm=None, variance="exact", z_threshold=100.0, decay=0.9)
        clipper = GradientClipper(policy, [("p", parameter)])
        for norm in norms:
            parameter.grad = torch.tensor([norm])
            clipper.clip()
        values = torch.tensor(norms, dtype=torch.float32).double()
        mean, var = values[:25].mean(), values[:25].var(correction=0)
        for value in values[25:]:
            second = 0.9 * (var + mean**2) + 0.1 * value**2
            mean = 0.9 * mean + 0.1 * value
            var = second - mean**2
        state = clipper.state_dict()["policies"][0]["state"]
        torch.testing.assert_close(state["mean"][0], mean, rtol=1e-9, atol=0)
        torch.testing.assert_close(state["var"][0], var, rtol=1e-6, atol=0)

    def test_fields_are_checked(self):
        for field, value in (
            ("decay", 1.0),
            ("z_threshold", 0.0),
            ("z_threshold", math.nan),
            ("max_norm", -1.0),
            ("max_norm", True),
            ("warmup_steps", 1),
            ("warmup_steps", 2.5),
            ("escape_after", 0),
            ("mode", "zcore"),
            ("alpha", 0.9),
        ):
            with pytest.raises(ValueError, match=field):
                ZClip(**{field: value})


def test_a_yaml_path_a_mapping_and_a_policy_mean_the_same(tmp_path):
    path = tmp_path / "clip.yaml"
    path.write_text("policies:\n  - type: norm\n    max_norm: 0.5\n")
    configs = [
        GradientClipper(given, parameters().items()).config
        for given in (NORM, [NORM], str(path), path, {"policies": [NORM]}, load_yaml(path))
    ]
    assert all(config == configs[0] for config in configs)
