"""What the benchmarks share: names that are known, and the ids that they run on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from l3ext.bench.workload import Workload


def check_names(option: str, names: Sequence[str], known: Sequence[str]) -> None:
    """ValueError for the first name that is not known."""
    for name in names:
        if name not in known:
            raise ValueError(f"{option}: expected one of {', '.join(known)}, got {name!r}")


def dtype_named(name: str) -> torch.dtype:
    """torch's dtype of this name."""
    import torch

    dtype: torch.dtype = getattr(torch, name)
    return dtype


def make_workload(
    text: list[Path] | None,
    by_law: bool,
    vocab_size: int | None,
    total_rows: int | None,
    max_rows: int,
    largest: int,
) -> Workload:
    """Ids and rows of these texts, of the Python standard library, or by Zipf's law."""
    from l3ext.bench.workload import from_documents, from_zipf, standard_library_documents
    from l3ext.corpus import read_documents

    if by_law:
        if text:
            raise ValueError("--zipf: expected no text beside it")
        given = {"vocab_size": vocab_size, "total_rows": total_rows}
        wanted = {name: value for name, value in given.items() if value is not None}
        return from_zipf(num_tokens=4 * largest, max_rows=max_rows, **wanted)
    return from_documents(
        list(read_documents(text)) if text else standard_library_documents(),
        source=source_of(text),
        vocab_size=16384 if vocab_size is None else vocab_size,
        total_rows=total_rows,
        max_rows=max_rows,
    )


def source_of(text: list[Path] | None) -> str:
    """What to call the texts."""
    if not text:
        return "Python standard library"
    names = [path.name for path in text]
    return ", ".join(names) if len(names) <= 3 else f"{len(names)} files, {names[0]} to {names[-1]}"
