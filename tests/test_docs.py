"""Every code block a reader may copy is run."""

import contextlib
import os
import re
from pathlib import Path
from typing import get_args

import pytest
import yaml

import gradclip
from gradclip.config import parse_mapping
from gradclip.policies import AnyPolicy

with contextlib.suppress(ImportError):
    import support.deepspeed_cpu  # noqa: F401  # else DeepSpeed compiles its collectives

ROOT = Path(__file__).parents[1]
POLICIES = ROOT / "docs" / "policies"
PAGES = [
    *ROOT.glob("*.md"),
    *ROOT.glob("docs/*.md"),
    *ROOT.glob("*/README.md"),
    *POLICIES.glob("*.md"),
]
TYPES = [policy.model_fields["type"].default for policy in get_args(get_args(AnyPolicy)[0])]
pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning",
    "ignore::FutureWarning",
    "ignore:.*torch.jit.script:DeprecationWarning",  # deepspeed 0.19.8 uses it
)


def blocks(language, pages=PAGES):
    for page in sorted(pages):
        found = re.findall(
            rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE
        )
        for index, code in enumerate(found):
            yield pytest.param(code, id=f"{page.relative_to(ROOT)}-{index}")


@pytest.mark.parametrize("code", list(blocks("python")))
def test_python(code, monkeypatch, tmp_path):
    for folder in ("configs", "examples"):
        os.symlink(ROOT / folder, tmp_path / folder)
    monkeypatch.chdir(tmp_path)
    if "deepspeed.initialize" in code:  # as its launcher would
        monkeypatch.setenv("LOCAL_RANK", "0")
    exec(compile(code, "block", "exec"), {"__name__": "__main__"})


def sections(mapping):
    """Every clip configuration in a YAML block, whatever it is nested in."""
    if isinstance(mapping, dict):
        if "policies" in mapping and not {"match", "optimizer", "optimizer_group"} & set(mapping):
            yield mapping
        for value in mapping.values():
            yield from sections(value)
    elif isinstance(mapping, list):
        for value in mapping:
            yield from sections(value)


@pytest.mark.parametrize("text", list(blocks("yaml")))
def test_yaml(text):
    for section in sections(yaml.safe_load(text)):
        parse_mapping(section)


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_public_name_is_mentioned():
    text = "".join(page.read_text() for page in PAGES)
    for_adapters = {"ClipError", "PolicyLike", "as_config", "configs_for", "load_section"}
    missing = [n for n in gradclip.__all__ if n not in text and n not in for_adapters]
    assert not missing


@pytest.mark.parametrize("kind", TYPES)
def test_every_policy_has_a_page(kind):
    text = (POLICIES / f"{kind}.md").read_text()
    prose = re.sub(r"^```(?:python|yaml)\n.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    assert re.search(r" (=|<=|>) ", prose), "an equation"
    settings = [
        yaml.safe_load(block.values[0]) for block in blocks("yaml", [POLICIES / f"{kind}.md"])
    ]
    used = {policy["type"] for s in settings for part in sections(s) for policy in part["policies"]}
    assert kind in used
    assert f"](../images/policies/{kind}.png)" in text
    picture = (ROOT / "docs" / "images" / "policies" / f"{kind}.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) < 90_000
    rows = [line for line in (POLICIES / "README.md").read_text().splitlines() if line[:1] == "|"]
    assert any(f"({kind}.md)" in row for row in rows), "a situation"
    assert any(row.startswith(f"| `{kind}` |") for row in rows), "a row of all policies"


def test_every_page_on_a_policy_is_of_one():
    others = {"README", "schedules"}
    assert {page.stem for page in POLICIES.glob("*.md")} == {*TYPES, *others}
    drawn = {path.stem for path in (ROOT / "docs" / "images" / "policies").iterdir()}
    assert drawn == {*TYPES, "schedules"}
