# SPDX-License-Identifier: Apache-2.0
"""The command line as such: help, versions, exit codes, one-line errors."""

import json
import subprocess
import sys

import pytest

from diffullama_ext import __version__
from diffullama_ext.cli import info as info_module
from diffullama_ext.cli import main as main_module
from diffullama_ext.cli.errors import BadInput, checking_input, one_line

COMMANDS = ("demo", "adapt", "sample", "infill", "info")


def test_help_lists_the_commands(run):
    result = run("--help")
    assert result.exit_code == 0
    assert all(command in result.stdout for command in COMMANDS)
    assert "Exit codes: 0 done, 1 the run failed, 2 wrong usage" in result.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(run, command):
    result = run(command, "--help")
    assert result.exit_code == 0
    assert "--help" in result.stdout


def test_no_command_shows_the_help_and_is_wrong_usage(run):
    result = run()
    assert result.exit_code == 2
    assert "Commands:" in result.stdout


def test_help_needs_no_heavy_import():
    heavy = ("transformers", "datasets", "accelerate", "tokenizers", "pandas")
    code = (
        "import sys; sys.argv = ['diffullama', '--help']\n"
        "from diffullama_ext.cli.main import main\n"
        "try:\n    main()\nexcept SystemExit as stop:\n"
        f"    print('loaded', stop.code, [name for name in {heavy!r} if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "loaded 0 []"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("teach",), "No such command 'teach'"),
        (("--loud",), "No such option: --loud"),
        (("sample",), "Missing option '--model'"),
        (("sample", "--model", "m", "--steps", "0"), "Invalid value for '--steps'"),
        (("sample", "--model", "m", "--length", "many"), "Invalid value for '--length'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_wrong_usage_is_one_line_and_code_2(fails, arguments, text):
    fails(2, (text,), *arguments)


def test_version(run):
    assert run("--version").stdout == f"diffullama {__version__}\n"


def test_info_says_what_is_compiled(run):
    result = run("info")
    assert result.exit_code == 0
    for name in ("CPU kernels", "CUDA kernels", "torch", "transformers", __version__):
        assert name in result.stdout
    facts = json.loads(run("info", "--json").stdout)
    assert facts["diffullama-ext"] == __version__


def test_info_names_what_is_not_installed(run, monkeypatch):
    monkeypatch.setattr(info_module, "PACKAGES", ("no-such-package",))
    assert json.loads(run("info", "--json").stdout)["no-such-package"] == "not installed"


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (RuntimeError("out of\n  memory"), 1, "diffullama: RuntimeError: out of memory"),
        (ZeroDivisionError(), 1, "diffullama: ZeroDivisionError: ZeroDivisionError"),
        (BadInput("no such\nfile"), 2, "diffullama: no such file"),
        (KeyboardInterrupt(), 130, "diffullama: interrupted"),
    ],
    ids=["failure", "silent-failure", "bad-input", "interrupt"],
)
def test_exceptions_become_a_line_and_a_code(run, monkeypatch, error, code, line):
    def broken() -> None:
        raise error

    monkeypatch.setattr(info_module.json, "dumps", lambda *a, **k: broken())
    result = run("info", "--json")
    assert (result.exit_code, result.stderr.strip()) == (code, line)


def test_debug_adds_the_traceback(run, monkeypatch):
    monkeypatch.setattr(info_module.json, "dumps", lambda *a, **k: 1 / 0)
    result = run("--debug", "info", "--json")
    assert result.exit_code == 1
    assert "Traceback (most recent call last)" in result.stderr
    assert result.stderr.strip().endswith("diffullama: ZeroDivisionError: division by zero")


def test_the_entry_point_runs_the_app(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["diffullama", "--version"])
    with pytest.raises(SystemExit) as stop:
        main_module.main()
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"diffullama {__version__}\n"


@pytest.mark.parametrize("error", [ValueError("bad\nvalue"), TypeError("bad value"), FileNotFoundError("bad value")])
def test_what_the_library_says_of_arguments_is_the_users_matter(error):
    with pytest.raises(BadInput) as caught, checking_input():
        raise error
    assert one_line(caught.value) == "bad value"


def test_failures_of_the_run_are_not():
    with pytest.raises(RuntimeError), checking_input():
        raise RuntimeError("no more memory")


# In a process group of its own; what the interpreter does at its end is printed.
IN_A_GROUP = """
import atexit, sys, torch
from diffullama_ext.cli.main import main
torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv.pop(1)}", rank=0, world_size=1)
atexit.register(print, "the interpreter ends")
main()
"""


def test_a_failure_in_a_process_group_leaves_at_once(tmp_path):
    """At the interpreter's end a thread of gloo may abort the process, and its exit code is lost."""
    for arguments, code, text in ((["--version"], 0, "the interpreter ends"), (["adapt", "--out", "x"], 2, "")):
        command = [sys.executable, "-W", "ignore", "-c", IN_A_GROUP, str(tmp_path / str(code)), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == code, done.stderr
        assert done.stdout.splitlines()[-1:] == ([text] if text else [])
        assert ("--model must be given" in done.stderr) == (code != 0)
