"""Fabric: one call after `fabric.setup`, under every way to set up."""

import pytest
import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins import MixedPrecision
from lightning.fabric.strategies import DDPStrategy, ModelParallelStrategy
from support.as_one import POLICIES, STEPS, assert_as_one
from support.freed import kept
from support.lit import grads_of, inputs, norm_of, small_net
from support.lit_layouts import shard
from support.nets import parallel_net, whole_parameters
from support.ranks import run_on_ranks

import lightning_clip
from gradclip import Auto, ClipByNorm, ConfigError, ZClip
from lightning_clip.unchanged import for_fabric

NORM = ClipByNorm(max_norm=0.1)
ZCLIP = ZClip(warmup_steps=3, max_norm=None)


def set_up(fabric, net, policy, optimizer=torch.optim.SGD, **options):
    model, stepped = fabric.setup(net, optimizer(net.parameters(), lr=0.01, **options))
    return model, stepped, lightning_clip.enable(fabric, model, stepped, policy)


def train(fabric, model, optimizer, seeds):
    for seed in seeds:
        rows = inputs(seed)[fabric.global_rank :: fabric.world_size]
        optimizer.zero_grad()
        fabric.backward(model(rows).float().square().mean())
        optimizer.step()


def one_process(**options):
    fabric = Fabric(accelerator="cpu", devices=1, **options)
    fabric.launch()
    return fabric


def test_every_step_is_clipped():
    fabric = one_process()
    model, optimizer, clipper = set_up(fabric, small_net(), NORM)
    for step in range(3):
        train(fabric, model, optimizer, [step])
        assert float(clipper.last_record.grad_norm) > 0.1
        assert norm_of(grads_of(optimizer.optimizer)) == pytest.approx(0.1, rel=1e-5)
    assert clipper.state_dict()["counts"]["steps"] == 3


@pytest.mark.parametrize("how", ["enabled", "unchanged"])
def test_what_is_dropped_is_freed_at_once_though_fabric_lives_on(how, monkeypatch):
    monkeypatch.setenv("GRADCLIP_CONFIG", "zclip")
    unchanged = for_fabric() if how == "unchanged" else []
    monkeypatch.delenv("GRADCLIP_CONFIG")
    fabric = one_process(callbacks=unchanged)

    def trained():
        net = small_net()
        stock = torch.optim.SGD(net.parameters(), lr=0.01)
        model, optimizer = fabric.setup(net, stock)
        if how == "enabled":
            clipper = lightning_clip.enable(fabric, model, optimizer, NORM)
        else:
            clipper = unchanged[0].clippers[-1]
        train(fabric, model, optimizer, range(2))
        assert clipper.state_dict()["counts"]["steps"] == 2
        parts = {"net": net, "model": model, "stock": stock, "optimizer": optimizer}
        return parts | {"parameter": next(net.parameters()), "clipper": clipper}

    assert kept(trained) == set()
    assert not unchanged or unchanged[0].clippers == []


def test_module_and_optimizer_set_up_apart_have_the_modules_own_names():
    fabric = one_process()
    model = fabric.setup_module(small_net())
    optimizer = fabric.setup_optimizers(torch.optim.SGD(model.parameters(), lr=0.01))
    policy = {"policies": [NORM], "groups": [{"match": "2.*", "policies": []}]}
    clipper = lightning_clip.enable(fabric, model, optimizer, policy)
    train(fabric, model, optimizer, [0])
    norms = [float(p.grad.norm()) for p in model.parameters()]
    assert norm_of(p.grad for p in list(model.parameters())[:2]) == pytest.approx(0.1, rel=1e-5)
    assert max(norms[2:]) > 0.1
    assert bool(clipper.last_record.clipped)


