"""The command `gradclip`: one function for each of its words."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from gradclip.errors import ConfigError
from gradclip.tools.outputs import refuse_input, refuse_lost_folder, refuse_other_than_png

try:
    import numpy  # noqa: F401
    import typer
except ImportError as error:
    sys.stderr.write(
        f"gradclip: {error.name} isn't installed, which the commands need. "
        "Install it: pip install 'gradclip[tools]'\n"
    )
    raise SystemExit(2) from None

__all__ = ["app", "main"]


def _examples(*commands: str) -> str:
    """What `--help` ends with."""
    return "\n".join(["Examples:\n", "```", *commands, "```"])


app = typer.Typer(
    help="See what gradient clipping did, and choose how to clip.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)


_TraceFile = Annotated[
    Path,
    typer.Argument(exists=True, dir_okay=False, help="A recorder's file, or one made by import."),
]
_StepRange = Annotated[str, typer.Option(help="Take steps from A up to but without B, as A:B.")]
_AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


@app.callback()
def _gradclip() -> None:
    """See what gradient clipping did, and choose how to clip."""


@app.command(
    "import",
    epilog=_examples(
        "gradclip import lightning_logs/version_0/metrics.csv",
        "gradclip import runs/first --out first.trace.jsonl",
        "gradclip import wandb_export.csv --norm-column 'run 7 - grad_norm'",
    ),
)
def import_(
    log: Annotated[
        Path,
        typer.Argument(
            exists=True,
            help="CSV, TensorBoard event file, trainer_state.json, W&B export or history, MLflow "
            "metrics, or a folder that holds one of them.",
        ),
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="The trace; .parquet writes Parquet.")
    ] = Path("trace.jsonl"),
    norm_column: Annotated[
        str | None, typer.Option(help="Column of the gradient norm before clipping.")
    ] = None,
    step_column: Annotated[str | None, typer.Option(help="Column of the optimizer step.")] = None,
    limit_column: Annotated[str | None, typer.Option(help="Column of the limit.")] = None,
    loss_column: Annotated[str | None, typer.Option(help="Column of the loss.")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the trace if it exists.")
    ] = False,
) -> None:
    """Make a trace from a log of gradient norms, of a run made with or without gradclip."""
    from gradclip.tools.imports import import_log
    from gradclip.tools.trace import write_trace

    if out.exists() and not overwrite:
        msg = f"{out} exists. Name another file with --out, or pass --overwrite."
        raise ConfigError(msg)
    found = import_log(
        log,
        norm_column=norm_column,
        step_column=step_column,
        limit_column=limit_column,
        loss_column=loss_column,
    )
    refuse_input(out, found.path)
    write_trace(out, found.header, found.rows())
    typer.echo(found.describe())
    typer.echo(f"Wrote {out}")


@app.command(
    epilog=_examples(
        "gradclip check configs/zclip.yaml",
        "gradclip check configs/*.yaml --json",
    )
)
def check(
    files: Annotated[
        list[Path],
        typer.Argument(
            exists=True,
            dir_okay=False,
            metavar="FILE",
            help="Configurations, LightningCLI files or Accelerate files.",
        ),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Validate YAML files of any of our kinds and show the settings in effect.

    Exits with 1 if a file is bad.
    """
    from gradclip.tools.check import check_file, describe_as_json, describe_as_yaml

    checked = [check_file(path) for path in files]
    typer.echo(describe_as_json(checked) if as_json else describe_as_yaml(checked), nl=False)
    faults = [file.fault for file in checked if file.fault]
    for fault in faults:
        typer.echo(fault, err=True)
    raise typer.Exit(1 if faults else 0)


@app.command(epilog=_examples("gradclip schema", "gradclip schema --out configs/schema.json"))
def schema(
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write it to this file.")] = None,
) -> None:
    """Print the JSON schema of configurations, which editors complete from."""
    from gradclip.config.schema import schema_text

    if out is None:
        typer.echo(schema_text(), nl=False)
    else:
        out.write_text(schema_text(), encoding="utf-8")
        typer.echo(f"Wrote {out}")


