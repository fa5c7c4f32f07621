"""Rows in 8 bits: what quantize_rows stores, and attention over it against float64."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import l3ext
from l3ext import _C
from l3ext.ops import directory_attention
from l3ext.quantization import row_bytes
from tests import reference

DTYPES = [torch.int8, torch.float8_e4m3fn]
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
# Rows a token: around the kernels' blocks of rows, one row (keys unread), none, a long one.
ROWS = [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 64, 65, 200, 1, 0]
IDS = len(ROWS) - 1  # of tokens that own rows


def attend(x, table, plan, scale=1.0):
    scales = {"key_scales": table.key_scales, "value_scales": table.value_scales}
    return l3ext.segmented_attention(x, table.keys, table.values, plan, scale, **scales)


def exact(table):
    """Keys and values in float64, nothing rounded."""
    keys = table.keys.double() * table.key_scales.double()[:, None]
    return keys, table.values.double() * table.value_scales.double()[:, None]


def make_step(num_tokens, d_in, d_emb, x_dtype, row_dtype, *, tied=False, seed=0):
    x, table, offsets, ids = reference.make_step(
        ROWS, num_tokens, d_in, d_emb, torch.float32, seed=seed, tied=tied
    )
    table = l3ext.quantize_rows(table, d_in, row_dtype, tied=tied)
    return x.to(x_dtype), table, offsets, ids


def expected(x, table, ids, offsets, scale=1.0):
    return reference.segmented_attention(x.double(), *exact(table), ids, offsets, scale)


# --- what is stored -------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("d_in", "d_emb", "tied"), [(2048, 1024, False), (5, 2, False), (7, 7, True)]
)
def test_a_row_is_one_range_of_bytes(dtype, d_in, d_emb, tied):
    rows = torch.randn(6, d_in if tied else d_in + d_emb)
    table = l3ext.quantize_rows(rows, d_in, dtype, tied=tied)
    assert table.storage.shape == (6, row_bytes(d_in, d_emb, tied=tied))
    if (d_in, d_emb) == (2048, 1024):
        assert table.storage.shape[1] == 3088
    raw = table.storage.numpy().tobytes()
    for r, row in enumerate(np.frombuffer(raw, np.uint8).reshape(6, -1)):
        width = d_in if tied else d_in + d_emb
        first = -(-width // 4) * 4
        scales = row[first : first + (4 if tied else 8)].copy().view(np.float32)
        assert bytes(row[:d_in]) == table.keys[r].contiguous().view(torch.uint8).numpy().tobytes()
        assert scales[0] == table.key_scales[r]
        assert scales[-1] == table.value_scales[r]
        assert not row[first + scales.nbytes :].any()
        assert not row[width:first].any()
        if not tied:
            values = table.values[r].contiguous().view(torch.uint8).numpy().tobytes()
            assert bytes(row[d_in:width]) == values
    for view in (table.keys, table.values, table.key_scales, table.value_scales):
        assert view.untyped_storage().data_ptr() == table.storage.untyped_storage().data_ptr()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("source", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_element_is_within_half_a_step(dtype, source):
    rows = torch.randn(70, 48, dtype=torch.float64).to(source)
    table = l3ext.quantize_rows(rows, 32, dtype)
    half = table.dequantize().double()
    for part, scales in ((slice(0, 32), table.key_scales), (slice(32, 48), table.value_scales)):
        want = rows[:, part].double()
        largest = want.abs().amax(1)
        torch.testing.assert_close(scales.double(), largest / LARGEST[dtype], rtol=1e-6, atol=0)
        step = scales.double()[:, None].expand_as(want)
        if dtype is torch.float8_e4m3fn:  # a step is 2^-3 of the power of two below, 2^-9 at least
            exponent = torch.floor(torch.log2((want / step).abs().clamp(min=2.0**-6)))
            step = step * 2.0 ** (exponent - 3)
        assert ((half[:, part] - want).abs() <= step / 2 * (1 + 1e-5)).all()
        # The largest element of a row is met to float32's precision.
        assert ((half[:, part].abs().amax(1) - largest).abs() <= 1e-6 * largest).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_go_to_even(dtype):
    if dtype is torch.int8:
        row, want = [127, 0.5, 1.5, 2.5, -0.5, -1.5, 126.5], [127, 0, 2, 2, 0, -2, 126]
    else:  # steps of 1 from 8 to 16, of 2^-9 below 2^-6
        tiny = 2.0**-9
        row = [448, 8.5, 9.5, 10.5, -8.5, 0.5 * tiny, 1.5 * tiny]
        want = [448, 8, 10, 10, -8, 0, 2 * tiny]
    table = l3ext.quantize_rows(torch.tensor([row]), 7, dtype, tied=True)
    assert table.key_scales.tolist() == [1.0]
    assert table.keys.float().tolist() == [want]


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_zeros_and_of_the_smallest_and_largest_floats(dtype):
    tiny, huge = torch.finfo(torch.float32).smallest_normal, torch.finfo(torch.float32).max
    rows = torch.tensor([[0.0, 0.0], [tiny / 2**20, 0.0], [huge, -huge], [-0.0, 0.0]])
    table = l3ext.quantize_rows(rows, 1, dtype)
    assert table.key_scales[0] == table.value_scales[1] == table.key_scales[3] == 1.0
    assert torch.isfinite(table.dequantize()).all()
    assert (table.dequantize()[0] == 0).all()
    assert (table.dequantize()[1].abs() <= tiny).all()
    torch.testing.assert_close(table.dequantize()[2], rows[2], rtol=1e-6, atol=0)


def test_quantisation_error_next_to_the_unquantised_layer():
    """int8 is closer than float8 on rows like a trained table's, and both are close."""
    x, table, offsets, ids = reference.make_step(ROWS[:-1], 200, 256, 128, torch.float32)
    plan = l3ext.plan(ids, offsets)
    want = l3ext.segmented_attention(x, table[:, :256], table[:, 256:], plan)
    error = {}
    for dtype in DTYPES:
        got = attend(x, l3ext.quantize_rows(table, 256, dtype), plan)
        error[dtype] = float((got - want).norm() / want.norm())
    assert error[torch.int8] < 0.015
    assert error[torch.int8] < error[torch.float8_e4m3fn] < 0.05


