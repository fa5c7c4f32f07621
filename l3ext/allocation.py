"""Who owns how many rows: count a corpus with LZW, grant rows to tokens, keep the result.

>>> import l3ext
>>> counter = l3ext.LZWCounter(4)
>>> counter.update([0, 1, 0, 1, 0, 2], offsets=[0, 3, 6])
>>> counter.allocate(8, max_rows=3).rows.tolist()
[3, 3, 1, 1]
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy
import torch  # before _C, see l3ext/__init__.py

from l3ext import _C
from l3ext._arrays import host_integers
from l3ext._checks import file_path, integer
from l3ext._files import atomic_path

_FORMAT = "l3ext.allocation"
_VERSION = "1"
_CODEWORDS_PER_CALL = 1 << 14
_MANY_THREADS = 1 << 16  # any larger number means the same, and fits what takes it
_INT32_MAX = int(np.iinfo(np.int32).max)
_INT64_MAX = int(np.iinfo(np.int64).max)


@dataclass(frozen=True, eq=False, repr=False)
class Allocation:
    """Rows per token. Immutable: the arrays are read-only.

    Make one with ``LZWCounter.allocate``, ``l3ext.allocate``, ``uniform``, ``from_rows`` or
    ``load``.

    Attributes:
        rows: int32 [V], rows that each token owns, at least 1.
        offsets: int64 [V+1]; token t owns rows offsets[t] .. offsets[t+1] of a table.
        frequency: int64 [V], how often each token came in the corpus, or None where none was read.
    """

    rows: npt.NDArray[np.int32]
    offsets: npt.NDArray[np.int64]
    frequency: npt.NDArray[np.int64] | None

    @classmethod
    def from_rows(cls, rows: Any, *, frequency: Any = None) -> Allocation:
        """An allocation with the given rows per token.

        Args:
            rows: integers [V], each 1 to 2^31 - 1; copied.
            frequency: integers [V], each at least 0, or None; copied.

        Raises:
            TypeError: not integers in host memory.
            ValueError: no tokens, a token without rows, or lengths that differ.
        """
        counts = host_integers(rows, "rows").astype(np.int64)
        if counts.size == 0:
            raise ValueError("rows: expected at least one token, got none")
        _check_range(counts, "rows", 1, _INT32_MAX)
        offsets = np.zeros(counts.size + 1, np.int64)
        np.cumsum(counts, out=offsets[1:])
        seen: npt.NDArray[np.int64] | None = None
        if frequency is not None:
            seen = host_integers(frequency, "frequency").astype(np.int64)
            if seen.size != counts.size:
                raise ValueError(
                    f"frequency: expected {counts.size} tokens as in rows, got {seen.size}"
                )
            _check_range(seen, "frequency", 0, _INT64_MAX)
            if float(seen.sum(dtype=np.float64)) >= 2.0**63:
                raise ValueError("frequency: expected a sum below 2^63, got more")
        return cls(
            rows=_frozen(counts.astype(np.int32)),
            offsets=_frozen(offsets),
            frequency=None if seen is None else _frozen(seen),
        )

    @classmethod
    def uniform(cls, vocab_size: int, total_rows: int) -> Allocation:
        """``total_rows`` dealt out evenly; the first tokens get the rows that remain.

        Raises:
            ValueError: unless 1 <= vocab_size <= total_rows <= vocab_size * (2^31 - 1).
        """
        vocab_size = integer(vocab_size, "vocab_size")
        total_rows = integer(total_rows, "total_rows")
        if not 1 <= vocab_size < 2**31:
            raise ValueError(f"vocab_size: expected 1 to {2**31 - 1}, got {vocab_size}")
        if total_rows < vocab_size:
            raise ValueError(
                f"total_rows: expected at least vocab_size = {vocab_size} (every token owns a "
                f"row), got {total_rows}"
            )
        if total_rows > vocab_size * _INT32_MAX:
            raise ValueError(
                f"total_rows: expected at most {_INT32_MAX} a token, got {total_rows} for "
                f"{vocab_size} tokens"
            )
        each, more = divmod(total_rows, vocab_size)
        rows = np.full(vocab_size, each, np.int64)
        rows[:more] += 1
        return cls.from_rows(rows)

    @property
    def vocab_size(self) -> int:
        """Tokens in the vocabulary, V."""
        return int(self.rows.size)

    @property
    def total_rows(self) -> int:
        """Rows of the whole table, v."""
        return int(self.offsets[-1])

    @property
    def max_rows(self) -> int:
        """The most rows that any token owns, often fewer than were allowed."""
        return int(self.rows.max())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file (rows, and frequency where there is one) with a checksum.

        Raises:
            OSError: the file cannot be written; the old file stays.
        """
        path = file_path(path)
        tensors: dict[str, npt.NDArray[Any]] = {"rows": self.rows}
        if self.frequency is not None:
            tensors["frequency"] = self.frequency
        metadata = {"format": _FORMAT, "version": _VERSION, "crc32c": _checksum(tensors)}
        content = safetensors.numpy.save(tensors, metadata=metadata)
        try:
            with atomic_path(path) as temporary:
                temporary.write_bytes(content)
        except OSError as error:
            raise OSError(
                error.errno, f"cannot write: {error.strerror}; the old file stays", path
            ) from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Allocation:
        """Read what ``save`` wrote.

        Raises:
            OSError: there is no such file, or it is truncated, corrupt or of another kind.
        """
        name = file_path(path)
        with open(name, "rb"):  # the system's own error where it cannot be read
            pass
        try:
            with safetensors.safe_open(name, framework="numpy") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != _FORMAT or metadata.get("version") != _VERSION:
                    raise ValueError(
                        f"expected format {_FORMAT} {_VERSION} in the metadata, got "
                        f"{metadata.get('format')} {metadata.get('version')}"
                    )
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            if metadata.get("crc32c") != _checksum(tensors):
                raise ValueError("wrong checksum")
            return cls.from_rows(tensors["rows"], frequency=tensors.get("frequency"))
        except (safetensors.SafetensorError, ValueError, TypeError, KeyError) as error:
            raise OSError(5, f"not a usable allocation: {error}", name) from error

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Allocation):
            return NotImplemented
        if not np.array_equal(self.rows, other.rows):
            return False
        if self.frequency is None or other.frequency is None:
            return self.frequency is other.frequency
        return np.array_equal(self.frequency, other.frequency)

    def __hash__(self) -> int:
        return hash((self.vocab_size, self.total_rows, _C.crc32c(self.rows)))

    def __repr__(self) -> str:
        seen = "None" if self.frequency is None else f"{int(self.frequency.sum())} tokens"
        return (
            f"Allocation(vocab_size={self.vocab_size}, total_rows={self.total_rows}, "
            f"max_rows={self.max_rows}, frequency={seen})"
        )

    # Copies of an immutable object are the object; NumPy's own copies would be writable.
    def __copy__(self) -> Allocation:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Allocation:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (np.array(self.rows), self.frequency)


