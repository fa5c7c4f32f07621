"""``l3ext bench``: what this machine does, against the machine's own limits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from l3ext.cli._bench_inputs import check_names, dtype_named, make_workload
from l3ext.cli._bench_offload import offload
from l3ext.cli._output import JsonOption, print_json, remark, table_console

if TYPE_CHECKING:
    from rich.table import Table

app = typer.Typer(help="Measure kernels and runtime on this machine.", no_args_is_help=True)

_DTYPES = ("float32", "bfloat16", "float16", "float64", "int8", "float8_e4m3fn")
_QUANTIZED = ("int8", "float8_e4m3fn")
# Sizes that a machine's memory and patience allow.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "cpu": {
        "dtype": ["float32", "bfloat16"],
        "num_tokens": [4096],
        "batch": [1, 8, 64],
        "d_in": 1024,
        "d_emb": 512,
        "runs": 9,
        "gemm_size": 2048,
    },
    "cuda": {
        "dtype": ["bfloat16"],
        "num_tokens": [16384, 65536],
        "batch": [1, 8, 64, 300, 512],
        "d_in": 2048,
        "d_emb": 1024,
        "runs": 100,
        "gemm_size": 8192,
    },
}


app.command()(offload)


@app.command()
def attention(
    text: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Text files, one document a line; else Zipf's law on CUDA, and on the CPU the "
            "Python standard library."
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    regime: Annotated[
        list[str] | None, typer.Option(help="forward, backward, decode or plan; repeatable.")
    ] = None,
    zipf: Annotated[bool, typer.Option("--zipf", help="Zipf's law, on the CPU too.")] = False,
    vocab_size: Annotated[
        int | None, typer.Option(help="Ids: of the BPE trained on the text, 16384; Zipf: 180000.")
    ] = None,
    total_rows: Annotated[
        int | None, typer.Option(help="Rows of the table: text: 4 an id; Zipf: 710000.")
    ] = None,
    max_rows: Annotated[int, typer.Option(help="Most rows a token owns.")] = 512,
    num_tokens: Annotated[
        list[int] | None, typer.Option(help="Tokens of a step; repeatable. Not for decode.")
    ] = None,
    batch: Annotated[
        list[int] | None, typer.Option(help="Tokens of a decode step; repeatable.")
    ] = None,
    d_in: Annotated[int | None, typer.Option(help="Width of queries and keys.")] = None,
    d_emb: Annotated[int | None, typer.Option(help="Width of values.")] = None,
    tied: Annotated[
        bool, typer.Option("--tied", help="Values are the keys, and as wide; without peers.")
    ] = False,
    dtype: Annotated[
        list[str] | None,
        typer.Option(
            help="float32, bfloat16, float16 or float64; of rows alone int8 or float8_e4m3fn, on "
            "the CPU, without backward and peers; repeatable."
        ),
    ] = None,
    peer: Annotated[
        list[str] | None, typer.Option(help="A peer by name, repeatable; 'none' for none.")
    ] = None,
    runs: Annotated[int | None, typer.Option(help="Measured runs of each.")] = None,
    budget: Annotated[float, typer.Option(help="Seconds for one regime at one size.")] = 120.0,
    output: Annotated[Path | None, typer.Option(help="Also write the result there, JSON.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Segmented attention beside what users write today.

    Prints each one's median time and how much of it the floor is: the larger of bytes over the
    memory's bandwidth and flops over the matrix product's rate, both measured beside it.

    Examples:

      l3ext bench attention

      l3ext bench attention --device cuda --regime decode --batch 1 --batch 512

      l3ext bench attention corpus.txt --num-tokens 16384 --dtype bfloat16 --peer none --json
    """
    from l3ext._files import atomic_path
    from l3ext.bench.attention import REGIMES, Options, run
    from l3ext.bench.peers import PEERS
    from l3ext.cli._models import usable_device

    place = usable_device(device)
    defaults = _DEFAULTS[place.type]
    every = [] if tied else list(PEERS)
    peers = every if not peer else [name for name in peer if name != "none"]
    check_names("--peer", peers, (*PEERS, "none"))
    width = d_in or defaults["d_in"]
    value_width = d_emb or (width if tied else defaults["d_emb"])
    if tied and (peers or value_width != width):
        raise ValueError("--tied: expected no --peer, and a --d-emb that is --d-in or not given")
    regimes = regime or list(REGIMES)
    check_names("--regime", regimes, REGIMES)
    dtypes = dtype or defaults["dtype"]
    check_names("--dtype", dtypes, _DTYPES)
    for name in dtypes:
        if name in _QUANTIZED and place.type == "cuda":
            raise ValueError(f"--dtype {name}: rows in 8 bits need the CPU, got --device {device}")
        if name in _QUANTIZED and regime and "backward" in regime:
            raise ValueError(f"--regime backward: --dtype {name} has no gradient")
    sizes, batches = num_tokens or defaults["num_tokens"], batch or defaults["batch"]
    count = defaults["runs"] if runs is None else runs
    for option, values in (("--num-tokens", sizes), ("--batch", batches), ("--runs", [count])):
        if min(values) < 1:
            raise ValueError(f"{option}: expected 1 or more, got {min(values)}")
    largest = max([*sizes, *batches])
    remark("making the workload")
    by_law = zipf or (place.type == "cuda" and not text)
    workload = make_workload(text, by_law, vocab_size, total_rows, max_rows, largest)
    results: list[dict[str, Any]] = []
    for name in dtypes:

        def save(result: dict[str, Any]) -> None:
            last = result["measurements"][-1]
            remark(f"{result['dtype']}: {last['regime']}, {last['num_tokens']} tokens: measured")
            if output is not None:
                with atomic_path(output) as temporary:
                    temporary.write_text(json.dumps([*results, result], indent=2) + "\n")

        options = Options(
            place,
            dtype_named(name),
            d_in=width,
            d_emb=value_width,
            tied=tied,
            regimes=[r for r in regimes if name not in _QUANTIZED or r != "backward"],
            num_tokens=sizes,
            batches=batches,
            peers=[] if name in _QUANTIZED else peers,
            runs=count,
            budget_seconds=budget,
            gemm_size=defaults["gemm_size"],
        )
        results.append(run(workload, options, save))
    if as_json:
        print_json(results)
        return
    console = table_console()
    for result in results:
        for measurement in result["measurements"]:
            console.print(_table(result, measurement))
            for name, reason in measurement["failures"].items():
                console.print(f"{name} did not run: {reason}", markup=False)
        console.print(_conditions(result))


