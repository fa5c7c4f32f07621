"""``l3ext allocate``: a corpus in, an allocation file out."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from l3ext.cli._output import JsonOption, print_json, remark

if TYPE_CHECKING:
    from l3ext.allocation import Allocation, LZWCounter
    from l3ext.corpus import TokenChunk

_CHUNK_TOKENS = 1 << 20  # what Ctrl-C can lose at most
_HELP = """Count a corpus with LZW and grant table rows to its tokens.

Examples:

  l3ext allocate corpus.txt --tokenizer tokenizer.json --rows 4x -o allocation.safetensors

  l3ext allocate shard-*.parquet --column text --tokenizer tokenizer.json --rows 710000
  -o allocation.safetensors --checkpoint counter.lzw

  l3ext allocate train.bin --dtype uint16 --eos-id 0 --vocab-size 50257 --rows 4x
  -o allocation.safetensors

With --checkpoint, Ctrl-C keeps what was counted; the same command goes on from there, and a
finished checkpoint grants other --rows without counting again.
"""


def allocate(
    inputs: Annotated[
        list[Path], typer.Argument(help="Text, .jsonl, .parquet, .bin or .npy files.")
    ],
    rows: Annotated[
        str, typer.Option(help="Rows of the table: a number, or a multiple of the vocabulary: 4x.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The allocation file to write.")],
    tokenizer: Annotated[
        Path | None, typer.Option(help="tokenizer.json; needed for text inputs.")
    ] = None,
    vocab_size: Annotated[
        int | None, typer.Option(help="Tokens in the vocabulary; the tokenizer's where not given.")
    ] = None,
    max_rows: Annotated[int, typer.Option(help="The most rows that one token may own.")] = 512,
    parse: Annotated[str, typer.Option(help='"paper" or "lzw" (the textbook).')] = "paper",
    column: Annotated[str, typer.Option(help="JSONL key or Parquet column of the text.")] = "text",
    split: Annotated[
        str,
        typer.Option(help='A document of a text file: "line", "blank" (lines between) or "file".'),
    ] = "line",
    dtype: Annotated[str, typer.Option(help="Integer dtype of .bin inputs.")] = "uint16",
    eos_id: Annotated[
        int | None, typer.Option(help="The id that ends each document of .bin and .npy inputs.")
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Keeps the counter; goes on from it where it exists.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Entry point of ``l3ext allocate``."""
    import numpy as np

    from l3ext.allocation import LZWCounter
    from l3ext.corpus import load_tokenizer, read_tokens

    encoder = load_tokenizer(tokenizer) if tokenizer is not None else None
    size = _vocab_size(vocab_size, encoder)
    total_rows = _total_rows(rows, size)
    counter, resumed = _open_counter(checkpoint, size, parse)
    # A size that cannot be granted shows now, not after hours of counting.
    LZWCounter(size).allocate(total_rows, max_rows)
    chunks = read_tokens(
        inputs, tokenizer=encoder, column=column, split=split, dtype=np.dtype(dtype),
        eos_id=eos_id, chunk_tokens=_CHUNK_TOKENS,
    )  # fmt: skip
    started = time.perf_counter()
    try:
        _count(counter, chunks, resumed)
    except KeyboardInterrupt:
        kept = f"the counter is kept in {checkpoint}" if checkpoint else "nothing is kept"
        hint = "run the same command to go on" if checkpoint else "--checkpoint would keep it"
        raise KeyboardInterrupt(f"interrupted: {kept}; {hint}") from None
    finally:
        # An interrupted or failed run keeps whole updates too; a rejected one left no trace.
        if checkpoint is not None:
            counter.save(checkpoint)
    seconds = time.perf_counter() - started
    allocation = counter.allocate(total_rows, max_rows)
    allocation.save(output)
    summary = _summary(counter, allocation, counter.num_tokens - resumed, seconds)
    if as_json:
        print_json(summary)
        return
    for name, value in summary.items():
        text = f"{value:,.1f}" if isinstance(value, float) else f"{value:,}"
        typer.echo(f"{name.replace('_', ' '):28} {text:>16}")
    remark(f"written to {output}")


allocate.__doc__ = _HELP


def _vocab_size(given: int | None, tokenizer: Any) -> int:
    if tokenizer is None:
        if given is None:
            raise ValueError("--vocab-size: expected a number where there is no --tokenizer")
        return given
    needed = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    if given is not None and given < needed:
        raise ValueError(f"--vocab-size: expected at least the tokenizer's {needed}, got {given}")
    return int(given or needed)


def _total_rows(text: str, vocab_size: int) -> int:
    try:
        if text.endswith("x"):
            return round(float(text[:-1]) * vocab_size)
        return int(text)
    except (ValueError, OverflowError):
        raise ValueError(f"--rows: expected a number or a multiple like 4x, got {text!r}") from None


def _open_counter(checkpoint: Path | None, vocab_size: int, parse: str) -> tuple[LZWCounter, int]:
    """The counter to go on with, and how many tokens it has counted."""
    from l3ext.allocation import LZWCounter

    if checkpoint is None or not checkpoint.exists():
        return LZWCounter(vocab_size, parse=parse), 0
    counter = LZWCounter.load(checkpoint)
    if (counter.vocab_size, counter.parse) != (vocab_size, parse):
        raise ValueError(
            f"--checkpoint: expected vocab_size {vocab_size} and parse {parse}, got a counter "
            f"with {counter.vocab_size} and {counter.parse}"
        )
    return counter, counter.num_tokens


def _count(counter: LZWCounter, chunks: Iterator[TokenChunk], resumed: int) -> None:
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("reading")
        started = time.perf_counter()
        for chunk in _after(chunks, resumed, counter):
            counter.update(chunk.tokens, chunk.offsets)
            rate = (counter.num_tokens - resumed) / (time.perf_counter() - started)
            progress.update(
                task,
                description=f"{counter.num_tokens:,} tokens, {rate:,.0f} tokens/s, "
                f"{counter.num_codewords:,} codewords, {counter.nbytes / 1e6:,.0f} MB",
            )


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


def _summary(
    counter: LZWCounter, allocation: Allocation, new_tokens: int, seconds: float
) -> dict[str, Any]:
    frequency = counter.frequency
    rows_of_corpus = int((frequency * allocation.rows).sum())
    return {
        "tokens": counter.num_tokens,
        "codewords": counter.num_codewords,
        "vocab_size": allocation.vocab_size,
        "total_rows": allocation.total_rows,
        "max_rows": allocation.max_rows,
        "tokens_with_one_row": int((allocation.rows == 1).sum()),
        "tokens_with_max_rows": int((allocation.rows == allocation.max_rows).sum()),
        "mean_rows_per_corpus_token": rows_of_corpus / max(1, counter.num_tokens),
        "counter_bytes": counter.nbytes,
        "seconds": seconds,
        "tokens_per_second": new_tokens / seconds,
    }
