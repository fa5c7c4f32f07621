"""The prefetch runtime serves exactly the table's rows, from anywhere, in any order."""

from __future__ import annotations

import gc
import itertools
import json
import os
import threading
import warnings

import numpy as np
import pytest
import torch

import l3ext
from l3ext import _C
from l3ext.runtime import PrefetchRuntime
from l3ext.tables import LookupTable, save_tables
from tests import reference
from tests.runtime.tables import Owners, make_table, rows_match

VOCAB = 70


def source(tables, tier, tmp_path):
    if tier == "ram":
        return tables
    path = tmp_path / "tables.safetensors"
    save_tables(path, tables)
    return path


@pytest.mark.parametrize("tier", ["ram", "disk"])
@pytest.mark.parametrize("cache", ["none", "some", "all"])
@pytest.mark.parametrize("ring_bytes", [0, 4000, 1 << 20])
def test_rows_are_bit_equal(tier, cache, ring_bytes, tmp_path):
    combinations = itertools.product(
        [1, 2, 4], [torch.float32, torch.bfloat16, torch.float16, torch.float64]
    )
    for seed, (workers, dtype) in enumerate(combinations):
        tables = [
            make_table(VOCAB, dtype=dtype, seed=seed),
            make_table(VOCAB, d_in=17, tied=True, dtype=dtype, max_rows=30, seed=seed + 100),
        ]
        total = sum(table.data.nbytes for table in tables)
        random = np.random.default_rng(seed)
        with PrefetchRuntime(
            source(tables, tier, tmp_path),
            cache_bytes={"none": 0, "some": total // 4, "all": 4 * total}[cache],
            ring_bytes=ring_bytes,
            num_workers=workers,
            piece_bytes=4096,
            in_place=False,
            poison=True,
        ) as runtime:
            if cache == "all":
                assert runtime.placement.hot_bytes == total
            open_steps = []
            for _ in range(25):
                ids = random.integers(0, VOCAB, random.integers(0, 12))
                open_steps.append((ids, runtime.begin(ids)))
                if len(open_steps) < 3:
                    continue
                ids, step = open_steps.pop(random.integers(0, 3))  # ends in any order
                for layer, table in enumerate(tables):
                    assert rows_match(step.wait(layer), table, ids)
                step.end()
            assert runtime.ledger.totals.steps == 23
            if cache == "all":
                assert runtime.ledger.totals.bytes == 0
                assert runtime.ledger.totals.spilled == 0


@pytest.mark.parametrize("tier", ["ram", "disk"])
def test_thousands_of_steps(tier, tmp_path):
    table = make_table(VOCAB)
    random = np.random.default_rng(0)
    with PrefetchRuntime(
        source([table], tier, tmp_path), cache_bytes=9000, ring_bytes=12000, in_place=False
    ) as runtime:
        previous = None
        for _ in range(2000):
            ids = random.integers(0, VOCAB, 5)
            step = runtime.begin(ids)
            if previous is not None:
                assert rows_match(previous[1].wait(0), table, previous[0])
                previous[1].end()
            previous = (ids, step)
        steps = runtime.ledger.steps
        assert len(steps) == 1024
        assert [record.step for record in steps] == list(range(1999 - 1024, 1999))


@pytest.mark.parametrize(
    "ids",
    [[], [0], [VOCAB - 1], [3] * 50, [5, 4, 5, 4], [[1, 2], [2, 1]], list(range(VOCAB)) * 2],
    ids=["empty", "first", "last", "equal", "repeats", "matrix", "all"],
)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.int16])
def test_any_ids(ids, dtype):
    table = make_table(VOCAB)
    ids = torch.tensor(ids, dtype=dtype)
    with PrefetchRuntime([table]) as runtime, runtime.begin(ids) as step:
        rows = step.wait(0)
        assert rows_match(rows, table, ids)
        x = torch.randn(ids.numel(), 24)
        keys, values = table.data[:, :24], table.data[:, 24:]
        plan = l3ext.plan(ids, table.allocation.offsets)
        expected = l3ext.segmented_attention(x, keys, values, plan)
        fetched = l3ext.segmented_attention(x, rows.keys, rows.values, rows.plan)
        assert torch.equal(expected, fetched)


