"""A corpus as one file of token ids that training maps into memory.

The file is a safetensors file (any reader of that format opens it) with two arrays: ``offsets``
int64 [documents + 1], which cuts the ids into documents, and ``tokens`` uint16 or uint32 [T]. Its
metadata holds the vocabulary size, the largest id and a CRC-32 of the ids.
"""

from __future__ import annotations

import errno
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
import numpy.typing as npt

from l3ext._files import atomic_path

FORMAT = "l3ext.tokens.1"
_HEADER_BYTES = 4096  # reserved for a header whose sizes are known only at the end
_CHUNK_TOKENS = 1 << 22
_DTYPES: dict[str, np.dtype[Any]] = {"U16": np.dtype("<u2"), "U32": np.dtype("<u4")}


class TokenChunk(Protocol):
    """What ``l3ext.corpus.read_tokens`` yields: some documents' ids and where they begin."""

    @property
    def tokens(self) -> npt.NDArray[np.integer]:
        """Integer [n]."""

    @property
    def offsets(self) -> npt.NDArray[np.int64]:
        """int64 [documents + 1], from 0 to n."""


@dataclass(frozen=True)
class TokenFile:
    """An open token file. The arrays are memory-mapped, read-only views of it."""

    path: Path
    tokens: npt.NDArray[np.integer]  # uint16 or uint32 [T]
    offsets: npt.NDArray[np.int64]  # [documents + 1]
    vocab_size: int

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> TokenFile:
        """Map the file at ``path``, its size, layout and checksum verified first.

        Raises:
            OSError: it cannot be read, or is no intact token file.
        """
        path = Path(path)
        with open(path, "rb") as stream:
            header = _read_header(path, stream)
        arrays = {
            name: np.memmap(
                path,
                dtype=entry["numpy_dtype"],
                mode="r",
                offset=entry["begin"],
                shape=(entry["count"],),
            )
            if entry["count"]
            else np.zeros(0, entry["numpy_dtype"])
            for name, entry in header["arrays"].items()
        }
        tokens, offsets = arrays["tokens"], arrays["offsets"]
        if header["checksum"] != _checksum(tokens, offsets):
            raise _corrupt(path, "the checksum of its content does not match its header")
        if len(offsets) == 0 or offsets[0] != 0 or offsets[-1] != len(tokens):
            raise _corrupt(path, "its offsets do not run from 0 to its number of tokens")
        if np.any(np.diff(offsets) < 0):
            raise _corrupt(path, "its offsets fall")
        return cls(path, tokens, offsets, header["vocab_size"])


def write_token_file(
    path: str | os.PathLike[str], chunks: Iterable[TokenChunk], *, vocab_size: int
) -> TokenFile:
    """Write ``chunks`` to ``path`` as one token file, atomically, in memory bounded by a chunk.

    Args:
        path: replaced if it exists; untouched on any failure.
        chunks: ids in [0, vocab_size) with the offsets of their documents.
        vocab_size: 1 to 2**32; at most 65,536 means two bytes a token.

    Raises:
        ValueError: an id outside the vocabulary (which, and at which position).
        OSError: the file cannot be written.
    """
    if not 1 <= vocab_size <= 1 << 32:
        raise ValueError(f"vocab_size: expected 1 to 2**32, got {vocab_size}")
    kind = "U16" if vocab_size <= 1 << 16 else "U32"
    dtype = _DTYPES[kind]
    count = 0
    checksum = 0
    offsets = [np.zeros(1, np.int64)]
    with atomic_path(path) as temporary, open(temporary, "wb") as stream:
        stream.write(b"\0" * _HEADER_BYTES)
        for chunk in chunks:
            _check_ids(chunk.tokens, vocab_size, first=count)
            ids = chunk.tokens.astype(dtype)
            stream.write(ids.data)
            checksum = zlib.crc32(ids.data, checksum)
            offsets.append(np.asarray(chunk.offsets[1:], np.int64) + count)
            count += len(ids)
        # safetensors wants its arrays without a gap, int64 aligned to 8.
        padding = -(count * dtype.itemsize) % 8
        stream.write(b"\0" * padding)
        joined = np.concatenate(offsets)
        stream.write(joined.data)
        stream.seek(0)
        stream.write(
            _header(
                kind, count, padding, len(joined), vocab_size, zlib.crc32(joined.data, checksum)
            )
        )
    return TokenFile.open(path)


