"""A decode step in one CUDA graph: its table on the device, and in host memory.

A stack of feed-forward layers, among them a lookup layer, over tokens by Zipf's law. Three graphs
are replayed in turn, forth and back, with the same ids: the table resident; offloaded; offloaded
without a ring, so that attention reads rows in host memory. All must give the same bits, or this
fails. *Exposed* is what a step takes longer than the resident one of the same turn. On the CPU,
which has no graphs, it runs the same calls: that says nothing about a device.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from pathlib import Path

import numpy as np
import torch
from torch import nn

import l3ext
from l3ext._files import atomic_path
from l3ext.bench import machine
from l3ext.bench.timing import captured, clock_of, interleaved_seconds, paired_ratio, summarize


class Stack(nn.Module):
    """``before`` feed-forward layers, a lookup layer, and ``after`` more."""

    #: As a model's: what serves the rows; None: the table is the layer's own.
    l3_runtime = None

    def __init__(self, before: int, after: int, width: int, lookup: l3ext.L3Layer) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.RMSNorm(width), nn.Linear(width, 3 * width), nn.SiLU(),
                          nn.Linear(3 * width, width))
            for _ in range(before + after)
        )  # fmt: skip
        self.before, self.lookup = before, lookup

    def forward(self, h: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """[N, width] of N ids."""
        if self.l3_runtime is None:
            plan = self.lookup.plan(ids)
        else:
            step = self.l3_runtime.begin(ids)
        for block in self.blocks[: self.before]:
            h = h + block(h)
        if self.l3_runtime is None:
            h = h + self.lookup(h, plan=plan)
        else:
            h = h + self.lookup(h, rows=step.wait(0))
        for block in self.blocks[self.before :]:
            h = h + block(h)
        return h


class Graph:
    """One way to run the step, its work in a graph."""

    def __init__(self, stack, runtime, batch, device, dtype):
        self.stack, self.runtime = stack, runtime
        self.ids = torch.zeros(batch, dtype=torch.int64, device=device)
        self.h = torch.randn(batch, stack.lookup.d_model, device=device).to(dtype)
        self.replay = captured(self._run, device)

    def _run(self):
        self.stack.l3_runtime = self.runtime
        self.output = self.stack(self.h, self.ids)

    def prepared(self, ids):
        self.ids.copy_(ids)
        return self.replay


def compare(options, batch, before, hot, table, owners, random, weights):
    """A line of the result: a batch, a place in the stack, a share that is hot."""
    device, dtype = torch.device(options.device), table.dtype
    lookup = l3ext.L3Layer(
        options.d_in, options.d_emb, options.d_in, owners, device=device, dtype=dtype
    )
    with torch.no_grad():
        lookup.table.copy_(table)
    after = max(0, options.layers - before)
    stack = Stack(before, after, options.d_in, lookup).to(device, dtype)
    far = l3ext.LookupTable(table, owners, options.d_in)
    place = {"device": device, "in_place": False, "cache_bytes": int(hot * table.nbytes)}
    runtimes = {
        "offloaded": l3ext.GraphRuntime([far], **place),
        "read in host memory": l3ext.GraphRuntime([far], ring_bytes=0, **place),
    }
    h = torch.randn(batch, options.d_in, device=device).to(dtype)
    graphs = {}
    for name, runtime in {"resident": None, **runtimes}.items():
        graphs[name] = Graph(stack, runtime, batch, device, dtype)
        graphs[name].h.copy_(h)

    draws = [
        torch.from_numpy(random.choice(len(weights), batch, p=weights))
        for _ in range(options.runs + 1)
    ]
    for ids in draws[:5]:
        for graph in graphs.values():
            graph.prepared(ids)()
        for name, graph in graphs.items():
            if not torch.equal(graph.output, graphs["resident"].output):
                raise RuntimeError(f"{name}: expected the bits of the resident table, got others")
    earlier = {name: runtime.counts[0] for name, runtime in runtimes.items()}
    candidates = {
        name: lambda run, graph=graph: graph.prepared(draws[run]) for name, graph in graphs.items()
    }
    seconds = interleaved_seconds(
        candidates, clock=clock_of(device), runs=options.runs, budget_seconds=options.budget
    )
    line = {"batch": batch, "before": before, "hot": hot, "results": {}}
    for name, times in seconds.items():
        result = dataclasses.asdict(summarize(times))
        if name in runtimes:
            pairs = list(zip(times, seconds["resident"], strict=False))
            result["exposed"] = statistics.median(a - b for a, b in pairs)
            result["ratio"] = dataclasses.asdict(paired_ratio(times, seconds["resident"]))
            counts = dataclasses.asdict(runtimes[name].counts[0])
            result["a_step"] = {
                field: (value - getattr(earlier[name], field)) / (len(times) + 1)
                for field, value in counts.items()
            }
        line["results"][name] = result
    for runtime in runtimes.values():
        runtime.close()
    return line


def lines(line):
    """A result as text."""
    head = f"batch {line['batch']}, after {line['before']} layers, {100 * line['hot']:.0f} % hot"
    for name, result in line["results"].items():
        text = (
            f"{head}: {name:<20} {1e6 * result['median']:9.1f} us ({1e6 * result['p10']:.1f} to "
            f"{1e6 * result['p90']:.1f}, {result['runs']} runs)"
        )
        if "exposed" in result:
            ratio, step = result["ratio"], result["a_step"]
            text += (
                f", exposed {1e6 * result['exposed']:.1f} us, ratio {ratio['median']:.3f} "
                f"({ratio['low']:.3f} to {ratio['high']:.3f}); a step: {step['resident']:.1f} "
                f"tokens resident, {step['fetched']:.1f} fetched ({step['fetched_bytes'] / 1e6:.3f}"
                f" MB), {step['left']:.1f} left"
            )
        yield text


def main() -> None:
    """Print a line for every batch, place and share, and write all as JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--batch", type=int, nargs="+", default=[1, 8, 300])
    add("--before", type=int, nargs="+", default=[1, 4], help="layers before the lookup layer")
    add("--hot", type=float, nargs="+", default=[0.0, 0.2], help="share of the table on the device")
    add("--layers", type=int, default=8)
    add("--vocab", type=int, default=32768)
    add("--rows", type=int, default=4, help="rows of the table for each id of the vocabulary")
    add("--d-in", type=int, default=2048)
    add("--d-emb", type=int, default=1024)
    add("--dtype", default="bfloat16")
    add("--runs", type=int, default=100)
    add("--budget", type=float, default=2.0, help="seconds for each line")
    add("--output", type=Path)
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    random = np.random.default_rng(0)
    weights = 1 / np.arange(1, options.vocab + 1)
    weights /= weights.sum()
    rows = np.clip(options.rows * options.vocab * weights, 1, 512).astype(np.int64)
    owners = l3ext.Allocation.from_rows(rows, frequency=(1e9 * weights).astype(np.int64))
    torch.manual_seed(0)
    width = options.d_in + options.d_emb
    table = torch.empty(int(rows.sum()), width, dtype=dtype).normal_(std=0.02)
    result = {
        "machine": machine.describe(torch.device(options.device)),
        "settings": {name: str(value) for name, value in vars(options).items()},
        "lines": [],
    }
    with torch.no_grad():
        for before in options.before:
            for hot in options.hot:
                for batch in options.batch:
                    line = compare(options, batch, before, hot, table, owners, random, weights)
                    result["lines"].append(line)
                    print("\n".join(lines(line)), flush=True)
                    if options.output is not None:  # each time: what comes after may be stopped
                        with atomic_path(options.output) as temporary:
                            temporary.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
