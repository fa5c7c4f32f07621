"""Where the time of a plan, a forward, a backward and a decode step goes, kernel by kernel.

The calls of ``l3ext bench attention``, by themselves and not in graphs, on its workload by Zipf's
law and after its flush of the second-level cache, under torch.profiler: backward of packed rows;
decode with its plan. A table for each call, of what it ran on the device: microseconds a call and
their share of its span (first start to last end), launches a call, one launch's median, grid,
block, registers and shared memory. *Idle* is what of the span nothing ran in; *late*, how much of
that the host was to blame for: it had not launched yet what came next. A profiler costs time: what
a call takes, ``l3ext bench`` says. On the CPU the operators are profiled: that tells nothing about
a device.
"""

from __future__ import annotations

import argparse
import bisect
import dataclasses
import json
import re
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from l3ext._files import atomic_path
from l3ext.bench import machine
from l3ext.bench.attention import REGIMES, Bench, Options
from l3ext.bench.workload import from_zipf

WIDTH = 110  # of a printed line
CALL = "profiled call"  # the annotation around each
CPU = {"num_tokens": [512], "batch": [1, 8], "vocab_size": 2000, "total_rows": 6000, "d_in": 128,
       "d_emb": 64, "dtype": "float32"}  # fmt: skip
CUDA = {"num_tokens": [16384, 65536], "batch": [1, 8, 300], "vocab_size": 180_000,
        "total_rows": 710_000, "d_in": 2048, "d_emb": 1024, "dtype": "bfloat16"}  # fmt: skip


# --- what a profiler recorded ---------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class Event:
    """A kernel, copy or memset on a device, or an operator on the CPU; times in microseconds."""

    name: str
    start: float
    end: float
    launched: float | None = None  #: when the host did; None: it is not known
    grid: tuple[int, ...] | None = None
    block: tuple[int, ...] | None = None
    registers: int | None = None  #: of a thread
    shared_bytes: int | None = None  #: of a block, static and dynamic


def events_of(trace, device_type):
    """(events, windows): what ran, and the host's begin and end of every annotated call.

    ``trace`` is what export_chrome_trace() writes. On the CPU an operator's own operators count as
    its time.
    """
    complete = [event for event in trace["traceEvents"] if event.get("ph") == "X"]
    complete.sort(key=lambda event: (event["ts"], -event["dur"]))
    windows = [
        (event["ts"], event["ts"] + event["dur"])
        for event in complete
        if event.get("cat") == "user_annotation" and event["name"] == CALL
    ]
    if device_type == "cpu":
        events = []
        ends = {}  # thread to the end of its last outermost operator
        for event in complete:
            end = event["ts"] + event["dur"]
            if event.get("cat") == "cpu_op" and end > ends.get(event["tid"], 0):
                ends[event["tid"]] = end
                events.append(Event(event["name"], event["ts"], end, event["ts"]))
        return events, windows
    launches = {
        event["args"]["correlation"]: event["ts"]
        for event in complete
        if event.get("cat") in ("cuda_runtime", "cuda_driver")
        and "correlation" in event.get("args", {})
    }
    events = []
    for event in complete:
        if event.get("cat") not in ("kernel", "gpu_memcpy", "gpu_memset"):
            continue
        args = event.get("args", {})
        events.append(
            Event(
                event["name"],
                event["ts"],
                event["ts"] + event["dur"],
                launches.get(args.get("correlation")),
                tuple(args["grid"]) if "grid" in args else None,
                tuple(args["block"]) if "block" in args else None,
                args.get("registers per thread"),
                args.get("shared memory"),
            )
        )
    return events, windows


def by_call(events, windows):
    """The events that the host launched in each window; others, as the flush, are left out.

    One without a known launch belongs to the last call that had begun when it started.
    """
    begins = [begin for begin, _ in windows]
    calls = [[] for _ in windows]
    for event in events:
        known = event.launched is not None
        call = bisect.bisect_right(begins, event.launched if known else event.start) - 1
        if call >= 0 and not (known and event.launched > windows[call][1]):
            calls[call].append(event)
    return calls


