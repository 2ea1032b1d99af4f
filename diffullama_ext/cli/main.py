# SPDX-License-Identifier: Apache-2.0
"""The `diffullama` command: its sub-commands, and how errors leave it.

Exit codes: 0 done; 1 the run failed; 2 wrong usage, or an input that cannot be used; 130 interrupted. Errors are one
line on stderr, results go to stdout, progress to stderr; ``diffullama --debug ...`` adds the traceback.
"""

from __future__ import annotations

import os
import sys
import traceback
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from .._version import __version__
from .adapt import register as register_adapt
from .bench import bench
from .demo import demo
from .errors import BAD_INPUT, FAILED, INTERRUPTED, OK, BadInput, one_line
from .info import info
from .policy_option import SamplingCommand
from .sample import infill, sample

USAGE_ERROR: Any = typer.BadParameter.__base__  # of the click that this typer is built on


def _leave(code: int) -> NoReturn:
    """Exit. After a failure in a process group not by the interpreter's end, where a thread of gloo may abort it."""
    distributed = sys.modules.get("torch.distributed")
    if code != OK and distributed is not None and distributed.is_available() and distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


class _Commands(TyperGroup):
    """The group of commands; every exception that leaves one becomes a line and an exit code."""

    debug = False

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """As of typer; console scripts run it in standalone mode."""
        standalone = kwargs.get("standalone_mode", True)
        kwargs["standalone_mode"] = False  # exceptions and exit codes arrive here
        if not standalone:
            return super().main(*args, **kwargs)
        try:
            code = super().main(*args, **kwargs)
            if code == INTERRUPTED:  # later versions of typer make it of a KeyboardInterrupt
                raise typer.Abort
        except USAGE_ERROR as error:
            code = self._fail(error.format_message(), BAD_INPUT)
        except BadInput as error:
            code = self._fail(one_line(error), BAD_INPUT)
        except (KeyboardInterrupt, typer.Abort):
            code = self._fail("interrupted", INTERRUPTED)
        except Exception as error:
            code = self._fail(f"{type(error).__name__}: {one_line(error)}", FAILED)
        _leave(code if isinstance(code, int) else OK)

    def _fail(self, message: str, code: int) -> int:
        if self.debug:
            typer.echo(traceback.format_exc(), err=True)
        typer.echo(f"diffullama: {' '.join(message.split())}", err=True)
        return code


app = typer.Typer(
    cls=_Commands,
    invoke_without_command=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"diffullama {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Masked diffusion language models from autoregressive ones.

    Exit codes: 0 done, 1 the run failed, 2 wrong usage or unusable input, 130 interrupted.
    """
    context.command.debug = debug  # type: ignore[attr-defined]
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit(BAD_INPUT)


app.command()(demo)
register_adapt(app)
app.command(cls=SamplingCommand)(sample)
app.command(cls=SamplingCommand)(infill)
app.command()(bench)
app.command()(info)


def main() -> None:
    """Entry point of the console script."""
    app(prog_name="diffullama")


if __name__ == "__main__":
    main()
