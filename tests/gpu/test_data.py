"""What the data may hold: NaN beside our rows, extreme logits, ids of no token."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import l3ext
from tests import reference
from tests.gpu import steps

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
#: Big enough that neighbours in one tile belong to other tokens.
BESIDE = [
    steps.Shape("beside", (3, 9, 17, 5, 33, 64, 1, 2), (0, 40, 0, 9, 0, 70, 0, 3)),
    steps.Shape("beside decode", (3, 300, 17, 5, 33, 64, 1, 2), (0, 4, 0, 1, 0, 2, 0, 3)),
]
WIDER = [dataclasses.replace(shape, d_in=2048, d_emb=1024) for shape in BESIDE]
#: More than the decode kernels take, so that the others run too.
MANY = [dataclasses.replace(BESIDE[0], queries=(0, 400, 0, 90, 0, 700, 0, 30))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@steps.on_devices(quick=BESIDE, full=WIDER + MANY)
def test_nan_in_rows_of_others_does_not_leak(device, shape, dtype):
    step = steps.make_step(shape, dtype, device)
    clean = steps.run(step)
    table = step.table.clone()
    for token, queries in enumerate(shape.queries):
        if queries == 0:
            table[step.offsets[token] : step.offsets[token + 1]] = float("nan")
    dirty = steps.run(dataclasses.replace(step, table=table))
    steps.assert_same_bits(clean, dirty)


def test_one_row_tokens_never_read_their_key(device):
    step = steps.make_step(steps.QUICK[4], torch.float32, device)
    step.table[:, :128] = float("nan")
    y, dx, dtable = steps.run(step)
    assert torch.equal(y, step.values[step.token_ids])
    assert torch.count_nonzero(dx) == 0
    assert torch.count_nonzero(dtable[:, :128]) == 0
    assert torch.isfinite(dtable).all()


@pytest.mark.parametrize("factor", [1e4, -1e4, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@steps.on_devices(
    quick=[steps.Shape("logits", (4, 9, 30, 65), (3, 70, 9, 1))],
    full=[steps.Shape("logits", (4, 9, 30, 65), (300, 700, 90, 100))],
)
def test_extreme_and_equal_logits(device, shape, dtype, factor):
    step = steps.make_step(shape, dtype, device)
    step.table[:, :128] *= factor
    y, dx, dtable = steps.run(step)
    exact, *_ = reference.attention_by_token(
        step.x, step.keys, step.values, step.token_ids, step.offsets, step.dy
    )
    # With logits of 1e4 a float32 logit is off by 1e-3 to 1e-2: a factor on the weights.
    allowed = 0.02 / reference.TOLERANCE[dtype] if factor else 1
    reference.assert_close(y, exact, f"y at {factor}", factor=allowed)
    assert torch.isfinite(dx).all()
    assert torch.isfinite(dtable).all()


@pytest.mark.parametrize("positions", [3, 2000])
def test_infinite_and_nan_scores_behave_as_the_definition(device, positions):
    ids = torch.zeros(positions, dtype=torch.int64, device=device)
    step = steps.make_step_of(ids, (6,), 64, 64, torch.float32)
    step.x.abs_().add_(0.1)
    step.table[2, :64] = float("-inf")  # weight exactly 0
    plan = steps.plan_of(step)
    y = l3ext.segmented_attention(step.x, step.keys, step.values, plan)
    exact, *_ = reference.attention_by_token(
        step.x, step.keys, step.values, ids, step.offsets, step.dy
    )
    reference.assert_close(y, exact, "y", factor=2)
    step.table[2, :64] = float("nan")
    assert torch.isnan(l3ext.segmented_attention(step.x, step.keys, step.values, plan)).all()


def test_a_token_without_rows_yields_zero(device):
    for count in (4, 4000):
        ids = torch.tensor([1, 0, 1, 2], device=device).repeat(count // 4)
        step = steps.make_step_of(ids, (2, 0, 3), 64, 64, torch.bfloat16)
        with steps.poisoned():
            y, dx, _ = steps.run(step)
        assert torch.count_nonzero(y[ids == 1]) == 0
        assert torch.count_nonzero(dx[ids == 1]) == 0
        assert torch.isfinite(y).all()


@pytest.mark.parametrize("device", ["cuda"], indirect=True)
@pytest.mark.parametrize("bad", [2, -1, 2**31, -(2**40)])
@pytest.mark.parametrize("count", [5, 3000])
def test_an_id_of_no_token_makes_nan_there_alone(device, bad, count):
    ids = torch.arange(count, device=device) % 2
    clean = steps.make_step_of(ids, (4, 70), 128, 64, torch.bfloat16)
    y, dx, _ = steps.run(clean)
    ids = ids.clone()
    ids[[3, 4]] = bad
    step = dataclasses.replace(clean, token_ids=ids)
    plan = steps.plan_of(step)
    got, got_dx, got_dtable = steps.run(step, plan)
    good = torch.ones(count, dtype=torch.bool, device=device)
    good[[3, 4]] = False
    assert torch.isnan(got[~good]).all()
    assert not (got_dx[~good] > 0).any() | (got_dx[~good] < 0).any()  # zero or NaN
    steps.assert_near(got[good], y[good], "y")
    steps.assert_near(got_dx[good], dx[good], "dx")
    assert torch.isfinite(got_dtable).all()
    with pytest.raises(ValueError, match=r"expected ids in the vocabulary .* at position 3"):
        plan.check()


@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_more_rows_than_promised_make_nan_and_touch_nothing(device):
    step = steps.make_step(steps.QUICK[2], torch.bfloat16, device)
    plan = l3ext.plan(step.token_ids, step.offsets, max_rows=64)
    y, _, _ = steps.run(step, plan)
    promised = torch.diff(step.offsets)[step.token_ids] <= 64
    assert torch.isnan(y[~promised]).all()
    steps.assert_near(y[promised], steps.run(step)[0][promised], "y")
    with pytest.raises(ValueError, match="max_rows: expected at least 200"):
        plan.check()
