"""Arrays as callers hold them, as torch and the native module take them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

#: What callers may pass where torch tensors are computed with.
Array = torch.Tensor | npt.NDArray[Any]


def host_integers(values: Any, argument: str) -> npt.NDArray[Any]:
    """``values`` as a one-dimensional, contiguous int32 or int64 NumPy array.

    Takes NumPy arrays, torch tensors in host memory, other host arrays with ``__dlpack__``, and
    sequences of integers. int32 and int64 arrays that are contiguous come back without a copy; any
    other integer dtype is widened. One without elements may be of floats, as NumPy and torch make
    it of an empty list.

    Raises:
        TypeError: not integers, or not in host memory.
        ValueError: not one-dimensional, or a uint64 value of 2^63 or more.
    """
    array = _as_numpy(values, argument)
    if array.size == 0 and np.issubdtype(array.dtype, np.floating):
        array = array.astype(np.int64)
    if not np.issubdtype(array.dtype, np.integer):
        raise TypeError(f"{argument}: expected integers, got dtype {array.dtype}")
    if array.ndim != 1:
        raise ValueError(
            f"{argument}: expected one dimension, got {array.ndim} (shape {list(array.shape)})"
        )
    dtype: type[np.int32] | type[np.int64] = np.int64
    if np.can_cast(array.dtype, np.int32):
        dtype = np.int32
    elif array.dtype.kind == "u" and array.dtype.itemsize == 8:
        wide = np.flatnonzero(array > np.iinfo(np.int64).max)
        if wide.size:
            raise ValueError(
                f"{argument}: expected values below 2**63, got {array[wide[0]]} at position "
                f"{wide[0]}"
            )
    return np.ascontiguousarray(array, dtype=dtype)


def from_numpy(array: Any, argument: str) -> torch.Tensor:
    """A NumPy array as a tensor, without a copy where torch has its strides.

    Raises:
        TypeError: something else, or a dtype that torch has not.
    """
    if not isinstance(array, np.ndarray):
        raise TypeError(
            f"{argument}: expected a torch.Tensor or a NumPy array, got {type(array).__name__}"
        )
    return as_tensor(array, argument, "a NumPy array that torch takes")


def as_tensor(array: Any, argument: str, expected: str) -> torch.Tensor:
    """``torch.as_tensor``, whose errors do not say of what, and which warns of read-only arrays."""
    if isinstance(array, torch.Tensor):
        return array
    if isinstance(array, np.ndarray) and any(
        stride < 0 or stride % array.itemsize for stride in array.strides
    ):
        array = np.ascontiguousarray(array)  # torch has no such strides
    try:
        with warnings.catch_warnings():
            # An allocation's arrays are read-only, as mapped files may be; all are only read.
            warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)
            return torch.as_tensor(array)
    except (TypeError, ValueError, RuntimeError) as error:
        kind = ValueError if isinstance(error, ValueError) else TypeError
        raise kind(
            f"{argument}: expected {expected}, got {type(array).__name__}: {error}"
        ) from error


def _as_numpy(values: Any, argument: str) -> npt.NDArray[Any]:
    if isinstance(values, np.ndarray):
        return values
    if isinstance(values, torch.Tensor):
        if values.device.type != "cpu":
            raise TypeError(f"{argument}: expected host memory, got a tensor on {values.device}")
        return values.detach().numpy()
    if hasattr(values, "__dlpack_device__"):
        device = int(values.__dlpack_device__()[0])
        if device not in (1, 3):  # kDLCPU, kDLCUDAHost
            raise TypeError(
                f"{argument}: expected host memory, got an array on DLPack device type {device}"
            )
        return np.from_dlpack(values)
    if isinstance(values, Sequence) and not isinstance(values, (str, bytes)):
        if len(values) == 0:
            return np.empty(0, np.int64)
        try:
            return np.asarray(values)
        except ValueError as error:  # ragged
            raise TypeError(f"{argument}: expected integers, got {error}") from error
    raise TypeError(
        f"{argument}: expected a NumPy array, a torch tensor or a list of integers, "
        f"got {type(values).__name__}"
    )