# --- attention ------------------------------------------------------------------------------------
@pytest.mark.parametrize("row_dtype", DTYPES)
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("num_tokens", "d_in", "d_emb", "tied"),
    [
        (1, 64, 32, False),
        (2, 16, 16, True),
        (100, 64, 32, False),
        (300, 40, 24, False),
        (97, 7, 5, False),
        (64, 1, 1, False),
        (33, 129, 65, False),
        (150, 600, 600, True),
    ],
)
def test_matches_float64_on_the_dequantised_rows(row_dtype, x_dtype, num_tokens, d_in, d_emb, tied):
    step = make_step(num_tokens, d_in, d_emb, x_dtype, row_dtype, tied=tied)
    x, table, offsets, ids = step
    y = attend(x, table, l3ext.plan(ids, offsets), 0.7)
    assert y.dtype == x_dtype
    reference.assert_close(y, expected(x, table, ids, offsets, 0.7), "y")


@pytest.mark.parametrize("row_dtype", DTYPES)
@pytest.mark.parametrize("queries", [1, 2, 3, 5, 6, 7, 8, 16, 17, 47, 48, 49, 130])
def test_every_number_of_queries_a_segment(row_dtype, queries):
    x, table, offsets, _ = make_step(queries, 24, 20, torch.float32, row_dtype)
    for token in (0, 10, 15):
        ids = torch.full((queries,), token)
        y = attend(x, table, l3ext.plan(ids, offsets))
        reference.assert_close(y, expected(x, table, ids, offsets), f"y of token {token}")


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.integers(0, 40), min_size=1, max_size=6),
    sizes=st.tuples(st.integers(0, 40), st.integers(1, 70), st.integers(1, 40)),
    row_dtype=st.sampled_from(DTYPES),
    x_dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 2**31),
)
def test_any_step_through_table_and_directory(rows, sizes, row_dtype, x_dtype, seed):
    num_tokens, d_in, d_emb = sizes
    x, table, offsets, ids = reference.make_step(
        rows, num_tokens, d_in, d_emb, torch.float32, seed=seed
    )
    x = x.to(x_dtype)
    if not len(table):
        return
    table = l3ext.quantize_rows(table, d_in, row_dtype)
    plan = l3ext.plan(ids, offsets)
    y = attend(x, table, plan)
    reference.assert_close(y, expected(x, table, ids, offsets).view(num_tokens, d_emb), "y")
    assert torch.equal(y, attend_by_address(x, table, offsets, plan))


