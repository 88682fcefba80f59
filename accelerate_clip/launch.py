"""`accelerate-clip`: `launch` runs an unchanged script, clipped as a section of its YAML says."""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from subprocess import CalledProcessError
from typing import Any

from accelerate.commands.config.config_args import default_config_file, load_config_from_file
from accelerate.commands.launch import launch_command, launch_command_parser
from accelerate.utils import patch_environment
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from accelerate_clip.run import CONFIG_VARIABLE
from accelerate_clip.setting_up import SECTION, ask, show_environment, stock_file
from gradclip import AlarmError, ConfigError, load_section

__all__ = ["SECTION", "main"]

_USAGE = """\
usage: accelerate-clip launch --config_file FILE [accelerate launch flags] script.py [arguments]
       accelerate-clip config [--config_file FILE]
       accelerate-clip env [--config_file FILE]

launch  Runs an unchanged Accelerate script with the clipping that the section
        'gradient_clip_config:' of the Accelerate configuration FILE asks for. Flags are those of
        accelerate launch: accelerate-clip launch --help
config  Asks the questions of accelerate config, then how to clip, and writes FILE
        (accelerate_clip.yaml), which launch takes.
env     Prints versions and settings for a bug report.
"""
_FILE = Path("accelerate_clip.yaml")
_SEVERAL = ("use_deepspeed", "use_fsdp", "use_megatron_lm", "multi_gpu", "tpu")
_ONE = ("NO", "MULTI_CPU")


def main(argv: Sequence[str] | None = None) -> None:
    """The console command.

    Args:
        argv: What follows `accelerate-clip`; taken from the command line if None.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    if given[:1] in (["-h"], ["--help"]):
        sys.stdout.write(_USAGE)
        return
    command = given[0] if given else ""
    if command not in ("launch", "config", "env"):
        sys.stderr.write(_USAGE)
        sys.exit(2)
    parser = launch_command_parser() if command == "launch" else _file_parser(command)
    arguments = parser.parse_args(given[1:])
    try:
        if command == "launch":
            _launch(arguments)
        elif command == "config":
            ask(arguments.config_file or _FILE)
        else:
            show_environment(arguments.config_file)
    except ConfigError as error:
        sys.exit(f"accelerate-clip: {error}")


def _file_parser(command: str) -> ArgumentParser:
    parser = ArgumentParser(f"accelerate-clip {command}")
    parser.add_argument("--config_file", type=Path, help="An Accelerate configuration in YAML.")
    return parser


def _launch(arguments: Namespace) -> None:
    file = _config_file(arguments)
    config = load_section(file, SECTION)
    with stock_file(file) as (stock, rest):
        _refuse(arguments, rest, file)
        if _starts_one(arguments, rest):
            sys.stderr.write(
                "accelerate-clip: warning: several processes are asked for, but accelerate launch "
                "starts ONE on the CPU this way; for several put 'distributed_type: MULTI_GPU' "
                f"and 'use_cpu: true' into {file} and leave out --cpu.\n"
            )
        _run_through_us(arguments)
        environment = {CONFIG_VARIABLE: json.dumps(config.model_dump())}
        if rest.get("use_cpu") and not arguments.cpu:
            # Accelerate 1.15 passes use_cpu on only to a single process: of several, each would
            # find no GPU and train alone.
            environment["ACCELERATE_USE_CPU"] = "true"
        try:
            load_config_from_file(str(stock))
        except ValueError as error:
            msg = (
                f"{file}, beside the section '{SECTION}': {str(error).replace(str(stock), 'it')} "
                "Add what accelerate launch needs, as accelerate config writes it, for instance "
                "\"distributed_type: 'NO'\" for one process, 'distributed_type: MULTI_GPU' for DDP."
            )
            raise ConfigError(msg) from None
        arguments.config_file = str(stock)
        with patch_environment(**environment), _exit_code_of_alarms():
            launch_command(arguments)


@contextmanager
def _exit_code_of_alarms() -> Iterator[None]:
    """End with the exit code of a script that an alarm ended; any other failure is an error."""
    try:
        yield
    except (CalledProcessError, ChildFailedError) as error:
        if isinstance(error, CalledProcessError):
            code = error.returncode
        else:
            code = error.get_first_failure()[1].exitcode
        if code == AlarmError.code:
            sys.exit(code)
        raise


def _config_file(arguments: Namespace) -> Path:
    if arguments.config_file is not None:
        return Path(arguments.config_file)
    default = Path(default_config_file)
    if default.is_file():
        return default
    msg = (
        f"No --config_file is given and {default} doesn't exist; an Accelerate configuration "
        f"with a section '{SECTION}:' is needed. Pass --config_file FILE."
    )
    raise ConfigError(msg)


def _refuse(arguments: Namespace, rest: Mapping[str, Any], file: Path) -> None:
    """What would run without clipping, or otherwise than asked."""
    kind = rest.get("distributed_type")
    found = ""
    if arguments.no_python:
        found = "--no_python runs a program that Python doesn't start. Leave it out"
    elif rest.get("compute_environment") == "AMAZON_SAGEMAKER":
        found = (
            f"{file} starts the script on SageMaker, where this machine's packages aren't. Call "
            "accelerate_clip.enable(accelerator, policy) in the script"
        )
    elif arguments.tpu or kind in ("XLA", "TPU"):
        found = "On XLA gradients are reduced only while the optimizer steps. Use other devices"
    elif rest.get("use_cpu") and (arguments.use_fsdp or kind == "FSDP") and not arguments.cpu:
        found = (
            "Accelerate shards nothing on the CPU: FSDP with use_cpu would train plain DDP. Set "
            f"'distributed_type: MULTI_GPU' in {file} for DDP, or 'use_cpu: false' on GPUs"
        )
    if found:
        msg = f"{found}; allowed: Python scripts on one process, DDP, FSDP or tensor parallel."
        raise ConfigError(msg)


def _starts_one(arguments: Namespace, rest: Mapping[str, Any]) -> bool:
    """Whether several processes are asked for and accelerate 1.15 would start a single one."""
    asked = arguments.num_processes or rest.get("num_processes") or 1
    by_mpi = arguments.mpirun_hostfile or rest.get("mpirun_config")
    if asked < 2 or by_mpi:
        return False
    if arguments.cpu:
        return True
    by_flag = any(getattr(arguments, name) for name in _SEVERAL)
    return not by_flag and rest.get("distributed_type") in _ONE


def _run_through_us(arguments: Namespace) -> None:
    """Let the processes run `python -m accelerate_clip.run` with the user's script."""
    script = [arguments.training_script, *arguments.training_script_args]
    arguments.training_script_args = ["-m", *script] if arguments.module else script
    arguments.training_script = "accelerate_clip.run"
    arguments.module = True


if __name__ == "__main__":
    main()
