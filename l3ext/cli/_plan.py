"""``l3ext allocate --plan``: what tables would move over a link, as text, JSON and a picture."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from l3ext.cli._counting import Corpus, Mode, check_writable, count_corpus
from l3ext.cli._distance import measure, open_sample, sentence
from l3ext.cli._output import format_bytes, parse_bytes, print_json, remark

if TYPE_CHECKING:
    from l3ext.approximation import Distance
    from l3ext.corpus import TokenChunk
    from l3ext.planner import Link, RowFormat, TableCost
    from l3ext.step_sampler import StepShape

_DEFAULT_STEPS = 1000


@dataclasses.dataclass(frozen=True)
class PlanOptions:
    """What belongs to --plan alone, as given."""

    width: list[str]
    row_dtype: list[str]
    decode: list[int]
    prefill: list[int]
    steps: int
    link: float | None
    window: float | None
    memory: str | None
    picture: Path | None

    def given(self) -> list[str]:
        """The options that were given."""
        unset = PlanOptions([], [], [], [], _DEFAULT_STEPS, None, None, None, None)
        return [
            f"--{field.name.replace('_', '-')}"
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != getattr(unset, field.name)
        ]

    def check(self, rows: list[str]) -> None:
        """See before the corpus is read that nothing is missing or nonsense."""
        for option, value in (
            ("--rows", rows or None),
            ("--width", self.width or None),
            ("--decode or --prefill", self.decode or self.prefill or None),
            ("--link", self.link),
            ("--window", self.window),
        ):
            if value is None:
                raise ValueError(f"{option}: --plan needs it")
        self.formats()
        self.shapes()
        self.rate()
        self.memory_bytes()
        if self.steps < 1:
            raise ValueError(f"--steps: expected at least 1, got {self.steps}")
        if self.picture is not None:
            from l3ext.cli._pictures import check_format

            check_writable("--picture", self.picture)
            check_format("--picture", self.picture)

    def formats(self) -> list[RowFormat]:
        from l3ext.planner import RowFormat

        dtypes = self.row_dtype or ["bfloat16"]
        widths = [_width(text) for text in self.width]
        return [
            RowFormat(d_in, d_emb, dtype, tied) for d_in, d_emb, tied in widths for dtype in dtypes
        ]

    def shapes(self) -> list[StepShape]:
        from l3ext.step_sampler import StepShape

        decode = [StepShape("decode", tokens) for tokens in self.decode]
        return decode + [StepShape("prefill", tokens) for tokens in self.prefill]

    def rate(self) -> Link:
        from l3ext.planner import Link

        assert self.link is not None
        assert self.window is not None
        return Link(self.link, self.window)

    def memory_bytes(self) -> int | None:
        return None if self.memory is None else parse_bytes(self.memory, "--memory")


def plan(
    corpus: Corpus,
    mode: Mode,
    sizes: list[tuple[int, int]],
    options: PlanOptions,
    *,
    sample_tokens: int,
    seed: int,
    checkpoint: Path | None,
    as_json: bool,
) -> None:
    """Count the corpus once, draw steps from it on the way, and say what every table costs."""
    from l3ext.planner import plan_tables
    from l3ext.step_sampler import StepSampler

    sampler = StepSampler(options.shapes(), steps=options.steps, seed=seed)
    sample = open_sample(mode, sample_tokens, seed)
    observe: list[Callable[[TokenChunk], None]] = [lambda chunk: sampler.add(chunk.tokens)]
    if sample is not None:
        observe.append(sample.add)
    counted = count_corpus(corpus, mode, checkpoint=checkpoint, observe=observe)
    distances = dict(
        zip(sizes, measure(sample, corpus.vocab_size, sizes, mode), strict=sample is not None)
    )
    counter, samples, link = counted.counter, sampler.samples(), options.rate()
    costed = functools.partial(
        plan_tables, counter, samples, sizes=sizes, formats=options.formats(), link=link
    )
    costs = costed(memory_bytes=options.memory_bytes())
    if options.picture is not None:
        from l3ext.cli._plan_picture import HOT_SHARES, draw

        draw(costed(hot_shares=HOT_SHARES), link, options.memory_bytes(), options.picture)
    if as_json:
        print_json(
            {
                "tokens": counter.num_tokens,
                "vocab_size": counter.vocab_size,
                "exact": mode.exact,
                "steps": options.steps,
                "seed": seed,
                "link": dataclasses.asdict(link),
                "tables": [_as_json(cost, distances) for cost in costs],
            }
        )
    else:
        typer.echo(
            f"{options.steps:,} steps of each kind out of {counter.num_tokens:,} tokens (seed "
            f"{seed}); one lookup layer; link {link.gigabytes_per_second:g} GB/s, window "
            f"{link.window_ms:g} ms"
        )
        for cost in costs:
            _print_cost(cost, counter.vocab_size)
        if len(costs) > 1:
            _print_overview(costs, link)
        for (total_rows, max_rows), distance in distances.items():
            typer.echo(f"\nv {total_rows:,}, k {max_rows:,}: {sentence(distance)}")
    if not mode.exact:
        remark("these allocations are approximate: --shards or --max-codewords was given")
    if options.picture is not None:
        remark(f"wrote {options.picture}")


def _as_json(cost: TableCost, distances: Mapping[tuple[int, int], Distance]) -> dict[str, Any]:
    facts = dataclasses.asdict(cost)
    distance = distances.get((cost.total_rows, cost.max_rows))
    if distance is not None:
        facts["approximation"] = dataclasses.asdict(distance)
    return facts


def _width(text: str) -> tuple[int, int, bool]:
    """(d_in, d_emb, tied) of "2048+1024", or of "2048": tied."""
    parts = text.split("+")
    try:
        numbers = [int(part) for part in parts]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 2):
        raise ValueError(f"--width: expected d_in+d_emb or one number, tied, got {text!r}")
    return numbers[0], numbers[-1], len(numbers) == 1


def _print_cost(cost: TableCost, vocab_size: int) -> None:
    typer.echo(
        f"\n{_title(cost)}: {cost.total_rows / vocab_size:.3g} rows a token, {cost.row_bytes:,} "
        f"bytes a row, {format_bytes(cost.table_bytes)}"
    )
    _print_columns(
        ["hot set", "of the table", "bytes", "tokens", "of row traffic"],
        [
            [
                hot.label,
                f"{100 * hot.rows / cost.total_rows:.1f} %",
                format_bytes(hot.bytes),
                f"{hot.tokens:,}",
                f"{100 * hot.traffic_share:.1f} %",
            ]
            for hot in cost.hot_sets
        ],
    )
    _print_columns(
        ["step", "hot set", "bytes: mean", "p99", "on the link: mean", "p99", "exposed: mean",
         "p99", "p99 fits"],
        [
            [
                str(step.shape) if place == 0 else "",
                transfer.hot_set,
                format_bytes(round(transfer.bytes_mean)),
                format_bytes(transfer.bytes_p99),
                f"{transfer.link_ms_mean:.3f} ms",
                f"{transfer.link_ms_p99:.3f} ms",
                f"{transfer.exposed_ms_mean:.3f} ms",
                f"{transfer.exposed_ms_p99:.3f} ms",
                "yes" if transfer.fits else "no",
            ]
            for step in cost.steps
            for place, transfer in enumerate(step.transfers)
        ],
    )  # fmt: skip
    rows = (f"{step.shape}: {step.rows_mean:,.0f}, p99 {step.rows_p99:,}" for step in cost.steps)
    typer.echo(f"  rows a step, the hot set's among them: {'; '.join(rows)}")


def _print_overview(costs: list[TableCost], link: Link) -> None:
    """One line a table: the hot set that was asked for, or none."""
    label = "memory" if any(hot.label == "memory" for hot in costs[0].hot_sets) else "none"
    place = [hot.label for hot in costs[0].hot_sets].index(label)
    typer.echo(
        f"\np99 on the link, hot set: {label}; * is beyond the window of {link.window_ms:g} ms"
    )
    _print_columns(
        ["table", "bytes", *(str(step.shape) for step in costs[0].steps)],
        [
            [
                _title(cost),
                format_bytes(cost.table_bytes),
                *(
                    f"{transfer.link_ms_p99:.3f} ms{' ' if transfer.fits else '*'}"
                    for transfer in (step.transfers[place] for step in cost.steps)
                ),
            ]
            for cost in costs
        ],
    )


def _title(cost: TableCost) -> str:
    return f"v {cost.total_rows:,}, k {cost.max_rows:,}, {cost.format}"


def _print_columns(head: list[str], rows: list[list[str]]) -> None:
    """Aligned columns, the first to the left."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for row in [head, *rows]:
        cells = [row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]
        typer.echo("  " + "  ".join(cells))
