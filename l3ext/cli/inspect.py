"""``l3ext inspect``: what a checkpoint, an allocation, a table, token or counter file holds."""

from __future__ import annotations

import errno
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from l3ext.cli._output import JsonOption, format_bytes, print_json, remark

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_ROWS = "l3_allocation_rows"  # under which a checkpoint's safetensors hold the allocation


def inspect(
    path: Annotated[
        Path,
        typer.Argument(help="A checkpoint or run directory, or a file that l3ext wrote."),
    ],
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="tokenizer.json, to show tokens as text; a checkpoint has its own."),
    ] = None,
    top: Annotated[int, typer.Option(min=0, help="How many of the largest owners to list.")] = 10,
    plot: Annotated[
        Path | None, typer.Option(help="Draw rank against rows owned into this file (png, svg).")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Say what a file or directory of l3ext holds: shapes, bytes, and who owns how many rows.

    \b
    Examples:
      l3ext inspect runs/first
      l3ext inspect allocation.l3 --tokenizer runs/first --plot rows.png
      l3ext inspect tables.safetensors --json
    """
    if not path.exists():
        raise FileNotFoundError(errno.ENOENT, "no such file or directory", str(path))
    facts, rows = _inspect_directory(path) if path.is_dir() else _inspect_file(path)
    if rows is not None:
        where = tokenizer or (Path(facts["path"]) if path.is_dir() else None)
        facts["rows"] = _describe_rows(rows, top, _token_texts(where, required=tokenizer))
    if plot is not None:
        if rows is None:
            raise ValueError(f"--plot: {path} holds no allocation of rows")
        _plot(rows, plot)
        remark(f"wrote {plot}")
    if as_json:
        print_json(facts)
    else:
        _print(facts)


Inspection = tuple[dict[str, Any], "npt.NDArray[np.integer] | None"]


def _inspect_directory(path: Path) -> Inspection:
    from safetensors import SafetensorError, safe_open

    from l3ext.cli._models import model_directory

    directory = model_directory(path)
    config = json.loads((directory / "config.json").read_text())
    files = sorted(directory.glob("model*.safetensors"))
    if not files:
        raise FileNotFoundError(errno.ENOENT, "expected model*.safetensors", str(directory))
    tensors: dict[str, Any] = {}
    rows = None
    for file in files:
        try:
            with safe_open(file, framework="numpy") as stored:
                names = list(stored.keys())
                tensors |= {name: stored.get_slice(name).get_shape() for name in names}
                for name in names:
                    if name.rsplit(".", 1)[-1] == _ROWS:
                        rows = stored.get_tensor(name)
        except SafetensorError as error:
            raise OSError(errno.EIO, f"cannot be read ({error})", str(file)) from error
    weights = {name: shape for name, shape in tensors.items() if "l3_allocation" not in name}
    tables = {name: shape for name, shape in weights.items() if name.endswith(".table")}
    facts: dict[str, Any] = {
        "kind": "checkpoint",
        "path": str(directory),
        "bytes": sum(file.stat().st_size for file in directory.iterdir() if file.is_file()),
        "model_type": config.get("model_type"),
        "parameters": sum(math.prod(shape) for shape in weights.values()),
        "table_parameters": sum(math.prod(shape) for shape in tables.values()),
        "tables": tables,
    }
    manifest = directory / "training.json"
    if manifest.is_file():
        training = json.loads(manifest.read_text())
        facts["step"] = training["step"]
        facts["steps"] = training["config"]["steps"]
    return facts, rows


def _inspect_file(path: Path) -> Inspection:
    import l3ext
    from l3ext.training.token_file import TokenFile, is_token_file

    facts: dict[str, Any] = {"path": str(path), "bytes": path.stat().st_size}
    if is_token_file(path):
        file = TokenFile.open(path)
        documents = len(file.offsets) - 1
        return {
            "kind": "tokens",
            **facts,
            "tokens": len(file.tokens),
            "documents": documents,
            "vocab_size": file.vocab_size,
            "dtype": str(file.tokens.dtype),
        }, None
    table = _read_table_file(path)
    if table is not None:
        shapes, rows = table
        return {"kind": "tables", **facts, "tables": shapes}, rows
    try:
        allocation = l3ext.Allocation.load(path)
    except OSError as no_allocation:
        try:
            counter = l3ext.LZWCounter.load(path)
        except OSError as no_counter:
            raise OSError(
                errno.EIO,
                f"neither tokens nor tables, nor an allocation ({no_allocation.strerror}), "
                f"nor a counter ({no_counter.strerror})",
                str(path),
            ) from None
        return {
            "kind": "counter",
            **facts,
            "parse": counter.parse,
            "vocab_size": counter.vocab_size,
            "tokens": counter.num_tokens,
            "codewords": counter.num_codewords,
            "memory_bytes": counter.nbytes,
            "tokens_seen": int((counter.frequency > 0).sum()),
        }, None
    return {"kind": "allocation", **facts}, allocation.rows


def _read_table_file(path: Path) -> tuple[dict[str, Any], npt.NDArray[np.integer] | None] | None:
    """Shapes of the tables in a table file and the first one's rows; None if it is none."""
    import numpy as np
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as stored:
            names = [name for name in stored.keys() if name.startswith("layers.")]  # noqa: SIM118
            tables = {
                name: stored.get_slice(name).get_shape()
                for name in names
                if name.endswith(".table")
            }
            offsets = [name for name in names if name.endswith(".offsets")]
            if not tables or not offsets:
                return None
            return tables, np.diff(stored.get_tensor(offsets[0]))
    except SafetensorError:
        return None


def _describe_rows(
    rows: npt.NDArray[np.integer], top: int, texts: dict[int, str]
) -> dict[str, Any]:
    import numpy as np

    largest = np.argsort(-rows, kind="stable")[:top]
    return {
        "vocab_size": len(rows),
        "total_rows": int(rows.sum()),
        "max_rows": int(rows.max()),
        "tokens_with_one_row": int((rows == 1).sum()),
        "tokens_with_max_rows": int((rows == rows.max()).sum()),
        "percentiles": {str(p): float(np.percentile(rows, p)) for p in (50, 90, 99)},
        "top": [
            {"id": int(token), "rows": int(rows[token]), "text": texts.get(int(token))}
            for token in largest
        ],
    }


def _token_texts(where: Path | None, *, required: Path | None) -> dict[int, str]:
    """Text by token id; empty where there is no tokenizer and none was asked for."""
    from l3ext.training.tokenizer import load_tokenizer

    if where is None:
        return {}
    try:
        tokenizer = load_tokenizer(where)
    except FileNotFoundError:
        if required is not None:
            raise
        return {}
    return {token: tokenizer.decode([token]) for token in range(len(tokenizer))}


def _plot(rows: npt.NDArray[np.integer], path: Path) -> None:
    import numpy as np

    from l3ext.cli._pictures import import_pyplot, save_figure

    plt = import_pyplot("--plot")
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.step(np.arange(1, len(rows) + 1), np.sort(rows)[::-1], where="mid")
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="token, by rows owned",
        ylabel="rows owned",
        title=f"{int(rows.sum()):,} rows of {len(rows):,} tokens",
    )
    axes.grid(alpha=0.3)
    save_figure(figure, path)


def _print(facts: dict[str, Any]) -> None:
    for name, value in facts.items():
        if name == "rows":
            _print_rows(value)
        elif name == "tables":
            for table, shape in value.items():
                typer.echo(f"{table}: {shape[0]:,} rows of {shape[1]:,}")
        elif name.endswith("bytes"):
            typer.echo(f"{name}: {value:,} ({format_bytes(value)})")
        else:
            typer.echo(f"{name}: {value:,}" if isinstance(value, int) else f"{name}: {value}")


def _print_rows(rows: dict[str, Any]) -> None:
    typer.echo(
        f"rows: {rows['total_rows']:,} of {rows['vocab_size']:,} tokens; "
        f"{rows['tokens_with_one_row']:,} own 1, "
        f"{rows['tokens_with_max_rows']:,} own {rows['max_rows']:,}"
    )
    percentiles = ", ".join(f"{p} %: {value:g}" for p, value in rows["percentiles"].items())
    typer.echo(f"percentiles: {percentiles}")
    for owner in rows["top"]:
        text = f"  {owner['text']!r}" if owner["text"] is not None else ""
        typer.echo(f"  {owner['id']:>8}  {owner['rows']:>6,} rows{text}")
