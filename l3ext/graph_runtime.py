"""Tables outside the model for steps that a CUDA graph holds: no host takes part in a replay.

:class:`l3ext.PrefetchRuntime` decides on the host what to fetch, in every step, and so no graph can
hold it. Here the device decides: it knows which rows it has and where in pinned host memory the
others lie, and a kernel brings those of a step while the layers before their use run. So a whole
decode step, captured once, replays with other ids.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from l3ext import _C
from l3ext._arrays import Array, from_numpy
from l3ext._attention import (
    PLAN,
    PlanArguments,
    as_matrix,
    attend_by_directory,
    check_plan,
)
from l3ext._checks import check_flags, integer, number, whole_numbers
from l3ext._operators import (
    PLAN_LENGTH,
    computes_at_once,
    current_stream,
    dispatch,
    kernel,
    library,
    register_derivative,
)
from l3ext._runtimes import (
    ClosedByWith,
    EndedByWith,
    placement_sums,
    runtime_device,
    tables_in_memory,
)
from l3ext.plans import as_ids, as_offsets, make_plan
from l3ext.quantization import QUANTIZED_DTYPES
from l3ext.tables import LookupTable

# Operators, so that compiled code and its graphs hold them. A runtime is a number to them; the
# ticket, int32 [1+N], is what makes attention depend on the fetch: how many tokens, and which.
library.define("fetch_rows(Tensor num_segments, Tensor segment_tokens, int runtime) -> Tensor")
library.define("end_fetch(Tensor ticket, int runtime) -> ()")
library.define(
    f"fetched_attention(Tensor x, Tensor ticket, {PLAN}, int runtime, int layer, SymInt d_emb, "
    "float scale) -> Tensor"
)

_runtimes: weakref.WeakValueDictionary[int, GraphRuntime] = weakref.WeakValueDictionary()
_numbers = itertools.count(1)


@dataclasses.dataclass(frozen=True, slots=True)
class GraphPlacement:
    """Where the tables of a graph runtime are, in bytes over all layers."""

    path: str | None  #: of the table file that is mapped
    device: str  #: where hot sets and rings are
    in_place: bool  #: tables are read where they lie: no hot set, no rings, no fetches
    num_layers: int
    table_bytes: int
    hot_bytes: int
    hot_tokens: int
    ring_bytes: int


@dataclasses.dataclass(frozen=True, slots=True)
class FetchCounts:
    """What the steps of one layer needed, each token once a step."""

    resident: int  #: tokens whose rows the device held
    fetched: int  #: tokens whose rows came from host memory
    fetched_bytes: int
    left: int  #: tokens that found the ring full: attention read their rows in host memory


@dataclasses.dataclass(frozen=True, slots=True)
class _Layout:
    """How the rows of a layer lie behind their address, as directory_attention takes it."""

    dtype: torch.dtype
    d_emb: int
    row_stride: int
    value_offset: int
    row_dtype: torch.dtype | None
    scale_offset: int


def _layout(table: _C.Table) -> _Layout:
    dtype = getattr(torch, table.dtype)
    width = table.d_in if table.tied else table.d_in + table.d_emb
    offset = 0 if table.tied else table.d_in
    if dtype not in QUANTIZED_DTYPES:
        return _Layout(dtype, table.d_emb, width, offset, None, 0)
    return _Layout(dtype, table.d_emb, table.row_bytes, offset, dtype, -(-width // 4) * 4)


class GraphRows:
    """One layer's rows of a step, wherever they are."""

    def __init__(self, step: GraphStep, layer: int) -> None:
        self._step, self._ticket = step, step._ticket
        self._plan = step._plans[step._runtime._plan_of[layer]]
        self._runtime, self._layer = step._runtime._number, layer
        self._layout = step._runtime._layouts[layer]

    def attend(self, x: Array, scale: float = 1.0) -> Tensor:
        """:func:`l3ext.segmented_attention` of all positions, with the same bits.

        The current stream waits for the layer's rows; the host does not.

        Args:
            x: [N, d_in], on the runtime's device; takes the rows' dtype, unless they are quantised.
                No gradient reaches it.
            scale: factor of the logits.

        Returns:
            [N, d_emb], dtype of the rows, or of ``x`` if they are quantised.

        Raises:
            RuntimeError: another step has begun since, the runtime is closed, or this is a forked
                child.
        """
        _check_home(self._runtime)
        layout = self._layout
        if not isinstance(x, Tensor):
            x = from_numpy(x, "x")
        if layout.row_dtype is None:
            x = x.to(layout.dtype)
        x = as_matrix(x, "x")
        check_plan(x, self._plan)
        place = (self._runtime, self._layer, layout.d_emb, number(scale, "scale"))
        if self._layer == self._step._last:
            self._step._is_joined = True
        if computes_at_once(self._plan, x, self._ticket):
            return _fetched_attention(x, self._ticket, self._plan, *place)
        operator = torch.ops.l3ext.fetched_attention.default
        return dispatch(operator, (x, self._ticket), *self._plan._arrays(), *place)