class LZWCounter:
    """Counts LZW codewords of a corpus, document by document, exactly.

    Memory is ``nbytes``, 35 to 55 bytes a codeword. Safe to share between threads: calls take
    turns, and the GIL is free meanwhile. A forked child counts on with its copy; where another
    thread was in a call when the process forked, every use of the copy is a ``RuntimeError``.
    """

    def __init__(
        self, vocab_size: int, parse: str = "paper", *, max_codewords: int | None = None
    ) -> None:
        """A dictionary of every single token, count 0.

        Args:
            vocab_size: tokens in the vocabulary, 1 to 2^31 - 1.
            parse: "paper" (a phrase is the longest known prefix plus one token) or "lzw" (the
                textbook: a phrase is the longest known prefix).
            max_codewords: bounds the dictionary, and with it the memory: once it holds that many
                codewords, the single tokens included, nothing is inserted any more, but phrases
                end and are counted as before. vocab_size to 2^32 - 2; None: unbounded.

        Raises:
            ValueError: vocab_size or max_codewords out of range, or an unknown parse.
        """
        if not isinstance(parse, str):
            raise TypeError(f'parse: expected "paper" or "lzw", got {type(parse).__name__}')
        size = integer(vocab_size, "vocab_size")
        if not 1 <= size < 2**31:
            raise ValueError(f"vocab_size: expected 1 to {2**31 - 1}, got {size}")
        bound = None if max_codewords is None else integer(max_codewords, "max_codewords")
        if bound is not None and not size <= bound < 2**32 - 1:
            raise ValueError(
                f"max_codewords: expected vocab_size = {size} (every token is a codeword) to "
                f"{2**32 - 2}, got {bound}"
            )
        self._native = _C.LZWCounter(size, parse, bound)

    def update(self, tokens: Any, offsets: Any = None, *, threads: int | None = None) -> None:
        """Count more documents.

        The result is the same for any number of threads. One of them parses and the others read
        ahead for it; updates of fewer than 65,536 tokens take one alone.

        Args:
            tokens: integers [n] in [0, vocab_size): a NumPy array, a torch tensor in host memory
                or a list. Contiguous int32 and int64 arrays are read in place and must not change
                during the call; any other integer dtype is converted as a whole.
            offsets: integers [documents+1] that start at 0, never fall and end at n; document d is
                tokens[offsets[d]:offsets[d+1]]. None: one document.
            threads: the most threads that count, at least 1; more than four have nothing to do.
                None: ``torch.get_num_threads()``.

        Raises:
            TypeError: not integers in host memory.
            ValueError: an id out of range (says which and where), wrong offsets, or no threads.

        Whatever is raised, KeyboardInterrupt included, the counter is as it was before the call.
        """
        ids = host_integers(tokens, "tokens")
        if offsets is None:
            cuts = np.array([0, ids.size], np.int64)
        else:
            cuts = host_integers(offsets, "offsets").astype(np.int64, copy=False)
        count = torch.get_num_threads() if threads is None else integer(threads, "threads")
        if count < 1:
            raise ValueError(f"threads: expected at least 1, got {count}")
        self._native.update(ids, cuts, min(count, _MANY_THREADS))

    def merge(self, other: LZWCounter) -> None:
        """Add the codewords of another counter, which stays as it is.

        Counts, frequencies, ``num_tokens`` and ``max_codewords`` add up (unbounded stays
        unbounded); codewords that are new here follow the others in ``other``'s order. So merging
        is associative, and any map and reduce will do, as counters can be saved, or pickled. The
        result is not what one counter would have counted: each part learns its phrases anew.

        Raises:
            TypeError: ``other`` is no LZWCounter.
            ValueError: vocab_size or parse differ, or a sum exceeds 2^63 - 1.

        Whatever is raised, KeyboardInterrupt included, both counters are as before the call.
        """
        if not isinstance(other, LZWCounter):
            raise TypeError(f"other: expected an LZWCounter, got {type(other).__name__}")
        self._native.merge(other._native)

    def __reduce__(self) -> tuple[Any, ...]:
        with tempfile.TemporaryDirectory(prefix="l3ext-") as directory:
            path = os.path.join(directory, "counter")
            self.save(path)
            with open(path, "rb") as stream:
                return _load_counter, (stream.read(),)

    @property
    def vocab_size(self) -> int:
        """Tokens in the vocabulary."""
        return self._native.vocab_size

    @property
    def parse(self) -> str:
        """ "paper" or "lzw"."""
        return self._native.parse

    @property
    def max_codewords(self) -> int | None:
        """The most codewords that the dictionary may hold; None: unbounded."""
        return self._native.max_codewords

    @property
    def num_tokens(self) -> int:
        """Tokens counted so far."""
        return self._native.num_tokens

    @property
    def num_codewords(self) -> int:
        """Codewords in the dictionary, the single tokens included."""
        return self._native.num_codewords

    @property
    def nbytes(self) -> int:
        """Memory of the counter, in bytes."""
        return self._native.nbytes

    @property
    def frequency(self) -> npt.NDArray[np.int64]:
        """How often each token came: int64 [vocab_size], a copy."""
        frequency = np.empty(self.vocab_size, np.int64)
        self._native.copy_frequency(frequency)
        return frequency

    def codewords(self, limit: int | None = None) -> Iterator[tuple[tuple[int, ...], int]]:
        """Yield (token ids, count) in insertion order, at most ``limit`` of them."""
        stop = self.num_codewords
        if limit is not None:
            limit = integer(limit, "limit")
            if limit < 0:
                raise ValueError(f"limit: expected at least 0, got {limit}")
            stop = min(stop, limit)
        return self._codewords(stop)

    def _codewords(self, stop: int) -> Iterator[tuple[tuple[int, ...], int]]:
        for begin in range(0, stop, _CODEWORDS_PER_CALL):
            yield from self._native.codewords(begin, min(stop, begin + _CODEWORDS_PER_CALL))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the whole state; a counter loaded from it goes on with the same results.

        Raises:
            OSError: the file cannot be written; the old file stays.
        """
        self._native.save(file_path(path))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LZWCounter:
        """Read what ``save`` wrote.

        Raises:
            OSError: there is no such file, or it is truncated, corrupt or of another kind.
        """
        counter = cls.__new__(cls)
        counter._native = _C.LZWCounter.load(file_path(path))
        return counter

    def allocate(self, total_rows: int, max_rows: int = 512) -> Allocation:
        """Grant rows to tokens by the codewords counted so far; the counter stays as it is.

        Args:
            total_rows: rows of the table, vocab_size to vocab_size * max_rows.
            max_rows: the most rows that one token may own, at least 1.

        Raises:
            ValueError: a size out of range.
        """
        total_rows = integer(total_rows, "total_rows")
        if abs(total_rows) > _INT64_MAX:
            raise ValueError(f"total_rows: expected at most {_INT64_MAX}, got {total_rows}")
        max_rows = integer(max_rows, "max_rows")
        if max_rows < 1:
            raise ValueError(f"max_rows: expected at least 1, got {max_rows}")
        # No token can own more rows than there are: any larger cap means the same, within 64 bits.
        max_rows = min(max_rows, max(total_rows, 1))
        rows = np.empty(self.vocab_size, np.int32)
        self._native.grant(total_rows, max_rows, rows)
        return Allocation.from_rows(rows, frequency=self.frequency)

    def __repr__(self) -> str:
        return (
            f"LZWCounter(vocab_size={self.vocab_size}, parse={self.parse!r}, "
            f"max_codewords={self.max_codewords}, num_tokens={self.num_tokens}, "
            f"num_codewords={self.num_codewords}, nbytes={self.nbytes})"
        )


def allocate(
    tokens: Any,
    offsets: Any = None,
    *,
    vocab_size: int,
    total_rows: int,
    max_rows: int = 512,
    parse: str = "paper",
) -> Allocation:
    """Count a corpus and grant rows: ``LZWCounter``'s ``update`` and ``allocate`` in one call."""
    counter = LZWCounter(vocab_size, parse=parse)
    counter.update(tokens, offsets)
    return counter.allocate(total_rows, max_rows)


