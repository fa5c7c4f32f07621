"""Near data: positions that attend beside the table get the bits that fetched rows give them.

Here a table that is not read in place stands for one that the device cannot read.
"""

from __future__ import annotations

import dataclasses
import math
import os
import threading

import numpy as np
import pytest
import torch

import l3ext
from l3ext import near_data
from l3ext.runtime import PrefetchRuntime
from l3ext.tables import LookupTable, save_tables
from tests import reference
from tests.runtime.tables import Owners, make_table
from tests.runtime.test_offload import generate, make_model

VOCAB = 60
FAR = {"in_place": False, "near_data": True, "poison": True}


def attend(x, table, ids):
    plan = l3ext.plan(ids, table.allocation.offsets)
    if isinstance(table.data, l3ext.QuantizedTable):
        data = table.data
        scales = {"key_scales": data.key_scales, "value_scales": data.value_scales}
        return l3ext.segmented_attention(x, data.keys, data.values, plan, **scales)
    if table.tied:
        return l3ext.segmented_attention(x, table.data, table.data, plan)
    keys, values = table.data[:, : table.d_in], table.data[:, table.d_in :]
    return l3ext.segmented_attention(x, keys, values, plan)


def check_step(runtime, tables, ids):
    """Every layer of one step gives the bits of its resident table."""
    with runtime.begin(ids) as step:
        for layer, table in enumerate(tables):
            x = torch.randn(ids.numel(), table.d_in).to(query_dtype(table))
            assert torch.equal(step.wait(layer).attend(x), attend(x, table, ids))


def query_dtype(table):
    quantized = isinstance(table.data, l3ext.QuantizedTable)
    return torch.float32 if quantized else table.data.dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("cache", ["none", "some", "all"])
