"""Row gradients as touched rows, and rows behind addresses."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import l3ext
from l3ext.ops import directory_attention, table_attention
from tests.gpu import steps

DTYPES = [torch.bfloat16, torch.float32]
SPARSE = [*steps.QUICK, dataclasses.replace(steps.QUICK[5], queries=(1, 0) * 100)]
FULL = [
    steps.Shape("edges", **steps.SOME_EDGES, d_in=2048, d_emb=1024),
    steps.Shape("edges", **steps.SOME_EDGES, d_in=1024, d_emb=1024, tied=True),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@steps.on_devices(quick=SPARSE, full=FULL)
def test_sparse_gradients_are_the_dense_ones(device, shape, dtype):
    step = steps.make_step(shape, dtype, device)
    y, dx, dense = steps.run(step)
    with steps.poisoned():
        sparse_y, sparse_dx, sparse = steps.run(step, sparse=True)
    steps.assert_same_bits((sparse_y, sparse_dx), (y, dx))
    assert sparse.layout == torch.sparse_coo
    assert sparse.shape == dense.shape
    assert sparse.is_coalesced()
    rows = sparse._indices()[0]
    assert (torch.diff(rows) > 0).all()
    touched = torch.zeros(len(dense), dtype=torch.bool, device=device)
    for token in step.token_ids.unique().tolist():
        touched[step.offsets[token] : step.offsets[token + 1]] = True
    assert torch.equal(rows, touched.nonzero().flatten())
    assert torch.equal(sparse._values(), dense[rows])


def test_sparse_gradients_of_separate_keys_and_values(device):
    step = steps.make_step(steps.QUICK[2], torch.float32, device)
    _, _, dense = steps.run(step)
    keys, values = step.keys.clone().requires_grad_(), step.values.clone().requires_grad_()
    y = l3ext.segmented_attention(step.x, keys, values, steps.plan_of(step), sparse=True)
    dkeys, dvalues = torch.autograd.grad(y, [keys, values], step.dy)
    assert torch.equal(torch.cat([dkeys.to_dense(), dvalues.to_dense()], 1), dense)


def test_gradients_of_two_steps_add_up(device):
    table = steps.make_step(steps.QUICK[2], torch.float32, device).table.requires_grad_()
    dense = torch.zeros_like(table)
    for seed in (1, 2):
        step = dataclasses.replace(
            steps.make_step(steps.QUICK[2], torch.float32, device, seed), table=table.detach()
        )
        dense += steps.run(step)[2]
        y = table_attention(step.x, table, steps.plan_of(step), tied=False, sparse=True)
        y.backward(step.dy)
    assert table.grad.is_sparse
    torch.testing.assert_close(table.grad.to_dense(), dense)


def directory_of(step, device):
    """(directory, rows kept alive): every token's rows in a block of their own."""
    blocks = [
        step.table[begin:end].clone()
        for begin, end in zip(step.offsets[:-1].tolist(), step.offsets[1:].tolist(), strict=True)
    ]
    addresses = [block.data_ptr() if block.numel() else 0 for block in blocks]
    return torch.tensor(addresses, device=device), blocks


def attend(step, directory, **changes):
    width = step.table.shape[1]
    options = {
        "d_emb": step.values.shape[1],
        "row_stride": width,
        "value_offset": 0 if step.tied else step.d_in,
    }
    return directory_attention(step.x, directory, steps.plan_of(step), **(options | changes))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@steps.on_devices(quick=steps.QUICK, full=FULL + steps.DECODE)
def test_rows_behind_addresses_are_the_table_s(device, shape, dtype):
    step = steps.make_step(shape, dtype, device)
    directory, blocks = directory_of(step, device)
    with steps.poisoned():
        y = attend(step, directory)
    assert torch.equal(y, steps.run(step)[0])
    assert len(blocks) == len(directory)


def test_rows_may_be_wider_than_what_is_read(device):
    step = steps.make_step(steps.QUICK[2], torch.float32, device)
    wide = torch.full((len(step.table), 320), float("nan"), device=device)
    wide[:, 16:144], wide[:, 208:272] = step.keys, step.values
    directory = wide.data_ptr() + 4 * (16 + 320 * step.offsets[:-1])
    y = attend(step, directory, row_stride=320, value_offset=192)
    assert torch.equal(y, steps.run(step)[0])


def test_a_token_without_an_address(device):
    step = steps.make_step(steps.QUICK[2], torch.bfloat16, device)
    directory, _blocks = directory_of(step, device)
    directory[4] = 0
    if device.type == "cpu":
        with pytest.raises(ValueError, match="expected the address of the rows of token 4, got 0"):
            attend(step, directory)
        return
    y = attend(step, directory)
    assert torch.isnan(y[step.token_ids == 4]).all()
    others = step.token_ids != 4
    assert torch.equal(y[others], steps.run(step)[0][others])
