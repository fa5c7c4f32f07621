"""Moving a model's lookup tables out of it, to a runtime that serves them."""

from __future__ import annotations

import os
from typing import Any, Literal, overload

import torch
from torch import nn

from l3ext._checks import file_path
from l3ext._runtimes import runtime_device
from l3ext.graph_runtime import GraphRuntime
from l3ext.nn import L3Layer
from l3ext.runtime import PrefetchRuntime
from l3ext.tables import LookupTable, check_same_tables, save_tables


@overload
def offload(
    model: nn.Module,
    tier: Literal["ram", "disk"],
    path: str | bytes | os.PathLike[str] | None = None,
    cache_bytes: int = 0,
    device: torch.device | str | None = None,
    *,
    graphs: Literal[False] = False,
    **options: Any,
) -> PrefetchRuntime: ...


@overload
def offload(
    model: nn.Module,
    tier: Literal["ram"],
    path: str | bytes | os.PathLike[str] | None = None,
    cache_bytes: int = 0,
    device: torch.device | str | None = None,
    *,
    graphs: Literal[True],
    **options: Any,
) -> GraphRuntime: ...


def offload(
    model: nn.Module,
    tier: Literal["ram", "disk"],
    path: str | bytes | os.PathLike[str] | None = None,
    cache_bytes: int = 0,
    device: torch.device | str | None = None,
    *,
    graphs: bool = False,
    **options: Any,
) -> PrefetchRuntime | GraphRuntime:
    """Move a model's lookup tables out of it; ``generate`` works as before, with the same bits.

    Args:
        model: with :class:`l3ext.nn.L3Layer` layers; quantised ones stay so.
        tier: where the tables go: "ram" keeps them in host memory outside the model; "disk" writes
            them to ``path`` and frees their memory. "ram" with a path writes and maps the file:
            one copy in RAM for all processes that do.
        path: of the table file. A file that is there already must hold exactly these tables, and is
            used.
        cache_bytes: bytes of rows that stay at hand, see :class:`PrefetchRuntime`. Of no use on the
            CPU with tables in RAM, which are read in place by default: nothing is fetched then, and
            the ledger counts neither bytes nor hits.
        device: that will compute: None or "cpu", or a CUDA device.
        graphs: steps can be captured in CUDA graphs, by ``torch.cuda.graph`` or
            ``torch.compile(mode="reduce-overhead")``: the tables, in RAM, are served by a
            :class:`l3ext.GraphRuntime`, for inference.
        options: further options of :class:`PrefetchRuntime`, or of :class:`l3ext.GraphRuntime`.

    Returns:
        The runtime; also set as ``l3_runtime`` of the module that runs the steps.

    Raises:
        ValueError: a wrong tier or path, no lookup layers, or some without weights, an existing
            file with other tables.
        OSError: the file cannot be written or read. Whatever fails, the model is left as it was.
        RuntimeError: the model is offloaded already, or a device without support.
    """
    if tier not in ("ram", "disk"):
        raise ValueError(f'tier: expected "ram" or "disk", got {tier!r}')
    if tier == "disk" and path is None:
        raise ValueError("path: expected the path of the table file, got None")
    if path is not None:
        path = file_path(path)
    if graphs and tier != "ram":
        raise ValueError(
            f'tier: expected "ram" with graphs, as no device reads a file by itself, got {tier!r}'
        )
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    place = runtime_device(device)
    layers = [module for module in model.modules() if isinstance(module, L3Layer)]
    runners = [module for module in model.modules() if hasattr(module, "l3_runtime")]
    if not layers or len(runners) != 1:
        raise ValueError(
            "model: expected one model with lookup layers, got "
            f"{len(layers)} lookup layers and {len(runners)} modules that run them"
        )
    if any(layer.table is not None and layer.table.is_meta for layer in layers):
        raise ValueError("model: expected one with weights, got tables on meta")
    runner: Any = runners[0]
    tables = []
    for layer in layers:
        rows = layer.quantized if layer.table is None else layer.table.detach().cpu()
        if rows is None:
            raise RuntimeError("model: its tables have been offloaded already")
        tables.append(LookupTable(rows, layer.allocation, layer.d_model, layer.tied))
    source: Any = tables if path is None else path
    options.update(device=place, cache_bytes=cache_bytes)
    if path is not None:
        if os.path.exists(path):
            try:
                check_same_tables(path, tables)
            except ValueError as error:
                raise ValueError(
                    f"path: expected a new file or one of this very model's tables, got {error}; "
                    "remove it or choose another path"
                ) from error
        else:
            save_tables(path, tables)
        if not graphs:
            options["mapped"] = tier == "ram"
    runtime = GraphRuntime(source, **options) if graphs else PrefetchRuntime(source, **options)
    for layer in layers:
        layer.release_table()
    runner.l3_runtime = runtime
    return runtime
