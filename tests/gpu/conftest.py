"""The same checks on the CPU, small, and on CUDA, where there is one.

``device`` is a parameter of every test here; its CUDA half says why it is skipped, if it is.
"""

from __future__ import annotations

import pytest
import torch

import l3ext


def _why_no_cuda() -> str | None:
    if not torch.cuda.is_available():
        return "no CUDA device that torch can reach"
    if not l3ext.has_cuda:
        return "l3ext was built without CUDA"
    return None


def pytest_runtest_logreport(report):
    """Failures at once: where a later test hangs or crashes, the process ends without a summary."""
    if report.failed:
        print(f"\n{report.longreprtext}", flush=True)


@pytest.fixture(params=["cpu", "cuda"])
def device(request):
    """Where a test runs; tests give their own list of parameters to ask for one alone."""
    reason = _why_no_cuda() if request.param == "cuda" else None
    if reason is not None:
        pytest.skip(reason)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # steps this small would only wait for a second one
    yield torch.device(request.param)
    torch.set_num_threads(threads)
    if request.param == "cuda":
        torch.cuda.synchronize()  # an error on the device is of the test that made it