def _rebuild(rows: npt.NDArray[np.int32], frequency: Any) -> Allocation:
    return Allocation.from_rows(rows, frequency=frequency)


def _load_counter(content: bytes) -> LZWCounter:
    with tempfile.TemporaryDirectory(prefix="l3ext-") as directory:
        path = os.path.join(directory, "counter")
        with open(path, "wb") as stream:
            stream.write(content)
        return LZWCounter.load(path)


def _check_range(values: npt.NDArray[np.int64], argument: str, low: int, high: int) -> None:
    wrong = np.flatnonzero((values < low) | (values > high))
    if wrong.size:
        raise ValueError(
            f"{argument}: expected {low} to {high} a token, got {values[wrong[0]]} at token "
            f"{wrong[0]}"
        )


def _frozen(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    array.setflags(write=False)
    return array


def _checksum(tensors: dict[str, npt.NDArray[Any]]) -> str:
    """CRC-32C of each tensor's bytes, by name."""
    return ",".join(
        f"{name}:{_C.crc32c(np.ascontiguousarray(tensors[name])):08x}" for name in sorted(tensors)
    )


def rows_checksum(allocation: Allocation) -> str:
    """CRC-32C of who owns how many rows, for telling one allocation's table from another's."""
    return _checksum({"rows": allocation.rows})
