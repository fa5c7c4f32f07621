"""L3Layer with its table in 8 bits: outputs, state, and what it refuses."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref

import numpy as np
import pytest
import torch

import l3ext
from l3ext import Allocation
from l3ext.nn import L3Layer
from tests import reference

ROWS = np.array([1, 4, 2, 7, 1, 3])
DTYPES = [torch.int8, torch.float8_e4m3fn]


def make_layer(*, tied=False, dtype=torch.float32, **options):
    torch.manual_seed(0)
    d_emb = 16 if tied else 12
    layer = L3Layer(16, d_emb, 20, Allocation.from_rows(ROWS), tied=tied, dtype=dtype, **options)
    with torch.no_grad():  # logits that differ
        layer.table.mul_(30)
    return layer


def make_step(dtype=torch.float32):
    ids = torch.randint(0, len(ROWS), (2, 9), generator=torch.Generator().manual_seed(1))
    return torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(2)).to(dtype), ids


@pytest.mark.parametrize("row_dtype", DTYPES)
@pytest.mark.parametrize("tied", [False, True])
def test_is_the_layer_with_the_dequantised_table(row_dtype, tied):
    layer, (x, ids) = make_layer(tied=tied), make_step()
    before = layer(x, ids).detach()
    exact = make_layer(tied=tied)
    exact.table.data = l3ext.quantize_rows(layer.table, 16, row_dtype, tied=tied).dequantize()
    assert layer.quantize_(row_dtype) is layer
    assert layer.table is None
    out = layer(x, ids).detach()
    # RMSNorm_out divides by what small sums leave: a wider budget than the operator's.
    reference.assert_close(out, exact(x, ids).detach(), "out", factor=20)
    assert 0 < (out - before).norm() < 0.1 * before.norm()
    assert f"quantized={row_dtype}" in repr(layer)


@pytest.mark.parametrize("row_dtype", DTYPES)
def test_state_dict_round_trip(row_dtype):
    layer, (x, ids) = make_layer().quantize_(row_dtype), make_step()
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    name = f"table_{str(row_dtype).removeprefix('torch.')}"
    assert state[name].dtype == torch.uint8
    assert "table" not in state
    other = make_layer()
    other.reset_parameters()
    other.quantize_(row_dtype).load_state_dict(state)
    assert torch.equal(other(x, ids), layer(x, ids))
    with pytest.raises(RuntimeError, match=f"Unexpected key.*{name}"):
        make_layer().load_state_dict(state)
    wrong = DTYPES[1 - DTYPES.index(row_dtype)]
    with pytest.raises(RuntimeError, match=f"Unexpected key.*{name}"):
        make_layer().quantize_(wrong).load_state_dict(state)


def test_casts_and_moves_leave_the_rows_as_they_are():
    layer, (x, ids) = make_layer().quantize_(), make_step(torch.bfloat16)
    rows = layer.quantized.storage.clone()
    layer = layer.to(torch.bfloat16)
    assert torch.equal(layer.quantized.storage, rows)
    assert layer(x, ids).dtype == torch.bfloat16
    meta = make_layer(device="meta").quantize_()
    assert meta.quantized.storage.is_meta
    meta.to_empty(device="cpu").load_state_dict(layer.state_dict())
    meta.reset_parameters()  # draws the projections, and leaves what was loaded of the table
    assert torch.equal(meta.quantized.storage, rows)


def test_autocast_and_compile():
    layer, (x, ids) = make_layer().quantize_(), make_step()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x, ids)
    reference.assert_close(out.float(), layer(x, ids).detach(), "out", factor=2e4)
    compiled = torch.compile(layer, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, ids), layer(x, ids))


def test_compiled_code_is_not_made_again_when_a_table_is_kept():
    layer, (x, ids) = make_layer().quantize_(), make_step()
    compiled = torch.compile(layer, fullgraph=True)
    with torch.no_grad():
        out = compiled(x, ids)
        assert layer.quantized is layer.quantized
        with torch.compiler.set_stance("fail_on_recompile"):
            assert torch.equal(compiled(x, ids), out)


@pytest.mark.parametrize("row_dtype", DTYPES)
def test_release_and_restore(row_dtype):
    layer, (x, ids) = make_layer().quantize_(row_dtype), make_step()
    out = layer(x, ids)
    table = layer.release_table()
    assert isinstance(table, l3ext.QuantizedTable)
    assert layer.quantized is None
    with pytest.raises(RuntimeError, match="moved out of the model"):
        layer(x, ids)
    with pytest.raises(RuntimeError, match="moved out of the model"):
        layer.quantize_()
    layer.restore_table(table)
    assert torch.equal(layer(x, ids), out)


@pytest.mark.parametrize("tied", [False, True])
def test_a_table_is_kept_and_its_copies_read_their_own_storage(tied):
    layer = make_layer(tied=tied).quantize_()
    assert layer.quantized is layer.quantized
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        table = other.quantized
        assert table.storage is other.table_int8
        for view in (table.keys, table.values, table.key_scales, table.value_scales):
            assert view.untyped_storage().data_ptr() == table.storage.data_ptr()
            assert view.untyped_storage().data_ptr() != layer.table_int8.data_ptr()
        assert torch.equal(table.dequantize(), layer.quantized.dequantize())


def test_a_kept_table_follows_its_buffer_and_goes_with_it():
    layer, (x, ids) = make_layer().quantize_(), make_step()
    before = layer(x, ids)
    storage = weakref.ref(layer.quantized.storage)
    layer.table_int8 = torch.zeros_like(layer.table_int8)
    assert layer.quantized.storage is layer.table_int8
    assert not torch.equal(layer(x, ids), before)
    gc.collect()
    assert storage() is None
    storage = weakref.ref(layer.quantized.storage)
    taken = layer.release_table()
    assert taken.storage is storage()
    assert layer.quantized is None
    del taken
    gc.collect()
    assert storage() is None


def test_what_it_refuses():
    layer, (x, ids) = make_layer(), make_step()
    with pytest.raises(TypeError, match=r"dtype: expected torch.float8_e4m3fn or torch.int8"):
        layer.quantize_(torch.float16)
    with torch.no_grad():
        layer.table[3, 5] = float("nan")
    with pytest.raises(ValueError, match="in row 3"):
        layer.quantize_()
    assert layer.table is not None  # left as it was
    with torch.no_grad():
        layer.table[3, 5] = 0
    layer.quantize_()
    with pytest.raises(RuntimeError, match=r"quantised already: torch\.int8"):
        layer.quantize_(torch.float8_e4m3fn)
    with pytest.raises(RuntimeError, match="for inference"):
        layer(x.requires_grad_(), ids).sum().backward()
    with pytest.raises(TypeError, match="x: expected float32, bfloat16 or float16"):
        make_layer(dtype=torch.float64).quantize_()(x.detach().double(), ids)
