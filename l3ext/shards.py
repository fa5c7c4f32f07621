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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from l3ext._checks import check_kind, integer
from l3ext._shard_worker import FRAME
from l3ext.allocation import LZWCounter
from l3ext.corpus import TokenChunk

MOST_SHARDS = 1024
RUN_TOKENS = 1 << 16


def count_shards(
    chunks: Iterable[TokenChunk],
    vocab_size: int,
    *,
    shards: int,
    parse: str = "paper",
    max_codewords: int | None = None,
    run_tokens: int = RUN_TOKENS,
) -> LZWCounter:
    """Count in this process what ``count_shards_in_processes`` counts in others.

    Documents that begin within the same ``run_tokens`` tokens of the corpus stay together, and such
    runs are dealt to the shards in turn, however the corpus is cut into chunks: slices are copied,
    and shards are of one size. The shards are merged in order.

    Args:
        chunks: the corpus.
        vocab_size, parse: as of ``LZWCounter``.
        shards: 1 (exact) to 1024.
        max_codewords: bound of all dictionaries together; each shard gets an equal part.
        run_tokens: at least 1.

    Raises:
        ValueError: an argument or an id out of range.
    """
    bound = _bound_of_each(max_codewords, vocab_size, shards, run_tokens, parse)
    counters = [LZWCounter(vocab_size, parse, max_codewords=bound) for _ in range(shards)]
    for parts in _deal_all(chunks, vocab_size, shards, run_tokens):
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
    run_tokens: int = RUN_TOKENS,
) -> LZWCounter:
    """Count each shard in a process of its own; arguments, errors and result of ``count_shards``.

    This process reads and deals. The counters come back as files in a temporary directory
    (``TMPDIR``). Whatever is raised, KeyboardInterrupt included, no process and no
    file is left.

    Raises:
        RuntimeError: a process failed or was killed; says which and why.
    """
    bound = _bound_of_each(max_codewords, vocab_size, shards, run_tokens, parse)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="l3ext-shards-")))
        workers = [
            stack.enter_context(_Worker(f"shard {i} of {shards}", folder / str(i)))
            for i in range(shards)
        ]
        for worker in workers:  # first all of them, so that they start side by side
            worker.start(vocab_size, parse, bound)
        for parts in _deal_all(chunks, vocab_size, shards, run_tokens):
            for worker, part in zip(workers, parts, strict=True):
                worker.send(part)
        for worker in workers:
            worker.send_end()
        # The GIL is free while counters are read and merged: side by side, in a tree. Its order is
        # that of a chain, as merging is associative.
        pool = stack.enter_context(ThreadPoolExecutor(min(shards, os.cpu_count() or 1)))
        counters = list(pool.map(_Worker.counter, workers))
        while len(counters) > 1:
            pairs = zip(counters[::2], counters[1::2], strict=False)
            odd = counters[-1:] if len(counters) % 2 else []
            counters = [*pool.map(_merged, pairs), *odd]
        return counters[0]


def _merged(pair: tuple[LZWCounter, LZWCounter]) -> LZWCounter:
    first, second = pair
    first.merge(second)
    return first


def deal(chunk: TokenChunk, first_token: int, shards: int, run_tokens: int) -> list[TokenChunk]:
    """The chunk's documents by shard; its first token is token ``first_token`` of the corpus."""
    run = (first_token + chunk.offsets[:-1]) // run_tokens
    first = np.flatnonzero(np.diff(run, prepend=-1))  # documents with which a run begins here
    last = np.append(first[1:], run.size)[: first.size]
    parts = []
    for shard in range(shards):
        mine = [slice(a, b) for a, b in zip(first, last, strict=True) if run[a] % shards == shard]
        tokens = [chunk.tokens[chunk.offsets[a.start] : chunk.offsets[a.stop]] for a in mine]
        lengths = [np.diff(chunk.offsets[a.start : a.stop + 1]) for a in mine]
        offsets = np.cumsum(np.concatenate([[0], *lengths]), dtype=np.int64)
        parts.append(TokenChunk(np.concatenate([chunk.tokens[:0], *tokens]), offsets))
    return parts


def _deal_all(
    chunks: Iterable[TokenChunk], vocab_size: int, shards: int, run_tokens: int
) -> Iterator[list[TokenChunk]]:
    token = document = 0
    check_kind(chunks, Iterable, "chunks")
    for chunk in chunks:
        check_kind(chunk, TokenChunk, "chunks")
        _check_ids(chunk, document, vocab_size)
        yield deal(chunk, token, shards, run_tokens)
        token += int(chunk.tokens.size)
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


def _bound_of_each(
    max_codewords: int | None, vocab_size: int, shards: int, run_tokens: int, parse: str
) -> int | None:
    """The bound of one shard's dictionary, of arguments that have been checked."""
    if integer(run_tokens, "run_tokens") < 1:
        raise ValueError(f"run_tokens: expected at least 1, got {run_tokens}")
    if not 1 <= integer(shards, "shards") <= MOST_SHARDS:
        raise ValueError(f"shards: expected 1 to {MOST_SHARDS}, got {shards}")
    LZWCounter(vocab_size, parse)  # checks them before a process is started
    if max_codewords is None:
        return None
    if integer(max_codewords, "max_codewords") < shards * vocab_size:
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
