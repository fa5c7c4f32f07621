"""The benchmark's parts: what it counts is right, and every path runs on the CPU."""

import io
import json
import math
import re

import numpy as np
import pytest
import torch
from rich.console import Console

import l3ext
from l3ext.bench import attention, peers, timing
from l3ext.bench.floors import Cost, StepShape
from l3ext.bench.workload import Workload, from_zipf
from l3ext.cli._output import table_console
from l3ext.cli.bench import _table, app

CPU = torch.device("cpu")
# Compiling takes long; the plain form of the compiled blocks is here.
QUICK_PEERS = ("padded gather", "masked 512-row blocks", "grouped GEMM", "loop of mm")


def tiny(**changes):
    sizes = {"num_tokens": 600, "vocab_size": 60, "total_rows": 300, "max_rows": 32}
    return from_zipf(**{**sizes, **changes})


def options(**changes):
    return attention.Options(
        **{
            **{"device": CPU, "dtype": torch.float32, "d_in": 64, "d_emb": 32, "runs": 3},
            **{"num_tokens": (70,), "batches": (1, 5), "gemm_size": 64, "copy_bytes": 1 << 20},
            **changes,
        }
    )


# --- timing ---------------------------------------------------------------------------------------
class FakeClock:
    """Every call takes as long as it returns; the order of calls is kept."""

    def __init__(self):
        self.calls = []

    def measure(self, function, *, ahead=True):
        seconds = function()
        self.calls.append(seconds)
        return seconds


def test_candidates_are_timed_in_turn_and_run_zero_is_not_counted():
    clock = FakeClock()
    candidates = {"a": lambda run: lambda: 100.0 + run, "b": lambda run: lambda: 200.0 + run}
    timings = timing.time_interleaved(candidates, clock=clock, runs=3, budget_seconds=1e9)
    assert clock.calls == [100, 200, 101, 201, 202, 102, 103, 203]
    assert timings["a"] == timing.Timing(102, 101, 103, 3)


def test_a_candidate_that_used_its_share_stops_after_three_runs():
    candidates = {"slow": lambda run: lambda: 10.0, "fast": lambda run: lambda: 0.01}
    timings = timing.time_interleaved(candidates, clock=FakeClock(), runs=50, budget_seconds=2.0)
    assert timings["slow"].runs == 3
    assert timings["fast"].runs == 50


def test_preparation_is_not_timed():
    clock = FakeClock()
    prepared = []

    def candidate(run):
        prepared.append(run)
        return lambda: 1.0

    timing.time_interleaved({"": candidate}, clock=clock, runs=4)
    assert prepared == [0, 1, 2, 3, 4]
    assert len(clock.calls) == 5


def test_the_spread_is_of_the_runs():
    summary = timing.summarize([float(i) for i in range(100, -1, -1)])
    assert summary == timing.Timing(50, 10, 90, 101)
    assert summary.divided_by(10) == timing.Timing(5, 1, 9, 101)


def test_the_host_clock_and_rates_are_of_this_machine():
    clock = timing.HostClock()
    assert 0 < clock.measure(lambda: sum(range(1000))) < 10
    assert timing.bandwidth(clock, CPU, nbytes=1 << 20, runs=3) > 1e6
    assert timing.gemm_rate(clock, torch.float32, CPU, size=64, runs=3) > 1e6
    calls = []
    timing.captured(lambda: calls.append(1), CPU)()
    assert calls == [1]


