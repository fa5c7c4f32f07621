"""The plan: a stable sort by token id, cut into segments, of fixed size."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import l3ext


def reference_plan(token_ids, offsets):
    """(permutation, [(token, first query, row begin, row end)]) in plain Python."""
    order = sorted(range(len(token_ids)), key=lambda i: token_ids[i])
    segments = []
    for position, i in enumerate(order):
        token = token_ids[i]
        if not segments or segments[-1][0] != token:
            segments.append((token, position, int(offsets[token]), int(offsets[token + 1])))
    return order, segments


def check(token_ids, rows):
    offsets = np.concatenate([[0], np.cumsum(rows)]).astype(np.int64)
    plan = l3ext.plan(torch.tensor(token_ids, dtype=torch.int64), torch.from_numpy(offsets))
    order, segments = reference_plan(token_ids, offsets)
    count = int(plan.num_segments)
    n = len(token_ids)
    assert plan.num_tokens == n
    assert plan.permutation.tolist() == order
    assert count == len(segments)
    assert plan.segment_tokens[:count].tolist() == [s[0] for s in segments]
    assert plan.segment_queries[:count].tolist() == [s[1] for s in segments]
    assert plan.segment_rows[:count].tolist() == [[s[2], s[3]] for s in segments]
    assert int(plan.table_rows) == offsets[-1]
    # Padding: no queries, no rows.
    assert (plan.segment_queries[count:] == n).all()
    assert (plan.segment_rows[count:] == 0).all()
    assert (plan.segment_tokens[count:] == -1).all()
    assert plan.segment_queries.shape == (n + 1,)
    assert plan.segment_rows.shape == (n, 2)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_matches_a_plain_sort(data):
    rows = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=40))
    ids = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=60))
    check(ids, rows)


@pytest.mark.parametrize("count", [509, 510, 511, 512, 513, 5000])
@pytest.mark.parametrize("vocab", [1, 2, 2047, 2048, 2049, 180_000, 5_000_000])
def test_sizes_around_the_limits_of_each_way_to_sort(count, vocab):
    """By counting up to 4 tokens an id, by comparison below 512 ids, else by radix."""
    ids = np.random.default_rng(count).integers(0, vocab, count).tolist()
    check([*ids, 0, vocab - 1], np.ones(vocab, dtype=np.int64))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8])
def test_integer_dtypes_and_shapes(dtype):
    ids = torch.tensor([[3, 1, 3], [0, 1, 3]], dtype=dtype)
    plan = l3ext.plan(ids, torch.tensor([0, 1, 3, 4, 9]))
    assert plan.permutation.tolist() == [3, 1, 4, 0, 2, 5]
    assert plan.segment_rows[: int(plan.num_segments)].tolist() == [[0, 1], [1, 3], [4, 9]]


def test_accepts_numpy_lists_and_non_contiguous_ids():
    offsets = np.array([0, 1, 3, 4, 9])
    expected = l3ext.plan(torch.tensor([3, 1, 3, 0]), torch.from_numpy(offsets))
    offsets.flags.writeable = False
    wide = torch.tensor([3, 9, 1, 9, 3, 9, 0, 9])
    for ids in ([3, 1, 3, 0], np.array([3, 1, 3, 0], dtype=np.int32), wide[::2]):
        plan = l3ext.plan(ids, offsets)
        assert torch.equal(plan.permutation, expected.permutation)
        assert torch.equal(plan.segment_rows, expected.segment_rows)


def test_with_rows_keeps_the_order_and_moves_the_rows():
    plan = l3ext.plan(torch.tensor([1, 0, 1]), torch.tensor([0, 2, 5]))
    moved = plan.with_rows(torch.tensor([[10, 12], [0, 3]]))
    assert torch.equal(moved.permutation, plan.permutation)
    assert int(moved.table_rows) == -1
    table = torch.randn(5, 8)
    elsewhere = torch.randn(20, 8)
    elsewhere[10:12], elsewhere[0:3] = table[0:2], table[2:5]
    x = torch.randn(3, 6)
    here = l3ext.segmented_attention(x, table[:, :6], table[:, 6:], plan)
    there = l3ext.segmented_attention(x, elsewhere[:, :6], elsewhere[:, 6:], moved)
    assert torch.equal(here, there)


def test_max_rows_is_the_largest_owner_or_what_the_caller_says():
    offsets = torch.tensor([0, 2, 2, 9, 10])
    assert l3ext.plan([0, 3], offsets).max_rows == 7
    assert l3ext.plan([0, 3], offsets, max_rows=64).max_rows == 64
    assert l3ext.plan([0, 3], offsets, max_rows=np.int64(64)).max_rows == 64
    assert l3ext.plan([], torch.tensor([0])).max_rows == 0
    for wrong, error in ((-1, ValueError), (2.0, TypeError), (True, TypeError)):
        with pytest.raises(error, match="max_rows: expected"):
            l3ext.plan([0], offsets, max_rows=wrong)


def test_compiled_code_does_not_read_the_offsets():
    offsets = torch.tensor([0, 2, 2, 9, 10])
    compiled = torch.compile(lambda ids: l3ext.plan(ids, offsets), fullgraph=True)
    assert compiled(torch.tensor([0, 3])).max_rows == -1


def test_to_the_cpu_is_the_same_plan():
    plan = l3ext.plan([1, 0, 1], torch.tensor([0, 2, 5]))
    moved = plan.to("cpu", non_blocking=True)
    for field in dataclasses.fields(plan):
        a, b = getattr(plan, field.name), getattr(moved, field.name)
        assert a == b if field.name == "max_rows" else torch.equal(a, b), field.name


def test_pin_memory_pins_every_array(monkeypatch):
    pinned = []

    def pin(tensor):
        pinned.append(tensor)
        return tensor.clone()

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    plan = l3ext.plan([1, 0, 1], torch.tensor([0, 2, 5]))
    other = plan.pin_memory()
    assert len(pinned) == len(dataclasses.fields(plan)) - 1
    assert torch.equal(other.permutation, plan.permutation)
    assert other.max_rows == plan.max_rows


def plan_with_foreign_ids():
    """As a device makes it of the ids [1, 9, 0, -1, 1]: those of no token come last."""
    plan = l3ext.plan([1, 1, 0, 1, 1], torch.tensor([0, 2, 5]))
    return dataclasses.replace(
        plan,
        permutation=torch.tensor([2, 0, 4, 3, 1], dtype=torch.int32),
        segment_tokens=torch.tensor([0, 1, -1, -1, -1], dtype=torch.int32),
        segment_queries=torch.tensor([0, 1, 3, 4, 5, 5], dtype=torch.int32),
        segment_rows=torch.tensor([[0, 2], [2, 5], [-1, -1], [-1, -1], [0, 0]]),
        num_segments=torch.tensor([4], dtype=torch.int32),
    )


def test_check_names_the_first_position_of_a_foreign_id():
    l3ext.plan([1, 0, 1], torch.tensor([0, 2, 5])).check()
    l3ext.plan([], torch.tensor([0, 2, 5])).check()
    with pytest.raises(ValueError, match=r"token_ids: expected ids in the vocab.* at position 1$"):
        plan_with_foreign_ids().check()


def test_check_finds_a_token_with_more_rows_than_promised():
    offsets = torch.tensor([0, 2, 5, 14])
    l3ext.plan([1, 0], offsets, max_rows=3).check()
    message = "max_rows: expected at least 9, the rows of token 2, got 3"
    with pytest.raises(ValueError, match=message):
        l3ext.plan([1, 2, 0], offsets, max_rows=3).check()
    # Rows of another table: what with_rows was told holds, not what was planned.
    plan = l3ext.plan([1], offsets).with_rows(torch.tensor([[0, 40]]), max_rows=40)
    plan.check()
    with pytest.raises(ValueError, match="max_rows: expected 0 or more, got -2"):
        plan.with_rows(plan.segment_rows, max_rows=-2)
