"""Tables and a picture of what was measured, into the pages that show them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from benchmarks.speed.rows import ROOT, Point, Results, Row

PICTURE = ROOT / "docs" / "images" / "speed.png"
BEGIN, END = "<!-- results -->", "<!-- end of results -->"
PARTS = {
    "loops": "Training loops",
    "steps": "One clipping step",
    "ranks": "Two ranks",
    "once": "Paid once, and commands",
    "options": "Options",
}
"""Parts of the main table, in their order."""
BOUNDS: Mapping[str, str] = {
    "Trainer.fit": "the host's work for a step that torch's option doesn't do: a record, the check "
    "that every step was clipped once, and entries for the logger",
    "plain loop": "the host's work for a step: a record, and the policy's decision",
    "Accelerate loop": "the host's work for a step: a record, and the check that every step was "
    "clipped once",
    "transformers' Trainer": "the host's work for a step: a record, and entries for the logs",
    "zclip, GPT-2": "memory: both read all gradients once",
    "zclip, 2000": "one visit of each tensor in Python, and the copy into a buffer",
    "autoclip": "memory: a step can't be shorter than one read of all gradients",
    "agc": "one norm for each row of each tensor, of weights and of gradients",
    "GPT-2 small, float32, not": "memory: one read of all gradients",
    "GPT-2 small, float32, norm": "kernels of a few bytes each, which decide and write the record",
    "GPT-2 small, float32, clipped": "memory: one read for the norm, one read and one write to "
    "scale, as in torch",
    "GPT-2 small, bfloat16": "the conversion to float32 for an exact norm; torch rounds its norm "
    "to bfloat16",
    "2000 x 64": "one visit of each tensor in Python, and one call for each to scale it",
    "LoRA": "two calls for each tensor of 32 768 values: too large to be copied together, too "
    "small to be read as fast as memory gives them; torch's own norm of one is less exact",
    "10 000 x 64": "one visit of each tensor in Python, and one call for each to scale it",
    "20 x 64": "kernels that decide and that write the record; torch has neither",
    "FSDP2": "the message between ranks, which both send, and one visit of each tensor",
    "first step": "what is looked up once for each parameter: its name, group, layout and size",
    "import": "modules that define configurations and policies",
    "replay": "one decision after another: each depends on the state that the last one left",
    "ten policies": "one decision for each policy",
    "recorder": "one read of the rows on the host for each entry",
}
"""What bounds an aim, by how the row begins; said where the aim is missed."""


def number(value: float | None) -> str:
    """Three places that count."""
    if value is None:
        return ""
    if value >= 1000:
        return f"{value:,.0f}".replace(",", " ")
    text = f"{value:.3g}"
    return f"{float(text):g}"


def line(cells: Iterable[str]) -> str:
    """Of a table."""
    return f"| {' | '.join(cells)} |"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], words: int) -> str:
    """In Markdown; so many columns of words come before those of numbers."""
    rule = ["---"] * words + ["---:"] * (len(heads) - words)
    return "\n".join([line(heads), line(rule), *map(line, rows)])


def aim_of(row: Row) -> str:
    """The aim, and whether it is missed."""
    if row.aim is None:
        return ""
    shown = f"{row.aim:.2f}" if row.ratio is not None else f"{number(row.aim)} {row.unit}"
    return shown if row.reached else f"{shown}, missed"


def ratio_of(row: Row) -> str:
    return "" if row.ratio is None else f"{row.ratio:.2f}"


def interval_of(row: Row) -> str:
    if row.low is None or row.high is None:
        return ""
    return f"{row.low:.2f} to {row.high:.2f}"


def main_table(rows: Sequence[Row]) -> str:
    """Every row of these parts."""
    heads = ("what", "compared with", "ours", "theirs", "ratio", "95 % interval", "aim")
    cells = []
    for part, title in PARTS.items():
        held = [row for row in rows if row.part == part]
        cells += [[f"**{title}**", *[""] * 7]] if held else []
        for row in held:
            theirs = "" if row.theirs is None else f"{number(row.theirs)} {row.unit}"
            bandwidth = "" if row.bandwidth is None else f"{100 * row.bandwidth:.0f} %"
            numbers = (ratio_of(row), interval_of(row), aim_of(row), bandwidth)
            ours = f"{number(row.ours)} {row.unit}"
            cells.append([row.what, row.peer or "nothing", ours, theirs, *numbers])
    return table((*heads, "of read bandwidth"), cells, 2)


def pivot(rows: Sequence[Row], part: str) -> str:
    """One line for what is clipped, one column for each unit: ours, and torch's."""
    held = [row for row in rows if row.part == part]
    if not held:
        return ""
    whats, units = (
        list(dict.fromkeys(c)) for c in zip(*((r.what, r.unit) for r in held), strict=True)
    )
    found = {(row.what, row.unit): row for row in held}

    def cell(what: str, unit: str) -> str:
        row = found.get((what, unit))
        if row is None:
            return ""
        return (
            number(row.ours) if row.theirs is None else f"{number(row.ours)}, {number(row.theirs)}"
        )

    return table(("", *units), ([what, *(cell(what, unit) for unit in units)] for what in whats), 1)


