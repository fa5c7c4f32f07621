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


def attention_by_token(x, keys, values, token_ids, offsets, dy, scale=1.0, operands=None):
    """Outputs and gradients from the definition, one token after the other, where the inputs lie.

    Args:
        operands: None: float64 throughout. A dtype: as a matrix unit does it at best, products of
            operands in that dtype summed in float32, and the results rounded to it.

    Returns:
        y [N, d_emb], dx [N, d_in], the rows that the step touches [R], ascending, and their
        gradients dkeys [R, d_in], dvalues [R, d_emb]; zero is the gradient of all others.
    """
    sums = torch.float64 if operands is None else torch.float32

    def operand(tensor):
        return tensor.to(sums) if operands is None else tensor.to(operands).to(sums)

    order = torch.argsort(token_ids, stable=True)
    tokens, counts = torch.unique_consecutive(token_ids[order], return_counts=True)
    y = torch.zeros(len(x), values.shape[1], dtype=sums, device=x.device)
    dx = torch.zeros(x.shape, dtype=sums, device=x.device)
    rows, dkeys, dvalues = [], [], []
    begins, ends = offsets[tokens].tolist(), offsets[tokens + 1].tolist()
    for positions, begin, end in zip(order.split(counts.tolist()), begins, ends, strict=True):
        q, upstream = operand(x[positions]), operand(dy[positions])
        k, v = operand(keys[begin:end]), operand(values[begin:end])
        p = torch.softmax(scale * (q @ k.T), dim=-1)
        y[positions] = operand(p) @ v
        dp = upstream @ v.T
        ds = operand(scale * p * (dp - (p * dp).sum(-1, keepdim=True)))
        dx[positions] = ds @ k
        rows.append(torch.arange(begin, end, device=x.device))
        dkeys.append(ds.T @ q)
        dvalues.append(operand(p).T @ upstream)
    touched = torch.cat([torch.empty(0, dtype=torch.int64, device=x.device), *rows])
    dk = torch.cat([x.new_empty(0, x.shape[1], dtype=sums), *dkeys])
    dv = torch.cat([x.new_empty(0, values.shape[1], dtype=sums), *dvalues])
    if operands is not None:
        y, dx, dk, dv = (tensor.to(operands) for tensor in (y, dx, dk, dv))
    return y, dx, touched, dk, dv


def assert_accepted(actual, exact, attainable, what):
    """At most twice the error that the same arithmetic makes in torch, and the same direction.

    Args:
        actual: the result.
        exact: in float64.
        attainable: what torch makes of the same inputs, see :func:`attention_by_token`.
        what: named in a failure.
    """
    assert actual.shape == exact.shape, f"{what}: {actual.shape} against {exact.shape}"
    if actual.numel() == 0:
        return
    assert torch.isfinite(actual).all(), f"{what}: not finite"
    error = (actual.double() - exact).abs().max().item()
    theirs = (attainable.double() - exact).abs().max().item()
    # Where torch happens to make next to none, what rounding the result alone may make.
    budget = max(2 * theirs, TOLERANCE[actual.dtype] * exact.abs().max().item())
    assert error <= budget, (
        f"{what}: error {error:.3e} is {error / max(budget, 1e-300):.1f} budgets"
    )
    norm = exact.norm().item()
    if norm > 0 and error > 0:
        cosine = (actual.double() * exact).sum().item() / (actual.double().norm().item() * norm)
        assert cosine >= 1 - 1e-4, f"{what}: cosine {cosine:.6f}"
