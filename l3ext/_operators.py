"""What the torch operators share: their library, and how a call reaches the native kernels."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from l3ext import _C

library = torch.library.Library("l3ext", "DEF")
_Kernel = TypeVar("_Kernel", bound=Callable[..., Any])


def kernel(name: str) -> Callable[[_Kernel], _Kernel]:
    """Make a function the operator's kernel on the CPU and on CUDA alike."""

    def register(function: _Kernel) -> _Kernel:
        for key in ("CPU", "CUDA"):
            library.impl(name, function, key)
        return function

    return register


def call(operator: Callable[..., Any], inputs: Sequence[Tensor | None], *rest: Any) -> Any:
    """Run an operator; where no gradient can be asked for, past the step that would record one.

    That step is Python of torch's own, which dispatches a second time: more than what a decode
    step computes.

    Args:
        operator: to be called with ``*inputs, *rest``.
        inputs: all tensors that may require a gradient.
        rest: its other arguments.
    """
    recorded = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    if recorded or torch.compiler.is_compiling():
        return operator(*inputs, *rest)
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*inputs, *rest)


def detached(tensor: Tensor) -> Tensor:
    """``tensor.detach()``, which DLPack asks for, where that makes a difference."""
    return tensor.detach() if tensor.requires_grad else tensor


def queue(device: torch.device) -> tuple[int, Callable[[int], Tensor]]:
    """Where native work on ``device`` goes: the current stream, and who allocates workspaces.

    A workspace may be freed as soon as the call returns: torch hands its memory out again in the
    order of the stream. Inside a graph capture it comes from the graph's own pool.
    """
    return current_stream(device), functools.partial(_workspace, device)


def current_stream(device: torch.device) -> int:
    """The current stream's handle; 0 on the CPU, which has none."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def _workspace(device: torch.device, size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, device=device)


def check_device(device: torch.device, argument: str) -> None:
    """RuntimeError unless this build computes on ``device``."""
    known = ("cpu", "cuda") if _C.has_cuda else ("cpu",)
    if device.type not in (*known, "meta"):
        raise RuntimeError(
            f"{argument}: expected {' or '.join(known)}, got {device}: this build has no kernels "
            "for that device"
        )