def name_of(row: Row) -> str:
    """What was measured; of what is counted, also which number."""
    return f"{row.what}: {row.unit}" if row.part == "counted" else row.what


def found_of(row: Row) -> str:
    """What its aim is about."""
    return ratio_of(row) or f"{number(row.ours)} {row.unit}"


def measured_of(row: Row) -> str:
    """The same, with its share of the read bandwidth where that may bound it."""
    if row.bandwidth is None:
        return found_of(row)
    return f"{found_of(row)}, at {100 * row.bandwidth:.0f} % of the read bandwidth"


def aims_table(rows: Sequence[Row]) -> str:
    """The rows with an aim."""
    heads = ("what", "compared with", "ratio", "95 % interval", "aim")
    cells = []
    for row in rows:
        if row.aim is not None and row.part != "memory":
            numbers = (found_of(row), interval_of(row), aim_of(row))
            cells.append([name_of(row), row.peer or "nothing", *numbers])
    return table(heads, cells, 2)


def bound_of(row: Row) -> str:
    """What bounds a row with an aim."""
    return next(text for start, text in BOUNDS.items() if row.what.startswith(start))


def missed(rows: Sequence[Row]) -> str:
    """What bounds each aim that is missed."""
    lines: dict[str, list[str]] = {}
    for row in rows:
        if row.reached is False and row.part != "memory":
            lines.setdefault(bound_of(row), []).append(f"{name_of(row)} ({measured_of(row)})")
    if not lines:
        return "Every aim is reached."
    return "\n".join(f"- {'; '.join(names)}: {bound}." for bound, names in lines.items())


def memory(rows: Sequence[Row]) -> str:
    """One sentence and a table."""
    held = [row for row in rows if row.part == "memory"]
    cells = ([r.what, number(r.ours), number(r.theirs), aim_of(r)] for r in held)
    return table(("gradients", "ours, KiB", "torch, KiB", "allowed"), cells, 1)


def measured_on(results: Results) -> str:
    """The machine and the versions, in two sentences."""
    machine = results.machine
    versions = machine.get("versions", {})
    there = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    gone = ", ".join(name for name, version in versions.items() if not version)
    words = (
        f"Measured on {machine.get('processor')}, {machine.get('threads')} threads, which read "
        f"{machine.get('read GB/s')} GB/s from memory, with {there}."
    )
    if gone:
        words += f" Not installed, so not compared: {gone}."
    codes = {found.code for found in results.cases.values()}
    if len(codes) > 1:
        words += " Some rows come from an earlier version of the code."
    return words


def model(rows: Sequence[Row]) -> str:
    """The H100, modelled."""
    check = [row for row in rows if row.what.startswith("check: ")]
    told = ""
    if check and check[0].theirs:
        modelled, real = check[0].ours / 1e3, check[0].theirs / 1e3
        told = (
            "Check: for a norm and scaling of 1.54 G bfloat16 values the model says "
            f"{modelled:.1f} ms. Others measured {real:.1f} ms on an H100, so those kernels reach "
            f"{100 * modelled / real:.0f} % of what the model assumes. Take its times as lower "
            "bounds, and compare them with one another only.\n\n"
        )
    return told + pivot([row for row in rows if row not in check], "model")


def tables(results: Results) -> str:
    """Everything, for benchmarks/README.md."""
    rows = results.rows
    if not rows:
        return UNMEASURED
    parts: list[tuple[str, str, Callable[[Sequence[Row]], str]]] = [
        ("loops steps ranks once options", "Times", main_table),
        ("counted", "Counted", lambda held: COUNTED + pivot(held, "counted")),
        ("memory", "Memory", memory),
        ("model", "An H100, modelled", lambda held: MODEL + model(held)),
        ("grid", "One rank of many", lambda held: GRID + pivot(held, "grid")),
    ]
    shown = [measured_on(results)]
    for names, title, make in parts:
        held = [row for row in rows if row.part in names.split()]
        if held:
            shown.append(f"### {title}\n\n{make(held)}")
    return "\n\n".join(shown)


