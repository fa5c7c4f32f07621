"""What a user without l3ext would write: the same attention out of torch's own parts.

Every peer takes the step (x [N, d_in], token_ids [N], offsets [V+1], table [v, d_in + d_emb]) and
returns y [N, d_emb]. What depends on the ids alone (sorting, masks) is inside, as it is in ours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def padded_gather(
    x: Tensor, token_ids: Tensor, offsets: Tensor, table: Tensor, chunk: int = 64
) -> Tensor:
    """Gather every position's rows, padded to the longest, and multiply in batches."""
    d_in = x.shape[1]
    begin, count = offsets[token_ids], offsets[token_ids + 1] - offsets[token_ids]
    outputs = []
    for i in range(0, x.shape[0], chunk):  # all positions at once would not fit in memory
        start, length = begin[i : i + chunk], count[i : i + chunk]
        slots = torch.arange(int(length.max()))
        used = slots < length[:, None]
        rows = table[torch.where(used, start[:, None] + slots, start[:, None])]
        scores = torch.bmm(rows[..., :d_in], x[i : i + chunk, :, None])[..., 0].float()
        weights = torch.softmax(scores.masked_fill(~used, float("-inf")), dim=-1).to(x.dtype)
        outputs.append(torch.bmm(weights[:, None], rows[..., d_in:])[:, 0])
    return torch.cat(outputs)


def _sorted_step(
    token_ids: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Order of the positions; distinct tokens, their query counts, first rows and row counts."""
    ordered, order = torch.sort(token_ids, stable=True)
    tokens, queries = torch.unique_consecutive(ordered, return_counts=True)
    return order, tokens, queries, offsets[tokens], offsets[tokens + 1] - offsets[tokens]


def masked_blocks(
    x: Tensor, token_ids: Tensor, offsets: Tensor, table: Tensor, block: int = 512
) -> Tensor:
    """Blocks of 512 sorted positions, dense over the union of their rows, masked."""
    d_in = x.shape[1]
    order = torch.argsort(token_ids, stable=True)
    y = x.new_empty(x.shape[0], table.shape[1] - d_in)
    for i in range(0, x.shape[0], block):
        positions = order[i : i + block]
        tokens = token_ids[positions]
        distinct = torch.unique_consecutive(tokens)
        counts = offsets[distinct + 1] - offsets[distinct]
        owner = torch.repeat_interleave(distinct, counts)
        first = torch.repeat_interleave(offsets[distinct] - (counts.cumsum(0) - counts), counts)
        rows = table[first + torch.arange(owner.shape[0])]
        scores = (x[positions] @ rows[:, :d_in].T).float()
        scores.masked_fill_(tokens[:, None] != owner, float("-inf"))
        y[positions] = torch.softmax(scores, dim=-1).to(x.dtype) @ rows[:, d_in:]
    return y


def segment_loop(x: Tensor, token_ids: Tensor, offsets: Tensor, table: Tensor) -> Tensor:
    """A matrix product per distinct token."""
    d_in = x.shape[1]
    order, _, queries, first, count = _sorted_step(token_ids, offsets)
    sorted_x = x[order]
    sorted_y = x.new_empty(x.shape[0], table.shape[1] - d_in)
    q = 0
    for m, r, d in zip(queries.tolist(), first.tolist(), count.tolist(), strict=True):
        rows = table[r : r + d]
        scores = (sorted_x[q : q + m] @ rows[:, :d_in].T).float()
        torch.mm(torch.softmax(scores, dim=-1).to(x.dtype), rows[:, d_in:], out=sorted_y[q : q + m])
        q += m
    y = torch.empty_like(sorted_y)
    y[order] = sorted_y
    return y


def flex_attention() -> Callable[..., Tensor]:
    """FlexAttention, compiled: sorted queries over the gathered rows, a block mask by owner."""
    from torch.nn.attention.flex_attention import create_block_mask
    from torch.nn.attention.flex_attention import flex_attention as flex

    # Shapes are fixed at compile time: the compiler's code for dynamic ones does not build (torch
    # 2.13). Rows are padded to a multiple that most steps share.
    compiled: Any = torch.compile(flex, dynamic=False)
    granule = 16384

    def run(x: Tensor, token_ids: Tensor, offsets: Tensor, table: Tensor) -> Tensor:
        d_in = x.shape[1]
        order, tokens, _, first, count = _sorted_step(token_ids, offsets)
        used = int(count.sum())
        padded = -(-used // granule) * granule
        owner = torch.full((padded,), -1)
        owner[:used] = torch.repeat_interleave(tokens, count)
        row = torch.zeros(padded, dtype=torch.int64)
        start = torch.repeat_interleave(first - (count.cumsum(0) - count), count)
        row[:used] = start + torch.arange(used)
        rows = table[row]
        query_token = token_ids[order]

        def same_token(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
            return query_token[q] == owner[kv]

        mask = create_block_mask(
            same_token, None, None, x.shape[0], padded, device="cpu", BLOCK_SIZE=128
        )
        sorted_y = compiled(
            x[order][None, None],
            rows[None, None, :, :d_in],
            rows[None, None, :, d_in:],
            block_mask=mask,
            scale=1.0,
        )[0, 0]
        y = torch.empty_like(sorted_y)
        y[order] = sorted_y
        return y

    return run
