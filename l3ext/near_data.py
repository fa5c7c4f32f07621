"""Near data: attention of some positions beside the memory that holds their rows.

The rows of a token are megabytes, its query and what it attends to are kilobytes. Where the device
does not hold a token's rows and few positions ask for them, the queries go to the host, which
attends over the table where it lies, and the results come back.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

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


#: Near data always: a fetch costs more than anything. And never: it costs nothing.
ALWAYS = NearDataCosts(math.inf, 0.0, 0.0)
NEVER = NearDataCosts(0.0, 0.0, 0.0)


class HostTable:
    """A table in host memory as attention reads it, where it lies.

    Args:
        rows: keys and values; of quantised rows their scales too.
        offsets: int64 [V+1], which rows each token owns.
    """

    def __init__(self, rows: tuple[Tensor, ...], offsets: np.ndarray) -> None:
        self.keys, self.values, *scales = rows
        self.key_scales: Tensor | None = scales[0] if scales else None
        self.value_scales: Tensor | None = scales[1] if scales else None
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


def costs_of(
    fetched: Sequence[tuple[int, float]], near: Sequence[tuple[int, float]], layers: int
) -> NearDataCosts:
    """What whole steps took either way, as the break-even weighs it.

    Args:
        fetched: (bytes, µs) of steps that fetched so many.
        near: the same of steps that left so many where they are, a query for each token.
        layers: of a step.
    """
    fetch_us, fetch_us_per_byte = _line(fetched)
    attend_us, attend_us_per_byte = _line(near)
    more_us = max(0.0, attend_us - fetch_us) / layers
    return NearDataCosts(fetch_us_per_byte, more_us, attend_us_per_byte)


def _line(samples: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """(µs at 0 bytes, µs a byte, not below 0), past outliers: the median of all slopes (Theil)."""
    if not samples:
        return 0.0, 0.0
    nbytes, us = np.array(samples, dtype=np.float64).T
    first, second = np.triu_indices(len(us), 1)
    apart = nbytes[first] != nbytes[second]
    first, second = first[apart], second[apart]
    if first.size == 0:
        return 0.0, float(np.median(us / nbytes))
    slopes = (us[first] - us[second]) / (nbytes[first] - nbytes[second])
    slope = max(0.0, float(np.median(slopes)))
    return max(0.0, float(np.median(us - slope * nbytes))), slope
