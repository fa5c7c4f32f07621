"""NumPy arrays where tensors are taken: the same bits, their own memory, no warning."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

import l3ext
from l3ext.ops import directory_attention, table_attention

OFFSETS = np.array([0, 2, 5])
IDS = np.array([1, 0, 1])


def frozen(array):
    array.setflags(write=False)
    return array


def inputs(dtype=np.float32):
    random = np.random.default_rng(0)
    x, table = random.standard_normal((3, 8)), random.standard_normal((5, 12))
    return frozen(x.astype(dtype)), frozen(table.astype(dtype)), l3ext.plan(IDS, OFFSETS)


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_arrays_give_the_same_bits(dtype):
    x, table, plan = inputs(dtype)
    queries, rows = torch.tensor(x), torch.tensor(table)
    want = table_attention(queries, rows, plan, tied=False)
    assert want.dtype == queries.dtype
    for got in (
        table_attention(x, table, plan, tied=False),
        l3ext.segmented_attention(x, table[:, :8], table[:, 8:], plan),
        l3ext.segmented_attention(queries, table[:, :8], rows[:, 8:], plan),
        l3ext.segmented_attention(x[::-1].copy()[::-1], table[:, :8], table[:, 8:], plan),
    ):
        assert type(got) is torch.Tensor
        assert torch.equal(got, want)


def test_the_same_array_twice_is_tied():
    x, table, plan = inputs()
    keys = table[:, :8]
    want = table_attention(torch.tensor(x), torch.tensor(keys), plan, tied=True)
    assert torch.equal(l3ext.segmented_attention(x, keys, keys, plan), want)


def test_arrays_beside_tensors_with_gradients():
    x, table, plan = inputs()
    rows = torch.tensor(table, requires_grad=True)
    table_attention(x, rows, plan, tied=False).sum().backward()
    want = torch.tensor(table, requires_grad=True)
    table_attention(torch.tensor(x), want, plan, tied=False).sum().backward()
    assert torch.equal(rows.grad, want.grad)


def test_rows_in_8_bits():
    x, table, plan = inputs()
    rows = l3ext.quantize_rows(table, 8)
    assert torch.equal(rows.storage, l3ext.quantize_rows(torch.tensor(table), 8).storage)
    arrays = [rows.keys, rows.values, rows.key_scales, rows.value_scales]
    keys, values, *scales = [array.numpy() for array in arrays]
    names = ("key_scales", "value_scales")
    got = l3ext.segmented_attention(x, keys, values, plan, **dict(zip(names, scales, strict=True)))
    want = l3ext.segmented_attention(
        torch.tensor(x), *arrays[:2], plan, **dict(zip(names, arrays[2:], strict=True))
    )
    assert torch.equal(got, want)


def test_a_directory():
    x, table, plan = inputs()
    directory = table.ctypes.data + 48 * OFFSETS[:-1]
    got = directory_attention(x, directory, plan, d_emb=4, row_stride=12, value_offset=8)
    assert torch.equal(got, table_attention(x, table, plan, tied=False))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": np.zeros((3, 8), np.int64)}, TypeError, "x: expected float64, .* got torch.int64"),
        ({"x": np.zeros((3, 8), object)}, TypeError, "x: expected a NumPy array that torch takes"),
        ({"keys": np.zeros((5, 8))}, TypeError, "keys: expected torch.float32, the dtype of x"),
        ({"values": np.zeros(5, np.float32)}, ValueError, "values: expected a matrix"),
        ({"values": [[0.0]] * 5}, TypeError, "values: expected a torch.Tensor or a NumPy array"),
        ({"values": None}, TypeError, "values: expected a torch.Tensor .* got NoneType"),
    ],
)
def test_wrong_arrays(change, error, message):
    x, table, plan = inputs()
    arguments = {"x": x, "keys": table[:, :8], "values": table[:, 8:], "plan": plan}
    with pytest.raises(error, match=message):
        l3ext.segmented_attention(**arguments | change)


@pytest.mark.parametrize("empty", [np.array([]), torch.tensor([]), np.zeros((0, 3)), []])
def test_no_ids_have_any_float_dtype(empty):
    assert l3ext.plan(empty, OFFSETS).num_tokens == 0
    with pytest.raises(TypeError, match="token_ids: expected an integer dtype"):
        l3ext.plan(np.ones(1), OFFSETS)


def test_read_only_ids():
    assert l3ext.plan(frozen(np.array([1, 0])), frozen(OFFSETS.copy())).num_tokens == 2


def test_a_plan_on_meta_needs_max_rows():
    ids, offsets = torch.tensor(IDS, device="meta"), torch.tensor(OFFSETS, device="meta")
    with pytest.raises(RuntimeError, match="max_rows: expected an int on meta, where offsets"):
        l3ext.plan(ids, offsets)
    assert l3ext.plan(ids, offsets, max_rows=3).max_rows == 3


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_single_row_reads_neither_its_key_nor_its_queries(bad):
    keys, values, x = torch.full((1, 8), bad), torch.randn(1, 4), torch.full((2, 8), bad)
    y = l3ext.segmented_attention(x, keys, values, l3ext.plan([0, 0], np.array([0, 1])))
    assert torch.equal(y, values.expand(2, 4))