def test_tied_rows_are_one_tensor():
    table = make_table(VOCAB, tied=True)
    with (
        PrefetchRuntime([table], ring_bytes=0, in_place=False) as runtime,
        runtime.begin([1, 2]) as step,
    ):
        rows = step.wait(0)
        assert rows.values is rows.keys
        assert rows_match(rows, table, [1, 2])


def test_rows_past_two_to_the_31st_element():
    data = reference.untouched_zeros(800_000, 3072, torch.float16)  # 4.9 GB, 24 MB of them touched
    data[-1000:] = torch.arange(1000)[:, None]
    table = LookupTable(data, Owners(np.full(800, 1000)), 2048)
    with PrefetchRuntime([table]) as runtime, runtime.begin([799, 0]) as step:
        rows = step.wait(0)
        begin, end = rows.plan.segment_rows[1].tolist()
        assert torch.equal(rows.keys[begin:end], data[-1000:, :2048])
        begin, end = rows.plan.segment_rows[0].tolist()
        assert end - begin == 1000
        assert not rows.keys[begin:end].any()


def test_the_ram_table_is_used_in_place():
    table = make_table(VOCAB)
    with PrefetchRuntime([table]) as runtime:
        table.data[0] = 7.0  # no copy was made: the change is seen
        with runtime.begin([0]) as step:
            rows = step.wait(0)
            assert (rows.keys[rows.plan.segment_rows[0, 0]] == 7.0).all()


def test_the_runtime_keeps_a_ram_table_alive():
    table = make_table(VOCAB)
    runtime = PrefetchRuntime([make_table(VOCAB)])
    gc.collect()
    with runtime.begin([3, 9]) as step:
        assert rows_match(step.wait(0), table, [3, 9])
    runtime.close()


def test_rows_outlive_the_runtime():
    table = make_table(VOCAB)
    runtime = PrefetchRuntime([table])
    step = runtime.begin([4])
    rows = step.wait(0)
    del runtime, step
    gc.collect()
    assert rows_match(rows, table, [4])  # ended, not poisoned: the memory is still there


def test_a_dropped_step_gives_its_rows_back():
    table = make_table(4, max_rows=1)
    with PrefetchRuntime([table], ring_bytes=table.data[0].nbytes, in_place=False) as runtime:
        for _ in range(50):
            runtime.begin([1]).wait(0)
        assert runtime.ledger.totals.steps == 50
        assert runtime.ledger.totals.spilled == 0


def test_an_exception_in_the_block_ends_the_step():
    with PrefetchRuntime([make_table(4)]) as runtime:
        with pytest.raises(ZeroDivisionError), runtime.begin([1]) as step:
            raise ZeroDivisionError
        with pytest.raises(RuntimeError, match="the step has ended"):
            step.wait(0)


@pytest.mark.parametrize(
    ("tied", "options"),
    [
        (False, {}),
        (True, {"cache_bytes": 4000}),
        (False, {"ring_bytes": 0}),
        (False, {"near": True}),
    ],
    ids=str,
)
def test_gradients_after_the_end(tied, options):
    """As of a model, whose steps end with its forward pass: rows may be others' by then."""
    table = make_table(30, d_in=13 if tied else 24, tied=tied)
    ids = torch.tensor([3, 7, 3, 29, 0])
    x = torch.randn(5, table.d_in, requires_grad=True)
    upstream = torch.randn(5, 13)
    keys, values = table.data[:, : table.d_in], table.data[:, 0 if tied else table.d_in :]
    plan = l3ext.plan(ids, torch.from_numpy(table.allocation.offsets))
    y = l3ext.segmented_attention(x, keys, values, plan)
    (want,) = torch.autograd.grad(y, x, upstream)
    options = dict(options)
    near = options.pop("near", False)
    with PrefetchRuntime(
        [table], in_place=False, near_data=near, poison=True, **options
    ) as runtime:
        with runtime.begin(ids) as step:
            y = step.wait(0).attend(x)
        (got,) = torch.autograd.grad(y, x, upstream)
    assert torch.equal(got, want)


def test_several_threads():
    tables = [make_table(VOCAB, seed=1), make_table(VOCAB, seed=2)]
    wrong = []
    with PrefetchRuntime(tables, cache_bytes=4000, ring_bytes=9000, in_place=False) as runtime:

        def run(seed):
            random = np.random.default_rng(seed)
            for _ in range(100):
                ids = random.integers(0, VOCAB, 6)
                with runtime.begin(ids) as step:
                    for layer, table in enumerate(tables):
                        if not rows_match(step.wait(layer), table, ids):
                            wrong.append((seed, ids))

        threads = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        assert runtime.ledger.totals.steps == 400


