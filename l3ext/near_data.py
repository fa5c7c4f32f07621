"""Near data: attention of some positions beside the memory that holds their rows.

The rows of a token are megabytes, its query and what it attends to are kilobytes. Where the device
does not hold a token's rows and few positions ask for them, the queries go to the host, which
attends over the table where it lies, and the results come back.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from l3ext.ops import segmented_attention
from l3ext.plans import Plan, as_offsets, make_plan


@dataclasses.dataclass(frozen=True, slots=True)
class NearDataCosts:
    """What the break-even weighs: a token's rows stay in the table where that costs less.

    They do if ``bytes * fetch_us_per_byte > bytes * queries * attend_us_per_byte``, and what all
    such tokens of a layer's step save is more than ``attend_us``.
    """

    fetch_us_per_byte: float  #: of rows that are fetched, waited for
    attend_us: float  #: of attention on the host, whatever the number of positions
    attend_us_per_byte: float  #: of the rows that one query attends to there


#: Near data always: a fetch costs more than anything.
ALWAYS = NearDataCosts(math.inf, 0.0, 0.0)


class HostTable:
    """A table in host memory as attention reads it, where it lies.

    Args:
        rows: keys and values; of quantised rows their scales too.
        offsets: int64 [V+1], which rows each token owns.
    """

    def __init__(self, rows: tuple[Tensor, ...], offsets: np.ndarray) -> None:
        self.keys, self.values, *scales = rows
        self.key_scales, self.value_scales = scales or (None, None)
        self.plan_offsets = as_offsets(offsets)
        self._max_rows = int(np.diff(offsets).max(initial=0))

    def plan(self, token_ids: Tensor) -> Plan:
        """The plan of these token ids, on the host, over this table."""
        return make_plan(token_ids, self.plan_offsets, max_rows=self._max_rows, check_offsets=False)


class NearPositions:
    """The positions of a step that attend beside one layer's table.

    Args:
        table: that holds their rows.
        plan: of the whole step, on the host.
        segments: int64, those of the plan whose rows stay in the table, ascending, at least one.
        device: where all other positions attend.
    """

    def __init__(
        self, table: HostTable, plan: Plan, segments: np.ndarray, device: torch.device
    ) -> None:
        begins = plan.segment_queries.numpy()[segments]
        counts = plan.segment_queries.numpy()[segments + 1] - begins
        # The segments' queries one after the other, as they lie among the sorted positions.
        shift = np.repeat(begins - (np.cumsum(counts) - counts), counts)
        order = torch.from_numpy(shift + np.arange(counts.sum()))
        tokens = np.repeat(plan.segment_tokens.numpy()[segments], counts)
        self._table = table
        self._plan = table.plan(torch.from_numpy(tokens))
        self.indices = plan.permutation[order].to(torch.int64)  #: int64, on the device
        if device.type != "cpu":
            self.indices = self.indices.pin_memory().to(device, non_blocking=True)
        self._step_tokens = plan.num_tokens
        self.are_all = self._plan.num_tokens == plan.num_tokens  #: no other position attends

    def queries(self, x: Tensor) -> Tensor:
        """These positions' rows of ``x`` [N, d_in], on the host; waits for the device."""
        if x.shape[0] != self._step_tokens:
            raise ValueError(
                f"x: expected {self._step_tokens} rows, one per planned token, got {x.shape[0]}"
            )
        return x.index_select(0, self.indices).to("cpu")

    def attend(self, queries: Tensor, scale: float, y: Tensor) -> Tensor:
        """Attend on the host and put the results into their places of ``y`` [N, d_emb]."""
        table = self._table
        near = segmented_attention(
            queries,
            table.keys,
            table.values,
            self._plan,
            scale,
            key_scales=table.key_scales,
            value_scales=table.value_scales,
        )
        return y.index_copy_(0, self.indices, near.to(y.device))


def measure_attention(table: HostTable, device: torch.device) -> tuple[float, float]:
    """``attend_us`` and ``attend_us_per_byte`` of :class:`NearDataCosts`, in some 15 ms."""
    rows = np.diff(table.plan_offsets.numpy())
    owners = np.argsort(rows, kind="stable")[np.searchsorted(np.sort(rows), 1) :]
    if owners.size == 0:
        return 0.0, 0.0
    few, many = owners[:1], owners[-8:]
    row_bytes = table.keys.stride(0) * table.keys.element_size()
    least, most = (
        _median_us(functools.partial(_attend_once, table, tokens, device), seconds=0.007)
        for tokens in (few, many)
    )
    more_bytes = int(rows[many].sum() - rows[few].sum()) * row_bytes
    return least, max(0.0, most - least) / more_bytes if more_bytes > 0 else 0.0


def _attend_once(table: HostTable, tokens: np.ndarray, device: torch.device) -> None:
    ids = torch.from_numpy(tokens)
    plan = table.plan(ids)
    positions = NearPositions(table, plan, np.arange(int(plan.num_segments)), device)
    dtype = torch.float32 if table.key_scales is not None else table.keys.dtype
    x = torch.zeros(len(tokens), table.keys.shape[1], dtype=dtype, device=device)
    y = torch.empty(len(tokens), table.values.shape[1], dtype=dtype, device=device)
    positions.attend(positions.queries(x), 1.0, y)
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _median_us(run: Callable[[], None], *, seconds: float) -> float:
    run()  # warms up
    times: list[float] = []
    end = time.perf_counter() + seconds
    while not times or time.perf_counter() < end:
        begin = time.perf_counter()
        run()
        times.append((time.perf_counter() - begin) * 1e6)
    return statistics.median(times)
