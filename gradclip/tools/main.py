"""The command `gradclip`: a function for each subcommand."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from gradclip import __version__
from gradclip.config import as_config
from gradclip.config.presets import preset_text, presets
from gradclip.config.schema import schema_text
from gradclip.errors import ConfigError, escaped
from gradclip.models import nearest

try:
    import typer
    from rich.console import Console
    from rich.progress import Progress

    from gradclip.tools import check as checks
    from gradclip.tools import doctor as doctors
    from gradclip.tools import lint as lints
    from gradclip.tools import show_replay, show_report
    from gradclip.tools.imports import import_log
    from gradclip.tools.plain import as_markup, echo, show
    from gradclip.tools.recommend import recommend as propose
    from gradclip.tools.replay import replay as run_replay
    from gradclip.tools.report import summarize
    from gradclip.tools.run import open_run
    from gradclip.tools.trace import write_trace
except ModuleNotFoundError as error:
    sys.stderr.write(
        f"gradclip: {error.name} isn't installed, which the commands need. "
        "Install it: pip install 'gradclip[tools]'\n"
    )
    raise SystemExit(2) from None

__all__ = ["app", "main"]


def _examples(*commands: str) -> str:
    """The end of `--help`."""
    return "\n".join(["Examples:\n", "```", *commands, "```"])


app = typer.Typer(
    help="See what gradient clipping did, and choose how to clip.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)


_RunFile = Annotated[
    Path,
    typer.Argument(
        exists=True,
        help="A trace (a flight record, or made by import), a log that import understands, or a "
        "folder with one.",
    ),
]
_Limit = Annotated[
    float | None, typer.Option(help="The limit of all steps, if the log doesn't hold it.")
]
_Page = typer.Option("--out", "-o", help="The page, which needs no network; replaced if it exists.")
_Plot = Annotated[Path | None, typer.Option(help="Draw norms and limits to this PNG file.")]
_StepRange = Annotated[str, typer.Option(help="Take steps from A up to but without B, as A:B.")]
_AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


def _show_version(wanted: bool) -> None:
    if wanted:
        echo(f"gradclip {__version__}")
        raise typer.Exit


@app.callback()
def _gradclip(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """See what gradient clipping did, and choose how to clip."""
    del version


@app.command(
    "import",
    epilog=_examples(
        "gradclip import lightning_logs/version_0/metrics.csv",
        "gradclip import runs/first --out first.trace.jsonl",
        "gradclip import wandb_export.csv --norm-column 'run 7 - grad_norm'",
        "gradclip import slurm-123.out --limit 1.0",
    ),
)
def import_(
    log: Annotated[
        Path,
        typer.Argument(
            exists=True,
            help="CSV, JSON, JSON Lines, trainer_state.json, TensorBoard event file, W&B export or "
            "history, MLflow metrics, console output, or a folder that holds one of them.",
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
    limit: _Limit = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the trace if it exists.")
    ] = False,
) -> None:
    """Make a trace from a log of gradient norms, of a run made with or without gradclip."""
    if out.exists() and not overwrite:
        msg = f"{out} exists. Name another file with --out, or pass --overwrite."
        raise ConfigError(msg)
    found = import_log(
        log,
        norm_column=norm_column,
        step_column=step_column,
        limit_column=limit_column,
        loss_column=loss_column,
        limit=limit,
    )
    _refuse_input(out, found.path)
    write_trace(out, found.header, found.rows())
    echo(found.describe())
    echo(f"Wrote {out}")


@app.command(
    epilog=_examples(
        "gradclip check clip.yaml",
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
    as_json: _AsJson = False,
) -> None:
    """Validate YAML files of gradclip, LightningCLI or Accelerate; show the settings in effect.

    Exits with 1 if a file is wrong.
    """
    checked = [checks.check_file(path) for path in files]
    describe = checks.describe_as_json if as_json else checks.describe_as_yaml
    echo(describe(checked), nl=False)
    faults = [file.fault for file in checked if file.fault]
    for fault in faults:
        echo(fault, err=True)
    raise typer.Exit(1 if faults else 0)


@app.command("presets", epilog=_examples("gradclip presets", "gradclip presets zclip > clip.yaml"))
def list_presets(
    name: Annotated[
        str | None, typer.Argument(help="Print this preset as a file to copy and change.")
    ] = None,
) -> None:
    """List the configurations that come with gradclip, which their names stand for.

    GradientClip("zclip"), enable(accelerator, "zclip") and "policy: zclip" take them.
    """
    known = presets()
    if name is None:
        width = max(map(len, known))
        for preset, line in known.items():
            echo(f"{preset:{width}}  {line}")
    elif name in known:
        echo(preset_text(name), nl=False)
    else:
        msg = f"{name} is no preset; {nearest(name, list(known))}"
        raise ConfigError(msg)


@app.command(epilog=_examples("gradclip schema", "gradclip schema --out schema.json"))
def schema(
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write it to this file.")] = None,
) -> None:
    """Print the JSON schema of configurations, which editors complete from."""
    if out is None:
        echo(schema_text(), nl=False)
    else:
        out.write_text(schema_text(), encoding="utf-8")
        echo(f"Wrote {out}")


@app.command(
    epilog=_examples(
        "gradclip report run.trace.jsonl",
        "gradclip report lightning_logs/version_0 --out version_0.html",
        "gradclip report trainer_output --limit 1.0 --steps 1000:",
    )
)
def report(
    run: _RunFile,
    out: Annotated[Path, _Page] = Path("report.html"),
    plot: _Plot = None,
    steps: _StepRange = ":",
    limit: _Limit = None,
    as_json: _AsJson = False,
) -> None:
    """Show what clipping did in a run, and which parameters made norms large or not finite.

    Prints a summary and writes one HTML page. Exits with 1 if the run has no steps.
    """
    _refuse_other_picture(plot)
    start, stop = _parse_steps(steps)
    found = open_run(run, limit=limit, start=start, stop=stop)
    _refuse_lost_folder(plot)
    for path in (out, plot):
        _refuse_input(path, found.path)
    with _progress(f"Reading {found.path.name}") as progress:
        summary = summarize(found, progress)
    if summary is None:
        echo(f"{found.path} has no steps; nothing to report.", err=True)
        raise typer.Exit(1)
    show_report.write_report(summary, out, plot)
    if as_json:
        echo(show_report.describe_as_json(summary, out))
        return
    show(show_report.describe_as_text(summary))
    for path in filter(None, (out, plot)):
        echo(f"Wrote {path}")


@app.command(
    epilog=_examples(
        "gradclip lint run.trace.jsonl",
        "gradclip lint trainer_output --limit 1.0",
        "gradclip lint slurm-123.out --limit 1.0 --json",
    )
)
def lint(
    run: _RunFile,
    steps: _StepRange = ":",
    limit: _Limit = None,
    as_json: _AsJson = False,
) -> None:
    """Find what is wrong with how a run was clipped, with the line to change.

    Looks for a limit that never or always binds, steps that aren't finite, norms that leave their
    level, and spikes that linger. Exits with 1 if there is one of them.
    """
    start, stop = _parse_steps(steps)
    opened = open_run(run, limit=limit, start=start, stop=stop)
    with _progress(f"Reading {opened.path.name}") as progress:
        found = lints.lint(opened, progress)
    echo(lints.lint_as_json(found) if as_json else lints.lint_as_text(found))
    raise typer.Exit(1 if found.findings else 0)


@app.command(
    epilog=_examples(
        "gradclip replay run.trace.jsonl --config zclip --config fixed_norm",
        "gradclip replay run.trace.jsonl -c clip.yaml --plot replay.png --out replay.html",
        "gradclip replay trainer_output -c zclip --steps 1000:2000 --json",
    )
)
def replay(
    run: _RunFile,
    config: Annotated[
        list[str],
        typer.Option(
            "--config", "-c", help="The path of a configuration, or a preset; may be repeated."
        ),
    ],
    out: Annotated[Path | None, _Page] = None,
    plot: _Plot = None,
    steps: _StepRange = ":",
    as_json: _AsJson = False,
) -> None:
    """Run configurations over the norms of a run and compare them side by side.

    Each decides as it would in training on these norms, beginning with nothing learnt.
    """
    _refuse_other_picture(plot)
    start, stop = _parse_steps(steps)
    opened = open_run(run)
    for path in (plot, out):
        _refuse_lost_folder(path)
        _refuse_input(path, opened.path, *(Path(given) for given in config))
    stems = [Path(given).stem for given in config]
    configs = {
        given if stems.count(stem) > 1 else stem: as_config(given)
        for given, stem in zip(config, stems, strict=True)
    }
    with _progress(f"Replaying {opened.path.name}") as progress:
        found = run_replay(opened, configs, start=start, stop=stop, progress=progress)
    show_replay.draw_replay(found, opened.path.name, png=plot, html=out)
    if as_json:
        echo(show_replay.replay_as_json(found))
        return
    show(show_replay.replay_as_text(found))
    _echo_lines(opened.notes)
    for path in filter(None, (out, plot)):
        echo(f"Wrote {path}")


@app.command(
    epilog=_examples(
        "gradclip recommend run.trace.jsonl",
        "gradclip recommend trainer_output --clip-rate 0.1 --out clip.yaml",
        "gradclip recommend run.trace.jsonl --all --json",
    )
)
def recommend(
    run: _RunFile,
    clip_rate: Annotated[
        float, typer.Option(help="The share of steps to clip, above 0 and at most 0.5.")
    ] = 0.05,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Write the settings to take to this YAML file."),
    ] = None,
    steps: _StepRange = ":",
    every_policy: Annotated[
        bool,
        typer.Option("--all", help="Also try policies whose rate is less sure; takes longer."),
    ] = False,
    as_json: _AsJson = False,
) -> None:
    """Propose a threshold, or a policy that follows the norms, that clips a share of the steps.

    Prints YAML that is ready to paste, with how sure it is and why.
    """
    _refuse_lost_folder(out)
    start, stop = _parse_steps(steps)
    opened = open_run(run)
    _refuse_input(out, opened.path)
    with _progress(f"Fitting to {opened.path.name}") as progress:
        found = propose(
            opened,
            clip_rate,
            start=start,
            stop=stop,
            every_policy=every_policy,
            progress=progress,
        )
    if out is not None:
        out.write_text(found.taken.yaml, encoding="utf-8")
    if as_json:
        echo(show_replay.recommendation_as_json(found))
        return
    _echo_lines(opened.notes)
    show(show_replay.recommendation_as_text(found))
    echo(f"\n{show_replay.recommendation_as_yaml(found)}", nl=False)
    if out is not None:
        echo(f"Wrote {out}")


@app.command(
    epilog=_examples(
        "gradclip doctor",
        "gradclip doctor -- python train.py --max_grad_norm 0.01",
        "gradclip doctor -- torchrun --nproc-per-node 2 train.py",
    ),
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def doctor(
    context: typer.Context,
) -> None:
    """Find out whether clipping does what was asked for.

    Makes a tiny step in each framework that is installed, and compares the factor that gradients
    got with the one asked for. After -- give the command that trains: the first step of each of
    its optimizers is watched, then it is ended. Exits with 1 if something is wrong.
    """
    if context.args:
        found = doctors.examine_command(context.args)
    else:
        with _progress("Trying") as progress:
            progress(0.0)
            found = doctors.examine_stacks()
    echo(doctors.verdicts_as_text(found))
    raise typer.Exit(1 if any(one.fault for one in found) else 0)


def main(argv: Sequence[str] | None = None) -> None:
    """The console command. Exit code 0: fine, 1: a problem was found, 2: a usage error.

    Args:
        argv: The arguments after `gradclip`; None takes those of the command line.
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
            sys.stderr.write(f"gradclip: {escaped(named)}\n")
            sys.exit(2)


