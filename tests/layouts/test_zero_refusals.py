"""DeepSpeed engines that can't be clipped exactly, misuse, and the names that are relied on."""

import logging

import pytest
import torch
from support.gradients import NORM, small_model
from support.nets import uneven_net
from support.ranks import run_on_ranks

from gradclip import ClipByNorm, ClipConfig, ConfigError, GradientClipper, LayoutError
from gradclip.layouts import LocalLayout
from gradclip.tools.doctor import judge
from gradclip.tools.watching import SeenStep, Watcher

pytest.importorskip("deepspeed")

import deepspeed
from support.deepspeed_cpu import config, engine_of
from support.zero_engines import step

# What an engine or its optimizer is found to be, and the words of the refusal.
OF_ENGINE = {
    "has_moe_layers": (True, "expert parallel parameters"),
    "mpu": (object(), "model parallelism"),
    "enable_backward_allreduce": (False, "not averaged over ranks"),
    "is_deepcompile_enabled": (lambda: True, "DeepCompile"),
    "autotp_size": (lambda: 2, "model parallelism"),
}
OF_OPTIMIZER = {
    "swap_optimizer": (True, "swapped to NVMe"),
    "low_precision_master_weights_and_grads": (True, "16-bit master weights"),
    "fused_adam_legacy": (True, "the legacy fused step of SGD"),
    "real_dp_process_group": ([1, 2], "expert parallel parameters"),
}


def engine_with(*settings, net=None, **more):
    net = uneven_net(1) if net is None else net
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    return engine_of(net, optimizer, config(*settings, **more))


def refused(rank, world):
    engine = engine_with(2)
    for owner, found in ((engine, OF_ENGINE), (engine.optimizer, OF_OPTIMIZER)):
        for name, (value, words) in found.items():
            before = getattr(owner, name, None)
            setattr(owner, name, value)
            with pytest.raises(LayoutError, match=f"{words}.*; supported: ZeRO 0, 1, 2 and 3"):
                GradientClipper(NORM, optimizer=engine)
            setattr(owner, name, before)
    engine.optimizer.param_groups[0]["use_muon"] = True
    with pytest.raises(LayoutError, match="Muon"):
        GradientClipper(NORM, optimizer=engine)
    del engine.optimizer.param_groups[0]["use_muon"]
    with pytest.raises(ConfigError, match="stage is 'after_backward' with a DeepSpeed engine"):
        GradientClipper(ClipConfig(policies=[NORM], stage="after_backward"), optimizer=engine)
    with pytest.raises(ConfigError, match="debug is true with a DeepSpeed engine"):
        GradientClipper(ClipConfig(policies=[NORM], debug=True), optimizer=engine)
    with pytest.raises(ConfigError, match="a DeepSpeed engine makes the steps"):
        GradientClipper(ClipConfig(policies=[NORM], log={"update_norm_every": 1}), optimizer=engine)
    GradientClipper(NORM, optimizer=engine)

    whole = engine.optimizer
    engine.optimizer = type("ZenFlowZeroOptimizer", (), {"__module__": "deepspeed.runtime.x"})()
    engine.optimizer.param_groups = whole.param_groups
    with pytest.raises(LayoutError, match="the optimizer ZenFlowZeroOptimizer"):
        GradientClipper(NORM, optimizer=engine)

    with pytest.raises(LayoutError, match="fp16 and stage 0, where DeepSpeed divides"):
        GradientClipper(NORM, optimizer=engine_with(0, "fp16"))
    autocast = engine_with(1, torch_autocast={"enabled": True, "dtype": "float16"})
    with pytest.raises(LayoutError, match="torch_autocast in float16"):
        GradientClipper(NORM, optimizer=autocast)


def old(rank, world):
    """What DeepSpeeds before 0.19 lack."""
    fp32 = {"data_types": {"grad_accum_dtype": "fp32"}}
    for settings, more, lacks, words in (
        ((3,), {}, "sub_group_process_groups", "ZeRO 3 of an older DeepSpeed"),
        ((1, "bf16"), fp32, "overflow", "the BF16_Optimizer of an older DeepSpeed"),
    ):
        engine = engine_with(*settings, **more)
        GradientClipper(NORM, optimizer=engine)
        delattr(engine.optimizer, lacks)
        with pytest.raises(LayoutError, match=f"{words}.*Use DeepSpeed 0.19.8, or ZeRO"):
            GradientClipper(NORM, optimizer=engine)


@pytest.mark.parametrize("case", [refused, old], ids=lambda case: case.__name__)
def test_what_cannot_be_exact_is_refused_by_name(case):
    run_on_ranks(case, 1, fresh=True)


