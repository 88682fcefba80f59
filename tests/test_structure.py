"""What may import what, and that docstrings tell the truth about arguments."""

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import gradclip

ROOT = Path(__file__).parents[1]
PARTS = ("policies", "layouts", "kernels", "effect", "records")


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


def part_of(module):
    return module.split(".")[1] if module.startswith("gradclip.") else None


@pytest.mark.parametrize("part", PARTS)
def test_the_five_parts_never_import_one_another(part):
    files = [*(ROOT / "gradclip" / part).glob("*.py"), ROOT / "gradclip" / f"{part}.py"]
    found = {part_of(m) for path in files if path.exists() for m in imports(path)}
    assert found & set(PARTS) <= {part}


def test_only_layouts_know_about_ranks():
    for path in (ROOT / "gradclip").rglob("*.py"):
        names = [m for m in imports(path) if m.startswith("torch.distributed")]
        if "layouts" not in path.parts and path.name != "engine.py":  # a type annotation
            assert not names, path


def test_the_engine_and_the_tools_need_no_framework():
    blocked = ("lightning", "pytorch_lightning", "accelerate", "transformers", "deepspeed")
    tools = ", ".join(
        f"gradclip.tools.{path.stem}" for path in (ROOT / "gradclip" / "tools").glob("[a-z]*.py")
    )
    code = (
        f"import sys\nfor name in {blocked!r}: sys.modules[name] = None\nimport gradclip, {tools}"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_training_needs_none_of_the_tools():
    for package in ("gradclip", "lightning_clip", "accelerate_clip"):
        for path in (ROOT / package).rglob("*.py"):
            if "tools" not in path.parts:
                found = {module.split(".")[0] for module in imports(path)}
                assert not found & {"typer", "rich", "numpy", "matplotlib", "plotly"}, path
                assert not any(m.startswith("gradclip.tools") for m in imports(path)), path


@pytest.mark.parametrize(
    ("package", "other"),
    [
        ("lightning_clip", "accelerate"),
        ("accelerate_clip", "lightning"),
    ],
)
def test_adapters_use_public_names_and_never_each_other(package, other):
    files = list((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        for module in imports(path):
            assert module == "gradclip.adapters" or not module.startswith("gradclip."), path
            assert not module.startswith((f"{other}_clip", f"{other}.")), path


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


def test_files_stay_small():
    for folder in ("gradclip", "lightning_clip", "accelerate_clip"):
        for path in (ROOT / folder).rglob("*.py"):
            assert len(path.read_text().splitlines()) <= 350, path
