"""Large Lookup Layers (L3) for PyTorch."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from l3ext import models as models
    from l3ext import nn as nn
    from l3ext.allocation import Allocation, LZWCounter, allocate
    from l3ext.graph_runtime import GraphRuntime
    from l3ext.nn import L3Layer
    from l3ext.offloading import offload
    from l3ext.ops import segmented_attention
    from l3ext.plans import Plan, plan
    from l3ext.quantization import QuantizedTable, quantize_rows
    from l3ext.runtime import PrefetchRuntime
    from l3ext.tables import LookupTable

    __version__: str
    has_cuda: bool

__all__ = [
    "Allocation",
    "GraphRuntime",
    "L3Layer",
    "LZWCounter",
    "LookupTable",
    "Plan",
    "PrefetchRuntime",
    "QuantizedTable",
    "allocate",
    "has_cuda",
    "offload",
    "plan",
    "quantize_rows",
    "segmented_attention",
]

# Where each public name lives. They load on first use (PEP 562): torch takes more than a second
# to import, and `l3ext --help` should not wait for it.
_HOMES = {
    "Allocation": "l3ext.allocation",
    "LZWCounter": "l3ext.allocation",
    "allocate": "l3ext.allocation",
    "GraphRuntime": "l3ext.graph_runtime",
    "L3Layer": "l3ext.nn",
    "offload": "l3ext.offloading",
    "Plan": "l3ext.plans",
    "plan": "l3ext.plans",
    "segmented_attention": "l3ext.ops",
    "QuantizedTable": "l3ext.quantization",
    "quantize_rows": "l3ext.quantization",
    "PrefetchRuntime": "l3ext.runtime",
    "LookupTable": "l3ext.tables",
}
# Modules that load the same way.
_MODULES = {"models", "nn"}
_NATIVE_FACTS = {"__version__": "version", "has_cuda": "has_cuda"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(import_module(_HOMES[name]), name)
    elif name in _MODULES:
        return import_module(f"l3ext.{name}")  # which sets the name
    elif name in _NATIVE_FACTS:
        # torch first, as in every module that imports _C: the native module then shares torch's
        # OpenMP runtime instead of bringing a second one, whose threads would compete with
        # torch's for the same cores.
        import_module("torch")
        value = getattr(import_module("l3ext._C"), _NATIVE_FACTS[name])
    else:
        raise AttributeError(f"module 'l3ext' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
