"""Reads corpora as users have them, lazily: text, JSONL, Parquet, and token files.

documents = read_documents(["a.txt", "b.parquet"], column="text")
chunks = read_tokens("tokens.bin", eos_id=0)
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from l3ext._checks import integer

PathLike = str | os.PathLike[str]

TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst", ".py")
JSON_SUFFIXES = (".jsonl", ".ndjson")
PARQUET_SUFFIXES = (".parquet",)
TOKEN_SUFFIXES = (".bin", ".npy")
_DOCUMENT_SUFFIXES = TEXT_SUFFIXES + JSON_SUFFIXES + PARQUET_SUFFIXES
_SPLITS = ("line", "blank", "file")
_BATCH_CHARACTERS = 1 << 20  # a batch keeps all cores busy, yet Ctrl-C waits for one at most
_ROWS_PER_BATCH = 1024


@dataclass(frozen=True)
class TokenChunk:
    """Whole documents: document d is tokens[offsets[d]:offsets[d+1]].

    Attributes:
        tokens: int32 or int64 [n].
        offsets: int64 [documents+1].
    """

    tokens: npt.NDArray[Any]
    offsets: npt.NDArray[np.int64]


def read_documents(
    paths: PathLike | Iterable[PathLike], *, column: str = "text", split: str = "line"
) -> Iterator[str]:
    """Yield the documents of text, JSONL and Parquet files, file by file; empty ones are skipped.

    Args:
        paths: one file or several; the suffix says what a file is.
        column: the JSONL key or Parquet column that holds the text; null counts as empty.
        split: what a document is in a text file: "line", "blank" (paragraphs between blank lines)
            or "file".

    Raises:
        OSError: a file is missing or unreadable.
        ValueError: an unknown suffix or column, a bad JSON line, or text that is not UTF-8; says
            where. Missing files and unknown suffixes are found before anything is read.
    """
    files = _existing_files(paths, _DOCUMENT_SUFFIXES)
    _check_split(split)
    return (document for file in files for document in _documents(file, column, split) if document)


def read_tokens(
    paths: PathLike | Iterable[PathLike],
    *,
    tokenizer: Any = None,
    column: str = "text",
    split: str = "line",
    dtype: Any = None,
    eos_id: int | None = None,
    vocab_size: int | None = None,
    chunk_tokens: int = 1 << 22,
) -> Iterator[TokenChunk]:
    """Yield the tokens of a corpus in chunks of whole documents.

    Args:
        paths: one file or several: what ``read_documents`` reads, ``.bin`` (raw little-endian ids)
            or ``.npy`` (one-dimensional ids). Token files are memory-mapped.
        tokenizer: a ``tokenizers.Tokenizer``, a transformers fast tokenizer, or the path of a
            ``tokenizer.json``; needed for text. No special tokens are added.
        column, split: as in ``read_documents``.
        dtype: integer dtype of ``.bin`` files; uint16 where None.
        eos_id: the id that ends each document of a token file and belongs to it; None: a token
            file is one document.
        vocab_size: ids of token files must be in [0, vocab_size); None: they are not looked at.
        chunk_tokens: tokens of a chunk, at least 1; only a longer document makes a larger chunk.

    Raises:
        OSError, ValueError: as ``read_documents``; also a token file that is no array of ids, or
            has one outside the vocabulary (which, and at which position).
        TypeError: a tokenizer or dtype of another kind.
    """
    files = _existing_files(paths, _DOCUMENT_SUFFIXES + TOKEN_SUFFIXES)
    _check_split(split)
    if integer(chunk_tokens, "chunk_tokens") < 1:
        raise ValueError(f"chunk_tokens: expected at least 1, got {chunk_tokens}")
    if eos_id is not None:
        eos_id = integer(eos_id, "eos_id")
    if vocab_size is not None:
        vocab_size = integer(vocab_size, "vocab_size")
    try:
        raw = np.dtype(np.uint16 if dtype is None else dtype)
    except TypeError:
        raise TypeError(f"dtype: expected an integer dtype, got {dtype!r}") from None
    if raw.kind not in "iu":
        raise TypeError(f"dtype: expected an integer dtype, got {raw}")
    encode: Callable[[list[str]], list[Any]] | None = None
    if any(file.suffix not in TOKEN_SUFFIXES for file in files):
        encode = _encoder(tokenizer)

    def chunks() -> Iterator[TokenChunk]:
        for file in files:
            if file.suffix in TOKEN_SUFFIXES:
                ids = _map_tokens(file, raw)
                for begin, offsets in _cut(ids, eos_id, chunk_tokens):
                    tokens = ids[begin : begin + offsets[-1]]
                    if vocab_size is not None:
                        _check_ids(tokens, vocab_size, file, begin)
                    narrow = np.can_cast(tokens.dtype, np.int32)
                    yield TokenChunk(np.asarray(tokens, np.int32 if narrow else np.int64), offsets)
            else:
                assert encode is not None
                documents = read_documents(file, column=column, split=split)
                yield from _pack(_encoded(documents, encode), chunk_tokens)

    return chunks()


def load_tokenizer(path: PathLike) -> Tokenizer:
    """A ``tokenizers.Tokenizer`` from its ``tokenizer.json``.

    Raises:
        OSError: the file is missing, unreadable, or no tokenizer.
    """
    content = Path(path).read_bytes()
    try:
        return Tokenizer.from_str(content.decode())
    except Exception as error:  # the package raises bare Exception
        raise OSError(5, f"not a usable tokenizer.json: {error}", os.fspath(path)) from error


# --- files --------------------------------------------------------------------------------------


def _existing_files(paths: PathLike | Iterable[PathLike], suffixes: tuple[str, ...]) -> list[Path]:
    given = [paths] if isinstance(paths, (str, os.PathLike)) else paths
    if isinstance(given, bytes) or not isinstance(given, Iterable):
        raise TypeError(f"paths: expected a path or a list of them, got {type(paths).__name__}")
    files = []
    for path in given:
        if not isinstance(path, (str, os.PathLike)):
            raise TypeError(f"paths: expected a path or a list of them, got one of {path!r}")
        files.append(Path(path))
    if not files:
        raise ValueError("paths: expected at least one file, got none")
    for file in files:
        if file.suffix not in suffixes:
            raise ValueError(
                f"{file}: unknown suffix {file.suffix!r}; expected one of {' '.join(suffixes)}"
            )
        with open(file, "rb"):  # the system's own error: missing, a directory, no permission
            pass
    return files


def _check_split(split: str) -> None:
    if split not in _SPLITS:
        raise ValueError(f'split: expected "line", "blank" or "file", got {split!r}')


def _documents(file: Path, column: str, split: str) -> Iterator[str]:
    if file.suffix in JSON_SUFFIXES:
        return _json_documents(file, column)
    if file.suffix in PARQUET_SUFFIXES:
        return _parquet_documents(file, column)
    if split == "file":
        return iter(["\n".join(_lines(file))])
    return _lines(file) if split == "line" else _paragraphs(file)


def _lines(file: Path) -> Iterator[str]:
    offset = 0
    with open(file, "rb") as stream:
        for raw in stream:
            try:
                line = raw.decode()
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{file}: not UTF-8 at byte {offset + error.start}: {error.reason}"
                ) from None
            if offset == 0:
                line = line.removeprefix("\ufeff")
            offset += len(raw)
            yield line.removesuffix("\n").removesuffix("\r")


def _paragraphs(file: Path) -> Iterator[str]:
    paragraph: list[str] = []
    for line in _lines(file):
        if line.strip():
            paragraph.append(line)
            continue
        yield "\n".join(paragraph)
        paragraph = []
    yield "\n".join(paragraph)


def _json_documents(file: Path, column: str) -> Iterator[str]:
    for number, line in enumerate(_lines(file), start=1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: not JSON: {error}") from None
        if not isinstance(record, dict):
            raise ValueError(f"{where}: expected an object, got {type(record).__name__}")
        if column not in record:
            raise ValueError(f"{where}: no column {column!r}; there are {sorted(record)}")
        text = record[column]
        if text is not None and not isinstance(text, str):
            raise ValueError(
                f"{where}: column {column!r}: expected a string, got {type(text).__name__}"
            )
        yield text or ""


def _parquet_documents(file: Path, column: str) -> Iterator[str]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ImportError(f"{file}: Parquet needs pyarrow: pip install l3ext[data]") from error
    try:
        with pq.ParquetFile(file) as parquet:
            schema = parquet.schema_arrow
            if column not in schema.names:
                raise ValueError(f"{file}: no column {column!r}; there are {sorted(schema.names)}")
            kind = schema.field(column).type
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                raise ValueError(f"{file}: column {column!r}: expected strings, got {kind}")
            for batch in parquet.iter_batches(batch_size=_ROWS_PER_BATCH, columns=[column]):
                for text in batch.column(0).to_pylist():
                    yield text or ""
    except (pa.ArrowException, OSError) as error:
        raise OSError(5, f"not a usable Parquet file: {error}", str(file)) from error


# --- tokens -------------------------------------------------------------------------------------


def _encoder(tokenizer: Any) -> Callable[[list[str]], list[Any]]:
    if tokenizer is None:
        raise ValueError("tokenizer: expected one for text files, got None")
    if isinstance(tokenizer, (str, os.PathLike)):
        tokenizer = load_tokenizer(tokenizer)
    tokenizer = getattr(tokenizer, "backend_tokenizer", tokenizer)  # of a transformers tokenizer
    if not isinstance(tokenizer, Tokenizer):
        raise TypeError(
            f"tokenizer: expected a tokenizers.Tokenizer or the path of a tokenizer.json, "
            f"got {type(tokenizer).__name__}"
        )

    def encode(documents: list[str]) -> list[Any]:
        return tokenizer.encode_batch_fast(documents, add_special_tokens=False)

    return encode


def _encoded(
    documents: Iterator[str], encode: Callable[[list[str]], list[Any]]
) -> Iterator[list[int]]:
    """Token ids document by document, encoded in batches, which uses all cores."""
    batch: list[str] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document)
        if characters >= _BATCH_CHARACTERS:
            yield from (encoding.ids for encoding in encode(batch))
            batch, characters = [], 0
    yield from (encoding.ids for encoding in encode(batch))


def _pack(documents: Iterator[list[int]], chunk_tokens: int) -> Iterator[TokenChunk]:
    parts: list[npt.NDArray[np.int32]] = []
    offsets = [0]

    def chunk() -> TokenChunk:
        return TokenChunk(np.concatenate(parts), np.array(offsets, np.int64))

    for ids in documents:
        if parts and offsets[-1] + len(ids) > chunk_tokens:
            yield chunk()
            parts, offsets = [], [0]
        parts.append(np.array(ids, np.int32))
        offsets.append(offsets[-1] + len(ids))
    if parts:
        yield chunk()


def _map_tokens(file: Path, raw: np.dtype[Any]) -> npt.NDArray[Any]:
    if file.suffix == ".npy":
        try:
            array: npt.NDArray[Any] = np.load(file, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise ValueError(f"{file}: not a usable .npy file: {error}") from error
        if array.ndim != 1 or array.dtype.kind not in "iu":
            raise ValueError(
                f"{file}: expected one dimension of integers, got shape {list(array.shape)} of "
                f"{array.dtype}"
            )
        return array
    size = file.stat().st_size
    if size % raw.itemsize:
        raise ValueError(f"{file}: expected a multiple of {raw.itemsize} bytes ({raw}), got {size}")
    if size == 0:
        return np.empty(0, raw)  # nothing to map
    return np.memmap(file, raw.newbyteorder("<"), mode="r")


def _check_ids(tokens: npt.NDArray[Any], vocab_size: int, file: Path, begin: int) -> None:
    """Here it is still known which file they are from; the first is its token ``begin``."""
    if tokens.size == 0 or (tokens.min() >= 0 and tokens.max() < vocab_size):
        return
    position = int(np.flatnonzero((tokens < 0) | (tokens >= vocab_size))[0])
    raise ValueError(
        f"{file}: expected ids in [0, {vocab_size}), got {tokens[position]} at position "
        f"{begin + position}"
    )


def _cut(
    ids: npt.NDArray[Any], eos_id: int | None, chunk_tokens: int
) -> Iterator[tuple[int, npt.NDArray[np.int64]]]:
    """Where each chunk begins, and the offsets of its documents."""
    begin = 0
    while begin < ids.size:
        if eos_id is None:
            ends = np.array([ids.size])
        else:
            ends = _document_ends(ids, begin, eos_id, chunk_tokens)
        yield begin, np.concatenate([[0], ends - begin]).astype(np.int64)
        begin = int(ends[-1])


def _document_ends(
    ids: npt.NDArray[Any], begin: int, eos_id: int, chunk_tokens: int
) -> npt.NDArray[np.int64]:
    """Where the documents of the chunk from ``begin`` end: all that fit, but at least one."""
    end = begin
    while end < ids.size:
        window = ids[end : end + chunk_tokens]
        ends = np.flatnonzero(window == eos_id) + 1 + end
        first_window = end == begin
        end += window.size
        if end == ids.size and (ends.size == 0 or ends[-1] != end):
            ends = np.append(ends, end)  # the file ends without eos
        if ends.size:
            return ends if first_window else ends[:1]
    raise AssertionError("begin lies before the end of the file")
