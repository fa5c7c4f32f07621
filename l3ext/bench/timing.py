"""One way to time, on the CPU and on CUDA: interleaved, cold caches, medians with spread."""

from __future__ import annotations

import dataclasses
import os
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
import torch


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of one candidate: the median of ``runs`` and the 10th and 90th percentile."""

    median: float
    p10: float
    p90: float
    runs: int

    def divided_by(self, count: int) -> Timing:
        """The time of one of ``count`` equal parts of a run."""
        return Timing(self.median / count, self.p10 / count, self.p90 / count, self.runs)


def summarize(seconds: list[float]) -> Timing:
    """Median and spread of a list of measurements."""
    ordered = sorted(seconds)
    last = len(ordered) - 1
    return Timing(
        statistics.median(ordered), ordered[round(0.1 * last)], ordered[round(0.9 * last)], last + 1
    )


@dataclasses.dataclass(frozen=True)
class Ratio:
    """How many times as long as a baseline: the median of paired runs, with its 95 % interval."""

    median: float
    low: float
    high: float


def paired_ratio(
    seconds: list[float], baseline: list[float], *, seed: int = 0, resamples: int = 2000
) -> Ratio:
    """Compare two candidates that were timed in turn, run by run: what drifts meets both.

    Args:
        seconds: of one candidate, run by run.
        baseline: of the other, in the same runs; what one of them has more of is left out.
        seed: of the bootstrap, which draws runs with replacement.
        resamples: how many times.
    """
    runs = min(len(seconds), len(baseline))
    ratios = np.array(seconds[:runs]) / np.array(baseline[:runs])
    drawn = np.random.default_rng(seed).integers(0, runs, (resamples, runs))
    low, high = np.percentile(np.median(ratios[drawn], axis=1), [2.5, 97.5])
    return Ratio(float(np.median(ratios)), float(low), float(high))


class Clock(Protocol):
    """Measures one call of a function."""

    def measure(self, function: Callable[[], object], *, ahead: bool = True) -> float:
        """Seconds that the function takes.

        Args:
            ahead: the host may enqueue the work while the device is still busy with what came
                before, as in training; otherwise it starts when the device is idle, and its own
                time counts. On the CPU there is no difference.
        """


class HostClock:
    """Wall-clock time on the CPU, the caches cold."""

    def __init__(self) -> None:
        # Read between measurements: a large last-level cache would hold the rows of many steps, and
        # keeps some over twice its size.
        self._flush = torch.ones(4 * _last_level_cache_bytes() // 4)

    def measure(self, function: Callable[[], object], *, ahead: bool = True) -> float:
        self._flush.sum()
        start = time.perf_counter()
        function()
        return time.perf_counter() - start


def _last_level_cache_bytes() -> int:
    try:
        return max(os.sysconf("SC_LEVEL3_CACHE_SIZE"), 1 << 25)
    except (ValueError, OSError):  # a system that does not say
        return 1 << 28


class CudaClock:
    """Time between two events of the current stream, the second-level cache cold."""

    def __init__(self, device: torch.device) -> None:
        properties = torch.cuda.get_device_properties(device)
        # Read, not written: dirty lines would be written back in the measured time. Long enough
        # that the host is ahead when the device comes to the work: half a millisecond at 4 TB/s,
        # where a call through autograd may take the host 0.2 ms.
        nbytes = max(4 * properties.L2_cache_size, min(1 << 31, properties.total_memory // 8))
        self._flush = torch.ones(nbytes // 4, device=device)
        self._device = device

    def measure(self, function: Callable[[], object], *, ahead: bool = True) -> float:
        begin = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        self._flush.sum()
        if not ahead:
            torch.cuda.synchronize(self._device)
        begin.record()
        function()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


def clock_of(device: torch.device) -> Clock:
    """The clock of a device."""
    return CudaClock(device) if device.type == "cuda" else HostClock()


#: Gets the number of a run, by which it picks its input, prepares it, and returns what to time.
Candidate = Callable[[int], Callable[[], Any]]


def time_interleaved(
    candidates: Mapping[str, Candidate],
    *,
    clock: Clock,
    runs: int,
    budget_seconds: float = 60.0,
    ahead: bool = True,
) -> dict[str, Timing]:
    """Time candidates in turn and summarise each; as :func:`interleaved_seconds`."""
    seconds = interleaved_seconds(
        candidates, clock=clock, runs=runs, budget_seconds=budget_seconds, ahead=ahead
    )
    return {name: summarize(values) for name, values in seconds.items()}


def interleaved_seconds(
    candidates: Mapping[str, Candidate],
    *,
    clock: Clock,
    runs: int,
    budget_seconds: float = 60.0,
    ahead: bool = True,
) -> dict[str, list[float]]:
    """Time candidates in turn, forth and back, so that a drift of the machine meets all alike.

    Args:
        candidates: by name; another input each run keeps caches cold. Run 0 warms up and is not
            counted.
        clock: of the device that the candidates run on.
        runs: measured runs of each; a candidate that has used its share of the time stops earlier,
            never before 3.
        budget_seconds: for all candidates together.
        ahead: see :meth:`Clock.measure`.

    Returns:
        The seconds of each candidate's runs, in order.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    share = budget_seconds / max(1, len(candidates))
    for candidate in candidates.values():
        clock.measure(candidate(0), ahead=ahead)
    for run in range(1, runs + 1):
        order = list(candidates)[:: 1 if run % 2 else -1]
        for name in order:
            done = seconds[name]
            if len(done) >= 3 and sum(done) > share:
                continue
            done.append(clock.measure(candidates[name](run), ahead=ahead))
    return seconds


def bandwidth(clock: Clock, device: torch.device, *, nbytes: int, runs: int = 9) -> float:
    """Bytes a second of memory: on CUDA read and written by a copy, on the CPU read by a sum.

    Args:
        clock: of the device.
        device: whose memory.
        nbytes: of the array.
        runs: measured; the median counts.
    """
    source = torch.ones(nbytes // 4, device=device)
    if device.type == "cuda":
        target = torch.empty_like(source)
        return 2 * nbytes / _median(lambda: target.copy_(source), clock, runs)
    return nbytes / _median(source.sum, clock, runs)


def gemm_rate(
    clock: Clock, dtype: torch.dtype, device: torch.device, *, size: int, runs: int = 9
) -> float:
    """Floating-point operations a second of a square matrix product in ``dtype``."""
    a = torch.randn(size, size, device=device).to(dtype)
    b = torch.randn(size, size, device=device).to(dtype)
    return 2 * size**3 / _median(lambda: a @ b, clock, runs)


def _median(function: Callable[[], object], clock: Clock, runs: int) -> float:
    return time_interleaved({"": lambda _: function}, clock=clock, runs=runs)[""].median


def captured(function: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """``function`` as one CUDA graph; on the CPU, where there are none, itself."""
    if device.type != "cuda":
        return function
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):  # what happens on a first call only must not be captured
        function()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay
