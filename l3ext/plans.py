"""The plan of a step: which positions share a token, and which rows that token owns."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from l3ext import _C
from l3ext._arrays import as_tensor, host_integers
from l3ext._checks import integer
from l3ext._operators import as_device, check_device, kernel, library, queue

library.define(
    "plan(Tensor token_ids, Tensor offsets, bool check_offsets) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
library.define(
    "schedule(Tensor segment_queries, Tensor segment_rows, Tensor num_segments) -> Tensor"
)


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """The positions of one step, sorted by token id and cut into segments of equal ids.

    Depends on the token ids alone: one plan serves every layer of the step and both directions.
    Its arrays have a fixed size, N positions, whatever the number S of segments; entries past S
    are padding (no queries, no rows, token -1). All lie on one device, where attention runs.
    """

    permutation: Tensor  #: int32 [N], sorted position -> original flat position; stable
    segment_tokens: Tensor  #: int32 [N], the token id of each segment, ascending
    segment_queries: Tensor  #: int32 [N+1], first sorted position of each segment
    segment_rows: Tensor  #: int64 [N, 2], first row and one past the last row of each segment
    num_segments: Tensor  #: int32 [1], S
    table_rows: Tensor  #: int64 [1], rows that the table must have; -1: any
    schedule: Tensor  #: int32 [16 + 7N] on CUDA, the order of its work; [0] on the CPU; opaque
    max_rows: int  #: no segment has more rows; -1: not known (a CPU plan made by compiled code)

    @property
    def num_tokens(self) -> int:
        """N, the number of positions."""
        return self.permutation.shape[0]

    def with_rows(self, segment_rows: Tensor, *, max_rows: int | None = None) -> Plan:
        """The same plan over a table that holds the segments' rows elsewhere.

        Args:
            segment_rows: int64 [>= S, 2], first row and one past the last row of each segment.
            max_rows: the most rows of a segment; None: as many as before.
        """
        if not isinstance(segment_rows, Tensor):
            raise TypeError(
                f"segment_rows: expected a torch.Tensor, got {type(segment_rows).__name__}"
            )
        schedule = self.schedule
        if schedule.numel() > 0:  # other numbers of rows are other work
            schedule = torch.ops.l3ext.schedule(
                self.segment_queries, segment_rows, self.num_segments
            )
        return dataclasses.replace(
            self,
            segment_rows=segment_rows,
            table_rows=torch.full_like(self.table_rows, -1),
            schedule=schedule,
            max_rows=self.max_rows if max_rows is None else integer(max_rows, "max_rows", 0),
        )

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Plan:
        """The plan on another device, the same as one made there.

        So a data loader can plan its batches ahead on the CPU.

        Args:
            device: where attention will run.
            non_blocking: do not wait for the copies, which needs :meth:`pin_memory` before.

        Raises:
            RuntimeError: a device that this build has no kernels for.
            ValueError: ``max_rows`` is not known, and the device needs it.
        """
        place = as_device(device, "device")
        check_device(place, "device")
        if place.type != "cpu" and self.max_rows < 0:
            raise ValueError(
                f"max_rows: a plan for {place} must know it, got a plan made by compiled code "
                "without it: pass max_rows to plan()"
            )
        arrays = {
            field.name: getattr(self, field.name).to(place, non_blocking=non_blocking)
            for field in dataclasses.fields(self)
            if field.name not in ("schedule", "max_rows")
        }
        schedule = torch.ops.l3ext.schedule(
            arrays["segment_queries"], arrays["segment_rows"], arrays["num_segments"]
        )
        return Plan(**arrays, schedule=schedule, max_rows=self.max_rows)

    def pin_memory(self) -> Plan:
        """The plan in pinned host memory; ``DataLoader(pin_memory=True)`` calls it."""
        arrays = {
            field.name: getattr(self, field.name).pin_memory()
            for field in dataclasses.fields(self)
            if field.name != "max_rows"
        }
        return Plan(**arrays, max_rows=self.max_rows)

    def check(self) -> None:
        """Look for what :func:`plan` cannot report from a device; waits for the device.

        Attention yields NaN at positions whose id is outside the vocabulary.

        Raises:
            ValueError: an id outside the vocabulary, naming the first position that has one; or a
                token that owns more than ``max_rows`` rows, which yields NaN as well.
        """
        segments = int(self.num_segments)
        outside = self.segment_tokens[:segments] < 0
        if outside.any():
            # Positions with such ids come last, whatever their number.
            first = int(self.segment_queries[:segments][outside].min())
            raise ValueError(
                "token_ids: expected ids in the vocabulary of the offsets, got one outside at "
                f"position {int(self.permutation[first:].min())}"
            )
        rows = torch.diff(self.segment_rows[:segments], dim=1).flatten()
        if self.max_rows >= 0 and (rows > self.max_rows).any():
            segment = int(rows.argmax())
            raise ValueError(
                f"max_rows: expected at least {int(rows[segment])}, the rows of token "
                f"{int(self.segment_tokens[segment])}, got {self.max_rows}"
            )

    def _arrays(self) -> tuple[Any, ...]:
        """As the operators take it: ``PLAN``."""
        return tuple(getattr(self, name) for name in _FIELDS)

    @functools.cached_property
    def _is_plain(self) -> bool:
        """Whether its arrays are torch's own tensors, none of a subclass (fake, a wrapper)."""
        return all(type(array) is Tensor for array in self._arrays()[:-1])


_FIELDS = tuple(field.name for field in dataclasses.fields(Plan))


def plan(
    token_ids: Tensor | np.ndarray | Sequence[int],
    offsets: Tensor | np.ndarray,
    *,
    max_rows: int | None = None,
) -> Plan:
    """Sort the positions of a step by token id.

    On CUDA everything is enqueued on the current stream, and captured with it: the plan of a
    replayed graph is that of the ids which then lie in ``token_ids``.

    Args:
        token_ids: integer array of any shape with N elements, on the device that will compute.
        offsets: int64 [V+1]; token ``t`` owns rows ``offsets[t]`` to ``offsets[t+1]`` of a table
            with ``offsets[V]`` rows. A tensor on the device of the ids; a NumPy array is copied
            there.
        max_rows: the most rows that any token owns, or more. None: read from ``offsets``, for
            which a tensor on a device is waited for; on the meta device, inside a graph capture,
            or compiled for CUDA, it must be given.

    Returns:
        The plan for the N positions in flat (row-major) order.

    Raises:
        ValueError: an id outside [0, V) (says which position), or offsets that do not start at 0
            or that fall. On CUDA neither is looked for: see :meth:`Plan.check`.
        TypeError: ids that are no integers, offsets that are not int64 or lie elsewhere.
        RuntimeError: a device that this build has no kernels for, or no ``max_rows`` where it
            cannot be read.
    """
    ids, table = as_ids(token_ids), as_offsets(offsets)
    most = _most_rows(table, ids.device) if max_rows is None else integer(max_rows, "max_rows", 0)
    if not isinstance(offsets, Tensor):
        table = table.to(ids.device)
    return make_plan(ids, table, max_rows=most, check_offsets=True)


def make_plan(token_ids: Tensor, offsets: Tensor, *, max_rows: int, check_offsets: bool) -> Plan:
    """:func:`plan` of what :func:`as_ids` and :func:`as_offsets` gave."""
    if offsets.device != token_ids.device:  # torch would run what traces, which fills nothing
        raise TypeError(
            f"offsets: expected {token_ids.device}, where the token ids lie, got {offsets.device}"
        )
    arrays = torch.ops.l3ext.plan.default(token_ids.reshape(-1), offsets, check_offsets)
    fields = (*arrays, max_rows)
    return Plan(*fields)


