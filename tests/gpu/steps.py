"""Steps of every shape, how to run them, and what they must come to."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools

import numpy as np
import pytest
import torch

import l3ext
from l3ext.ops import table_attention
from tests import reference


@dataclasses.dataclass(frozen=True)
class Shape:
    """What a step is made of; its name in a test's id is ``str``."""

    name: str
    rows: tuple[int, ...]  # of each token
    queries: tuple[int, ...]  # positions of each token
    d_in: int = 128
    d_emb: int = 64
    tied: bool = False

    def __str__(self):
        return f"{self.name}-{self.d_in}x{self.d_emb}" + ("-tied" if self.tied else "")


@dataclasses.dataclass(frozen=True)
class Step:
    """The tensors of a step, all on one device."""

    x: torch.Tensor
    table: torch.Tensor  # [v, d_in + d_emb], [v, d_in] if tied
    offsets: torch.Tensor
    token_ids: torch.Tensor
    dy: torch.Tensor
    d_in: int
    tied: bool

    @property
    def keys(self):
        return self.table[:, : self.d_in]

    @property
    def values(self):
        return self.table if self.tied else self.table[:, self.d_in :]


def make_step(shape, dtype, device, seed=0):
    """A step of this shape with its positions in random order."""
    ids = np.repeat(np.arange(len(shape.rows)), shape.queries)
    ids = torch.from_numpy(np.random.default_rng(seed).permutation(ids)).to(device)
    return make_step_of(ids, shape.rows, shape.d_in, shape.d_emb, dtype, shape.tied, seed)


def make_step_of(token_ids, rows, d_in, d_emb, dtype, tied=False, seed=0):
    """A step of these ids; logits of the size that they have at initialisation, about 1."""
    device = token_ids.device
    generator = torch.Generator(device).manual_seed(seed)
    offsets = torch.from_numpy(np.cumsum([0, *rows])).to(device)

    def normal(*size):
        # Drawn in the dtype that is wanted: a large table shall not take twice its memory.
        return torch.randn(*size, generator=generator, device=device, dtype=dtype)

    table = normal(int(offsets[-1]), d_in if tied else d_in + d_emb)
    table[:, :d_in] *= d_in**-0.5
    n = len(token_ids)
    return Step(normal(n, d_in), table, offsets, token_ids, normal(n, d_emb), d_in, tied)


def plan_of(step):
    return l3ext.plan(step.token_ids, step.offsets)


def run(step, plan=None, *, sparse=False):
    """Output and both gradients of table_attention."""
    x, table = step.x.detach().requires_grad_(), step.table.detach().requires_grad_()
    plan = plan_of(step) if plan is None else plan
    y = table_attention(x, table, plan, tied=step.tied, sparse=sparse)
    dx, dtable = torch.autograd.grad(y, [x, table], step.dy)
    return y.detach(), dx, dtable


def check(step, results):
    """Compare what :func:`run` gave with the definition; rows not in the step get zeros."""
    arguments = (step.x, step.keys, step.values, step.token_ids, step.offsets, step.dy)
    exact = reference.attention_by_token(*arguments)
    attainable = reference.attention_by_token(*arguments, operands=step.x.dtype)
    y, dx, dtable = results
    touched = exact[2]
    gradients = _row_gradients(exact, step.tied), _row_gradients(attainable, step.tied)
    reference.assert_accepted(y, exact[0], attainable[0], "y")
    reference.assert_accepted(dx, exact[1], attainable[1], "dx")
    reference.assert_accepted(dtable[touched], *gradients, "dtable")
    others = torch.ones(len(step.table), dtype=torch.bool, device=touched.device)
    others[touched] = False
    assert torch.count_nonzero(dtable[others]) == 0


def _row_gradients(results, tied):
    *_, dkeys, dvalues = results
    if not tied:
        return torch.cat([dkeys, dvalues], dim=1)
    return (
        (dkeys.float() + dvalues.float()).to(dkeys.dtype)
        if dkeys.itemsize < 8
        else (dkeys + dvalues)
    )


def assert_same_bits(results, others):
    for a, b in zip(results, others, strict=True):
        assert torch.equal(a, b)


def assert_near(actual, expected, what):
    """Equal but for the order of sums: other kernels may serve a step of another shape."""
    reference.assert_close(actual, expected, what, factor=2)


