"""Run a stated part of the tests with old, middle and new versions of what gradclip builds on.

    make test-versions                              every set; 5 GB each, and minutes of tests
    python tests/versions.py lowest                 one of them, into build/versions
    python tests/versions.py newest --fresh         in a new environment, with what is newest now

An environment that was made from the same requirements is used again. The table in
docs/versions.md is written from what passed. Each set needs its Python on PATH (python3.10,
python3.12, python3.13) or in pyenv.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/versions.md"
MARKS = ("<!-- table -->", "<!-- end of table -->")
TESTED = ("torch", "lightning", "accelerate", "transformers", "deepspeed", "pydantic")
TOOLS = ("numpy", "pytest", "hypothesis", "pytest-xdist", "typer", "rich", "tensorboard", "wheel")
SETS = {
    "lowest": (
        "python3.10",
        ["torch==2.6.0", "lightning==2.4.0", "accelerate==1.1.0", "transformers==4.56.0",
         "deepspeed==0.16.0", "pydantic==2.7.4", "PyYAML==6.0.1",
         "jsonargparse[signatures]>=4.27.7,<4.41", "numpy<2"],
    ),
    "middle": (
        "python3.12",
        ["torch==2.8.0", "lightning==2.5.0", "accelerate==1.6.0", "transformers==4.56.2",
         "deepspeed==0.17.0", "pydantic==2.10.6", "PyYAML", "jsonargparse[signatures]"],
    ),
    "newest": (
        "python3.13",
        ["torch", "lightning!=2.6.2,!=2.6.3", "accelerate", "transformers", "deepspeed",
         "pydantic", "PyYAML", "jsonargparse[signatures]"],
    ),
}  # fmt: skip
"""Name: the interpreter and the requirements."""

PART = (
    "engine/test_kernels.py",
    "engine/test_fold.py",
    "layouts/test_torch_names.py",
    "layouts/test_ranks.py",
    "with_lightning/test_framework.py",
    "with_accelerate/test_private.py",
    "with_accelerate/test_clipper.py",
)
"""What says most: kernels, fused steps, private names, DDP and FSDP2 on ranks, both adapters."""
LEFT_OUT = (
    "layouts/test_torch_names.py::test_torch_is_the_version_that_was_read",
    "engine/test_kernels.py::test_a_hundred_million_elements",
)
"""A reminder for developers of one version; and minutes of arithmetic that no version changes."""


def interpreter(name: str) -> str:
    """Where a Python is, on PATH or among pyenv's versions.

    Raises:
        SystemExit: If it is nowhere.
    """
    version = name.removeprefix("python")
    homes = sorted((Path.home() / ".pyenv/versions").glob(f"{version}.*/bin/{name}"))
    if found := ([str(home) for home in homes] or [shutil.which(name)])[-1]:
        return found
    sys.exit(f"{name} is neither in pyenv nor on PATH; install it, or leave its set out.")


def make(name: str, folder: Path, *, fresh: bool) -> None:
    """An environment with a set's versions, unless one made from the same requirements is there."""
    python, packages = SETS[name]
    made_from, wanted = folder / "made_from.txt", "\n".join([python, *packages, *TOOLS])
    if not fresh and made_from.exists() and made_from.read_text(encoding="utf-8") == wanted:
        return
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([interpreter(python), "-m", "venv", str(folder)], check=True)
    pip = [str(folder / "bin/pip"), "install", "--quiet", "--no-cache-dir"]
    engine = [package for package in packages if package.startswith("deepspeed")]
    rest = [package for package in packages if package not in engine]
    subprocess.run([*pip, "setuptools<81", *rest, *TOOLS], check=True)
    # DeepSpeed's set-up imports torch. Where triton is installed without a GPU, it fails to import.
    built = {**os.environ, "DS_BUILD_OPS": "0"}
    subprocess.run([*pip, "--no-build-isolation", *engine], check=True, env=built)
    subprocess.run([*pip[:1], "uninstall", "--quiet", "--yes", "triton"], check=True)
    made_from.write_text(wanted, encoding="utf-8")