_IDS = "a tensor, a NumPy array or a list of integers"


def as_ids(token_ids: Any) -> Tensor:
    """Token ids of any shape as an int32 or int64 tensor, where they lie."""
    ids = as_tensor(token_ids, "token_ids", _IDS)
    if ids.numel() == 0 and ids.is_floating_point():
        ids = ids.to(torch.int64)  # an empty list has no dtype of its own
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(f"token_ids: expected an integer dtype, got {ids.dtype}")
    check_device(ids.device, "token_ids")
    if ids.dtype in (torch.int32, torch.int64):
        return ids
    if ids.dtype == torch.uint64 and ids.device.type == "cpu":
        host_integers(ids.reshape(-1), "token_ids")  # what int64 does not hold
    return ids.to(torch.int64)


def as_offsets(offsets: Any) -> Tensor:
    """Offsets as a tensor int64 [V+1], without a copy."""
    tensor = offsets if isinstance(offsets, Tensor) else as_tensor(offsets, "offsets", _IDS)
    if tensor.dtype != torch.int64:
        raise TypeError(f"offsets: expected int64, got {tensor.dtype}")
    if tensor.ndim != 1 or tensor.shape[0] < 1:
        raise ValueError(f"offsets: expected shape [V+1], got {list(tensor.shape)}")
    return tensor


def _most_rows(offsets: Tensor, device: torch.device) -> int:
    """The largest difference of ``offsets``; -1 in compiled code for the CPU, which needs none."""
    if offsets.shape[0] == 1:
        return 0
    compiling = torch.compiler.is_compiling()
    if compiling and device.type == "cpu":
        return -1
    if (
        compiling
        or offsets.is_meta
        or (offsets.is_cuda and torch.cuda.is_current_stream_capturing())
    ):
        where = "" if offsets.is_meta else " in compiled code and inside a graph capture"
        raise RuntimeError(
            f"max_rows: expected an int on {device}{where}, where offsets cannot be read, got None"
        )
    return int(torch.diff(offsets).max())


# --- operators ------------------------------------------------------------------------------------
@torch.library.register_fake("l3ext::plan", lib=library)
def _plan_outputs(token_ids: Tensor, offsets: Tensor, check_offsets: bool) -> tuple[Tensor, ...]:
    count = token_ids.shape[0]
    permutation = token_ids.new_empty(count, dtype=torch.int32)
    segment_queries = permutation.new_empty(count + 1)
    segment_rows = token_ids.new_empty(count, 2, dtype=torch.int64)
    return (
        permutation,
        permutation.new_empty(count),
        segment_queries,
        segment_rows,
        permutation.new_empty(1),
        segment_rows.new_empty(1),
        _schedule_output(segment_queries),
    )


@kernel("plan")
def _plan(token_ids: Tensor, offsets: Tensor, check_offsets: bool) -> tuple[Tensor, ...]:
    outputs = _plan_outputs(token_ids, offsets, check_offsets)
    inputs = (token_ids.contiguous(), offsets.contiguous(), check_offsets)
    _C.plan(*(*inputs, *outputs, queue(token_ids.device)))
    return outputs


@torch.library.register_fake("l3ext::schedule", lib=library)
def _schedule_output(segment_queries: Tensor, *_: Tensor) -> Tensor:
    on_cpu = segment_queries.device.type == "cpu"
    # As csrc/attention/cuda/schedule.hpp lays it out, which checks it.
    return segment_queries.new_empty(0 if on_cpu else 16 + 7 * (segment_queries.shape[0] - 1))


@kernel("schedule")
def _schedule(segment_queries: Tensor, segment_rows: Tensor, num_segments: Tensor) -> Tensor:
    schedule = _schedule_output(segment_queries)
    arrays = (segment_queries, segment_rows.contiguous(), num_segments, schedule)
    _C.schedule(*arrays, queue(segment_queries.device))
    return schedule
