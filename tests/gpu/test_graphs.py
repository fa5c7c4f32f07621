"""Steps of offloaded tables in a CUDA graph: captured once, replayed with unrelated ids.

On the CPU, which has no graphs, a replay is a call.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import StaticCache

import l3ext
from l3ext import GraphRuntime, LookupTable
from l3ext.models.prefill import CACHE_NAME
from tests.gpu import steps
from tests.gpu.test_models import VOCAB, make_model, random_ids

ROWS = np.random.default_rng(3).integers(1, 40, 300)
# In which all rows of a step fit, some, or none; and a hot set beside.
OPTIONS = [
    {},
    {"cache_bytes": 1 << 20},
    {"ring_bytes": 200_000},
    {"ring_bytes": 0},
    {"cache_bytes": 1 << 20, "ring_bytes": 100_000},
]


class Recorded:
    """A function's work in a graph; ``output`` is that of the last replay."""

    def __init__(self, device, run, undo=lambda: None):
        self.output, self._run, self._graph = None, run, None
        if device.type == "cpu":
            return
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                run()
                undo()
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self.output = run()

    def replay(self):
        if self._graph is None:
            self.output = self._run()
        else:
            self._graph.replay()
        return self.output


class Tables:
    """Two layers' tables, on the host for a runtime and on the device to compare with."""

    def __init__(self, device, dtype, tied=False, **options):
        self.device, self.dtype = device, dtype
        self.offsets = torch.from_numpy(np.cumsum([0, *ROWS]))
        width = 128 if tied else 192
        rows = [torch.randn(int(self.offsets[-1]), width).to(dtype) for _ in range(2)]
        owners = l3ext.Allocation.from_rows(ROWS, frequency=ROWS.astype(np.int64))
        self.tied = tied
        self.runtime = GraphRuntime(
            [LookupTable(table, owners, 128, tied) for table in rows],
            device=device,
            **({"in_place": False} | options),
        )
        self.resident = [table.to(device) for table in rows]
        self.offsets = self.offsets.to(device)

    def step(self, count):
        """(ids, queries, what a graph of it runs), both read when it is replayed."""
        ids = torch.zeros(count, dtype=torch.int64, device=self.device)
        x = torch.zeros(2, count, 128, dtype=self.dtype, device=self.device)

        def run():
            with self.runtime.begin(ids) as step:
                return [step.wait(layer).attend(x[layer]) for layer in range(2)]

        return ids, x, run

    def expected(self, ids, x):
        plan = l3ext.plan(ids, self.offsets, max_rows=40)
        return [
            l3ext.ops.table_attention(x[layer], self.resident[layer], plan, tied=self.tied)
            for layer in range(2)
        ]


def draw(ids, x, seed):
    """Other ids and queries in the places of the last ones."""
    generator = torch.Generator().manual_seed(seed)
    ids.copy_(torch.randint(0, len(ROWS), ids.shape, generator=generator))
    x.copy_(torch.randn(x.shape, generator=generator))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("count", [1, 8, 300])
@pytest.mark.parametrize(
    ("dtype", "tied"), [(torch.bfloat16, False), (torch.float32, False), (torch.bfloat16, True)]
)
def test_replays_serve_unrelated_ids(device, options, count, dtype, tied):
    tables = Tables(device, dtype, tied, **options)
    ids, x, run = tables.step(count)
    graph = Recorded(device, run)
    before = tables.runtime.counts
    distinct = 0
    for seed in range(4):
        draw(ids, x, seed)
        steps.assert_same_bits(graph.replay(), tables.expected(ids, x))
        distinct += len(ids.unique())
    for counts, earlier in zip(tables.runtime.counts, before, strict=True):
        total = counts.resident + counts.fetched + counts.left
        assert total - earlier.resident - earlier.fetched - earlier.left == distinct
        assert (counts.left > earlier.left) or options.get("ring_bytes", 1) > 0
        assert (counts.resident > earlier.resident) or count < 8 or "cache_bytes" not in options


def test_graphs_of_several_sizes_and_steps_without(device):
    """They share rings and directories, one after the other on a stream."""
    tables = Tables(device, torch.bfloat16, cache_bytes=1 << 19)
    prepared = []
    for count in (1, 8, 64):
        ids, x, run = tables.step(count)
        prepared.append((ids, x, Recorded(device, run).replay))
        prepared.append((ids, x, run))
    for seed in range(20):
        ids, x, run = prepared[seed % len(prepared)]
        draw(ids, x, seed)
        steps.assert_same_bits(run(), tables.expected(ids, x))


def test_a_step_beside_other_work(device):
    """Copies over the same link and products on the same device, on other streams."""
    tables = Tables(device, torch.bfloat16)
    ids, x, run = tables.step(64)
    graph = Recorded(device, run)
    if device.type == "cuda":
        others = [torch.cuda.Stream() for _ in range(2)]
        far = torch.empty(64 << 20, dtype=torch.uint8, pin_memory=True)
        near = torch.empty_like(far, device=device)
        a = torch.randn(2048, 2048, device=device)
    for seed in range(20):
        draw(ids, x, seed)
        expected = tables.expected(ids, x)
        if device.type == "cuda":
            with torch.cuda.stream(others[0]):
                near.copy_(far, non_blocking=True)
            with torch.cuda.stream(others[1]):
                for _ in range(4):
                    a @ a
        steps.assert_same_bits(graph.replay(), expected)