def occupied(events):
    """(span, idle, late) of one call's events, in microseconds, whatever overlaps."""
    ordered = sorted(events, key=lambda event: event.start)
    end = ordered[0].start
    idle = late = 0.0
    for event in ordered:
        gap = event.start - end
        if gap > 0:
            idle += gap
            if event.launched is not None:
                late += min(gap, max(0.0, event.launched - end))
        end = max(end, event.end)
    return end - ordered[0].start, idle, late


def aggregate(calls):
    """The calls together, as JSON values: medians of span, idle and late, and what ran in them.

    Of each name the launches a call, the median of a launch and of all of a call, that one's share
    of the span, and the shapes that it was launched with. A call of which nothing was recorded does
    not count.
    """
    calls = [call for call in calls if call]
    if not calls:
        raise RuntimeError("profiler: expected kernels in the profiled calls, got none")
    span, idle, late = (
        statistics.median(values) for values in zip(*map(occupied, calls), strict=True)
    )
    kernels = []
    for name in {event.name: None for call in calls for event in call}:
        runs = [[event for event in call if event.name == name] for call in calls]
        every = [event for run in runs for event in run]
        total = statistics.median(sum(event.end - event.start for event in run) for run in runs)
        shapes = {
            (event.grid, event.block, event.registers, event.shared_bytes): None for event in every
        }
        kernels.append(
            {
                "kernel": short_name(name),
                "name": name,
                "launches": len(every) / len(calls),
                "launch_us": statistics.median(event.end - event.start for event in every),
                "total_us": total,
                "share": total / span if span else 0.0,
                "shapes": [
                    dict(zip(("grid", "block", "registers", "shared_bytes"), shape, strict=True))
                    for shape in shapes
                ],
            }
        )
    kernels.sort(key=lambda kernel: -kernel["total_us"])
    return {
        "calls": len(calls),
        "span_us": span,
        "idle_us": idle,
        "late_us": late,
        "kernels": kernels,
    }


# --- for people -----------------------------------------------------------------------------------
def short_name(name):
    """Ours without namespace and arguments, its dtype shortened; a library's by its function."""
    if name.startswith("_Z"):
        name = torch._C._demangle(name)
    signature = name.removeprefix("void ").replace("(anonymous namespace)::", "")
    depth = 0
    parts = [""]  # between the :: that are outside of template arguments
    for i, character in enumerate(signature):
        if character == "(" and depth == 0:
            break
        depth += (character == "<") - (character == ">")
        if depth == 0 and signature[i : i + 2] == "::":
            parts.append("")
        elif depth > 0 or character != ":":
            parts[-1] += character
    else:
        return name  # a C function's, an operator's
    if parts[-1].endswith(" "):
        return name  # Memset (Device)
    if parts[0] == "l3ext":
        types = {"l3ext::BFloat16": "bf16", "l3ext::Float16": "f16", "float": "f32"}
        return re.sub(r"[\w:]+", lambda word: types.get(word[0], word[0]), parts[-1])
    function = parts[-1].partition("<")[0]
    return function if len(parts) == 1 else f"{parts[0]}::{function}"


def lines(measured):
    """A profile as text."""
    yield (
        f"{measured['regime']}, {measured['num_tokens']} tokens: {measured['span_us']:.1f} µs, of "
        f"these {measured['idle_us']:.1f} idle ({measured['late_us']:.1f} late); "
        f"{measured['events_us']:.1f} µs by the clock, {measured['calls']} calls"
    )
    head = f"  {'µs a call':>10} {'share':>6} {'launches':>8} {'µs each':>10} "
    yield head + f"{'grid':>11} {'block':>6} {'regs':>4} {'shared':>7}  kernel"
    for kernel in measured["kernels"]:
        shape, *others = kernel["shapes"]
        line = (
            f"  {kernel['total_us']:10.1f} {100 * kernel['share']:4.0f} % "
            f"{kernel['launches']:8.1f} {kernel['launch_us']:10.1f} "
            f"{_extent(shape['grid']) + ('+' if others else ''):>11} {_extent(shape['block']):>6} "
            f"{_text(shape['registers']):>4} {_text(shape['shared_bytes']):>7}  "
        )
        room, name = WIDTH - len(line), kernel["kernel"]
        yield line + (name if len(name) <= room else name[: room - 1] + "…")


