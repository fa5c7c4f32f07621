"""What the caller got wrong is said: what was expected, what came, which argument."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

import l3ext
from l3ext import _C
from l3ext.ops import directory_attention, table_attention

OFFSETS = torch.tensor([0, 2, 5])


def inputs():
    table = torch.randn(5, 12)
    return torch.randn(3, 8), table[:, :8], table[:, 8:], l3ext.plan([0, 1, 1], OFFSETS)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([0, 1, 2], r"token_ids: expected ids in \[0, 2\), got 2 at position 2"),
        ([0, -1, 1], r"token_ids: expected ids in \[0, 2\), got -1 at position 1"),
        (torch.tensor([1, 2**31], dtype=torch.int64), "got 2147483648 at position 1"),
        (torch.tensor([[0, 1], [5, 0]], dtype=torch.int32), "got 5 at position 2"),
    ],
)
def test_ids_out_of_range(ids, message):
    with pytest.raises(ValueError, match=message):
        l3ext.plan(ids, OFFSETS)


@pytest.mark.parametrize("ids", [torch.tensor([0.0]), torch.tensor([True]), [0.5]])
def test_ids_that_are_no_integers(ids):
    with pytest.raises(TypeError, match="token_ids: expected an integer dtype"):
        l3ext.plan(ids, OFFSETS)


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        (None, TypeError, "token_ids: expected a tensor.* got NoneType"),
        ("01", TypeError, "token_ids: expected a tensor.* got str"),
        ([[0], [0, 1]], ValueError, "token_ids: expected a tensor.* got list"),
        ([2**63], (TypeError, ValueError), "token_ids: expected a tensor.* got list"),
        (np.array([0, 2**64 - 1], np.uint64), ValueError, f"got {2**64 - 1} at position 1"),
    ],
)
def test_ids_that_are_no_array(ids, error, message):
    with pytest.raises(error, match=message):
        l3ext.plan(ids, OFFSETS)


def test_arrays_that_run_backwards():
    plan = l3ext.plan(np.array([0, 1, 1])[::-1], OFFSETS)
    assert plan.permutation.tolist() == [2, 0, 1]
    assert plan != l3ext.plan([1, 1, 0], OFFSETS)  # compared by identity, not tensor by tensor


def test_offsets_on_another_device_than_the_ids():
    with pytest.raises(TypeError, match="offsets: expected cpu, where the token ids lie, got meta"):
        l3ext.plan([0], torch.empty(3, dtype=torch.int64, device="meta"), max_rows=3)


@pytest.mark.parametrize(
    ("offsets", "error", "message"),
    [
        (None, TypeError, "offsets: expected a tensor.* got NoneType"),
        (l3ext.Allocation.from_rows([2, 3]), TypeError, "offsets: .* got Allocation"),
        (torch.tensor([1, 2, 5]), ValueError, "offsets: expected to start at 0, got 1"),
        (torch.tensor([0, 3, 2]), ValueError, "expected never to fall, got 2 after 3 at index 2"),
        (torch.tensor([0, 2, 5], dtype=torch.int32), TypeError, "offsets: expected int64"),
        (torch.tensor([[0, 2, 5]]), ValueError, r"expected shape \[V\+1\]"),
        (torch.tensor([], dtype=torch.int64), ValueError, r"expected shape \[V\+1\]"),
    ],
)
def test_offsets(offsets, error, message):
    with pytest.raises(error, match=message):
        l3ext.plan([0], offsets)


def test_offsets_that_do_not_end_at_the_table_s_rows():
    x, keys, values, plan = inputs()
    with pytest.raises(ValueError, match="keys: expected 5 rows, as many as the offsets end at"):
        l3ext.segmented_attention(x, keys[:4], values[:4], plan)
    longer = torch.randn(6, 12)
    with pytest.raises(ValueError, match="got 6"):
        l3ext.segmented_attention(x, longer[:, :8], longer[:, 8:], plan)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.randn(4, 8)}, ValueError, "x: expected 3 rows"),
        ({"x": torch.randn(3, 7)}, ValueError, "keys: expected 7 columns"),
        ({"x": torch.randn(3, 8, 1)}, ValueError, "x: expected a matrix"),
        ({"x": torch.ones(3, 8, dtype=torch.int64)}, TypeError, "x: expected float64"),
        ({"x": [[0.0] * 8] * 3}, TypeError, "x: expected a torch.Tensor or a NumPy .* got list"),
        ({"x": torch.randn(3, 8).double()}, TypeError, "keys: expected torch.float64"),
        ({"values": torch.randn(4, 4)}, ValueError, "values: expected 5 rows"),
        ({"values": torch.randn(5, 4).half()}, TypeError, "values: expected torch.float32"),
        ({"plan": (1, 2)}, TypeError, "plan: expected l3ext.Plan, got tuple"),
        ({"x": torch.randn(3, 8, device="meta")}, RuntimeError, "device"),
    ],
)
def test_wrong_operands(change, error, message):
    arguments = dict(zip(("x", "keys", "values", "plan"), inputs(), strict=True)) | change
    with pytest.raises(error, match=message):
        l3ext.segmented_attention(**arguments)


@pytest.mark.parametrize("wrong", [None, "1", b"1", True, [], [1.0]])
def test_a_scale_that_is_no_number(wrong):
    x, keys, values, plan = inputs()
    table = torch.cat([keys, values], dim=1)
    rows = l3ext.quantize_rows(table, 8)
    scales = {"key_scales": rows.key_scales, "value_scales": rows.value_scales}
    directory = torch.tensor([table.data_ptr(), table[2].data_ptr()])
    layout = {"d_emb": 4, "row_stride": 12, "value_offset": 8}
    for call in (
        lambda: l3ext.segmented_attention(x, keys, values, plan, wrong),
        lambda: l3ext.segmented_attention(x, rows.keys, rows.values, plan, wrong, **scales),
        lambda: table_attention(x, table, plan, tied=False, scale=wrong),
        lambda: directory_attention(x, directory, plan, **layout, scale=wrong),
    ):
        with pytest.raises(TypeError, match="scale: expected a number, got"):
            call()


def test_a_scale_may_be_any_number():
    x, keys, values, plan = inputs()
    expected = l3ext.segmented_attention(x, keys, values, plan, 2.0)
    for scale in (2, np.float32(2), torch.tensor(2.0), torch.tensor([2])):
        assert torch.equal(l3ext.segmented_attention(x, keys, values, plan, scale), expected)


@pytest.mark.parametrize(
    ("argument", "wrong"),
    [("d_emb", None), ("row_stride", 1.5), ("value_offset", "8"), ("scale_offset", None)],
)
def test_a_layout_of_no_integers(argument, wrong):
    x, _, _, plan = inputs()
    layout = {"d_emb": 4, "row_stride": 12, "value_offset": 8} | {argument: wrong}
    with pytest.raises(TypeError, match=f"{argument}: expected an int, got"):
        directory_attention(x, torch.zeros(2, dtype=torch.int64), plan, **layout)


def test_rows_of_a_plan_and_its_device():
    plan = inputs()[3]
    with pytest.raises(TypeError, match=r"segment_rows: expected a torch\.Tensor, got NoneType"):
        plan.with_rows(None)
    with pytest.raises(TypeError, match=r"device: expected a torch\.device .* got None"):
        plan.to(None)
    with pytest.raises(RuntimeError, match=r"device: expected a torch\.device .* got 'gpu'"):
        plan.to("gpu")


def test_table_widths():
    x, _, _, plan = inputs()
    with pytest.raises(ValueError, match="table: expected more than 8 columns, got 8"):
        table_attention(x, torch.randn(5, 8), plan, tied=False)
    with pytest.raises(ValueError, match="table: expected 8 columns, got 12"):
        table_attention(x, torch.randn(5, 12), plan, tied=True)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("segment_rows", torch.tensor([[0, 2], [2, 6], [0, 0]]), "segment 1 needs rows 2..6"),
        ("segment_rows", torch.tensor([[-1, 2], [2, 5], [0, 0]]), "segment 0 needs rows -1..2"),
        ("segment_rows", torch.tensor([[2, 0], [2, 5], [0, 0]]), "segment 0 needs rows 2..0"),
        ("segment_rows", torch.zeros(1, 2, dtype=torch.int64), "expected 2 segments or more"),
        ("segment_rows", torch.zeros(3, 2), "plan.segment_rows: expected int64"),
        ("permutation", torch.tensor([0, 3, 1], dtype=torch.int32), "got 3 at sorted position 1"),
        ("permutation", torch.tensor([0, -1, 1], dtype=torch.int32), "got -1"),
        ("segment_queries", torch.tensor([0, 9, 9, 9], dtype=torch.int32), "segment 1 has no"),
        ("segment_queries", torch.tensor([1, 2, 3, 3], dtype=torch.int32), "segment 0 has no"),
        ("num_segments", torch.tensor([7], dtype=torch.int32), "expected 7 segments or more"),
        ("num_segments", torch.tensor([-1], dtype=torch.int32), "expected 0 to 3 segments"),
        ("num_segments", torch.tensor([1], dtype=torch.int32), "expected segments of 3 queries"),
    ],
)
def test_a_plan_that_was_tampered_with_touches_no_memory(field, value, message):
    x, keys, values, plan = inputs()
    with pytest.raises((ValueError, TypeError), match=message):
        l3ext.segmented_attention(x, keys, values, dataclasses.replace(plan, **{field: value}))


def test_row_gradients_refuse_overlapping_segments():
    x, keys, values, plan = inputs()
    moved = plan.with_rows(torch.tensor([[0, 2], [1, 4]]))
    y = l3ext.segmented_attention(x, keys.clone().requires_grad_(), values, moved)
    with pytest.raises(ValueError, match="row gradients need segments with ascending rows"):
        y.sum().backward()


@pytest.mark.parametrize(
    ("starts", "rows", "message"),
    [
        ([0, 2], 4, "expected room for 3 rows of segment 1 in 2..4, got them at 2"),
        ([1, 2], 5, "expected room for 3 rows of segment 1 in 3..5, got them at 2"),
        ([-1, 2], 5, "expected room for 2 rows of segment 0 in 0..5, got them at -1"),
        ([0, 2**62], 5, "of segment 1 in 2..5, got them at 4611686018427387904"),
        ([0], 5, r"segment_gradients: expected shape \[3\], got \[1\]"),
    ],
)
def test_gradient_rows_that_do_not_fit_are_not_written(starts, rows, message):
    x, keys, values, plan = inputs()
    if len(starts) == 2:
        starts = [*starts, 0]  # of no segment
    arguments = (torch.ones(3, 4), x, keys, values, *plan._arrays(), 1.0, True, True)
    with pytest.raises(ValueError, match=message):
        torch.ops.l3ext.segmented_attention_backward(*arguments, torch.tensor(starts), rows)


def test_sparse_gradients_cannot_be_compiled():
    x, keys, values, plan = inputs()
    keys = keys.clone().requires_grad_()
    compiled = torch.compile(
        lambda x: l3ext.segmented_attention(x, keys, values, plan, sparse=True), fullgraph=True
    )
    with pytest.raises(Exception, match="sparse: expected False in compiled code"):
        compiled(x)


def test_sparse_gradients_do_not_pass_through_views():
    x, keys, values, plan = inputs()
    table = torch.cat([keys, values], dim=1).requires_grad_()
    for a, b, name in ((table[:, :8], values, "keys"), (keys, table[:, 8:], "values")):
        with pytest.raises(ValueError, match=f"{name}: expected a tensor of its own"):
            l3ext.segmented_attention(x, a, b, plan, sparse=True)
    with pytest.raises(ValueError, match="table: expected a tensor of its own"):
        table_attention(x, table[:], plan, tied=False, sparse=True)
    # Without a gradient a view is as good as any.
    with torch.no_grad():
        l3ext.segmented_attention(x, keys, values, plan, sparse=True)


def behind_addresses(**changes):
    """Arguments of directory_attention, which answers as table_attention does unless changed."""
    x, keys, values, plan = inputs()
    table = torch.cat([keys, values], dim=1)
    directory = table.data_ptr() + 48 * OFFSETS[:-1]
    arguments = {"x": x, "directory": directory, "plan": plan, "d_emb": 4, "row_stride": 12}
    return table, arguments | {"value_offset": 8} | changes


def test_a_directory_answers_as_its_table():
    table, arguments = behind_addresses()
    y = directory_attention(**arguments)
    assert torch.equal(y, table_attention(arguments["x"], table, arguments["plan"], tied=False))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"directory": torch.zeros(2, dtype=torch.int64)}, ValueError, "rows of token 0, got 0"),
        ({"directory": torch.tensor([16])}, ValueError, "directory: expected an entry for token 1"),
        ({"directory": torch.zeros(2)}, TypeError, "directory: expected int64, got float32"),
        ({"directory": [0, 0]}, TypeError, "directory: expected a torch.Tensor or .* list"),
        ({"directory": torch.zeros(2, 1).long()}, ValueError, "directory: expected shape"),
        ({"x": torch.randn(4, 8)}, ValueError, "x: expected 3 rows"),
        ({"d_emb": 0}, ValueError, "d_emb: expected 1 or more, got 0"),
        ({"row_stride": 0}, ValueError, "row_stride: expected 1 or more, got 0"),
        ({"value_offset": -1}, ValueError, "value_offset: expected 0 or more, got -1"),
        ({"plan": None}, TypeError, "plan: expected l3ext.Plan, got NoneType"),
    ],
)
def test_wrong_directories(changes, error, message):
    _table, arguments = behind_addresses(**changes)
    with pytest.raises(error, match=message):
        directory_attention(**arguments)


def test_a_directory_s_token_without_rows_needs_no_address():
    table, arguments = behind_addresses()
    plan = l3ext.plan([0, 1, 2], torch.tensor([0, 2, 5, 5]))
    directory = torch.cat([arguments["directory"], torch.zeros(1, dtype=torch.int64)])
    y = directory_attention(**arguments | {"plan": plan, "directory": directory})
    assert (y[2] == 0).all()
    assert torch.isfinite(y).all()
    assert len(table) == 5


def test_nothing_behind_a_directory_has_a_gradient():
    _table, arguments = behind_addresses()
    arguments["x"].requires_grad_()
    with pytest.raises(RuntimeError, match="directory_attention: rows behind addresses have no"):
        directory_attention(**arguments).sum().backward()


def test_frozen_tables_get_no_gradient_and_overlap_is_fine():
    x, keys, values, plan = inputs()
    x.requires_grad_()
    moved = plan.with_rows(torch.tensor([[0, 2], [1, 4]]))
    l3ext.segmented_attention(x, keys, values, moved).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize(
    ("isa", "error", "message"),
    [
        ("sse9", "ValueError", 'expected one of "baseline", "avx2",'),
        ("AVX2", "ValueError", 'got "AVX2"'),
        *(
            (isa, "RuntimeError", f'this machine runs at most "{_C.cpu_isas()[-1]}", got "{isa}"')
            for isa in ("avx2", "avx512", "avx512_bf16", "amx")
            if isa not in _C.cpu_isas()
        ),
    ],
)
def test_an_instruction_set_that_is_unknown_or_does_not_run_is_refused(isa, error, message):
    code = "from l3ext import ops; ops._C.cpu_isa()"
    environment = {**os.environ, "L3EXT_CPU_ISA": isa}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 1
    assert f"{error}: L3EXT_CPU_ISA: " in result.stderr
    assert message in result.stderr


def test_values_behind_the_keys_need_columns():
    x, keys, values, plan = inputs()
    table = torch.cat([keys, values], dim=1)
    y = torch.empty(x.shape[0], values.shape[1], dtype=x.dtype)
    rest = (plan, 1.0, 1, y, (0, lambda size: None))
    _C.segmented_attention(x, table, None, *rest)
    assert torch.equal(y, l3ext.segmented_attention(x, keys, values, plan))
    with pytest.raises(ValueError, match=r"keys: expected more columns than the 8 of x, .* got 8"):
        _C.segmented_attention(x, keys, None, *rest)
    with pytest.raises(ValueError, match="x: expected shape"):
        _C.segmented_attention(x[0], table, None, *rest)
    fields = plan._arrays()
    _C.segmented_attention(x, table, None, fields, *rest[1:])
    with pytest.raises(TypeError, match=r"plan: expected 8 fields, those of l3ext.Plan, got 7"):
        _C.segmented_attention(x, table, None, list(fields[:-1]), *rest[1:])
    with pytest.raises(TypeError, match=r"plan: expected l3ext.Plan, got NoneType"):
        _C.segmented_attention(x, table, None, None, *rest[1:])
    with pytest.raises(TypeError, match=r"array: expected a torch tensor, .* got str"):
        _C.segmented_attention(x, table, None, ("rows", *fields[1:]), *rest[1:])


def test_a_plan_on_another_device_than_x():
    x, keys, values, plan = inputs()
    with pytest.raises(TypeError, match="plan: expected one on cpu, where x lies, got one on meta"):
        l3ext.segmented_attention(x, keys, values, plan.to("meta"))
