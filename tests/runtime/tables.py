"""Tables for these tests: every row says which table, row and column it is from."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from l3ext.tables import LookupTable


@dataclasses.dataclass
class Owners:
    """Stands in for an allocation; token t owns ``rows[t]`` rows."""

    rows: np.ndarray
    frequency: np.ndarray | None = None

    @property
    def offsets(self):
        return np.concatenate([[0], np.cumsum(self.rows)]).astype(np.int64)


def make_table(vocab, *, d_in=24, d_emb=13, dtype=torch.float32, tied=False, max_rows=9, seed=0):
    random = np.random.default_rng(seed)
    rows = random.integers(1, max_rows + 1, vocab)
    owners = Owners(rows, random.integers(0, 1000, vocab).astype(np.int64))
    width = d_in if tied else d_in + d_emb
    data = torch.from_numpy(random.standard_normal((int(rows.sum()), width))).to(dtype)
    return LookupTable(data, owners, d_in, tied)


def rows_match(rows, table, token_ids):
    """Whether a waited layer holds exactly the table's rows of these tokens."""
    offsets = table.allocation.offsets
    tokens = sorted(set(np.asarray(token_ids).reshape(-1).tolist()))
    if int(rows.plan.num_segments) != len(tokens):
        return False
    for (begin, end), token in zip(rows.plan.segment_rows.tolist(), tokens, strict=True):
        own = table.data[offsets[token] : offsets[token + 1]]
        keys, values = (own, own) if table.tied else (own[:, : table.d_in], own[:, table.d_in :])
        if not torch.equal(rows.keys[begin:end], keys):
            return False
        if not torch.equal(rows.values[begin:end], values):
            return False
    return True
