"""Counting in shards: documents dealt to independent counters, which are then merged.

An approximation, for corpora that one core would take too long to count: each shard learns its
phrases anew, so counts differ from the exact ones. ``l3ext.approximation`` says by how much.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from l3ext._shard_worker import FRAME
from l3ext.allocation import LZWCounter
from l3ext.corpus import TokenChunk

MOST_SHARDS = 1024


def count_shards(
    chunks: Iterable[TokenChunk],
    vocab_size: int,
    *,
    shards: int,
    parse: str = "paper",
    max_codewords: int | None = None,
) -> LZWCounter:
    """Count in this process what ``count_shards_in_processes`` counts in others.

    Document d of the corpus belongs to shard d mod ``shards``, however it is cut into chunks; the
    shards are merged in order.

    Args:
        chunks: the corpus.
        vocab_size, parse: as of ``LZWCounter``.
        shards: 1 (exact) to 1024.
        max_codewords: bound of all dictionaries together; each shard gets an equal part.

    Raises:
        ValueError: an argument or an id out of range.
    """
    bound = _bound_of_each(max_codewords, vocab_size, shards)
    counters = [LZWCounter(vocab_size, parse, max_codewords=bound) for _ in range(shards)]
    for parts in _deal_all(chunks, vocab_size, shards):
        for counter, part in zip(counters, parts, strict=True):
            counter.update(part.tokens, part.offsets)
    merged, *others = counters
    for counter in others:
        merged.merge(counter)
    return merged


def count_shards_in_processes(
    chunks: Iterable[TokenChunk],
    vocab_size: int,
    *,
    shards: int,
    parse: str = "paper",
    max_codewords: int | None = None,
) -> LZWCounter:
    """Count each shard in a process of its own; arguments, errors and result of ``count_shards``.

    This process reads and deals. The counters come back as files in a temporary directory
    (``TMPDIR``), one at a time. Whatever is raised, KeyboardInterrupt included, no process and no
    file is left.

    Raises:
        RuntimeError: a process failed or was killed; says which and why.
    """
    bound = _bound_of_each(max_codewords, vocab_size, shards)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="l3ext-shards-")))
        workers = [
            stack.enter_context(_Worker(f"shard {i} of {shards}", folder / str(i)))
            for i in range(shards)
        ]
        for worker in workers:  # first all of them, so that they start side by side
            worker.start(vocab_size, parse, bound)
        for parts in _deal_all(chunks, vocab_size, shards):
            for worker, part in zip(workers, parts, strict=True):
                worker.send(part)
        for worker in workers:
            worker.send_end()
        merged, *others = workers
        counter = merged.counter()
        for worker in others:
            counter.merge(worker.counter())
        return counter


def deal(chunk: TokenChunk, first_document: int, shards: int) -> list[TokenChunk]:
    """The chunk's documents by shard; its first is document ``first_document`` of the corpus."""
    lengths = np.diff(chunk.offsets)
    # The narrowest dtype: sorting 16 bits is one counting pass.
    shard = ((first_document + np.arange(lengths.size)) % shards).astype(np.uint16)
    tokens = chunk.tokens[np.argsort(np.repeat(shard, lengths), kind="stable")]
    by_shard = [lengths[shard == i] for i in range(shards)]
    ends = np.cumsum([part.sum() for part in by_shard])[:-1].astype(np.int64)
    return [
        TokenChunk(part, np.concatenate([[0], np.cumsum(own)]).astype(np.int64))
        for part, own in zip(np.split(tokens, ends), by_shard, strict=True)
    ]


def _deal_all(
    chunks: Iterable[TokenChunk], vocab_size: int, shards: int
) -> Iterator[list[TokenChunk]]:
    document = 0
    for chunk in chunks:
        _check_ids(chunk, document, vocab_size)
        yield deal(chunk, document, shards)
        document += chunk.offsets.size - 1


def _check_ids(chunk: TokenChunk, first_document: int, vocab_size: int) -> None:
    """Before ids are dealt: then it is still known where a wrong one stands."""
    tokens: npt.NDArray[np.integer] = chunk.tokens
    if tokens.size == 0 or (tokens.min() >= 0 and tokens.max() < vocab_size):
        return
    position = int(np.flatnonzero((tokens < 0) | (tokens >= vocab_size))[0])
    document = int(np.searchsorted(chunk.offsets, position, side="right")) - 1
    raise ValueError(
        f"tokens: expected ids in [0, {vocab_size}), got {tokens[position]} at token "
        f"{position - chunk.offsets[document]} of document {first_document + document}"
    )


def _bound_of_each(max_codewords: int | None, vocab_size: int, shards: int) -> int | None:
    if not 1 <= shards <= MOST_SHARDS:
        raise ValueError(f"shards: expected 1 to {MOST_SHARDS}, got {shards}")
    if max_codewords is None:
        return None
    if max_codewords < shards * vocab_size:
        raise ValueError(
            f"max_codewords: expected at least shards * vocab_size = {shards} * {vocab_size} "
            f"(every token is a codeword of each shard), got {max_codewords}"
        )
    return max_codewords // shards


class _Worker:
    """A process that counts what it is sent and writes its counter into a file at the end."""

    def __init__(self, name: str, path: Path) -> None:
        self._name = name
        self._path = path
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, vocab_size: int, parse: str, max_codewords: int | None) -> None:
        bound = "" if max_codewords is None else str(max_codewords)
        package = str(Path(__file__).resolve().parents[1])
        search_path = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
        with open(self._log, "wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "l3ext._shard_worker", str(vocab_size), parse, bound,
                 str(self._path)],
                stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=log,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(search_path)},
                start_new_session=True,  # Ctrl-C is the parent's: it ends its workers itself
            )  # fmt: skip

    def send(self, part: TokenChunk) -> None:
        tokens = np.ascontiguousarray(part.tokens, "<i4")
        offsets = np.ascontiguousarray(part.offsets, "<i8")
        self._write(FRAME.pack(offsets.size, tokens.size), offsets.data, tokens.data)

    def send_end(self) -> None:
        self._write(FRAME.pack(0, 0))

    def counter(self) -> LZWCounter:
        """Wait for the end, and read what it wrote."""
        assert self._process is not None
        if self._process.wait() != 0:
            self._fail()
        counter = LZWCounter.load(self._path)
        self._path.unlink()
        return counter

    def _write(self, *pieces: bytes | memoryview) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            for piece in pieces:
                self._process.stdin.write(piece)
            self._process.stdin.flush()
        except BrokenPipeError:
            self._process.wait()
            self._fail()

    def _fail(self) -> None:
        assert self._process is not None
        status = self._process.returncode
        if status < 0:
            how = f"was killed by signal {-status} ({signal.strsignal(-status)})"
        else:
            how = f"ended with status {status}"
        last = self._log.read_text(errors="replace").strip().rpartition("\n")[2]
        raise RuntimeError(f"{self._name}: its process {how}{': ' if last else ''}{last}")

    @property
    def _log(self) -> Path:
        return self._path.with_suffix(".log")

    def __enter__(self) -> _Worker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._process is None:
            return
        self._process.kill()
        self._process.communicate()  # closes the pipe, and waits