class GraphStep(EndedByWith):
    """The rows of one step, on their way. Ends with its ``with`` block.

    In compiled code attention must have the last layer's rows, or :meth:`end` is an error there.
    """

    def __init__(self, runtime: GraphRuntime, token_ids: Any) -> None:
        _check_home(runtime._number)
        ids = as_ids(token_ids).to(runtime._device)
        self._runtime = runtime
        self._last = len(runtime._layouts) - 1
        self._is_joined = False  # attention has had the rows of the last layer
        self._plans = [
            make_plan(ids, offsets, max_rows=max_rows, check_offsets=False)
            for offsets, max_rows in runtime._allocations
        ]
        plan = self._plans[0]  # any names the tokens
        self._ticket = torch.ops.l3ext.fetch_rows.default(
            plan.num_segments, plan.segment_tokens, runtime._number
        )

    def wait(self, layer: int) -> GraphRows:
        """The rows of ``layer`` (0 is the nearest); the wait is attention's, on the stream.

        Raises:
            ValueError: no such layer.
        """
        if not 0 <= integer(layer, "layer") <= self._last:
            raise ValueError(f"layer: expected 0 to {self._last}, got {layer}")
        return GraphRows(self, layer)

    def end(self) -> None:
        """Let the current stream wait for rows that nobody attended to, as a capture needs.

        Idempotent; nothing where attention has had the last layer's rows, and in a forked child.

        Raises:
            RuntimeError: compiled code in which attention has not.
        """
        if torch.compiler.is_compiling() and not self._is_joined:
            # An operator without a result would be dropped, or moved before the layers' attention.
            raise RuntimeError(
                f"step: expected compiled code to attend to layer {self._last}, the last, before "
                "the step ends, as rows may still be on their way else"
            )
        torch.ops.l3ext.end_fetch.default(self._ticket, self._runtime._number)


class GraphRuntime(ClosedByWith):
    """Serves the rows of lookup tables in host memory to steps that may be in a CUDA graph.

    A step, :meth:`begin` to the last layer's attention, waits for nothing on the host, allocates
    only through torch, and runs on the current stream; the fetch, a kernel, on a branch of it. So
    ``torch.cuda.graph`` captures it, and each replay fetches what its own ids need. All steps of a
    runtime, replayed ones too, must follow each other: on one stream, or on streams that wait for
    each other; and the runtime must stay open while its graphs are replayed. In a child of ``fork``
    it is an error to use, as :class:`l3ext.PrefetchRuntime` is.

    Args:
        tables: one :class:`LookupTable` for each layer, nearest layer first, or the path of a table
            file, which is mapped (its checksums are not verified). All share a vocabulary.
        device: where attention runs: "cpu" or a CUDA device. There the tables are pinned.
        cache_bytes: bytes for the hot sets, split evenly over the layers: the rows of the tokens
            that occur most often are loaded now and stay.
        ring_bytes: bytes for the rows of a step, split evenly over the layers. Rows that find no
            room stay in host memory, where attention reads them, again and again: slower, with the
            same bits ("left" in :attr:`counts`).
        in_place: on the CPU, rows are read where they lie: nothing is fetched.
        fetch_blocks: of the kernel that fetches: the multiprocessors that it takes.

    Attributes:
        prefill_chunk: 0: prompts run whole, as for a runtime that fetches nothing ahead.

    Raises:
        ValueError, TypeError: options and tables that do not fit, quantised ones on CUDA among
            them.
        OSError: with the path: unreadable, no table file, cut short or damaged.
        RuntimeError: no memory, or memory that cannot be pinned.
    """

    prefill_chunk = 0

    def __init__(
        self,
        tables: str | os.PathLike[str] | Sequence[LookupTable],
        *,
        device: torch.device | str | None = None,
        cache_bytes: int = 0,
        ring_bytes: int = 128 << 20,
        in_place: bool = True,
        fetch_blocks: int = 4,
    ) -> None:
        check_flags(in_place=in_place)
        self._device = runtime_device(device)
        self._fetch_blocks = fetch_blocks
        numbers = whole_numbers(
            cache_bytes=cache_bytes, ring_bytes=ring_bytes, fetch_blocks=fetch_blocks
        )
        natives, path = tables_in_memory(tables)
        self._native: _C.GraphRuntime | None = _C.GraphRuntime(
            natives,
            str(self._device),
            in_place=in_place,
            **numbers,
        )
        self._layouts = [_layout(table) for table in natives]
        self._directories = [
            from_dlpack(self._native.directory(layer))[0] for layer in range(len(natives))
        ]
        self._counters = from_dlpack(self._native.counters())
        # Layers with the same allocation, mostly all, share a plan.
        self._allocations: list[tuple[Tensor, int]] = []
        self._plan_of: list[int] = []
        known: list[np.ndarray] = []
        for table in natives:
            offsets = table.offsets
            same = [i for i, other in enumerate(known) if np.array_equal(offsets, other)]
            self._plan_of.append(same[0] if same else len(known))
            if not same:
                known.append(offsets)
                most = int(np.diff(offsets).max(initial=0))
                self._allocations.append((as_offsets(offsets).to(self._device), most))
        layers = self._native.placement()
        self.placement = GraphPlacement(
            path=path,
            device=str(self._device),
            in_place=all(layer["in_place"] for layer in layers),
            **placement_sums(layers),
        )
        self._number = next(_numbers)
        _runtimes[self._number] = self

    def begin(self, token_ids: Tensor | Any) -> GraphStep:
        """Enqueue the fetch of these tokens' rows for every layer, nearest first.

        The step before must be over: its rows are overwritten.

        Args:
            token_ids: integers of any shape, on the runtime's device; elsewhere they are copied
                there, which a capture does not allow.

        Raises:
            ValueError: an id outside the vocabulary, which and where; on CUDA its positions become
                NaN instead.
            RuntimeError: the runtime is closed, or this is a forked child.
        """
        return GraphStep(self, token_ids)

    @property
    def counts(self) -> list[FetchCounts]:
        """What all steps so far needed, layer by layer, replayed ones too; waits for the device.

        Counted by the device. How long anybody waited it cannot know: no host sees a replay.

        Raises:
            RuntimeError: the runtime is closed, or this is a forked child.
        """
        _check_home(self._number)
        return [FetchCounts(*layer) for layer in self._counters.tolist()]

    def close(self) -> None:
        """Give the memory back; no graph that holds a step may be replayed any more. Idempotent."""
        self._native = None
        self._directories = []
        self._counters = torch.empty(0)

    def _spare(self, layer: int) -> int:
        """Multiprocessors that attention leaves alone: those of a fetch that may run beside it."""
        last = len(self._layouts) - 1
        return self._fetch_blocks if layer < last else 0

    def __repr__(self) -> str:
        place = self.placement
        where = "in place" if place.in_place else f"for graphs on {place.device}"
        return (
            f"GraphRuntime({place.num_layers} tables of {place.table_bytes} bytes in RAM, read "
            f"{where}, hot set {place.hot_bytes} and rings {place.ring_bytes} bytes)"
        )


