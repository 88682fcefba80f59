"""`gradclip doctor`: the factor that gradients got, beside the one that was asked for."""

from __future__ import annotations

import math
import os
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

from gradclip.clipper import DEBUG_VARIABLE
from gradclip.errors import ConfigError, escaped
from gradclip.tools.stacks import Missing, stacks
from gradclip.tools.watching import FOLDER_VARIABLE, Call, SeenStep, Watcher, read_steps

__all__ = ["Verdict", "examine_command", "examine_stacks", "verdicts_as_text"]

_CLOSE = 0.02  # relative: gradients may have 8 bits

_AT_START = """\
from gradclip.tools.watching import watch_process
watch_process()
"""


@dataclass(frozen=True)
class Verdict:
    """What one step showed.

    Attributes:
        what: The stack, or the optimizer.
        clipped_by: What clipped; "" if nothing did.
        expected: The factor that the gradients should have got.
        applied: The factor that they got.
        fault: What is wrong; "" if nothing is.
        note: What else to know; "" for nothing.
    """

    what: str
    clipped_by: str = ""
    expected: float | None = None
    applied: float | None = None
    fault: str = ""
    note: str = ""


def examine_stacks(tell: Callable[[str], object] = lambda _: None) -> list[Verdict]:
    """Make a step in each framework that is installed, on this machine's device.

    Args:
        tell: Called with the name of each before it runs.
    """
    found: list[Verdict] = []
    for stack in stacks():
        tell(stack.name)
        seen: list[SeenStep] = []
        watcher = Watcher(seen.append)
        try:
            with _quiet():  # frameworks greet their users
                stack.run()
        except Missing as error:
            found.append(Verdict(stack.name, note=f"not tried: {error}"))
            continue
        except Exception as error:  # of whatever is installed: it is the finding
            what = f"{type(error).__name__}: {error}".splitlines()[0]
            found.append(Verdict(stack.name, fault=f"it failed: {what:.300}"))
            continue
        finally:
            watcher.stop()
        if not seen:
            found.append(Verdict(stack.name, fault="no optimizer made a step"))
        found += [judge(stack.name, [step]) for step in seen[:1]]
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    with ExitStack() as stack:
        nowhere = stack.enter_context(Path(os.devnull).open("w", encoding="utf-8"))
        stack.enter_context(redirect_stdout(nowhere))
        stack.enter_context(redirect_stderr(nowhere))
        stack.enter_context(warnings.catch_warnings(action="ignore"))
        yield