def misused(rank, world):
    for stage in (1, 2, 3):
        engine = engine_with(stage)
        with pytest.raises(LayoutError, match=r"belong to a DeepSpeed engine.*optimizer=engine"):
            GradientClipper(NORM, engine.module.named_parameters())
    for stage in (0, 2):
        engine = engine_with(stage)
        clipper = GradientClipper(NORM, optimizer=engine)
        with pytest.raises(LayoutError, match=r"Call clipper.attach\(engine\) once"):
            clipper.clip()
        with pytest.raises(ConfigError, match="another object than the DeepSpeed engine"):
            clipper.attach(engine.optimizer)
        clipper.attach(engine)
        with pytest.raises(ConfigError, match="clips with gradclip already"):
            GradientClipper(NORM, optimizer=engine).attach(engine)
        with pytest.raises(LayoutError, match=r"Call clipper.attach\(engine\) once"):
            clipper.clip()
        with pytest.raises(ConfigError, match="layout is given with a DeepSpeed engine"):
            GradientClipper(NORM, optimizer=engine, layout=LocalLayout({}))
    model = small_model()
    plain = GradientClipper(NORM, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(ConfigError, match="this clipper was built without it"):
        plain.attach(engine)


def test_misuse_says_what_to_do():
    run_on_ranks(misused, 1, fresh=True)


class Said(logging.Handler):
    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


def thresholds(rank, world):
    said = Said()
    logging.getLogger("gradclip").addHandler(said)
    for stage in (0, 2):
        settings = config(stage)
        del settings["gradient_clipping"]
        net = uneven_net(1)
        engine = engine_of(net, torch.optim.SGD(net.parameters(), lr=0.1), settings)
        assert engine.gradient_clipping() == 1.0  # DeepSpeed's default, which nobody wrote
        handle = GradientClipper(ClipByNorm(max_norm=1e9), optimizer=engine).attach(engine)
        assert engine.gradient_clipping() == 0
        weights = [p.detach().clone() for p in net.parameters()]
        step(engine, rank, 0)
        moved = [float((p - w).norm()) for p, w in zip(net.parameters(), weights, strict=True)]
        assert max(moved) > 0.1 + 1e-6  # lr times a norm above 1: DeepSpeed didn't clip
        handle.remove()
        assert engine.gradient_clipping() == 1.0
        weights = [p.detach().clone() for p in net.parameters()]
        seen: list[SeenStep] = []
        watcher = Watcher(seen.append)
        step(engine, rank, 1)
        watcher.stop()
        assert "DeepSpeed clips inside its own step" in judge("", seen[:1]).note
        moved = [float((p - w).norm()) for p, w in zip(net.parameters(), weights, strict=True)]
        assert sum(m * m for m in moved) == pytest.approx(0.01, rel=1e-4)  # and now it did

        engine = engine_with(stage, gradient_clipping=0.7)
        with pytest.raises(ConfigError, match=r"gradient_clipping to 0.7, .*'max_norm': 0.5"):
            GradientClipper(NORM, optimizer=engine).attach(engine)
        GradientClipper(ClipByNorm(max_norm=0.7), optimizer=engine).attach(engine)
    return said.lines


def test_a_threshold_that_was_written_down_must_agree():
    (lines,) = run_on_ranks(thresholds, 1, fresh=True)
    assert len(lines) == 4
    for line, value in zip(lines, ("1.0", "0.7") * 2, strict=True):
        assert f"(gradient_clipping {value}) is turned off" in line


def test_the_names_relied_on_are_there():
    from deepspeed.runtime import bf16_optimizer, engine, utils
    from deepspeed.runtime.fp16 import fused_optimizer, unfused_optimizer
    from deepspeed.runtime.zero import stage3, stage_1_and_2

    assert deepspeed.__version__.startswith("0.19."), (
        "read gradclip/layouts/deepspeed*.py and gradclip/drivers/deepspeed.py again"
    )
    relied_on = {
        stage_1_and_2.DeepSpeedZeroOptimizer: "check_overflow scaled_global_norm "
        "unscale_and_clip_grads _update_scale loss_scale",
        stage3.DeepSpeedZeroOptimizer_Stage3: "check_overflow _get_norm_groups "
        "unscale_and_clip_grads _update_scale loss_scale get_param_id _get_param_partition_rank",
        bf16_optimizer.BF16_Optimizer: "get_grads_for_norm",
        fused_optimizer.FP16_Optimizer: "unscale_and_clip_grads",
        unfused_optimizer.FP16_UnfusedOptimizer: "unscale_and_clip_grads",
        utils.CheckOverflow: "has_overflow",
        engine.DeepSpeedEngine: "gradient_clipping was_step_applied get_global_grad_norm",
    }
    for owner, names in relied_on.items():
        for name in names.split():
            assert hasattr(owner, name), f"{owner.__name__}.{name}"
