"""Every kind of gradient, parameter and optimizer: clipped right, or refused by name."""

import pytest
import torch
from support.gradients import NORM, backward, small_model
from support.ranks import run_on_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import gradclip
from gradclip import (
    AGC,
    ClipByNorm,
    ClipByRMS,
    ClipByValue,
    ConfigError,
    GradientClipper,
    LayoutError,
    SkipLarge,
    Spam,
    UClip,
)

OPTIMIZERS = {
    "sgd": (torch.optim.SGD, {"momentum": 0.9}),
    "adam": (torch.optim.Adam, {}),
    "adamw": (torch.optim.AdamW, {"weight_decay": 0.1}),
    "adagrad": (torch.optim.Adagrad, {}),
    "rmsprop": (torch.optim.RMSprop, {"momentum": 0.9}),
    "radam": (torch.optim.RAdam, {}),
    "adadelta": (torch.optim.Adadelta, {}),
    "nadam": (torch.optim.NAdam, {}),
}
FUSED = ("sgd", "adam", "adamw", "adagrad")


def trained(how, optimizer="sgd", steps=3, compiled=(), backend="aot_eager", **options):
    """Parameters after some steps; `clip` is torch's own where `how` is "torch"."""
    cls, more = OPTIMIZERS[optimizer]
    model = small_model()
    stepper = cls(model.parameters(), lr=0.05, **more, **options)
    net = torch.compile(model, backend=backend) if "model" in compiled else model
    clipper = GradientClipper(NORM, net.named_parameters(), stepper)
    if how == "attached":
        clipper.attach(stepper)
    step = stepper.step
    if "step" in compiled or "function" in compiled:
        inner = stepper.step if "step" in compiled else lambda: stepper.step()
        step = torch.compile(inner, backend=backend)
    for index in range(steps):
        backward(net, index, size=50)
        if how == "called":
            assert clipper.clip().clipped
        elif how == "torch":
            torch.nn.utils.clip_grad_norm_(model.parameters(), NORM.max_norm)
        step()
    if how != "torch":
        assert clipper.state_dict()["counts"]["steps"] == steps
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_steps_as_after_torchs_own_clipping(name, subtests):
    expected = trained("torch", name)
    for kind in ("for-loop", "foreach", *(["fused"] if name in FUSED else [])):
        options = {"foreach": False} if kind == "for-loop" else {kind: True}
        for how in ("called", "attached"):
            with subtests.test(f"{kind}, {how}"):
                found = trained(how, name, **options)
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


# torch's own while it traces a step.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
@pytest.mark.parametrize(
    ("how", "compiled", "backend"),
    [
        ("called", ["model"], "aot_eager"),  # parameters have a wrapper's names
        ("called", ["step"], "aot_eager"),  # a step that has no hook of ours
        ("attached", ["step"], "aot_eager"),  # and one whose hook must stay out of the graph
        ("attached", ["function"], "aot_eager"),  # also when a function around it is compiled
        ("attached", ["model", "step"], "inductor"),  # real code of both
    ],
)
def test_compiled_models_and_steps(how, compiled, backend):
    torch._dynamo.reset()
    found = trained(how, "adamw", compiled=compiled, backend=backend)
    torch.testing.assert_close(found, trained("torch", "adamw"), rtol=1e-4, atol=1e-5)


def test_a_differentiable_optimizer_is_refused():
    optimizer = torch.optim.SGD(small_model().parameters(), lr=0.1, differentiable=True)
    with pytest.raises(ConfigError, match="SGD has differentiable=True"):
        GradientClipper(NORM, optimizer=optimizer)


def test_gradients_with_a_graph_stay_usable():
    weight = nn.Parameter(torch.tensor([3.0, 4.0]))
    weight.grad = torch.autograd.grad(weight.square().sum(), weight, create_graph=True)[0]
    graph = weight.grad.grad_fn
    GradientClipper(NORM, [("w", weight)]).clip()
    assert weight.grad.grad_fn is graph
    torch.testing.assert_close(weight.grad.detach(), torch.tensor([0.3, 0.4]))
    weight.grad = None


def sparse_model(sparse=True, kind=nn.Embedding):
    torch.manual_seed(0)
    return nn.Sequential(kind(7, 3, sparse=sparse), nn.Linear(3, 1))