# --- operators ------------------------------------------------------------------------------------
def _runtime(number: int) -> tuple[GraphRuntime, _C.GraphRuntime]:
    runtime = _runtimes.get(number)
    if runtime is None or runtime._native is None:
        raise RuntimeError("the runtime is closed")
    return runtime, runtime._native


def _check_home(number: int) -> None:
    """Before anything of torch's, which may hang in a forked child; its traces do without."""
    if not torch.compiler.is_compiling():
        _runtime(number)[1].check_home()


@torch.library.register_fake("l3ext::fetch_rows", lib=library)
def _ticket(num_segments: Tensor, segment_tokens: Tensor, runtime: int) -> Tensor:
    return segment_tokens.new_empty(1 + segment_tokens.shape[0])


@kernel("fetch_rows")
def _fetch_rows(num_segments: Tensor, segment_tokens: Tensor, runtime: int) -> Tensor:
    _, native = _runtime(runtime)
    # The branch reads it beside the layers, in which compiled code may free the plan's arrays; the
    # ticket goes to every attention, and so it lives until the last has joined the branch.
    ticket = torch.cat([num_segments, segment_tokens])
    native.begin(ticket, current_stream(ticket.device))
    return ticket


@torch.library.register_fake("l3ext::end_fetch", lib=library)
def _no_output(ticket: Tensor, runtime: int) -> None:
    return None


@kernel("end_fetch")
def _end_fetch(ticket: Tensor, runtime: int) -> None:
    found = _runtimes.get(runtime)
    if found is not None and found._native is not None and found._native.is_home:
        found._native.end(ticket.data_ptr(), current_stream(ticket.device))


@torch.library.register_fake("l3ext::fetched_attention", lib=library)
def _attention_fake(x: Tensor, ticket: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(x.shape[0], rest[PLAN_LENGTH + 2])


@kernel("fetched_attention", 2)
def _fetched_attention(
    x: Tensor,
    ticket: Tensor,
    plan: PlanArguments,
    number: int,
    layer: int,
    d_emb: int,
    scale: float,
) -> Tensor:
    runtime, native = _runtime(number)
    native.wait(layer, ticket.data_ptr(), current_stream(x.device))
    layout = runtime._layouts[layer]
    where = (d_emb, layout.row_stride, layout.value_offset, scale)
    how = (layout.row_dtype, layout.scale_offset, runtime._spare(layer))
    directory = runtime._directories[layer]
    return attend_by_directory(x, directory, plan, *where, *how)


def _no_derivative(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    raise RuntimeError("GraphRows.attend: rows outside the model have no gradient here, nor has x")


register_derivative("fetched_attention", _no_derivative)