def test_the_bits_of_the_resident_table(dtype, cache):
    tables = [
        make_table(VOCAB, dtype=dtype),
        make_table(VOCAB, d_in=17, tied=True, dtype=dtype, max_rows=30, seed=1),
        make_table(VOCAB, d_in=5, dtype=dtype, max_rows=1, seed=2),
    ]
    total = sum(table.data.nbytes for table in tables)
    cache_bytes = {"none": 0, "some": total // 3, "all": 9 * total}[cache]
    random = np.random.default_rng(0)
    with PrefetchRuntime(tables, cache_bytes=cache_bytes, **FAR) as runtime:
        assert runtime.placement.near_data
        assert "near" in repr(runtime)
        for count in (0, 1, 2, 8, 30, 200):
            check_step(runtime, tables, torch.from_numpy(random.integers(0, VOCAB, count)))
        totals = runtime.ledger.totals
        assert totals.bytes == totals.spilled == totals.reused == 0
        assert totals.near + totals.hits == totals.tokens
        assert (totals.near == 0) == (cache == "all")
        assert (totals.hits == 0) == (cache == "none")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("tied", [False, True])
def test_quantised_tables(dtype, tied):
    plain = make_table(VOCAB, d_in=24, d_emb=24, tied=tied)
    rows = l3ext.quantize_rows(plain.data, 24, dtype, tied=tied)
    table = LookupTable(rows, plain.allocation, 24, tied)
    random = np.random.default_rng(0)
    with PrefetchRuntime([table], cache_bytes=rows.nbytes // 3, **FAR) as runtime:
        for _ in range(5):
            check_step(runtime, [table], torch.from_numpy(random.integers(0, VOCAB, 20)))
        assert runtime.ledger.totals.near > 0
        assert runtime.ledger.totals.hits > 0


def test_the_ledger_says_what_stayed():
    rows = np.array([3, 5, 2, 7])
    owners = Owners(rows, np.array([9, 0, 0, 0], dtype=np.int64))
    table = LookupTable(torch.randn(int(rows.sum()), 12), owners, 8)
    row_bytes = 12 * 4
    with PrefetchRuntime([table], cache_bytes=3 * row_bytes, **FAR) as runtime:
        check_step(runtime, [table], torch.tensor([[0, 3], [3, 2]]))
        (layer,) = runtime.ledger.steps[0].layers
        assert (layer.tokens, layer.rows, layer.bytes) == (3, 12, 0)
        assert (layer.hits, layer.hit_bytes) == (1, 3 * row_bytes)
        assert (layer.near, layer.near_bytes) == (2, 9 * row_bytes)
        assert layer.fetch_us == layer.exposed_us == 0
        assert runtime.ledger.totals.near_bytes == 9 * row_bytes


def test_tokens_without_rows_give_zeros():
    owners = Owners(np.array([0, 4, 0]))
    table = LookupTable(torch.randn(4, 12), owners, 8)
    with PrefetchRuntime([table], **FAR) as runtime, runtime.begin([0, 1, 2]) as step:
        y = step.wait(0).attend(torch.randn(3, 8))
        assert y[1].any()
        assert not y[0].any()
        assert not y[2].any()


def test_a_segment_that_is_near_has_no_rows_here():
    table = make_table(VOCAB)
    with PrefetchRuntime([table], **FAR) as runtime, runtime.begin([4, 9]) as step:
        rows = step.wait(0)
        assert rows.near.indices.tolist() == [0, 1]
        assert torch.diff(rows.plan.segment_rows, dim=1).tolist() == [[0], [0]]


def test_queries_take_the_dtype_of_the_rows_and_the_scale_is_passed_on():
    table = make_table(VOCAB, dtype=torch.bfloat16)
    ids = torch.tensor([4, 9, 4])
    x = torch.randn(3, 24)
    with PrefetchRuntime([table], **FAR) as runtime, runtime.begin(ids) as step:
        y = step.wait(0).attend(x, scale=0.5)
    assert torch.equal(y, attend(0.5 * x.to(torch.bfloat16), table, ids))


@pytest.mark.parametrize("cache_bytes", [0, 2000])
def test_the_gradient_of_the_queries(cache_bytes):
    table = make_table(VOCAB)
    ids = torch.arange(VOCAB)
    x = torch.randn(VOCAB, 24, requires_grad=True)
    upstream = torch.randn(VOCAB, 13)
    (want,) = torch.autograd.grad(attend(x, table, ids), x, upstream)
    runtime = PrefetchRuntime([table], cache_bytes=cache_bytes, **FAR)
    with runtime, runtime.begin(ids) as step:
        y = step.wait(0).attend(x)
        (got,) = torch.autograd.grad(y, x, upstream)
    assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("tied", "dtype", "cache_bytes"),
    [(False, torch.float32, 0), (True, torch.bfloat16, 4000), (False, torch.float32, 1 << 20)],
)
def test_a_model_generates_the_same_text(tied, dtype, cache_bytes):
    model = make_model(tied=tied, dtype=dtype)
    ids = torch.arange(40).reshape(2, 20)
    with torch.no_grad():
        text, logits = generate(model), model(ids).logits
        runtime = l3ext.offload(model, "ram", cache_bytes=cache_bytes, **FAR)
        assert torch.equal(generate(model), text)
        assert torch.equal(model(ids).logits, logits)
    totals = runtime.ledger.totals
    assert totals.bytes == 0
    assert (totals.near > 0) == (cache_bytes < 1 << 20)
    runtime.close()


def test_a_quantised_model_generates_the_same_text():
    model = make_model(dtype=torch.bfloat16)
    for layer in model.model.l3_layers:
        layer.quantize_(torch.int8)
    with torch.no_grad():
        text = generate(model)
        with l3ext.offload(model, "ram", **FAR) as runtime:
            assert torch.equal(generate(model), text)
            assert runtime.ledger.totals.near > 0


@pytest.mark.parametrize("cache_bytes", [0, 9000, 1 << 20])
def test_auto_measures_and_gives_the_same_bits(cache_bytes):
    tables = [make_table(VOCAB), make_table(VOCAB, d_in=8, seed=1)]
    options = FAR | {"near_data": "auto", "cache_bytes": cache_bytes}
    with PrefetchRuntime(tables, **options) as runtime:
        costs = runtime.placement.near_costs
        assert runtime.placement.near_data
        assert costs.attend_us >= 0
        assert costs.attend_us_per_byte >= 0
        if cache_bytes == 1 << 20:  # nothing is ever fetched
            assert costs.fetch_us_per_byte == 0
        assert runtime.ledger.totals.steps == 0  # what was measured is no step of the caller's
        for _ in range(5):
            check_step(runtime, tables, torch.randint(0, VOCAB, (9,)))


def test_auto_weighs_how_many_queries_share_a_token(monkeypatch):
    table = make_table(VOCAB)
    costs = near_data.NearDataCosts(1.0, 0.0, 0.4)  # two queries still pay, three do not
    monkeypatch.setattr(PrefetchRuntime, "_measure_near_data", lambda *_: costs)
    with PrefetchRuntime([table], **FAR | {"near_data": "auto"}) as runtime:
        assert runtime.placement.near_costs == costs
        ids = torch.tensor([7, 3, 5, 3, 7, 7])
        with runtime.begin(ids) as step:
            assert sorted(step.wait(0).near.indices.tolist()) == [1, 2, 3]
        check_step(runtime, [table], ids)
        assert runtime.ledger.totals.near == 4


def test_auto_measures_a_table_without_rows():
    owners = Owners(np.zeros(3, dtype=np.int64))
    table = LookupTable(torch.zeros(0, 12), owners, 8)
    with PrefetchRuntime([table], **FAR | {"near_data": "auto"}) as runtime:
        assert runtime.placement.near_costs == near_data.NearDataCosts(0.0, 0.0, 0.0)
        check_step(runtime, [table], torch.arange(3))


def test_auto_is_off_where_it_cannot_be(tmp_path):
    path = tmp_path / "tables"
    table = make_table(VOCAB)
    save_tables(path, [table])
    for source in (path, [table]):
        with PrefetchRuntime(source, near_data="auto") as runtime:
            assert not runtime.placement.near_data
            assert runtime.placement.near_costs is None
            check_step(runtime, [table], torch.arange(9))
            assert runtime.ledger.totals.near == 0


@pytest.mark.parametrize("value", ["yes", None, 2])
def test_a_wrong_option(value):
    with pytest.raises(
        ValueError, match=f'near_data: expected True, False or "auto", got {value!r}'
    ):
        PrefetchRuntime([make_table(VOCAB)], near_data=value)


def test_tables_that_are_read_in_place_are_near_anyway():
    table = make_table(VOCAB)
    with PrefetchRuntime([table], near_data=True) as runtime:
        assert not runtime.placement.near_data
        check_step(runtime, [table], torch.arange(9))
        assert runtime.ledger.totals.near == 0
        assert runtime.ledger.totals.in_place_bytes > 0


def test_it_is_off_unless_asked_for():
    with PrefetchRuntime([make_table(VOCAB)], in_place=False) as runtime:
        assert not runtime.placement.near_data
        check_step(runtime, [make_table(VOCAB)], torch.arange(9))
        assert runtime.ledger.totals.near == 0
        assert runtime.ledger.totals.bytes > 0


@pytest.mark.parametrize("mode", [True, "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_a_mapped_file_is_host_memory(mode, dtype, tmp_path):
    path, table = tmp_path / "tables", make_table(VOCAB)
    if dtype == torch.int8:
        rows = l3ext.quantize_rows(table.data, table.d_in, dtype)
        table = dataclasses.replace(table, data=rows)
    save_tables(path, [table])
    with PrefetchRuntime(path, mapped=True, **FAR | {"near_data": mode}) as runtime:
        assert runtime.placement.near_data
        assert (runtime.placement.near_costs is not None) == (mode == "auto")
        os.remove(path)  # the mapping stays
        check_step(runtime, [table], torch.arange(9))
        assert (runtime.ledger.totals.near > 0) or mode == "auto"


def test_a_model_attends_in_a_mapped_file(tmp_path):
    model = make_model()
    text = generate(model)
    with l3ext.offload(model, "ram", tmp_path / "tables", **FAR) as runtime:
        assert torch.equal(generate(model), text)
        assert runtime.placement.mapped
        assert runtime.ledger.totals.near > 0


def test_a_table_in_a_file_is_an_error(tmp_path):
    path = tmp_path / "tables"
    save_tables(path, [make_table(VOCAB)])
    with pytest.raises(ValueError, match=r"near_data: expected tables.*the file.*not mapped"):
        PrefetchRuntime(path, near_data=True, in_place=False)
    model = make_model()
    with pytest.raises(ValueError, match="near_data: expected tables in host memory"):
        l3ext.offload(model, "disk", tmp_path / "other", near_data=True)
    assert all(layer.table is not None for layer in model.model.l3_layers)


def test_what_comes_after_the_end_or_the_wrong_id_is_an_error():
    table = make_table(VOCAB)
    runtime = PrefetchRuntime([table], **FAR)
    with pytest.raises(ValueError, match=f"got {VOCAB} at position 1"):
        runtime.begin([0, VOCAB])
    check_step(runtime, [table], torch.arange(9))
    with runtime.begin([3]) as step, pytest.raises(ValueError, match="x: expected 1 rows"):
        step.wait(0).attend(torch.randn(2, 24))
    with pytest.raises(RuntimeError, match="the step has ended"):
        step.wait(0)
    runtime.close()
    with pytest.raises(RuntimeError, match="the runtime is closed"):
        runtime.begin([3])


def test_a_neighbours_nan_stays_with_the_neighbour():
    table = make_table(VOCAB)
    offsets = table.allocation.offsets
    clean = table.data.clone()
    table.data[offsets[7] : offsets[8]] = math.nan
    x = torch.randn(3, 24)
    ids = torch.tensor([6, 7, 8])
    with PrefetchRuntime([table], **FAR) as runtime, runtime.begin(ids) as step:
        y = step.wait(0).attend(x)
    want = attend(x, LookupTable(clean, table.allocation, 24), ids)
    assert torch.equal(y[[0, 2]], want[[0, 2]])
    assert y[1].isnan().all()


def test_against_the_definition():
    table = make_table(VOCAB, dtype=torch.float64)
    ids = torch.randint(0, VOCAB, (50,))
    x = torch.randn(50, 24, dtype=torch.float64)
    with PrefetchRuntime([table], cache_bytes=6000, **FAR) as runtime:
        with runtime.begin(ids) as step:
            y = step.wait(0).attend(x)
        assert 0 < runtime.ledger.totals.near < runtime.ledger.totals.tokens
    keys, values = table.data[:, :24], table.data[:, 24:]
    want = reference.segmented_attention(x, keys, values, ids, table.allocation.offsets)
    reference.assert_close(y, want, "near data")


def test_several_threads():
    tables = [make_table(VOCAB, seed=1), make_table(VOCAB, seed=2)]
    failures = []
    with PrefetchRuntime(tables, cache_bytes=4000, **FAR) as runtime:

        def run(seed):
            random = np.random.default_rng(seed)
            try:
                for _ in range(50):
                    check_step(runtime, tables, torch.from_numpy(random.integers(0, VOCAB, 6)))
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures


def test_costs_are_lines_through_whole_steps():
    """An outlier changes nothing; what both ways take without any bytes is nobody's price."""
    fetched = [(n, 100 + 0.5 * n) for n in (100, 200, 400, 800, 1000)] + [(300, 1e6)]
    near = [(n, 170 + 0.1 * n) for n in (100, 250, 500, 900, 1000)]
    costs = near_data.costs_of(fetched, near, 2)
    assert costs.fetch_us_per_byte == pytest.approx(0.5)
    assert costs.attend_us == pytest.approx(35)
    assert costs.attend_us_per_byte == pytest.approx(0.1)
    assert near_data.costs_of(near, fetched, 1).attend_us == 0
    same = near_data.costs_of([(10, 5.0), (10, 7.0)], [], 1)
    assert same == near_data.NearDataCosts(0.6, 0.0, 0.0)
    falling = near_data.costs_of([(10, 5.0), (20, 3.0)], [], 1)
    assert falling.fetch_us_per_byte == 0
