"""Lookup tables outside a model, and the file that holds them.

A table file is a safetensors file: any safetensors reader opens it. Its rows are page-aligned, so
that they can be read past the page cache, and every token's block carries a checksum.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from torch import Tensor

from l3ext import _C
from l3ext._arrays import from_numpy
from l3ext._checks import all_of, check_flags, file_path, whole_numbers
from l3ext.quantization import QuantizedTable


@runtime_checkable
class RowAllocation(Protocol):
    """What the runtime reads of an :class:`l3ext.Allocation`."""

    @property
    def offsets(self) -> np.ndarray:
        """int64 [V+1]: token t owns rows ``offsets[t]`` to ``offsets[t+1]``."""
        ...

    @property
    def frequency(self) -> np.ndarray | None:
        """int64 [V], how often each token occurs; None: unknown."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class LookupTable:
    """One layer's table in RAM, used in place and kept alive by whoever serves it.

    Raises:
        TypeError: arguments of other types, or a tensor on the meta device.
    """

    #: [v, d_in + d_emb] keys and values row by row, [v, d_in] if tied, contiguous (a NumPy array
    #: becomes the tensor over its memory); or quantised, with this d_in and tied
    data: Tensor | QuantizedTable
    allocation: RowAllocation  #: who owns which rows
    d_in: int  #: width of the keys
    tied: bool = False  #: the values are the keys

    def __post_init__(self) -> None:
        if isinstance(self.data, np.ndarray):
            object.__setattr__(self, "data", from_numpy(self.data, "data"))
        if not isinstance(self.data, (Tensor, QuantizedTable)):
            raise TypeError(
                "data: expected a torch.Tensor, a NumPy array or l3ext.QuantizedTable, got "
                f"{type(self.data).__name__}"
            )
        rows = self.data if isinstance(self.data, Tensor) else self.data.storage
        if rows.is_meta:
            raise TypeError("data: expected a tensor in host memory, got one on meta, without data")
        if not isinstance(self.allocation, RowAllocation):
            raise TypeError(
                f"allocation: expected l3ext.Allocation, got {type(self.allocation).__name__}"
            )
        whole_numbers(d_in=self.d_in)
        check_flags(tied=self.tied)

    def _native(self) -> _C.Table:
        frequency = self.allocation.frequency
        owners = (
            np.ascontiguousarray(self.allocation.offsets),
            None if frequency is None else np.ascontiguousarray(frequency),
        )
        if isinstance(self.data, QuantizedTable):
            expected, got = (self.d_in, self.tied), (self.data.d_in, self.data.tied)
            if expected != got:
                raise ValueError(f"data: expected (d_in, tied) {expected}, got {got}")
            data = self.data
            return _C.Table.quantized(data.storage, data.keys, *owners, data.d_emb, data.tied)
        return _C.Table(self.data.detach(), *owners, self.d_in, self.tied)


def native_tables(tables: Iterable[LookupTable]) -> list[_C.Table]:
    """TypeError unless all are lookup tables, naming the first that is none."""
    return [table._native() for table in all_of(tables, LookupTable, "tables")]


def save_tables(path: str | os.PathLike[str], tables: Sequence[LookupTable]) -> None:
    """Write all tables of a model to one file, nearest layer first.

    Atomic: a failure (disk full, Ctrl-C) leaves an old file as it was. Streams from the tables'
    memory without copying them.

    Raises:
        ValueError, TypeError: tables that do not fit their allocation.
        OSError: with the path, where it cannot be written.
    """
    _C.write_table_file(file_path(path), native_tables(tables))


def check_same_tables(path: str | os.PathLike[str], tables: Sequence[LookupTable]) -> None:
    """Check that the table file at ``path`` holds exactly these tables, by its checksums.

    Raises:
        ValueError: it holds others; says which and in what they differ.
        OSError: it is no table file, or damaged.
    """
    path, natives = file_path(path), native_tables(tables)
    stored = _C.TableFile(path, _C.DirectIo.OFF, _C.IoEngine.AUTO).tables()
    if len(stored) != len(natives):
        raise ValueError(f"{path}: expected {len(natives)} tables, the file has {len(stored)}")
    for i, (native, theirs) in enumerate(zip(natives, stored, strict=True)):
        for field in ("dtype", "d_in", "d_emb", "tied"):
            expected, got = getattr(native, field), getattr(theirs, field)
            if expected != got:
                raise ValueError(
                    f"{path}: tables[{i}].{field}: expected {expected}, the file has {got}"
                )
        if not np.array_equal(native.offsets, theirs.offsets):
            raise ValueError(f"{path}: tables[{i}]: the file has another allocation")
        different = np.flatnonzero(native.checksums() != theirs.checksums())
        if different.size:
            raise ValueError(
                f"{path}: tables[{i}]: the file holds other rows for {different.size} tokens, "
                f"the first is {different[0]}"
            )