def versions(folder: Path) -> dict[str, str]:
    """What is installed there, by name."""
    names = ", ".join(map(repr, TESTED))
    code = (
        "import importlib.metadata as m, json, platform; "
        f"print(json.dumps({{'python': platform.python_version(), "
        f"**{{n: m.version(n) for n in ({names})}}}}))"
    )
    ran = subprocess.run(
        [str(folder / "bin/python"), "-c", code], check=True, capture_output=True, text=True
    )
    return dict(json.loads(ran.stdout))


def test(folder: Path) -> dict[str, str]:
    """Run the part, each file by itself.

    Returns:
        By file "passed 12, skipped 1", or what failed too.
    """
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    left_out = [option for test in LEFT_OUT for option in ("--deselect", f"tests/{test}")]
    found: dict[str, str] = {}
    for file in PART:
        report = folder / "report.xml"
        report.unlink(missing_ok=True)
        command = [str(folder / "bin/python"), "-m", "pytest", "-n", "0", "-p", "no:cacheprovider"]
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run(
                [*command, f"--junit-xml={report}", *left_out, f"tests/{file}"],
                check=False, cwd=ROOT, env=environment, timeout=1200,
            )  # fmt: skip
        found[file] = outcome(report)
    return found


def outcome(report: Path) -> str:
    """How many passed, failed and were skipped, of a JUnit file."""
    if not report.exists():
        return "didn't run"
    cases = list(ET.parse(report).getroot().iter("testcase"))
    failed = sum(
        any(case.find(kind) is not None for kind in ("failure", "error")) for case in cases
    )
    skipped = sum(case.find("skipped") is not None for case in cases)
    counts = {"passed": len(cases) - failed - skipped, "failed": failed, "skipped": skipped}
    return ", ".join(f"{kind} {n}" for kind, n in counts.items() if n) or "ran no test"


def write(results: dict[str, dict[str, str]]) -> None:
    """Put the table into the page; a set that didn't run keeps its column."""
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(MARKS[0])
    old, after = rest.split(MARKS[1])
    known = read(old) | results
    rows = ["python", *TESTED, *(f"`tests/{file}`" for file in PART), "run on"]
    names = [name for name in SETS if name in known]
    lines = [f"| | {' | '.join(names)} |", "|---|" + "---|" * len(names)]
    lines += [
        f"| {row} | {' | '.join(known[name].get(row, '') for name in names)} |" for row in rows
    ]
    table = "\n".join(lines)
    PAGE.write_text(f"{before}{MARKS[0]}\n{table}\n{MARKS[1]}{after}", encoding="utf-8")


def read(table: str) -> dict[str, dict[str, str]]:
    """The columns of a table that was written, by set."""
    lines = [line for line in table.splitlines() if re.match(r"\|(?!-)", line)]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    if not rows:
        return {}
    return {name: {row[0]: row[i] for row in rows[1:]} for i, name in enumerate(rows[0]) if i}


def main() -> None:
    """Make the environments, run the part, write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sets", nargs="*", default=list(SETS), help=", ".join(SETS))
    parser.add_argument("--folder", type=Path, default=ROOT / "build/versions")
    parser.add_argument("--fresh", action="store_true", help="make each environment anew")
    given = parser.parse_args()
    failed = False
    for name in given.sets:
        folder = (given.folder / name).absolute()
        make(name, folder, fresh=given.fresh)
        outcomes = test(folder)
        failed |= any("passed" not in text or "failed" in text for text in outcomes.values())
        files = {f"`tests/{file}`": text for file, text in outcomes.items()}
        today = datetime.date.today().isoformat()
        write({name: {**versions(folder), **files, "run on": today}})
    sys.exit(failed)


if __name__ == "__main__":
    main()