def test_the_ledger_is_exact():
    rows = np.array([1, 2, 3, 4])
    table = make_table(4)
    data = torch.randn(10, 8)
    row_bytes = 8 * 4
    table = type(table)(data, Owners(rows, np.array([0, 9, 1, 5])), 5)
    # Room for five rows: token 1 (2 rows), then 3 does not fit, then 2 (3 rows).
    with PrefetchRuntime(
        [table], cache_bytes=5 * row_bytes, ring_bytes=4 * row_bytes, in_place=False
    ) as runtime:
        assert runtime.placement.hot_tokens == 2
        assert runtime.placement.hot_bytes == 5 * row_bytes
        with runtime.begin([3, 1, 3]) as step:
            step.wait(0)
            with runtime.begin([0, 2]) as second:  # the ring is full
                assert rows_match(second.wait(0), table, [0, 2])
        with runtime.begin([1, 3]) as third:
            assert rows_match(third.wait(0), table, [1, 3])
        first, other, again = sorted(runtime.ledger.steps, key=lambda record: record.step)
        (layer,) = first.layers
        assert (layer.tokens, layer.rows, layer.hits) == (2, 6, 1)
        assert (layer.bytes, layer.hit_bytes) == (4 * row_bytes, 2 * row_bytes)
        assert not layer.spilled
        assert other.layers[0].spilled
        assert (again.layers[0].reused, again.layers[0].reused_bytes) == (1, 4 * row_bytes)
        assert (again.layers[0].bytes, again.layers[0].in_place_bytes) == (0, 0)
        totals = runtime.ledger.totals
        assert totals.bytes == 5 * row_bytes
        assert totals.hit_bytes == 7 * row_bytes
        assert totals.reused == 1
        assert totals.spilled == 1
        assert totals.exposed_us == pytest.approx(
            sum(r.layers[0].exposed_us for r in (first, other, again))
        )
        runtime.ledger.clear()
        assert runtime.ledger.steps == []
        assert runtime.ledger.totals.steps == 0


def test_record_steps_bounds_the_ledger():
    with PrefetchRuntime([make_table(4)], record_steps=0) as runtime:
        runtime.begin([1]).end()
        assert runtime.ledger.steps == []
        assert runtime.ledger.totals.steps == 1


def test_the_ledger_is_a_sequence_of_its_steps():
    with PrefetchRuntime([make_table(4)], record_steps=2) as runtime:
        assert len(runtime.ledger) == 0
        assert list(runtime.ledger) == []
        for _ in range(3):
            runtime.begin([1]).end()
        assert len(runtime.ledger) == 2
        assert list(runtime.ledger) == runtime.ledger.steps
        assert repr(runtime.ledger).startswith("Ledger(2 steps kept, LedgerTotals(steps=3, tokens=")
        with pytest.raises(TypeError, match=r"path: expected a path .* got None"):
            runtime.ledger.to_chrome_trace(None)


