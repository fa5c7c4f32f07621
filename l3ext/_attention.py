"""What the operators of attention share: the plan among their arguments, checks, native calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from l3ext import _C
from l3ext._arrays import Array, from_numpy
from l3ext._operators import check_device, detached, queue
from l3ext.plans import Plan

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

#: The fields of a Plan, in their order, as a schema has them.
PLAN = (
    "Tensor permutation, Tensor segment_tokens, Tensor segment_queries, Tensor segment_rows, "
    "Tensor num_segments, Tensor table_rows, Tensor schedule, SymInt max_rows"
)

#: A plan as its kernels get it: from the dispatcher its fields.
PlanArguments = Plan | Sequence[Any]


def as_matrix(tensor: Array, argument: str, like: Tensor | None = None) -> Tensor:
    """As a tensor that attention takes, beside ``like``, or TypeError, ValueError, RuntimeError."""
    if not isinstance(tensor, Tensor):
        tensor = from_numpy(tensor, argument)
    if tensor.ndim != 2:
        raise ValueError(f"{argument}: expected a matrix, got shape {list(tensor.shape)}")
    if like is not None and tensor.dtype == like.dtype and tensor.device == like.device:
        return tensor  # what holds for it has been checked
    if tensor.dtype not in _FLOATS:
        raise TypeError(
            f"{argument}: expected float64, float32, bfloat16 or float16, got {tensor.dtype}"
        )
    if like is not None and tensor.dtype != like.dtype:
        raise TypeError(f"{argument}: expected {like.dtype}, the dtype of x, got {tensor.dtype}")
    if like is not None and tensor.device != like.device:
        raise RuntimeError(f"{argument}: expected device {like.device}, got {tensor.device}")
    if tensor.is_cpu:
        return tensor
    check_device(tensor.device, argument)
    if tensor.dtype == torch.float64 and tensor.is_cuda:
        raise TypeError(
            f"{argument}: expected float32, bfloat16 or float16 on {tensor.device}, got "
            "torch.float64, which only the CPU computes"
        )
    return tensor


def quantized_rows(
    x: Tensor, keys: Tensor, values: Any, key_scales: Any, value_scales: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keys, values, their scales as attention takes them; an error names what it does not take."""
    check_quantized_queries(x, keys.dtype)
    values, key_scales, value_scales = (
        from_numpy(array, name) if isinstance(array, np.ndarray) else array
        for array, name in (
            (values, "values"),
            (key_scales, "key_scales"),
            (value_scales, "value_scales"),
        )
    )
    if not isinstance(values, Tensor) or values.dtype != keys.dtype:
        got = getattr(values, "dtype", type(values).__name__)
        raise TypeError(f"values: expected {keys.dtype}, the dtype of keys, got {got}")
    for rows, name in ((keys, "keys"), (values, "values")):
        if rows.ndim != 2:
            raise ValueError(f"{name}: expected a matrix, got shape {list(rows.shape)}")
    for scales, name in ((key_scales, "key_scales"), (value_scales, "value_scales")):
        if not isinstance(scales, Tensor) or scales.dtype != torch.float32:
            got = getattr(scales, "dtype", type(scales).__name__)
            raise TypeError(f"{name}: expected torch.float32 for {keys.dtype} rows, got {got}")
        if list(scales.shape) != [keys.shape[0]]:
            raise ValueError(
                f"{name}: expected shape [{keys.shape[0]}], a scale for each row of keys, got "
                f"{list(scales.shape)}"
            )
    arrays = {"keys": keys, "values": values, "key_scales": key_scales}
    for name, tensor in (arrays | {"value_scales": value_scales}).items():
        if tensor.device != x.device:
            raise RuntimeError(f"{name}: expected device {x.device}, got {tensor.device}")
    return keys, values, key_scales, value_scales


def check_quantized_queries(x: Tensor, row_dtype: torch.dtype) -> None:
    """TypeError, RuntimeError unless attention to 8-bit rows takes such queries."""
    if x.dtype == torch.float64:
        raise TypeError(
            f"x: expected float32, bfloat16 or float16 for {row_dtype} rows, whose sums are "
            "float32, got torch.float64"
        )
    if x.is_cuda:
        raise RuntimeError(f"x: expected the CPU, which {row_dtype} rows need, got {x.device}")


def check_plan(x: Tensor, plan: Plan) -> None:
    """TypeError, ValueError unless it is a plan on the device of ``x`` and of as many tokens."""
    if not isinstance(plan, Plan):
        raise TypeError(f"plan: expected l3ext.Plan, got {type(plan).__name__}")
    if plan.num_tokens != x.shape[0]:
        raise ValueError(
            f"x: expected {plan.num_tokens} rows, one per planned token, got {x.shape[0]}"
        )
    if plan.permutation.device != x.device:
        raise TypeError(
            f"plan: expected one on {x.device}, where x lies, got one on {plan.permutation.device}"
        )


def as_queries(matrix: Tensor) -> Tensor:
    """x or dy as the kernels read it: a layout that they do not take costs a copy."""
    matrix = detached(matrix)
    if matrix.stride(1) != 1 and matrix.shape[1] > 1:
        return matrix.contiguous()
    # On CUDA rows are loaded 16 bytes at a time.
    if matrix.is_cuda and (matrix.data_ptr() | matrix.stride(0) * matrix.element_size()) % 16:
        return matrix.clone(memory_format=torch.contiguous_format)
    return matrix


def attend_by_directory(
    x: Tensor,
    directory: Tensor,
    plan: PlanArguments,
    d_emb: int,
    row_stride: int,
    value_offset: int,
    scale: float,
    row_dtype: torch.dtype | None = None,
    scale_offset: int = 0,
    spare: int = 0,
) -> Tensor:
    """The work of ``directory_attention``, of which see the arguments.

    Args:
        plan: or its fields.
        spare: multiprocessors of a device that are left to others.
    """
    row_name = None if row_dtype is None else str(row_dtype).removeprefix("torch.")
    y = x.new_empty(x.shape[0], d_emb)
    operands = (as_queries(x), directory, plan, row_stride, value_offset, scale)
    _C.directory_attention(
        *operands, torch.get_num_threads(), y, queue(x.device), row_name, scale_offset, spare
    )
    return y
