"""What CUDA may answer with the end of a capture, or of the device in this process: to run last."""

from __future__ import annotations

import pytest
import torch

from tests.gpu.test_graphs import Tables


@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_a_runtime_that_is_freed_inside_a_capture(device):
    """As the garbage collector may do it."""
    tables = Tables(device, torch.bfloat16)
    tables.step(8)[2]()
    a, graph = torch.ones(8, device=device), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        b = a + 1
        tables.runtime.close()
        b = b * 2
    a.fill_(2)
    graph.replay()
    assert torch.equal(b, torch.full_like(b, 6))
