"""Large Lookup Layers (L3) for PyTorch."""

from __future__ import annotations

# torch first: the native module then shares torch's OpenMP runtime instead of bringing a second
# one, whose threads would compete with torch's for the same cores.
import torch  # noqa: F401

from l3ext import _C
from l3ext.ops import Plan, plan, segmented_attention
from l3ext.runtime import PrefetchRuntime, offload
from l3ext.tables import LookupTable

__version__: str = _C.version
has_cuda: bool = _C.has_cuda

__all__ = [
    "LookupTable",
    "Plan",
    "PrefetchRuntime",
    "has_cuda",
    "offload",
    "plan",
    "segmented_attention",
]
