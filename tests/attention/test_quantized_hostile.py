"""Rows in 8 bits: what the caller got wrong is said, and nothing is lost."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import l3ext
from l3ext import _C
from l3ext.ops import directory_attention

OFFSETS = torch.tensor([0, 2, 5])
DTYPES = [torch.int8, torch.float8_e4m3fn]


def arguments(dtype=torch.int8):
    table = l3ext.quantize_rows(torch.randn(5, 12), 8, dtype)
    return {
        "x": torch.randn(3, 8),
        "keys": table.keys,
        "values": table.values,
        "plan": l3ext.plan([0, 1, 1], OFFSETS),
        "key_scales": table.key_scales,
        "value_scales": table.value_scales,
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"key_scales": None}, TypeError, "key_scales: expected torch.float32 for torch.* rows, g"),
        ({"value_scales": None}, TypeError, "value_scales: expected torch.float32"),
        ({"key_scales": [1.0] * 5}, TypeError, "key_scales: .* got list"),
        ({"key_scales": torch.ones(5).double()}, TypeError, "key_scales: .* got torch.float64"),
        ({"value_scales": torch.ones(5).half()}, TypeError, "value_scales: .* got torch.float16"),
        ({"key_scales": torch.ones(4)}, ValueError, r"key_scales: expected shape \[5\].* \[4\]"),
        ({"value_scales": torch.ones(5, 1)}, ValueError, r"value_scales: .* got \[5, 1\]"),
        ({"key_scales": torch.ones(5, device="meta")}, RuntimeError, "key_scales: expected device"),
        ({"values": torch.randn(5, 4)}, TypeError, "values: expected torch.*, the dtype of keys"),
        ({"values": torch.ones(4, 4)}, TypeError, "values: expected torch"),
        ({"x": torch.randn(3, 8).double()}, TypeError, "x: expected float32, bfloat16 or float16"),
        ({"x": torch.ones(3, 8, dtype=torch.int8)}, TypeError, "x: expected float64, float32"),
        ({"x": torch.randn(3, 7)}, ValueError, "keys: expected 7 columns"),
        ({"x": torch.randn(4, 8)}, ValueError, "x: expected 3 rows"),
    ],
)
def test_arguments_that_do_not_fit(dtype, change, error, message):
    with pytest.raises(error, match=message):
        l3ext.segmented_attention(**arguments(dtype) | change)


def test_values_of_other_shapes():
    given = arguments()
    for values, message in (
        (given["values"][:4], "values: expected 5 rows"),
        (given["values"].flatten(), "values: expected a matrix"),
    ):
        with pytest.raises(ValueError, match=message):
            l3ext.segmented_attention(**given | {"values": values})
    with pytest.raises(ValueError, match="keys: expected a matrix"):
        l3ext.segmented_attention(**given | {"keys": given["keys"].flatten()})


@pytest.mark.parametrize("name", ["key_scales", "value_scales"])
def test_scales_for_rows_that_need_none(name):
    table = torch.randn(5, 12)
    plan = l3ext.plan([0, 1, 1], OFFSETS)
    with pytest.raises(ValueError, match=f"{name}: expected None for keys of torch.float32"):
        l3ext.segmented_attention(
            torch.randn(3, 8), table[:, :8], table[:, 8:], plan, **{name: torch.ones(5)}
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gradient_is_refused_and_the_output_stays(dtype):
    given = arguments(dtype)
    x = given["x"].requires_grad_()
    y = l3ext.segmented_attention(**given)
    with pytest.raises(RuntimeError, match="float8_e4m3fn and int8 are for inference"):
        y.sum().backward()
    with torch.no_grad():
        assert torch.equal(y, l3ext.segmented_attention(**given | {"x": x.detach()}))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_native_function_checks_for_itself(dtype):
    given = arguments(dtype)
    plan = given.pop("plan")
    rest = (plan, 1.0, 1, torch.empty(3, 4), (0, lambda size: None))
    operands = (given["x"], given["keys"], given["values"])
    scales = (given["key_scales"], given["value_scales"])
    _C.segmented_attention(*operands, *rest, *scales)
    with pytest.raises(ValueError, match="got no key_scales and no value_scales for keys of "):
        _C.segmented_attention(*operands, *rest)
    with pytest.raises(ValueError, match="got key_scales and no value_scales"):
        _C.segmented_attention(*operands, *rest, scales[0])
    with pytest.raises(ValueError, match=r"value_scales: expected shape \[5\], got \[4\]"):
        _C.segmented_attention(*operands, *rest, scales[0], scales[1][:4])
    with pytest.raises(TypeError, match="key_scales: expected float32, got float64"):
        _C.segmented_attention(*operands, *rest, scales[0].double(), scales[1])
    with pytest.raises(ValueError, match=r"values: expected an array beside keys of .*, got None"):
        _C.segmented_attention(*operands[:2], None, *rest, *scales)
    with pytest.raises(TypeError, match="values: expected"):
        _C.segmented_attention(*operands[:2], torch.randn(5, 4), *rest, *scales)
    wide = (given["x"].double(), *operands[1:])
    rest = (*rest[:3], torch.empty(3, 4, dtype=torch.float64), rest[4])
    with pytest.raises(TypeError, match="x: expected float32, bfloat16 or float16 for rows of"):
        _C.segmented_attention(*wide, *rest, *scales)
    with pytest.raises(TypeError, match="keys: expected float32, got"):
        _C.segmented_attention_backward(
            torch.randn(3, 4), *operands, plan, 1.0, 1, None, None, None, None, rest[4]
        )


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"row_dtype": torch.float16}, TypeError, "dtype: expected torch.float8_e4m3fn or torch.i"),
        ({"row_dtype": torch.uint8}, TypeError, "got torch.uint8"),
        ({"scale_offset": 0}, ValueError, "scale_offset: expected 1 or more for torch.int8, got 0"),
        ({"row_dtype": None}, ValueError, "scale_offset: expected 0 for rows of torch.float32"),
        ({"x": torch.randn(1, 8).double()}, TypeError, "x: expected float32, bfloat16 or float16"),
    ],
)
def test_directory_arguments(change, error, message):
    given = {
        "x": torch.randn(1, 8),
        "directory": torch.zeros(2, dtype=torch.int64),
        "plan": l3ext.plan([0], OFFSETS),
        "d_emb": 4,
        "row_stride": 32,
        "value_offset": 8,
        "row_dtype": torch.int8,
        "scale_offset": 12,
    }
    with pytest.raises(ValueError, match="expected the address of the rows of token 0, got 0"):
        directory_attention(**given)
    with pytest.raises(error, match=message):
        directory_attention(**given | change)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(("column", "half"), [(0, "keys"), (11, "values")])
def test_rows_that_are_not_finite_are_named(bad, column, half):
    table = torch.randn(9000, 12)
    table[8191, column] = bad
    table[8500, column] = bad
    with pytest.raises(ValueError, match=f"table: expected {half} that are finite .* in row 8191"):
        l3ext.quantize_rows(table, 8)
    table = torch.full((3, 2), 1.0, dtype=torch.float64)
    table[1] = 1e300
    with pytest.raises(ValueError, match=r"finite in float32, got 1e\+300 .* in row 1"):
        l3ext.quantize_rows(table, 1)


@pytest.mark.parametrize(
    ("table", "d_in", "options", "error", "message"),
    [
        (torch.ones(3, 4), 4, {}, ValueError, r"expected shape \[v, more than 4\], got \[3, 4\]"),
        (torch.ones(3, 4), 3, {"tied": True}, ValueError, r"expected shape \[v, 3\]"),
        (torch.ones(3, 4), 0, {}, ValueError, "d_in: expected 1 or more, got 0"),
        (torch.ones(3, 4), None, {}, TypeError, "d_in: expected an int, got None"),
        (torch.ones(12), 4, {}, ValueError, r"got \[12\]"),
        (torch.ones(3, 4, dtype=torch.int32), 2, {}, TypeError, "table: expected float64, .*int32"),
        ([[1.0, 2.0]], 1, {}, TypeError, "table: expected float64, float32, .* got list"),
        (torch.ones(3, 4), 2, {"dtype": torch.uint8}, TypeError, "dtype: .* got torch.uint8"),
        (torch.ones(3, 4), 2, {"dtype": torch.float8_e5m2}, TypeError, "got torch.float8_e5m2"),
    ],
)
def test_tables_that_cannot_be_quantised(table, d_in, options, error, message):
    with pytest.raises(error, match=message):
        l3ext.quantize_rows(table, d_in, **options)


def test_storage_that_does_not_fit():
    table = l3ext.quantize_rows(torch.randn(4, 12), 8)
    for change, error, message in (
        (
            {"storage": table.storage.float()},
            TypeError,
            "expected a torch.uint8 tensor, got torch.f",
        ),
        ({"storage": [1]}, TypeError, "expected a torch.uint8 tensor, got list"),
        ({"storage": table.storage[:, :16]}, ValueError, "expected contiguous rows of 32 bytes"),
        ({"storage": table.storage.t()}, ValueError, "contiguous"),
        ({"storage": table.storage[0]}, ValueError, "contiguous"),
        ({"d_in": None}, TypeError, "d_in: expected an int, got None"),
        ({"d_emb": "4"}, TypeError, "d_emb: expected an int, got '4'"),
        ({"dtype": [torch.int8]}, TypeError, "dtype: expected torch.float8_e4m3fn or torch.int8"),
        ({"d_in": 80}, ValueError, "contiguous rows of 96 bytes for d_in 80, d_emb 4"),
        ({"dtype": torch.float16}, TypeError, "dtype: expected torch.float8_e4m3fn or torch.int8"),
    ):
        with pytest.raises(error, match=message):
            dataclasses.replace(table, **change)
    empty = l3ext.quantize_rows(torch.empty(0, 12), 8)
    assert empty.dequantize().shape == (0, 12)
