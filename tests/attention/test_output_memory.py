"""Large outputs lie in memory that is kept: never a foreign value, never an owner too many."""

from __future__ import annotations

import copy
import io
import math
import threading

import pytest
import torch

import l3ext
from l3ext import _operators
from l3ext.ops import table_attention
from tests import reference
from tests.run_script import run_script

ROWS = [1, 2, 5, 9, 33, 70, 3]


@pytest.fixture
def every_output_is_large(monkeypatch):
    monkeypatch.setattr(_operators, "_LARGE_BYTES", 1)


def empty(count):
    return _operators.empty_output(torch.empty(0), count, 1)


def step(dtype, *, sparse=False, seed=0):
    """Output and gradients (y, dx, dtable)."""
    x, table, offsets, ids = reference.make_step(ROWS, 120, 24, 16, dtype, seed)
    x.requires_grad_()
    table.requires_grad_()
    y = table_attention(x, table, l3ext.plan(ids, offsets), tied=False, sparse=sparse)
    dy = torch.linspace(-1, 1, y.numel()).view(y.shape).to(dtype)
    return y.detach(), *torch.autograd.grad(y, (x, table), dy)


def fill_kept_memory_with(value):
    """Of several sizes: who finds the value has read what nobody wrote."""
    blocks = [empty(1 << i) for i in range(10, 21) for _ in range(3)]
    for block in blocks:
        block.fill_(value)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_what_lies_in_kept_memory_does_not_show(every_output_is_large, dtype, sparse, monkeypatch):
    fill_kept_memory_with(math.nan)
    kept = step(dtype, sparse=sparse)
    monkeypatch.undo()
    fresh = step(dtype, sparse=sparse)
    for of_kept, of_fresh in zip(kept, fresh, strict=True):
        assert of_kept.layout == of_fresh.layout
        assert of_kept.dtype == of_fresh.dtype
        assert torch.equal(of_kept.to_dense(), of_fresh.to_dense())


def test_memory_comes_back_when_its_last_owner_is_gone(every_output_is_large):
    first = empty(3 << 20)
    address = first.data_ptr()
    row = first[5:7]
    row.fill_(3.0)
    del first
    other = empty(3 << 20)  # the slice still owns the first
    assert other.data_ptr() != address
    other.fill_(4.0)
    assert row.flatten().tolist() == [3.0, 3.0]
    del row
    now_free = [empty(3 << 20) for _ in range(64)]  # with whatever other tests left
    assert address in [block.data_ptr() for block in now_free]


def test_a_training_step_gets_the_memory_of_the_one_before():
    rows = [512] * 40
    x, table, offsets, ids = reference.make_step(rows, 512, 256, 192, torch.float32)
    assert table.nbytes >= _operators._LARGE_BYTES
    table.requires_grad_()
    plan = l3ext.plan(ids, offsets)
    addresses = set()
    for _ in range(3):
        table_attention(x, table, plan, tied=False).sum().backward()
        addresses.add(table.grad.data_ptr())
        table.grad = None
    assert len(addresses) == 1


def test_gradients_are_tensors_like_any_other(every_output_is_large):
    y, dx, dtable = step(torch.float32)
    buffer = io.BytesIO()
    torch.save(dtable, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer)
    for copied in (copy.deepcopy(dtable), dtable.clone(), loaded, dtable.numpy().copy()):
        assert torch.equal(torch.as_tensor(copied), dtable)
    shared = dtable.clone().share_memory_()
    assert torch.equal(shared, dtable)
    assert not any(t._is_view() for t in (y, dx, dtable))
    assert dtable.is_contiguous()
    assert dtable.untyped_storage().nbytes() == dtable.nbytes
    dtable.mul_(2.0).add_(1.0)
    assert torch.equal(dtable, loaded * 2 + 1)


def test_opcheck(every_output_is_large):
    x, table, offsets, ids = reference.make_step(ROWS, 30, 8, 8, torch.float64)
    arrays = l3ext.plan(ids, offsets)._arrays()
    torch.library.opcheck(
        torch.ops.l3ext.table_attention_backward.default,
        (torch.randn(30, 8).double(), x, table, 8, False, *arrays, 1.0, True, True),
        test_utils=["test_schema", "test_faketensor"],
    )
    x.requires_grad_()
    torch.library.opcheck(
        torch.ops.l3ext.table_attention.default, (x, table, 8, False, *arrays, 1.0, False)
    )


def test_owners_in_many_threads(every_output_is_large):
    expected = [step(torch.float32, seed=seed) for seed in range(4)]
    wrong = []

    def train(seed):
        for _ in range(20):
            got = step(torch.float32, seed=seed)
            if not all(map(torch.equal, got, expected[seed])):
                wrong.append(seed)

    threads = [threading.Thread(target=train, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_too_much_is_an_error_and_training_goes_on(every_output_is_large):
    with pytest.raises(RuntimeError, match=f"no {4 << 50} bytes of memory"):
        empty(1 << 50)
    assert all(tensor.isfinite().all() for tensor in step(torch.float32))


def test_an_output_may_outlive_everything_else():
    run_script("""
        import torch
        from l3ext import _operators
        kept = _operators.empty_output(torch.empty(0), 64 << 10, 1 << 10)
        torch.kept = kept.fill_(1.0)  # gone when the interpreter ends, or never
        _operators.empty_output(torch.empty(0), 64 << 10, 1 << 10)
    """)
