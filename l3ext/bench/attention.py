"""Segmented attention against the machine's own limits and against what users write today."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import l3ext
from l3ext.bench import machine, timing
from l3ext.bench.floors import Cost, StepShape
from l3ext.bench.peers import PEERS, Attend
from l3ext.bench.workload import Workload
from l3ext.ops import segmented_attention, table_attention, touched_rows
from l3ext.quantization import QUANTIZED_DTYPES, QuantizedTable, quantize_rows, row_bytes

REGIMES = ("forward", "backward", "decode", "plan")

_STEPS = 4  # another one each run
_GRAPH_CALLS = 16  # of one graph: what a replay itself costs is shared out among them


@dataclasses.dataclass(frozen=True)
class Options:
    """What to measure, and how much of it."""

    device: torch.device
    dtype: torch.dtype  #: of the rows, and of x where these are not quantised, else float32
    d_in: int
    d_emb: int
    tied: bool = False  #: values are the keys; d_emb is d_in then, and no peer can do it
    regimes: Sequence[str] = REGIMES
    num_tokens: Sequence[int] = (4096,)  #: steps of forward, backward and plan
    batches: Sequence[int] = (1, 8, 64, 300, 512)  #: steps of decode
    peers: Sequence[str] = ()  #: of PEERS; for forward and backward
    runs: int = 100
    budget_seconds: float = 120.0  #: of one regime at one size
    gemm_size: int = 8192  #: of the product that the flop rate is measured by
    copy_bytes: int = 1 << 30  #: of the array that the bandwidth is measured by

    @property
    def quantized(self) -> bool:
        """Rows in 8 bits: forward, decode and plan alone, and without peers."""
        return self.dtype in QUANTIZED_DTYPES

    @property
    def x_dtype(self) -> torch.dtype:
        """Of x and y."""
        return torch.float32 if self.quantized else self.dtype


def run(
    workload: Workload, options: Options, save: Callable[[dict[str, Any]], None] = lambda _: None
) -> dict[str, Any]:
    """Time every regime at every size.

    What follows from the ids alone (the plan; for peers sorting, masks, row numbers) is made before
    the clock starts, and the plan timed on its own. Peers' outputs are compared before they are
    timed.

    Args:
        workload: ids and allocation.
        options: what to measure.
        save: gets the result so far after every measurement.

    Returns:
        JSON values: ``machine``, the workload, ``bandwidth`` (bytes/s), ``gemm`` (flop/s) and
        ``measurements``, one for each regime and size: ``bandwidth`` and ``gemm`` meanwhile,
        ``floor`` (seconds by bytes and by flops at these), ``results`` (name to median, p10, p90 in
        seconds, runs, ``fraction`` of the floor and, for a peer, ``difference``: the largest from
        ours over the largest value) and ``failures`` (name to reason of the peers that did not
        run). A machine need not be the same from one minute to the next, so both rates are the mean
        of what is measured just before and just after.
    """
    bench = Bench(workload, options)
    measurements: list[dict[str, Any]] = []
    result = {
        "machine": machine.describe(options.device),
        "device": options.device.type,
        "dtype": str(options.dtype).removeprefix("torch."),
        "source": workload.source,
        "vocab_size": workload.allocation.vocab_size,
        "table_rows": workload.allocation.total_rows,
        "table_bytes": bench.table.nbytes,
        "d_in": options.d_in,
        "d_emb": options.d_emb,
        "tied": options.tied,
        "bandwidth": bench.rates.bandwidth,
        "gemm": bench.rates.gemm,
        "measurements": measurements,
    }
    for regime in options.regimes:
        for size in options.batches if regime == "decode" else options.num_tokens:
            measurements.append(
                {"regime": regime, "num_tokens": size, **bench.measure(regime, size)}
            )
            save(result)
    return result


class Bench:
    """One table on one device, and what is measured with it."""

    def __init__(self, workload: Workload, options: Options) -> None:
        self.workload, self.options = workload, options
        self.device = options.device
        self.clock = timing.clock_of(self.device)
        self.rates = self._measure_rates(runs=9)
        self.generator = torch.Generator(self.device).manual_seed(0)
        self.offsets = torch.tensor(workload.allocation.offsets, device=self.device)
        # a Tensor or a QuantizedTable
        self.table: Any = self._draw_table(workload.allocation.total_rows)

    def measure(self, regime: str, size: int) -> dict[str, Any]:
        count = _GRAPH_CALLS if regime == "decode" else _STEPS
        measured = getattr(self, f"_{regime}")(self.workload.steps(count, size, self.device))
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # the next regime's buffers have other sizes
        return measured

    def own_call(self, regime: str, size: int, count: int = _STEPS) -> timing.Candidate:
        """Our own call of a regime by itself: of backward packed rows, of decode with its plan.

        Args:
            regime: one of REGIMES.
            size: tokens of a step.
            count: other steps that runs go through.
        """
        steps = self.workload.steps(count, size, self.device)
        d_in, d_emb, _ = self._sizes()
        x = self._draw(size, d_in)
        calls: list[Callable[[], object]]
        if regime == "forward":
            calls = [functools.partial(self._ours(step), x, self.table) for step in steps]
        elif regime == "backward":
            dy = self._draw(size, d_emb)
            calls = [
                functools.partial(self._packed_backward(step), dy, x, self.table) for step in steps
            ]
        elif regime == "decode":
            calls = [functools.partial(self._plan_and_attend, step, x) for step in steps]
        else:
            calls = [functools.partial(self._plan_of, step) for step in steps]
        return lambda run: calls[run % count]

    # --- regimes ----------------------------------------------------------------------------------
    def _forward(self, steps: list[Tensor]) -> dict[str, Any]:
        x = self._draw(steps[0].numel(), self.options.d_in)

        def calls(attends: Sequence[Attend]) -> timing.Candidate:
            return lambda run: functools.partial(attends[run % _STEPS], x, self.table)

        candidates = {"l3ext": calls([self._ours(step) for step in steps])}
        expected = candidates["l3ext"](0)()
        differences, failures = {}, {}
        for name in self.options.peers:
            try:
                theirs = calls([PEERS[name](step, self.offsets) for step in steps])
                outputs = [theirs(i)() for i in range(_STEPS)]  # what compiles here is not timed
                differences[name] = _difference(outputs[0], expected)
                candidates[name] = theirs
            except Exception as error:  # a peer that does not run here is a result too
                failures[name] = _reason(error)
        costs = {"": self._forward_cost(steps)}
        return _described(self._time(candidates), costs, differences, failures)

    def _backward(self, steps: list[Tensor]) -> dict[str, Any]:
        """Gradients of x and of the table: of touched rows alone, and of all of it.

        "l3ext" is the operator with packed rows, whose places follow from the ids like the plan;
        a sparse gradient through autograd finds them in the measured time.
        """
        x = self._draw(steps[0].numel(), self.options.d_in).requires_grad_()
        dy = self._draw(steps[0].numel(), self.options.d_emb)
        table = self.table.detach().requires_grad_()

        def calls(attends: Sequence[Attend]) -> timing.Candidate:
            def forward(run: int) -> Callable[[], tuple[Tensor, ...]]:
                y = attends[run % _STEPS](x, table)
                return lambda: torch.autograd.grad(y, (x, table), dy)

            return forward

        sparse, dense = "l3ext, sparse gradient", "l3ext, dense gradient"
        packed = [self._packed_backward(step) for step in steps]
        candidates: dict[str, timing.Candidate] = {
            "l3ext": lambda run: functools.partial(packed[run % _STEPS], dy, x, self.table),
            sparse: calls([self._ours(step, sparse=True) for step in steps]),
            dense: calls([self._ours(step) for step in steps]),
        }
        expected = candidates[sparse](0)()
        differences = {dense: _difference_of_gradients(candidates[dense](0)(), expected)}
        dx, rows = packed[0](dy, x, self.table)
        differences["l3ext"] = max(
            _difference(dx, expected[0]), _difference(rows, expected[1].values())
        )
        failures = {}
        for name in self.options.peers:
            try:
                theirs = calls([PEERS[name](step, self.offsets) for step in steps])
                gradients = [theirs(i)() for i in range(_STEPS)]
                differences[name] = _difference_of_gradients(gradients[0], expected)
                candidates[name] = theirs
            except Exception as error:
                failures[name] = _reason(error)
        every = self.workload.allocation.total_rows

        def cost(gradient_rows: Callable[[StepShape], int]) -> Cost:
            return _mean(
                [
                    shape.backward(*self._sizes(), gradient_rows(shape), tied=self.options.tied)
                    for shape in self._shapes(steps)
                ]
            )

        costs = {"": cost(lambda shape: shape.rows), dense: cost(lambda _: every)}
        return _described(self._time(candidates), costs, differences, failures)

    def _decode(self, steps: list[Tensor]) -> dict[str, Any]:
        """One call of a graph that makes many, and one by itself that nothing runs ahead of.

        The calls of a graph read another batch each: their rows are not in the cache.
        """
        x = [self._draw(step.numel(), self.options.d_in) for step in steps]
        attends = [self._ours(step) for step in steps]

        def attend_all() -> None:
            for attend, x_i in zip(attends, x, strict=True):
                attend(x_i, self.table)

        def plan_and_attend_all() -> None:
            for step, x_i in zip(steps, x, strict=True):
                self._plan_and_attend(step, x_i)

        attend_graph = timing.captured(attend_all, self.device)
        whole_graph = timing.captured(plan_and_attend_all, self.device)
        together = "in a graph" if self.device.type == "cuda" else "back to back"
        many = self._time(
            {
                f"l3ext, {together}": lambda _: attend_graph,
                f"plan and l3ext, {together}": lambda _: whole_graph,
            }
        )
        times = {
            name: _Measured(time.divided_by(len(steps)), rates)
            for name, (time, rates) in many.items()
        }

        def single(run: int) -> Callable[[], Tensor]:
            i = run % len(steps)
            return functools.partial(attends[i], x[i], self.table)

        times |= self._time({"l3ext, by itself": single}, ahead=False)
        return _described(times, {"": self._forward_cost(steps)}, {}, {})

    def _plan(self, steps: list[Tensor]) -> dict[str, Any]:
        calls = [functools.partial(self._plan_of, step) for step in steps]
        candidates: dict[str, timing.Candidate] = {"plan": lambda run: calls[run % _STEPS]}
        if self.device.type == "cuda":
            graphs = [timing.captured(call, self.device) for call in calls]
            candidates["plan, in a graph"] = lambda run: graphs[run % _STEPS]
        return _described(self._time(candidates), {}, {}, {})

    # --- parts ------------------------------------------------------------------------------------
    def _draw(self, rows: int, columns: int) -> Tensor:
        drawn = torch.randn(rows, columns, generator=self.generator, device=self.device)
        return drawn.to(self.options.x_dtype)

    def _draw_table(self, rows: int) -> Tensor | QuantizedTable:
        """Drawn by parts: no second copy of it in float32."""
        d_in, d_emb, dtype = self.options.d_in, self.options.d_emb, self.options.dtype
        tied = self.options.tied
        width = d_in if tied else d_in + d_emb
        if not self.options.quantized:
            table = torch.empty(rows, width, dtype=dtype, device=self.device)
            for part in table.split(4096):
                part.copy_(self._draw(*part.shape) * 0.03)
            return table
        storage = torch.empty(rows, row_bytes(d_in, d_emb, tied=tied), dtype=torch.uint8)
        for part in storage.split(4096):
            drawn = self._draw(len(part), width) * 0.03
            part.copy_(quantize_rows(drawn, d_in, dtype, tied=tied).storage)
        return QuantizedTable(storage, dtype, d_in, d_emb, tied)

    def _plan_of(self, step: Tensor) -> l3ext.Plan:
        return l3ext.plan(step, self.offsets, max_rows=self.workload.allocation.max_rows)

    def _ours(self, step: Tensor, *, sparse: bool = False) -> Attend:
        plan = self._plan_of(step)
        tied = self.options.tied

        def attend(x: Tensor, table: Any) -> Tensor:
            if isinstance(table, QuantizedTable):
                scales = (table.key_scales, table.value_scales)
                return segmented_attention(
                    x, table.keys, table.values, plan, key_scales=scales[0], value_scales=scales[1]
                )
            return table_attention(x, table, plan, tied=tied, sparse=sparse)

        return attend

    def _plan_and_attend(self, step: Tensor, x: Tensor) -> Tensor:
        return self._ours(step)(x, self.table)

    def _packed_backward(self, step: Tensor) -> Callable[..., tuple[Tensor, Tensor]]:
        plan = self._plan_of(step)
        touched = touched_rows(plan.segment_rows, plan.num_segments)
        places = (touched.starts, touched.rows.shape[0])
        tied = self.options.tied

        def backward(dy: Tensor, x: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
            return torch.ops.l3ext.table_attention_backward(
                dy, x.detach(), table, x.shape[1], tied, *plan._arrays(), 1.0, True, True, *places
            )

        return backward

    def _shapes(self, steps: list[Tensor]) -> list[StepShape]:
        return [StepShape.of(step, self.offsets) for step in steps]

    def _sizes(self) -> tuple[int, int, int]:
        return self.options.d_in, self.options.d_emb, self.options.x_dtype.itemsize

    def _forward_cost(self, steps: list[Tensor]) -> Cost:
        row_itemsize, tied = self.options.dtype.itemsize, self.options.tied
        return _mean(
            [
                shape.forward(*self._sizes(), row_itemsize, tied=tied)
                for shape in self._shapes(steps)
            ]
        )

    def _time(
        self, candidates: Mapping[str, timing.Candidate], *, ahead: bool = True
    ) -> dict[str, _Measured]:
        before = self._measure_rates(runs=3)
        times = timing.time_interleaved(
            candidates,
            clock=self.clock,
            runs=self.options.runs,
            budget_seconds=self.options.budget_seconds,
            ahead=ahead,
        )
        after = self._measure_rates(runs=3)
        rates = _Rates((before.bandwidth + after.bandwidth) / 2, (before.gemm + after.gemm) / 2)
        return {name: _Measured(result, rates) for name, result in times.items()}

    def _measure_rates(self, runs: int) -> _Rates:
        options, clock, device = self.options, self.clock, self.device
        return _Rates(
            timing.bandwidth(clock, device, nbytes=options.copy_bytes, runs=runs),
            timing.gemm_rate(clock, options.x_dtype, device, size=options.gemm_size, runs=runs),
        )


class _Rates(NamedTuple):
    """What the machine is able to."""

    bandwidth: float  #: bytes/s
    gemm: float  #: flop/s


class _Measured(NamedTuple):
    """The time of one candidate, and the rates before and after it."""

    time: timing.Timing
    rates: _Rates


def _mean(costs: list[Cost]) -> Cost:
    return Cost(
        sum(cost.nbytes for cost in costs) // len(costs),
        sum(cost.flops for cost in costs) // len(costs),
    )


def _described(
    times: Mapping[str, _Measured],
    costs: Mapping[str, Cost],
    differences: Mapping[str, float],
    failures: Mapping[str, str],
) -> dict[str, Any]:
    """One measurement; ``costs`` by name, "" for all that have none of their own."""
    results = {}
    for name, (time, rates) in times.items():
        results[name] = dataclasses.asdict(time)
        if cost := costs.get(name, costs.get("")):
            results[name]["fraction"] = max(cost.seconds(*rates).values()) / time.median
        if name in differences:
            results[name]["difference"] = differences[name]
    _, rates = next(iter(times.values()))
    return {
        **rates._asdict(),
        "floor": costs[""].seconds(*rates) if "" in costs else None,
        "results": results,
        "failures": dict(failures),
    }


def _difference(got: Tensor, expected: Tensor) -> float:
    expected = expected.detach().float()
    return float((got.detach().float() - expected).abs().max() / expected.abs().max())


def _difference_of_gradients(got: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Of (dx, dtable), the larger; ``expected`` has touched rows alone, coalesced."""
    touched = expected[1]
    (rows,) = touched.indices()
    table = got[1].coalesce().to_dense() if got[1].is_sparse else got[1]
    return max(_difference(got[0], expected[0]), _difference(table[rows], touched.values()))


def _reason(error: Exception) -> str:
    text = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {text}"[:200]