ROWS = torch.tensor([[1, 1, 5], [2, 5, 1]])
SPARSE = {
    "norm": (ClipByNorm(max_norm=0.5), nn.Embedding),
    "norm of a bag": (ClipByNorm(max_norm=0.5), nn.EmbeddingBag),
    "inf": (ClipByNorm(max_norm=0.5, norm_type=float("inf")), nn.Embedding),
    "p3": (ClipByNorm(max_norm=0.5, norm_type=3.0, scope="parameter"), nn.Embedding),
    "agc": (AGC(clip_factor=0.1, scope="parameter"), nn.EmbeddingBag),
    "rms": (ClipByRMS(max_rms=0.01), nn.Embedding),
    "value": (ClipByValue(clip_value=0.2), nn.Embedding),
}


@pytest.mark.parametrize("kernel", ["cpu", "accelerator", "reference"])
def test_sparse_gradients_are_clipped_as_dense_ones(kernel, subtests):
    for name, (policy, kind) in SPARSE.items():
        with subtests.test(name):
            sparse, dense = (two_steps(policy, kind, kernel, sparse=s) for s in (True, False))
            torch.testing.assert_close(sparse, dense)


def two_steps(policy, kind, kernel, *, sparse):
    """An embedding's gradient and weight, and the norm, after two clipped steps."""
    model = sparse_model(sparse, kind)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    clipper = GradientClipper(policy, model.named_parameters(), optimizer, kernel=kernel)
    for _ in range(2):
        optimizer.zero_grad()
        (model(ROWS).sum() * 10).backward()
        assert model[0].weight.grad.is_sparse == sparse
        record = clipper.clip()
        assert record.clipped
        optimizer.step()
    return [model[0].weight.grad.to_dense(), model[0].weight, record.grad_norm]


def test_sparse_adam_attached():
    table = nn.Embedding(7, 3, sparse=True)
    optimizer = torch.optim.SparseAdam(table.parameters(), lr=0.1)
    clipper = GradientClipper(NORM, table.named_parameters(), optimizer)
    clipper.attach(optimizer)
    table(ROWS).sum().backward()
    optimizer.step()
    grad = table.weight.grad.to_dense()
    torch.testing.assert_close(grad.norm(), torch.tensor(0.5))
    assert clipper.last_record.grad_norm == pytest.approx(
        torch.tensor([3.0, 1.0, 2.0]).norm() * 3**0.5
    )


def test_sparse_gradients_that_are_not_finite_are_named():
    table = nn.Embedding(7, 3, sparse=True)
    config = {"policies": [{"type": "norm", "max_norm": 1.0}], "on_nonfinite": "raise"}
    clipper = GradientClipper(config, table.named_parameters())
    (table(ROWS).sum() * torch.inf).backward()
    with pytest.raises(gradclip.NonFiniteError, match="weight"):
        clipper.clip()


def test_sparse_gradients_are_refused_where_elements_or_units_matter(subtests):
    by_unit = ClipByNorm(max_norm=1.0, scope="unit")
    for policy in (AGC(), by_unit, UClip(limit=0.1), Spam()):
        with subtests.test(policy.type):
            model = sparse_model()
            clipper = GradientClipper(policy, model.named_parameters())
            model(ROWS).sum().backward()
            before = [p.grad.to_dense().clone() for p in model.parameters()]
            message = r"gradient of '0\.weight' is sparse.*sparse=False"
            with pytest.raises(LayoutError, match=message):
                clipper.clip()
            assert all(map(torch.equal, (p.grad.to_dense() for p in model.parameters()), before))


def test_sparse_gradients_in_the_drop_ins():
    for clip in (gradclip.clip_grad_norm_, gradclip.clip_grad_value_):
        found = []
        for sparse in (True, False):
            model = sparse_model(sparse)
            model(ROWS).sum().backward()
            grads = [p.grad for p in model.parameters()]
            norm = gradclip.get_total_norm(grads)
            assert model[0].weight.grad is grads[0]
            assert clip(model.parameters(), 0.2) in (norm, None)
            found.append([norm, *(p.grad.to_dense() for p in model.parameters())])
        torch.testing.assert_close(*found)


class Wave(nn.Module):
    def __init__(self):
        super().__init__()
        self.z = nn.Parameter(torch.tensor([1 + 2j, 3 - 1j]))

    def forward(self, x):
        return (self.z * x).abs().square().sum()


