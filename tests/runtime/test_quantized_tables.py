"""Tables in 8 bits outside the model: the file, the runtime, offloading; the same bits."""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest
import torch
from safetensors import safe_open

import l3ext
from l3ext import _C
from l3ext.tables import check_same_tables, save_tables
from tests.runtime.tables import LookupTable, make_table
from tests.runtime.test_offload import generate, make_model

DTYPES = [torch.int8, torch.float8_e4m3fn]


def quantized_table(vocab, dtype, **options):
    table = make_table(vocab, **options)
    rows = l3ext.quantize_rows(table.data, table.d_in, dtype, tied=table.tied)
    return LookupTable(rows, table.allocation, table.d_in, table.tied)


def attend(x, rows, plan):
    scales = {"key_scales": rows.key_scales, "value_scales": rows.value_scales}
    return l3ext.segmented_attention(x, rows.keys, rows.values, plan, **scales)


@pytest.mark.parametrize("dtype", DTYPES)
def test_safetensors_reads_the_file(dtype, tmp_path):
    path = tmp_path / "tables.safetensors"
    tables = [quantized_table(50, dtype), make_table(50, dtype=torch.bfloat16, seed=1)]
    save_tables(path, tables)
    data = tables[0].data
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        stored = file.get_tensor("layers.0.table")
        assert torch.equal(stored, data.storage)
        again = l3ext.QuantizedTable(stored, dtype, int(metadata["layers.0.d_in"]), data.d_emb)
        assert torch.equal(again.dequantize(), data.dequantize())
        assert metadata["layers.0.dtype"] == str(dtype).removeprefix("torch.")
        assert metadata["layers.0.d_emb"] == str(data.d_emb)
        assert "layers.1.dtype" not in metadata
        offsets = tables[0].allocation.offsets
        block = data.storage[offsets[3] : offsets[4]].contiguous()
        assert file.get_tensor("layers.0.crc32c")[3].item() == _C.crc32c(block)
    check_same_tables(path, tables)
    other = DTYPES[1 - DTYPES.index(dtype)]
    with pytest.raises(ValueError, match=r"tables\[0\].dtype: expected .*, the file has"):
        check_same_tables(path, [quantized_table(50, other), tables[1]])
    data.value_scales[offsets[7]] *= 2  # a scale is part of its token's block
    with pytest.raises(ValueError, match="other rows for 1 tokens, the first is 7"):
        check_same_tables(path, tables)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("tier", ["ram", "disk"])
@pytest.mark.parametrize(
    "options",
    [{}, {"in_place": False}, {"in_place": False, "cache_bytes": 3000}, {"ring_bytes": 2000}],
    ids=str,
)
def test_the_runtime_gives_the_bits_of_the_resident_table(dtype, tied, tier, options, tmp_path):
    widths = [{"d_in": 24, "d_emb": 24}, {"d_in": 31, "d_emb": 31}]
    tables = [quantized_table(40, dtype, tied=tied, seed=i, **w) for i, w in enumerate(widths)]
    if not tied:
        tables[1] = quantized_table(40, dtype, d_in=7, d_emb=13, seed=5)
    source = tables
    if tier == "disk":
        source = tmp_path / "tables"
        save_tables(source, tables)
    random = np.random.default_rng(0)
    with l3ext.PrefetchRuntime(source, **options, poison=True) as runtime:
        assert runtime.placement.table_bytes == sum(table.data.nbytes for table in tables)
        for _ in range(4):
            ids = torch.from_numpy(random.integers(0, 40, 25))
            with runtime.begin(ids) as step:
                for i, table in enumerate(tables):
                    x = torch.randn(25, table.d_in, dtype=torch.bfloat16)
                    rows = step.wait(i)
                    want = attend(x, table.data, l3ext.plan(ids, table.allocation.offsets))
                    assert torch.equal(attend(x, rows, rows.plan), want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_used_after_the_end_are_nan(dtype):
    table = quantized_table(20, dtype)
    with l3ext.PrefetchRuntime([table], in_place=False, poison=True) as runtime:
        with runtime.begin(torch.arange(20)) as step:
            rows = step.wait(0)
        assert torch.isnan(attend(torch.randn(20, table.d_in), rows, rows.plan)).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tier", ["ram", "disk"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_quantised_model_offloads_to_the_same_text(dtype, tier, tied, tmp_path):
    model = make_model(tied=tied, dtype=torch.bfloat16)
    for layer in model.model.l3_layers:
        layer.quantize_(dtype)
    ids = torch.arange(40).reshape(2, 20)
    with pytest.raises(RuntimeError, match="has been quantised, which a checkpoint does not hold"):
        model.save_pretrained(tmp_path / "model")
    with torch.no_grad():
        text, logits = generate(model), model(ids).logits
        path = tmp_path / "tables" if tier == "disk" else None
        runtime = l3ext.offload(model, tier, path, cache_bytes=2000, poison=True)
        assert all(layer.quantized is None for layer in model.model.l3_layers)
        assert torch.equal(generate(model), text)
        assert torch.equal(model(ids).logits, logits)
    runtime.close()
    with pytest.raises(RuntimeError, match="offloaded already"):
        l3ext.offload(model, "ram")


def test_tables_that_do_not_fit():
    table = quantized_table(20, torch.int8)
    for change, error, message in (
        ({"d_in": 20}, ValueError, r"data: expected \(d_in, tied\) \(20, False\), got \(24, Fal"),
        ({"tied": True}, ValueError, r"expected \(d_in, tied\) \(24, True\)"),
        ({"data": table.data.keys}, TypeError, "data"),
        ({"data": table.data.keys.contiguous()}, ValueError, "data: expected"),
    ):
        arguments = {"data": table.data, "d_in": 24, "tied": False} | change
        with pytest.raises((error, ValueError), match=message):
            l3ext.PrefetchRuntime([LookupTable(allocation=table.allocation, **arguments)])


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"layers.0.dtype":"int8"', '"layers.0.dtype":"int9"', "expected float8_e4m3fn or int8"),
        ('"layers.0.dtype":"int8"', '"layers.0.dtipe":"int8"', "layers.0.dtype"),
        ('"layers.0.d_in":"24"', '"layers.0.d_in":"60"', r"expected shape \[v, 96\]"),
    ],
)
def test_a_changed_header_is_an_error_with_the_path(old, new, message, tmp_path):
    path = tmp_path / "tables"
    save_tables(path, [quantized_table(20, torch.int8)])
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = content[8 : 8 + length]
    json.loads(header)
    assert header.count(old.encode()) == 1
    path.write_bytes(
        content[:8] + header.replace(old.encode(), new.encode()) + content[8 + length :]
    )
    with pytest.raises(OSError, match=message) as caught:
        l3ext.PrefetchRuntime(path)
    assert caught.value.filename == str(path)


def test_a_damaged_scale_is_found(tmp_path):
    path = tmp_path / "tables"
    table = quantized_table(20, torch.int8)
    save_tables(path, [table])
    content = bytearray(path.read_bytes())
    row = int(table.allocation.offsets[4])
    begin = content.index(bytes(table.data.storage[row].numpy()))
    content[begin + table.data.scale_offset] ^= 1
    path.write_bytes(content)
    with (
        l3ext.PrefetchRuntime(path) as runtime,
        runtime.begin(torch.tensor([4])) as step,
        pytest.raises(OSError, match="the rows of token 4 "),
    ):
        step.wait(0)
