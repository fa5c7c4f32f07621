"""Where arrays may lie, as the native module sees it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from l3ext import _C, _operators
from tests.attention.claimed import CPU, CUDA, CUDA_HOST, OPENCL, Claimed


def plan_arguments(count=3, vocab=2):
    """Arguments of the native plan() but the queue, in host memory."""
    return {
        "token_ids": np.zeros(count, np.int64),
        "offsets": np.arange(vocab + 1),
        "check_offsets": True,
        "permutation": np.zeros(count, np.int32),
        "segment_tokens": np.zeros(count, np.int32),
        "segment_queries": np.zeros(count + 1, np.int32),
        "segment_rows": np.zeros((count, 2), np.int64),
        "num_segments": np.zeros(1, np.int32),
        "table_rows": np.zeros(1, np.int64),
        "schedule": np.zeros(0, np.int32),
    }


def attention_arguments(count=3, d_in=64, d_emb=64):
    """Arguments of the native segmented_attention() but the queue, in host memory."""
    plan = plan_arguments(count)
    names = ("permutation", "segment_tokens", "segment_queries", "segment_rows")
    arrays = [plan[name] for name in (*names, "num_segments", "table_rows", "schedule")]
    return {
        "x": np.zeros((count, d_in), np.float32),
        "keys": np.zeros((2, d_in), np.float32),
        "values": np.zeros((2, d_emb), np.float32),
        "plan": [*arrays, 1],
        "scale": 1.0,
        "num_threads": 1,
        "y": np.zeros((count, d_emb), np.float32),
    }


def no_workspace(size):
    raise AssertionError("host arrays need no workspace")


QUEUE = (0, no_workspace)


def on_cuda(arguments, *names):
    """The arguments with the named arrays, or all, claimed to lie on a device."""

    def moved(name, value):
        if isinstance(value, list):
            return [moved(name, entry) for entry in value]
        here = isinstance(value, np.ndarray) and (not names or name in names)
        return Claimed(value) if here else value

    return {name: moved(name, value) for name, value in arguments.items()}


def test_host_arrays_run_on_the_cpu_and_ask_for_nothing():
    arguments = plan_arguments()
    _C.plan(**arguments, queue=QUEUE)
    assert arguments["permutation"].tolist() == [0, 1, 2]
    _C.segmented_attention(**attention_arguments() | {"plan": _attention_plan()}, queue=QUEUE)


def _attention_plan():
    plan = plan_arguments()
    _C.plan(**plan, queue=QUEUE)
    names = ("permutation", "segment_tokens", "segment_queries", "segment_rows")
    return [*(plan[name] for name in (*names, "num_segments", "table_rows", "schedule")), 1]


def test_pinned_memory_is_the_host_s():
    ids = np.array([1, 0, 1])
    pinned = Claimed(ids, device=(CUDA_HOST, 0), data=ids.ctypes.data)
    arguments = plan_arguments() | {"token_ids": pinned}
    _C.plan(**arguments, queue=QUEUE)
    assert arguments["permutation"].tolist() == [1, 0, 2]


@pytest.mark.skipif(_C.has_cuda, reason="claimed addresses would reach a device")
def test_a_build_without_cuda_says_so():
    for count in (3, 0):
        device = on_cuda(plan_arguments(count))
        device["schedule"] = Claimed(np.zeros(16 + 7 * count, np.int32))
        with pytest.raises(RuntimeError, match="this build of l3ext has no CUDA kernels"):
            _C.plan(**device, queue=QUEUE)
    attention = on_cuda(attention_arguments())
    attention["plan"][-2] = device["schedule"] = Claimed(np.zeros(16 + 7 * 3, np.int32))
    with pytest.raises(RuntimeError, match="this build of l3ext has no CUDA kernels"):
        _C.segmented_attention(**attention, queue=QUEUE)
    del attention["y"]
    gradients = {"dy": Claimed(np.zeros((3, 64), np.float32)), "segment_gradients": None}
    gradients |= {"dx": Claimed(np.zeros((3, 64), np.float32)), "dkeys": None, "dvalues": None}
    with pytest.raises(RuntimeError, match="this build of l3ext has no CUDA kernels"):
        _C.segmented_attention_backward(**attention, **gradients, queue=QUEUE)
    for name in ("keys", "values"):
        del attention[name]
    attention |= {"directory": Claimed(np.zeros(2, np.int64)), "row_stride": 128}
    attention |= {"value_offset": 64, "y": Claimed(np.zeros((3, 64), np.float32))}
    with pytest.raises(RuntimeError, match="this build of l3ext has no CUDA kernels"):
        _C.directory_attention(**attention, queue=QUEUE)
    segments = [
        Claimed(np.zeros(shape, kind))
        for shape, kind in (
            (4, np.int32),
            ((3, 2), np.int64),
            (1, np.int32),
            (16 + 7 * 3, np.int32),
        )
    ]
    with pytest.raises(RuntimeError, match="this build of l3ext has no CUDA kernels"):
        _C.schedule(*segments, QUEUE)


@pytest.mark.parametrize("name", [*(set(plan_arguments()) - {"token_ids", "check_offsets"})])
def test_plan_names_the_array_that_lies_elsewhere(name):
    message = f"{name}: expected an array in host memory, where token_ids lies, got one on cuda:0"
    with pytest.raises(TypeError, match=message):
        _C.plan(**on_cuda(plan_arguments(), name), queue=QUEUE)


@pytest.mark.parametrize("name", ["keys", "values", "y", "plan"])
def test_attention_names_the_array_that_lies_elsewhere(name):
    named = "plan.permutation" if name == "plan" else name
    message = f"{named}: expected an array in host memory, where x lies, got one on cuda:0"
    arguments = attention_arguments() | {"plan": _attention_plan()}
    with pytest.raises(TypeError, match=message):
        _C.segmented_attention(**on_cuda(arguments, name), queue=QUEUE)
    named = "keys"  # the first that is read
    message = f"{named}: expected an array on cuda:0, where x lies, got one in host memory"
    with pytest.raises(TypeError, match=message):
        _C.segmented_attention(**on_cuda(arguments, "x"), queue=QUEUE)


def test_arrays_on_two_devices():
    arguments = on_cuda(attention_arguments())
    arguments["values"] = Claimed(np.zeros((2, 64), np.float32), device=(CUDA, 1))
    with pytest.raises(
        TypeError, match=r"values: expected an array on cuda:0, .* got one on cuda:1"
    ):
        _C.segmented_attention(**arguments, queue=QUEUE)


def test_a_device_of_another_kind():
    ids = Claimed(np.zeros(3, np.int64), device=(OPENCL, 0))
    with pytest.raises(TypeError, match="token_ids: expected an array in host memory or on a CUDA"):
        _C.plan(**plan_arguments() | {"token_ids": ids}, queue=QUEUE)


def test_functions_of_the_host_alone_say_where_the_array_lies():
    with pytest.raises(
        TypeError, match="data: expected an array in host memory, got one on cuda:3"
    ):
        _C.crc32c(Claimed(np.zeros(3, np.uint8), device=(CUDA, 3)))


def test_a_schedule_of_another_size_is_refused():
    arguments = on_cuda(plan_arguments())
    with pytest.raises(ValueError, match=r"schedule: expected shape \[37\], got \[0\]"):
        _C.plan(**arguments, queue=QUEUE)
    arguments = plan_arguments() | {"schedule": np.zeros(37, np.int32)}
    with pytest.raises(ValueError, match=r"schedule: expected shape \[0\], got \[37\]"):
        _C.plan(**arguments, queue=QUEUE)


def test_device_arrays_are_taken_without_a_wait():
    """The caller names the stream; a producer that waited for another would break a capture."""
    ids, host = Claimed(np.zeros(3, np.int64)), Claimed(np.zeros(3, np.int64), (CPU, 0))
    for array in (ids, host):
        with pytest.raises((TypeError, ValueError)):
            _C.plan(
                **plan_arguments() | {"token_ids": array, "offsets": np.zeros((1, 1))}, queue=QUEUE
            )
    assert ids.options == {"max_version": (1, 0), "stream": -1}
    assert host.options == {"max_version": (1, 0)}


def test_workspaces_come_from_torch():
    stream, allocate = _operators.queue(torch.device("cpu"))
    assert stream == 0
    workspace = allocate(1000)
    assert workspace.dtype == torch.uint8
    assert workspace.shape == (1000,)