def under_ddp(rank, world):
    """Norms, and what was clipped, of sparse, dense and complex gradients."""
    found = {}
    for sparse in (True, False):
        model = DistributedDataParallel(sparse_model(sparse))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        clipper = GradientClipper(NORM, model.named_parameters(), optimizer)
        for _ in range(3):
            optimizer.zero_grad()
            (model(ROWS + rank).sum() * 10).backward()
            norm = clipper.clip().grad_norm
            optimizer.step()
        found["sparse" if sparse else "dense"] = norm, model.module[0].weight.detach()
    model = DistributedDataParallel(Wave())
    clipper = GradientClipper(NORM, model.named_parameters())
    model(torch.tensor([1.0 + rank, 2.0])).backward()
    found["complex"] = clipper.clip().grad_norm, model.module.z.grad.clone()
    return found


def test_sparse_and_complex_gradients_under_ddp():
    first, second = run_on_ranks(under_ddp, 2)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    torch.testing.assert_close(first["sparse"], first["dense"])
    # The mean over ranks of 2 x^2 z, for x of (1, 2) and (2, 2).
    whole = torch.tensor([5 * (1 + 2j), 8 * (3 - 1j)])
    norm, clipped = first["complex"]
    assert norm == pytest.approx(float(whole.abs().double().norm()), rel=1e-6)
    torch.testing.assert_close(clipped, whole * (NORM.max_norm / float(norm)))


def complex_parameters(dtype=torch.complex64):
    z = nn.Parameter(torch.zeros(2, 2, dtype=dtype))
    x = nn.Parameter(torch.zeros(3))
    z.grad = torch.tensor([[3 + 4j, 1j], [-2, 0.5 - 0.5j]], dtype=dtype)
    x.grad = torch.tensor([1.0, -2.0, 0.5])
    return {"z": z, "x": x}


@pytest.mark.parametrize("kernel", ["cpu", "accelerator", "reference"])
def test_complex_gradients_have_the_norm_of_their_magnitudes(kernel, subtests):
    kinds = ((torch.complex64, False), (torch.complex128, False), (torch.complex64, True))
    for dtype, conjugated in kinds:
        with subtests.test(f"{dtype}, {conjugated=}"):
            ours, torchs = complex_parameters(dtype), complex_parameters(dtype)
            if conjugated:  # torch's own function can't scale such a view
                ours["z"].grad = ours["z"].grad.conj()
                torchs["z"].grad = ours["z"].grad.resolve_conj()
            clipper = GradientClipper(ClipByNorm(max_norm=2.0), ours.items(), kernel=kernel)
            norm = float(torch.nn.utils.clip_grad_norm_(torchs.values(), 2.0))
            assert float(clipper.clip().grad_norm) == pytest.approx(norm, rel=1e-6)
            for name, p in ours.items():
                torch.testing.assert_close(p.grad, torchs[name].grad)


def test_complex_gradients_in_the_drop_ins(subtests):
    for p in (1.0, 2.0, 3.0, float("inf")):
        with subtests.test(f"{p=}"):
            ours, torchs = complex_parameters(), complex_parameters()
            held = [q.grad for q in torchs.values()]
            wanted = float(torch.nn.utils.get_total_norm(held, p))
            found = gradclip.get_total_norm([q.grad for q in ours.values()], p)
            assert float(found) == pytest.approx(wanted)
            norm = gradclip.clip_grad_norm_(ours.values(), 2.0, p)
            wanted = torch.nn.utils.clip_grad_norm_(torchs.values(), 2.0, p)
            torch.testing.assert_close(norm, wanted)
            for name, q in ours.items():
                torch.testing.assert_close(q.grad, torchs[name].grad)
    with pytest.raises(ConfigError, match=r"parameters\[0\] is complex"):
        gradclip.clip_grad_value_(complex_parameters().values(), 1.0)


def test_complex_parameters_have_as_many_elements_as_they_have():
    params = complex_parameters()
    del params["x"]
    record = GradientClipper(ClipByRMS(max_rms=0.5, scope="global"), params.items()).clip()
    torch.testing.assert_close(float(record.clipped_norm), 0.5 * 4**0.5, rtol=1e-5, atol=0)


def test_complex_parameters_are_refused_where_they_have_no_meaning(subtests):
    for policy in (
        AGC(),
        ClipByValue(clip_value=1.0),
        Spam(),
        UClip(limit=1.0),
        SkipLarge(limit=9.0, norm_type=float("inf")),
        ClipByNorm(max_norm=1.0, norm_type=3.0),
    ):
        message = f"'z' is complex, and '{policy.type}' takes"
        with subtests.test(policy.type), pytest.raises(ConfigError, match=message):
            GradientClipper(policy, complex_parameters().items())


