"""Outputs and gradients against the definition in float64, on every class of shapes."""

from __future__ import annotations

import pytest
import torch

import l3ext
from l3ext.ops import table_attention
from tests import reference
from tests.gpu import steps

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def run_and_check(step):
    with steps.poisoned():
        results = steps.run(step)
    steps.check(step, results)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@steps.on_devices(quick=steps.QUICK, full=steps.FULL + steps.DECODE)
def test_every_class_of_shapes(device, shape, dtype):
    run_and_check(steps.make_step(shape, dtype, device))


@pytest.mark.parametrize(
    ("device", "vocab", "total", "count", "d_in", "d_emb"),
    [
        ("cpu", 500, 2000, 200, 128, 64),
        # 2.2e9 elements: past 2^31 of them, not only of bytes.
        ("cuda", 180_000, 710_000, 8192, 2048, 1024),
    ],
    indirect=["device"],
)
def test_a_step_of_a_model(device, vocab, total, count, d_in, d_emb):
    rows = steps.zipf_rows(vocab, total, 512)
    ids = steps.zipf_ids(vocab, count, device)
    ids[:4] = torch.tensor([0, vocab - 1, vocab - 1, 0])  # both ends of the table
    step = steps.make_step_of(ids, rows, d_in, d_emb, torch.bfloat16)
    if device.type == "cuda":
        assert step.table.numel() > 2**31
    run_and_check(step)


@pytest.mark.parametrize(
    ("device", "rows"), [("cpu", 1000), ("cuda", 11_500_000)], indirect=["device"]
)
def test_few_rows_at_the_end_of_a_long_table(device, rows):
    """Two tokens own the first and the last rows; in between lies more than 2^31 elements."""
    d_in, d_emb = 128, 64
    table = torch.full((rows, d_in + d_emb), float("nan"), dtype=torch.bfloat16, device=device)
    offsets = torch.tensor([0, 5, rows - 3, rows], device=device)
    small = steps.make_step_of(
        torch.tensor([1, 0, 1, 1], device=device), (5, 3), d_in, d_emb, torch.bfloat16
    )
    table[:5], table[-3:] = small.table[:5], small.table[5:]
    far = steps.Step(small.x, table, offsets, 2 * small.token_ids, small.dy, d_in=d_in, tied=False)
    y, dx, dtable = steps.run(far)
    steps.check(small, (y, dx, torch.cat([dtable[:5], dtable[-3:]])))
    assert torch.count_nonzero(dtable[5:-3]) == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@steps.on_devices(
    quick=[steps.Shape("most rows", (4095, 4096, 1), (1, 3, 3), 64, 64)],
    full=[
        steps.Shape("most rows", (4095, 4096, 1), (1, 70, 3), 1024, 512),
        steps.Shape("most rows", (4095, 4096, 1), (1, 1500, 3), 1024, 512),
    ],
)
def test_as_many_rows_as_a_token_may_own(device, shape, dtype):
    step = steps.make_step(shape, dtype, device)
    plan = steps.plan_of(step)
    with steps.poisoned():
        y = table_attention(step.x, step.table, plan, tied=False)
    arguments = (step.x, step.keys, step.values, step.token_ids, step.offsets, step.dy)
    exact = reference.attention_by_token(*arguments)
    attainable = reference.attention_by_token(*arguments, operands=dtype)
    reference.assert_accepted(y, exact[0], attainable[0], "y")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_rows_and_misaligned_queries(device, dtype):
    step = steps.make_step(steps.QUICK[2], dtype, device)
    plan = steps.plan_of(step)
    y = l3ext.segmented_attention(step.x, step.keys, step.values, plan)
    wide = torch.full((len(step.table), 320), float("nan"), dtype=dtype, device=device)
    wide[:, 16:144], wide[:, 160:224] = step.keys, step.values
    strided = l3ext.segmented_attention(step.x, wide[:, 16:144], wide[:, 160:224], plan)
    assert torch.equal(strided, y)
    # Queries may come at any address: they are copied where the kernels cannot load them.
    for shift in (1, 3):
        x = torch.full((len(step.x), 131), float("nan"), dtype=dtype, device=device)
        x[:, shift : shift + 128] = step.x
        moved = l3ext.segmented_attention(x[:, shift : shift + 128], step.keys, step.values, plan)
        assert torch.equal(moved, y)
    by_columns = l3ext.segmented_attention(step.x.T.contiguous().T, step.keys, step.values, plan)
    assert torch.equal(by_columns, y)


@pytest.mark.parametrize("scale", [0.3, -2.0, 0.0])
def test_scale(device, scale):
    step = steps.make_step(steps.QUICK[3], torch.float32, device)
    x, table = step.x.requires_grad_(), step.table.requires_grad_()
    keys, values = table[:, :128], table[:, 128:]
    y = l3ext.segmented_attention(x, keys, values, steps.plan_of(step), scale)
    dx, dtable = torch.autograd.grad(y, [x, table], step.dy)
    arguments = (x.detach(), keys.detach(), values.detach(), step.token_ids, step.offsets, step.dy)
    exact = reference.attention_by_token(*arguments, scale)
    near = reference.attention_by_token(*arguments, scale, operands=torch.float32)
    reference.assert_accepted(y.detach(), exact[0], near[0], "y")
    reference.assert_accepted(dx, exact[1], near[1], "dx")
    both = torch.cat(exact[3:], 1), torch.cat(near[3:], 1)
    reference.assert_accepted(dtable[exact[2]], *both, "dtable")


@pytest.mark.parametrize("frozen", ["x", "table"])
def test_only_what_needs_a_gradient_is_computed(device, frozen):
    step = steps.make_step(steps.QUICK[3], torch.bfloat16, device)
    y, dx, dtable = steps.run(step)
    wanted = step.table if frozen == "x" else step.x
    wanted.requires_grad_()
    with steps.poisoned():
        out = l3ext.segmented_attention(step.x, step.keys, step.values, steps.plan_of(step))
        (gradient,) = torch.autograd.grad(out, [wanted], step.dy)
    assert torch.equal(out, y)
    steps.assert_near(gradient, dtable if frozen == "x" else dx, "gradient")
