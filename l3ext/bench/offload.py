"""What it costs that a model's table lies elsewhere: one model decodes the same ids either way."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import l3ext
from l3ext.bench import machine, timing
from l3ext.bench.workload import Workload
from l3ext.models import L3LlamaConfig, L3LlamaForCausalLM
from l3ext.models.prefill import CACHE_NAME
from l3ext.tables import LookupTable, save_tables

TIERS = ("ram", "disk")
RESIDENT = "none"  # the baseline: the table is the model's own


@dataclasses.dataclass(frozen=True)
class Options:
    """The model, where its table goes, and how long to decode.

    Weights are drawn: what is measured depends on the ids, which are real, and on sizes.
    """

    hidden_size: int = 2048
    num_layers: int = 12
    d_emb: int = 1024
    dtype: torch.dtype = torch.float32
    tiers: Sequence[str] = TIERS
    positions: Sequence[int] = (4,)  #: the lookup layer follows that many decoder layers
    hot: Sequence[float] = (0.2,)  #: hot sets of tier disk, as shares of the table
    ring_bytes: int = 128 << 20  #: of tier disk
    batches: Sequence[int] = (1, 8)
    runs: int = 40  #: steps of each
    budget_seconds: float = 120.0  #: of one position and batch
    direct_io: bool = True  #: past the page cache; else it is dropped before every step
    folder: Path = Path()  #: of the table file, which is removed in the end
    trace: Path | None = None  #: Chrome trace of the last position and batch, largest hot set


def run(
    workload: Workload, options: Options, save: Callable[[dict[str, Any]], None] = lambda _: None
) -> dict[str, Any]:
    """Decode with the table in the model, in RAM and on disk, step by step in turn.

    All decode the same ids with their own key-value caches, and every step's logits must be the
    same bits; the first step warms up. On disk the page cache is cold: the file is read with
    O_DIRECT, or dropped from the page cache before every step.

    Args:
        workload: ids and allocation.
        options: what to measure.
        save: gets the result so far after every measurement.

    Returns:
        JSON values: ``machine``, the sizes, and ``measurements``, one for each position and batch,
        with ``results`` by tier: seconds (median, p10, p90), ``ratio`` to the resident table
        (median, low, high of the paired runs, 95 %) and, of the runtime, ``ledger`` sums,
        ``exposed_share`` of the time of all steps and ``exposed_share_p90`` of a step's.

    Raises:
        RuntimeError: the logits differ.
        OSError: no room for the table file, or no O_DIRECT there.
    """
    with tempfile.TemporaryDirectory(prefix="l3ext-bench-", dir=options.folder) as folder:
        bench = _Bench(workload, options, Path(folder) / "tables.safetensors")
        measurements: list[dict[str, Any]] = []
        result = {
            "machine": machine.describe(),
            "source": workload.source,
            "vocab_size": workload.allocation.vocab_size,
            "table_rows": workload.allocation.total_rows,
            "table_bytes": bench.table.data.nbytes,
            "hidden_size": options.hidden_size,
            "num_layers": options.num_layers,
            "d_emb": options.d_emb,
            "dtype": str(options.dtype).removeprefix("torch."),
            "model_bytes": bench.model_bytes,
            "page_cache": "past it, O_DIRECT" if options.direct_io else "dropped before every step",
            "measurements": measurements,
        }
        for position in options.positions:
            bench.move_lookup_layer(position)
            for batch in options.batches:
                measured = bench.measure(batch)
                measurements.append({"position": position, "batch": batch, **measured})
                save(result)
    return result


class _Bench:
    """One model whose table is resident, and in RAM and in a file beside it."""

    def __init__(self, workload: Workload, options: Options, path: Path) -> None:
        self.workload, self.options, self.path = workload, options, path
        torch.manual_seed(0)
        self.position = options.positions[0]
        self.model = L3LlamaForCausalLM(_config(workload, options)).to(options.dtype).eval()
        (layer,) = self.model.model.l3_layers
        assert layer.table is not None
        self.table = LookupTable(layer.table.detach(), layer.allocation, layer.d_model)
        every = sum(parameter.nbytes for parameter in self.model.parameters())
        self.model_bytes = every - layer.table.nbytes
        if "disk" in options.tiers:
            save_tables(path, [self.table])
            _drop_from_page_cache(path)

    def move_lookup_layer(self, position: int) -> None:
        """Let the lookup layer follow ``position`` decoder layers: swaps two of them."""
        layers = self.model.model.layers
        here, there = self.position - 1, position - 1
        attention = (layers[here].self_attn, layers[there].self_attn)
        attention[0].layer_idx, attention[1].layer_idx = there, here
        layers[here], layers[there] = layers[there], layers[here]
        self.model.config.l3_layers = [position]
        self.position = position

    def measure(self, batch: int) -> dict[str, Any]:
        steps = self.workload.decode_steps(self.options.runs + 1, batch)
        with contextlib.ExitStack() as stack:
            runtimes = {
                name: stack.enter_context(runtime) for name, runtime in self._runtimes().items()
            }
            logits = _SameBits()
            candidates = {
                name: self._decoding(name, runtimes.get(name), steps, logits)
                for name in (RESIDENT, *runtimes)
            }
            seconds = timing.interleaved_seconds(
                candidates,
                clock=timing.clock_of(torch.device("cpu")),
                runs=self.options.runs,
                budget_seconds=self.options.budget_seconds,
            )
            logits.check()
            if self.options.trace is not None and runtimes:
                list(runtimes.values())[-1].ledger.to_chrome_trace(self.options.trace)
            results = {
                name: _described(times, seconds[RESIDENT], runtimes.get(name))
                for name, times in seconds.items()
            }
        self.model.model.l3_runtime = None
        return {"bit_equal": True, "results": results}

    def _runtimes(self) -> Mapping[str, l3ext.PrefetchRuntime]:
        runtimes: dict[str, l3ext.PrefetchRuntime] = {}
        if "ram" in self.options.tiers:
            runtimes["ram"] = l3ext.PrefetchRuntime([self.table], record_steps=self.options.runs)
        for share in sorted(self.options.hot) if "disk" in self.options.tiers else ():
            runtimes[f"disk, {100 * share:g} % hot"] = l3ext.PrefetchRuntime(
                self.path,
                cache_bytes=int(share * self.table.data.nbytes),
                ring_bytes=self.options.ring_bytes,
                direct_io=self.options.direct_io,
                record_steps=self.options.runs,
            )
        return runtimes

    def _decoding(
        self, name: str, runtime: l3ext.PrefetchRuntime | None, steps: list[Tensor], logits: Any
    ) -> timing.Candidate:
        cache = None
        through_page_cache = name.startswith("disk") and not self.options.direct_io

        def step(run: int) -> None:
            nonlocal cache
            with torch.no_grad():
                output = self.model(steps[run], use_cache=True, **{CACHE_NAME: cache})
            cache = getattr(output, CACHE_NAME)
            logits.add(run, name, output.logits)

        def prepared(run: int) -> Callable[[], None]:
            self.model.model.l3_runtime = runtime
            if runtime is not None and run == 1:
                runtime.ledger.clear()  # run 0 has warmed up
            if through_page_cache:
                _drop_from_page_cache(self.path)
            return lambda: step(run)

        return prepared


class _SameBits:
    """Compares the logits of a step as they come; keeps one tensor a step."""

    def __init__(self) -> None:
        self._first: dict[int, Tensor] = {}
        self._different: list[str] = []

    def add(self, run: int, name: str, logits: Tensor) -> None:
        if not torch.equal(self._first.setdefault(run, logits), logits):
            self._different.append(f"{name} at step {run}")

    def check(self) -> None:
        if self._different:
            raise RuntimeError(
                "expected the same logits wherever the table lies, got others with "
                + ", ".join(self._different[:4])
            )


def _described(
    seconds: list[float], resident: list[float], runtime: l3ext.PrefetchRuntime | None
) -> dict[str, Any]:
    described: dict[str, Any] = dataclasses.asdict(timing.summarize(seconds))
    described["ratio"] = dataclasses.asdict(timing.paired_ratio(seconds, resident))
    if runtime is not None:
        exposed = [
            sum(layer.exposed_us for layer in record.layers) / 1e6
            for record in runtime.ledger.steps
        ]
        shares = [part / whole for part, whole in zip(exposed, seconds, strict=True)]
        described["exposed_share"] = sum(exposed) / sum(seconds)
        described["exposed_share_p90"] = timing.summarize(shares).p90
        described["ledger"] = dataclasses.asdict(runtime.ledger.totals)
        described["placement"] = dataclasses.asdict(runtime.placement) | {"path": None}
    return described


def _config(workload: Workload, options: Options) -> L3LlamaConfig:
    hidden = options.hidden_size
    if hidden % 64:
        raise ValueError(f"hidden_size: expected a multiple of 64, got {hidden}")
    for position in options.positions:
        if not 1 <= position <= options.num_layers:
            raise ValueError(f"positions: expected 1 to {options.num_layers}, got {position}")
    heads = hidden // 64
    return L3LlamaConfig(
        vocab_size=workload.allocation.vocab_size,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=options.num_layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 4 if heads % 4 == 0 else heads,
        l3_layers=[options.positions[0]],
        l3_d_emb=options.d_emb,
        l3_d_up=2 * hidden,
        allocation=workload.allocation,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )


def _drop_from_page_cache(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # only clean pages are dropped
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