def test_rows_that_nobody_attends_to(device):
    tables = Tables(device, torch.bfloat16)
    ids, x, _ = tables.step(8)

    def first_layer_alone():
        with tables.runtime.begin(ids) as step:
            return [step.wait(0).attend(x[0])]

    graph = Recorded(device, first_layer_alone)
    draw(ids, x, 1)
    steps.assert_same_bits(graph.replay(), tables.expected(ids, x)[:1])


def test_an_id_outside_the_vocabulary(device):
    tables = Tables(device, torch.bfloat16)
    ids, x, run = tables.step(8)
    graph = Recorded(device, run)
    draw(ids, x, 1)
    ids[3] = len(ROWS)
    if device.type == "cpu":
        with pytest.raises(ValueError, match="token_ids"):
            graph.replay()
        return
    y = graph.replay()[0]
    assert torch.isnan(y[3]).all()
    assert torch.isfinite(y[[0, 1, 2, 4, 5, 6, 7]]).all()


def test_a_step_waits_for_nothing(device):
    tables = Tables(device, torch.bfloat16)
    ids, x, run = tables.step(8)
    draw(ids, x, 1)
    run()
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def test_compiled_layers_of_other_allocations(device):
    """Compiled code frees each layer's plan after its attention, as the next layer's rows come."""
    offsets, tables = [], []
    for seed in range(4):
        rows = np.random.default_rng(seed).integers(1, 40, 300)
        owners = l3ext.Allocation.from_rows(rows, frequency=rows.astype(np.int64))
        table = torch.randn(int(rows.sum()), 192).to(torch.bfloat16)
        offsets.append(torch.from_numpy(np.cumsum([0, *rows])).to(device))
        tables.append(LookupTable(table, owners, 128))
    resident = [table.data.to(device) for table in tables]
    runtime = GraphRuntime(tables, device=device, in_place=False)

    def run(ids, x):
        with runtime.begin(ids) as step:
            return [step.wait(layer).attend(x[layer]) for layer in range(4)]

    compiled = torch.compile(run, fullgraph=True)
    ids = torch.zeros(300, dtype=torch.int64, device=device)
    x = torch.zeros(4, 300, 128, dtype=torch.bfloat16, device=device)
    with torch.no_grad(), runtime:
        for seed in range(20):
            draw(ids, x, seed)
            plans = [l3ext.plan(ids, of_layer, max_rows=40) for of_layer in offsets]
            expected = [
                l3ext.ops.table_attention(*operands, tied=False)
                for operands in zip(x, resident, plans, strict=True)
            ]
            steps.assert_same_bits(compiled(ids, x), expected)


# --- models ---------------------------------------------------------------------------------------
def decode(model, device, prompt, count):
    """Logits of ``count`` steps after a prompt, each step a replay, over a static cache."""
    cache = StaticCache(config=model.config, max_cache_len=32)
    ids = model(prompt, **{CACHE_NAME: cache}).logits[:, -1:].argmax(-1)

    def run():
        return model(ids, **{CACHE_NAME: cache}).logits[:, -1:]

    def undo():
        for layer in cache.layers:
            layer.cumulative_length.sub_(1)

    graph = Recorded(device, run, undo)
    steps = []
    for _ in range(count):
        steps.append(graph.replay().clone())
        ids.copy_(steps[-1].argmax(-1))
    return torch.stack(steps)


@pytest.mark.parametrize("options", [{}, {"cache_bytes": 20_000}, {"ring_bytes": 20_000}], ids=str)
@pytest.mark.parametrize("batch", [1, 8])
def test_a_model_decodes_in_a_graph(device, options, batch):
    resident, offloaded = make_model().to(device), make_model()
    options = {"in_place": False} | options
    runtime = l3ext.offload(offloaded, "ram", device=device, graphs=True, **options)
    offloaded.to(device)
    prompt = random_ids(batch, 5).to(device)
    with torch.no_grad(), runtime:
        expected = decode(resident, device, prompt, 12)
        assert torch.equal(decode(offloaded, device, prompt, 12), expected)


def test_generate_with_a_static_cache(device):
    """As transformers does it, which compiles the step for a GPU."""
    resident, offloaded = make_model().to(device), make_model()
    runtime = l3ext.offload(offloaded, "ram", device=device, graphs=True)
    offloaded.to(device)
    ids = random_ids(2, 5).to(device)
    options = {"max_new_tokens": 10, "do_sample": False, "cache_implementation": "static"}
    with runtime:
        got = offloaded.generate(ids, **options)
        assert torch.equal(got, resident.generate(ids, **options))


def test_compiled_with_graphs(device):
    """``mode="reduce-overhead"``: torch makes the graphs, of the step in one piece."""
    resident, offloaded = make_model().to(device), make_model()
    runtime = l3ext.offload(offloaded, "ram", device=device, graphs=True, in_place=False)
    offloaded.to(device)
    compiled = torch.compile(offloaded, fullgraph=True, mode="reduce-overhead")
    with torch.no_grad(), runtime:
        for seed in range(5):
            ids = random_ids(2, 3, seed=seed).to(device)
            torch.testing.assert_close(
                compiled(ids).logits.clone(), resident(ids).logits, rtol=1e-4, atol=1e-5
            )
        counts = runtime.counts[0]
        assert counts.fetched > VOCAB // 8