def test_a_table_in_a_numpy_array_is_used_in_place():
    table = make_table(VOCAB)
    array = table.data.numpy().copy()
    array.setflags(write=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same = LookupTable(array, table.allocation, table.d_in)
    assert same.data.data_ptr() == array.ctypes.data
    with PrefetchRuntime([same]) as runtime, runtime.begin([3, 1]) as step:
        assert rows_match(step.wait(0), table, [3, 1])


def test_chrome_trace(tmp_path):
    path = tmp_path / "trace.json"
    tables = [make_table(VOCAB, seed=i) for i in range(3)]
    with PrefetchRuntime(tables, in_place=False) as runtime:
        for i in range(0, 20, 4):
            ids = [i, i + 1, i + 2]
            with runtime.begin(ids) as step, runtime.begin([i + 3]) as other:
                for layer in range(3):
                    step.wait(layer)
                    other.wait(layer)
        runtime.ledger.to_chrome_trace(path)
        steps = runtime.ledger.steps
    events = json.loads(path.read_text())["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    assert sum(event["cat"] == "wait" for event in spans) == 30
    assert sum(event["cat"] == "compute" for event in spans) == 40
    assert sum(event["cat"] == "fetch" for event in spans) >= 30
    named = {event["tid"] for event in events if event["name"] == "thread_name"}
    # A worker that came too late for every piece has a lane and no spans.
    assert {event["tid"] for event in spans} <= named
    for lane in named:  # spans of one lane do not overlap
        times = sorted(
            (event["ts"], event["ts"] + event["dur"]) for event in spans if event["tid"] == lane
        )
        for (_, end), (begin, _) in itertools.pairwise(times):
            assert begin >= end - 0.002  # printed to the nanosecond
    for event in spans:
        record = next(r for r in steps if r.step == event["args"]["step"])
        assert event["ts"] >= record.begin_us - 0.002
        if event["cat"] != "fetch":
            assert event["ts"] + event["dur"] <= record.end_us + 0.002


def test_placement_is_said(tmp_path):
    table = make_table(VOCAB)
    path = tmp_path / "tables.safetensors"
    save_tables(path, [table])
    with PrefetchRuntime(path, direct_io=False, cache_bytes=3000) as runtime:
        assert runtime.placement.tier == "disk"
        assert runtime.placement.path == str(path)
        assert not runtime.placement.direct_io
        assert runtime.placement.table_bytes == table.data.nbytes
        assert 0 < runtime.placement.hot_bytes <= 3000
        assert "through the page cache" in repr(runtime)
        assert str(path) in repr(runtime)
    with PrefetchRuntime([table]) as runtime:
        assert runtime.placement.tier == "ram"
        assert runtime.placement.in_place
        assert "in RAM, read in place" in repr(runtime)
    with PrefetchRuntime([table], in_place=False) as runtime:
        assert not runtime.placement.in_place
        assert "in RAM, hot set" in repr(runtime)


@pytest.mark.parametrize("io_engine", ["io_uring", "pread"])
@pytest.mark.parametrize("direct_io", ["auto", False])
def test_every_way_to_read_a_file(io_engine, direct_io, tmp_path):
    table = make_table(VOCAB)
    save_tables(tmp_path / "tables", [table])
    if io_engine == "io_uring" and _C.why_no_uring():
        with pytest.raises(RuntimeError, match="io_uring"):
            PrefetchRuntime(tmp_path / "tables", io_engine=io_engine)
        return
    with PrefetchRuntime(tmp_path / "tables", io_engine=io_engine, direct_io=direct_io) as runtime:
        assert runtime.placement.io_engine == io_engine
        assert io_engine in repr(runtime)
        for ids in ([0, VOCAB - 1], range(VOCAB)):
            with runtime.begin(ids) as step:
                assert rows_match(step.wait(0), table, ids)


def test_a_mapped_file_is_read_in_place(tmp_path):
    tables = [make_table(VOCAB), make_table(VOCAB, tied=True, seed=1)]
    path = tmp_path / "tables"
    save_tables(path, tables)
    with PrefetchRuntime(path, mapped=True) as runtime, PrefetchRuntime(path, mapped=True) as other:
        assert (runtime.placement.tier, runtime.placement.path) == ("ram", str(path))
        assert runtime.placement.mapped
        assert runtime.placement.in_place
        assert "(mapped)" in repr(runtime)
        with runtime.begin([3, 5]) as step, other.begin([5]) as second:
            save_tables(path, [make_table(VOCAB, seed=9)])  # replaced by rename: ours stays
            for i, table in enumerate(tables):
                assert rows_match(step.wait(i), table, [3, 5])
                assert rows_match(second.wait(i), table, [5])
        assert runtime.ledger.totals.bytes == 0
    with PrefetchRuntime(path, mapped=True, in_place=False) as runtime:
        assert runtime.placement.verify
        with runtime.begin([1]) as step:
            assert rows_match(step.wait(0), make_table(VOCAB, seed=9), [1])
    with pytest.raises(ValueError, match="mapped: expected the path"):
        PrefetchRuntime(tables, mapped=True)


def test_a_path_need_not_be_utf8(tmp_path):
    table = make_table(VOCAB)
    path = os.fsdecode(os.fsencode(tmp_path) + b"/t\xff\xe9")
    save_tables(path, [table])
    with PrefetchRuntime(path) as runtime, runtime.begin([1, 2]) as step:
        assert rows_match(step.wait(0), table, [1, 2])
        runtime.ledger.to_chrome_trace(path + ".json")
    assert os.path.exists(path + ".json")
    os.unlink(path)
    with pytest.raises(FileNotFoundError) as caught:
        PrefetchRuntime(path)
    assert caught.value.filename == path
