"""The operators as torch sees them on the device: opcheck, compile, gradients to every operand."""

from __future__ import annotations

import pytest
import torch

import l3ext
from l3ext.ops import table_attention
from tests.gpu import steps

SHAPE = steps.Shape("small", (1, 2, 4, 30), (3, 1, 9, 20), 64, 64)
ops = torch.ops.l3ext


def step_of(device, dtype=torch.float32):
    step = steps.make_step(SHAPE, dtype, device)
    return step, steps.plan_of(step)


def test_opcheck_of_plans(device):
    step, plan = step_of(device)
    torch.library.opcheck(ops.plan.default, (step.token_ids, step.offsets, True))
    arrays = (plan.segment_queries, plan.segment_rows, plan.num_segments)
    torch.library.opcheck(ops.schedule.default, arrays)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck_of_forward(device, dtype):
    step, plan = step_of(device, dtype)
    arrays = plan._arrays()
    keys, values = step.keys.contiguous(), step.values.contiguous()
    directory = step.table.data_ptr() + step.offsets[:-1] * 128 * dtype.itemsize
    torch.library.opcheck(
        ops.directory_attention.default, (step.x, directory, *arrays, 64, 128, 64, 0.7)
    )
    for tensor in (step.x, keys, values, step.table):
        tensor.requires_grad_()
    torch.library.opcheck(
        ops.segmented_attention.default, (step.x, keys, values, *arrays, 0.7, False)
    )
    torch.library.opcheck(
        ops.table_attention.default, (step.x, step.table, 64, False, *arrays, 0.7, False)
    )


@pytest.mark.parametrize("wants", [(True, True), (True, False), (False, True)])
def test_opcheck_of_backward(device, wants):
    step, plan = step_of(device)
    arrays = plan._arrays()
    counts = torch.diff(plan.segment_rows, dim=1).flatten()
    packed = (counts.cumsum(0) - counts, int(counts.sum()))
    for places in ((), packed):
        torch.library.opcheck(
            ops.segmented_attention_backward.default,
            (step.dy, step.x, step.keys, step.values, *arrays, 1.0, *wants, *places),
        )
        torch.library.opcheck(
            ops.table_attention_backward.default,
            (step.dy, step.x, step.table, 64, False, *arrays, 1.0, *wants, *places),
        )


def test_compile_without_graph_breaks(device):
    step, _ = step_of(device)
    x, table = step.x.requires_grad_(), step.table.requires_grad_()

    def model(x, table, ids):
        plan = l3ext.plan(ids, step.offsets, max_rows=30)
        return (table_attention(x * 2, table, plan, tied=False) ** 2).sum()

    compiled = torch.compile(model, fullgraph=True)
    for ids in (step.token_ids, step.token_ids.flip(0), step.token_ids):
        got = torch.autograd.grad(compiled(x, table, ids), [x, table])
        want = torch.autograd.grad(model(x, table, ids), [x, table])
        torch.testing.assert_close(got, want)


def test_a_plan_may_come_into_compiled_code(device):
    step, plan = step_of(device)
    compiled = torch.compile(
        lambda x, table, plan: table_attention(x, table, plan, tied=False), fullgraph=True
    )
    for max_rows in (30, 31, 40):  # an int that changes is no reason to fail or to go wrong
        other = l3ext.plan(step.token_ids, step.offsets, max_rows=max_rows)
        y = compiled(step.x, step.table, other)
        assert torch.equal(y, table_attention(step.x, step.table, plan, tied=False))


def test_finite_differences(device):
    """A few random directions: the derivative is that of the function which runs."""
    step, plan = step_of(device)
    x, table = step.x.requires_grad_(), step.table.requires_grad_()

    def loss(x, table):
        return (table_attention(x, table, plan, tied=False).double() * step.dy).sum()

    gradients = torch.autograd.grad(loss(x, table), [x, table])
    for _ in range(3):
        directions = [torch.randn_like(x), torch.randn_like(table) * table.std(0)]
        slope = sum((g.double() * d).sum() for g, d in zip(gradients, directions, strict=True))
        with torch.no_grad():
            ahead, behind = (
                loss(x + h * directions[0], table + h * directions[1]) for h in (1e-3, -1e-3)
            )
        torch.testing.assert_close((ahead - behind) / 2e-3, slope, rtol=1e-2, atol=0.2)