def _header(
    kind: str, count: int, padding: int, documents: int, vocab_size: int, checksum: int
) -> bytes:
    end = count * _DTYPES[kind].itemsize
    header: dict[str, Any] = {
        "__metadata__": {
            "format": FORMAT,
            "vocab_size": str(vocab_size),
            "checksum": f"{checksum:08x}",
        },
        "tokens": {"dtype": kind, "shape": [count], "data_offsets": [0, end]},
    }
    if padding:
        extent = [end, end + padding]
        header["padding"] = {"dtype": "U8", "shape": [padding], "data_offsets": extent}
    end += padding
    header["offsets"] = {
        "dtype": "I64",
        "shape": [documents],
        "data_offsets": [end, end + 8 * documents],
    }
    text = json.dumps(header).encode()
    size = _HEADER_BYTES - 8
    return size.to_bytes(8, "little") + text + b" " * (size - len(text))


def _read_header(path: Path, stream: BinaryIO) -> dict[str, Any]:
    size = os.fstat(stream.fileno()).st_size
    raw = stream.read(_HEADER_BYTES)
    if len(raw) < _HEADER_BYTES or int.from_bytes(raw[:8], "little") != _HEADER_BYTES - 8:
        raise _corrupt(path, f"expected a {_HEADER_BYTES}-byte header")
    try:
        header = json.loads(raw[8:])
        metadata = header["__metadata__"]
        if metadata["format"] != FORMAT:
            raise _corrupt(path, f"expected format {FORMAT!r}, got {metadata['format']!r}")
        arrays: dict[str, dict[str, Any]] = {}
        last = 0
        for name in ("tokens", "offsets"):
            entry = header[name]
            begin, end = (int(at) for at in entry["data_offsets"])
            dtype = np.dtype("<i8") if name == "offsets" else _DTYPES[entry["dtype"]]
            count = int(entry["shape"][0])
            if begin < 0 or count < 0 or end - begin != count * dtype.itemsize:
                raise _corrupt(path, f"the extent of its {name} does not fit their shape")
            arrays[name] = {"numpy_dtype": dtype, "begin": begin + _HEADER_BYTES, "count": count}
            last = max(last, end)
        facts = {
            "arrays": arrays,
            "vocab_size": int(metadata["vocab_size"]),
            "checksum": int(metadata["checksum"], 16),
        }
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise _corrupt(path, f"its header is not one of a token file ({error!r})") from error
    if size != _HEADER_BYTES + last:
        raise _corrupt(path, f"expected {_HEADER_BYTES + last} bytes, got {size}")
    return facts


def _checksum(tokens: npt.NDArray[np.integer], offsets: npt.NDArray[np.int64]) -> int:
    checksum = 0
    for part in _parts(tokens):
        checksum = zlib.crc32(np.ascontiguousarray(part).data, checksum)
    return zlib.crc32(np.ascontiguousarray(offsets).data, checksum)


def _parts(tokens: npt.NDArray[np.integer]) -> Iterator[npt.NDArray[np.integer]]:
    for first in range(0, len(tokens), _CHUNK_TOKENS):
        yield tokens[first : first + _CHUNK_TOKENS]


def _check_ids(tokens: npt.NDArray[np.integer], vocab_size: int, *, first: int = 0) -> None:
    if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
        raise TypeError(
            f"tokens: expected a one-dimensional integer array, got {tokens.dtype} "
            f"with shape {list(tokens.shape)}"
        )
    for part in _parts(tokens):
        if len(part) and not (int(part.min()) >= 0 and int(part.max()) < vocab_size):
            bad = int(np.flatnonzero((part < 0) | (part >= vocab_size))[0])
            raise ValueError(
                f"tokens: expected ids in [0, {vocab_size}), got {int(part[bad])} "
                f"at position {first + bad}"
            )
        first += len(part)


def check_tokens(tokens: npt.NDArray[np.integer], *, name: str, vocab_size: int) -> int:
    """Check that every id lies in [0, vocab_size); returns a CRC-32 that names the content."""
    if not isinstance(tokens, np.ndarray):
        raise TypeError(f"{name}: expected a NumPy array, got {type(tokens).__name__}")
    try:
        _check_ids(tokens, vocab_size)
    except (TypeError, ValueError) as error:
        raise type(error)(str(error).replace("tokens", name, 1)) from None
    checksum = 0
    for part in _parts(tokens):
        checksum = zlib.crc32(np.ascontiguousarray(part, np.int64).data, checksum)
    return checksum


def _corrupt(path: Path, reason: str) -> OSError:
    return OSError(errno.EIO, f"not an intact token file: {reason}", str(path))


def is_token_file(path: str | os.PathLike[str]) -> bool:
    """Whether the file at ``path`` says that it is a token file; whether it is intact is open."""
    with open(path, "rb") as stream:
        return f'"format": "{FORMAT}"'.encode() in stream.read(_HEADER_BYTES)
