"""Steps that a graph may hold, on the host's twin: bits, what is counted, what is refused."""

from __future__ import annotations

import dataclasses
import gc

import numpy as np
import pytest
import torch

import l3ext
from l3ext import GraphRuntime, LookupTable
from l3ext.quantization import quantize_rows
from l3ext.tables import save_tables
from tests.runtime.tables import Owners, make_table
from tests.runtime.test_offload import VOCAB, generate, make_model

OPTIONS = [
    {},
    {"in_place": False},
    {"in_place": False, "cache_bytes": 3000},
    {"in_place": False, "ring_bytes": 2000},
    {"in_place": False, "cache_bytes": 2000, "ring_bytes": 0},
]


def attend(table, ids, x):
    """The same over the table where it lies."""
    data, d_in = table.data, table.d_in
    plan = l3ext.plan(ids, np.ascontiguousarray(table.allocation.offsets))
    if isinstance(data, l3ext.QuantizedTable):
        scales = {"key_scales": data.key_scales, "value_scales": data.value_scales}
        return l3ext.segmented_attention(x, data.keys, data.values, plan, **scales)
    values = data if table.tied else data[:, d_in:]
    return l3ext.segmented_attention(x, data[:, :d_in], values.contiguous(), plan)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(
    ("tied", "dtype"), [(False, torch.float32), (True, torch.bfloat16), (False, torch.float64)]
)
def test_the_same_bits_as_over_the_table(options, tied, dtype):
    """Of unrelated steps of every size, over tables with allocations of their own."""
    shape = {"tied": tied, "dtype": dtype}
    tables = [make_table(50, seed=seed, **shape) for seed in (0, 1, 1)]
    random = np.random.default_rng(0)
    with GraphRuntime(tables, **options) as runtime:
        for count in (0, 1, 8, 300):
            ids = torch.from_numpy(random.integers(0, 50, count))
            with runtime.begin(ids) as step:
                for layer, table in enumerate(tables):
                    x = torch.randn(count, 24, dtype=dtype)
                    y = step.wait(layer).attend(x)
                    assert torch.equal(y, attend(table, ids, x))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("in_place", [False, True])
