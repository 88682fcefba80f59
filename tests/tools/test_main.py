"""The command line: help with examples, exit codes, and errors and warnings in one line."""

import json
import logging
import runpy
import sys

import pytest
import torch
import yaml
from support import spiky_run

from gradclip import ConfigError, GradientClipper, as_config
from gradclip.config.presets import presets
from gradclip.tools.main import app, main
from gradclip.tools.trace import TraceHeader, write_trace

COMMANDS = [command.name or command.callback.__name__ for command in app.registered_commands]


def run(*arguments):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    return stop.value.code


def test_help_names_every_command(capsys):
    assert run("--help") == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in COMMANDS)
    assert {"import", "check", "schema"} <= set(COMMANDS)


def test_help_of_each_command_shows_examples(capsys):
    for name in COMMANDS:
        assert run(name, "--help") == 0
        shown = capsys.readouterr().out
        assert f"gradclip {name}" in shown.split("Examples:")[1]


def test_what_cannot_be_read_as_given_is_a_usage_error(tmp_path, capsys):
    path = tmp_path / "trace.jsonl"
    write_trace(path, TraceHeader(), [])
    assert run("import", str(path), "--out", str(tmp_path / "out.jsonl")) == 2
    said = capsys.readouterr().err
    assert said == f"gradclip: {path}: this is a trace already; " + said.split("; ")[1]
    assert run("import", str(tmp_path / "nowhere.csv")) == 2
    assert run("unknown") == 2


def test_what_the_system_refuses_is_named_with_the_reason(tmp_path, capsys):
    assert run("schema", "--out", str(tmp_path)) == 2
    assert capsys.readouterr().err == f"gradclip: {tmp_path}: Is a directory\n"


def test_the_schema_is_printed_or_written(tmp_path, capsys):
    assert run("schema") == 0
    printed = capsys.readouterr().out
    path = tmp_path / "schema.json"
    assert run("schema", "--out", str(path)) == 0
    assert path.read_text() == printed
    assert '"policies"' in printed


def test_presets_are_listed_and_printed(capsys):
    assert run("presets") == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed] == list(presets())
    assert run("presets", "zclip") == 0
    printed = capsys.readouterr().out
    assert as_config(yaml.safe_load(printed)) == as_config("zclip")
    assert "schema.json" not in printed
    assert run("presets", "zclp") == 2
    assert "zclp is no preset; did you mean 'zclip'?" in capsys.readouterr().err


def test_without_typer_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "typer", None)
    monkeypatch.delitem(sys.modules, "gradclip.tools.main")
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("gradclip.tools.main", run_name="__main__")
    assert stop.value.code == 2
    assert "pip install 'gradclip[tools]'" in capsys.readouterr().err


HOSTILE = "\x1b[2J\x9b31m\u202e[red]x[/red]"
"""Clears a terminal, colours it, turns the line round; and rich's markup."""
SHOWN = r"\x1b[2J\x9b31m\u202e[red]x[/red]"


def test_nothing_that_others_named_reaches_the_terminal_as_a_code(
    tmp_path, monkeypatch, capsys, caplog
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setattr(spiky_run, "NAMES", (HOSTILE, "b", "c", HOSTILE + "d"))
    hostile = {"trace": tmp_path / f"{HOSTILE[:-6]}.jsonl", "config": tmp_path / "wrong.yaml"}
    spiky_run.write(hostile["trace"])
    hostile["config"].write_text(json.dumps({HOSTILE: 1, "policies": [{"type": HOSTILE}]}))
    good = tmp_path / f"{HOSTILE[:-6]}.yaml"
    good.write_text("policies: [{type: norm, max_norm: 1.0}]")
    runs = {
        "report": run("report", str(hostile["trace"])),
        "check": run("check", str(hostile["config"])),
        "check a good file": run("check", str(good)),
        "replay": run("replay", str(hostile["trace"]), "-c", str(good)),
        "replay a wrong one": run("replay", str(hostile["trace"]), "-c", str(hostile["config"])),
        "recommend": run("recommend", str(hostile["trace"])),
    }
    assert runs["report"] == 0
    said = capsys.readouterr()
    assert SHOWN in said.out
    assert SHOWN in said.err
    for make in (
        lambda: as_config({"policies": [{"type": "norm", "max_norm": 1.0, HOSTILE: 1}]}),
        lambda: GradientClipper(
            {"policies": [{"type": "zclip"}], "groups": [{"match": "z", "policies": []}]},
            [(HOSTILE, torch.nn.Parameter(torch.zeros(1)))],
        ),
    ):
        with pytest.raises(ConfigError) as caught:
            make()
        assert SHOWN in str(caught.value)
    logging.getLogger("gradclip").warning("%s", HOSTILE)
    assert caplog.messages == [SHOWN]
    everything = said.out + said.err
    assert not [c for c in everything if c != "\n" and not c.isprintable()]