# --- floors ---------------------------------------------------------------------------------------
def test_a_step_is_counted_as_by_hand():
    offsets = torch.tensor([0, 1, 4, 4, 5, 10])  # rows 1, 3, 0, 1, 5
    shape = StepShape.of(torch.tensor([4, 1, 0, 1, 0, 2, 4]), offsets)
    assert shape == StepShape(
        tokens=7, segments=4, rows=9, single_rows=1, single_tokens=2, pairs=5 + 3 + 3 + 5
    )
    # Keys of 8 rows and values of 9; 5 queries of x, 7 rows of y.
    assert shape.forward(10, 4, 2) == Cost(2 * (8 * 10 + 9 * 4 + 5 * 10 + 7 * 4), 2 * 16 * 14)
    # The single row is not read; dx of 7 positions, gradients of 9 rows.
    read = 8 * 10 + 8 * 4 + 5 * 10 + 7 * 4
    assert shape.backward(10, 4, 2, shape.rows) == Cost(
        2 * (read + 7 * 10 + 9 * 14), 2 * 16 * (3 * 10 + 2 * 4)
    )
    dense = shape.backward(10, 4, 2, 10)
    assert dense.nbytes - shape.backward(10, 4, 2, 9).nbytes == 2 * 14
    # Tied: every row once, the single one for its values; gradients as wide as rows.
    tied = shape.forward(10, 10, 2, tied=True)
    assert tied == Cost(2 * 10 * (9 + 5 + 7), 2 * 16 * 20)
    read = 10 * (8 + 5 + 7)
    assert shape.backward(10, 10, 2, 9, tied=True) == Cost(
        2 * (read + 7 * 10 + 9 * 10), 2 * 16 * (3 * 10 + 2 * 10)
    )
    assert Cost(200, 30).seconds(100.0, 10.0) == {"bytes": 2.0, "flops": 3.0}


def test_the_default_zipf_workload_is_the_documented_one():
    workload = from_zipf(num_tokens=65536)
    rows = np.asarray(workload.allocation.rows)
    assert 0.999 * 710_000 < rows.sum() <= 710_000
    assert rows.max() == 512
    assert (np.diff(rows) <= 0).all()
    shape = StepShape.of(
        workload.steps(1, 65536, CPU)[0], torch.tensor(workload.allocation.offsets)
    )
    # 20.7K segments, 441K rows and 17.9M pairs, by an independent simulation.
    assert math.isclose(shape.segments, 20_700, rel_tol=0.02)
    assert math.isclose(shape.rows, 441_000, rel_tol=0.02)
    assert math.isclose(shape.pairs, 17.9e6, rel_tol=0.02)


def test_workloads_say_what_they_cannot_do():
    with pytest.raises(ValueError, match="total_rows: expected at least 60, one an id, got 59"):
        tiny(total_rows=59)
    with pytest.raises(ValueError, match=r"num_tokens: expected at most 600, .* got 601"):
        tiny().steps(2, 601, CPU)
    assert len(tiny().steps(3, 600, CPU)) == 3