def attend_by_address(x, table, offsets, plan, **options):
    stride = table.storage.stride(0)
    addresses = table.storage.data_ptr() + offsets[:-1] * stride
    layout = {
        "d_emb": table.d_emb,
        "row_stride": stride,
        "value_offset": 0 if table.tied else table.d_in,
        "row_dtype": table.dtype,
        "scale_offset": table.scale_offset,
    }
    return directory_attention(x, addresses, plan, **layout | options)


@pytest.mark.parametrize("row_dtype", DTYPES)
@pytest.mark.parametrize("tied", [False, True])
def test_a_directory_of_rows_anywhere(row_dtype, tied):
    x, table, offsets, ids = make_step(60, 30, 30, torch.bfloat16, row_dtype, tied=tied)
    plan = l3ext.plan(ids, offsets)
    want = attend(x, table, plan)
    assert torch.equal(want, attend_by_address(x, table, offsets, plan))
    # One byte further: neither rows nor scales aligned.
    moved = torch.cat([torch.zeros(1, dtype=torch.uint8), table.storage.flatten()])
    addresses = moved.data_ptr() + 1 + offsets[:-1] * table.storage.stride(0)
    layout = {"d_emb": 30, "row_stride": table.storage.stride(0), "row_dtype": row_dtype}
    layout |= {"value_offset": 0 if tied else 30, "scale_offset": table.scale_offset}
    assert torch.equal(want, directory_attention(x, addresses, plan, **layout))


@pytest.mark.parametrize("row_dtype", DTYPES)
def test_rows_and_scales_may_be_strided(row_dtype):
    x, table, offsets, ids = make_step(50, 20, 12, torch.float32, row_dtype)
    plan = l3ext.plan(ids, offsets)
    apart = l3ext.segmented_attention(
        x,
        table.keys.contiguous(),
        table.values.contiguous(),
        plan,
        key_scales=table.key_scales.contiguous(),
        value_scales=table.value_scales.contiguous(),
    )
    assert torch.equal(apart, attend(x, table, plan))
    one = torch.tensor(2.0**-10).expand(len(table.keys))  # a single scale for all rows
    same = l3ext.segmented_attention(
        x, table.keys, table.values, plan, key_scales=one, value_scales=one
    )
    want = reference.segmented_attention(
        x.double(), table.keys.double() / 1024, table.values.double() / 1024, ids, offsets
    )
    reference.assert_close(same, want, "y")


