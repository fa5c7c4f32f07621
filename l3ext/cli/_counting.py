"""Counting a corpus for the command line: inputs, resuming, progress, Ctrl-C."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from l3ext.allocation import LZWCounter
    from l3ext.corpus import TokenChunk

CHUNK_TOKENS = 1 << 20  # what Ctrl-C can lose at most
_COUNTER_MAGIC = b"L3LZW\r\n\0"


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Input files, checked, and how they become tokens."""

    vocab_size: int
    chunks: Iterator[TokenChunk]


@dataclasses.dataclass(frozen=True)
class Mode:
    """How a corpus is counted: exactly, unless in shards or bounded; threads change nothing."""

    parse: str
    shards: int | None
    max_codewords: int | None
    threads: int | None = None

    @property
    def exact(self) -> bool:
        return self.shards in (None, 1) and self.max_codewords is None


@dataclasses.dataclass(frozen=True)
class Counted:
    """A counter, and what it took."""

    counter: LZWCounter
    new_tokens: int  #: those of a checkpoint are not new
    seconds: float


def open_corpus(
    inputs: list[Path],
    *,
    tokenizer: Path | None,
    vocab_size: int | None,
    column: str,
    split: str,
    dtype: str,
    eos_id: int | None,
) -> Corpus:
    """Check the options and the files; nothing is read yet."""
    import numpy as np

    from l3ext.corpus import load_tokenizer, read_tokens

    encoder = load_tokenizer(tokenizer) if tokenizer is not None else None
    size = _vocab_size(vocab_size, encoder)
    chunks = read_tokens(
        inputs, tokenizer=encoder, column=column, split=split, dtype=np.dtype(dtype),
        eos_id=eos_id, vocab_size=size, chunk_tokens=CHUNK_TOKENS,
    )  # fmt: skip
    return Corpus(size, chunks)


def _vocab_size(given: int | None, tokenizer: Any) -> int:
    if tokenizer is None:
        if given is None:
            raise ValueError("--vocab-size: expected a number where there is no --tokenizer")
        return given
    needed = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    if given is not None and given < needed:
        raise ValueError(f"--vocab-size: expected at least the tokenizer's {needed}, got {given}")
    return int(given or needed)


def is_counter(path: Path) -> bool:
    """Whether the file begins as a counter's does; OSError where it cannot be read."""
    with open(path, "rb", opener=_without_waiting) as stream:
        return stream.read(len(_COUNTER_MAGIC)) == _COUNTER_MAGIC


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # a FIFO without a writer is no counter


def merge_counters(paths: list[Path]) -> LZWCounter:
    """The counters of the files merged in order; one of them in memory beside the result.

    Raises:
        OSError: a file is no usable counter.
        ValueError: two of them do not belong together; says which.
    """
    from l3ext.allocation import LZWCounter

    first, *others = paths
    merged = LZWCounter.load(first)
    for path in others:
        try:
            merged.merge(LZWCounter.load(path))
        except ValueError as error:
            raise ValueError(f"{path}: cannot be merged with {first}: {error}") from None
    return merged


def check_writable(option: str, path: Path, read: Sequence[Path] = ()) -> None:
    """See now, not after hours of counting, that there is a place for a file.

    And that it is none of those that are ``read``, which would be gone.
    """
    for other in read:
        if path.resolve() == other.resolve():
            raise ValueError(f"{option}: expected a file of its own, got {path}, which is read")
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, f"{option}: expected a file, got a directory", path)
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, f"{option}: no such directory", str(path.parent))
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, f"{option}: cannot write there", str(path.parent))


def count_corpus(
    corpus: Corpus,
    mode: Mode,
    *,
    checkpoint: Path | None,
    observe: Sequence[Callable[[TokenChunk], None]],
) -> Counted:
    """Count the corpus, with progress on stderr.

    Args:
        corpus: what to count.
        mode: how.
        checkpoint: goes on from it where it exists, and keeps the counter there, also of an
            interrupted or failed run; not with shards.
        observe: called with every chunk, those that a checkpoint has counted included.
    """
    started = time.perf_counter()
    chunks = _observed(corpus.chunks, observe)
    if mode.shards is not None:
        counter, resumed = _count_in_shards(chunks, corpus.vocab_size, mode), 0
    else:
        counter, resumed = _open_counter(checkpoint, corpus.vocab_size, mode)
        _count(counter, chunks, resumed, checkpoint, mode.threads)
    return Counted(counter, counter.num_tokens - resumed, time.perf_counter() - started)


