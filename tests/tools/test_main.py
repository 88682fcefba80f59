"""The command line: help with examples, exit codes, and errors and warnings in one line."""

import runpy
import sys

import pytest

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


def test_without_typer_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "typer", None)
    monkeypatch.delitem(sys.modules, "gradclip.tools.main")
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("gradclip.tools.main", run_name="__main__")
    assert stop.value.code == 2
    assert "pip install 'gradclip[tools]'" in capsys.readouterr().err