def test_disable_gives_everything_back(tmp_path):
    fabric = one_process()
    models = [small_net(), small_net()]
    made = [set_up(fabric, net, {"policies": [NORM]}) for net in models]
    (model, optimizer, clipper), (_, other, second) = made
    train(fabric, model, optimizer, [0])
    lightning_clip.disable(optimizer)
    train(fabric, model, optimizer, [1])
    assert norm_of(grads_of(optimizer.optimizer)) > 0.1
    assert clipper.state_dict()["counts"]["steps"] == 1
    fabric.clip_gradients(model, optimizer, max_norm=0.05)
    assert norm_of(grads_of(optimizer.optimizer)) == pytest.approx(0.05, rel=1e-5)
    with pytest.raises(ConfigError, match=r"this SGD isn't clipped by lightning_clip\.enable"):
        lightning_clip.disable(optimizer)
    with pytest.raises(ConfigError, match=r"would be clipped\s+twice"):
        fabric.clip_gradients(made[1][0], other, max_norm=0.05)
    lightning_clip.disable(other)
    assert not vars(fabric).keys() & {"clip_gradients"}
    for raw in (optimizer.optimizer, other.optimizer):
        assert not raw._optimizer_step_pre_hooks
        assert not hasattr(raw, "gradient_clip")
    again = lightning_clip.enable(fabric, model, optimizer, ClipByNorm(max_norm=0.2))
    train(fabric, model, optimizer, [2])
    assert norm_of(grads_of(optimizer.optimizer)) == pytest.approx(0.2, rel=1e-5)
    assert again.state_dict()["counts"]["steps"] == 1
    assert second.last_record is None


def test_accumulation_clips_once_per_step():
    fabric = one_process()
    model, optimizer, clipper = set_up(fabric, small_net(), NORM)
    for seed in range(4):
        with fabric.no_backward_sync(model, enabled=seed < 3):
            fabric.backward(model(inputs(seed)).square().mean() / 4)
    whole = norm_of(grads_of(optimizer.optimizer))
    optimizer.step()
    assert float(clipper.last_record.grad_norm) == pytest.approx(whole, rel=1e-6)
    assert clipper.state_dict()["counts"]["steps"] == 1


@pytest.mark.parametrize("fused", [False, True])
def test_with_a_live_scaler(fused):
    def run(scale):
        live = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=10**6)
        plugin = MixedPrecision("16-mixed", device="cpu", scaler=live)
        fabric = one_process(plugins=[plugin])
        made = set_up(fabric, small_net(), NORM, torch.optim.AdamW, fused=fused)
        model, optimizer, clipper = made
        train(fabric, model, optimizer, range(3))
        return clipper, [p.detach() for p in model.parameters()], live.get_scale()

    one, parameters, _ = run(1.0)
    clipper, got, scale = run(1024.0)
    assert scale == 1024.0
    assert float(clipper.last_record.grad_norm) == pytest.approx(
        float(one.last_record.grad_norm), rel=0.01
    )
    assert float(clipper.last_record.grad_norm) > 0.1
    torch.testing.assert_close(got, parameters, rtol=1e-3, atol=1e-4)
    clipper, start, scale = run(2.0**40)
    assert scale == 2.0**37
    assert all(map(torch.equal, start, small_net().parameters()))
    counts = clipper.state_dict()["counts"]
    assert [int(counts[key]) for key in ("steps", "nonfinite", "taken")] == [3, 3, 0]


def test_state_goes_through_save_and_load(tmp_path):
    def limits(load=None, save=None, seeds=range(10)):
        fabric = one_process()
        model, optimizer, clipper = set_up(fabric, small_net(), ZCLIP)
        state = {"model": model, "optimizer": optimizer, "clipper": clipper}
        if load:
            rest = fabric.load(load, {"model": model, "optimizer": optimizer}, weights_only=True)
            clipper.load_state_dict(rest["clipper"])
        found = []
        for seed in seeds:
            train(fabric, model, optimizer, [seed])
            found.append(float(clipper.last_record.limit))
        if save:
            fabric.save(save, state)
        return found

    path = tmp_path / "last.ckpt"
    whole = limits()
    assert limits(save=path, seeds=range(5)) + limits(load=path, seeds=range(5, 10)) == whole
    assert max(whole[5:]) < float("inf")