def examine_command(command: Sequence[str]) -> list[Verdict]:
    """Run a command and watch the first step of each optimizer, in every process it starts.

    The processes end before an optimizer makes a second step.

    Args:
        command: A program and its arguments; the Python that it starts needs gradclip.

    Returns:
        One for each optimizer; ranks count as one.

    Raises:
        ConfigError: If it can't be started.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "sitecustomize.py").write_text(_AT_START, encoding="utf-8")
        paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
        changed = {
            "PYTHONPATH": os.pathsep.join(paths),
            FOLDER_VARIABLE: str(folder),
            DEBUG_VARIABLE: "1",
        }
        try:
            done = subprocess.run(command, env=os.environ | changed, check=False)
        except OSError as error:
            msg = f"{command[0]} can't be started: {error.strerror}. Give a command after --."
            raise ConfigError(msg) from None
        steps = read_steps(folder)
    if not steps:
        fault = (
            "no step of a torch optimizer was seen. The command ended with exit code "
            f"{done.returncode}; is gradclip installed for the Python that it runs?"
        )
        return [Verdict(" ".join(command), fault=fault)]
    found: list[Verdict] = []
    processes = list(dict.fromkeys(step.process for step in steps))
    each = [[step for step in steps if step.process == process] for process in processes]
    for index in range(max(map(len, each))):
        ranks = [own[index] for own in each if index < len(own)]
        name = ranks[0].optimizer + (f", {len(ranks)} processes" if len(ranks) > 1 else "")
        found.append(judge(name, ranks))
    return found


def judge(what: str, ranks: Sequence[SeenStep]) -> Verdict:
    """Compare what was asked with what the optimizer got.

    Args:
        what: The name of the verdict.
        ranks: The same step in each process.
    """
    first = ranks[0]
    if not first.calls:
        if first.engine:
            note = "DeepSpeed clips inside its own step, where nothing is seen from outside"
            return Verdict(what, note=note)
        fault = (
            "the optimizer stepped, and nothing known to clip was called before; if clipping was "
            "asked for, it does nothing"
        )
        return Verdict(what, fault=fault)
    calls = [step.calls[-1] for step in ranks if step.calls]
    call = calls[0]
    expected, norm_fault = _expected(calls, sharded=any(step.sharded for step in ranks))
    applied = [_applied(one, expected) for one in calls]
    fault = norm_fault or _fault(first, call, expected, applied)
    note = ""
    if first.outside and not fault:
        note = f"parameters with a gradient that no call got: {first.outside}"
    elif call.withheld:
        note = "gradclip withheld this step"
    elif expected == 1.0 and not fault:
        note = "the norm is below the limit, so this step says little; try a lower limit"
    return Verdict(what, call.what, expected, applied[0], fault, note)


def _expected(calls: Sequence[Call], *, sharded: bool) -> tuple[float | None, str]:
    """The factor that was asked for; and what is wrong with the norm it comes from."""
    call = calls[0]
    if not all(math.isfinite(one.before) for one in calls):
        return None, ""
    if call.limit is None:
        return call.expected, ""
    norms = [one.before for one in calls]
    whole = norms[0] if not sharded else _together(norms, call.norm_type)
    told = call.returned
    if told is None or not math.isfinite(told):
        told = whole
    fault = ""
    if not sharded and not _is_close(told, norms[0]):
        fault = f"the norm is {norms[0]:.4g}, and the call took it for {told:.4g}"
    elif sharded and not _is_close(told, whole) and len(calls) > 1:
        own = all(one.returned is not None and _is_close(one.returned, one.before) for one in calls)
        if own:
            fault = f"each process used the norm of its own part; the whole norm is {whole:.4g}"
    return min(1.0, call.limit / (told + 1e-6)), fault


def _fault(step: SeenStep, call: Call, expected: float | None, applied: Sequence[float]) -> str:
    if call.before == 0:
        return (
            "the call got tensors without a gradient, such as gradients in place of parameters, a "
            "generator that was used up, or parameters before backward"
        )
    if expected is None or call.withheld or not all(map(math.isfinite, applied)):
        return ""
    if not all(_is_close(one, applied[0]) for one in applied):
        listed = ", ".join(f"{one:.4g}" for one in applied)
        return f"processes applied different factors: {listed}"
    ratio = applied[0] / expected
    if not _is_close(ratio, 1.0):
        if _is_close(applied[0], 1.0):
            return (
                "the call had no effect on what the optimizer stepped with: gradients were "
                "computed anew after it, or the optimizer has other ones"
            )
        return (
            f"the optimizer stepped with gradients {ratio:.4g} times what the call left: something "
            "wrote them after it, such as another backward, a loss scale, or a second clipping"
        )
    earlier = [one for one in step.calls[:-1] if one.limit is not None and one.limit < one.before]
    if earlier:
        return (
            f"gradients were clipped {len(earlier) + 1} times before one step: twice by different "
            "code, or at each batch of an accumulation"
        )
    return ""


def _applied(call: Call, expected: float | None) -> float:
    """Of the norms seen at the step the nearest to what was asked: it may clip by itself."""
    if not call.before or not call.after:
        return math.nan
    factors = [after / call.before for after in call.after]
    return min(factors, key=lambda factor: abs(factor - (expected or 1.0)))


def _together(norms: Iterable[float], norm_type: float) -> float:
    if math.isinf(norm_type):
        return max(norms)
    return float(sum(norm**norm_type for norm in norms) ** (1 / norm_type))


def _is_close(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=_CLOSE)


def verdicts_as_text(verdicts: Sequence[Verdict]) -> str:
    """A table, then what is wrong."""
    rows = [("", "clipped by", "asked", "applied", "verdict")]
    for one in verdicts:
        state = "FAULT" if one.fault else "not known" if one.applied is None else "ok"
        state = "not tried" if one.note.startswith("not tried") else state
        numbers = (_short(one.expected), _short(one.applied))
        rows.append((escaped(one.what), one.clipped_by or "-", *numbers, state))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    for one in verdicts:
        said = one.fault or one.note
        if said:
            lines.append(f"\n{escaped(one.what)}: {escaped(said)}.")
    return "\n".join(lines)


def _short(number: float | None) -> str:
    return "-" if number is None or math.isnan(number) else f"{number:.4g}"
