"""The torch operators: the plan of a step and segmented attention.

Every operator is declared here with ``torch.library``: a CPU kernel that calls the native core, a
fake for tracing, and the derivative. Outputs are allocated here; the native side only fills them.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from l3ext import _C

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_library = torch.library.Library("l3ext", "DEF")

_PLAN_ARGS = (
    "Tensor permutation, Tensor segment_queries, Tensor segment_rows, "
    "Tensor num_segments, Tensor table_rows"
)
_library.define(
    "plan(Tensor token_ids, Tensor offsets, bool check_offsets) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    f"segmented_attention(Tensor x, Tensor keys, Tensor values, {_PLAN_ARGS}, float scale)"
    " -> Tensor"
)
_library.define(
    "segmented_attention_backward(Tensor dy, Tensor x, Tensor keys, Tensor values, "
    f"{_PLAN_ARGS}, float scale, bool wants_dx, bool wants_rows) -> (Tensor, Tensor, Tensor)"
)
_library.define(
    f"table_attention(Tensor x, Tensor table, int d_in, bool tied, {_PLAN_ARGS}, float scale)"
    " -> Tensor"
)
_library.define(
    "table_attention_backward(Tensor dy, Tensor x, Tensor table, int d_in, bool tied, "
    f"{_PLAN_ARGS}, float scale, bool wants_dx, bool wants_rows) -> (Tensor, Tensor)"
)


# --- plan -----------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class Plan:
    """The positions of one step, sorted by token id and cut into segments of equal ids.

    Depends on the token ids alone: one plan serves every layer of the step and both directions.
    Its arrays have a fixed size, N positions, whatever the number S of segments; entries past S
    are padding (no queries, no rows, token -1).
    """

    permutation: Tensor  #: int32 [N], sorted position -> original flat position; stable
    segment_tokens: Tensor  #: int32 [N], the token id of each segment, ascending
    segment_queries: Tensor  #: int32 [N+1], first sorted position of each segment
    segment_rows: Tensor  #: int64 [N, 2], first row and one past the last row of each segment
    num_segments: Tensor  #: int32 [1], S
    table_rows: Tensor  #: int64 [1], rows that the table must have; -1: any

    @property
    def num_tokens(self) -> int:
        """N, the number of positions."""
        return self.permutation.shape[0]

    def with_rows(self, segment_rows: Tensor) -> Plan:
        """The same plan over a table that holds the segments' rows elsewhere.

        Args:
            segment_rows: int64 [>= S, 2], first row and one past the last row of each segment.
        """
        anywhere = torch.full_like(self.table_rows, -1)
        return dataclasses.replace(self, segment_rows=segment_rows, table_rows=anywhere)

    def _arrays(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return (
            self.permutation,
            self.segment_queries,
            self.segment_rows,
            self.num_segments,
            self.table_rows,
        )


def plan(token_ids: Tensor | np.ndarray | Sequence[int], offsets: Tensor | np.ndarray) -> Plan:
    """Sort the positions of a step by token id.

    Args:
        token_ids: integer array of any shape with N elements, on the device that will compute.
        offsets: int64 [V+1]; token ``t`` owns rows ``offsets[t]`` to ``offsets[t+1]`` of a table
            with ``offsets[V]`` rows.

    Returns:
        The plan for the N positions in flat (row-major) order.

    Raises:
        ValueError: an id outside [0, V) (says which position), or offsets that do not start at 0
            or that fall.
        TypeError: ids that are no integers, offsets that are not int64.
        RuntimeError: a device that this build has no kernels for.
    """
    return _plan(_as_ids(token_ids), _as_offsets(offsets), check_offsets=True)


def _plan(token_ids: Tensor, offsets: Tensor, *, check_offsets: bool) -> Plan:
    return Plan(*torch.ops.l3ext.plan(token_ids.reshape(-1), offsets, check_offsets))


def _as_ids(token_ids: Any) -> Tensor:
    ids = torch.as_tensor(token_ids)
    if ids.numel() == 0 and not isinstance(token_ids, (Tensor, np.ndarray)):
        ids = ids.to(torch.int64)  # an empty list has no dtype of its own
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(f"token_ids: expected an integer dtype, got {ids.dtype}")
    _check_device(ids, "token_ids")
    return ids if ids.dtype in (torch.int32, torch.int64) else ids.to(torch.int64)


def _as_offsets(offsets: Any) -> Tensor:
    tensor = offsets if isinstance(offsets, Tensor) else _borrow(offsets)
    if tensor.dtype != torch.int64:
        raise TypeError(f"offsets: expected int64, got {tensor.dtype}")
    if tensor.ndim != 1 or tensor.shape[0] < 1:
        raise ValueError(f"offsets: expected shape [V+1], got {list(tensor.shape)}")
    return tensor


def _borrow(array: Any) -> Tensor:
    with warnings.catch_warnings():
        # An allocation's arrays are read-only, of which torch warns; the plan only reads them.
        warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)
        return torch.as_tensor(array)


def _check_device(tensor: Tensor, argument: str) -> None:
    if tensor.device.type not in ("cpu", "meta"):
        raise RuntimeError(
            f"{argument}: expected a tensor on cpu, got one on {tensor.device}: "
            "this build has no kernels for that device"
        )


@torch.library.impl(_library, "plan", "CPU")
def _plan_cpu(token_ids: Tensor, offsets: Tensor, check_offsets: bool) -> tuple[Tensor, ...]:
    outputs = _plan_outputs(token_ids, offsets, check_offsets)
    _C.plan(token_ids.contiguous(), offsets.contiguous(), check_offsets, *outputs)
    return outputs


@torch.library.register_fake("l3ext::plan", lib=_library)
def _plan_outputs(token_ids: Tensor, offsets: Tensor, check_offsets: bool) -> tuple[Tensor, ...]:
    count = token_ids.shape[0]

    def empty(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=token_ids.device)

    return (
        empty(count),
        empty(count),
        empty(count + 1),
        empty(count, 2, dtype=torch.int64),
        empty(1),
        empty(1, dtype=torch.int64),
    )


# --- segmented attention --------------------------------------------------------------------------
def segmented_attention(
    x: Tensor, keys: Tensor, values: Tensor, plan: Plan, scale: float = 1.0
) -> Tensor:
    """Attention of every position to the rows of its own token.

    For position i with token t: ``softmax(scale * keys[rows of t] @ x[i]) @ values[rows of t]``.

    Args:
        x: [N, d_in] queries; float64, float32, bfloat16 or float16.
        keys: [v, d_in], dtype of ``x``. Rows may be strided: keys and values may be two views of
            one table. ``values is keys``: a tied table.
        values: [v, d_emb], dtype of ``x``.
        plan: of the N token ids, from :func:`plan`.
        scale: factor of the logits.

    Returns:
        [N, d_emb], dtype of ``x``. Sums are float32 (float64 for float64 inputs); the same bits on
        every run and for any number of threads. Differentiable in x, keys and values.

    Raises:
        ValueError: shapes that do not fit each other or the plan.
        TypeError: unequal or unsupported dtypes.
        RuntimeError: a device that this build has no kernels for.
    """
    _check_matrix(x, "x")
    _check_matrix(keys, "keys", like=x)
    _check_matrix(values, "values", like=x)
    if x.shape[1] != keys.shape[1]:
        raise ValueError(
            f"keys: expected {x.shape[1]} columns, the width of x, got {keys.shape[1]}"
        )
    if keys.shape[0] != values.shape[0]:
        raise ValueError(
            f"values: expected {keys.shape[0]} rows, as many as keys, got {values.shape[0]}"
        )
    _check_plan(x, plan)
    if values is keys:
        return table_attention(x, keys, plan, tied=True, scale=scale)
    return torch.ops.l3ext.segmented_attention(x, keys, values, *plan._arrays(), float(scale))


def table_attention(
    x: Tensor, table: Tensor, plan: Plan, *, tied: bool, scale: float = 1.0
) -> Tensor:
    """:func:`segmented_attention` over one row-interleaved table, with one gradient for it.

    Args:
        x: [N, d_in].
        table: [v, d_in + d_emb], the keys in the first d_in columns; [v, d_in] if ``tied``.
        plan: of the N token ids.
        tied: keys and values are the same rows.
        scale: factor of the logits.

    Returns:
        [N, d_emb], dtype of ``x``.
    """
    _check_matrix(x, "x")
    _check_matrix(table, "table", like=x)
    d_in = x.shape[1]
    if (table.shape[1] != d_in) if tied else (table.shape[1] <= d_in):
        wanted = f"{d_in}" if tied else f"more than {d_in}"
        raise ValueError(f"table: expected {wanted} columns, got {table.shape[1]}")
    _check_plan(x, plan)
    return torch.ops.l3ext.table_attention(x, table, d_in, tied, *plan._arrays(), float(scale))


def _check_matrix(tensor: Tensor, argument: str, like: Tensor | None = None) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{argument}: expected a torch.Tensor, got {type(tensor).__name__}")
    if tensor.ndim != 2:
        raise ValueError(f"{argument}: expected a matrix, got shape {list(tensor.shape)}")
    if tensor.dtype not in _FLOATS:
        raise TypeError(
            f"{argument}: expected float64, float32, bfloat16 or float16, got {tensor.dtype}"
        )
    if like is not None and tensor.dtype != like.dtype:
        raise TypeError(f"{argument}: expected {like.dtype}, the dtype of x, got {tensor.dtype}")
    if like is not None and tensor.device != like.device:
        raise RuntimeError(f"{argument}: expected device {like.device}, got {tensor.device}")
    _check_device(tensor, argument)


def _check_plan(x: Tensor, plan: Plan) -> None:
    if not isinstance(plan, Plan):
        raise TypeError(f"plan: expected l3ext.Plan, got {type(plan).__name__}")
    if plan.num_tokens != x.shape[0]:
        raise ValueError(
            f"x: expected {plan.num_tokens} rows, one per planned token, got {x.shape[0]}"
        )


def _rows(matrix: Tensor) -> Tensor:
    """Rows of adjacent elements; only a last dimension with gaps costs a copy."""
    matrix = matrix.detach()
    return matrix if matrix.stride(1) == 1 or matrix.shape[1] <= 1 else matrix.contiguous()


def _split(table: Tensor, d_in: int, tied: bool) -> tuple[Tensor, Tensor]:
    return (table, table) if tied else (table[:, :d_in], table[:, d_in:])


@torch.library.impl(_library, "segmented_attention", "CPU")
def _forward_cpu(x: Tensor, keys: Tensor, values: Tensor, *rest: Any) -> Tensor:
    *plan, scale = rest
    y = x.new_empty(x.shape[0], values.shape[1])
    threads = torch.get_num_threads()
    _C.segmented_attention(_rows(x), _rows(keys), _rows(values), plan, scale, threads, y)
    return y


@torch.library.register_fake("l3ext::segmented_attention", lib=_library)
def _forward_fake(x: Tensor, keys: Tensor, values: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(x.shape[0], values.shape[1])


@torch.library.impl(_library, "table_attention", "CPU")
def _table_forward_cpu(x: Tensor, table: Tensor, d_in: int, tied: bool, *rest: Any) -> Tensor:
    return _forward_cpu(x, *_split(_rows(table), d_in, tied), *rest)


@torch.library.register_fake("l3ext::table_attention", lib=_library)
def _table_forward_fake(x: Tensor, table: Tensor, d_in: int, tied: bool, *rest: Any) -> Tensor:
    return x.new_empty(x.shape[0], d_in if tied else table.shape[1] - d_in)


def _backward_cpu_into(
    dy: Tensor,
    x: Tensor,
    keys: Tensor,
    values: Tensor,
    plan: Sequence[Tensor],
    scale: float,
    dx: Tensor | None,
    dkeys: Tensor | None,
    dvalues: Tensor | None,
) -> None:
    inputs = (_rows(dy), _rows(x), _rows(keys), _rows(values))
    threads = torch.get_num_threads()
    _C.segmented_attention_backward(*inputs, plan, scale, threads, dx, dkeys, dvalues)


@torch.library.impl(_library, "segmented_attention_backward", "CPU")
def _backward_cpu(
    dy: Tensor, x: Tensor, keys: Tensor, values: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    *arrays, scale, wants_dx, wants_rows = rest
    dx, dkeys, dvalues = _backward_outputs(dy, x, keys, values, *rest)
    rows = (dkeys, dvalues) if wants_rows else (None, None)
    _backward_cpu_into(dy, x, keys, values, arrays, scale, dx if wants_dx else None, *rows)
    return dx, dkeys, dvalues


@torch.library.register_fake("l3ext::segmented_attention_backward", lib=_library)
def _backward_outputs(
    dy: Tensor, x: Tensor, keys: Tensor, values: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    *_, wants_dx, wants_rows = rest
    return (
        x.new_empty(x.shape if wants_dx else (0,)),
        keys.new_empty(keys.shape if wants_rows else (0,)),
        values.new_empty(values.shape if wants_rows else (0,)),
    )


@torch.library.impl(_library, "table_attention_backward", "CPU")
def _table_backward_cpu(
    dy: Tensor, x: Tensor, table: Tensor, d_in: int, tied: bool, *rest: Any
) -> tuple[Tensor, Tensor]:
    *arrays, scale, wants_dx, wants_rows = rest
    dx, dtable = _table_backward_outputs(dy, x, table, d_in, tied, *rest)
    rows: tuple[Tensor | None, Tensor | None] = (None, None)
    if wants_rows:
        rows = (dtable, None) if tied else _split(dtable, d_in, tied)
    _backward_cpu_into(
        dy, x, *_split(table, d_in, tied), arrays, scale, dx if wants_dx else None, *rows
    )
    return dx, dtable


@torch.library.register_fake("l3ext::table_attention_backward", lib=_library)
def _table_backward_outputs(
    dy: Tensor, x: Tensor, table: Tensor, d_in: int, tied: bool, *rest: Any
) -> tuple[Tensor, Tensor]:
    *_, wants_dx, wants_rows = rest
    return (
        x.new_empty(x.shape if wants_dx else (0,)),
        table.new_empty(table.shape if wants_rows else (0,)),
    )


# --- derivatives ----------------------------------------------------------------------------------
def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, keys, values, *arrays, ctx.scale = inputs
    ctx.save_for_backward(x, keys, values, *arrays)


def _derivative(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    needs_x, needs_keys, needs_values = ctx.needs_input_grad[:3]
    needs_rows = needs_keys or needs_values
    dx, dkeys, dvalues = torch.ops.l3ext.segmented_attention_backward(
        dy, *ctx.saved_tensors, ctx.scale, needs_x, needs_rows
    )
    return (
        dx if needs_x else None,
        dkeys if needs_keys else None,
        dvalues if needs_values else None,
        *(None,) * 6,
    )


def _table_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, table, ctx.d_in, ctx.tied, *arrays, ctx.scale = inputs
    ctx.save_for_backward(x, table, *arrays)


def _table_derivative(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    needs_x, needs_table = ctx.needs_input_grad[:2]
    x, table, *arrays = ctx.saved_tensors
    dx, dtable = torch.ops.l3ext.table_attention_backward(
        dy, x, table, ctx.d_in, ctx.tied, *arrays, ctx.scale, needs_x, needs_table
    )
    return (dx if needs_x else None, dtable if needs_table else None, *(None,) * 8)


torch.library.register_autograd(
    "l3ext::segmented_attention", _derivative, setup_context=_setup_context, lib=_library
)
torch.library.register_autograd(
    "l3ext::table_attention",
    _table_derivative,
    setup_context=_table_setup_context,
    lib=_library,
)
