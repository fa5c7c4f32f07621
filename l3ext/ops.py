"""Segmented attention as torch operators.

Every operator is declared here with ``torch.library``: one kernel for the CPU and CUDA that calls
the native core, a fake for tracing, and the derivative. Outputs are allocated here; the native side
only fills them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from l3ext import _C
from l3ext._arrays import Array, from_numpy
from l3ext._attention import (
    PLAN,
    PlanArguments,
    as_matrix,
    as_queries,
    attend_by_directory,
    check_plan,
    check_quantized_queries,
    quantized_rows,
)
from l3ext._checks import integer, number
from l3ext._operators import (
    PLAN_LENGTH,
    computes_at_once,
    detached,
    dispatch,
    empty_output,
    kernel,
    library,
    queue,
    recorded,
    register_derivative,
)
from l3ext.plans import Plan
from l3ext.quantization import QUANTIZED_DTYPES, check_quantized_dtype

# What a backward operator gets after the plan; segment_gradients: where each segment's gradient
# rows begin in an array of gradient_rows rows, if not where its rows lie in the table.
_BACKWARD = (
    "float scale, bool wants_dx, bool wants_rows, Tensor? segment_gradients=None, "
    "SymInt gradient_rows=0"
)
library.define(
    f"segmented_attention(Tensor x, Tensor keys, Tensor values, {PLAN}, float scale, "
    "bool sparse=False) -> Tensor"
)
library.define(
    f"segmented_attention_backward(Tensor dy, Tensor x, Tensor keys, Tensor values, {PLAN}, "
    f"{_BACKWARD}) -> (Tensor, Tensor, Tensor)"
)
library.define(
    f"table_attention(Tensor x, Tensor table, int d_in, bool tied, {PLAN}, float scale, "
    "bool sparse=False) -> Tensor"
)
library.define(
    "table_attention_backward(Tensor dy, Tensor x, Tensor table, int d_in, bool tied, "
    f"{PLAN}, {_BACKWARD}) -> (Tensor, Tensor)"
)
library.define(
    "quantized_attention(Tensor x, Tensor keys, Tensor values, Tensor key_scales, "
    f"Tensor value_scales, {PLAN}, float scale) -> Tensor"
)
library.define(
    f"directory_attention(Tensor x, Tensor directory, {PLAN}, SymInt d_emb, SymInt row_stride, "
    "SymInt value_offset, float scale, ScalarType? row_dtype=None, SymInt scale_offset=0) -> Tensor"
)


# --- functions ------------------------------------------------------------------------------------
def segmented_attention(
    x: Array,
    keys: Array,
    values: Array,
    plan: Plan,
    scale: float = 1.0,
    *,
    sparse: bool = False,
    key_scales: Array | None = None,
    value_scales: Array | None = None,
) -> Tensor:
    """Attention of every position to the rows of its own token.

    For position i with token t: ``softmax(scale * keys[rows of t] @ x[i]) @ values[rows of t]``.

    Rows may be stored in 8 bits, float8_e4m3fn or int8 (:func:`l3ext.quantize_rows`), on the CPU
    and for inference: then row r stands for ``key_scales[r] * keys[r]`` and
    ``value_scales[r] * values[r]``, and nothing has a gradient. A scale that is NaN makes every
    output NaN that its row has a part in (a key's has none where its token owns one row).

    Where a token owns one row the output is its value, whatever the logit: neither that row's key
    nor the queries in ``x`` are read, and NaN or infinity there does not show.

    NumPy arrays are taken as the tensors over their memory.

    On CUDA: float32, bfloat16 and float16; d_in and d_emb multiples of 64 up to 8192; rows of keys
    and values aligned to 16 bytes; at most 4096 rows a token, for gradients as many as the device's
    shared memory holds the weights of. Work is enqueued on the current stream, without a wait, and
    can be captured in a graph. What the CPU finds in the data and reports, it cannot: see
    :meth:`l3ext.Plan.check`.

    Args:
        x: [N, d_in] queries; float64 (CPU), float32, bfloat16 or float16.
        keys: [v, d_in], dtype of ``x``, or float8_e4m3fn or int8. Rows may be strided: keys and
            values may be two views of one table. ``values is keys``: a tied table.
        values: [v, d_emb], dtype of ``keys``.
        plan: of the N token ids, from :func:`l3ext.plan`.
        scale: factor of the logits.
        sparse: the gradients of keys and values are sparse tensors of the rows that the step's
            tokens own, as :class:`torch.nn.Embedding` names it. Neither may be a view of a table
            then (see :func:`table_attention`), nor the code be compiled; on CUDA the backward
            pass waits once for the number of rows.
        key_scales: float32 [v], of float8_e4m3fn and int8 rows alone; may be strided.
        value_scales: the same for the values.

    Returns:
        [N, d_emb], dtype of ``x``. Sums are float32 (float64 for float64 inputs); the same bits on
        every run and for any number of threads. Differentiable in x, keys and values, once and in
        reverse mode, by torch.func too (eagerly: not in compiled code).

    Raises:
        ValueError: shapes that do not fit each other or the plan.
        TypeError: unequal or unsupported dtypes, a plan on another device.
        RuntimeError: a device that this build has no kernels for.
    """
    x = as_matrix(x, "x")
    same, rows = values is keys, None
    if not isinstance(keys, Tensor):
        keys = from_numpy(keys, "keys")
    if keys.dtype in QUANTIZED_DTYPES:
        rows = quantized_rows(x, keys, values, key_scales, value_scales)
        values = rows[1]
    else:
        keys = as_matrix(keys, "keys", like=x)
        values = keys if same else as_matrix(values, "values", like=x)
        for name, scales in (("key_scales", key_scales), ("value_scales", value_scales)):
            if scales is not None:
                raise ValueError(f"{name}: expected None for keys of {keys.dtype}, got scales")
    if x.shape[1] != keys.shape[1]:
        raise ValueError(
            f"keys: expected {x.shape[1]} columns, the width of x, got {keys.shape[1]}"
        )
    if keys.shape[0] != values.shape[0]:
        raise ValueError(
            f"values: expected {keys.shape[0]} rows, as many as keys, got {values.shape[0]}"
        )
    check_plan(x, plan)
    scale = number(scale, "scale")
    if rows is not None:
        if computes_at_once(plan, x, *rows):
            return _quantized_forward(x, *rows, plan, scale)
        operator = torch.ops.l3ext.quantized_attention.default
        return dispatch(operator, (x, *rows), *plan._arrays(), scale)
    if values is keys:
        return table_attention(x, keys, plan, tied=True, scale=scale, sparse=sparse)
    if sparse:
        _check_sparse(keys=keys, values=values)
    if computes_at_once(plan, x, keys, values):
        return _forward(x, keys, values, plan, scale)
    operator = torch.ops.l3ext.segmented_attention.default
    return dispatch(operator, (x, keys, values), *plan._arrays(), scale, sparse)


def table_attention(
    x: Array,
    table: Array,
    plan: Plan,
    *,
    tied: bool,
    scale: float = 1.0,
    sparse: bool = False,
) -> Tensor:
    """:func:`segmented_attention` over one row-interleaved table, with one gradient for it.

    Args:
        x: [N, d_in].
        table: [v, d_in + d_emb], the keys in the first d_in columns; [v, d_in] if ``tied``.
        plan: of the N token ids.
        tied: keys and values are the same rows.
        scale: factor of the logits.
        sparse: the table's gradient is a sparse tensor: [R, width] values of the rows that the
            step's tokens own, ascending, none twice.

    Returns:
        [N, d_emb], dtype of ``x``.
    """
    x = as_matrix(x, "x")
    table = as_matrix(table, "table", like=x)
    d_in = x.shape[1]
    if (table.shape[1] != d_in) if tied else (table.shape[1] <= d_in):
        wanted = f"{d_in}" if tied else f"more than {d_in}"
        raise ValueError(f"table: expected {wanted} columns, got {table.shape[1]}")
    check_plan(x, plan)
    if sparse:
        _check_sparse(table=table)
    scale = number(scale, "scale")
    if computes_at_once(plan, x, table):
        return _table_forward(x, table, d_in, tied, plan, scale)
    operator = torch.ops.l3ext.table_attention.default
    return dispatch(operator, (x, table), d_in, tied, *plan._arrays(), scale, sparse)


def directory_attention(
    x: Array,
    directory: Array,
    plan: Plan,
    *,
    d_emb: int,
    row_stride: int,
    value_offset: int,
    scale: float = 1.0,
    row_dtype: torch.dtype | None = None,
    scale_offset: int = 0,
) -> Tensor:
    """:func:`segmented_attention` over rows that lie anywhere: tables, caches, ring buffers.

    Addresses are trusted: behind each that the step uses there must be as many rows as the plan
    gives its token, in ``x``'s dtype and in memory that ``x``'s device reads, until the work is
    done. A wrong one reads foreign memory or ends the process.

    Args:
        x: [N, d_in]; no gradient reaches it.
        directory: int64 [V], the address of each token's first row; 0: it has none.
        plan: of the N token ids; of its rows only their number counts.
        d_emb: width of the values.
        row_stride: elements from one row of a token to its next.
        value_offset: elements from the start of a row's key to its value; 0: tied.
        scale: factor of the logits.
        row_dtype: how rows are stored, if not in ``x``'s dtype: torch.float8_e4m3fn or torch.int8,
            on the CPU.
        scale_offset: of such rows, bytes from the start of a row's key to its float32 scale; the
            scale of its value comes next to it (tied: none). See :class:`l3ext.QuantizedTable`.

    Returns:
        [N, d_emb], dtype of ``x``; the same bits as over a table with these rows.

    Raises:
        ValueError: a token of the step whose address is 0, naming it (on CUDA: NaN instead);
            shapes that do not fit.
        TypeError: a directory that is not int64 or lies elsewhere than ``x``.
    """
    x = as_matrix(x, "x")
    if not isinstance(directory, Tensor):
        directory = from_numpy(directory, "directory")
    for value, least, name in (
        (d_emb, 1, "d_emb"),
        (row_stride, 1, "row_stride"),
        (value_offset, 0, "value_offset"),
    ):
        integer(value, name, least)
    check_plan(x, plan)
    layout: list[Any] = [d_emb, row_stride, value_offset, number(scale, "scale")]
    integer(scale_offset, "scale_offset")
    if row_dtype is None or row_dtype == x.dtype:
        if scale_offset != 0:
            raise ValueError(f"scale_offset: expected 0 for rows of {x.dtype}, got {scale_offset}")
    else:
        check_quantized_dtype(row_dtype, "row_dtype")
        check_quantized_queries(x, row_dtype)
        if scale_offset < 1:
            raise ValueError(
                f"scale_offset: expected 1 or more for {row_dtype}, got {scale_offset}"
            )
        layout += [row_dtype, scale_offset]
    if computes_at_once(plan, x, directory):
        return attend_by_directory(x, directory, plan, *layout)
    operator = torch.ops.l3ext.directory_attention.default
    return dispatch(operator, (x, directory), *plan._arrays(), *layout)


def _check_sparse(**tables: Tensor) -> None:
    if torch.compiler.is_compiling():
        raise RuntimeError(
            "sparse: expected False in compiled code, where the number of gradient rows is not "
            "known, got True"
        )
    for name, table in tables.items():
        if table.requires_grad and table._base is not None:
            raise ValueError(
                f"{name}: expected a tensor of its own for a sparse gradient, got a view, through "
                "which torch passes none: table_attention takes the whole table"
            )


# --- forward --------------------------------------------------------------------------------------
def _split(table: Tensor, d_in: int, tied: bool) -> tuple[Tensor, Tensor]:
    return (table, table) if tied else (table[:, :d_in], table[:, d_in:])


def _attend(
    x: Tensor,
    keys: Tensor,
    values: Tensor | None,
    d_emb: int,
    plan: PlanArguments,
    scale: float,
    *scales: Tensor,
) -> Tensor:
    """``values``: None where they lie behind the keys, in the same rows."""
    y = empty_output(x, x.shape[0], d_emb)
    how = (scale, torch.get_num_threads(), y, queue(x.device))
    _C.segmented_attention(as_queries(x), keys, values, plan, *how, *scales)
    return y


@kernel("segmented_attention", 3)
def _forward(
    x: Tensor,
    keys: Tensor,
    values: Tensor,
    plan: PlanArguments,
    scale: float,
    sparse: bool = False,
) -> Tensor:
    return _attend(x, detached(keys), detached(values), values.shape[1], plan, scale)


@torch.library.register_fake("l3ext::segmented_attention", lib=library)
def _forward_fake(x: Tensor, keys: Tensor, values: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(x.shape[0], values.shape[1])


@kernel("table_attention", 4)
def _table_forward(
    x: Tensor,
    table: Tensor,
    d_in: int,
    tied: bool,
    plan: PlanArguments,
    scale: float,
    sparse: bool = False,
) -> Tensor:
    rows = detached(table)
    if tied:
        return _attend(x, rows, rows, d_in, plan, scale)
    return _attend(x, rows, None, table.shape[1] - d_in, plan, scale)


@torch.library.register_fake("l3ext::table_attention", lib=library)
def _table_forward_fake(x: Tensor, table: Tensor, d_in: int, tied: bool, *rest: Any) -> Tensor:
    return x.new_empty(x.shape[0], d_in if tied else table.shape[1] - d_in)


@kernel("quantized_attention", 5)
def _quantized_forward(
    x: Tensor,
    keys: Tensor,
    values: Tensor,
    key_scales: Tensor,
    value_scales: Tensor,
    plan: PlanArguments,
    scale: float,
) -> Tensor:
    rows = (detached(keys), detached(values))
    scales = (detached(key_scales), detached(value_scales))
    return _attend(x, *rows, values.shape[1], plan, scale, *scales)


@torch.library.register_fake("l3ext::quantized_attention", lib=library)
def _quantized_fake(x: Tensor, keys: Tensor, values: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(x.shape[0], values.shape[1])


# torch drops arguments that equal their defaults.
kernel("directory_attention", 2)(attend_by_directory)


@torch.library.register_fake("l3ext::directory_attention", lib=library)
def _directory_fake(x: Tensor, directory: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(x.shape[0], rest[PLAN_LENGTH])


# --- backward -------------------------------------------------------------------------------------
class _Wanted(NamedTuple):
    """What a backward operator gets after the plan: see ``_BACKWARD``."""

    scale: float
    dx: bool
    rows: bool
    segment_gradients: Tensor | None = None
    gradient_rows: int = 0


def _backward_into(
    dy: Tensor,
    x: Tensor,
    keys: Tensor,
    values: Tensor,
    plan: PlanArguments,
    wanted: _Wanted,
    dx: Tensor,
    dkeys: Tensor | None,
    dvalues: Tensor | None,
) -> None:
    operands = (as_queries(dy), as_queries(x), detached(keys), detached(values), plan)
    rows = (dkeys, dvalues) if wanted.rows else (None, None)
    _C.segmented_attention_backward(
        *operands,
        wanted.scale,
        torch.get_num_threads(),
        wanted.segment_gradients,
        dx if wanted.dx else None,
        *rows,
        queue(x.device),
    )


def _gradient_outputs(
    x: Tensor,
    tables: Sequence[Tensor],
    wanted: _Wanted,
    empty: Callable[..., Tensor] = Tensor.new_empty,
) -> list[Tensor]:
    """Gradients of ``x`` and the tables to be filled; of no size where not wanted."""

    def rows_like(table: Tensor) -> Tensor:
        if not wanted.rows:
            return table.new_empty(0)
        packed = wanted.segment_gradients is not None
        return empty(table, wanted.gradient_rows if packed else table.shape[0], table.shape[1])

    dx = empty(x, *x.shape) if wanted.dx else x.new_empty(0)
    return [dx, *map(rows_like, tables)]


@kernel("segmented_attention_backward", 4)
def _backward(
    dy: Tensor, x: Tensor, keys: Tensor, values: Tensor, plan: PlanArguments, *rest: Any
) -> tuple[Tensor, ...]:
    wanted = _Wanted(*rest)
    outputs = _gradient_outputs(x, (keys, values), wanted, empty_output)
    _backward_into(dy, x, keys, values, plan, wanted, *outputs)
    return tuple(outputs)


@torch.library.register_fake("l3ext::segmented_attention_backward", lib=library)
def _backward_fake(
    dy: Tensor, x: Tensor, keys: Tensor, values: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    return tuple(_gradient_outputs(x, (keys, values), _Wanted(*rest[PLAN_LENGTH:])))


@kernel("table_attention_backward", 5)
def _table_backward(
    dy: Tensor,
    x: Tensor,
    table: Tensor,
    d_in: int,
    tied: bool,
    plan: PlanArguments,
    *rest: Any,
) -> tuple[Tensor, ...]:
    wanted = _Wanted(*rest)
    dx, dtable = _gradient_outputs(x, (table,), wanted, empty_output)
    rows: tuple[Tensor | None, Tensor | None] = (dtable, None)
    if not tied and dtable.ndim == 2:
        rows = _split(dtable, d_in, tied)
    _backward_into(dy, x, *_split(detached(table), d_in, tied), plan, wanted, dx, *rows)
    return dx, dtable


@torch.library.register_fake("l3ext::table_attention_backward", lib=library)
def _table_backward_fake(
    dy: Tensor, x: Tensor, table: Tensor, d_in: int, tied: bool, *rest: Any
) -> tuple[Tensor, ...]:
    return tuple(_gradient_outputs(x, (table,), _Wanted(*rest[PLAN_LENGTH:])))


# --- derivatives ----------------------------------------------------------------------------------
class TouchedRows(NamedTuple):
    """The rows that a step's tokens own, packed in the order of the segments."""

    rows: Tensor  #: int64 [R], which rows of the table, ascending
    starts: Tensor  #: int64 [>= S], where each segment's rows begin among them

    def gradient(self, table: Tensor, values: Tensor) -> Tensor:
        """The sparse gradient of ``table`` with these rows' values [R, width]."""
        return torch.sparse_coo_tensor(
            self.rows[None], values, table.shape, is_coalesced=True, check_invariants=False
        )


def touched_rows(segment_rows: Tensor, num_segments: Tensor) -> TouchedRows:
    """Where a plan's rows lie when packed; a device is waited for to count them."""
    segments = torch.arange(segment_rows.shape[0], device=segment_rows.device)
    counts = torch.diff(segment_rows, dim=1).flatten().where(segments < num_segments, 0)
    ends = counts.cumsum(0)
    starts = ends - counts
    total = int(ends[-1]) if ends.numel() > 0 else 0
    # Row r of the packed ones is row r + (first row - start) of the table.
    shift = torch.repeat_interleave(segment_rows[:, 0] - starts, counts, output_size=total)
    return TouchedRows(torch.arange(total, device=shift.device) + shift, starts)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, keys, values, *rest = inputs
    *arrays, ctx.max_rows = rest[:PLAN_LENGTH]
    ctx.scale, ctx.sparse = rest[PLAN_LENGTH:]
    ctx.save_for_backward(x, keys, values, *arrays)


def _derivative(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    needs_x, needs_keys, needs_values = ctx.needs_input_grad[:3]
    needs_rows = needs_keys or needs_values
    x, keys, values, *arrays = ctx.saved_tensors
    wanted = (ctx.scale, needs_x, needs_rows)
    touched = touched_rows(arrays[3], arrays[4]) if ctx.sparse and needs_rows else None
    packed = () if touched is None else (touched.starts, touched.rows.shape[0])
    operator = torch.ops.l3ext.segmented_attention_backward.default
    dx, dkeys, dvalues = recorded(
        operator, dy, x, keys, values, *arrays, ctx.max_rows, *wanted, *packed
    )
    if touched is not None:
        dkeys, dvalues = touched.gradient(keys, dkeys), touched.gradient(values, dvalues)
    return (
        dx if needs_x else None,
        dkeys if needs_keys else None,
        dvalues if needs_values else None,
        *(None,) * (PLAN_LENGTH + 2),
    )


def _table_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, table, ctx.d_in, ctx.tied, *rest = inputs
    *arrays, ctx.max_rows = rest[:PLAN_LENGTH]
    ctx.scale, ctx.sparse = rest[PLAN_LENGTH:]
    ctx.save_for_backward(x, table, *arrays)


def _table_derivative(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    needs_x, needs_table = ctx.needs_input_grad[:2]
    x, table, *arrays = ctx.saved_tensors
    wanted = (ctx.scale, needs_x, needs_table)
    touched = touched_rows(arrays[3], arrays[4]) if ctx.sparse and needs_table else None
    packed = () if touched is None else (touched.starts, touched.rows.shape[0])
    operator = torch.ops.l3ext.table_attention_backward.default
    operands = (dy, x, table, ctx.d_in, ctx.tied, *arrays, ctx.max_rows)
    dx, dtable = recorded(operator, *operands, *wanted, *packed)
    if touched is not None:
        dtable = touched.gradient(table, dtable)
    return (
        dx if needs_x else None,
        dtable if needs_table else None,
        *(None,) * (PLAN_LENGTH + 4),
    )


def _no_derivative(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    raise RuntimeError("directory_attention: rows behind addresses have no gradient, nor has x")


def _no_quantized_derivative(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    raise RuntimeError(
        "segmented_attention: rows of float8_e4m3fn and int8 are for inference, they have no "
        "gradient, nor has x"
    )


register_derivative("segmented_attention", _derivative, _setup_context)
register_derivative("table_attention", _table_derivative, _table_setup_context)
register_derivative("directory_attention", _no_derivative)
register_derivative("quantized_attention", _no_quantized_derivative)


def _no_second_derivative(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
    raise RuntimeError("segmented_attention: its gradients have no derivatives of their own")


for _name in ("segmented_attention_backward", "table_attention_backward"):
    register_derivative(_name, _no_second_derivative)