def test_quantised_rows(dtype, tied, in_place):
    table = make_table(50, tied=tied, d_in=21, d_emb=10)
    rows = quantize_rows(table.data, 21, dtype, tied=tied)
    table = dataclasses.replace(table, data=rows)
    ids, x = torch.arange(40) % 23, torch.randn(40, 21)
    with GraphRuntime([table], in_place=in_place) as runtime, runtime.begin(ids) as step:
        assert torch.equal(step.wait(0).attend(x), attend(table, ids, x))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_what_is_counted(options):
    table = make_table(50)
    with GraphRuntime([table], **options) as runtime:
        for ids in (torch.arange(50), [[3, 3]]):  # once a step
            runtime.begin(ids).end()
        (counts,) = runtime.counts
        assert counts.resident + counts.fetched + counts.left == 51
        assert (counts.resident > 0) == (not options or "cache_bytes" in options)
        assert (counts.fetched > 0) == bool(options and options.get("ring_bytes", 1) > 0)
        assert (counts.left > 0) == ("ring_bytes" in options)
        if options == {"in_place": False}:
            assert counts.fetched_bytes == 148 * (
                sum(table.allocation.rows) + table.allocation.rows[3]
            )
        place = runtime.placement
        assert place.in_place == (not options)
        assert place.table_bytes == table.data.nbytes
        assert place.hot_bytes <= options.get("cache_bytes", 0)
        assert ("in place" if not options else "rings") in repr(runtime)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("from_file", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_model_has_the_bits_of_its_tables(tied, from_file, options, tmp_path):
    model = make_model(tied=tied)
    with torch.no_grad():
        text, ids = generate(model), torch.arange(40).reshape(2, 20)
        logits = model(ids).logits
        path = tmp_path / "tables" if from_file else None
        runtime = l3ext.offload(model, "ram", path, graphs=True, **options)
        assert isinstance(model.model.l3_runtime, GraphRuntime)
        assert torch.equal(generate(model), text)
        assert torch.equal(model(ids).logits, logits)
        static = model.generate(ids[:, :5], max_new_tokens=5, cache_implementation="static")
        assert torch.equal(static, model.generate(ids[:, :5], max_new_tokens=5))
    assert runtime.placement.path == (None if path is None else str(path))
    assert sum(dataclasses.astuple(runtime.counts[0])) > 0


@pytest.mark.parametrize("options", OPTIONS[1:4:2], ids=str)
def test_compiled_code_holds_a_step(options):
    """In one graph of torch's, which serves other ids; hot set and ring change nothing."""
    model = make_model()
    ids = [
        torch.randint(0, VOCAB, (2, 3), generator=torch.Generator().manual_seed(i)) for i in (1, 2)
    ]
    with torch.no_grad():
        expected = [torch.compile(model, fullgraph=True)(i).logits for i in ids]
        torch._dynamo.reset()
        runtime = l3ext.offload(model, "ram", graphs=True, **options)
        compiled = torch.compile(model, fullgraph=True)
        for i, logits in zip(ids, expected, strict=True):
            torch.testing.assert_close(compiled(i).logits, logits)
        counts = runtime.counts[0]
        assert counts.resident + counts.fetched + counts.left == sum(len(i.unique()) for i in ids)


class Recording:
    """A native runtime, and where the arrays lay with which it was called."""

    def __init__(self, native):
        self._native, self.begun, self.awaited = native, [], []

    def __getattr__(self, name):
        return getattr(self._native, name)

    def begin(self, ticket, stream):
        self.begun.append((ticket.data_ptr(), ticket.tolist()))
        self._native.begin(ticket, stream)

    def wait(self, layer, step, stream):
        self.awaited.append(step)
        self._native.wait(layer, step, stream)


@pytest.mark.parametrize("compiled", [False, True])
def test_what_a_fetch_reads_lives_until_the_last_layer(compiled):
    """Compiled code may free a plan after the last layer of its allocation, the ticket not."""
    tables = [make_table(50, seed=seed) for seed in (0, 1)]
    ids, x = torch.tensor([7, 3, 7, 9]), torch.randn(2, 4, 24)
    with GraphRuntime(tables, in_place=False) as runtime, torch.no_grad():
        runtime._native = recording = Recording(runtime._native)

        def run(ids, x):
            with runtime.begin(ids) as step:
                return [step.wait(layer).attend(x[layer]) for layer in range(2)]

        run = torch.compile(run, fullgraph=True) if compiled else run
        for y, table, queries in zip(run(ids, x), tables, x, strict=True):
            assert torch.equal(y, attend(table, ids, queries))
        ((address, ticket),) = recording.begun
        assert ticket[:4] == [3, 3, 7, 9]
        assert len(ticket) == 5
        assert recording.awaited == [address, address]


def test_compiled_code_must_attend_to_the_last_layer():
    """What ends a step otherwise has no result, and compiled code drops it."""
    tables = [make_table(50), make_table(50)]
    ids, x = torch.tensor([7, 3]), torch.randn(2, 24)
    with GraphRuntime(tables) as runtime, torch.no_grad():

        def first_layer_alone(ids, x):
            with runtime.begin(ids) as step:
                return step.wait(0).attend(x)

        expected = first_layer_alone(ids, x)
        with pytest.raises(Exception, match="to attend to layer 1, the last, before the step ends"):
            torch.compile(first_layer_alone, fullgraph=True)(ids, x)
        torch._dynamo.reset()
        assert torch.equal(torch.compile(first_layer_alone)(ids, x), expected)  # not compiled


def test_an_earlier_step_is_refused_and_not_misread():
    table = make_table(50)
    x = torch.randn(2, 24)
    with GraphRuntime([table]) as runtime:
        first, second = runtime.begin([1, 2]), runtime.begin([3, 4])
        with pytest.raises(RuntimeError, match="expected the one that began last"):
            first.wait(0).attend(x)
        first.end()
        y = second.wait(0).attend(x)
        assert torch.equal(y, attend(table, torch.tensor([3, 4]), x))
        second.end()
        second.end()
        with pytest.raises(RuntimeError, match="expected the one that began last"):
            second.wait(0).attend(x)


def test_a_closed_runtime():
    runtime = GraphRuntime([make_table(50)])
    step = runtime.begin([1])
    runtime.close()
    runtime.close()
    step.end()
    for use in (lambda: runtime.begin([1]), lambda: runtime.counts):
        with pytest.raises(RuntimeError, match="the runtime is closed"):
            use()
    with pytest.raises(RuntimeError, match="the runtime is closed"):
        step.wait(0).attend(torch.zeros(1, 24))


def test_tables_live_as_long_as_the_runtime():
    """Nobody else needs to hold them; and nothing holds them, or the runtime, when it is gone."""
    table = make_table(50)
    ids, x = torch.arange(50), torch.randn(50, 24)
    expected = attend(table, ids, x)
    runtime = GraphRuntime([table])
    del table
    gc.collect()
    with runtime.begin(ids) as step:
        assert torch.equal(step.wait(0).attend(x), expected)
    number = runtime._number
    del runtime, step
    gc.collect()
    from l3ext.graph_runtime import _runtimes

    assert number not in _runtimes


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"ids": [1, 50]}, ValueError, "token_ids.*50.*position 1"),
        ({"ids": [1.5]}, TypeError, "token_ids: expected an integer dtype"),
        ({"layer": 1}, ValueError, "layer: expected 0 to 0, got 1"),
        ({"layer": -1}, ValueError, "layer: expected 0 to 0, got -1"),
        ({"x": torch.zeros(2, 24)}, ValueError, "x: expected 1 rows, one per planned token, got 2"),
        ({"x": torch.zeros(24)}, ValueError, "x: expected a matrix"),
    ],
)
def test_wrong_steps(change, error, message):
    arguments = {"ids": [1], "layer": 0, "x": torch.zeros(1, 24)} | change
    with GraphRuntime([make_table(50)]) as runtime:
        with pytest.raises(error, match=message), runtime.begin(arguments["ids"]) as step:
            step.wait(arguments["layer"]).attend(arguments["x"])
        with runtime.begin([1]) as step:  # works on
            step.wait(0).attend(torch.zeros(1, 24))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"cache_bytes": -1}, ValueError, "cache_bytes: expected at least 0, got -1"),
        ({"ring_bytes": -1}, ValueError, "ring_bytes: expected at least 0, got -1"),
        ({"fetch_blocks": 0}, ValueError, "fetch_blocks: expected 1 to 1024, got 0"),
        ({"num_workers": 1}, TypeError, "num_workers"),
        ({"near_data": True}, TypeError, "near_data"),
    ],
)
def test_wrong_options(options, error, message):
    with pytest.raises(error, match=message):
        GraphRuntime([make_table(50)], **options)
    model = make_model()
    text = generate(model)
    with pytest.raises(error, match=message):
        l3ext.offload(model, "ram", graphs=True, **options)
    assert torch.equal(generate(model), text)


