"""The ``l3ext`` command: one module per subcommand, registered here.

Command modules import torch, transformers and the like inside their functions, so that
``l3ext --help`` answers at once.
"""

from __future__ import annotations

from typing import Annotated

import typer

from l3ext.cli import allocate, bench, doctor, generate, inspect, merge, train
from l3ext.cli._group import CommandGroup

app = typer.Typer(
    cls=CommandGroup,
    help="Large Lookup Layers (L3) for PyTorch.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        import l3ext

        typer.echo(f"l3ext {l3ext.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print and exit."),
    ] = False,
) -> None:
    pass


app.command()(allocate.allocate)
app.command()(merge.merge)
app.command()(train.train)
app.command()(generate.generate)
app.command()(inspect.inspect)
app.command()(doctor.doctor)
app.add_typer(bench.app, name="bench")


def main() -> None:
    """Entry point of the ``l3ext`` console script."""
    app()
