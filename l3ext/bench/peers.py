"""What a user without l3ext would write: the same attention out of torch's own parts.

Every peer takes what is known before the step runs, its ids [N] and the offsets [V+1], and returns
``attend(x [N, d_in], table [v, d_in + d_emb]) -> y [N, d_emb]``: sorting, masks and row numbers are
made outside the measured time, as the plan is for l3ext. All are differentiable; where rows are
looked up, their gradient is torch's sparse one, of touched rows.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Attend = Callable[[Tensor, Tensor], Tensor]
Peer = Callable[[Tensor, Tensor], Attend]


def _lookup(table: Tensor, rows: Tensor) -> Tensor:
    """Rows of the table; the gradient is sparse where the table wants one."""
    return F.embedding(rows, table, sparse=table.requires_grad)


def _masked_softmax(scores: Tensor, used: Tensor, dtype: torch.dtype) -> Tensor:
    masked = scores.float().masked_fill(~used, float("-inf"))
    return torch.softmax(masked, dim=-1).to(dtype)


def _memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


class _SortedStep:
    """A step sorted by token id: the order, and each distinct token's queries and rows."""

    def __init__(self, token_ids: Tensor, offsets: Tensor) -> None:
        self.ids, self.order = torch.sort(token_ids, stable=True)
        self.inverse = torch.empty_like(self.order)
        self.inverse[self.order] = torch.arange(self.order.shape[0], device=token_ids.device)
        self.tokens, self.queries = torch.unique_consecutive(self.ids, return_counts=True)
        self.first = offsets[self.tokens]
        self.rows = offsets[self.tokens + 1] - self.first


def _row_numbers(first: Tensor, count: Tensor) -> Tensor:
    """first[0] .. first[0] + count[0], first[1] .. first[1] + count[1], and so on."""
    start = torch.repeat_interleave(first - (count.cumsum(0) - count), count)
    return start + torch.arange(start.shape[0], device=first.device)