@contextmanager
def _progress(what: str) -> Iterator[Callable[[float], None]]:
    """A progress bar on standard error, if that is a terminal.

    Args:
        what: Plain text before the bar.

    Yields:
        A function to call with the share of the work that is done, 0 to 1.
    """
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(as_markup(what), total=1.0)
        yield lambda share: progress.update(task, completed=share)


def _parse_steps(text: str) -> tuple[int, int | None]:
    """The first step and the one after the last (None for all) from "A:B", "A:" or ":B"."""
    found = re.fullmatch(r"(\d*):(\d*)", text.strip())
    if found is None:
        msg = f"--steps is {text!r}; allowed: A:B, A: or :B with numbers of steps, as 1000:2000."
        raise ConfigError(msg)
    first, stop = found.groups()
    return int(first or 0), int(stop) if stop else None


def _echo_lines(lines: Sequence[str]) -> None:
    for line in lines:
        echo(line)


def _refuse_other_picture(plot: Path | None) -> None:
    if plot is not None and plot.suffix.lower() != ".png":
        msg = f"{plot}: a picture is a PNG file; allowed: a name in .png, such as {plot.stem}.png."
        raise ConfigError(msg)


def _refuse_input(out: Path | None, *inputs: Path) -> None:
    """Refuse to write over an input, also by another name of the same file."""
    read = [path for path in inputs if path.exists()]
    if out is not None and out.exists() and any(map(out.samefile, read)):
        msg = f"{out} is what is read here, and would be lost. Name another file to write."
        raise ConfigError(msg)


def _refuse_lost_folder(out: Path | None) -> None:
    """Refuse a file that can't be written, before the work it waits for."""
    if out is not None and not out.parent.is_dir():
        msg = f"{out}: the folder {out.parent} doesn't exist. Make it, or name another file."
        raise ConfigError(msg)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    sys.stderr.write(f"gradclip: warning: {escaped(str(message))}\n")


if __name__ == "__main__":
    main()
