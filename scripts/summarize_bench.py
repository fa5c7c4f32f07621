"""One line for every figure in the result files of ``l3ext bench attention``.

python scripts/summarize_bench.py benchmarks/results/nvidia-h200/*.json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def lines(results: list[dict[str, Any]]) -> Iterator[str]:
    """The conditions of every result, then its figures."""
    for result in results:
        machine = result["machine"]
        yield (
            f"{machine.get('gpu', machine['cpu'])}, torch {machine['torch']}, "
            f"commit {machine['commit']}: {result['source']}, {result['table_rows']} rows of "
            f"{result['d_in']} + {result['d_emb']}, {result['dtype']}; "
            f"{result['bandwidth'] / 1e9:.0f} GB/s, {result['gemm'] / 1e12:.1f} TFLOP/s"
        )
        for measurement in result["measurements"]:
            where = f"{measurement['regime']} {measurement['num_tokens']}"
            for name, row in measurement["results"].items():
                fraction = f"{100 * row['fraction']:6.1f} %" if "fraction" in row else " " * 8
                yield (
                    f"  {where:<16} {name:<28} {1e6 * row['median']:12.1f} µs {fraction}"
                    f"  ({1e6 * row['p10']:.1f} to {1e6 * row['p90']:.1f}, {row['runs']} runs)"
                )
            for name, reason in measurement["failures"].items():
                yield f"  {where:<16} {name:<28} did not run: {reason[:80]}"


def main(arguments: list[str] | None = None) -> int:
    """0, or 2 for a file that cannot be read."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=Path, nargs="+", help="JSON, of l3ext bench attention")
    files: list[Path] = parser.parse_args(arguments).file
    for file in files:
        try:
            results = json.loads(file.read_text())
        except (OSError, ValueError) as error:
            print(f"summarize_bench: {file}: {error}", file=sys.stderr)
            return 2
        if isinstance(results, list):  # google-benchmark's files are objects, and print themselves
            print(f"{file.name}:")
            print("\n".join(lines(results)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
