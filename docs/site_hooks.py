"""What the site holds beside the pages in docs/: pages from other folders, and pages made here.

mkdocs calls the functions `on_*` while it builds; see mkdocs.yml. Nothing of gradclip is imported:
settings come from gradclip/presets/schema.json, which a test compares with the models, and the
names of the API from `__all__`.
"""

from __future__ import annotations

import ast
import html
import json
import posixpath
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

sys.path.insert(0, str(Path(__file__).parent))  # mkdocs loads this file alone
from messages import GAP, messages

ROOT = Path(__file__).parents[1]
BROUGHT = {
    "configs/README.md": "configs.md",
    "examples/README.md": "examples.md",
    "benchmarks/README.md": "benchmarks.md",
    "benchmarks/outcome/README.md": "outcome.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changes.md",
}
"""Pages of other folders, and what they are called in the site."""

API = {
    "gradclip": "gradclip",
    "adapters": "gradclip.adapters",
    "testing": "gradclip.testing",
    "lightning_clip": "lightning_clip",
    "accelerate_clip": "accelerate_clip",
}
"""Pages of the API reference, and the module of each."""

ROOMS = {
    "gradclip/config": "Configuration",
    "gradclip/models.py": "Configuration",
    "gradclip/policies": "Policies",
    "gradclip/plan": "Parameters and groups",
    "gradclip/layouts": "Layouts and ranks",
    "gradclip/saved.py": "Saved state",
    "gradclip/state.py": "Saved state",
    "gradclip/records": "Logs and flight records",
    "gradclip/tools": "Commands",
    "gradclip/": "A clipping step",
    "lightning_clip": "Lightning and Fabric",
    "accelerate_clip": "Accelerate and transformers",
}
"""Where a message comes from, by the first path that fits."""