@contextlib.contextmanager
def poisoned():
    """Memory comes filled with NaN, and integers with their largest: what is not written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


# --- shapes ---------------------------------------------------------------------------------------
ROW_EDGES = (1, 2, 15, 16, 17, 63, 64, 65)
QUERY_EDGES = (1, 2, 3, 7, 8, 9, 16, 31, 32, 33, 63, 64, 65, 129)


def grid(rows, queries):
    """One token for each number of rows with each number of queries."""
    both = list(itertools.product(rows, queries))
    return {"rows": tuple(r for r, _ in both), "queries": tuple(q for _, q in both)}


QUICK = [
    Shape("no position", (2, 3), (0, 0)),
    Shape("one position", (3, 20, 1), (0, 1, 0)),
    Shape("row edges", (*ROW_EDGES, 0, 200), (3,) * (len(ROW_EDGES) + 2)),
    Shape("query edges", (20,) * len(QUERY_EDGES), QUERY_EDGES),
    Shape("single rows", (1,) * 8, (0, 1, 5, 31, 32, 33, 70, 0)),
    Shape("all distinct", (1, 2, 3, 9, 40) * 40, (1,) * 200),
    Shape("tied", (*ROW_EDGES, 0, 200), (9,) * (len(ROW_EDGES) + 2), 64, 64, tied=True),
]
EDGES = grid((*ROW_EDGES, 511, 512), (1, 2, 3, 8, 9, 16, 63, 64, 65, 129, 5000))
SOME_EDGES = grid((1, 2, 17, 64, 65, 512), (1, 8, 9, 64, 65, 129))
WIDTHS = [(64, 64), (192, 320), (1024, 512), (1536, 768), (4096, 1024), (1024, 4096)]
FULL = [
    Shape("edges", **EDGES, d_in=2048, d_emb=1024),
    Shape("edges", **SOME_EDGES, d_in=2048, d_emb=2048, tied=True),
    *(Shape("edges", **SOME_EDGES, d_in=d_in, d_emb=d_emb) for d_in, d_emb in WIDTHS),
    Shape("widest", (1, 5, 100), (9, 70, 3), 8192, 8192),
    Shape("one token", (512,), (65_536,), 2048, 1024),
    Shape("all distinct", (1, 2, 3, 17, 300) * 800, (1,) * 4000, 1024, 512),
    Shape("many rows", (2499, 2500, 1), (1, 70, 3), 1024, 512),
]
# Around the step that the decode kernels still take, and small ones, which they split most.
DECODE = [
    Shape(f"{n} positions", (1, 2, 40, 512, 100, 7, 300, 16), counts, 2048, 1024)
    for n, counts in (
        (1, (0, 0, 0, 1, 0, 0, 0, 0)),
        (8, (1,) * 8),
        (300, (30, 40, 50, 60, 70, 5, 1, 44)),
        (1023, (127, 128, 128, 128, 128, 128, 128, 128)),
        (1024, (128,) * 8),
        (1025, (129, 128, 128, 128, 128, 128, 128, 128)),
    )
]


def on_devices(quick, full):
    """Parametrise over ("device", "shape"): the quick ones everywhere, the full ones on CUDA."""
    places = [("cpu", shape) for shape in quick] + [("cuda", shape) for shape in (*quick, *full)]
    return pytest.mark.parametrize(("device", "shape"), places, indirect=["device"], ids=str)


@functools.cache
def zipf_rows(vocab, total, most):
    """Rows in proportion to a Zipf law's frequencies, 1 to ``most`` each, some ``total`` in all."""
    frequency = 1 / np.arange(1, vocab + 1)
    low, high = 0.0, float(total) * 100
    for _ in range(50):
        middle = (low + high) / 2
        rows = np.clip(np.floor(middle * frequency), 1, most)
        low, high = (middle, high) if rows.sum() <= total else (low, middle)
    return np.clip(np.floor(low * frequency), 1, most).astype(np.int64)


def zipf_ids(vocab, count, device, seed=0):
    """Token ids drawn with a Zipf law's frequencies."""
    weights = 1 / np.arange(1, vocab + 1)
    ids = np.random.default_rng(seed).choice(vocab, count, p=weights / weights.sum())
    return torch.from_numpy(ids).to(device)