UNMEASURED = "Not measured yet: run `python -m benchmarks.speed`."
COUNTED = """Ours, then torch's. Host microseconds are those of a step on as many tensors
of one value each, on one thread of the CPU. The rest is counted on fake CUDA tensors.

"""
MODEL = """Not measured: each launch costs 4 microseconds, and bytes move at the 3.35 TB/s
of the data sheet. Ours, then torch's.

"""
GRID = """A 70 B transformer under FSDP2 x tensor parallelism, as one rank sees it.

"""


def page(results: Results) -> str:
    """The main rows, for docs/performance.md."""
    rows = results.rows
    if not rows:
        return UNMEASURED
    return "\n\n".join(
        [
            measured_on(results),
            aims_table(rows),
            "## Aims that are missed\n\nWhat bounds each of them:",
            missed(rows),
        ]
    )


COSTS = {
    "GPT-2 small (148 tensors, 124 M values), float32": "GPT-2 small, float32",
    "2000 small tensors, float32": "2000 x 64",
    "288 small tensors under `fully_shard`, two ranks": "FSDP2, 288 tensors, width 64",
    "GPT-2 small, bfloat16": "GPT-2 small, bfloat16",
    "400 LoRA matrices of rank 8, float32": "LoRA, 400 of rank 8",
}
"""Single steps that the first page shows, by the names of rows."""
LOOPS = {f"`{name}`": name for name in ("norm", "zclip", "auto")}


def costs(results: Results) -> str:
    """What a step costs beside torch's, for README.md."""
    rows = results.rows
    found = {row.what: ratio_of(row) for row in rows if row.peer == "torch" or row.part == "loops"}

    def shown(title: str, names: Mapping[str, str], columns: Mapping[str, str]) -> str:
        cells = (
            [words, *(found.get(f"{name}, {c}", "") for c in columns.values())]
            for words, name in names.items()
        )
        return table((title, *columns), cells, 1)

    clips = {"nothing is clipped": "not clipped", "something is clipped": "clipped"}
    titles = {t: t for t in (row.what.rpartition(", ")[0] for row in rows if row.part == "loops")}
    steps = shown("one clipping step on", COSTS, clips)
    loops = shown("a whole training step of a small MLP", titles, LOOPS)
    return f"{steps}\n\n{loops}"


def grid(results: Results) -> str:
    """One rank of a large job, for docs/layouts.md."""
    return pivot(results.rows, "grid") or UNMEASURED


AXES = {
    "tensors": ("tensors of 64 values", "ms a step"),
    "megabytes": ("MB of gradients in 16 tensors", "ms a step"),
    "steps": ("steps taken before", "ms a step"),
    "ranks": ("ranks of FSDP2", "bytes that one rank sends"),
}
COLORS = {"gradclip": "C0", "gradclip, autoclip": "C0", "torch": "C1", "torch, a fixed norm": "C1"}


def draw(points: Sequence[Point], path: Path) -> None:
    """One panel for what grows, one line for who clips."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, len(AXES), figsize=(4 * len(AXES), 3.6))
    for panel, (axis, (x_label, y_label)) in zip(panels, AXES.items(), strict=True):
        held = [point for point in points if point.axis == axis]
        for name in dict.fromkeys(point.line for point in held):
            own = [(point.x, point.y) for point in held if point.line == name]
            panel.plot(
                *zip(*own, strict=True), "o-", ms=3, label=name, color=COLORS.get(name, "C2")
            )
        panel.set(xlabel=x_label, ylabel=y_label, xscale="log", yscale="log")
        if axis == "ranks":
            panel.set(yscale="linear", ylim=(0, None))
        panel.grid(alpha=0.3)
        if held:
            panel.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=100, metadata={"Software": None})
    plt.close(figure)


def between(path: Path, text: str) -> str:
    """The page with this text between its markers."""
    before, rest = path.read_text(encoding="utf-8").split(BEGIN)
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.split(END)[1]}"


PAGES: Mapping[Path, Callable[[Results], str]] = {
    ROOT / "README.md": costs,
    ROOT / "benchmarks" / "README.md": tables,
    ROOT / "docs" / "performance.md": page,
    ROOT / "docs" / "layouts.md": grid,
}
"""What is written into each page, between its markers."""


def write_all(results: Results) -> list[Path]:
    """Write the pages and the picture; returns their paths."""
    for path, make in PAGES.items():
        path.write_text(between(path, make(results)), encoding="utf-8")
    draw(results.points, PICTURE)
    return [*PAGES, PICTURE]