@app.command(
    epilog=_examples(
        "gradclip report run.trace.jsonl",
        "gradclip report lightning_logs/version_0 --out version_0.html",
        "gradclip report runs/first --json",
    )
)
def report(
    run: Annotated[
        Path,
        typer.Argument(
            exists=True,
            help="A trace, a folder whose newest trace is taken, or a log that import understands.",
        ),
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="The page; replaced if it exists.")
    ] = Path("report.html"),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Show what clipping did in a run, and which parameters made norms large or not finite.

    Prints a summary and writes one HTML page that works without a network. Exits with 1 if the run
    has no steps.
    """
    from rich.console import Console

    from gradclip.tools.progress import show_progress
    from gradclip.tools.report import open_run, summarize
    from gradclip.tools.show_report import describe_as_json, describe_as_text, write_report

    found = open_run(run)
    refuse_input(out, found.path)
    with show_progress(f"Reading {found.path.name}") as progress:
        summary = summarize(found, progress)
    if summary is None:
        typer.echo(f"{found.path} has no steps; nothing to report.", err=True)
        raise typer.Exit(1)
    write_report(summary, out)
    if as_json:
        typer.echo(describe_as_json(summary, out))
    else:
        Console().print(describe_as_text(summary))
        typer.echo(f"Wrote {out}")


@app.command(
    epilog=_examples(
        "gradclip replay run.trace.jsonl --config zclip.yaml --config fixed_norm.yaml",
        "gradclip replay run.trace.jsonl -c zclip.yaml --plot replay.png --html replay.html",
        "gradclip replay run.trace.jsonl -c zclip.yaml --steps 1000:2000 --json",
    )
)
def replay(
    trace: _TraceFile,
    config: Annotated[
        list[Path],
        typer.Option(
            "--config", "-c", exists=True, dir_okay=False, help="A configuration; may be repeated."
        ),
    ],
    plot: Annotated[
        Path | None, typer.Option(help="Draw norms and limits to this PNG file.")
    ] = None,
    html: Annotated[
        Path | None, typer.Option(help="Write a page that needs no network to this file.")
    ] = None,
    steps: _StepRange = ":",
    as_json: _AsJson = False,
) -> None:
    """Run configurations over the norms of a trace and compare them side by side.

    Each decides as it would have in training, on these norms, beginning with nothing learnt.
    """
    from rich.console import Console

    from gradclip.config import load_yaml
    from gradclip.tools.progress import show_progress
    from gradclip.tools.replay import name_files, parse_steps
    from gradclip.tools.replay import replay as replayed
    from gradclip.tools.show_replay import draw_replay, replay_as_json, replay_as_text
    from gradclip.tools.trace import Trace

    refuse_other_than_png(plot)
    for out in (plot, html):
        refuse_lost_folder(out)
        refuse_input(out, trace, *config)
    start, stop = parse_steps(steps)
    configs = {name: load_yaml(path) for name, path in name_files(config).items()}
    opened = Trace.open(trace)
    with show_progress(f"Replaying {trace.name}") as progress:
        found = replayed(opened, configs, start=start, stop=stop, progress=progress)
    draw_replay(found, trace.name, png=plot, html=html)
    if as_json:
        typer.echo(replay_as_json(found))
        return
    Console().print(replay_as_text(found))
    for path in filter(None, (plot, html)):
        typer.echo(f"Wrote {path}")


@app.command(
    epilog=_examples(
        "gradclip recommend run.trace.jsonl",
        "gradclip recommend run.trace.jsonl --clip-rate 0.1 --out clip.yaml",
        "gradclip recommend run.trace.jsonl --json",
    )
)
def recommend(
    trace: _TraceFile,
    clip_rate: Annotated[
        float, typer.Option(help="The share of steps to clip, above 0 and at most 0.5.")
    ] = 0.05,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Write the settings to take to this YAML file."),
    ] = None,
    steps: _StepRange = ":",
    quick: Annotated[
        bool,
        typer.Option("--quick", help="Only a fixed threshold and a percentile of recent norms."),
    ] = False,
    as_json: _AsJson = False,
) -> None:
    """Propose a threshold, and settings of adaptive policies, that clip a share of the steps.

    Says how sure it is and why, and prints YAML that is ready to paste.
    """
    from rich.console import Console

    from gradclip.tools.progress import show_progress
    from gradclip.tools.recommend import recommend as recommended
    from gradclip.tools.replay import parse_steps
    from gradclip.tools.show_replay import (
        recommendation_as_json,
        recommendation_as_text,
        recommendation_as_yaml,
    )
    from gradclip.tools.trace import Trace

    refuse_lost_folder(out)
    refuse_input(out, trace)
    start, stop = parse_steps(steps)
    opened = Trace.open(trace)
    with show_progress(f"Fitting to {trace.name}") as progress:
        found = recommended(
            opened, clip_rate, start=start, stop=stop, quick=quick, progress=progress
        )
    if out is not None:
        out.write_text(found.taken.yaml, encoding="utf-8")
    if as_json:
        typer.echo(recommendation_as_json(found))
        return
    Console().print(recommendation_as_text(found))
    typer.echo(f"\n{recommendation_as_yaml(found)}", nl=False)
    if out is not None:
        typer.echo(f"Wrote {out}")


def main(argv: Sequence[str] | None = None) -> None:
    """The console command. Exit code 0: fine, 1: a problem was found, 2: it was called wrongly.

    Args:
        argv: What follows `gradclip`; taken from the command line if None.
    """
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            app(None if argv is None else list(argv), prog_name="gradclip")
        except ConfigError as error:
            sys.stderr.write(f"gradclip: {error}\n")
            sys.exit(2)
        except OSError as error:
            named = f"{error.filename}: {error.strerror}" if error.filename else f"{error}"
            sys.stderr.write(f"gradclip: {named}\n")
            sys.exit(2)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    sys.stderr.write(f"gradclip: warning: {message}\n")


if __name__ == "__main__":
    main()
