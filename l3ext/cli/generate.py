"""``l3ext generate``: continue a prompt, with the tables in the model, in RAM or on disk."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from l3ext.cli._output import JsonOption, parse_bytes, print_json, remark

TIERS = ("none", "ram", "disk")
TABLE_FILE = "l3_tables.safetensors"
TABLE_DTYPES = ("int8", "float8_e4m3fn")


def generate(
    checkpoint: Annotated[
        Path, typer.Argument(help="A model's directory, or a run of l3ext train.")
    ],
    prompt: Annotated[str, typer.Option(help="The text to continue; - reads it from stdin.")] = "-",
    tier: Annotated[
        str, typer.Option(help="Where the tables live: none (in the model), ram or disk.")
    ] = "none",
    path: Annotated[
        Path | None,
        typer.Option(
            help="Table file of tier disk: written if missing, read if there; else the "
            "checkpoint's l3_tables.safetensors."
        ),
    ] = None,
    table_dtype: Annotated[
        str | None,
        typer.Option(help="Store the tables' rows in 8 bits: int8 or float8_e4m3fn; on the CPU."),
    ] = None,
    cache_bytes: Annotated[
        str, typer.Option(help="Rows of the most frequent tokens that stay, such as 64MiB.")
    ] = "0",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="How many tokens at most.")] = 64,
    sample: Annotated[bool, typer.Option("--sample", help="Sample instead of greedy.")] = False,
    temperature: Annotated[float, typer.Option(help="Of sampling.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of sampling.")] = 0,
    device: Annotated[str, typer.Option(help="Where to compute, as torch names it.")] = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Continue a prompt; the text is the same wherever the tables live.

    With --table-dtype it is that of the quantised tables, wherever these live.

    The text streams to stdout; speed and exposed fetch time go to stderr.

    \b
    Examples:
      l3ext generate runs/first --prompt "def main("
      l3ext generate runs/first --prompt "def main(" --tier disk --cache-bytes 4MiB
      echo "import os" | l3ext generate runs/first --sample --seed 7 --json
    """
    if tier not in TIERS:
        raise ValueError(f"--tier: expected one of {', '.join(TIERS)}, got {tier!r}")
    if path is not None and tier != "disk":
        raise ValueError(f"--path: is the table file of --tier disk, got --tier {tier}")
    if temperature <= 0:
        raise ValueError(f"--temperature: expected a number > 0, got {temperature}")
    if table_dtype is not None and table_dtype not in TABLE_DTYPES:
        raise ValueError(
            f"--table-dtype: expected one of {', '.join(TABLE_DTYPES)}, got {table_dtype!r}"
        )
    if table_dtype is not None and device != "cpu":
        raise ValueError(f"--table-dtype: rows in 8 bits need the CPU, got --device {device}")
    cache = parse_bytes(cache_bytes, "--cache-bytes")
    text = sys.stdin.read() if prompt == "-" else prompt
    try:
        text.encode()
    except UnicodeEncodeError as error:  # bytes that were no text came as lone surrogates
        at = error.start
        raise ValueError(
            f"--prompt: expected text in UTF-8, got {text[at]!r} at character {at}"
        ) from None

    import torch
    from transformers import TextStreamer

    from l3ext.cli._models import load_model, model_directory, usable_device
    from l3ext.training.tokenizer import load_tokenizer

    usable_device(device)
    directory = model_directory(checkpoint)
    tokenizer = load_tokenizer(directory)
    model = load_model(directory).to(device).eval()
    ids = tokenizer(text, return_tensors="pt")["input_ids"].to(device)
    if ids.shape[1] == 0:
        raise ValueError("--prompt: expected some text, got none")
    if table_dtype is not None:
        from l3ext.nn import L3Layer

        layers = [module for module in model.modules() if isinstance(module, L3Layer)]
        if not layers:
            raise ValueError(f"--table-dtype: {directory} holds a model without lookup layers")
        for layer in layers:
            layer.quantize_(getattr(torch, table_dtype))
    runtime = None
    if tier != "none":
        import l3ext

        if not getattr(model.config, "l3_layers", None):
            raise ValueError(f"--tier: {directory} holds a model without lookup layers")
        place = (path or directory / TABLE_FILE) if tier == "disk" else None
        runtime = l3ext.offload(
            model,
            tier="disk" if tier == "disk" else "ram",
            path=place,
            cache_bytes=cache,
            device=device,
        )
    if sample:
        torch.manual_seed(seed)
        choice: dict[str, Any] = {"do_sample": True, "temperature": temperature}
    else:
        choice = {"do_sample": False}
    streamer = None if as_json else TextStreamer(tokenizer, skip_prompt=False)
    started = time.perf_counter()
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.eos_token_id or 0,
        streamer=streamer,
        **choice,
    )
    new = output[0, ids.shape[1] :].tolist()  # waits for a device
    seconds = time.perf_counter() - started
    result: dict[str, Any] = {
        "checkpoint": str(directory),
        "tier": tier,
        "table_dtype": table_dtype,
        "prompt": text,
        "text": tokenizer.decode(new),
        "ids": new,
        "seconds": seconds,
        "tokens_per_second": len(new) / seconds,
    }
    if runtime is not None:
        result["exposed_seconds"] = exposed_seconds(runtime)
        result["exposed_fraction"] = result["exposed_seconds"] / seconds
    if as_json:
        print_json(result)
        return
    remark(f"{len(new)} tokens, {result['tokens_per_second']:.1f} tokens/s, tables: {tier}")
    if runtime is not None:
        remark(
            f"exposed fetch: {1e3 * result['exposed_seconds']:.2f} ms, "
            f"{100 * result['exposed_fraction']:.2f} % of the time"
        )


def exposed_seconds(runtime: Any) -> float:
    """Seconds that computing waited for rows, over the runtime's life."""
    return float(runtime.ledger.totals.exposed_us) / 1e6