def test_without_a_policy_it_is_auto_and_knows_the_optimizer():
    assert lightning_clip.GradientClip().config.policies == [Auto()]
    fabric, net = one_process(), small_net()
    model, optimizer, clipper = set_up(fabric, net, None)
    assert clipper.config.policies == [Auto()]
    size = torch.cat([p.detach().flatten() for p in net.parameters()]).norm()
    fabric.backward(1e6 * model(inputs(0)).sum())
    optimizer.step()
    # SGD: what moves the parameters by 7 % of their size.
    assert float(clipper.last_record.limit) == pytest.approx(0.07 * float(size) / 0.01, rel=1e-5)


def test_what_is_refused():
    fabric = one_process()
    net = small_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    with pytest.raises(ConfigError, match=r"the model \(Sequential\) isn't set up by Fabric"):
        lightning_clip.enable(fabric, net, optimizer, NORM)
    model = fabric.setup_module(net)
    stepped = fabric.setup_optimizers(torch.optim.SGD(small_net().parameters(), lr=0.01))
    with pytest.raises(ConfigError, match=r"the model \(FabricSGD\) .*\(fabric, model, optimizer"):
        lightning_clip.enable(fabric, stepped, model, NORM)
    with pytest.raises(ConfigError, match="policy is 3; allowed: a policy such as"):
        lightning_clip.enable(fabric, model, stepped, 3)
    with pytest.raises(ConfigError, match=r"the optimizer \(SGD\) isn't set up by Fabric"):
        lightning_clip.enable(fabric, model, optimizer, NORM)
    optimizer = fabric.setup_optimizers(optimizer)
    lightning_clip.enable(fabric, model, optimizer, NORM)
    with pytest.raises(ConfigError, match="this SGD is clipped already"):
        lightning_clip.enable(fabric, model, optimizer, NORM)
    for given in (optimizer, optimizer.optimizer):
        with pytest.raises(ConfigError, match=r"twice\. Remove the call"):
            fabric.clip_gradients(model, given, max_norm=1.0)
    other = fabric.setup_optimizers(torch.optim.SGD(model.parameters(), lr=0.01))
    fabric.backward(model(inputs(0)).square().mean())
    assert float(fabric.clip_gradients(model, other, max_norm=1e-3)) > 1e-3
    assert norm_of(grads_of(other.optimizer)) == pytest.approx(1e-3, rel=1e-3)


def sharded(net, mesh):
    shard(net, mesh["data_parallel"])
    return net


STRATEGIES = {
    "ddp": DDPStrategy,
    "fsdp2": lambda: ModelParallelStrategy(sharded, data_parallel_size=2, tensor_parallel_size=1),
}


def fit(policy, strategy, world, folder=None):
    """As many steps as `as_one` has; with a folder, saved and loaded in the middle."""
    metrics = []

    def start():
        fabric = Fabric(accelerator="cpu", devices=world, strategy=strategy())
        fabric.launch()
        model = fabric.setup_module(parallel_net())
        optimizer = fabric.setup_optimizers(
            torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.5)
        )
        clipper = lightning_clip.enable(fabric, model, optimizer, POLICIES[policy])
        return fabric, {"model": model, "optimizer": optimizer, "clipper": clipper}

    fabric, state = start()
    for step in range(STEPS):
        if folder and step == STEPS // 2:
            fabric.save(f"{folder}/middle", state)
            fabric, state = start()
            # Lightning loads a sharded checkpoint into modules and optimizers alone.
            rest = fabric.load(f"{folder}/middle", {k: state[k] for k in ("model", "optimizer")})
            state["clipper"].load_state_dict(rest["clipper"])
        train(fabric, state["model"], state["optimizer"], [step])
        metrics.append(state["clipper"].last_record.as_metrics())
    return metrics, whole_parameters(state["model"])


def on_rank(rank, world, folder):
    return {
        (name, policy): fit(policy, make, world, policy == "zclip" and f"{folder}/{name}")
        for name, make in STRATEGIES.items()
        for policy in ("norm", "zclip")
    }


def test_several_processes_do_what_one_does(tmp_path):
    for name in STRATEGIES:
        (tmp_path / name).mkdir()
    alone = {policy: fit(policy, lambda: "auto", 1) for policy in ("norm", "zclip")}
    answers = run_on_ranks(on_rank, 2, str(tmp_path), timeout=150)
    for name, policy in answers[0]:
        assert_as_one([answer[name, policy] for answer in answers], alone[policy])