def test_wrong_tables(tmp_path):
    with pytest.raises(ValueError, match="tables: expected at least one"):
        GraphRuntime([])
    with pytest.raises(ValueError, match=r"tables\[1\]: expected a vocabulary of 50"):
        GraphRuntime([make_table(50), make_table(51)])
    with pytest.raises(OSError, match="no-such-file"):
        GraphRuntime(tmp_path / "no-such-file")
    with pytest.raises(ValueError, match='tier: expected "ram" with graphs'):
        l3ext.offload(make_model(), "disk", tmp_path / "tables", graphs=True)


def test_no_gradient_is_an_error_and_not_zero():
    with GraphRuntime([make_table(50)]) as runtime, runtime.begin([1]) as step:
        y = step.wait(0).attend(torch.zeros(1, 24, requires_grad=True))
        with pytest.raises(RuntimeError, match="have no gradient here"):
            y.sum().backward()


def test_a_mapped_file_is_served(tmp_path):
    table = make_table(50)
    save_tables(tmp_path / "tables", [table])
    ids, x = torch.arange(50), torch.randn(50, 24)
    for in_place in (True, False):
        runtime = GraphRuntime(tmp_path / "tables", in_place=in_place)
        with runtime, runtime.begin(ids) as step:
            assert torch.equal(step.wait(0).attend(x), attend(table, ids, x))


def test_tokens_without_rows_get_zeros():
    rows = np.array([2, 0, 3, 0])
    table = LookupTable(torch.randn(5, 37), Owners(rows), 24)
    for options in ({}, {"in_place": False}, {"in_place": False, "ring_bytes": 0}):
        with GraphRuntime([table], **options) as runtime, runtime.begin([0, 1, 2, 3]) as step:
            y = step.wait(0).attend(torch.randn(4, 24))
        assert torch.count_nonzero(y[[1, 3]]) == 0
        assert torch.count_nonzero(y[[0, 2]]) == 26
