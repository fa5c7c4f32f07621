"""What commands share: the ``--json`` option, byte sizes, and where text goes.

Results go to stdout. Progress and remarks go to stderr, so that ``--json`` can be piped.
"""

from __future__ import annotations

import json
import re
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

JsonOption = Annotated[
    bool, typer.Option("--json", help="Print the result as JSON, alone on stdout.")
]

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARY_UNITS = {f"{unit}I": 1024**power for power, unit in enumerate("KMGT", start=1)}
_BYTES = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]I?)?B?\s*", re.IGNORECASE)


def parse_bytes(text: str, option: str) -> int:
    """Bytes of ``"64MiB"``, ``"1.5 GB"``, ``"4096"``; ValueError for anything else."""
    match = _BYTES.fullmatch(text)
    if match is None:
        raise ValueError(f"{option}: expected a size such as 64MiB, 1.5GB or 4096, got {text!r}")
    unit = (match[2] or "").upper()
    return int(float(match[1]) * {**_UNITS, **_BINARY_UNITS}[unit])


def format_bytes(count: int) -> str:
    """``count`` bytes for people: ``"1.5 MiB"``."""
    if count < 1024:
        return f"{count} B"
    size = float(count)
    for unit in ("KiB", "MiB", "GiB", "TiB"):
        size /= 1024
        if size < 1024 or unit == "TiB":
            break
    return f"{size:.1f} {unit}"


def table_console() -> Console:
    """Where tables go: stdout. Piped, they would be cut to 80 columns."""
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=120)


def print_json(value: Any) -> None:
    """Print ``value`` as indented JSON to stdout."""
    typer.echo(json.dumps(value, indent=2))


def print_facts(facts: dict[str, Any]) -> None:
    """Print names and numbers, one a line, to stdout."""
    for name, value in facts.items():
        text = f"{value:,.1f}" if isinstance(value, float) else f"{value:,}"
        typer.echo(f"{name.replace('_', ' '):28} {text:>16}")


def remark(text: str) -> None:
    """Print one line to stderr."""
    typer.echo(text, err=True)
