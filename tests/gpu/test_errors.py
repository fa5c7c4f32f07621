"""What the device cannot do is said as an error, and the process and its device live on."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import l3ext
from l3ext.ops import directory_attention, table_attention
from tests.gpu import steps

SHAPE = steps.Shape("small", (1, 2, 4, 30), (3, 1, 9, 20), 64, 64)
CUDA = pytest.mark.parametrize("device", ["cuda"], indirect=True)


@pytest.fixture
def step(device):
    """A step; after the test the device must still compute it."""
    step = steps.make_step(SHAPE, torch.float32, device)
    expected = steps.run(step)
    yield step
    steps.assert_same_bits(steps.run(step), expected)


def attend(step):
    return table_attention(step.x, step.table, steps.plan_of(step), tied=False)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": (39, 64)}, ValueError, "x: expected 33 rows, one per planned token, got 39"),
        ({"x": (33, 128)}, ValueError, "table: expected more than 128 columns, got 128"),
    ],
)
def test_shapes(device, step, change, error, message):
    changed = {name: torch.zeros(size, device=device) for name, size in change.items()}
    with pytest.raises(error, match=message):
        attend(dataclasses.replace(step, **changed))


def test_row_gradients_where_no_row_is(device, step):
    """A table of no rows: nothing to read, nothing to write."""
    ids = torch.tensor([0, 1, 0], device=device)
    empty = steps.make_step_of(ids, (0, 0), 64, 64, torch.float32)
    y, dx, dtable = steps.run(empty)
    assert torch.count_nonzero(y) == torch.count_nonzero(dx) == 0
    assert dtable.shape == (0, 128)
    assert steps.run(empty, sparse=True)[2]._nnz() == 0


@CUDA
@pytest.mark.parametrize(("d_in", "d_emb"), [(72, 64), (64, 100), (8256, 64), (64, 8256), (1, 1)])
def test_widths_that_the_kernels_do_not_take(device, step, d_in, d_emb):
    odd = steps.make_step(dataclasses.replace(SHAPE, d_in=d_in, d_emb=d_emb), torch.float32, device)
    with pytest.raises(ValueError, match="expected a multiple of 64 up to 8192 on a CUDA device"):
        attend(odd)


@CUDA
def test_float64(device, step):
    double = dataclasses.replace(step, x=step.x.double(), table=step.table.double())
    with pytest.raises(TypeError, match=r"x: expected float32, bfloat16 or float16 on cuda:0"):
        attend(double)


@CUDA
def test_misaligned_tables_are_refused_and_not_copied(device, step):
    wide = torch.zeros(37, 129, device=device)
    with pytest.raises(ValueError, match="keys: expected rows aligned to 16 bytes"):
        attend(dataclasses.replace(step, table=wide[:, :128]))
    wide = torch.zeros(37, 132, device=device)
    with pytest.raises(ValueError, match="keys: expected rows aligned to 16 bytes"):
        attend(dataclasses.replace(step, table=wide[:, 1:129]))


@CUDA
def test_more_rows_than_the_kernels_take(device, step):
    ids = torch.zeros(3, dtype=torch.int64, device=device)
    long = steps.make_step_of(ids, (4097,), 64, 64, torch.float32)
    with pytest.raises(ValueError, match="at most 4096 rows on a CUDA device, got max_rows 4097"):
        attend(long)


@CUDA
def test_gradients_of_more_rows_than_shared_memory_holds(device, step):
    ids = torch.zeros(3, dtype=torch.int64, device=device)
    long = steps.make_step_of(ids, (4096,), 64, 64, torch.float32)
    assert torch.isfinite(attend(long)).all()
    with pytest.raises(RuntimeError, match="shared memory, got a device with at most"):
        steps.run(long)


def test_tables_by_columns_are_refused_and_not_copied(device, step):
    by_columns = dataclasses.replace(step, table=step.table.T.contiguous().T)
    with pytest.raises(ValueError, match="keys: expected rows of adjacent elements, got stride 37"):
        attend(by_columns)


def test_arrays_that_lie_apart(device, step):
    """On the CPU apart from torch's "meta", of which the same is said."""
    here, plan = step.x.device, steps.plan_of(step)
    there = torch.device("cpu" if here.type == "cuda" else "meta")
    with pytest.raises(TypeError, match=f"^offsets: expected {here}, .*token ids lie, got {there}"):
        l3ext.plan(step.token_ids, step.offsets.to(there), max_rows=30)
    with pytest.raises(TypeError, match=f"^offsets: expected {there}, .*token ids lie, got {here}"):
        l3ext.plan(step.token_ids.to(there), step.offsets)
    with pytest.raises(RuntimeError, match=f"^keys: expected device {here}, got {there}"):
        l3ext.segmented_attention(step.x, step.keys.to(there), step.values, plan)
    with pytest.raises(TypeError, match=f"^plan: expected one on {here}, .*got one on {there}"):
        l3ext.segmented_attention(step.x, step.keys, step.values, plan.to(there))
    with pytest.raises(TypeError, match=f"^plan: expected one on {there}, .*got one on {here}"):
        l3ext.segmented_attention(*(t.to(there) for t in (step.x, step.keys, step.values)), plan)


@CUDA
def test_a_directory_that_lies_apart(device, step):
    with pytest.raises(TypeError, match="directory: expected an array on cuda:0, where x lies"):
        directory_attention(
            step.x,
            step.offsets.cpu(),
            steps.plan_of(step),
            d_emb=64,
            row_stride=128,
            value_offset=64,
        )


@CUDA
def test_a_capture_must_be_told_the_most_rows(device, step):
    graph = torch.cuda.CUDAGraph()
    with (
        pytest.raises(RuntimeError, match="max_rows: expected an int on cuda"),
        torch.cuda.graph(graph),
    ):
        l3ext.plan(step.token_ids, step.offsets)


@CUDA
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_another_device_than_the_current_one(device, step):
    far = steps.make_step(SHAPE, torch.float32, torch.device("cuda:1"))
    near = dataclasses.replace(
        step, **{f: getattr(far, f).to(device) for f in ("x", "table", "dy", "token_ids")}
    )
    for a, b in zip(steps.run(far), steps.run(near), strict=True):
        assert torch.equal(a.to(device), b)
    assert torch.cuda.current_device() == 0
