"""``l3ext allocate``: a corpus in, an allocation file out; or, with ``--plan``, what to ask for."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from l3ext.cli._counting import (
    Counted,
    Mode,
    check_writable,
    count_corpus,
    is_counter,
    merge_counters,
    open_corpus,
)
from l3ext.cli._distance import measure, open_sample, sentence
from l3ext.cli._output import JsonOption, print_facts, print_json, remark
from l3ext.cli._plan import PlanOptions, plan

if TYPE_CHECKING:
    from l3ext.allocation import Allocation, LZWCounter
    from l3ext.approximation import Distance

_HELP = """Count a corpus with LZW and grant table rows to its tokens.

Examples:

  l3ext allocate corpus.txt --tokenizer tokenizer.json --rows 4x -o allocation.safetensors

  l3ext allocate shard-*.parquet --column text --tokenizer tokenizer.json --rows 710000
  -o allocation.safetensors --checkpoint corpus.counter

  l3ext allocate train.bin --dtype uint16 --eos-id 0 --vocab-size 50257 --rows 4x
  -o allocation.safetensors

With --checkpoint, Ctrl-C keeps what was counted; the same command goes on from there, and a
finished checkpoint grants other --rows without counting again. Without --rows and -o it counts
only. Counters are inputs too: they are merged.

  l3ext allocate corpus.counter --rows 8x -o allocation.safetensors

--shards and --max-codewords are approximations, for corpora that are too long for one core or too
large for memory; they say how far from the exact allocation they are, on a sample.

--plan writes no allocation: it says what tables of these --rows, --max-rows, --width and
--row-dtype, all repeatable, would move over a link in steps drawn from the corpus, one lookup layer
each.

  l3ext allocate corpus.txt --tokenizer tokenizer.json --plan --rows 2x --rows 4x
  --width 2048+1024 --row-dtype bfloat16 --row-dtype float8 --decode 8 --decode 300
  --prefill 2048 --link 55 --window 1.3 --memory 1GiB --picture plan.svg
"""


def allocate(
    inputs: Annotated[
        list[Path],
        typer.Argument(help="Text, .jsonl, .parquet, .bin or .npy files; or counters."),
    ],
    rows: Annotated[
        list[str] | None,
        typer.Option(help="Rows of the table: a number, or a multiple of the vocabulary: 4x."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The allocation file to write.")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="tokenizer.json; needed for text inputs.")
    ] = None,
    vocab_size: Annotated[
        int | None, typer.Option(help="Tokens in the vocabulary; the tokenizer's where not given.")
    ] = None,
    max_rows: Annotated[
        list[int] | None, typer.Option(help="The most rows that one token may own; 512.")
    ] = None,
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
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="Threads that count, exactly; as many as torch's by default."),
    ] = None,
    shards: Annotated[
        int | None,
        typer.Option(help="Approximate: deal the documents to so many processes, then merge."),
    ] = None,
    max_codewords: Annotated[
        int | None,
        typer.Option(help="Approximate: the dictionary stops growing at so many codewords."),
    ] = None,
    sample_tokens: Annotated[
        int,
        typer.Option(min=0, help="Tokens on which an approximation is measured; 0: not at all."),
    ] = 2_000_000,
    seed: Annotated[int, typer.Option(min=0, help="Of that sample, and of --plan's steps.")] = 0,
    planning: Annotated[
        bool, typer.Option("--plan", help="Compare tables instead of writing an allocation.")
    ] = False,
    width: Annotated[
        list[str] | None,
        typer.Option(help="--plan: d_in+d_emb of a row, such as 2048+1024; one number: tied."),
    ] = None,
    row_dtype: Annotated[
        list[str] | None,
        typer.Option(help="--plan: bfloat16 (default), float16, float32, float8 or int8."),
    ] = None,
    decode: Annotated[
        list[int] | None, typer.Option(help="--plan: steps of one token of so many sequences.")
    ] = None,
    prefill: Annotated[
        list[int] | None, typer.Option(help="--plan: steps of so many consecutive tokens.")
    ] = None,
    steps: Annotated[int, typer.Option(help="--plan: how many steps of each are drawn.")] = 1000,
    link: Annotated[
        float | None, typer.Option(help="--plan: bandwidth that rows come with, in GB/s.")
    ] = None,
    window: Annotated[
        float | None, typer.Option(help="--plan: ms of compute before the lookup layer.")
    ] = None,
    memory: Annotated[
        str | None, typer.Option(help="--plan: fast memory for the hot set, such as 4GiB.")
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(help="--plan: draw it into this file (svg, png).")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Entry point of ``l3ext allocate``."""
    from l3ext.allocation import LZWCounter

    mode = Mode(parse, shards, max_codewords, threads)
    options = PlanOptions(
        width or [], row_dtype or [], decode or [], prefill or [], steps, link, window, memory,
        picture,
    )  # fmt: skip
    caps = max_rows or [512]
    _check_combination(planning, options, rows or [], caps, output, checkpoint, mode)
    read = [*inputs, *([] if tokenizer is None else [tokenizer])]
    written = (("--checkpoint", checkpoint), ("--output", output), ("--picture", picture))
    for option, path in written:
        if path is not None:
            check_writable(option, path, read)
            read.append(path)
    if any(is_counter(path) for path in inputs):
        if planning or checkpoint is not None or threads is not None or not mode.exact:
            raise ValueError(
                "inputs: counters have been counted: only --rows, --max-rows and --output "
                "are for them"
            )
        started = time.perf_counter()
        counter = merge_counters(inputs)
        counted = Counted(counter, 0, time.perf_counter() - started)
        sizes = _sizes(rows or [], caps, counter)
        _grant(counted, sizes, output, None, as_json)
        return
    corpus = open_corpus(
        inputs, tokenizer=tokenizer, vocab_size=vocab_size, column=column, split=split,
        dtype=dtype, eos_id=eos_id,
    )  # fmt: skip
    unused = LZWCounter(corpus.vocab_size, parse, max_codewords=max_codewords)
    sizes = _sizes(rows or [], caps, unused)
    if planning:
        plan(
            corpus, mode, sizes, options, sample_tokens=sample_tokens, seed=seed,
            checkpoint=checkpoint, as_json=as_json,
        )  # fmt: skip
        return
    sample = open_sample(mode, sample_tokens if sizes else 0, seed)
    observe = [] if sample is None else [sample.add]
    counted = count_corpus(corpus, mode, checkpoint=checkpoint, observe=observe)
    distance = next(iter(measure(sample, corpus.vocab_size, sizes, mode)), None)
    _grant(counted, sizes, output, distance, as_json)


