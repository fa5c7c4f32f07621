"""Running the command line, in this process and in another."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from typer.testing import CliRunner

from l3ext.cli import app

ROOT = Path(__file__).parents[2]

# A model and a corpus's cut small enough for a run to take a second.
SIZES = (
    *("--vocab-size", 280, "--hidden-size", 32, "--intermediate-size", 48, "--layers", 2),
    *("--heads", 2, "--max-rows", 8, "--sequence-length", 16, "--batch-size", 4),
    *("--eval-fraction", 0.1, "--eval-sequences", 8),
)


def invoke(*arguments, **options):
    """Run ``l3ext`` here; the result has exit_code, stdout and stderr."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments], **options)


def command(*arguments):
    """What starts ``l3ext`` in a process of its own, and its environment."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    return [sys.executable, "-m", "l3ext", *map(str, arguments)], environment


def run_process(*arguments, **options):
    """Run ``l3ext`` in a process of its own."""
    line, environment = command(*arguments)
    return subprocess.run(
        line, capture_output=True, text=True, timeout=120, env=environment, **options
    )