# --- peers ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", QUICK_PEERS)
@pytest.mark.parametrize("step", ["zipf", "one token", "all distinct"])
def test_a_peer_computes_what_we_do(name, step):
    workload = tiny()
    offsets = torch.tensor(workload.allocation.offsets)
    ids = {
        "zipf": workload.steps(1, 300, CPU)[0],
        "one token": torch.zeros(40, dtype=torch.int64),
        "all distinct": torch.randperm(60),
    }[step]
    x = torch.randn(ids.numel(), 64, requires_grad=True)
    table = (torch.randn(workload.allocation.total_rows, 96) / 8).requires_grad_()
    plan = l3ext.plan(ids, offsets)
    ours = l3ext.ops.table_attention(x, table, plan, tied=False)
    theirs = peers.PEERS[name](ids, offsets)(x, table)
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)
    dy = torch.randn_like(ours)
    dx, dtable = torch.autograd.grad(ours, (x, table), dy)
    their_dx, their_dtable = torch.autograd.grad(theirs, (x, table), dy)
    torch.testing.assert_close(their_dx, dx, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(their_dtable.to_dense(), dtable, rtol=1e-4, atol=1e-4)


def test_every_quick_peer_is_a_peer():
    assert set(QUICK_PEERS) < set(peers.PEERS)


# --- the whole ------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_regime_runs_and_is_json(dtype):
    saved = []
    result = attention.run(
        tiny(), options(dtype=dtype, peers=QUICK_PEERS), lambda r: saved.append(json.dumps(r))
    )
    kinds = [(m["regime"], m["num_tokens"]) for m in result["measurements"]]
    assert kinds == [
        ("forward", 70), ("backward", 70), ("decode", 1), ("decode", 5), ("plan", 70)
    ]  # fmt: skip
    assert len(saved) == len(kinds)
    assert json.loads(saved[-1]) == json.loads(json.dumps(result))
    for measurement in result["measurements"]:
        assert measurement["failures"] == {}
        for name, row in measurement["results"].items():
            assert 0 < row["p10"] <= row["median"] <= row["p90"]
            assert row["runs"] == 3
            assert ("fraction" in row) == (measurement["regime"] != "plan")
            if name in QUICK_PEERS:
                assert row["difference"] < (1e-5 if dtype == torch.float32 else 5e-2)
    forward, backward = result["measurements"][:2]
    assert set(QUICK_PEERS) < set(forward["results"])
    assert set(QUICK_PEERS) < set(backward["results"])
    assert backward["results"]["l3ext, dense gradient"]["difference"] == 0


def test_a_regime_is_held_against_the_machine_before_and_after_it(monkeypatch):
    bandwidths = iter([99e9, 8e9, 4e9, 4e9, 2e9])  # the first when it begins
    gemms = iter([99e9, 100e9, 300e9, 300e9, 500e9])
    monkeypatch.setattr(timing, "bandwidth", lambda *_, **__: next(bandwidths))
    monkeypatch.setattr(timing, "gemm_rate", lambda *_, **__: next(gemms))
    bench = attention.Bench(tiny(), options(runs=1))
    bench.clock = FakeClock()
    for rates in ((6e9, 200e9), (3e9, 400e9)):
        times = bench._time({"ours": lambda run: lambda: 0.5})
        described = attention._described(times, {"": Cost(10**9, 10**11)}, {}, {})
        assert (described["bandwidth"], described["gemm"]) == rates
        floor = {"bytes": 1e9 / rates[0], "flops": 1e11 / rates[1]}
        assert described["floor"] == pytest.approx(floor)
        assert described["results"]["ours"]["fraction"] == max(floor.values()) / 0.5


def test_a_tied_table_is_measured_without_peers():
    result = attention.run(tiny(), options(d_emb=64, tied=True))
    assert result["tied"]
    assert result["table_bytes"] == result["table_rows"] * 64 * 4
    untied = attention.run(tiny(), options(d_emb=64))
    assert untied["table_bytes"] == 2 * result["table_bytes"]
    for measurement in result["measurements"]:
        assert measurement["failures"] == {}
        assert ("fraction" in measurement["results"].get("l3ext", {})) == (
            measurement["regime"] in ("forward", "backward")
        )


def test_a_peer_that_fails_is_reported_and_the_rest_is_measured(monkeypatch):
    def broken(token_ids, offsets):
        raise MemoryError("206 GB do not fit\nand more")

    monkeypatch.setitem(peers.PEERS, "padded gather", broken)
    result = attention.run(
        tiny(), options(regimes=("forward", "backward"), peers=("padded gather", "loop of mm"))
    )
    for measurement in result["measurements"]:
        assert measurement["failures"] == {"padded gather": "MemoryError: 206 GB do not fit"}
        assert "padded gather" not in measurement["results"]
        assert "loop of mm" in measurement["results"]


def test_a_peer_that_computes_something_else_shows_it(monkeypatch):
    def wrong(token_ids, offsets):
        return lambda x, table: torch.zeros(x.shape[0], 32) + 0 * (x.sum() + table.sum())

    monkeypatch.setitem(peers.PEERS, "loop of mm", wrong)
    result = attention.run(tiny(), options(regimes=("forward",), peers=("loop of mm",)))
    assert result["measurements"][0]["results"]["loop of mm"]["difference"] > 0.5


def test_steps_differ_from_run_to_run():
    steps = Workload("", np.arange(1000), l3ext.Allocation.uniform(1000, 1000)).steps(4, 10, CPU)
    assert len({tuple(step.tolist()) for step in steps}) == 4


# --- the command ----------------------------------------------------------------------------------
SMALL = ["attention", "--zipf", "--vocab-size", "60", "--total-rows", "300", "--max-rows", "32"]
SMALL += ["--num-tokens", "70", "--d-in", "64", "--d-emb", "32", "--runs", "3"]


def test_the_table_fits_80_columns_and_cuts_nothing():
    names = ["l3ext", "l3ext, sparse gradient", *peers.PEERS]
    row = {"median": 9.8765432, "p10": 8.7654321, "p90": 9.9999994, "runs": 100}
    row |= {"fraction": 1.2346, "difference": 1.2e-7}
    measurement = {"regime": "backward", "num_tokens": 65536, "results": dict.fromkeys(names, row)}
    measurement["floor"] = {"bytes": 0.00123, "flops": 0.00045}
    measurement |= {"bandwidth": 4567.8e9, "gemm": 789.01e12}
    output = io.StringIO()
    Console(file=output, width=80).print(_table({"dtype": "bfloat16"}, measurement))
    lines = output.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    for name in names:
        (line,) = (line for line in lines if line.startswith(f"{name} "))
        cells = ["9876543", "8765432", "9999999", "100", "123.5", "%", "1.00", "1.2e-07"]
        assert line.removeprefix(name).split() == cells
    assert lines[1].split()[:4] == ["median", "µs", "p10", "p90"]


def test_small_times_keep_a_digit_and_a_pipe_is_wide(capsys):
    row = {"median": 12.34e-6, "p10": 9.87e-6, "p90": 999.9e-6, "runs": 3}
    measurement = {"regime": "plan", "num_tokens": 8, "results": {"l3ext": row}, "floor": None}
    table_console().print(_table({"dtype": "float32"}, measurement))
    assert "12.3 9.9 999.9" in capsys.readouterr().out
    assert table_console().width == 120


def test_the_command_prints_a_table_and_writes_the_same(tmp_path, capsys):
    path = tmp_path / "result.json"
    arguments = [*SMALL, "--batch", "2", "--dtype", "float32", "--peer", "loop of mm"]
    app([*arguments, "--output", str(path)], standalone_mode=False)
    printed = capsys.readouterr().out
    for text in ("forward, 70 tokens", "decode, 2 tokens", "loop of mm", "of floor", "Zipf(1)"):
        assert text in printed
    (result,) = json.loads(path.read_text())
    assert len(result["measurements"]) == 4
    # Each line's own rate, in order, and none of the plan, which has no floor.
    held_against = [m for m in result["measurements"] if m["regime"] != "plan"]
    assert re.findall(r"at ([\d.]+) GB/s", " ".join(printed.split())) == [
        f"{m['bandwidth'] / 1e9:.1f}" for m in held_against
    ]
    assert not list(tmp_path.glob("*.tmp.*"))


def test_the_command_takes_tied_tables(tmp_path, capsys):
    path = tmp_path / "result.json"
    tied = [*SMALL, "--tied", "--d-emb", "64", "--regime", "forward", "--dtype", "float32"]
    app([*tied, "--output", str(path)], standalone_mode=False)
    assert "rows of 64, tied" in capsys.readouterr().out
    (result,) = json.loads(path.read_text())
    assert (result["tied"], result["d_in"], result["d_emb"]) == (True, 64, 64)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["--device", "tpu"], ValueError, "--device: expected cpu or cuda, got 'tpu'"),
        (["--regime", "prefill"], ValueError, "--regime: expected one of forward, backward"),
        (["--dtype", "int16"], ValueError, "--dtype: expected one of float32"),
        (["--peer", "numpy"], ValueError, "--peer: expected one of padded gather"),
        (["--num-tokens", "0"], ValueError, "--num-tokens: expected 1 or more, got 0"),
        (["--batch", "-1"], ValueError, "--batch: expected 1 or more, got -1"),
        (["--runs", "0"], ValueError, "--runs: expected 1 or more, got 0"),
        (["--zipf", "README.md"], ValueError, "--zipf: expected no text beside it"),
        (["--tied", "--peer", "loop of mm"], ValueError, "--tied: expected no --peer"),
        (["--tied", "--d-emb", "64"], ValueError, "--tied: expected no --peer, and a --d-emb"),
    ],
)
def test_what_cannot_be_measured_is_an_error(arguments, error, message):
    with pytest.raises(error, match=message):
        app(["attention", *arguments], standalone_mode=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_without_a_device_is_an_error():
    with pytest.raises(RuntimeError, match="--device cuda: torch finds no CUDA device here"):
        app(["attention", "--device", "cuda"], standalone_mode=False)
