"""``l3ext bench offload``: what it costs that the table is not in the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from l3ext.cli._bench_inputs import check_names, dtype_named, make_workload, source_of
from l3ext.cli._output import (
    JsonOption,
    format_bytes,
    parse_bytes,
    print_json,
    remark,
    table_console,
)

if TYPE_CHECKING:
    from rich.table import Table

    from l3ext.bench.workload import Workload

_DTYPES = ("float32", "bfloat16", "float16")
_PARTS = ("bytes", "hit_bytes", "reused_bytes", "in_place_bytes")  # of what a step reads


def offload(
    text: Annotated[
        list[Path] | None,
        typer.Argument(help="Text files, one document a line; else Zipf's law."),
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="tokenizer.json of the text; else a BPE trained on it.")
    ] = None,
    allocation: Annotated[
        Path | None,
        typer.Option(
            help="Rows, and the frequencies that the hot set follows, as l3ext allocate wrote "
            "them, of another text; needs --tokenizer. Else those of the text itself."
        ),
    ] = None,
    vocab_size: Annotated[int, typer.Option(help="Ids, where none are given.")] = 32768,
    total_rows: Annotated[
        int | None, typer.Option(help="Rows of the table, where none are given; else 4 an id.")
    ] = None,
    max_rows: Annotated[int, typer.Option(help="Most rows a token owns, likewise.")] = 512,
    hidden_size: Annotated[int, typer.Option(help="Width of the model.")] = 2048,
    layers: Annotated[int, typer.Option(help="Decoder layers.")] = 12,
    d_emb: Annotated[int | None, typer.Option(help="Width of values; else half the model.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    tier: Annotated[
        list[str] | None, typer.Option(help="ram or disk; repeatable; else both.")
    ] = None,
    position: Annotated[
        str, typer.Option(help="The lookup layer follows that many decoder layers: 4 or 1,2,4,8.")
    ] = "4",
    hot: Annotated[
        str, typer.Option(help="Hot sets of tier disk in % of the table: 20 or 0,5,10,20.")
    ] = "20",
    ring: Annotated[str, typer.Option(help="Ring of tier disk, such as 128MiB.")] = "128MiB",
    batch: Annotated[str, typer.Option(help="Sequences decoded at once: 1 or 1,8.")] = "1,8",
    runs: Annotated[int, typer.Option(help="Measured steps of each.")] = 40,
    budget: Annotated[float, typer.Option(help="Seconds for a position and batch.")] = 120.0,
    direct_io: Annotated[
        bool,
        typer.Option(
            "--direct-io/--page-cache",
            help="Read the file past the page cache, or through it, dropped before every step.",
        ),
    ] = True,
    folder: Annotated[
        Path, typer.Option(help="Where the table file is written for the time of the run.")
    ] = Path(),
    trace: Annotated[
        Path | None,
        typer.Option(help="Chrome trace of the last position and batch with the largest hot set."),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Also write the result there, JSON.")] = None,
    as_json: JsonOption = False,
) -> None:
    """A model decodes with its table resident, in RAM and on disk, step by step in turn.

    All decode the same ids and must give the same bits. A step's time, the ratio to the resident
    table's over paired steps with its 95 % interval, and the share of the time that the model
    waited for rows ("exposed"). The weights are drawn; the page cache is cold.

    Examples:

      l3ext bench offload

      l3ext bench offload book.txt --tokenizer tokenizer.json --allocation allocation.safetensors

      l3ext bench offload --position 1,2,4,8 --hot 0,5,10,20 --batch 1 --output offload.json
    """
    from l3ext._files import atomic_path
    from l3ext.bench.offload import TIERS, Options, run

    check_names("--tier", tier or [], TIERS)
    check_names("--dtype", [dtype], _DTYPES)
    batches = _numbers("--batch", batch, least=1)
    for option, value in (("--runs", runs), ("--layers", layers)):
        if value < 1:
            raise ValueError(f"{option}: expected 1 or more, got {value}")
    shares = [percent / 100 for percent in _numbers("--hot", hot, least=0, most=100)]
    options = Options(
        hidden_size=hidden_size,
        num_layers=layers,
        d_emb=d_emb or hidden_size // 2,
        dtype=dtype_named(dtype),
        tiers=tier or TIERS,
        positions=_numbers("--position", position, least=1, most=layers),
        hot=shares,
        ring_bytes=parse_bytes(ring, "--ring"),
        batches=batches,
        runs=runs,
        budget_seconds=budget,
        direct_io=direct_io,
        folder=folder,
        trace=trace,
    )
    remark("making the workload")
    if allocation is not None or tokenizer is not None:
        workload = _of_files(text, tokenizer, allocation)
    else:
        rows = 4 * vocab_size if total_rows is None and not text else total_rows
        needed = (runs + 1) * max(batches)
        workload = make_workload(text, not text, vocab_size, rows, max_rows, needed)

    def save(result: dict[str, Any]) -> None:
        last = result["measurements"][-1]
        remark(f"position {last['position']}, batch {last['batch']}: measured")
        if output is not None:
            with atomic_path(output) as temporary:
                temporary.write_text(json.dumps(result, indent=2) + "\n")

    result = run(workload, options, save)
    if as_json:
        print_json(result)
        return
    console = table_console()
    for measurement in result["measurements"]:
        console.print(_table(measurement))
    console.print(_conditions(result))


def _numbers(option: str, text: str, *, least: int, most: int | None = None) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{option}: expected whole numbers like 1,8, got {text!r}") from None
    for number in numbers:
        if number < least or (most is not None and number > most):
            wanted = f"{least} or more" if most is None else f"{least} to {most}"
            raise ValueError(f"{option}: expected {wanted}, got {number}")
    return numbers


def _of_files(text: list[Path] | None, tokenizer: Path | None, rows: Path | None) -> Workload:
    import numpy as np

    import l3ext
    from l3ext.bench.workload import Workload
    from l3ext.corpus import read_tokens

    if not text or tokenizer is None or rows is None:
        raise ValueError("--allocation: expected it with --tokenizer and a text, and they with it")
    allocation = l3ext.Allocation.load(rows)
    chunks = read_tokens(text, tokenizer=tokenizer)
    tokens = np.concatenate([chunk.tokens for chunk in chunks])
    if tokens.max(initial=0) >= allocation.vocab_size:
        raise ValueError(
            f"--tokenizer: expected ids below {allocation.vocab_size}, the allocation's "
            f"vocabulary, got {tokens.max()}"
        )
    return Workload(f"{source_of(text)}, rows of {rows.name}", tokens, allocation)


def _table(measurement: dict[str, Any]) -> Table:
    from rich.box import SIMPLE
    from rich.table import Table

    from l3ext.bench.offload import RESIDENT

    table = Table(
        box=SIMPLE,
        padding=(0, 1, 0, 0),
        title=f"lookup after {measurement['position']} decoder layers, batch "
        f"{measurement['batch']}, {measurement['results'][RESIDENT]['runs']} steps",
    )
    columns = ("table", "ms", "p10", "p90", "x none", "95 %", "exposed", "fetched", "hot", "reused")
    for column in columns:
        table.add_column(column, justify="left" if column == "table" else "right", no_wrap=True)
    for name, row in measurement["results"].items():
        cells = [name, *(f"{1e3 * row[part]:.1f}" for part in ("median", "p10", "p90"))]
        ratio = row["ratio"]
        cells += [f"{ratio['median']:.3f}", f"{ratio['low']:.3f}-{ratio['high']:.3f}"]
        if ledger := row.get("ledger"):
            used = max(1, sum(ledger[part] for part in _PARTS))
            cells += [
                f"{100 * row['exposed_share']:.2f} %",
                format_bytes(round(ledger["bytes"] / ledger["steps"])),
                f"{100 * ledger['hit_bytes'] / used:.0f} %",
                f"{100 * ledger['reused_bytes'] / used:.0f} %",
            ]
        table.add_row(*cells)
    return table


def _conditions(result: dict[str, Any]) -> str:
    machine = result["machine"]
    return (
        f"{result['source']}; {result['num_layers']} layers of {result['hidden_size']}, "
        f"{result['dtype']}, {format_bytes(result['model_bytes'])} without the table of "
        f"{result['table_rows']} rows, {format_bytes(result['table_bytes'])}; page cache: "
        f"{result['page_cache']}; {machine['cpu']}, {machine['threads']} threads, {machine['isa']}"
    )
