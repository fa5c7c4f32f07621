"""Tables whose rows are stored in 8 bits, for inference.

Half the bytes of bfloat16 rows: what decoding on a CPU and fetching rows from RAM or disk wait for.
Each half of a row, its keys and its values, has a float32 scale of its own. Attention multiplies
the scores by the keys' scales and the softmax's weights by the values', so that no row is ever
widened but in registers.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from torch import Tensor

from l3ext._arrays import Array, from_numpy
from l3ext._checks import integer

#: The storage dtypes and the largest value of each that is used: int8 symmetrically.
_LARGEST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}
QUANTIZED_DTYPES = tuple(_LARGEST)
_FLOAT32 = torch.finfo(torch.float32)


@dataclasses.dataclass(frozen=True, eq=False)
class QuantizedTable:
    """A table in 8 bits. Everything that a token's rows need is one contiguous range of bytes.

    A row is: ``d_in`` bytes of keys, ``d_emb`` bytes of values (none if tied), from the next
    multiple of 4 the scale of the keys and the scale of the values (tied: one for both), and zeros
    up to a multiple of 16 bytes. With d_in 2048 and d_emb 1024: 3088 bytes.

    Use it as ``segmented_attention(x, table.keys, table.values, plan, key_scales=table.key_scales,
    value_scales=table.value_scales)``.

    Raises:
        TypeError: a storage that is not uint8, or another dtype than float8_e4m3fn and int8.
        ValueError: widths that do not fit the storage.
    """

    storage: Tensor = dataclasses.field(repr=False)  #: uint8 [v, row_bytes], contiguous
    dtype: torch.dtype  #: torch.float8_e4m3fn or torch.int8
    d_in: int  #: width of the keys
    d_emb: int  #: width of the values
    tied: bool = False  #: the values are the keys
    # Made once: to make them takes longer than some of the steps that read them.
    _views: tuple[Tensor, Tensor, Tensor, Tensor] = dataclasses.field(init=False, repr=False)

    def __post_init__(self) -> None:
        check_quantized_dtype(self.dtype)
        if not isinstance(self.storage, Tensor) or self.storage.dtype != torch.uint8:
            got = getattr(self.storage, "dtype", type(self.storage).__name__)
            raise TypeError(f"storage: expected a torch.uint8 tensor, got {got}")
        integer(self.d_in, "d_in", 1)
        integer(self.d_emb, "d_emb", 1)
        columns = row_bytes(self.d_in, self.d_emb, tied=self.tied)
        shape = list(self.storage.shape)
        if len(shape) != 2 or shape[1] != columns or not self.storage.is_contiguous():
            raise ValueError(
                f"storage: expected contiguous rows of {columns} bytes for d_in {self.d_in}, d_emb "
                f"{self.d_emb}{', tied' if self.tied else ''}, got shape {shape}, strides "
                f"{list(self.storage.stride())}"
            )
        elements, words = self.storage.view(self.dtype), self.storage.view(torch.float32)
        keys, key_scales = elements[:, : self.d_in], words[:, self.scale_offset // 4]
        values, value_scales = keys, key_scales
        if not self.tied:
            values = elements[:, self.d_in : self.d_in + self.d_emb]
            value_scales = words[:, self.scale_offset // 4 + 1]
        object.__setattr__(self, "_views", (keys, values, key_scales, value_scales))

    def __reduce__(self) -> tuple[Any, ...]:
        # Views in a pickle of their own would have storages of their own.
        return QuantizedTable, (self.storage, self.dtype, self.d_in, self.d_emb, self.tied)

    @property
    def keys(self) -> Tensor:
        """[v, d_in] of ``dtype``: a strided view."""
        return self._views[0]

    @property
    def values(self) -> Tensor:
        """[v, d_emb] of ``dtype``: a strided view; the keys if tied."""
        return self._views[1]

    @property
    def key_scales(self) -> Tensor:
        """float32 [v]: a strided view."""
        return self._views[2]

    @property
    def value_scales(self) -> Tensor:
        """float32 [v]: a strided view; the keys' if tied."""
        return self._views[3]

    @property
    def scale_offset(self) -> int:
        """Bytes from the start of a row to its first scale, for ``directory_attention``."""
        return _scale_offset(self.d_in, self.d_emb, self.tied)

    @property
    def nbytes(self) -> int:
        """Bytes of the storage."""
        return self.storage.nbytes

    def dequantize(self) -> Tensor:
        """float32 [v, d_in + d_emb] ([v, d_in] if tied): the table that these rows stand for."""
        keys = self.keys.float() * self.key_scales[:, None]
        if self.tied:
            return keys
        return torch.cat([keys, self.values.float() * self.value_scales[:, None]], dim=1)


