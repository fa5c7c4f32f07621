"""How every command ends: one line for an error, 130 for Ctrl-C, never a traceback unasked."""

from __future__ import annotations

import os
import warnings
from typing import Any

import typer
from typer.core import TyperGroup

ERROR_EXIT = 2
_LONGEST = 600  # a compiler's message may run to pages
INTERRUPT_EXIT = 130  # 128 + SIGINT, as shells report it


class CommandGroup(TyperGroup):
    """The command group that turns what the library raises into one line on stderr.

    ``L3EXT_TRACEBACK=1`` in the environment shows the traceback instead.
    """

    def invoke(self, ctx: Any) -> Any:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning  # type: ignore[assignment]  # fewer names
            try:
                return super().invoke(ctx)
            except (typer.Exit, typer.Abort, BrokenPipeError):  # RuntimeErrors, but no failures
                raise
            except KeyboardInterrupt as interrupt:
                typer.echo(str(interrupt) or "interrupted", err=True)
                raise typer.Exit(INTERRUPT_EXIT) from None
            except (ValueError, TypeError, OSError, RuntimeError, ImportError) as error:
                if os.environ.get("L3EXT_TRACEBACK") == "1":
                    raise
                typer.echo(f"error: {describe_error(error)}", err=True)
                raise typer.Exit(ERROR_EXIT) from None


def describe_error(error: Exception) -> str:
    """One line for an exception, of a length to read; an OSError as ``path: reason``."""
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror
        if error.filename is not None and str(error.filename) not in text:
            text = f"{error.filename}: {text}"
    else:
        text = str(error) or type(error).__name__
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]} ... (L3EXT_TRACEBACK=1 shows all)"


def _show_warning(message: Warning | str, *_: object) -> None:
    typer.echo(f"warning: {' '.join(str(message).split())}", err=True)
