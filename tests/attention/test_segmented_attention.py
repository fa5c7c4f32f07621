"""segmented_attention against the float64 reference: values, gradients, bits."""

from __future__ import annotations

import pytest
import torch

import l3ext
from l3ext.ops import table_attention
from tests import reference

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# Rows a token: around every kernel's block of rows, one row (keys unread), a long one.
ROWS = [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 64, 65, 200, 1, 1]


@pytest.fixture(autouse=True)
def _two_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def run(x, table, offsets, token_ids, d_in, dy=None, tied=False, scale=1.0):
    """Output and gradients (dx, dtable) of the operator."""
    x = x.clone().requires_grad_()
    table = table.clone().requires_grad_()
    keys, values = (table, table) if tied else (table[:, :d_in], table[:, d_in:])
    y = l3ext.segmented_attention(x, keys, values, l3ext.plan(token_ids, offsets), scale)
    if dy is None:
        return y.detach(), None, None
    y.backward(dy)
    return y.detach(), x.grad, table.grad


def run_reference(x, table, offsets, token_ids, d_in, dy, tied=False, scale=1.0):
    x = x.double().requires_grad_()
    table = table.double().requires_grad_()
    keys, values = (table, table) if tied else (table[:, :d_in], table[:, d_in:])
    y = reference.segmented_attention(x, keys, values, token_ids, offsets, scale)
    y.backward(dy.double())
    return y.detach(), x.grad, table.grad


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("num_tokens", "d_in", "d_emb"),
    [(1, 64, 32), (2, 16, 16), (100, 64, 32), (300, 40, 24), (97, 7, 5), (64, 1, 1), (33, 129, 65)],
)
def test_matches_the_reference(dtype, num_tokens, d_in, d_emb):
    x, table, offsets, token_ids = reference.make_step(ROWS, num_tokens, d_in, d_emb, dtype)
    dy = torch.randn(num_tokens, d_emb).to(dtype)
    got = run(x, table, offsets, token_ids, d_in, dy, scale=0.7)
    want = run_reference(x, table, offsets, token_ids, d_in, dy, scale=0.7)
    for actual, expected, what in zip(got, want, ["y", "dx", "dtable"], strict=True):
        reference.assert_close(actual, expected, what, factor=1 if what == "y" else 4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("queries", [1, 2, 3, 5, 6, 7, 8, 47, 48, 49, 130, 600])
def test_every_number_of_queries_a_segment(dtype, queries):
    x, table, offsets, _ = reference.make_step([5, 19, 8], queries, 24, 20, dtype)
    token_ids = torch.full((queries,), 1)
    dy = torch.randn(queries, 20).to(dtype)
    got = run(x, table, offsets, token_ids, 24, dy)
    want = run_reference(x, table, offsets, token_ids, 24, dy)
    for actual, expected, what in zip(got, want, ["y", "dx", "dtable"], strict=True):
        reference.assert_close(actual, expected, what, factor=1 if what == "y" else 4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_tied_table(dtype):
    x, table, offsets, token_ids = reference.make_step(ROWS, 150, 48, 48, dtype, tied=True)
    dy = torch.randn(150, 48).to(dtype)
    got = run(x, table, offsets, token_ids, 48, dy, tied=True)
    want = run_reference(x, table, offsets, token_ids, 48, dy, tied=True)
    for actual, expected, what in zip(got, want, ["y", "dx", "dtable"], strict=True):
        reference.assert_close(actual, expected, what, factor=1 if what == "y" else 4)


def test_table_attention_is_segmented_attention_of_its_halves():
    x, table, offsets, token_ids = reference.make_step(ROWS, 120, 32, 16, torch.float32)
    plan = l3ext.plan(token_ids, offsets)
    dy = torch.randn(120, 16)
    separate = run(x, table, offsets, token_ids, 32, dy)
    x1, table1 = x.clone().requires_grad_(), table.clone().requires_grad_()
    y = table_attention(x1, table1, plan, tied=False)
    y.backward(dy)
    assert torch.equal(y, separate[0])
    assert torch.equal(x1.grad, separate[1])
    assert torch.equal(table1.grad, separate[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_tokens", [1, 5, 400])
def test_same_bits_for_every_thread_count_and_run(dtype, num_tokens):
    x, table, offsets, token_ids = reference.make_step(ROWS, num_tokens, 72, 300, dtype)
    dy = torch.randn(num_tokens, 300).to(dtype)
    torch.set_num_threads(1)
    first = run(x, table, offsets, token_ids, 72, dy)
    for threads in [1, 2, 3, 7]:
        torch.set_num_threads(threads)
        for _ in range(3):
            for a, b in zip(first, run(x, table, offsets, token_ids, 72, dy), strict=True):
                assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_a_token_gives_the_same_bits_alone_and_in_a_batch(dtype):
    x, table, offsets, token_ids = reference.make_step(ROWS, 200, 72, 40, dtype)
    batch, _, _ = run(x, table, offsets, token_ids, 72)
    for i in range(200):
        alone, _, _ = run(x[i : i + 1], table, offsets, token_ids[i : i + 1], 72)
        assert torch.equal(alone[0], batch[i])


def test_permuting_tokens_permutes_outputs():
    x, table, offsets, token_ids = reference.make_step(ROWS, 200, 72, 40, torch.bfloat16)
    order = torch.randperm(200)
    whole, _, _ = run(x, table, offsets, token_ids, 72)
    permuted, _, _ = run(x[order], table, offsets, token_ids[order], 72)
    assert torch.equal(permuted, whole[order])


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_in_other_rows_does_not_leak(dtype):
    x, table, offsets, token_ids = reference.make_step([3, 9, 17, 5, 33], 64, 33, 17, dtype)
    token_ids = torch.where(token_ids % 2 == 0, 1, 3)  # tokens 0, 2 and 4 are not in the step
    clean = run(x, table, offsets, token_ids, 33, torch.ones(64, 17, dtype=dtype))
    for token in [0, 2, 4]:
        table[offsets[token] : offsets[token + 1]] = float("nan")
    dirty = run(x, table, offsets, token_ids, 33, torch.ones(64, 17, dtype=dtype))
    for a, b in zip(clean, dirty, strict=True):
        assert torch.equal(a, b)


def test_one_row_tokens_never_read_their_key():
    x, table, offsets, token_ids = reference.make_step([1, 1, 1], 10, 8, 6, torch.float32)
    table[:, :8] = float("nan")
    y, dx, dtable = run(x, table, offsets, token_ids, 8, torch.ones(10, 6))
    assert torch.equal(y, table[token_ids, 8:])
    assert (dx == 0).all()
    assert (dtable[:, :8] == 0).all()
    counts = torch.bincount(token_ids, minlength=3).float()
    assert torch.equal(dtable[:, 8:], counts[:, None].expand(3, 6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_logits(dtype):
    x, table, offsets, token_ids = reference.make_step([4, 9, 30], 40, 32, 16, dtype)
    for factor in [1e4, -1e4, 0.0]:
        scaled = table.clone()
        scaled[:, :32] *= factor
        y, _, _ = run(x, scaled, offsets, token_ids, 32)
        want = run_reference(x, scaled, offsets, token_ids, 32, torch.zeros(40, 16))[0]
        # With logits of 1e4 a float32 logit is off by 1e-3: a factor on the weights.
        reference.assert_close(y, want, f"y at {factor}", factor=2000 if factor else 1)


def test_infinite_and_nan_scores_behave_as_the_reference():
    x, table, offsets, token_ids = reference.make_step([6], 3, 4, 4, torch.float32)
    x = x.abs() + 0.1
    table[2, :4] = float("-inf")  # weight exactly 0
    y, _, _ = run(x, table, offsets, token_ids, 4)
    want = reference.segmented_attention(
        x.double(), table[:, :4].double(), table[:, 4:].double(), token_ids, offsets
    )
    reference.assert_close(y, want, "y")
    table[2, :4] = float("nan")
    y, _, _ = run(x, table, offsets, token_ids, 4)
    assert torch.isnan(y).all()


def test_a_token_of_the_step_without_rows_yields_zero():
    x, table, offsets, _ = reference.make_step([2, 0, 3], 4, 8, 8, torch.float32)
    y, dx, _ = run(x, table, offsets, torch.tensor([1, 0, 1, 2]), 8, torch.ones(4, 8))
    assert (y[[0, 2]] == 0).all()
    assert (dx[[0, 2]] == 0).all()


def test_empty_step():
    x, table, offsets, _ = reference.make_step([2, 3], 0, 8, 4, torch.float32)
    y, dx, dtable = run(x, table, offsets, torch.empty(0, dtype=torch.int64), 8, torch.ones(0, 4))
    assert y.shape == (0, 4)
    assert dx.shape == (0, 8)
    assert (dtable == 0).all()
    assert dtable.shape == table.shape


def test_strided_rows_and_transposed_gradients():
    x, table, offsets, token_ids = reference.make_step(ROWS, 50, 32, 16, torch.float32)
    wide = torch.full((table.shape[0], 100), float("nan"))
    wide[:, 10:58] = table
    plan = l3ext.plan(token_ids, offsets)
    y = l3ext.segmented_attention(x, wide[:, 10:42], wide[:, 42:58], plan)
    assert torch.equal(y, run(x, table, offsets, token_ids, 32)[0])
    # Gradients that arrive with a column-major layout are read as such.
    dy = torch.randn(16, 50).t()
    got = run(x, table, offsets, token_ids, 32, dy)
    want = run(x, table, offsets, token_ids, 32, dy.contiguous())
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_rows_past_two_to_the_31_elements_are_reached():
    rows, d_in, d_emb = 11_000_000, 128, 72
    table = reference.untouched_zeros(rows, d_in + d_emb, torch.bfloat16)
    offsets = torch.tensor([0, 5, rows - 3, rows])
    generator = torch.Generator().manual_seed(1)
    table[-3:] = torch.randn(3, d_in + d_emb, generator=generator)
    x = torch.randn(4, d_in, generator=generator).bfloat16()
    token_ids = torch.tensor([2, 2, 2, 2])
    y = l3ext.segmented_attention(
        x, table[:, :d_in], table[:, d_in:], l3ext.plan(token_ids, offsets)
    )
    last = table[-3:].double()
    want = reference.segmented_attention(
        x.double(),
        last[:, :d_in],
        last[:, d_in:],
        torch.zeros(4, dtype=torch.int64),
        torch.tensor([0, 3]),
    )
    reference.assert_close(y, want, "y")
