"""Integer arrays as callers hold them, as the native module takes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch


def host_integers(values: Any, argument: str) -> npt.NDArray[Any]:
    """``values`` as a one-dimensional, contiguous int32 or int64 NumPy array.

    Takes NumPy arrays, torch tensors in host memory, other host arrays with ``__dlpack__``, and
    sequences of integers. int32 and int64 arrays that are contiguous come back without a copy; any
    other integer dtype is widened.

    Raises:
        TypeError: not integers, or not in host memory.
        ValueError: not one-dimensional, or a uint64 value of 2^63 or more.
    """
    array = _as_numpy(values, argument)
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
