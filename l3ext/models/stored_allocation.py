"""The allocation as checkpoints hold it: two buffers of the model, beside its parameters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from torch import Tensor
from transformers.utils import cached_file

from l3ext.allocation import Allocation

ROWS = "l3_allocation_rows"
FREQUENCY = "l3_allocation_frequency"


def check_same_rows(rows: Tensor, allocation: Allocation) -> None:
    """ValueError unless a checkpoint's rows, if they are there yet, are those of the model."""
    if rows.is_meta:
        return
    stored = rows.detach().cpu().numpy()
    if stored.shape != allocation.rows.shape:
        raise ValueError(
            f"{ROWS}: expected those of config.allocation, of {allocation.vocab_size} tokens, got "
            f"shape {list(stored.shape)}"
        )
    other = np.flatnonzero(stored != allocation.rows)
    if other.size:
        token = other[0]
        raise ValueError(
            f"{ROWS}: expected those of config.allocation, {allocation.rows[token]} for token "
            f"{token}, got {stored[token]} in what was loaded; {other.size} tokens differ"
        )


def hub_arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Those of ``from_pretrained``'s that say where a file comes from."""
    names = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
    return {name: kwargs[name] for name in names if name in kwargs}


def read_allocation(path: Any, hub: dict[str, Any]) -> Allocation | None:
    """The allocation alone of a checkpoint in safetensors; None: it holds none."""
    for name in ("model.safetensors", "model.safetensors.index.json"):
        found = cached_file(path, name, _raise_exceptions_for_missing_entries=False, **hub)
        if found is None:
            continue
        stored = {}
        for file in _shards(Path(found), path, hub):
            with safe_open(file, framework="numpy") as tensors:
                for key in tensors.keys():  # noqa: SIM118
                    if (kind := key.rsplit(".", 1)[-1]) in (ROWS, FREQUENCY):
                        stored[kind] = tensors.get_tensor(key)
        if ROWS in stored:
            frequency = stored.get(FREQUENCY)
            if frequency is not None and np.any(frequency < 0):
                frequency = None
            return Allocation.from_rows(stored[ROWS], frequency=frequency)
    return None


def _shards(found: Path, path: Any, hub: dict[str, Any]) -> list[Path]:
    if found.suffix != ".json":
        return [found]
    index = json.loads(found.read_text())["weight_map"]
    wanted = {file for key, file in index.items() if key.endswith((ROWS, FREQUENCY))}
    return [Path(str(cached_file(path, file, **hub))) for file in sorted(wanted)]
