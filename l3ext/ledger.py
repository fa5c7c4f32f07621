"""What the steps of a prefetch runtime cost: per step and layer, and in all."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator

from l3ext import _C
from l3ext._checks import file_path


@dataclasses.dataclass(frozen=True, slots=True)
class LayerRecord:
    """What one layer of one step cost.

    Times are µs since the runtime was made; 0: did not happen.
    """

    tokens: int  #: distinct tokens
    rows: int  #: that they own
    bytes: int  #: fetched from the table; of a step that ended early, what was begun
    hits: int  #: tokens found in the hot set
    hit_bytes: int  #: of their rows
    reused: int  #: tokens whose rows an earlier step had fetched, and the ring still held
    reused_bytes: int  #: of their rows
    in_place_bytes: int  #: of the rows that are read where the table lies
    near: int  #: tokens whose positions attend on the host, beside the table
    near_bytes: int  #: of their rows, which are not fetched
    spilled: bool  #: the ring was full: the step had a buffer of its own for this layer
    cancelled: bool  #: the step ended before all rows were there
    fetch_us: float  #: from the first worker's start to the last one's end
    exposed_us: float  #: the part of it that somebody waited for
    fetch_begin_us: float
    fetch_end_us: float
    wait_begin_us: float
    wait_end_us: float


@dataclasses.dataclass(frozen=True, slots=True)
class StepRecord:
    """One step, from ``begin`` to ``end``."""

    step: int
    begin_us: float
    end_us: float
    layers: list[LayerRecord]


@dataclasses.dataclass(frozen=True, slots=True)
class LedgerTotals:
    """Sums over the layers of all steps that have ended."""

    steps: int
    tokens: int
    rows: int
    bytes: int
    hits: int
    hit_bytes: int
    reused: int
    reused_bytes: int
    in_place_bytes: int
    near: int
    near_bytes: int
    spilled: int  #: layers of steps that had a buffer of their own
    fetch_us: float
    exposed_us: float


class Ledger:
    """What the steps of a runtime cost. Steps are entered when they end.

    Its length and what it iterates over are those of :attr:`steps`. Asked in a forked child, every
    method is a ``RuntimeError``: the ledger is its parent's.
    """

    def __init__(self, native: _C.Ledger) -> None:
        self._native = native

    @property
    def steps(self) -> list[StepRecord]:
        """The last ``record_steps`` steps, oldest first."""
        return [
            StepRecord(**{**step, "layers": [LayerRecord(**layer) for layer in step["layers"]]})
            for step in self._native.steps()
        ]

    def __iter__(self) -> Iterator[StepRecord]:
        return iter(self.steps)

    def __len__(self) -> int:
        return len(self._native.steps())

    def __repr__(self) -> str:
        return f"Ledger({len(self)} steps kept, {self.totals})"

    @property
    def totals(self) -> LedgerTotals:
        """Sums over all steps, also those no longer kept."""
        return LedgerTotals(**self._native.totals())

    def clear(self) -> None:
        """Forget everything so far."""
        self._native.clear()

    def to_chrome_trace(self, path: str | os.PathLike[str]) -> None:
        """Write the kept steps for chrome://tracing or Perfetto: fetch, wait and compute lanes."""
        self._native.write_chrome_trace(file_path(path))
