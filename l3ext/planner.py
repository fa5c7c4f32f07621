"""What a table would cost to serve: bytes a step, time on the link, and what a hot set saves.

A corpus is counted once; any number of tables can then be compared before one is trained:

>>> import numpy as np, l3ext
>>> from l3ext.planner import Link, RowFormat, plan_tables
>>> from l3ext.step_sampler import StepSampler, StepShape
>>> tokens = np.random.default_rng(0).zipf(1.5, 10_000) % 100
>>> counter = l3ext.LZWCounter(100)
>>> counter.update(tokens)
>>> sampler = StepSampler([StepShape("decode", 8)], steps=200, seed=0)
>>> sampler.add(tokens)
>>> (table,) = plan_tables(
...     counter, sampler.samples(), sizes=[(400, 64)], formats=[RowFormat(64, 32, "bfloat16")],
...     link=Link(gigabytes_per_second=55, window_ms=0.1),
... )
>>> table.table_bytes, table.steps[0].transfers[0].fits
(76800, True)

Everything is for one lookup layer. What a step moves is the rows of its distinct tokens, each
once, less those of the hot set; its time on the link is these bytes at full bandwidth, without the
latency of a copy.
"""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from l3ext._checks import all_of, check_kind, integer, number
from l3ext.step_sampler import StepSample, StepShape

if TYPE_CHECKING:
    from l3ext.allocation import Allocation, LZWCounter

# One float32 scale for the keys and one for the values, in a row that stays 16-byte aligned.
SCALE_BYTES = 16
_ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8": 1, "int8": 1}
_SCALED = ("float8", "int8")


# --- what is asked ------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class RowFormat:
    """How a row is stored: a key of d_in numbers and a value of d_emb.

    Attributes:
        d_in: width of keys.
        d_emb: width of values; equal to d_in where tied.
        dtype: float32, bfloat16, float16, float8 or int8; the last two with 16 bytes of scales.
        tied: the key is the value, and stored once.
    """

    d_in: int
    d_emb: int
    dtype: str
    tied: bool = False

    def __post_init__(self) -> None:
        integer(self.d_in, "d_in")
        integer(self.d_emb, "d_emb")
        if self.d_in < 1 or self.d_emb < 1:
            raise ValueError(f"width: expected at least 1+1, got {self.d_in}+{self.d_emb}")
        if self.tied and self.d_in != self.d_emb:
            raise ValueError(f"tied: expected d_in = d_emb, got {self.d_in} and {self.d_emb}")
        if not isinstance(self.dtype, str) or self.dtype not in _ELEMENT_BYTES:
            raise ValueError(
                f"dtype: expected one of {', '.join(_ELEMENT_BYTES)}, got {self.dtype!r}"
            )

    @property
    def row_bytes(self) -> int:
        """Bytes of one row, its scales included."""
        elements = self.d_in if self.tied else self.d_in + self.d_emb
        scales = SCALE_BYTES if self.dtype in _SCALED else 0
        return elements * _ELEMENT_BYTES[self.dtype] + scales

    def __str__(self) -> str:
        width = f"{self.d_in} tied" if self.tied else f"{self.d_in}+{self.d_emb}"
        return f"{width} {self.dtype}"


