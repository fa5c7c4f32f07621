"""What the runtimes share: where they compute, what they serve, and how ``with`` ends them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import NoReturn, TypeVar

import torch
from torch import Tensor

from l3ext import _C
from l3ext._operators import as_device, check_device
from l3ext.tables import LookupTable, native_tables

_Object = TypeVar("_Object")


class _LeftByWith:
    def _leave(self) -> None:
        raise NotImplementedError

    def __enter__(self: _Object) -> _Object:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._leave()

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"{type(self).__name__}: it has threads and memory of this process, and is neither "
            "copied nor pickled; of a model, set l3_runtime to None before"
        )


class ClosedByWith(_LeftByWith):
    """An object that a ``with`` block closes."""

    def close(self) -> None:
        raise NotImplementedError

    def _leave(self) -> None:
        self.close()


class EndedByWith(_LeftByWith):
    """A step that a ``with`` block ends."""

    def end(self) -> None:
        raise NotImplementedError

    def _leave(self) -> None:
        self.end()


def runtime_device(device: torch.device | str | None) -> torch.device:
    """Where attention runs, with the index of a CUDA device; None: the CPU."""
    place = as_device("cpu" if device is None else device, "device")
    check_device(place, "device")
    if place.type == "cuda" and place.index is None:
        place = torch.device("cuda", torch.cuda.current_device())
    return place


def tables_in_memory(
    tables: str | os.PathLike[str] | Sequence[LookupTable],
) -> tuple[list[_C.Table], str | None]:
    """Native tables, and the path of the file that was mapped if they come from one.

    Raises:
        TypeError: something else than a path or lookup tables.
    """
    if isinstance(tables, (str, os.PathLike)):
        path = os.fspath(tables)
        return _C.MappedTables(path).tables(), path
    if isinstance(tables, (bytes, Tensor)) or not isinstance(tables, Iterable):
        raise TypeError(
            "tables: expected a path (str or PathLike) or a list of l3ext.LookupTable, got "
            f"{type(tables).__name__}"
        )
    return native_tables(tables), None


def placement_sums(layers: list[dict[str, int]]) -> dict[str, int]:
    """What every placement says of a native runtime's layers together."""
    facts = ("table_bytes", "hot_bytes", "hot_tokens", "ring_bytes")
    return {"num_layers": len(layers)} | {fact: sum(at[fact] for at in layers) for fact in facts}
