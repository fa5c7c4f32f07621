"""The table file is a safetensors file that anybody can read."""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest
import torch
from safetensors import safe_open

from l3ext import _C
from l3ext.tables import check_same_tables, save_tables
from tests.runtime.tables import LookupTable, Owners, make_table


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
def test_safetensors_reads_it(dtype, tmp_path):
    path = tmp_path / "tables.safetensors"
    tables = [
        make_table(50, dtype=dtype),
        make_table(50, d_in=31, tied=True, dtype=dtype, seed=1),
        LookupTable(torch.randn(9, 5).to(dtype), Owners(np.array([4, 5])), 2),
    ]
    save_tables(path, tables)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        assert metadata["format"] == "l3ext.tables"
        for i, table in enumerate(tables):
            assert torch.equal(file.get_tensor(f"layers.{i}.table"), table.data)
            offsets = file.get_tensor(f"layers.{i}.offsets").numpy()
            assert np.array_equal(offsets, table.allocation.offsets)
            assert metadata[f"layers.{i}.d_in"] == str(table.d_in)
            assert metadata[f"layers.{i}.tied"] == str(table.tied).lower()
            assert (f"layers.{i}.frequency" in file.keys()) == (i < 2)  # noqa: SIM118
            token = 1
            block = table.data[offsets[token] : offsets[token + 1]].contiguous()
            checksum = file.get_tensor(f"layers.{i}.crc32c")[token].item()
            assert checksum == _C.crc32c(block)


def test_tables_start_at_pages(tmp_path):
    path = tmp_path / "tables.safetensors"
    save_tables(path, [make_table(50, seed=i) for i in range(3)])
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    assert (8 + length) % 4096 == 0
    for i in range(3):
        assert header[f"layers.{i}.table"]["data_offsets"][0] % 4096 == 0


def test_writing_twice_gives_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        save_tables(tmp_path / name, [make_table(20)])
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_check_same_tables_says_what_differs(tmp_path):
    path = tmp_path / "tables.safetensors"
    tables = [make_table(20), make_table(20, seed=1)]
    save_tables(path, tables)
    check_same_tables(path, tables)
    with pytest.raises(ValueError, match="expected 1 tables, the file has 2"):
        check_same_tables(path, tables[:1])
    with pytest.raises(ValueError, match=r"tables\[0\]: the file has another allocation"):
        check_same_tables(path, tables[::-1])
    changed = LookupTable(tables[1].data.clone(), tables[1].allocation, 24)
    changed.data[-1, 0] += 1
    with pytest.raises(ValueError, match=r"tables\[1\]: .* rows for 1 tokens, the first is 19"):
        check_same_tables(path, [tables[0], changed])
    half = [LookupTable(t.data.half(), t.allocation, 24) for t in tables]
    with pytest.raises(ValueError, match=r"dtype: expected float16, the file has float32"):
        check_same_tables(path, half)
    with pytest.raises(ValueError, match=r"d_in: expected 20, the file has 24"):
        check_same_tables(path, [LookupTable(t.data, t.allocation, 20) for t in tables])


def test_saving_nothing_or_elsewhere(tmp_path):
    with pytest.raises(ValueError, match="expected 1 to 4096 tables, got 0"):
        save_tables(tmp_path / "none", [])
    with pytest.raises(FileNotFoundError) as caught:
        save_tables(tmp_path / "no" / "such" / "folder", [make_table(3)])
    assert caught.value.filename == str(tmp_path / "no" / "such" / "folder")