def _table(result: dict[str, Any], measurement: dict[str, Any]) -> Table:
    from rich.box import SIMPLE
    from rich.table import Table

    floor = measurement["floor"]
    caption = (
        "no floor"
        if floor is None
        else (
            f"floor {1e6 * max(floor.values()):.1f} µs: bytes {1e6 * floor['bytes']:.1f} µs, "
            f"flops {1e6 * floor['flops']:.1f} µs, at {measurement['bandwidth'] / 1e9:.1f} GB/s "
            f"and {measurement['gemm'] / 1e12:.2f} TFLOP/s"
        )
    )
    table = Table(
        box=SIMPLE,  # 80 columns are enough for the longest name and seven digits
        show_edge=False,
        padding=0,
        title=f"{measurement['regime']}, {measurement['num_tokens']} tokens, {result['dtype']}",
        caption=caption,
    )
    for column in ("", "median µs", "p10", "p90", "runs", "of floor", "x l3ext", "differs"):
        table.add_column(column, justify="left" if not column else "right", no_wrap=True)
    ours = next(iter(measurement["results"].values()))["median"]
    for name, row in measurement["results"].items():
        table.add_row(
            name,
            *(_microseconds(row[part]) for part in ("median", "p10", "p90")),
            str(row["runs"]),
            f"{100 * row['fraction']:.1f} %" if "fraction" in row else "",
            f"{row['median'] / ours:.2f}",
            f"{row['difference']:.1e}" if "difference" in row else "",
        )
    return table


def _microseconds(seconds: float) -> str:
    return f"{1e6 * seconds:.{1 if seconds < 1e-3 else 0}f}"


def _conditions(result: dict[str, Any]) -> str:
    machine = result["machine"]
    if result["device"] == "cuda":
        where = f"{machine['gpu']}, driver {machine['driver_version']}"
    else:
        where = f"{machine['cpu']}, {machine['threads']} threads, {machine['isa']}"
    widths = f"{result['d_in']}" + (", tied" if result["tied"] else f" + {result['d_emb']}")
    return (
        f"{result['source']}, {result['vocab_size']} ids, {result['table_rows']} rows of "
        f"{widths} ({result['table_bytes'] / 2**20:.0f} MiB); "
        f"{result['bandwidth'] / 1e9:.1f} GB/s, {result['gemm'] / 1e12:.2f} TFLOP/s; {where}"
    )
