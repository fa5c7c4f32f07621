"""The main job on real text: allocate, train, serve from RAM and disk, report.

    python scripts/demo [--text FILE] [--out demo-out]

Writes ``report.json`` and ``report.html`` into the output directory.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from sizes import DEMO, TINY


def main() -> None:
    """Run the demo; exits 2 with one line for bad input, 130 on Ctrl-C."""
    parser = argparse.ArgumentParser(description="l3ext on real text: allocate, train, serve.")
    parser.add_argument("--text", type=Path, help="train on this file, not on Python's sources")
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="where the report goes")
    parser.add_argument("--tiny", action="store_true", help="seconds, and no meaning: for tests")
    options = parser.parse_args()
    # Read when torch loads OpenMP. Threads that spin while they wait take the cores from the
    # threads they wait for, wherever something else runs too: ten times slower on two busy cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        from pipeline import run

        run(options.text, options.out, TINY if options.tiny else DEMO)
    except KeyboardInterrupt as interrupt:
        print(str(interrupt) or "interrupted", file=sys.stderr)
        sys.exit(130)
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
