"""A DeepSpeed engine of every wrapper and stage, and its steps."""

import math

import torch
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from torch import nn

from gradclip.layouts.deepspeed import DeepSpeedLayout
from support.deepspeed_cpu import StubFusedAdam, config, engine_of, whole
from support.nets import uneven_net

WORLD = 2
ROWS = 4
LR = 0.05
OFFLOAD = {"zero": {"offload_optimizer": {"device": "cpu"}}}
SCALE = 256.0
FP16 = {"fp16": {"enabled": True, "initial_scale_power": 8, "loss_scale_window": 10_000}}

# Wrapper of DeepSpeed's that each configuration gives, and the configuration.
ENGINES = {
    "stage 0": ("SGD", (0,), {}),
    "zero 1": ("DeepSpeedZeroOptimizer", (1,), {}),
    "zero 2": ("DeepSpeedZeroOptimizer", (2,), {}),
    "zero 2 round robin": (
        "DeepSpeedZeroOptimizer",
        (2,),
        {"zero": {"round_robin_gradients": True, "overlap_comm": True}},
    ),
    "zero 1 aligned": ("DeepSpeedZeroOptimizer", (1,), {"zero": {"parameter_alignment": True}}),
    "zero 3": ("DeepSpeedZeroOptimizer_Stage3", (3,), {"zero": {"sub_group_size": 20}}),
    "zero 1 offload": ("DeepSpeedZeroOptimizer", (1,), OFFLOAD),
    "zero 2 offload": ("DeepSpeedZeroOptimizer", (2,), OFFLOAD),
    "zero 3 offload": ("DeepSpeedZeroOptimizer_Stage3", (3,), OFFLOAD),
    "bf16 stage 0": ("FP16_UnfusedOptimizer", (0, "bf16"), {}),
    "bf16 stage 0 fused": ("FP16_Optimizer", (0, "bf16"), {}),
    "bf16 zero 1": ("DeepSpeedZeroOptimizer", (1, "bf16"), {}),
    "bf16 zero 1 fp32 accumulation": (
        "BF16_Optimizer",
        (1, "bf16"),
        {"data_types": {"grad_accum_dtype": "fp32"}},
    ),
    "bf16 zero 2 fp32 accumulation": (
        "DeepSpeedZeroOptimizer",
        (2, "bf16"),
        {"data_types": {"grad_accum_dtype": "fp32"}},
    ),
    "bf16 zero 3 fp32 accumulation": (
        "DeepSpeedZeroOptimizer_Stage3",
        (3, "bf16"),
        {"data_types": {"grad_accum_dtype": "fp32"}},
    ),
    "bf16 zero 2": ("DeepSpeedZeroOptimizer", (2, "bf16"), {}),
    "bf16 zero 2 offload": ("DeepSpeedZeroOptimizer", (2, "bf16"), OFFLOAD),
    "bf16 zero 3": ("DeepSpeedZeroOptimizer_Stage3", (3, "bf16"), {}),
    "fp16 zero 1": ("DeepSpeedZeroOptimizer", (1, "fp16"), FP16),
    "fp16 zero 2": ("DeepSpeedZeroOptimizer", (2, "fp16"), FP16),
    "fp16 zero 3": ("DeepSpeedZeroOptimizer_Stage3", (3, "fp16"), FP16),
}
if "parameter_alignment" not in DeepSpeedZeroConfig.model_fields:
    # An older DeepSpeed, whose ZeRO 3 and BF16_Optimizer are refused. It wraps bf16 at stage 0 so.
    refused = ("DeepSpeedZeroOptimizer_Stage3", "BF16_Optimizer")
    for name, (kind, *_) in tuple(ENGINES.items()):
        if kind in refused or name.startswith(("zero 1 aligned", "bf16 stage 0")):
            del ENGINES[name]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def batch(step):
    return torch.randn(WORLD * ROWS, 5, generator=torch.Generator().manual_seed(step))


def spike(step):
    return 8.0 if step % 4 == 3 else 1.0


def groups(net):
    parameters = list(net.parameters())
    return [{"params": parameters[:3], "name": "first"}, {"params": parameters[3:]}]


def start(name, net=None, optimizer=torch.optim.SGD, scheduler=None, **more):
    """An engine, two groups of parameters, none divisible by the number of ranks."""
    _, settings, options = ENGINES[name]
    net = uneven_net(1) if net is None else net
    kind = StubFusedAdam if "fused" in name else optimizer
    built = kind(groups(net), lr=LR)
    if scheduler is not None:
        scheduler = scheduler(built)
    settings = config(*settings, **(options | more))
    return engine_of(net, built, settings, lr_scheduler=scheduler)


def backward(engine, rank, number, factor=1.0):
    mine = batch(number)[rank * ROWS : (rank + 1) * ROWS]
    loss = engine(mine.to(next(engine.module.parameters()).dtype)).float().square().mean()
    engine.backward(loss * factor)


def step(engine, rank, number, factor=1.0):
    backward(engine, rank, number, factor)
    engine.step()


class Spoilt(nn.Module):
    """The last parameter, of one element, gets a NaN gradient where `spoil` is set."""

    def __init__(self):
        super().__init__()
        self.layers = uneven_net(1)
        self.last = nn.Parameter(torch.zeros(1))
        self.spoil = False

    def forward(self, inputs):
        return self.layers(inputs) + _Spoil.apply(self.last, self.spoil)


class _Spoil(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value, spoil):
        ctx.spoil = spoil
        return value.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad.sum().view(1) * (math.nan if ctx.spoil else 1.0), None


def snapshot(engine):
    """Bytes of parameters, master weights and optimizer state that this rank holds.

    Padding may be anything, NaN included, so values would not compare.
    """
    wrapper = engine.optimizer
    base = getattr(wrapper, "optimizer", wrapper)
    held = [p for group in base.param_groups for p in group["params"]]
    held += getattr(wrapper, "fp32_partitioned_groups_flat", [])
    held += [t for s in base.state.values() for t in s.values() if torch.is_tensor(t)]
    return [t.detach().clone().reshape(-1).view(torch.uint8) for t in held + whole(engine)]


def gradients(engine):
    """What this rank holds of them, copied."""
    layout = DeepSpeedLayout(engine)
    with layout.in_step():
        held = layout.collect([list(engine.module.parameters())]).all
    return [grad.clone() for slot in held for grad in slot]
