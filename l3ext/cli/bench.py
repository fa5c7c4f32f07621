"""``l3ext bench``: what this machine does, against the machine's own limits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from l3ext.cli._output import JsonOption, print_json, remark

if TYPE_CHECKING:
    from rich.table import Table

app = typer.Typer(help="Measure kernels and runtime on this machine.", no_args_is_help=True)

_DTYPES = ("float32", "bfloat16", "float16", "float64")


@app.callback()
def _group() -> None:
    pass  # keeps `attention` a subcommand while it is the only one


@app.command()
def attention(
    text: Annotated[
        list[Path] | None,
        typer.Argument(help="Text files, one document a line; else the Python standard library."),
    ] = None,
    vocab_size: Annotated[int, typer.Option(help="Ids of the BPE trained on the text.")] = 16384,
    rows_per_token: Annotated[int, typer.Option(help="Table rows over the vocabulary.")] = 4,
    max_rows: Annotated[int, typer.Option(help="Most rows a token owns.")] = 512,
    num_tokens: Annotated[int, typer.Option(help="Tokens of a step.")] = 4096,
    d_in: Annotated[int, typer.Option(help="Width of queries and keys.")] = 1024,
    d_emb: Annotated[int, typer.Option(help="Width of values.")] = 512,
    dtype: Annotated[
        list[str] | None, typer.Option(help="float32, bfloat16, float16 or float64; repeatable.")
    ] = None,
    peer: Annotated[
        list[str] | None, typer.Option(help="A peer by name, repeatable; 'none' for none.")
    ] = None,
    runs: Annotated[int, typer.Option(help="Measured runs of each.")] = 9,
    budget: Annotated[float, typer.Option(help="Seconds for all runs of one dtype.")] = 120.0,
    output: Annotated[Path | None, typer.Option(help="Also write the result there, JSON.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Segmented attention on real tokens, beside what users write today.

    Prints each one's median time and its multiple of the floor: the larger of bytes over the read
    bandwidth and flops over the matrix product's rate, both measured in the same process.

    Examples:

      l3ext bench attention

      l3ext bench attention corpus.txt --num-tokens 16384 --dtype bfloat16 --peer none --json
    """
    import torch

    from l3ext._files import atomic_path
    from l3ext.bench.attention import PEERS, run
    from l3ext.bench.workload import from_documents, standard_library_documents
    from l3ext.corpus import read_documents

    names = list(PEERS) if not peer else [name for name in peer if name != "none"]
    for name in names:
        if name not in PEERS:
            raise ValueError(f"--peer: expected one of {', '.join(PEERS)} or none, got {name!r}")
    dtypes = dtype or ["float32", "bfloat16"]
    for name in dtypes:
        if name not in _DTYPES:
            raise ValueError(f"--dtype: expected one of {', '.join(_DTYPES)}, got {name!r}")
    remark("tokenising and allocating")
    workload = from_documents(
        list(read_documents(text)) if text else standard_library_documents(),
        vocab_size=vocab_size,
        rows_per_token=rows_per_token,
        max_rows=max_rows,
        num_tokens=num_tokens,
        d_in=d_in,
        d_emb=d_emb,
    )
    results = []
    for name in dtypes:
        remark(f"measuring {name}")
        results.append(
            run(
                workload,
                getattr(torch, name),
                peer_names=names,
                runs=runs,
                budget_seconds=budget,
            )
        )
    if output is not None:
        with atomic_path(output) as temporary:
            temporary.write_text(json.dumps(results, indent=2) + "\n")
    if as_json:
        print_json(results)
        return
    from rich.console import Console

    console = Console()
    for result in results:
        console.print(_table(result))


def _table(result: dict[str, Any]) -> Table:
    from rich.table import Table

    floor = result["floor"]
    table = Table(
        title=(
            f"{result['dtype']}, N = {result['num_tokens']}, d_in = {result['d_in']}, "
            f"d_emb = {result['d_emb']}, table {result['table_bytes'] / 2**20:.0f} MiB"
        ),
        caption=(
            f"floor {1e3 * max(floor.values()):.2f} ms: bytes {1e3 * floor['bytes']:.2f} ms at "
            f"{result['bandwidth'] / 1e9:.1f} GB/s, flops {1e3 * floor['flops']:.2f} ms at "
            f"{result['gemm'] / 1e9:.0f} GFLOP/s; {result['machine']['cpu']}, "
            f"{result['machine']['threads']} threads, {result['machine']['isa']}"
        ),
    )
    for column in ("", "median ms", "p10 to p90 ms", "x floor", "x l3ext", "difference"):
        table.add_column(column, justify="left" if not column else "right")
    ours = result["results"]["l3ext"]["median"]
    for name, row in result["results"].items():
        table.add_row(
            name,
            f"{1e3 * row['median']:.2f}",
            f"{1e3 * row['p10']:.2f} to {1e3 * row['p90']:.2f}",
            f"{row['floors']:.2f}",
            f"{row['median'] / ours:.2f}",
            f"{row['difference']:.1e}" if "difference" in row else "",
        )
    for name, reason in result["failures"].items():
        table.add_row(name, "failed", reason)
    return table
