"""The laws of the house: what may import what, and where private names of frameworks stand."""

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import gradclip

ROOT = Path(__file__).parents[1]
PACKAGES = ("gradclip", "lightning_clip", "accelerate_clip")

PARTS = ("policies", "layouts", "kernels", "effect", "records")
FLOORS = (  # a room imports from the floors below its own, and from its own
    {"devices", "errors", "private", "versions", "weak"},
    {"saved"},
    {"patches", "tensors", "types", "norms", "models"},
    {"policies", "layouts", "kernels", "changes", "steps"},
    {"config"},
    {"plan"},
    {"measure", "decide", "effect", "records", "stops", "plot"},
    {"functional", "state", "updates", "watch"},
    {"core"},
    {"debug", "drivers"},
    {"clipper"},
    {"adapters", "testing", "tools"},
)
PRIVATE = {  # files that may touch private names, and whose
    "gradclip/private.py": "torch",
    "gradclip/changes.py": "torch: which tensors an operation writes to",
    "gradclip/layouts/fsdp1.py": "torch: FSDP1",
    "gradclip/layouts/meshes.py": "torch: DTensor and DeviceMesh",
    "gradclip/layouts/deepspeed.py": "DeepSpeed: where gradients are",
    "gradclip/drivers/deepspeed.py": "DeepSpeed: its step",
    "lightning_clip/framework.py": "Lightning",
    "accelerate_clip/private.py": "Accelerate and transformers",
}


def files(package):
    found = sorted((ROOT / package).rglob("*.py"))
    assert found
    return found


def name_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path, *, types=True):
    """Modules that a file imports; with `types` also those only a type checker follows."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING" and not types:
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def graph(package, *, types):
    paths = {name_of(path): path for path in files(package)}
    return {
        name: {module for module in imports(path, types=types) if module in paths} - {name}
        for name, path in paths.items()
    }


def reached(edges, start):
    found, left = set(), [start]
    while left:
        for module in edges[left.pop()] - found:
            found.add(module)
            left.append(module)
    return found


def room(module):
    return module.split(".")[1] if "." in module else ""


def test_the_five_parts_never_reach_one_another():
    edges = graph("gradclip", types=False)
    for module in edges:
        if room(module) in PARTS:
            others = {room(other) for other in reached(edges, module)} & set(PARTS)
            assert others <= {room(module)}, module


@pytest.mark.parametrize("package", PACKAGES)
def test_there_are_no_import_circles(package):
    edges = graph(package, types=True)
    top = {package}  # whose __init__ gathers the public names
    edges = {name: modules - top for name, modules in edges.items()}
    assert [name for name in edges if name in reached(edges, name)] == []


def test_imports_lead_downwards():
    floors = {name: floor for floor, names in enumerate(FLOORS) for name in names}
    for module, others in graph("gradclip", types=True).items():
        for other in others if room(module) else ():
            if room(other):
                assert floors[room(other)] <= floors[room(module)], f"{module} imports {other}"


def test_only_layouts_know_about_ranks():
    for path in files("gradclip"):
        names = [module for module in imports(path) if module.startswith("torch.distributed")]
        assert "layouts" in path.parts or not names, path


def test_the_engine_and_the_tools_need_no_framework():
    blocked = ("lightning", "pytorch_lightning", "accelerate", "transformers", "deepspeed")
    tools = ", ".join(
        f"gradclip.tools.{path.stem}" for path in (ROOT / "gradclip" / "tools").glob("[a-z]*.py")
    )
    code = (
        f"import sys\nfor name in {blocked!r}: sys.modules[name] = None\nimport gradclip, {tools}"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


DRAWS = "gradclip/plot.py"  # which imports matplotlib when a notebook asks for a picture


def test_training_needs_none_of_the_tools():
    for path in (path for package in PACKAGES for path in files(package)):
        if "tools" not in path.parts:
            found = {module.split(".")[0] for module in imports(path)}
            if path.name == "arithmetic.py":  # which does without it, as torch does
                found -= {"numpy"}
            drawn = {"matplotlib"} if path == ROOT / DRAWS else set()
            assert not found & {"typer", "rich", "numpy", "matplotlib", "plotly"} - drawn, path
            assert not any(module.startswith("gradclip.tools") for module in imports(path)), path


@pytest.mark.parametrize(
    ("package", "other"), [("lightning_clip", "accelerate"), ("accelerate_clip", "lightning")]
)
def test_adapters_import_public_names_and_never_each_other(package, other):
    for path in files(package):
        for module in imports(path):
            inner = module.startswith("gradclip.") and module.split(".")[1] != "adapters"
            assert not (inner and (ROOT / "gradclip" / module.split(".")[1]).exists()), path
            assert not inner or hasattr(gradclip, module.split(".")[1]), (path, module)
            assert not module.startswith((f"{other}_clip", f"{other}.")), path


def private_names(path):
    """Private attributes that a file uses of objects that others make."""
    tree = ast.parse(path.read_text())
    own = {node.name for node in ast.walk(tree) if hasattr(node, "name")}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            own.add(node.attr)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            own.add(node.id)
    for node in ast.walk(tree):
        found = ""
        if isinstance(node, ast.Attribute):
            found = node.attr
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr"):
            found = getattr(node.args[1], "value", "")
        if (
            re.match(r"_(?!_|foreach_|amp_foreach_|asdict|replace|exit$)", str(found))
            and found not in own
        ):
            yield found


def test_private_names_of_frameworks_stand_in_files_of_their_own():
    inherited = {"_bounded", "_holds"}  # of the base class of policies that skip
    for path in (path for package in PACKAGES for path in files(package)):
        if str(path.relative_to(ROOT)) not in PRIVATE:
            assert set(private_names(path)) <= inherited, path


FACTORIES = {"tensor", "as_tensor", "zeros", "ones", "full", "empty", "arange", "linspace", "eye"}


def test_every_new_tensor_says_its_device_and_dtype():
    """Others follow what a script set as defaults: another device, or half precision."""
    for path in (path for package in PACKAGES for path in files(package)):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("torch."):
                made = ast.unparse(node.func).removeprefix("torch.") in FACTORIES
                given = {keyword.arg for keyword in node.keywords}
                assert not made or {"device", "dtype"} <= given, f"{path}, line {node.lineno}"


def public(package):
    for name in package.__all__:
        value = getattr(package, name)
        if inspect.isclass(value):
            yield name, value
            for method, function in inspect.getmembers(value, inspect.isfunction):
                own = method in vars(value) and not method.startswith("_")
                if own:
                    yield f"{name}.{method}", function
        elif inspect.isfunction(value):
            yield name, value


def faults_of(name, value):
    text = inspect.getdoc(value)
    if not text:
        yield f"{name} has no docstring"
        return
    documented = set()
    if match := re.search(r"^Args:\n((?:    .*\n?|\n)+)", text, re.MULTILINE):
        documented = set(re.findall(r"^    (\w+):", match.group(1), re.MULTILINE))
    signature = inspect.signature(value.__init__ if inspect.isclass(value) else value)
    for argument in documented - set(signature.parameters):
        yield f"{name} documents {argument!r}, which it doesn't take"


def test_public_names_are_documented_and_their_arguments_exist():
    names = dict(public(gradclip))
    assert len(names) > 50
    assert [fault for item in names.items() for fault in faults_of(*item)] == []