_LINK = re.compile(r"(!?\[)([^\]]*)\]\(([^)#\s]*)(#[^)\s]*)?\)")
_CODE = re.compile(r"^( *)```.*?^\1```$", re.DOTALL | re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that aren't in docs/, and the configuration files that pages link to."""
    for source, name in BROUGHT.items():
        files.append(File.generated(config, name, content=(ROOT / source).read_text("utf-8")))
    presets = (ROOT / "gradclip" / "presets").rglob("*.[yj]*")
    for path in sorted([*(ROOT / "configs").rglob("*.[yj]*"), *presets]):
        name = path.relative_to(ROOT).as_posix()
        files.append(File.generated(config, name, abs_src_path=str(path)))
    files.append(File.generated(config, "settings.md", content=settings_page()))
    files.append(File.generated(config, "messages.md", content=messages_page()))
    for name, module in API.items():
        files.append(File.generated(config, f"api/{name}.md", content=api_page(module)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Point links at the site's pages; what the site doesn't hold becomes plain text."""
    name = page.file.src_uri
    if name in ("settings.md", "messages.md", *(f"api/{own}.md" for own in API)):
        return markdown
    source = {own: path for path, own in BROUGHT.items()}.get(name, f"docs/{name}")
    code = [found.span() for found in _CODE.finditer(markdown)]

    def moved(found: re.Match[str]) -> str:
        inside = any(start <= found.start() < end for start, end in code)
        opening, text, target, anchor = found[1], found[2], found[3], found[4] or ""
        if inside or not target or "://" in target:
            return found[0]
        place = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        there = _in_site(place, anchor)
        if there is None:
            return text
        return f"{opening}{text}]({posixpath.relpath(there, posixpath.dirname(name))}{anchor})"

    return _LINK.sub(moved, markdown)


def _in_site(place: str, anchor: str) -> str | None:
    """Where the site holds a file of the repository."""
    if place == "README.md":
        return "start.md" if anchor else "index.md"
    if place.startswith("docs/"):
        return place.removeprefix("docs/")
    if place.startswith("configs/") and (ROOT / place).is_file() and place not in BROUGHT:
        return place
    return BROUGHT.get(place)


def settings_page() -> str:
    """Every setting of a configuration, from the schema."""
    schema = json.loads((ROOT / "gradclip" / "presets" / "schema.json").read_text("utf-8"))
    parts = [
        "# Every setting",
        "Made from the [schema](gradclip/presets/schema.json), which editors complete YAML from. "
        "[Configuration](configuration.md) explains how settings work together.",
        "## The configuration",
        *_settings(schema),
    ]
    models = schema["$defs"]
    names = sorted(models, key=lambda name: ("type" in models[name]["properties"], name.lower()))
    for name in names:
        kind = models[name]["properties"].get("type", {}).get("const")
        page = f" Its page: [{kind}](policies/{kind}.md)." if kind else ""
        title = f"`{kind}`: {name}" if kind else f"`{name}`"
        parts += [f"## {title}", *_settings(models[name], page)]
    return "\n\n".join(parts) + "\n"


def _settings(model: dict[str, Any], page: str = "") -> Iterator[str]:
    first, *_ = model.get("description", "").split("\n\n")
    yield " ".join(first.split()) + page
    required = model.get("required", ())
    rows = ["| key | value | default | meaning |", "|---|---|---|---|"]
    for name, field in model["properties"].items():
        default = "required" if name in required else f"`{json.dumps(field.get('default'))}`"
        text = " ".join(field.get("description", "").split())
        cells = (f"`{name}`", _values(field), default, text)
        rows.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
    yield "\n".join(rows)


def _values(field: dict[str, Any]) -> str:
    """What a field may hold, in words."""
    if "$ref" in field:
        name = field["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    for several in ("anyOf", "oneOf"):
        if several in field:
            if len(field[several]) > 4:
                return "a policy"
            return ", or ".join(_values(one) for one in field[several])
    if "const" in field:
        return f"`{field['const']}`"
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    if field.get("type") == "array":
        return f"list of {_values(field['items'])}"
    words = {"integer": "whole number", "boolean": "true or false", "string": "text"}
    kind = field.get("type", "any")
    signs = (
        ("exclusiveMinimum", ">"), ("minimum", ">="), ("exclusiveMaximum", "<"), ("maximum", "<=")
    )  # fmt: skip
    bounds = " and ".join(f"{sign} {field[key]:g}" for key, sign in signs if key in field)
    return f"{words.get(kind, kind)} {bounds}".strip()


def messages_page() -> str:
    """Every message, by class and by where it comes from."""
    rooms: dict[tuple[str, str], list[str]] = {}
    for message in messages():
        room = next(title for start, title in ROOMS.items() if message.path.startswith(start))
        rooms.setdefault((message.kind, room), []).append(message.text)
    parts = [
        "# Every message",
        "All errors and warnings, made from the code. A message says where, what was found, what "
        f"is allowed and how to fix it; {GAP} stands for what depends on your run. "
        "[Troubleshooting](troubleshooting.md) explains the frequent ones.",
    ]
    kinds = sorted({kind for kind, _ in rooms}, key=lambda kind: (kind != "Warning", kind))
    for kind in kinds:
        parts.append(f"## {'Warnings' if kind == 'Warning' else f'`{kind}`'}")
        for room in dict.fromkeys(ROOMS.values()):
            if texts := rooms.get((kind, room)):
                items = "".join(f"<li>{html.escape(text)}</li>" for text in texts)
                parts += [f"### {room}", f"<ul>{items}</ul>"]
    return "\n\n".join(parts) + "\n"


def api_page(module: str) -> str:
    """A page with every public name of a module, from the docstrings."""
    path = ROOT / module.replace(".", "/")
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    tree = ast.parse(path.read_text("utf-8"))
    (names,) = (
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    )
    homes = {
        alias.name: node.module or module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    rooms: dict[str, list[str]] = {}
    for name in sorted(names, key=str.lower):
        rooms.setdefault(homes.get(name, module), []).append(name)
    parts = [f"# `{module}`", (ast.get_docstring(tree) or "").split("\n\n")[0]]
    for room in sorted(rooms, key=lambda room: (room != module, room)):
        parts.append(f"## {room.rpartition('.')[2].capitalize()}")
        parts += [f"::: {module}.{name}" for name in rooms[room]]
    return "\n\n".join(parts) + "\n"
