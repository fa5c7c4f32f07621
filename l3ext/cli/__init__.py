"""The ``l3ext`` command: one module per subcommand, registered here."""

from __future__ import annotations

import typer

from l3ext.cli.allocate import allocate

app = typer.Typer(
    help="Large Lookup Layers (L3) for PyTorch.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

app.command()(allocate)


def main() -> None:
    """Entry point of the ``l3ext`` console script."""
    app()