allocate.__doc__ = _HELP


def _check_combination(
    planning: bool,
    options: PlanOptions,
    rows: list[str],
    caps: list[int],
    output: Path | None,
    checkpoint: Path | None,
    mode: Mode,
) -> None:
    """Which options go together, before any file is touched."""
    if mode.shards is not None and checkpoint is not None:
        raise ValueError(
            "--checkpoint: not of a run with --shards; count the parts of the corpus one by one, "
            "each with a --checkpoint, and merge them with l3ext merge"
        )
    if mode.shards is not None and mode.threads is not None:
        raise ValueError("--threads: not of a run with --shards, whose processes take one each")
    if planning:
        if output is not None:
            raise ValueError("--output: --plan writes no allocation; --picture and --json are its")
        options.check(rows)
        return
    for option in options.given():
        raise ValueError(f"{option}: belongs to --plan")
    for option, count in (("--rows", len(rows)), ("--max-rows", len(caps))):
        if count > 1:
            raise ValueError(f"{option}: expected one without --plan, got {count}")
    if not rows and output is not None:
        raise ValueError("--rows: expected how many rows --output shall have")
    if rows and output is None:
        raise ValueError("--output: expected the file to write the allocation to")
    if not rows and checkpoint is None:
        raise ValueError("--rows: expected it and --output, or --checkpoint to count only")


def _sizes(rows: list[str], caps: list[int], counter: LZWCounter) -> list[tuple[int, int]]:
    """(total_rows, max_rows) of every table asked for."""
    from l3ext.allocation import LZWCounter

    sizes = [(_total_rows(text, counter.vocab_size), cap) for text in rows for cap in caps]
    # A size that cannot be granted shows now, not after hours of counting.
    unused = LZWCounter(counter.vocab_size)
    for total_rows, max_rows in sizes:
        unused.allocate(total_rows, max_rows)
    return sizes


def _total_rows(text: str, vocab_size: int) -> int:
    try:
        if text.endswith("x"):
            return round(float(text[:-1]) * vocab_size)
        return int(text)
    except (ValueError, OverflowError):
        raise ValueError(f"--rows: expected a number or a multiple like 4x, got {text!r}") from None


def _grant(
    counted: Counted,
    sizes: list[tuple[int, int]],
    output: Path | None,
    distance: Distance | None,
    as_json: bool,
) -> None:
    """Write the allocation, if one was asked for, and say what was done."""
    counter = counted.counter
    if output is not None and counter.num_tokens == 0:
        remark("warning: the corpus holds no tokens: every token gets as many rows as any other")
    facts: dict[str, Any] = {
        "tokens": counter.num_tokens,
        "codewords": counter.num_codewords,
        "vocab_size": counter.vocab_size,
    }
    if output is not None:
        allocation = counter.allocate(*sizes[0])
        allocation.save(output)
        facts |= _describe(counter, allocation)
    facts |= {
        "counter_bytes": counter.nbytes,
        "seconds": counted.seconds,
        "tokens_per_second": counted.new_tokens / counted.seconds,
    }
    if as_json:
        print_json(facts | ({} if distance is None else {"approximation": asdict(distance)}))
        return
    print_facts(facts)
    if distance is not None:
        typer.echo(sentence(distance))
    if output is not None:
        remark(f"written to {output}")


def _describe(counter: LZWCounter, allocation: Allocation) -> dict[str, Any]:
    rows_of_corpus = int((counter.frequency * allocation.rows).sum())
    return {
        "total_rows": allocation.total_rows,
        "max_rows": allocation.max_rows,
        "tokens_with_one_row": int((allocation.rows == 1).sum()),
        "tokens_with_max_rows": int((allocation.rows == allocation.max_rows).sum()),
        "mean_rows_per_corpus_token": rows_of_corpus / max(1, counter.num_tokens),
    }
