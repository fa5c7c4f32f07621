"""What the torch operators share: their library, and how a call reaches the native kernels."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, is_grad_enabled
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.utils.dlpack import from_dlpack

from l3ext import _C

library = torch.library.Library("l3ext", "DEF")
#: Arguments of an operator that are a plan's: the fields of a Plan.
PLAN_LENGTH = 8
_Kernel = TypeVar("_Kernel", bound=Callable[..., Any])


def kernel(name: str, before: int | None = None) -> Callable[[_Kernel], _Kernel]:
    """Make a function the operator's kernel on the CPU and on CUDA alike.

    Args:
        name: of the operator.
        before: how many arguments precede those of a plan, which the function gets as one: a tuple,
            where :func:`computes_at_once` calls it with the Plan. None: there is no plan.
    """

    def register(function: _Kernel) -> _Kernel:
        def of_fields(*arguments: Any) -> Any:
            assert before is not None
            end = before + PLAN_LENGTH
            return function(*arguments[:before], arguments[before:end], *arguments[end:])

        for key in ("CPU", "CUDA"):
            library.impl(name, function if before is None else of_fields, key)
        return function

    return register


def computes_at_once(plan: Any, *inputs: Tensor) -> bool:
    """Whether an operator's kernel may be called with these and the plan, past torch.

    So nobody asks for a gradient, and torch would pass these very arguments on to the kernel: there
    is no mode (of fake tensors, of a tracer), transform (vmap), profiler or subclass of Tensor, and
    no backend but those that have kernels. The step that would record a gradient is Python of
    torch's own, and dispatches a second time; its dispatcher converts every argument twice.
    Together they take longer than what a decode step of one token computes.

    Args:
        plan: of the step.
        inputs: all tensors that may require a gradient.
    """
    if is_compiling():
        return False
    if _modes().raw_repr() not in _PLAIN_MODES or _profiler_enabled() or _function_mode_enabled():
        return False
    records = is_grad_enabled()
    for tensor in inputs:
        if _keys(tensor).raw_repr() not in _PLAIN_KEYS or (records and tensor.requires_grad):
            return False
    return plan._is_plain and forward_ad._current_level < 0


def dispatch(op: Callable[..., Any], inputs: Sequence[Tensor], *rest: Any) -> Any:
    """Run an operator where :func:`computes_at_once` is false.

    Past the step that would record a gradient where none can be asked for.

    Args:
        op: the operator, to be called with ``*inputs, *rest``.
        inputs: all tensors that may require a gradient.
        rest: its other arguments, a plan's tensors among them.
    """
    if is_compiling() or (is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)):
        return recorded(op, *inputs, *rest)
    if forward_ad._current_level >= 0 and any(map(_has_tangent, inputs)):
        _no_tangent(op)
    if torch._C._are_functorch_transforms_active():
        # A tensor within vmap does not say whether what it is a part of requires a gradient.
        return recorded(op, *inputs, *rest)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*inputs, *rest)


def recorded(op: Callable[..., Any], *arguments: Any) -> Any:
    """Run an operator so that its gradient is recorded, within ``torch.func.grad`` too.

    The step that would record one in torch is an autograd.Function of a make that torch.func
    refuses.
    """
    if is_compiling() or not torch._C._are_functorch_transforms_active():
        return op(*arguments)
    if torch._C._functorch.peek_interpreter_stack().key() == _FUNCTIONALIZE:
        return op(*arguments)  # it refuses any autograd.Function
    return _functions[op].apply(*arguments)


def register_derivative(
    name: str, backward: Callable[..., Any], setup_context: Callable[..., None] | None = None
) -> None:
    """``torch.library.register_autograd``, and the same for :func:`recorded`.

    An operator whose derivative calls others calls them by :func:`recorded`.
    """
    torch.library.register_autograd(
        f"l3ext::{name}", backward, setup_context=setup_context, lib=library
    )
    op = getattr(torch.ops.l3ext, name).default

    def nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        return None

    def no_tangent(ctx: Any, *tangents: Any) -> None:
        _no_tangent(op)

    methods = {
        "forward": op.__call__,
        "setup_context": setup_context or nothing,
        "backward": backward,
        "jvp": no_tangent,
    }
    _functions[op] = type(
        f"{name}_for_torch_func",
        (torch.autograd.Function,),
        {key: staticmethod(method) for key, method in methods.items()}
        | {"generate_vmap_rule": True},
    )


_functions: dict[Callable[..., Any], Any] = {}
_FUNCTIONALIZE = torch._C._functorch.TransformType.Functionalize


def _no_tangent(op: Callable[..., Any]) -> None:
    raise RuntimeError(f"{op}: expected no forward-mode derivative (jvp): there is none")


def _has_tangent(tensor: Tensor) -> bool:
    return forward_ad.unpack_dual(tensor).tangent is not None


# What torch dispatches on: the keys of its arguments, and those of what is in effect.
_keys, _modes = torch._C._dispatch_keys, torch._C._dispatch_tls_local_include_set
_profiler_enabled = torch._C._autograd._profiler_enabled
_function_mode_enabled = torch._C._is_torch_function_mode_enabled


def _key_set(*names: str) -> int:
    sets = (torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name)) for name in names)
    return functools.reduce(operator.or_, sets).raw_repr()


# In inference mode nothing has keys of autograd.
_PLAIN_MODES = {_key_set("BackendSelect"), _key_set("BackendSelect", "ADInplaceOrView")}
_PLAIN_KEYS = {
    _key_set(backend, f"Autocast{backend}", *of_autograd)
    for backend in ("CPU", "CUDA")
    for of_autograd in ((), (f"Autograd{backend}", "ADInplaceOrView"))
}


def detached(tensor: Tensor) -> Tensor:
    """``tensor.detach()``, which DLPack asks for, where that makes a difference."""
    return tensor.detach() if tensor.requires_grad else tensor


def empty_output(like: Tensor, rows: int, columns: int) -> Tensor:
    """``like.new_empty(rows, columns)``, in memory that is kept for the next step when it is freed.

    Fresh memory, a page at a time, takes longer than some of the work that is done there. Devices
    keep theirs anyway, and so does malloc() where it is small.
    """
    nbytes = rows * columns * like.element_size()
    if nbytes < _LARGE_BYTES or like.device != _HOST:
        return like.new_empty(rows, columns)
    memory = from_dlpack(_C.cached_memory(nbytes)).untyped_storage()
    return like.new_empty(0).set_(memory, 0, (rows, columns), (columns, 1))


# The C library's malloc() maps what is larger, and unmaps it when it is freed.
_LARGE_BYTES = 32 << 20


def queue(device: torch.device) -> tuple[int, Callable[[int], Tensor]]:
    """Where native work on ``device`` goes: the current stream, and who allocates workspaces.

    A workspace may be freed as soon as the call returns: torch hands its memory out again in the
    order of the stream. Inside a graph capture it comes from the graph's own pool.
    """
    if device == _HOST:
        return _HOST_QUEUE
    return current_stream(device), functools.partial(_workspace, device)


def current_stream(device: torch.device) -> int:
    """The current stream's handle; 0 on the CPU, which has none."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def _workspace(device: torch.device, size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, device=device)


_HOST = torch.device("cpu")
_HOST_QUEUE = (0, functools.partial(_workspace, _HOST))


def as_device(device: Any, argument: str) -> torch.device:
    """``torch.device(device)``, whose errors do not say of what."""
    try:
        return torch.device(device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise type(error)(
            f"{argument}: expected a torch.device or the name of one, got {device!r}"
        ) from error


def check_device(device: torch.device, argument: str) -> None:
    """RuntimeError unless this build computes on ``device``."""
    known = ("cpu", "cuda") if _C.has_cuda else ("cpu",)
    if device.type not in (*known, "meta"):
        raise RuntimeError(
            f"{argument}: expected {' or '.join(known)}, got {device}: this build has no kernels "
            "for that device"
        )