def _open_counter(checkpoint: Path | None, vocab_size: int, mode: Mode) -> tuple[LZWCounter, int]:
    """The counter to go on with, and how many tokens it has counted."""
    from l3ext.allocation import LZWCounter

    if checkpoint is None or not checkpoint.exists():
        return LZWCounter(vocab_size, mode.parse, max_codewords=mode.max_codewords), 0
    counter = LZWCounter.load(checkpoint)
    expected = (vocab_size, mode.parse, mode.max_codewords)
    found = (counter.vocab_size, counter.parse, counter.max_codewords)
    if found != expected:
        names = ("vocab_size", "parse", "max_codewords")
        told = [", ".join(map("{} {}".format, names, values)) for values in (expected, found)]
        raise ValueError(f"--checkpoint: expected {told[0]}; got a counter with {told[1]}")
    return counter, counter.num_tokens


def _count(
    counter: LZWCounter,
    chunks: Iterator[TokenChunk],
    resumed: int,
    checkpoint: Path | None,
    threads: int | None,
) -> None:
    def size() -> str:
        return f", {counter.num_codewords:,} codewords, {counter.nbytes / 1e6:,.0f} MB"

    try:
        with contextlib.closing(_shown(_after(chunks, resumed, counter), resumed, size)) as shown:
            for chunk in shown:
                counter.update(chunk.tokens, chunk.offsets, threads=threads)
    except KeyboardInterrupt:
        kept = f"the counter is kept in {checkpoint}" if checkpoint else "nothing is kept"
        hint = "run the same command to go on" if checkpoint else "--checkpoint would keep it"
        raise KeyboardInterrupt(f"interrupted: {kept}; {hint}") from None
    finally:
        # An interrupted or failed run keeps whole updates too; a rejected one left no trace.
        if checkpoint is not None:
            counter.save(checkpoint)


def _count_in_shards(chunks: Iterator[TokenChunk], vocab_size: int, mode: Mode) -> LZWCounter:
    from l3ext.shards import count_shards_in_processes

    assert mode.shards is not None
    try:
        with contextlib.closing(_shown(chunks, 0, str)) as shown:
            return count_shards_in_processes(
                shown, vocab_size, shards=mode.shards, parse=mode.parse,
                max_codewords=mode.max_codewords,
            )  # fmt: skip
    except KeyboardInterrupt:
        raise KeyboardInterrupt("interrupted: nothing is kept") from None


def _observed(
    chunks: Iterator[TokenChunk], observe: Sequence[Callable[[TokenChunk], None]]
) -> Iterator[TokenChunk]:
    for chunk in chunks:
        for look in observe:
            look(chunk)
        yield chunk


def _shown(
    chunks: Iterator[TokenChunk], resumed: int, size: Callable[[], str]
) -> Generator[TokenChunk, None, None]:
    """The chunks, and on stderr how many tokens have passed, how fast, and ``size()``."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("reading")
        started = time.perf_counter()
        new = 0
        for chunk in chunks:
            yield chunk
            new += int(chunk.tokens.size)
            rate = new / (time.perf_counter() - started)
            text = f"{resumed + new:,} tokens, {rate:,.0f} tokens/s{size()}"
            progress.update(task, description=text)


def _after(chunks: Iterator[TokenChunk], resumed: int, counter: LZWCounter) -> Iterator[TokenChunk]:
    """The chunks that a resumed counter has not counted; checks that it counted the others."""
    import numpy as np

    seen = np.zeros(counter.vocab_size, np.int64)
    counted = counter.frequency
    left = resumed
    for chunk in chunks:
        if left == 0:
            yield chunk
            continue
        left -= chunk.tokens.size
        if left >= 0 and int(chunk.tokens.max(initial=0)) < seen.size:
            seen += np.bincount(chunk.tokens, minlength=seen.size)
        if left < 0 or (left == 0 and not np.array_equal(seen, counted)):
            raise ValueError("--checkpoint: it counted another corpus, or these files have changed")
    if left > 0:
        raise ValueError("--checkpoint: it counted more than these files hold")
