"""What the kernels' choices of tiles, splits and paths are worth: each against its alternatives.

How many tiles of queries a block attends at a time, in how many turns decode splits its work, up to
how many tokens the decode kernel serves, whether rows of a tied table pass through shared memory:
defaults that were estimated, and what else there is, timed in turn over the same steps, ids by
Zipf's law. The ratio is to the default in the same turn, with its 95 % interval. On the CPU, which
has no such choices, it runs the same calls: that says nothing about a device.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from l3ext import _C
from l3ext._files import atomic_path
from l3ext.bench import machine
from l3ext.bench.attention import Bench, Options
from l3ext.bench.timing import (
    Candidate,
    captured,
    interleaved_seconds,
    paired_ratio,
    summarize,
)
from l3ext.bench.workload import from_zipf

DEFAULT = "default"
#: Of each regime: other choices than the default, as arguments of _C.tune_cuda.
CHOICES: dict[str, dict[str, dict[str, Any]]] = {
    "forward": {
        "dense by 4 tiles": {"most_forward_tiles": 4},
        "all by 1 tile": {"most_forward_tiles": 1},
    },
    "backward": {"all by 1 tile": {"most_backward_tiles": 1}},
    "decode": {
        "1 turn": {"decode_turns": 1},
        "2 turns": {"decode_turns": 2},
        "8 turns": {"decode_turns": 8},
        "16 turns": {"decode_turns": 16},
        "forward kernel": {"most_decode_tokens": 0},
    },
    "tied forward": {"rows read twice": {"slabs": False}},
}
_GRAPH_CALLS = 16  # as in l3ext bench


def compare(bench: Bench, regime: str, tokens: int) -> dict[str, Any]:
    """A measurement: every choice of the regime at one size."""
    in_graph = regime == "decode"
    call = bench.own_call(
        "backward" if regime == "backward" else "forward", tokens, _GRAPH_CALLS if in_graph else 4
    )

    def candidate(choice: dict[str, Any]) -> Candidate:
        if in_graph:  # which keeps the choice that it was captured with
            graph = captured(lambda: [call(i)() for i in range(_GRAPH_CALLS)], bench.device)
            return lambda _: graph

        def prepared(run: int) -> Callable[[], object]:
            _C.tune_cuda(**choice)
            return call(run)

        return prepared

    expected = bits(call(0)())
    same, candidates = {}, {}
    for name, choice in {DEFAULT: {}, **CHOICES[regime]}.items():
        _C.tune_cuda(**choice)
        same[name] = all(map(torch.equal, bits(call(0)()), expected))
        candidates[name] = candidate(choice)
    seconds = interleaved_seconds(
        candidates,
        clock=bench.clock,
        runs=bench.options.runs,
        budget_seconds=bench.options.budget_seconds,
    )
    _C.tune_cuda()
    results = {}
    for name, times in seconds.items():
        time = summarize(times).divided_by(_GRAPH_CALLS if in_graph else 1)
        results[name] = {**dataclasses.asdict(time), "same_bits": same[name]}
        if name != DEFAULT:
            results[name]["ratio"] = dataclasses.asdict(paired_ratio(times, seconds[DEFAULT]))
    return {"regime": regime, "num_tokens": tokens, "results": results}


def bits(outputs: Any) -> list[torch.Tensor]:
    """Copies of what a call returned."""
    return [t.clone() for t in ([outputs] if isinstance(outputs, torch.Tensor) else outputs)]


HEAD = f"{'regime':<14}{'tokens':>7}  {'choice':<18}{'µs':>10}  x default (95 %)"


def lines(measurement: dict[str, Any]) -> Iterator[str]:
    """A measurement as text, below HEAD."""
    for name, result in measurement["results"].items():
        where = f"{measurement['regime']:<14}{measurement['num_tokens']:>7}"
        line = f"{where}  {name:<18}{1e6 * result['median']:>10.1f}"
        if name != DEFAULT:
            ratio = result["ratio"]
            line += f"  {ratio['median']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f})"
            line += "" if result["same_bits"] else ", other bits"
        yield line


def main() -> None:
    """Print every choice's time, and write all as JSON where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--d-in", type=int, default=2048)
    parser.add_argument("--d-emb", type=int, default=1024)
    parser.add_argument("--vocab-size", type=int, default=180_000)
    parser.add_argument("--total-rows", type=int, default=710_000)
    parser.add_argument("--tokens", type=int, nargs="+", default=[16384, 65536])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64, 300, 512, 1024])
    parser.add_argument("--runs", type=int, default=40, help="of each choice")
    parser.add_argument("--budget", type=float, default=1.5, help="seconds of one measurement")
    parser.add_argument("--output", type=Path, help="JSON")
    options = parser.parse_args()
    workload = from_zipf(
        num_tokens=max(4 * max(options.tokens), 1 << 16),
        vocab_size=options.vocab_size,
        total_rows=options.total_rows,
    )
    result = {
        "machine": machine.describe(torch.device(options.device)),
        "options": {name: value for name, value in vars(options).items() if name != "output"},
        "measurements": [],
    }
    print(HEAD)
    for tied in (False, True):
        bench = Bench(
            workload,
            Options(
                device=torch.device(options.device),
                dtype=getattr(torch, options.dtype),
                d_in=options.d_in,
                d_emb=options.d_in if tied else options.d_emb,
                tied=tied,
                runs=options.runs,
                budget_seconds=options.budget,
                gemm_size=512,  # nothing here is held against the floor
                copy_bytes=1 << 24,
            ),
        )
        for regime in CHOICES:
            if regime.startswith("tied") == tied:
                for tokens in options.batch if regime == "decode" else options.tokens:
                    measurement = compare(bench, regime, tokens)
                    result["measurements"].append(measurement)
                    print("\n".join(lines(measurement)), flush=True)
                    if options.output is not None:  # each time: what comes after may be stopped
                        with atomic_path(options.output) as temporary:
                            temporary.write_text(json.dumps(result, indent=1) + "\n")
        del bench  # and its table


if __name__ == "__main__":
    main()
