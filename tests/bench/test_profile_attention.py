"""The profile of attention: what it makes of made-up events, and all of it on the CPU."""

import json
import sys

import pytest

from tests.programs import load_benchmark

SMALL = "--device cpu --num-tokens 40 --batch 1 3 --vocab-size 60 --total-rows 200 --d-in 32 --d-emb 16 --runs 3"  # noqa: E501


@pytest.fixture(scope="module")
def program():
    return load_benchmark("profile_attention")


@pytest.mark.parametrize(
    ("name", "short"),
    [
        (
            "void l3ext::cuda::query_gradients_kernel<l3ext::BFloat16, 4, true, false>"
            "(l3ext::cuda::BackwardArgs)",
            "query_gradients_kernel<bf16, 4, true, false>",
        ),
        ("void l3ext::cuda::decode_kernel<float>(l3ext::cuda::DecodeArgs)", "decode_kernel<f32>"),
        ("l3ext::cuda::segments_kernel(l3ext::cuda::PlanArgs)", "segments_kernel"),
        ("_ZN5l3ext4cuda15segments_kernelENS0_8PlanArgsE", "segments_kernel"),
        (
            "void cub::CUB_300001_SM_900::detail::radix_sort::DeviceRadixSortHistogramKernel<cub::"
            "CUB_300001_SM_900::detail::radix::policy_hub<unsigned int, int, unsigned int>::"
            "Policy1000, (cub::CUB_300001_SM_900::SortOrder)0, unsigned int>(unsigned int*, int)",
            "cub::DeviceRadixSortHistogramKernel",
        ),
        (
            "void at::native::(anonymous namespace)::fill<at::native::(anonymous namespace)::F>"
            "(int)",
            "at::fill",
        ),
        ("saxpy(float*, float)", "saxpy"),
        ("Memset (Device)", "Memset (Device)"),
        ("Memcpy HtoD (Pageable -> Device)", "Memcpy HtoD (Pageable -> Device)"),
        ("triton_poi_fused_0", "triton_poi_fused_0"),
        ("l3ext::plan", "l3ext::plan"),
        ("", ""),
    ],
)
def test_names_are_short(program, name, short):
    assert program.short_name(name) == short


def test_events_belong_to_the_call_that_launched_them(program):
    Event = program.Event
    early = Event("flush", 5, 90, launched=1)
    first = [Event("a", 90, 95, launched=11), Event("b", 130, 140, launched=20)]
    between = Event("flush", 141, 200, launched=25)  # launched in no window
    second = [Event("a", 200, 210, launched=110), Event("unknown launch", 215, 220)]
    calls = program.by_call([*first, early, between, *second], [(10, 20), (100, 120)])
    assert calls == [first, second]
    assert program.by_call([early], []) == []


def test_gaps_are_what_no_stream_fills(program):
    Event = program.Event
    one = [Event("a", 10, 30)]
    assert program.occupied(one) == (20, 0, 0)
    # a 0..40 holds b 5..10; c overlaps its end; idle 50..60 and 70..75, not by order of the list.
    events = [
        Event("d", 60, 70, launched=40),
        Event("a", 0, 40),
        Event("c", 35, 50),
        Event("b", 5, 10),
        Event("e", 75, 80, launched=72),
    ]
    assert program.occupied(events) == (80, 15, 2)
    # Clocks that differ a little give no more than the gap.
    late = [Event("a", 0, 10, launched=0), Event("b", 12, 20, launched=13)]
    assert program.occupied(late) == (20, 2, 2)


def test_calls_are_aggregated(program):
    Event = program.Event

    def call(start, sort, attend, *, grid):
        """Two launches of one kernel, then one of another; a gap of 1 before it."""
        middle = start + 2 * sort
        return [
            Event("sort", start, start + sort, start),
            Event("sort", start + sort, middle, start),
            Event("void l3ext::cuda::attend<l3ext::BFloat16>(A)", middle + 1, middle + 1 + attend,
                  start, (grid, 1, 1), (256, 1, 1), 128, 4096),
        ]  # fmt: skip

    calls = [
        call(0, 2, 5, grid=132),
        [],  # of which nothing was recorded
        call(100, 3, 13, grid=132),
        [*call(200, 2, 95, grid=264), Event("rare", 300, 302, 200)],
    ]
    result = program.aggregate(calls)
    assert (result["calls"], result["span_us"], result["idle_us"]) == (3, 20, 1)
    assert result["late_us"] == 0
    attend, sort, rare = result["kernels"]
    assert attend["kernel"] == "attend<bf16>"
    assert (attend["launches"], attend["launch_us"], attend["total_us"]) == (1, 13, 13)
    assert attend["share"] == 13 / 20
    shape = {"grid": (132, 1, 1), "block": (256, 1, 1), "registers": 128, "shared_bytes": 4096}
    assert attend["shapes"] == [shape, {**shape, "grid": (264, 1, 1)}]
    assert (sort["launches"], sort["launch_us"], sort["total_us"]) == (2, 2, 4)
    assert (rare["launches"], rare["launch_us"], rare["total_us"]) == (1 / 3, 2, 0)
    head, columns, *rows = program.lines(
        {"regime": "forward", "num_tokens": 16384, "events_us": 25, **result}
    )
    assert head == (
        "forward, 16384 tokens: 20.0 µs, of these 1.0 idle (0.0 late); 25.0 µs by the clock, "
        "3 calls"
    )
    assert " ".join(rows[0].split()) == "13.0 65 % 1.0 13.0 132+ 256 128 4096 attend<bf16>"
    assert " ".join(rows[1].split()) == "4.0 20 % 2.0 2.0 sort"
    # Kernels stand below their headings.
    assert {row.index(row.split("  ")[-1]) for row in rows} == {columns.index("kernel")}


