"""Every code block a reader may copy is run."""

import contextlib
import os
import re
import textwrap
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import get_args

import pytest
import yaml

import gradclip
from docs.messages import GAP, messages
from gradclip import ConfigError, adapters
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
NEEDS = re.compile(r"^# needs (\w+)$", re.MULTILINE)
"""Marks a block with a package that isn't among ours; the block is run where that is installed."""
pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning",
    "ignore::FutureWarning",
    "ignore:.*torch.jit.script:DeprecationWarning",  # deepspeed 0.19.8 uses it
)


@dataclass(frozen=True)
class Block:
    """Code of a page; `line` is its number there, from 1."""

    page: Path
    line: int
    text: str

    @property
    def place(self):
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(language, pages):
    for page in sorted(pages):
        text = page.read_text()
        fence = rf"^( *)```{language}\n(.*?)^\1```"  # indented within a tab
        for found in re.finditer(fence, text, re.DOTALL | re.MULTILINE):
            code = textwrap.dedent(found[2])
            yield Block(page, text.count("\n", 0, found.start(2)) + 1, code)


def pages_with(language):
    return sorted({block.page for block in blocks(language, PAGES)})


@pytest.mark.parametrize("page", pages_with("python"), ids=lambda page: f"{page.relative_to(ROOT)}")
def test_python(page, monkeypatch, tmp_path):
    """Each block by itself, in a folder of its own; tracebacks show the lines of the page."""
    for number, block in enumerate(blocks("python", [page])):
        if any(find_spec(name) is None for name in NEEDS.findall(block.text)):
            continue
        folder = tmp_path / str(number)
        folder.mkdir()
        for name in ("configs", "examples"):
            os.symlink(ROOT / name, folder / name)
        with monkeypatch.context() as patch:
            patch.chdir(folder)
            if "deepspeed.initialize" in block.text:  # as its launcher would
                patch.setenv("LOCAL_RANK", "0")
            code = "\n" * (block.line - 1) + block.text
            exec(compile(code, str(page), "exec"), {"__name__": "__main__"})


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


def test_yaml():
    faults = []
    for block in blocks("yaml", PAGES):
        try:
            for section in sections(yaml.safe_load(block.text)):
                parse_mapping(section)
        except (ConfigError, yaml.YAMLError) as error:
            faults.append(f"{block.place}: {error}")
    assert not faults


def test_links_lead_somewhere():
    faults = []
    for page in PAGES:
        for target, anchor in re.findall(r"\]\(([^)#]*)(?:#([^)]*))?\)", page.read_text()):
            path = page.parent / target if target else page
            if target.startswith("http"):
                continue
            if not path.exists() or (anchor and anchor not in anchors(path)):
                faults.append(f"{page.relative_to(ROOT)}: {target}#{anchor}")
    assert not faults


def anchors(page):
    """Of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


def test_every_public_name_is_mentioned():
    text = "".join(page.read_text() for page in PAGES if page.name != "CHANGELOG.md")
    names = {*gradclip.__all__, *adapters.__all__}
    assert not {name for name in names if not re.search(rf"\b{name}\b", text)}


def test_every_policy_has_a_page_with_a_picture():
    rows = [line for line in (POLICIES / "README.md").read_text().splitlines() if line[:1] == "|"]
    for kind in TYPES:
        page = POLICIES / f"{kind}.md"
        text = page.read_text()
        prose = re.sub(r"^```(?:python|yaml)\n.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
        assert re.search(r" (=|<=|>) ", prose), f"{kind}: no equation"
        settings = [yaml.safe_load(block.text) for block in blocks("yaml", [page])]
        policies = [p for s in settings for part in sections(s) for p in part["policies"]]
        assert kind in {policy["type"] for policy in policies}, kind
        assert f"](../images/policies/{kind}.png)" in text, kind
        picture = (ROOT / "docs" / "images" / "policies" / f"{kind}.png").read_bytes()
        assert picture.startswith(b"\x89PNG"), kind
        assert len(picture) < 90_000, kind
        assert any(f"({kind}.md)" in row for row in rows), f"{kind}: in no situation"
        assert any(row.startswith(f"| `{kind}` |") for row in rows), f"{kind}: not in the table"


def test_every_page_on_a_policy_is_of_one():
    others = {"README", "schedules"}
    assert {page.stem for page in POLICIES.glob("*.md")} == {*TYPES, *others}
    drawn = {path.stem for path in (ROOT / "docs" / "images" / "policies").iterdir()}
    assert drawn == {*TYPES, "schedules"}


def test_every_warning_and_error_class_is_explained():
    """In docs/troubleshooting.md, by its first words; `messages` reads the code."""
    text = (ROOT / "docs" / "troubleshooting.md").read_text().replace("`", "")
    kinds = {name for name in gradclip.__all__ if name.endswith("Error")}
    assert not {kind for kind in kinds if kind not in text}
    warnings = [message.text for message in messages() if message.kind == "Warning"]
    assert len(warnings) > 15
    lost = []
    for warning in warnings:
        parts = [part.split() for part in warning.split(GAP)]
        runs = {" ".join(part[i : i + 5]) for part in parts for i in range(len(part) - 4)}
        if not any(run in text for run in runs):
            lost.append(warning)
    assert not lost