def test_complex_agc_by_parameter():
    params = complex_parameters()
    params["z"].data.fill_(1 + 1j)
    GradientClipper(AGC(clip_factor=0.1, scope="parameter"), [("z", params["z"])]).clip()
    torch.testing.assert_close(params["z"].grad.norm(), torch.tensor(0.1 * 8**0.5))


def test_tied_parameters_count_once_under_their_first_name():
    config = {
        "policies": [{"type": "norm", "max_norm": 1.0}],
        "groups": [{"match": "embed.*", "policies": [{"type": "norm", "max_norm": 2.0}]}],
        "log": {"per_parameter": True},
    }
    for once in (True, False):
        model = nn.ModuleDict({"embed": nn.Embedding(3, 3), "head": nn.Linear(3, 3, bias=False)})
        model["head"].weight = model["embed"].weight
        clipper = GradientClipper(config, model.named_parameters(remove_duplicate=once))
        model["embed"].weight.grad = torch.full((3, 3), 3.0)
        record = clipper.clip()
        assert dict(record.per_parameter) == {"embed.weight": 9.0}, f"{once=}"
        torch.testing.assert_close(model["embed"].weight.grad.norm(), torch.tensor(2.0))


def test_a_parameter_given_twice_to_a_drop_in_counts_once():
    p = nn.Parameter(torch.zeros(2))
    p.grad = torch.tensor([3.0, 4.0])
    assert gradclip.clip_grad_norm_([p, p], 1.0) == 5.0
    torch.testing.assert_close(p.grad.norm(), torch.tensor(1.0))


def gradients_of_every_kind():
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(shape, generator=generator)

    return {
        "half": randn(5, 3).half(),
        "brain": randn(4).bfloat16(),
        "double": randn(3, 3).double(),
        "none": torch.zeros(0, 4),
        "scalar": torch.tensor(3.0),
        "expanded": torch.ones(1).expand(5),
        "rows": randn(1, 4).expand(3, 4),
        "window": randn(9).as_strided((3, 3), (1, 1)),
        "transposed": randn(4, 3).t(),
        "strided": randn(6, 8)[:, ::2],
        "channels": randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last),
        "wider": torch.tensor([3.0, 4.0], dtype=torch.float64),  # than its parameter
    }


@pytest.mark.parametrize("kernel", ["cpu", "accelerator", "reference"])
def test_dtypes_shapes_and_strides_of_every_kind_in_one_model(kernel, subtests):
    for scope in ("global", "parameter", "unit"):
        grads = gradients_of_every_kind()
        params = {n: nn.Parameter(torch.zeros(g.shape, dtype=g.dtype)) for n, g in grads.items()}
        params["wider"] = nn.Parameter(torch.zeros(2))
        params["wider"].grad_dtype = None
        for name, grad in grads.items():
            params[name].grad = grad
        before = {name: grad.double().clone() for name, grad in grads.items()}
        policy = ClipByNorm(max_norm=0.5, scope=scope)
        record = GradientClipper(policy, params.items(), kernel=kernel).clip()
        whole = torch.cat([grad.reshape(-1) for grad in before.values()])
        assert float(record.grad_norm) == pytest.approx(float(whole.norm()), rel=1e-6)
        for name, grad in before.items():
            if scope == "unit" and grad.ndim > 1:
                norms = grad.flatten(1).norm(dim=1).view(-1, *[1] * (grad.ndim - 1))
            else:
                norms = whole.norm() if scope == "global" else grad.norm()
            expected = torch.where(norms > 0.5, grad * 0.5 / (norms + 1e-6), grad)
            tolerance = {"half": 1e-3, "brain": 1e-2}.get(name, 1e-6)
            found = params[name].grad.double()
            with subtests.test(f"{name} by {scope}"):
                torch.testing.assert_close(found, expected, rtol=tolerance, atol=1e-6)


def test_gradients_wider_than_their_parameters_stay_in_range():
    p = nn.Parameter(torch.zeros(2))
    p.grad_dtype = None
    p.grad = torch.tensor([3e200, 4e200], dtype=torch.float64)
    assert float(GradientClipper(NORM, [("p", p)]).clip().grad_norm) == pytest.approx(5e200)


def test_dense_gradients_are_left_in_place():
    model = small_model()
    backward(model, size=50)
    grads = [p.grad for p in model.parameters()]
    GradientClipper(NORM, model.named_parameters()).clip()
    assert all(p.grad is g for p, g in zip(model.parameters(), grads, strict=True))
