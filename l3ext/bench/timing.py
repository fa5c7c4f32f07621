"""One way to time: interleaved, cold, medians with spread."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping

import torch


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of one candidate: the median of ``runs`` and the 10th and 90th percentile."""

    median: float
    p10: float
    p90: float
    runs: int


def summarize(seconds: list[float]) -> Timing:
    """Median and spread of a list of measurements."""
    ordered = sorted(seconds)
    last = len(ordered) - 1
    return Timing(
        statistics.median(ordered), ordered[round(0.1 * last)], ordered[round(0.9 * last)], last + 1
    )


def time_interleaved(
    candidates: Mapping[str, Callable[[int], object]],
    *,
    runs: int,
    budget_seconds: float = 60.0,
) -> dict[str, Timing]:
    """Time candidates in turn, forth and back, so that a drift of the machine meets all alike.

    Args:
        candidates: name to function of the run's number, which it uses to pick its input: another
            one each run keeps caches cold. Run 0 warms up and is not counted.
        runs: measured runs of each; a candidate that has used its share of the time stops earlier,
            never before 3.
        budget_seconds: for all candidates together.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    share = budget_seconds / max(1, len(candidates))
    for function in candidates.values():
        function(0)
    for run in range(1, runs + 1):
        order = list(candidates)[:: 1 if run % 2 else -1]
        for name in order:
            done = seconds[name]
            if len(done) >= 3 and sum(done) > share:
                continue
            start = time.perf_counter()
            candidates[name](run)
            done.append(time.perf_counter() - start)
    return {name: summarize(values) for name, values in seconds.items()}


def read_bandwidth(megabytes: int = 1024, runs: int = 5) -> float:
    """Bytes a second that all threads together read from memory: a sum over an array."""
    array = torch.ones(megabytes * (1 << 20) // 4)
    timing = time_interleaved({"sum": lambda _: array.sum()}, runs=runs)["sum"]
    return array.numel() * 4 / timing.median


def gemm_rate(dtype: torch.dtype, size: int = 2048, runs: int = 5) -> float:
    """Floating-point operations a second of a square matrix product in ``dtype``."""
    a = torch.randn(size, size).to(dtype)
    b = torch.randn(size, size).to(dtype)
    timing = time_interleaved({"mm": lambda _: a @ b}, runs=runs)["mm"]
    return 2 * size**3 / timing.median