@pytest.mark.parametrize("row_dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [1, 5, 300])
def test_same_bits_for_every_thread_count_and_alone(row_dtype, num_tokens):
    x, table, offsets, ids = make_step(num_tokens, 72, 300, torch.bfloat16, row_dtype)
    before = torch.get_num_threads()
    try:
        outputs = []
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            outputs.append(attend(x, table, l3ext.plan(ids, offsets)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(outputs[0], output) for output in outputs)
    position = num_tokens // 2
    alone = attend(
        x[position : position + 1], table, l3ext.plan(ids[position : position + 1], offsets)
    )
    assert torch.equal(alone[0], outputs[0][position])


@pytest.mark.parametrize("row_dtype", DTYPES)
def test_one_row_tokens_never_read_their_key_or_its_scale(row_dtype):
    x = torch.randn(10, 8)
    table = l3ext.quantize_rows(torch.randn(3, 14), 8, row_dtype)
    table.key_scales.fill_(float("nan"))
    ids = torch.randint(0, 3, (10,))
    y = attend(x, table, l3ext.plan(ids, torch.arange(4)))
    assert torch.equal(y, table.dequantize()[ids, 8:])


@pytest.mark.parametrize("row_dtype", DTYPES)
@pytest.mark.parametrize("half", ["key_scales", "value_scales"])
def test_a_nan_scale_reaches_its_token_and_no_other(row_dtype, half):
    x, table, offsets, ids = make_step(200, 24, 12, torch.float32, row_dtype)
    plan = l3ext.plan(ids, offsets)
    clean = attend(x, table, plan)
    getattr(table, half)[offsets[9] + 3] = float("nan")
    dirty = attend(x, table, plan)
    assert (ids == 9).any()
    assert torch.isnan(dirty[ids == 9]).all()
    assert torch.equal(dirty[ids != 9], clean[ids != 9])


def test_a_nan_code_is_nan_in_its_column_alone():
    x, table, offsets, ids = make_step(200, 24, 12, torch.float32, torch.float8_e4m3fn)
    plan = l3ext.plan(ids, offsets)
    clean = attend(x, table, plan)
    table.storage[offsets[9] + 3, 24 + 7] = 0xFF
    dirty = attend(x, table, plan)
    assert torch.isnan(dirty[ids == 9][:, 7]).all()
    dirty[ids == 9, 7] = clean[ids == 9, 7]
    assert torch.equal(dirty, clean)


@pytest.mark.parametrize("row_dtype", DTYPES)
def test_every_code_is_widened_exactly(row_dtype):
    """One query that picks an element: what comes out is that element, in every kernel."""
    codes = torch.arange(256, dtype=torch.uint8)
    if row_dtype is torch.float8_e4m3fn:
        codes[[0x7F, 0xFF]] = 0
    rows = codes.view(row_dtype)[None].expand(2, 256).contiguous()
    one = torch.ones(2)
    for queries, scale in itertools.product((1, 2, 5, 20), (1.0, 2.0**-20)):
        plan = l3ext.plan(torch.zeros(queries, dtype=torch.int64), torch.tensor([0, 2]))
        y = l3ext.segmented_attention(
            torch.zeros(queries, 256),
            rows,
            rows,
            plan,
            key_scales=one,
            value_scales=scale * one,
        )
        assert torch.equal(y, (codes.view(row_dtype).float() * scale).expand(queries, 256))


# --- torch ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("row_dtype", DTYPES)
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
def test_opcheck(row_dtype, x_dtype):
    x, table, offsets, ids = make_step(9, 5, 3, x_dtype, row_dtype)
    arrays = l3ext.plan(ids, offsets)._arrays()
    parts = (table.keys, table.values, table.key_scales, table.value_scales)
    checks = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if row_dtype is torch.int8:  # torch's check of the schema multiplies what it is given
        checks.append("test_schema")
    torch.library.opcheck(
        torch.ops.l3ext.quantized_attention.default,
        (x, *parts, *arrays, 0.7),
        test_utils=checks,
    )


def test_compiles_without_graph_breaks_and_traces_on_meta():
    x, table, offsets, ids = make_step(40, 16, 8, torch.float32, torch.int8)
    plan = l3ext.plan(ids, offsets)

    def model(x):
        return attend(x * 2, table, plan) ** 2

    torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x))
    storage = table.storage.to("meta")
    parts = l3ext.QuantizedTable(storage, torch.int8, 16, 8)
    arrays = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in plan._arrays()]
    y = torch.ops.l3ext.quantized_attention(
        x.to("meta"), parts.keys, parts.values, parts.key_scales, parts.value_scales, *arrays, 1.0
    )
    assert y.shape == (40, 8)


SCRIPT = """
import torch
from l3ext import _C
from tests.attention import test_quantized as test
for dtype in test.DTYPES:
    test.test_every_code_is_widened_exactly(dtype)
    for sizes in ((1, 64, 32, False), (97, 7, 5, False), (33, 129, 65, False), (150, 80, 80, True)):
        test.test_matches_float64_on_the_dequantised_rows(dtype, torch.bfloat16, *sizes)
        test.test_matches_float64_on_the_dequantised_rows(dtype, torch.float32, *sizes)
    for queries in (1, 2, 6, 7, 49):
        test.test_every_number_of_queries_a_segment(dtype, queries)
test.test_a_nan_code_is_nan_in_its_column_alone()
print(_C.cpu_isa())
"""


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set_that_this_machine_runs(isa):
    if isa not in _C.cpu_isas():
        pytest.skip(f"this processor has no {isa}: avx kernels need one that does")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=os.environ | {"L3EXT_CPU_ISA": isa},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == isa
