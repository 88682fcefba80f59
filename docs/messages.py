"""Every error and warning of the code, read from its source: for the site, and for a test.

A message is an f-string, a concatenation, or what a function of the same file returns. What depends
on the run is shown as an ellipsis.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PACKAGES = ("gradclip", "lightning_clip", "accelerate_clip")
WARNINGS = {"warn", "warning", "_say", "_tell"}
GAP = "…"
Constants = Mapping[str, ast.expr]


class Message(NamedTuple):
    """One message: "Warning" or the class of the error, the file it stands in, and its text."""

    kind: str
    path: str
    text: str


def messages() -> Iterator[Message]:
    """All of them, in the order of files and lines."""
    classes = _tree("gradclip/errors.py").body
    errors = {node.name for node in classes if isinstance(node, ast.ClassDef)}
    for path in sorted(p for name in PACKAGES for p in (ROOT / name).rglob("*.py")):
        place = path.relative_to(ROOT).as_posix()
        tree = _tree(place)
        outside = _assigned(tree)
        for function in ast.walk(tree):
            # What `_say` and `_tell` say is found where they are called.
            if not isinstance(function, ast.FunctionDef) or function.name in WARNINGS:
                continue
            for node in _own(function):
                kind, given = _kind(node, errors)
                if given is None:
                    continue
                names = outside | _assigned(function, given.lineno)
                for text in _texts(given, names, tree):
                    # A message of gaps alone is told where it was made: by another function.
                    if len(re.findall(r"[a-zA-Z]{2,}", text)) >= 4:
                        text = re.sub(f"{GAP}+", GAP, " ".join(text.split()))
                        yield Message(kind, place, text)


def _tree(place: str) -> ast.Module:
    return ast.parse((ROOT / place).read_text("utf-8"))


def _own(function: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a function, without those of functions inside."""
    for node in ast.iter_child_nodes(function):
        if not isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node
            yield from _own(node)


def _assigned(where: ast.AST, before: float = math.inf) -> dict[str, ast.expr]:
    """What names of a function or module stand for before a line; of several values, the last."""
    return {
        ast.unparse(node.targets[0]): node.value
        for node in _own(where)
        if isinstance(node, ast.Assign) and node.lineno < before
    }


def _kind(node: ast.AST, errors: set[str]) -> tuple[str, ast.expr | None]:
    """What a node says, if it raises or warns."""
    if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
        name = ast.unparse(node.exc.func)
        if name in errors:
            return name, node.exc.args[0]
        if name == "ValueError":  # of a model's validator: a fault of the configuration
            return "ConfigError", node.exc.args[0]
    if isinstance(node, ast.Return) and isinstance(node.value, ast.Call) and node.value.args:
        name = ast.unparse(node.value.func)
        if name in errors:
            return name, node.value.args[0]
    if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in WARNINGS:
        return "Warning", node.args[-1 if "_say" in ast.unparse(node.func) else 0]
    return "", None


def _texts(node: ast.expr | None, names: Constants, tree: ast.Module) -> list[str]:
    """What an expression may say."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return [re.sub(r"%(\.\d)?[sdg]", GAP, node.value)]
    if isinstance(node, ast.JoinedStr):
        parts = (_texts(part, names, tree) for part in node.values)
        return ["".join(texts[0] if texts else GAP for texts in parts)]
    if isinstance(node, ast.BinOp):
        left, right = _texts(node.left, names, tree), _texts(node.right, names, tree)
        return [(left or [GAP])[0] + (right or [GAP])[0]]
    if isinstance(node, ast.Name) and node.id in names:
        return _texts(names[node.id], {k: v for k, v in names.items() if k != node.id}, tree)
    if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name):
        table = names.get(node.value.id)
        if isinstance(table, ast.Dict):
            return [text for value in table.values for text in _texts(value, names, tree)]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        for function in tree.body:
            if isinstance(function, ast.FunctionDef) and function.name == node.func.id:
                inside = _assigned(function)
                returned = [n.value for n in _own(function) if isinstance(n, ast.Return)]
                return [text for one in returned for text in _texts(one, inside, tree)]
    return []


if __name__ == "__main__":
    for message in messages():
        print(f"{message.kind:15} {message.path}: {message.text}")