def test_lines_are_not_too_wide(program):
    Event = program.Event
    name = "void l3ext::cuda::a_kernel_of_a_very_long_name<l3ext::BFloat16, 123456, false, true>(A)"
    call = [Event(name, 0, 123456.7, 0, (2147483647, 65535, 1), (1024, 1, 1), 255, 232448)]
    result = program.aggregate([call])
    measured = {"regime": "backward", "num_tokens": 65536, "events_us": 123456.7, **result}
    lines = list(program.lines(measured))
    assert max(map(len, lines)) == 110
    assert lines[-1].endswith("…")


def test_nothing_recorded_is_an_error(program):
    with pytest.raises(RuntimeError, match="expected kernels in the profiled calls, got none"):
        program.aggregate([[], []])


def test_a_trace_of_a_device_is_read(program):
    def entry(category, name, ts, dur, **args):
        return {"ph": "X", "cat": category, "name": name, "ts": ts, "dur": dur, "tid": 1,
                "args": args}  # fmt: skip

    launch = {"registers per thread": 64, "shared memory": 36, "grid": [132, 1, 1],
              "block": [256, 1, 1]}  # fmt: skip
    trace = {
        "traceEvents": [
            {"ph": "M", "name": "process_name", "ts": 0, "pid": 1, "args": {"name": "python"}},
            entry("kernel", "k", 50.5, 4, correlation=7, stream=7, **launch),
            entry("gpu_memset", "Memset (Device)", 49, 1, correlation=6, bytes=4),
            entry("user_annotation", program.CALL, 10, 20),
            entry("user_annotation", "another's", 5, 2),
            entry("gpu_user_annotation", program.CALL, 49, 6),
            entry("cpu_op", "l3ext::plan", 11, 5),
            entry("cuda_runtime", "cudaMemsetAsync", 12, 1, correlation=6),
            entry("cuda_runtime", "cudaLaunchKernelExC", 14, 1, correlation=7),
            entry("cuda_runtime", "cudaDeviceSynchronize", 31, 1),
            entry("kernel", "no launch", 56, 1, correlation=8),
        ]
    }
    events, windows = program.events_of(trace, "cuda")
    assert windows == [(10, 30)]
    Event = program.Event
    assert events == [
        Event("Memset (Device)", 49, 50, 12),
        Event("k", 50.5, 54.5, 14, (132, 1, 1), (256, 1, 1), 64, 36),
        Event("no launch", 56, 57),
    ]


def test_a_trace_of_the_cpu_is_read(program):
    def entry(category, name, ts, dur, tid=1):
        return {"ph": "X", "cat": category, "name": name, "ts": ts, "dur": dur, "tid": tid,
                "args": {}}  # fmt: skip

    trace = {
        "traceEvents": [
            entry("user_annotation", program.CALL, 10, 20),
            entry("cpu_op", "inner", 11, 2),
            entry("cpu_op", "outer", 11, 5),  # an operator's own operators are its time
            entry("cpu_op", "next", 16, 3),
            entry("cpu_op", "other thread", 12, 1, tid=2),
        ]
    }
    events, _ = program.events_of(trace, "cpu")
    assert [(event.name, event.start, event.end, event.launched) for event in events] == [
        ("outer", 11, 16, 11),
        ("other thread", 12, 13, 12),
        ("next", 16, 19, 16),
    ]


def test_every_regime_is_profiled_on_the_cpu(program, monkeypatch, tmp_path, capsys):
    path = tmp_path / "out.json"
    monkeypatch.setattr(sys, "argv", ["", *SMALL.split(), "--output", str(path)])
    program.main()
    result = json.loads(path.read_text())
    assert result["settings"]["vocab_size"] == "60"
    assert result["machine"]["commit"]
    sizes = [(profile["regime"], profile["num_tokens"]) for profile in result["profiles"]]
    assert sizes == [
        ("plan", 40), ("forward", 40), ("backward", 40), ("decode", 1), ("decode", 3)
    ]  # fmt: skip
    expected = {
        "plan": ["l3ext::plan"],
        "forward": ["l3ext::table_attention"],
        "backward": ["l3ext::table_attention_backward"],
        "decode": ["l3ext::plan", "l3ext::table_attention"],
    }
    for profile in result["profiles"]:
        kernels = {kernel["kernel"]: kernel for kernel in profile["kernels"]}
        for name in expected[profile["regime"]]:
            assert kernels[name]["launches"] == 1
            assert 0 < kernels[name]["share"] <= 1
        assert profile["calls"] == 3  # the profiler's first is not among them
        assert 0 <= profile["late_us"] <= profile["idle_us"] < profile["span_us"]
        assert not any("sum" in name for name in kernels)  # the flush
    printed = capsys.readouterr().out
    assert printed.count("by the clock") == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--runs", "0"], "argument --runs: expected a whole number from 1, got 0"),
        (["--batch", "few"], "argument --batch: expected a whole number from 1, got few"),
        (["--regime", "train"], "argument --regime: invalid choice: 'train'"),
    ],
)
def test_a_wrong_call_is_an_error(program, monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(sys, "argv", ["", "--device", "cpu", *arguments])
    with pytest.raises(SystemExit, match="2"):
        program.main()
    assert message in capsys.readouterr().err
