"""Plain float64 references, written from the definition, and what differs from them at most."""

from __future__ import annotations

import mmap

import numpy as np
import torch

# Largest |error| over the largest |reference|, per dtype of the inputs. Sums are float32 or better
# everywhere; the bound is set by rounding the result (and the operand x) to the dtype.
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 2e-6,
    torch.bfloat16: 6e-3,
    torch.float16: 8e-4,
}


def segmented_attention(x, keys, values, token_ids, offsets, scale=1.0):
    """[N, d_emb] in float64 with autograd; one position after the other."""
    outputs = []
    for i, token in enumerate(token_ids.reshape(-1).tolist()):
        rows = slice(int(offsets[token]), int(offsets[token + 1]))
        weights = torch.softmax(scale * (keys[rows] @ x[i]), dim=0)
        outputs.append(weights @ values[rows])
    if not outputs:
        return x.new_zeros(0, values.shape[1])
    return torch.stack(outputs)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, what: str, factor: float = 1.0):
    """Fail with the error as a share of its budget."""
    assert actual.shape == expected.shape, f"{what}: {actual.shape} against {expected.shape}"
    if actual.numel() == 0:
        return
    assert torch.isfinite(actual).all(), f"{what}: not finite"
    error = (actual.double() - expected.double()).abs().max().item()
    budget = factor * TOLERANCE[actual.dtype] * max(expected.abs().max().item(), 1e-30)
    assert error <= budget, f"{what}: error {error:.3e} is {error / budget:.1f} of its budget"


def make_step(rows, num_tokens, d_in, d_emb, dtype, seed=0, tied=False):
    """Random inputs: (x, table, offsets, token_ids); the table is [sum(rows), d_in + d_emb]."""
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.from_numpy(np.concatenate([[0], np.cumsum(rows)]).astype(np.int64))
    width = d_in if tied else d_in + d_emb
    table = torch.randn(int(offsets[-1]), width, generator=generator, dtype=torch.float64)
    table[:, :d_in] /= d_in**0.5
    x = torch.randn(num_tokens, d_in, generator=generator, dtype=torch.float64)
    token_ids = torch.randint(0, len(rows), (num_tokens,), generator=generator)
    return x.to(dtype), table.to(dtype), offsets, token_ids


def untouched_zeros(rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """A [rows, width] tensor of zeros of which only the touched pages take memory."""
    no_reserve = 0x4000  # MAP_NORESERVE: no promise of memory that a small machine would refuse
    memory = mmap.mmap(-1, rows * width * dtype.itemsize, flags=mmap.MAP_PRIVATE | no_reserve)
    return torch.frombuffer(memory, dtype=dtype).view(rows, width)
