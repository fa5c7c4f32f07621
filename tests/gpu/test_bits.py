"""The same bits: on every run, beside other work, in any order of the tokens, in a graph."""

from __future__ import annotations

import contextlib

import pytest
import torch

import l3ext
from tests.gpu import steps

MANY = steps.Shape("many", (1, 2, 3, 9, 40, 64, 100, 0), (5, 200, 3, 70, 130, 9, 1, 2))
DECODE = steps.Shape("decode", (1, 2, 3, 9, 40, 512, 100, 0), (5, 3, 3, 7, 13, 9, 1, 2))
FULL = [
    steps.Shape("many", **steps.grid((1, 9, 64, 512), (1, 7, 64, 1500)), d_in=2048, d_emb=1024),
    steps.Shape("decode", **steps.grid((1, 9, 64, 512), (1, 7)), d_in=2048, d_emb=1024),
]
ON_DEVICES = steps.on_devices(quick=[MANY, DECODE], full=FULL)


@contextlib.contextmanager
def busy(device):
    """Yields a function that gives the device other work of changing size, on another stream."""
    if device.type == "cpu":
        yield lambda run: None
        return
    stream = torch.cuda.Stream()
    a = torch.randn(4096, 4096, device=device, dtype=torch.bfloat16)
    b = torch.empty_like(a)
    stream.wait_stream(torch.cuda.current_stream())

    def work(run):
        with torch.cuda.stream(stream):
            for size in (512, 4096, 1024)[: 1 + run % 3] * 4:
                torch.mm(a[:size], a, out=b[:size])

    yield work
    stream.synchronize()


@ON_DEVICES
def test_twenty_runs_beside_other_work(device, shape):
    step = steps.make_step(shape, torch.bfloat16, device)
    first = steps.run(step)
    with busy(device) as work:
        for run in range(20):
            work(run)
            steps.assert_same_bits(steps.run(step), first)


@ON_DEVICES
def test_positions_may_come_in_any_order(device, shape):
    """Each token's queries in their order, mixed with others in any: results stay the same."""
    step = steps.make_step(shape, torch.bfloat16, device)
    y, dx, dtable = steps.run(step)
    order = torch.argsort(step.token_ids, stable=True)
    by_token = steps.Step(
        step.x[order],
        step.table,
        step.offsets,
        step.token_ids[order],
        step.dy[order],
        step.d_in,
        step.tied,
    )
    steps.assert_same_bits(steps.run(by_token), (y[order], dx[order], dtable))


def capture(function, device):
    """(replay, outputs) of a function as a CUDA graph; on the CPU replay is a call of it."""
    if device.type == "cpu":
        outputs = function()

        def replay():
            for output, new in zip(outputs, function(), strict=True):
                output.copy_(new)

        return replay, outputs
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        function()  # what is set up on first use shall not be captured
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = function()
    return graph.replay, outputs


@pytest.mark.parametrize(
    ("device", "count"),
    [("cpu", 64), ("cpu", 1200), ("cuda", 8), ("cuda", 300), ("cuda", 8192)],
    indirect=["device"],
)
def test_a_graph_with_its_plan_inside_replays_other_ids(device, count):
    """Unrelated ids: drawn from a Zipf law, one token alone, all distinct, and most at the end."""
    vocab = 9000
    rows = steps.zipf_rows(vocab, 36_000, 512)
    ids = steps.zipf_ids(vocab, count, device)
    step = steps.make_step_of(ids, rows, 128, 64, torch.bfloat16)

    def forward_and_backward():
        plan = without_wait(step)
        return (*steps.run(step, plan), plan.permutation, plan.segment_rows, plan.schedule)

    replay, outputs = capture(forward_and_backward, device)
    sets = [
        steps.zipf_ids(vocab, count, device, seed=1),
        torch.full_like(ids, 1),
        torch.randperm(vocab, device=device)[:count],
        torch.where(
            steps.zipf_ids(2, count, device) == 0,
            vocab - 1,
            steps.zipf_ids(vocab, count, device, 2),
        ),
    ]
    for other in (*sets, sets[0]):
        step.token_ids.copy_(other)
        expected = forward_and_backward()
        for output in outputs:
            output.fill_(float("nan") if output.is_floating_point() else -7)
        replay()
        steps.assert_same_bits(outputs, expected)


def without_wait(step):
    return l3ext.plan(step.token_ids, step.offsets, max_rows=512)


def test_steps_on_several_streams_do_not_meet(device):
    """Workspaces and counters of one stream's work are not another's."""
    shapes = [MANY, DECODE, steps.QUICK[2], steps.QUICK[3]]
    all_steps = [
        steps.make_step(shape, torch.bfloat16, device, i) for i, shape in enumerate(shapes)
    ]
    expected = [steps.run(step) for step in all_steps]
    if device.type == "cpu":
        streams = [contextlib.nullcontext() for _ in shapes]
    else:
        main = torch.cuda.current_stream()
        queues = [torch.cuda.Stream() for _ in shapes]
        for queue in queues:
            queue.wait_stream(main)
        streams = [torch.cuda.stream(queue) for queue in queues]
    results = []
    for _ in range(10):
        for step, stream in zip(all_steps, streams, strict=True):
            with stream:
                results.append(steps.run(step, without_wait(step)))
    if device.type == "cuda":
        torch.cuda.synchronize()
    for i, result in enumerate(results):
        steps.assert_same_bits(result, expected[i % len(shapes)])
