"""What is installed: metadata, what wheel and sdist hold, and what each package lacks by name."""

import importlib
import re
import sys
import tarfile
import zipfile
from email.parser import BytesParser
from pathlib import Path

import pytest
import yaml

import accelerate_clip
import gradclip
import lightning_clip

ROOT = Path(__file__).parents[1]
PACKAGES = ("gradclip", "lightning_clip", "accelerate_clip")
RELATIVE = re.compile(r"\]\((?!https?:)([^)#]+)")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The wheel's files and metadata, and the sdist's files."""
    build = pytest.importorskip("hatchling.build")
    pytest.importorskip("hatch_fancy_pypi_readme")
    folder = tmp_path_factory.mktemp("dist")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        with zipfile.ZipFile(folder / build.build_wheel(str(folder))) as wheel:
            names = set(wheel.namelist())
            [metadata] = [name for name in names if name.endswith(".dist-info/METADATA")]
            headers = BytesParser().parsebytes(wheel.read(metadata))
        with tarfile.open(folder / build.build_sdist(str(folder))) as sdist:
            held = {name.partition("/")[2] for name in sdist.getnames()}
    return names, headers, held


def test_the_wheel_holds_the_packages_their_types_and_the_presets(built):
    names, headers, _ = built
    tops = {name.split("/")[0] for name in names}
    ours = {*PACKAGES, "gradclip_factories.py"}
    assert {top for top in tops if not top.endswith(".dist-info")} == ours
    files = [path.relative_to(ROOT) for path in (ROOT / "gradclip").rglob("*.*")]
    ours = {str(path) for path in files if "__pycache__" not in path.parts}
    ours |= {f"{package}/py.typed" for package in PACKAGES}
    assert ours <= names
    assert headers["Author"] == "gradclip maintainers"
    assert headers["Version"] == gradclip.__version__
    assert not headers.get_all("Project-URL")


def test_the_readme_renders_by_itself_and_the_sdist_holds_what_it_names(built):
    _, headers, held = built
    text = headers.get_payload()
    assert len(text) > 5000
    assert not RELATIVE.findall(text)
    linked = {target.rstrip("/") for target in RELATIVE.findall((ROOT / "README.md").read_text())}
    assert linked
    for target in linked:
        assert any(name == target or name.startswith(f"{target}/") for name in held), target
        assert target.endswith(".png") or f"`{target}" in text, target
    assert not {name for name in held if name.startswith(".venv")}


def test_one_version_everywhere():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"]
    recipe = yaml.safe_load((ROOT / "conda" / "recipe.yaml").read_text())["context"]["version"]
    packages = (lightning_clip.__version__, accelerate_clip.__version__)
    assert {cited, recipe, *packages} == {gradclip.__version__}


MISSING = {
    "lightning_clip": (("lightning", "lightning_fabric", "pytorch_lightning"), "lightning"),
    "accelerate_clip": (("accelerate",), "accelerate"),
    "accelerate_clip.trainer": (("transformers",), "transformers"),
}


@pytest.mark.parametrize("module", MISSING)
def test_what_is_missing_is_named_with_the_extra_that_brings_it(module, monkeypatch):
    absent, extra = MISSING[module]
    package = module.split(".")[0]
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    for name in absent:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ModuleNotFoundError, match=rf'pip install "gradclip\[{extra}\]"'):
        _ = importlib.import_module(package).GradientClipCallback
