"""The prefetch runtime: lookup tables that live in RAM or on disk instead of in the model.

The rows of a step follow from its token ids alone. :meth:`PrefetchRuntime.begin` starts to fetch
them for every layer, nearest layer first, while the model computes; :meth:`Step.wait` blocks only
for what is not there yet. What was fetched, and how long anybody waited, is in the ledger.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from l3ext import _C
from l3ext._arrays import Array, from_numpy
from l3ext._checks import check_flags, integer, number, whole_numbers
from l3ext._operators import current_stream
from l3ext._runtimes import (
    ClosedByWith,
    EndedByWith,
    placement_sums,
    runtime_device,
    tables_in_memory,
)
from l3ext.ledger import Ledger
from l3ext.near_data import ALWAYS, NEVER, HostTable, NearDataCosts, NearPositions, costs_of
from l3ext.ops import segmented_attention, touched_rows
from l3ext.plans import Plan, as_ids, as_offsets, make_plan
from l3ext.quantization import QuantizedTable
from l3ext.tables import LookupTable

_DIRECT_IO = {"auto": _C.DirectIo.AUTO, True: _C.DirectIo.ON, False: _C.DirectIo.OFF}
_IO_ENGINE = {
    "auto": _C.IoEngine.AUTO,
    "io_uring": _C.IoEngine.URING,
    "pread": _C.IoEngine.PREAD,
}


@dataclasses.dataclass(frozen=True, slots=True)
class Placement:
    """Where the tables of a runtime are, in bytes over all layers."""

    tier: Literal["ram", "disk"]
    path: str | None  #: of the table file
    mapped: bool  #: the file is mapped, one copy for all processes
    direct_io: bool  #: the file is read with O_DIRECT
    io_engine: Literal["io_uring", "pread"] | None  #: how the file is read
    verify: bool  #: every block is checked against its checksum when it is read
    in_place: bool  #: tables are read where they lie: no hot set, no rings, no fetches
    near_data: bool  #: positions whose rows are not at hand attend beside the table, or may
    near_costs: NearDataCosts | None  #: by which a step decides; None: not measured
    device: str  #: where hot set and rings are
    num_layers: int
    num_workers: int
    queue_depth: int
    table_bytes: int
    hot_bytes: int
    hot_tokens: int
    ring_bytes: int


@dataclasses.dataclass(frozen=True, slots=True)
class Rows:
    """One layer's rows of a step, ready for :meth:`attend`, or ``segmented_attention`` over them.

    Quantised rows come with the scales that it takes as ``key_scales`` and ``value_scales``. With
    near data the positions in ``near`` have no rows here: only :meth:`attend` knows about them.
    """

    keys: Tensor  #: [rows, d_in], a view that may be strided; only the plan's rows are the step's
    values: Tensor  #: [rows, d_emb]; the same tensor as ``keys`` where tied
    plan: Plan
    key_scales: Tensor | None = None  #: float32 [rows], strided
    value_scales: Tensor | None = None
    #: those that attend on the host, beside the table
    near: NearPositions | None = dataclasses.field(default=None, kw_only=True)
    #: they are read where the table lies: no step's end takes them away
    in_place: bool = dataclasses.field(default=False, kw_only=True)

    def attend(self, x: Array, scale: float = 1.0) -> Tensor:
        """:func:`l3ext.segmented_attention` of all positions, wherever their rows are.

        Where a gradient will be asked for, it is given also after the step's end: rows that are not
        in place are copied then.

        Args:
            x: [N, d_in], on the device of the rows; takes their dtype, unless they are quantised.
            scale: factor of the logits.

        Returns:
            [N, d_emb], dtype of the rows, or of ``x`` if they are quantised.
        """
        scale = number(scale, "scale")
        rows = self
        if not isinstance(x, Tensor):
            x = from_numpy(x, "x")
        if self.key_scales is None:
            x = x.to(self.keys.dtype)
            if x.requires_grad and torch.is_grad_enabled() and not self.in_place:
                rows = self._kept()
        # Before the device has more to do: the host then attends beside it.
        queries = None if self.near is None else self.near.queries(x)
        if self.near is not None and self.near.are_all:
            y = x.new_empty(x.shape[0], self.values.shape[1])
        else:
            y = segmented_attention(
                x,
                rows.keys,
                rows.values,
                rows.plan,
                scale,
                key_scales=self.key_scales,
                value_scales=self.value_scales,
            )
        if self.near is None or queries is None:
            return y
        return self.near.attend(queries, scale, y)

    def _kept(self) -> Rows:
        """The same rows in memory of their own."""
        own = touched_rows(self.plan.segment_rows, self.plan.num_segments)
        ends = own.starts + torch.diff(self.plan.segment_rows, dim=1).flatten()
        keys = self.keys[own.rows]
        values = keys if self.values is self.keys else self.values[own.rows]
        plan = self.plan.with_rows(torch.stack([own.starts, ends], dim=1))
        return dataclasses.replace(self, keys=keys, values=values, plan=plan)


class Step(EndedByWith):
    """The rows of one step, on their way. Ends with its ``with`` block, or when dropped."""

    def __init__(self, runtime: PrefetchRuntime, token_ids: Any) -> None:
        self._runtime = runtime._native
        self._runtime.check_home()  # before torch, which may hang in a forked child
        self._device = runtime._device
        plan = make_plan(
            as_ids(token_ids).cpu(),
            runtime._offsets,
            max_rows=runtime._max_rows,
            check_offsets=False,
        )
        self._num_segments = int(plan.num_segments)
        tokens = plan.segment_tokens[: self._num_segments]
        if runtime._host_tables:  # near data weighs how often each comes
            counts = np.diff(plan.segment_queries.numpy()[: self._num_segments + 1])
            tokens = torch.from_numpy(np.repeat(tokens.numpy(), counts))
        self._native = runtime._native.begin(tokens)
        self._near = [
            self._near_positions(layer, table, plan)
            for layer, table in enumerate(runtime._host_tables)
        ]
        if self._device.type != "cpu":
            plan = plan.pin_memory().to(self._device, non_blocking=True)
        self._plan = plan
        self._layers = runtime._layers
        self._in_place = runtime.placement.in_place

    def _near_positions(self, layer: int, table: HostTable, plan: Plan) -> NearPositions | None:
        segments = self._native.near_segments(layer)
        if segments.size == 0:
            return None
        return NearPositions(table, plan, segments, self._device)

    def wait(self, layer: int) -> Rows:
        """Make sure that the rows of ``layer`` (0 is the nearest) are there.

        On the CPU this blocks until they are. On a GPU the current stream waits for them, and the
        host goes on. The rows are the runtime's memory, not a copy: do not use them after
        :meth:`end`.

        Raises:
            OSError: with the path, where a read failed or a block does not match its checksum. The
                runtime stays usable, and so do the other layers.
            ValueError: no such layer.
            RuntimeError: the step has ended, the runtime is closed, or this is a forked child.
        """
        self._runtime.check_home()
        on_host = self._device.type == "cpu"
        segment_rows = torch.empty(self._num_segments, 2, dtype=torch.int64, pin_memory=not on_host)
        self._native.wait(integer(layer, "layer"), segment_rows, current_stream(self._device))
        place = self._layers[layer]
        spill = self._native.spill(layer)
        keys, values, *scales = place.arena if spill is None else place.split(spill)
        if not on_host:
            segment_rows = segment_rows.to(self._device, non_blocking=True)
        near = self._near[layer] if self._near else None
        plan = self._plan.with_rows(segment_rows)
        return Rows(keys, values, plan, *scales, near=near, in_place=self._in_place)

    def end(self) -> None:
        """Give the rows' memory back; fetches still on their way are cancelled. Idempotent.

        On a GPU what the current stream has been given so far may still read the rows. In a forked
        child this does nothing: the step is its parent's.
        """
        if self._runtime.is_home:
            self._native.end(current_stream(self._device))

    def __del__(self) -> None:
        if hasattr(self, "_native"):
            with contextlib.suppress(RuntimeError):  # a device that failed
                self.end()


class _LayerViews:
    """Keys and values of one layer's arena, and their scales where the rows are quantised.

    Made once, the same for every step.
    """

    def __init__(self, table: _C.Table, arena: object) -> None:
        self._dtype, self._tied = table.dtype, table.tied
        self._d_in, self._d_emb = table.d_in, table.d_emb
        self.arena = self.split(arena)

    def split(self, rows: object) -> tuple[Tensor, ...]:
        matrix = from_dlpack(rows)
        if matrix.dtype == torch.uint8:
            dtype = getattr(torch, self._dtype)
            table = QuantizedTable(matrix, dtype, self._d_in, self._d_emb, self._tied)
            return table.keys, table.values, table.key_scales, table.value_scales
        if self._tied:
            return matrix, matrix
        return matrix[:, : self._d_in], matrix[:, self._d_in :]


class PrefetchRuntime(ClosedByWith):
    """Serves the rows of lookup tables that live in RAM or in a table file.

    A runtime belongs to the process that made it. In a child of ``fork`` (``os.fork``, workers of
    ``multiprocessing`` and of data loaders) its threads are missing: what asks for rows or for the
    ledger is a ``RuntimeError`` there, at once; :meth:`close`, the ends of ``with`` blocks and of
    the process do nothing to it, and the parent goes on undisturbed. A child that needs rows opens
    a runtime of its own, on the same file or the same tables.

    Args:
        tables: one :class:`LookupTable` for each layer, nearest layer first (served from where they
            are, without a copy), or the path of a table file (:func:`l3ext.tables.save_tables`).
            All share a vocabulary; their allocations may differ.
        device: where attention runs: "cpu" or a CUDA device.
        cache_bytes: bytes for the hot sets, split evenly over the layers: the rows of the tokens
            that occur most often are loaded now and stay. Of no use where tables are ``in_place``.
        ring_bytes: bytes for the rows of open steps, split evenly over the layers; at most twice
            the table is used. What a step fetched stays there until the ring comes round, and
            serves later steps ("reused" in the ledger). A layer's rows that do not fit go to a
            buffer of their own for that step ("spilled").
        in_place: tables in RAM are read where they lie if attention runs on the CPU: nothing is
            fetched, hot set and ring are not needed, and the ledger counts neither hits nor bytes
            but ``in_place_bytes``.
        near_data: positions whose rows are neither in the hot set nor in the ring attend on the
            host, over the table in RAM where it lies; their queries and results travel instead of
            the rows. On the CPU the same bits; on a GPU other kernels sum, in another order.
            "auto": where it costs less than to fetch the rows, by what whole steps take either way,
            measured now in some 50 ms; a fetch is taken to be waited for, none of it hidden behind
            earlier layers. Tables that are read in place are near anyway, and from a file that is
            not mapped they cannot be: True is an error there, "auto" leaves it off. What is
            attended to in a mapped file is not checked against its checksum.
        num_workers: threads that start reads, check and copy.
        queue_depth: reads of one worker on their way at once, where the system can do that.
        mapped: map the table file instead of reading it: its rows are in RAM like any table's, in
            one copy for all processes that map it. Writing to them ends the process. Whoever
            replaces the file must do so by rename, as :func:`save_tables` does.
        verify: check every block read from a file against its checksum; not where it is read in
            place.
        direct_io: read the file with O_DIRECT, past the page cache. "auto": where the file system
            allows it; True: an error where it does not; False: through the page cache.
        io_engine: how the file is read: "auto" is "io_uring" where the kernel has it, else "pread"
            by threads.
        record_steps: how many steps the ledger keeps.
        piece_bytes: what one worker reads at a time, a multiple of 4096 up to 1 GiB.
        prefill_chunk: an offloaded model runs a prompt of more positions, over all sequences, in
            chunks of that many, and fetches the next chunk's rows meanwhile; what fills half of a
            ring is a good number. 0: prompts run whole, with the same bits as without offloading,
            as they do where tables are read in place.
        poison: fill rows with NaN when a step ends, so that a use after the end shows; for tests.

    Attributes:
        prefill_chunk: what was chosen; 0: prompts run whole.

    Raises:
        ValueError, TypeError: options and tables that do not fit.
        OSError: with the path: unreadable, no table file, cut short or damaged.
        RuntimeError: no memory, no threads.
    """

    def __init__(
        self,
        tables: str | os.PathLike[str] | Sequence[LookupTable],
        *,
        device: torch.device | str | None = None,
        cache_bytes: int = 0,
        ring_bytes: int = 128 << 20,
        in_place: bool = True,
        near_data: bool | Literal["auto"] = False,
        num_workers: int = 2,
        queue_depth: int = 16,
        mapped: bool = False,
        verify: bool = True,
        direct_io: bool | Literal["auto"] = "auto",
        io_engine: Literal["auto", "io_uring", "pread"] = "auto",
        record_steps: int = 1024,
        piece_bytes: int = 256 << 10,
        prefill_chunk: int = 0,
        poison: bool = False,
    ) -> None:
        check_flags(in_place=in_place, mapped=mapped, verify=verify, poison=poison)
        if not isinstance(direct_io, (bool, str)) or direct_io not in _DIRECT_IO:
            raise ValueError(f'direct_io: expected True, False or "auto", got {direct_io!r}')
        if not isinstance(io_engine, str) or io_engine not in _IO_ENGINE:
            raise ValueError(
                f'io_engine: expected "auto", "io_uring" or "pread", got {io_engine!r}'
            )
        if near_data not in (True, False, "auto"):
            raise ValueError(f'near_data: expected True, False or "auto", got {near_data!r}')
        in_file = isinstance(tables, (str, os.PathLike)) and not mapped
        if near_data and near_data != "auto" and in_file:
            assert isinstance(tables, (str, os.PathLike))
            raise ValueError(
                "near_data: expected tables in host memory, where attention can read them, got "
                f"the file {os.fspath(tables)!r}, which is not mapped"
            )
        numbers = whole_numbers(
            cache_bytes=cache_bytes,
            ring_bytes=ring_bytes,
            num_workers=num_workers,
            queue_depth=queue_depth,
            piece_bytes=piece_bytes,
            record_steps=record_steps,
        )
        prefill_chunk = whole_numbers(prefill_chunk=prefill_chunk)["prefill_chunk"]
        if prefill_chunk < 0:
            raise ValueError(f"prefill_chunk: expected 0 or more, got {prefill_chunk}")
        self._device = runtime_device(device)
        path = os.fspath(tables) if isinstance(tables, (str, os.PathLike)) else None
        if mapped and path is None:
            raise ValueError("mapped: expected the path of a table file as tables, got tables")
        file = None
        if path is None or mapped:
            natives, _ = tables_in_memory(tables)
        else:
            file = _C.TableFile(path, _DIRECT_IO[direct_io], _IO_ENGINE[io_engine])
            natives = file.tables()
        if mapped:
            verify = verify and not (in_place and self._device.type == "cpu")
        if not verify and path is not None:
            for table in natives:
                table.drop_checksums()
        self._native = _C.Prefetcher(
            natives,
            str(self._device),
            in_place=in_place,
            **numbers,
            poison=poison,
        )
        # What the rows that stay in the table are read from; empty without near data.
        self._host_tables: list[HostTable] = []
        far = not all(layer["in_place"] for layer in self._native.placement())
        if near_data and near_data != "auto":
            self._native.use_near_data(*dataclasses.astuple(ALWAYS))
        # The plan needs offsets only to check ids and to order segments: any layer's will do.
        self._offsets = as_offsets(natives[0].offsets)
        self._max_rows = max(int(np.diff(table.offsets).max(initial=0)) for table in natives)
        self._layers = [
            _LayerViews(table, self._native.arena(i)) for i, table in enumerate(natives)
        ]
        self.ledger = Ledger(self._native.ledger)
        layers = self._native.placement()
        self.placement = Placement(
            tier="ram" if file is None else "disk",
            path=path,
            mapped=mapped,
            direct_io=file is not None and file.direct,
            io_engine=None if file is None else file.io_engine,
            verify=verify and path is not None,
            in_place=not far,
            near_data=bool(near_data) and far and not in_file,
            near_costs=None,
            device=str(self._device),
            num_workers=num_workers,
            queue_depth=queue_depth,
            **placement_sums(layers),
        )
        self.prefill_chunk = 0 if self.placement.in_place else prefill_chunk
        if self.placement.near_data:
            self._host_tables = [
                HostTable(_LayerViews(table, table.rows()).arena, table.offsets)
                for table in natives
            ]
            if near_data == "auto":
                costs = self._measure_near_data()
                self.placement = dataclasses.replace(self.placement, near_costs=costs)
                self._native.use_near_data(*dataclasses.astuple(costs))

    def _measure_near_data(self) -> NearDataCosts:
        # Whole steps of few and of many bytes, either way in turn, of tokens that come once: later
        # they would be found in the ring.
        tokens = np.random.default_rng(0).permutation(len(self._offsets) - 1)
        samples: dict[NearDataCosts, list[tuple[int, float]]] = {NEVER: [], ALWAYS: []}
        end = time.perf_counter() + 0.04
        first, run = 0, 0
        while first < len(tokens) and time.perf_counter() < end:
            ids = torch.from_numpy(tokens[first : first + (1, 8)[run // 2 % 2]])
            first, way = first + len(ids), (NEVER, ALWAYS)[run % 2]
            self._native.use_near_data(*dataclasses.astuple(way))
            us = self._step_us(ids)
            totals = self.ledger.totals
            self.ledger.clear()
            nbytes = totals.bytes if way is NEVER else totals.near_bytes
            if run >= 4 and nbytes:  # the first ones warm up
                samples[way].append((nbytes, us))
            run += 1
        return costs_of(samples[NEVER], samples[ALWAYS], self.placement.num_layers)

    def _step_us(self, ids: Tensor) -> float:
        begin = time.perf_counter()
        with self.begin(ids) as step:
            for layer, table in enumerate(self._host_tables):
                dtype = table.keys.dtype if table.key_scales is None else torch.float32
                x = torch.zeros(len(ids), table.keys.shape[1], dtype=dtype, device=self._device)
                step.wait(layer).attend(x)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return (time.perf_counter() - begin) * 1e6

    def begin(self, token_ids: Tensor | Any) -> Step:
        """Start to fetch the rows of these tokens for every layer, and return at once.

        Args:
            token_ids: integers of any shape; repeats are fetched once.

        Raises:
            ValueError: an id outside the vocabulary, which and where; nothing is fetched then.
            RuntimeError: the runtime is closed, or this is a forked child.
        """
        return Step(self, token_ids)

    def close(self) -> None:
        """End open steps, stop the workers, close the file. Idempotent.

        Rows from :meth:`Step.wait` stay valid memory as long as somebody holds them. In a forked
        child this does nothing: the runtime stays its parent's.
        """
        self._native.close()
        self._layers = []

    def __repr__(self) -> str:
        place = self.placement
        where = "RAM" if place.path is None else repr(place.path)
        if place.mapped:
            where += " (mapped)"
        elif place.path is not None:
            where += " (O_DIRECT" if place.direct_io else " (through the page cache"
            where += f", {place.io_engine})"
        tables = f"{place.num_layers} tables of {_size(place.table_bytes)} in {where}"
        if place.in_place:
            return f"PrefetchRuntime({tables}, read in place)"
        return (
            f"PrefetchRuntime({tables}, "
            f"hot set {_size(place.hot_bytes)} and rings {_size(place.ring_bytes)} on "
            f"{place.device}, {place.num_workers} workers"
            + (", attention near the data)" if place.near_data else ")")
        )


def _size(count: int) -> str:
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count} B"