def padded_gather(token_ids: Tensor, offsets: Tensor) -> Attend:
    """Gather every position's rows, padded to the longest, and multiply in batches."""
    first = offsets[token_ids]
    count = offsets[token_ids + 1] - first
    slots = torch.arange(int(count.max()), device=token_ids.device)
    used = slots < count[:, None]
    rows = torch.where(used, first[:, None] + slots, first[:, None])

    def attend(x: Tensor, table: Tensor) -> Tensor:
        d_in = x.shape[1]
        padded_bytes = slots.shape[0] * table.shape[1] * table.itemsize
        if x.requires_grad and padded_bytes * x.shape[0] > _memory_bytes(x.device) // 2:
            raise MemoryError(f"{padded_bytes * x.shape[0]} bytes of rows, kept for the gradient")
        chunk = max(1, (2 << 30) // padded_bytes)  # all positions at once would not fit either
        outputs = []
        for x_i, rows_i, used_i in zip(
            x.split(chunk), rows.split(chunk), used.split(chunk), strict=True
        ):
            gathered = _lookup(table, rows_i)
            scores = torch.bmm(gathered[..., :d_in], x_i[..., None])[..., 0]
            weights = _masked_softmax(scores, used_i, x.dtype)
            outputs.append(torch.bmm(weights[:, None], gathered[..., d_in:])[:, 0])
        return torch.cat(outputs)

    return attend


def _attend_block(x: Tensor, rows: Tensor, tokens: Tensor, owner: Tensor) -> Tensor:
    d_in = x.shape[1]
    weights = _masked_softmax(x @ rows[:, :d_in].T, tokens[:, None] == owner, x.dtype)
    return weights @ rows[:, d_in:]


def masked_blocks(compiled: bool = False, block: int = 512) -> Peer:
    """Blocks of 512 sorted positions, dense over the union of their rows, masked.

    This is how the paper's listing does it; ``compiled`` by torch.compile.
    """
    attend_block = torch.compile(_attend_block, dynamic=True) if compiled else _attend_block

    def prepare(token_ids: Tensor, offsets: Tensor) -> Attend:
        step = _SortedStep(token_ids, offsets)
        ids = step.ids.split(block)
        rows, owners = [], []
        for ids_i in ids:
            distinct = torch.unique_consecutive(ids_i)
            count = offsets[distinct + 1] - offsets[distinct]
            rows.append(_row_numbers(offsets[distinct], count))
            owners.append(torch.repeat_interleave(distinct, count))

        def attend(x: Tensor, table: Tensor) -> Tensor:
            outputs = [
                attend_block(x_i, _lookup(table, rows_i), ids_i, owner)
                for x_i, rows_i, ids_i, owner in zip(
                    x[step.order].split(block), rows, ids, owners, strict=True
                )
            ]
            return torch.cat(outputs)[step.inverse]

        return attend

    return prepare


def segment_loop(token_ids: Tensor, offsets: Tensor) -> Attend:
    """A matrix product per distinct token."""
    step = _SortedStep(token_ids, offsets)
    queries, first, count = (part.tolist() for part in (step.queries, step.first, step.rows))
    numbers = _row_numbers(step.first, step.rows)

    def attend(x: Tensor, table: Tensor) -> Tensor:
        d_in = x.shape[1]
        if table.requires_grad:  # a slice of the table itself would have a gradient of its size
            parts = _lookup(table, numbers).split(count)
        else:
            parts = tuple(table[r : r + d] for r, d in zip(first, count, strict=True))
        outputs = []
        for x_i, rows in zip(x[step.order].split(queries), parts, strict=True):
            weights = torch.softmax((x_i @ rows[:, :d_in].T).float(), dim=-1).to(x.dtype)
            outputs.append(weights @ rows[:, d_in:])
        return torch.cat(outputs)[step.inverse]

    return attend


def grouped_mm(token_ids: Tensor, offsets: Tensor) -> Attend:
    """torch's grouped matrix product: segments of like size together, rows padded to a power of 2.

    It takes groups that are ragged in the queries alone.
    """
    step = _SortedStep(token_ids, offsets)
    query_begin = step.queries.cumsum(0) - step.queries
    buckets = []
    limit = 8  # 16 bytes of weights in 16 bits, which the kernel asks for
    smaller = torch.zeros_like(step.rows, dtype=torch.bool)
    while not bool(smaller.all()):
        chosen = ((step.rows <= limit) & ~smaller).nonzero()[:, 0]
        smaller = step.rows <= limit
        if chosen.numel():
            slots = torch.arange(limit, device=token_ids.device)
            used = slots < step.rows[chosen, None]
            rows = torch.where(used, step.first[chosen, None] + slots, step.first[chosen, None])
            queries = step.queries[chosen]
            positions = step.order[_row_numbers(query_begin[chosen], queries)]
            ends = queries.cumsum(0).to(torch.int32)
            buckets.append((positions, rows, used.repeat_interleave(queries, 0), ends))
        limit *= 2
    inverse = torch.empty_like(step.order)
    inverse[torch.cat([bucket[0] for bucket in buckets])] = torch.arange(
        token_ids.shape[0], device=token_ids.device
    )

    def attend(x: Tensor, table: Tensor) -> Tensor:
        d_in = x.shape[1]
        outputs = []
        for positions, rows, used, ends in buckets:
            gathered = _lookup(table, rows)
            keys = gathered[..., :d_in].transpose(-2, -1)
            scores = torch._grouped_mm(x[positions], keys, offs=ends)
            weights = _masked_softmax(scores, used, x.dtype)
            outputs.append(torch._grouped_mm(weights, gathered[..., d_in:], offs=ends))
        return torch.cat(outputs)[inverse]

    return attend


@functools.cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention as flex

    # Shapes are fixed at compile time: the compiler's code for dynamic ones does not build (torch
    # 2.13). Rows are padded to a multiple that most steps share.
    return torch.compile(flex, dynamic=False)


def flex_attention(token_ids: Tensor, offsets: Tensor) -> Attend:
    """FlexAttention, compiled: sorted queries over the gathered rows, a block mask by owner."""
    from torch.nn.attention.flex_attention import create_block_mask

    step = _SortedStep(token_ids, offsets)
    device = token_ids.device
    granule = 16384
    used = int(step.rows.sum())
    padded = -(-used // granule) * granule
    owner = torch.full((padded,), -1, device=device)
    owner[:used] = torch.repeat_interleave(step.tokens, step.rows)
    rows = torch.zeros(padded, dtype=torch.int64, device=device)
    rows[:used] = _row_numbers(step.first, step.rows)

    def same_token(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return step.ids[q] == owner[kv]

    mask = create_block_mask(
        same_token,
        None,
        None,
        token_ids.shape[0],
        padded,
        device=str(device),
        BLOCK_SIZE=128,
        _compile=device.type == "cuda",  # else the whole mask is made first, N x rows
    )

    def attend(x: Tensor, table: Tensor) -> Tensor:
        d_in = x.shape[1]
        gathered = _lookup(table, rows)
        sorted_y = _compiled_flex()(
            x[step.order][None, None],
            gathered[None, None, :, :d_in],
            gathered[None, None, :, d_in:],
            block_mask=mask,
            scale=1.0,
        )[0, 0]
        return sorted_y[step.inverse]

    return attend


PEERS: dict[str, Peer] = {
    "padded gather": padded_gather,
    "masked 512-row blocks": masked_blocks(),
    "paper's listing compiled": masked_blocks(compiled=True),
    "grouped GEMM": grouped_mm,
    "loop of mm": segment_loop,
    "FlexAttention": flex_attention,
}