def _extent(sizes):
    """132 of [132, 1, 1]."""
    if sizes is None:
        return ""
    while len(sizes) > 1 and sizes[-1] == 1:
        sizes = sizes[:-1]
    return "x".join(map(str, sizes))


def _text(number):
    return "" if number is None else str(number)


# --- measuring ------------------------------------------------------------------------------------
def measure(bench, regime, size, options):
    """A profile of one regime at one size."""
    candidate = bench.own_call(regime, size)
    activities = [ProfilerActivity.CPU]
    if bench.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)

    def annotated(run):
        call = candidate(run)

        def function():
            with record_function(CALL):
                call()

        return function

    for run in range(4):  # what a step's first call loads and allocates
        bench.clock.measure(candidate(run))
    seconds = []
    with profile(activities=activities) as profiler:
        bench.clock.measure(annotated(0))  # what a first call costs the profiler
        began = time.perf_counter()
        while len(seconds) < options.runs:
            seconds.append(bench.clock.measure(annotated(len(seconds) + 1)))
            if len(seconds) >= 3 and time.perf_counter() - began > options.budget:
                break
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events, windows = events_of(json.loads(path.read_text()), bench.device.type)
    return {
        "regime": regime,
        "num_tokens": size,
        "events_us": 1e6 * statistics.median(seconds),
        **aggregate(by_call(events, windows)[1:]),
    }


def positive(text):
    """A whole number from 1, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, got {text}")
    return int(text)


def main() -> None:
    """Print a table for every regime and size, and write all as JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", choices=("cpu", "cuda"), default=device)
    add("--regime", nargs="+", choices=REGIMES, default=["plan", "forward", "backward", "decode"])
    add("--num-tokens", type=positive, nargs="+", help="of a step; not for decode")
    add("--batch", type=positive, nargs="+", help="tokens of a decode step")
    add("--vocab-size", type=positive)
    add("--total-rows", type=positive)
    add("--d-in", type=positive)
    add("--d-emb", type=positive)
    add("--dtype", choices=("float32", "bfloat16", "float16"))
    add("--runs", type=positive, default=20, help="profiled calls of each")
    add("--budget", type=float, default=2.0, help="seconds for the calls of each")
    add("--output", type=Path)
    options = parser.parse_args()
    for name, value in (CPU if options.device == "cpu" else CUDA).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    workload = from_zipf(
        num_tokens=4 * max(*options.num_tokens, *options.batch),
        vocab_size=options.vocab_size,
        total_rows=options.total_rows,
    )
    place = torch.device(options.device)
    small = {"gemm_size": 256, "copy_bytes": 1 << 20} if place.type == "cpu" else {}
    bench = Bench(
        workload,
        Options(place, getattr(torch, options.dtype), options.d_in, options.d_emb, **small),
    )
    result = {
        "machine": machine.describe(place),
        "settings": {name: str(value) for name, value in vars(options).items()},
        "source": workload.source,
        "table_rows": workload.allocation.total_rows,
        "profiles": [],
    }
    for regime in options.regime:
        for size in options.batch if regime == "decode" else options.num_tokens:
            measured = measure(bench, regime, size, options)
            result["profiles"].append(measured)
            print("\n".join([*lines(measured), ""]), flush=True)
            if options.output is not None:  # each time: what comes after may be stopped
                with atomic_path(options.output) as temporary:
                    temporary.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
