"""The benchmark runs on the device as on the CPU: clock, floors, graphs, peers."""

from __future__ import annotations

import pytest
import torch

from l3ext.bench import attention, timing
from l3ext.bench.workload import from_zipf

# Of those that need no compiler.
PEERS = ("padded gather", "loop of mm")


def test_every_regime_is_measured(device):
    workload = from_zipf(num_tokens=2000, vocab_size=60, total_rows=300, max_rows=32)
    options = attention.Options(
        device=device,
        dtype=torch.bfloat16,
        d_in=64,
        d_emb=64,
        num_tokens=(70, 1500),
        batches=(1, 8),
        peers=PEERS,
        runs=4,
        gemm_size=64,
        copy_bytes=1 << 20,
    )
    result = attention.run(workload, options)
    assert result["machine"].get("gpu", "") != "" or device.type == "cpu"
    assert [m["regime"] for m in result["measurements"]] == [
        *("forward", "forward", "backward", "backward", "decode", "decode", "plan", "plan")
    ]
    together = "in a graph" if device.type == "cuda" else "back to back"
    for measurement in result["measurements"]:
        assert measurement["failures"] == {}
        for row in measurement["results"].values():
            assert 0 < row["p10"] <= row["median"] <= row["p90"]
            assert row.get("difference", 0) < 5e-2
        if measurement["regime"] == "decode":
            assert f"l3ext, {together}" in measurement["results"]


@pytest.mark.parametrize("ahead", [True, False])
def test_a_clock_sees_the_work(device, ahead):
    if device.type == "cpu":
        pytest.skip("the CPU's clock has its own test")
    clock = timing.clock_of(device)
    small, large = (torch.randn(n, n, device=device) for n in (64, 4096))
    for matrix in (small, large):  # what a first call loads
        clock.measure(lambda matrix=matrix: matrix @ matrix)
    assert (
        0
        < clock.measure(lambda: small @ small, ahead=ahead)
        < clock.measure(lambda: large @ large, ahead=ahead)
        < 1
    )


def test_a_captured_function_runs_again(device):
    count = torch.zeros(1, device=device)
    again = timing.captured(lambda: count.add_(1), device)
    before = int(count)
    for _ in range(3):
        again()
    assert int(count) == before + 3
