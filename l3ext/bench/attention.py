"""Segmented attention on real tokens, against what users write today and against the machine."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

import l3ext
from l3ext.allocation import Allocation
from l3ext.bench import machine, peers, timing

PEERS: dict[str, Callable[[], Callable[..., Tensor]]] = {
    "padded gather": lambda: peers.padded_gather,
    "masked 512-row blocks": lambda: peers.masked_blocks,
    "loop of mm": lambda: peers.segment_loop,
    "FlexAttention": peers.flex_attention,
}


@dataclasses.dataclass(frozen=True)
class Workload:
    """The shape of one benchmark and the token ids it draws its steps from."""

    tokens: np.ndarray  #: integer [T], a real token stream
    allocation: Allocation
    num_tokens: int = 4096
    d_in: int = 1024
    d_emb: int = 512

    def steps(self, count: int) -> list[Tensor]:
        """``count`` steps of ``num_tokens`` ids, evenly spaced over the stream."""
        last = self.tokens.shape[0] - self.num_tokens
        if last < 0:
            raise ValueError(
                f"tokens: expected {self.num_tokens} or more for one step, "
                f"got {self.tokens.shape[0]}"
            )
        starts = np.linspace(0, last, count).astype(int)
        return [
            torch.from_numpy(self.tokens[i : i + self.num_tokens].astype(np.int64)) for i in starts
        ]


def floor_seconds(
    step: Tensor, offsets: Tensor, workload: Workload, itemsize: int, bandwidth: float, gemm: float
) -> tuple[float, float]:
    """Least seconds of a forward by bytes and by flops: the step's floor is the larger.

    Bytes: every distinct token's rows, x and y once. Flops: two for each product of a query's or
    weight's element with a row's.
    """
    count = offsets[step + 1] - offsets[step]
    distinct = step.unique()
    rows = int((offsets[distinct + 1] - offsets[distinct]).sum())
    width = workload.d_in + workload.d_emb
    moved = (rows + step.numel()) * width * itemsize
    return moved / bandwidth, 2 * int(count.sum()) * width / gemm


def _call_peer(
    function: Callable[..., Tensor], x: Tensor, offsets: Tensor, table: Tensor, step: Tensor
) -> Tensor:
    return function(x, step, offsets, table)


def run(
    workload: Workload,
    dtype: torch.dtype,
    *,
    peer_names: list[str],
    runs: int = 9,
    budget_seconds: float = 120.0,
    num_steps: int = 5,
) -> dict[str, Any]:
    """Time ours and the named peers on the same steps; outputs are compared before timing.

    Returns:
        ``floor`` (seconds, by bytes and by flops), ``bandwidth`` (bytes/s), ``gemm`` (flop/s) and
        ``results``: name to median, p10, p90 (seconds), ``floors`` (multiple of the floor) and
        ``difference`` (largest from ours, over the largest output); ``failures``: name to reason of
        the peers that did not run.
    """
    generator = torch.Generator().manual_seed(0)
    width = workload.d_in + workload.d_emb
    offsets = torch.tensor(workload.allocation.offsets)
    table = torch.empty(workload.allocation.total_rows, width, dtype=dtype)
    for part in table.split(4096):  # drawn in float32, by parts: no second copy of the table
        part.copy_(torch.randn(part.shape, generator=generator) * 0.03)
    x = torch.randn(workload.num_tokens, workload.d_in, generator=generator).to(dtype)
    steps = workload.steps(num_steps)

    def ours(step: Tensor) -> Tensor:
        plan = l3ext.plan(step, offsets)
        return l3ext.segmented_attention(
            x, table[:, : workload.d_in], table[:, workload.d_in :], plan
        )

    def with_run_number(function: Callable[[Tensor], object]) -> Callable[[int], object]:
        return lambda run_number: function(steps[run_number % num_steps])

    candidates = {"l3ext": with_run_number(ours)}
    differences = {"l3ext": 0.0}
    failures = {}
    for name in peer_names:
        peer = functools.partial(_call_peer, PEERS[name](), x, offsets, table)
        try:  # every step once: what a peer compiles per shape is not timed
            outputs = [peer(step) for step in steps]
        except Exception as error:  # a peer that this torch cannot compile is a result too
            failures[name] = str(error).strip().split("\n")[0][:200]
            continue
        expected = ours(steps[0]).float()
        difference = (outputs[0].float() - expected).abs().max()
        differences[name] = float(difference / expected.abs().max())
        candidates[name] = with_run_number(peer)
    candidates["plan alone"] = with_run_number(lambda step: l3ext.plan(step, offsets))

    bandwidth, gemm = timing.read_bandwidth(), timing.gemm_rate(dtype)
    timings = timing.time_interleaved(candidates, runs=runs, budget_seconds=budget_seconds)
    floors = [
        floor_seconds(step, offsets, workload, table.itemsize, bandwidth, gemm) for step in steps
    ]
    by_bytes, by_flops = (float(np.median(part)) for part in zip(*floors, strict=True))
    floor = max(by_bytes, by_flops)
    return {
        "machine": machine.describe(),
        "dtype": str(dtype).removeprefix("torch."),
        "num_tokens": workload.num_tokens,
        "d_in": workload.d_in,
        "d_emb": workload.d_emb,
        "table_rows": workload.allocation.total_rows,
        "table_bytes": table.numel() * table.itemsize,
        "bandwidth": bandwidth,
        "gemm": gemm,
        "floor": {"bytes": by_bytes, "flops": by_flops},
        "results": {
            name: {
                **dataclasses.asdict(result),
                "floors": result.median / floor,
                **({"difference": differences[name]} if name in differences else {}),
            }
            for name, result in timings.items()
        },
        "failures": failures,
    }
