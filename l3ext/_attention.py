"""What the operators of attention share: the plan among their arguments, checks, native calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from l3ext import _C
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


def check_matrix(tensor: Tensor, argument: str, like: Tensor | None = None) -> None:
    """TypeError, ValueError, RuntimeError unless attention takes it, beside ``like``."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{argument}: expected a torch.Tensor, got {type(tensor).__name__}")
    if tensor.ndim != 2:
        raise ValueError(f"{argument}: expected a matrix, got shape {list(tensor.shape)}")
    if like is not None and tensor.dtype == like.dtype and tensor.device == like.device:
        return  # what holds for it has been checked
    if tensor.dtype not in _FLOATS:
        raise TypeError(
            f"{argument}: expected float64, float32, bfloat16 or float16, got {tensor.dtype}"
        )
    if like is not None and tensor.dtype != like.dtype:
        raise TypeError(f"{argument}: expected {like.dtype}, the dtype of x, got {tensor.dtype}")
    if like is not None and tensor.device != like.device:
        raise RuntimeError(f"{argument}: expected device {like.device}, got {tensor.device}")
    if tensor.is_cpu:
        return
    check_device(tensor.device, argument)
    if tensor.dtype == torch.float64 and tensor.is_cuda:
        raise TypeError(
            f"{argument}: expected float32, bfloat16 or float16 on {tensor.device}, got "
            "torch.float64, which only the CPU computes"
        )


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
