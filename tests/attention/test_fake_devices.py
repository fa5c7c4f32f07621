"""Where tensors may lie, as torch sees it: fake tensors lie on CUDA without one."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import l3ext
from l3ext import _C
from l3ext.ops import directory_attention, table_attention


@pytest.fixture
def fake_cuda(monkeypatch):
    """A build that has CUDA, and tensors that lie there but hold nothing."""
    monkeypatch.setattr(_C, "has_cuda", True)
    with FakeTensorMode():
        yield torch.device("cuda", 0)


def test_the_plan_of_a_device_has_a_schedule(fake_cuda):
    ids = torch.zeros(5, dtype=torch.int64, device=fake_cuda)
    offsets = torch.zeros(9, dtype=torch.int64, device=fake_cuda)
    plan = l3ext.plan(ids, offsets, max_rows=7)
    assert plan.schedule.shape == (16 + 7 * 5,)
    assert plan.max_rows == 7
    assert {array.device for array in plan._arrays()[:-1]} == {fake_cuda}


def test_a_host_plan_moves(fake_cuda):
    ids, offsets = torch.zeros(5, dtype=torch.int64), torch.zeros(9, dtype=torch.int64)
    host = l3ext.plan(ids, offsets, max_rows=7)
    assert host.schedule.shape == (0,)
    plan = host.to("cuda:0", non_blocking=True)
    assert plan.schedule.shape == (16 + 7 * 5,)
    assert {array.device for array in plan._arrays()[:-1]} == {fake_cuda}
    assert plan.with_rows(torch.zeros(5, 2, dtype=torch.int64, device=fake_cuda)).max_rows == 7
    assert plan.to("cpu").schedule.shape == (0,)
    with pytest.raises(ValueError, match="max_rows: a plan for cuda:0 must know it"):
        dataclasses.replace(host, max_rows=-1).to(fake_cuda)


@pytest.mark.parametrize("sparse", [False, True])
def test_attention_on_a_device_in_shapes(fake_cuda, sparse):
    ids = torch.zeros(5, dtype=torch.int64, device=fake_cuda)
    plan = l3ext.plan(ids, torch.zeros(9, dtype=torch.int64, device=fake_cuda), max_rows=7)
    x, table = torch.zeros(5, 64, device=fake_cuda), torch.zeros(40, 192, device=fake_cuda)
    y = table_attention(x, table, plan, tied=False, sparse=sparse)
    assert y.shape == (5, 128)
    assert y.device == fake_cuda
    directory = torch.zeros(8, dtype=torch.int64, device=fake_cuda)
    y = directory_attention(x, directory, plan, d_emb=64, row_stride=128, value_offset=64)
    assert y.shape == (5, 64)


def test_float64_stays_on_the_cpu(fake_cuda):
    ids = torch.zeros(5, dtype=torch.int64, device=fake_cuda)
    plan = l3ext.plan(ids, torch.zeros(9, dtype=torch.int64, device=fake_cuda), max_rows=7)
    x = torch.zeros(5, 64, device=fake_cuda, dtype=torch.float64)
    with pytest.raises(TypeError, match="x: expected float32, bfloat16 or float16 on cuda:0"):
        l3ext.segmented_attention(x, x, x, plan)


def test_a_device_without_kernels():
    with FakeTensorMode():
        ids = torch.zeros(5, dtype=torch.int64, device="xpu")
        with pytest.raises(RuntimeError, match=r"token_ids: expected cpu.*, got xpu.*no kernels"):
            l3ext.plan(ids, torch.zeros(9, dtype=torch.int64))
    plan = l3ext.plan([0], torch.tensor([0, 1]))
    with pytest.raises(RuntimeError, match=r"device: expected cpu.*, got xpu: this build has no"):
        plan.to("xpu")


@pytest.mark.skipif(_C.has_cuda, reason="this build has CUDA")
def test_cuda_tensors_in_a_build_without_cuda():
    with FakeTensorMode():
        ids = torch.zeros(5, dtype=torch.int64, device="cuda")
        with pytest.raises(RuntimeError, match="token_ids: expected cpu, got cuda:0: this build"):
            l3ext.plan(ids, torch.zeros(9, dtype=torch.int64))