@dataclasses.dataclass(frozen=True)
class Link:
    """What rows come over, and the time that they have.

    Attributes:
        gigabytes_per_second: bandwidth in 10^9 bytes a second, above 0.
        window_ms: compute of the step before the lookup layer, in milliseconds, at least 0.
    """

    gigabytes_per_second: float
    window_ms: float

    def __post_init__(self) -> None:
        number(self.gigabytes_per_second, "gigabytes_per_second")
        number(self.window_ms, "window_ms")
        if not 0 < self.gigabytes_per_second < float("inf"):
            raise ValueError(f"link: expected GB/s above 0, got {self.gigabytes_per_second}")
        if not 0 <= self.window_ms < float("inf"):
            raise ValueError(f"window: expected at least 0 ms, got {self.window_ms}")

    def milliseconds(self, nbytes: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """Time that ``nbytes`` take on the link."""
        return nbytes / (self.gigabytes_per_second * 1e6)


# --- what it costs ------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class HotSet:
    """The tokens whose rows stay in fast memory, chosen as the prefetch runtime chooses them."""

    label: str  #: what was asked for: "none", "memory", "10 %"
    budget_bytes: int
    tokens: int
    rows: int
    bytes: int  #: at most the budget
    traffic_share: float  #: of the rows that the corpus' tokens read, each token by itself


@dataclasses.dataclass(frozen=True)
class Transfer:
    """What one kind of step moves over the link beside a hot set. p99: no more in 99 % of steps."""

    hot_set: str  #: its label
    bytes_mean: float
    bytes_p99: int
    link_ms_mean: float
    link_ms_p99: float
    exposed_ms_mean: float  #: time on the link beyond the window
    exposed_ms_p99: float
    fits: bool  #: the p99 is within the window


@dataclasses.dataclass(frozen=True)
class StepCost:
    """One kind of step: the rows of its distinct tokens, and what of them moves."""

    shape: StepShape
    rows_mean: float
    rows_p99: int
    transfers: list[Transfer]  #: by hot set, as in TableCost.hot_sets


@dataclasses.dataclass(frozen=True)
class TableCost:
    """One choice of v, k and format."""

    total_rows: int
    max_rows: int  #: as asked for
    format: RowFormat
    row_bytes: int
    table_bytes: int
    hot_sets: list[HotSet]
    steps: list[StepCost]


def plan_tables(
    counter: LZWCounter,
    samples: Mapping[StepShape, StepSample],
    *,
    sizes: Sequence[tuple[int, int]],
    formats: Sequence[RowFormat],
    link: Link,
    memory_bytes: int | None = None,
    hot_shares: Sequence[float] = (0.05, 0.1, 0.2),
) -> list[TableCost]:
    """What every size in every format costs; each size is granted once.

    Args:
        counter: the counted corpus.
        samples: steps of the same corpus, of ``StepSampler``.
        sizes: (total_rows, max_rows) of the tables.
        formats: of their rows.
        link: bandwidth and window.
        memory_bytes: a budget for the hot set, or None.
        hot_shares: further budgets, as shares of the table, each 0 to 1.

    Raises:
        ValueError: nothing was counted, an id outside the vocabulary, or a size out of range.
        TypeError: an argument of another kind.
    """
    from l3ext.allocation import LZWCounter

    check_kind(counter, LZWCounter, "counter")
    check_kind(samples, Mapping, "samples")
    check_kind(link, Link, "link")
    formats = all_of(formats, RowFormat, "formats")
    sizes = [_size(size, i) for i, size in enumerate(all_of(sizes, Iterable, "sizes"))]
    hot_shares = [
        number(share, "hot_shares") for share in all_of(hot_shares, numbers.Real, "hot_shares")
    ]
    if memory_bytes is not None:
        memory_bytes = integer(memory_bytes, "memory_bytes")
    if counter.num_tokens == 0:
        raise ValueError("counter: expected a counted corpus, got one of 0 tokens")
    for shape, sample in samples.items():
        if sample.ids.min() < 0 or sample.ids.max() >= counter.vocab_size:
            raise ValueError(
                f"samples: expected ids in [0, {counter.vocab_size}), got "
                f"{sample.ids.min()} to {sample.ids.max()} in {shape}"
            )
    if memory_bytes is not None and memory_bytes < 0:
        raise ValueError(f"memory_bytes: expected at least 0, got {memory_bytes}")
    for share in hot_shares:
        if not 0 <= share <= 1:
            raise ValueError(f"hot_shares: expected 0 to 1, got {share}")
    costs = []
    for total_rows, max_rows in sizes:
        allocation = counter.allocate(total_rows, max_rows)
        order = hot_order(allocation)
        for format in formats:
            size = (total_rows, max_rows)
            budgets = {"none": 0}
            if memory_bytes is not None:
                budgets["memory"] = memory_bytes
            for share in hot_shares:
                budgets[f"{100 * share:g} %"] = int(share * total_rows) * format.row_bytes
            costs.append(_cost(allocation, order, size, format, budgets, samples, link))
    return costs


def _size(size: Iterable[int], i: int) -> tuple[int, int]:
    given = [integer(number, f"sizes[{i}]") for number in size]
    if len(given) != 2:
        raise ValueError(f"sizes[{i}]: expected total_rows and max_rows, got {len(given)} numbers")
    return given[0], given[1]


def hot_order(allocation: Allocation) -> npt.NDArray[np.int64]:
    """Token ids in the order in which a hot set takes them: int64 [V].

    Keeping a token costs its rows and saves frequency x rows, so the benefit per byte is the
    frequency; ties, and unknown frequencies, by rows owned, then by id. The prefetch runtime's
    rule, ``csrc/runtime/hot_set.hpp``.
    """
    from l3ext.allocation import Allocation

    check_kind(allocation, Allocation, "allocation")
    rows = allocation.rows.astype(np.int64)
    seen = allocation.frequency
    frequency = np.zeros_like(rows) if seen is None else seen
    return np.lexsort((-rows, -frequency))


def choose_hot_set(
    allocation: Allocation, order: npt.NDArray[np.int64], budget_rows: int
) -> npt.NDArray[np.bool_]:
    """Which tokens a hot set of ``budget_rows`` holds, bool [V]: in order, each that still fits."""
    from l3ext.allocation import Allocation

    check_kind(allocation, Allocation, "allocation")
    check_kind(order, np.ndarray, "order")
    budget_rows = integer(budget_rows, "budget_rows")
    rows = allocation.rows.astype(np.int64)
    hot = np.zeros(rows.size, bool)
    left = budget_rows
    while order.size:
        order = order[rows[order] <= left]  # the others never fit again
        taken = int(np.searchsorted(np.cumsum(rows[order]), left, side="right"))
        hot[order[:taken]] = True
        left -= int(rows[order[:taken]].sum())
        order = order[taken + 1 :]
    return hot


def _cost(
    allocation: Allocation,
    order: npt.NDArray[np.int64],
    size: tuple[int, int],
    format: RowFormat,
    budgets: Mapping[str, int],
    samples: Mapping[StepShape, StepSample],
    link: Link,
) -> TableCost:
    rows = allocation.rows.astype(np.int64)
    assert allocation.frequency is not None  # a counter's allocation has it
    traffic = allocation.frequency * rows
    hot_sets = []
    moved: dict[StepShape, list[Transfer]] = {shape: [] for shape in samples}
    for label, budget in budgets.items():
        hot = choose_hot_set(allocation, order, budget // format.row_bytes)
        hot_rows = int(rows[hot].sum())
        hot_sets.append(
            HotSet(
                label=label,
                budget_bytes=budget,
                tokens=int(hot.sum()),
                rows=hot_rows,
                bytes=hot_rows * format.row_bytes,
                traffic_share=float(traffic[hot].sum() / traffic.sum()),
            )
        )
        cold_rows = np.where(hot, 0, rows)
        for shape, sample in samples.items():
            nbytes = sample.rows(cold_rows) * format.row_bytes
            moved[shape].append(_transfer(label, nbytes, link))
    steps = []
    for shape, sample in samples.items():
        step_rows = sample.rows(rows)
        steps.append(StepCost(shape, float(step_rows.mean()), int(_p99(step_rows)), moved[shape]))
    return TableCost(
        total_rows=size[0],
        max_rows=size[1],
        format=format,
        row_bytes=format.row_bytes,
        table_bytes=size[0] * format.row_bytes,
        hot_sets=hot_sets,
        steps=steps,
    )


def _transfer(label: str, nbytes: npt.NDArray[np.int64], link: Link) -> Transfer:
    milliseconds = link.milliseconds(nbytes)
    exposed = np.maximum(0.0, milliseconds - link.window_ms)
    return Transfer(
        hot_set=label,
        bytes_mean=float(nbytes.mean()),
        bytes_p99=int(_p99(nbytes)),
        link_ms_mean=float(milliseconds.mean()),
        link_ms_p99=float(_p99(milliseconds)),
        exposed_ms_mean=float(exposed.mean()),
        exposed_ms_p99=float(_p99(exposed)),
        fits=bool(_p99(milliseconds) <= link.window_ms),
    )


def _p99(values: npt.NDArray[Any]) -> Any:
    """The smallest of the values that 99 % of them do not exceed."""
    return np.percentile(values, 99, method="inverted_cdf")
