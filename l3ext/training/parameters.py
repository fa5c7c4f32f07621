"""How many parameters a model has, and how many a token touches."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a model.

    Attributes:
        total: all, tied ones once.
        active: those that the forward pass of one token may read: everything but the lookup
            tables, plus as many rows of each table as the largest owner has. Most tokens own far
            fewer, so this counts against the lookup layers. Embeddings count whole, as customary.
        tables: of the lookup tables.
    """

    total: int
    active: int
    tables: int


def count_parameters(model: nn.Module) -> ParameterCount:
    """Count the parameters of any model; its tables must be in it (not offloaded)."""
    from l3ext.nn import L3Layer

    total = sum(parameter.numel() for parameter in model.parameters())
    tables = rows_read = 0
    for module in model.modules():
        if isinstance(module, L3Layer):
            if module.table is None:
                raise ValueError("model: expected its tables in it, they have been offloaded")
            tables += module.table.numel()
            rows_read += module.allocation.max_rows * module.table.shape[1]
    return ParameterCount(total=total, active=total - tables + rows_read, tables=tables)
