"""Plans: made on the device, made by a data loader, moved, checked."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.utils.data import DataLoader

import l3ext
from tests.gpu import steps

FIELDS = [field.name for field in dataclasses.fields(l3ext.Plan)]


def assert_same_plan(plan, other):
    for name in FIELDS:
        a, b = getattr(plan, name), getattr(other, name)
        assert a == b if name == "max_rows" else torch.equal(a, b), name


def ids_of(kind, vocab, count):
    if kind == "zipf":
        return steps.zipf_ids(vocab, count, "cpu")
    if kind == "one":
        return torch.full((count,), vocab - 1)
    return torch.arange(count).flip(0) % vocab


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("kind", ["zipf", "one", "distinct"])
@pytest.mark.parametrize(
    ("device", "vocab", "count"),
    [
        *(("cpu", 1000, count) for count in (0, 1, 300, 2000)),
        *(("cuda", 9000, n) for n in (0, 1, 2, 31, 32, 33, 255, 257, 1024, 1025, 5000)),
        ("cuda", 180_000, 65_536),
        ("cuda", 1, 3000),
        ("cuda", 2_000_000, 20_000),
    ],
    indirect=["device"],
)
def test_a_host_plan_is_the_device_s(device, vocab, count, kind, dtype):
    ids = ids_of(kind, vocab, count).to(dtype)
    rows = steps.zipf_rows(vocab, 4 * vocab, 512)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), torch.from_numpy(rows).cumsum(0)])
    host = l3ext.plan(ids, offsets)
    with steps.poisoned():
        made_there = l3ext.plan(ids.to(device), offsets.to(device))
        moved = host.to(device)
    assert_same_plan(moved, made_there)
    # All but the schedule is the host's own plan.
    back = made_there.to("cpu")
    assert_same_plan(back, host)
    made_there.check()


def test_numpy_offsets_are_brought_to_the_ids(device):
    allocation = l3ext.Allocation.from_rows([1, 4, 2, 7])
    ids = torch.tensor([[3, 1], [3, 0]], device=device)
    plan = l3ext.plan(ids, allocation.offsets)
    assert plan.max_rows == 7
    assert plan.permutation.device == ids.device
    assert_same_plan(plan, l3ext.plan(ids, torch.tensor(allocation.offsets, device=device)))


def test_moved_rows_of_another_number_get_a_schedule_of_their_own(device):
    """Layers may grant other rows to the same tokens: one plan serves them by with_rows."""
    narrow, wide = (1, 2, 5, 1), (30, 1, 70, 9)
    ids = torch.tensor([0, 1, 2, 2, 3] * 400, device=device)
    step = steps.make_step_of(ids, wide, 128, 64, torch.bfloat16)
    plan = l3ext.plan(ids, torch.tensor([0, 1, 3, 8, 9], device=device))
    assert plan.max_rows == max(narrow)
    own = steps.plan_of(step)
    segment_rows = own.segment_rows.clone()
    moved = plan.with_rows(segment_rows, max_rows=max(wide))
    assert torch.equal(moved.schedule, own.schedule)
    steps.assert_same_bits(steps.run(step, moved), steps.run(step))


class Batches(torch.utils.data.Dataset):
    """Ids of a step and the plan that a worker makes of them."""

    offsets = torch.tensor([0, 1, 5, 7, 14])

    def __len__(self):
        return 3

    def __getitem__(self, index):
        ids = torch.arange(20).roll(index) % 4
        return {"ids": ids, "plan": l3ext.plan(ids, self.offsets)}


def test_a_data_loader_plans_and_pins(device):
    pinned = device.type == "cuda"
    loader = DataLoader(Batches(), batch_size=None, num_workers=1, pin_memory=pinned)
    for i, batch in enumerate(loader):
        plan = batch["plan"]
        assert plan.permutation.is_pinned() == pinned
        ids = torch.arange(20).roll(i) % 4
        expected = l3ext.plan(ids.to(device), Batches.offsets.to(device))
        assert_same_plan(plan.to(device, non_blocking=True), expected)