def quantize_rows(
    table: Array, d_in: int, dtype: torch.dtype = torch.int8, *, tied: bool = False
) -> QuantizedTable:
    """Store a table's rows in 8 bits with one scale a row for the keys and one for the values.

    A scale is the largest magnitude of its half over the largest of the dtype (448 for
    float8_e4m3fn, 127 for int8), at least 2^-126; 1 where all are zero. Elements over their scale
    are rounded to nearest, ties to even. Works a part at a time: needs little memory beside the
    result.

    Args:
        table: [v, d_in + d_emb] keys and values row by row, [v, d_in] if ``tied``; float64,
            float32, bfloat16 or float16.
        d_in: width of the keys.
        dtype: torch.int8, whose steps are equal over a row, or torch.float8_e4m3fn, whose steps
            grow with the magnitude: better only for rows whose largest elements are far from the
            rest.
        tied: the values are the keys.

    Raises:
        TypeError: another dtype.
        ValueError: widths that do not fit; a row with NaN or infinity, or beyond float32's range,
            which one.
    """
    check_quantized_dtype(dtype)
    if isinstance(table, np.ndarray):
        table = from_numpy(table, "table")
    if not isinstance(table, Tensor) or not table.dtype.is_floating_point or table.itemsize == 1:
        got = getattr(table, "dtype", type(table).__name__)
        raise TypeError(f"table: expected float64, float32, bfloat16 or float16, got {got}")
    integer(d_in, "d_in", 1)
    if table.ndim != 2 or (table.shape[1] != d_in if tied else table.shape[1] <= d_in):
        wanted = f"[v, {d_in}]" if tied else f"[v, more than {d_in}]"
        raise ValueError(f"table: expected shape {wanted}, got {list(table.shape)}")
    table = table.detach()
    d_emb = table.shape[1] - (0 if tied else d_in)
    storage = table.new_zeros(table.shape[0], row_bytes(d_in, d_emb, tied=tied), dtype=torch.uint8)
    result = QuantizedTable(storage, dtype, d_in, d_emb, tied)
    halves = [("keys", table[:, :d_in], result.keys, result.key_scales)]
    if not tied:
        halves.append(("values", table[:, d_in:], result.values, result.value_scales))
    part = 4096
    for half, rows, elements, scales in halves:
        for first in range(0, len(table), part):
            chosen = slice(first, first + part)
            _quantize(rows[chosen], elements[chosen], scales[chosen], first, half)
    return result


def _quantize(rows: Tensor, elements: Tensor, scales: Tensor, first: int, half: str) -> None:
    """Quantise ``rows``, of which the first is row ``first`` of the table, into two views."""
    wide = rows if rows.dtype == torch.float64 else rows.float()
    most = wide.abs().amax(dim=1)  # NaN where there is any
    beyond = torch.nonzero(~(most <= _FLOAT32.max))
    if beyond.numel():
        row = int(beyond[0])
        raise ValueError(
            f"table: expected {half} that are finite in float32, got {float(most[row])} as the "
            f"largest magnitude in row {first + row}"
        )
    largest = _LARGEST[elements.dtype]
    # Neither a subnormal nor one by which the largest element would be infinite again.
    scale = (most / largest).clamp(2.0**-126, _FLOAT32.max / largest * (1 - 2.0**-22))
    scale = torch.where(most > 0, scale, 1.0).float()
    quotient = wide / scale[:, None]
    if elements.dtype == torch.int8:
        quotient = quotient.round()
    elements.copy_(quotient.clamp(-largest, largest))
    scales.copy_(scale)


def row_bytes(d_in: int, d_emb: int, *, tied: bool) -> int:
    """Bytes of a quantised row."""
    return -(-(_scale_offset(d_in, d_emb, tied) + (4 if tied else 8)) // 16) * 16


def _scale_offset(d_in: int, d_emb: int, tied: bool) -> int:
    return -(-(d_in if tied else d_in + d_emb) // 4) * 4


def check_quantized_dtype(dtype: torch.dtype, argument: str = "dtype") -> None:
    """TypeError unless rows can be stored as ``dtype``."""
    if not isinstance(dtype, torch.dtype) or dtype not in _LARGEST:
        raise TypeError(f"{argument}: expected torch.float8_e4m3fn or torch.int8, got {dtype}")
