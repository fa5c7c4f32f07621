"""One line for every figure of ``l3ext bench attention``, and for every profiled call.

python scripts/summarize_bench.py benchmarks/results/nvidia-h200/*.json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def where_and_when(machine: dict[str, Any]) -> str:
    """The machine and the code that made a result."""
    where = machine.get("gpu", machine["cpu"])
    return f"{where}, torch {machine['torch']}, commit {machine['commit']}"


def lines(results: list[dict[str, Any]]) -> Iterator[str]:
    """The conditions of every result, then its figures."""
    for result in results:
        yield (
            f"{where_and_when(result['machine'])}: "
            f"{result['source']}, {result['table_rows']} rows of "
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


def profile_lines(result: dict[str, Any]) -> Iterator[str]:
    """Of every call that was profiled its span and what took the most of it."""
    yield where_and_when(result["machine"])
    for profile in result["profiles"]:
        where = f"{profile['regime']} {profile['num_tokens']}"
        most = profile["kernels"][0]
        yield (
            f"  {where:<16} {profile['span_us']:12.1f} µs, {profile['idle_us']:.1f} idle; "
            f"{100 * most['share']:.0f} % {most['kernel']}"
        )


def main(arguments: list[str] | None = None) -> int:
    """0, or 2 for a file that cannot be read, after the others."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=Path, nargs="+", help="JSON, of l3ext bench attention")
    files: list[Path] = parser.parse_args(arguments).file
    status = 0
    for file in files:
        try:
            results = json.loads(file.read_text())
        except (OSError, ValueError) as error:
            print(f"summarize_bench: {file}: {error}", file=sys.stderr)
            status = 2
            continue
        if isinstance(results, list):
            print(f"{file.name}:")
            print("\n".join(lines(results)))
        elif "profiles" in results:  # other objects, as google-benchmark's, print themselves
            print(f"{file.name}:")
            print("\n".join(profile_lines(results)))
    return status


if __name__ == "__main__":
    sys.exit(main())
