"""``report.html``: one file, no links out, every number from ``report.json``."""

from __future__ import annotations

from html import escape
from typing import Any

_CSS = """
:root { --ink: #1c2330; --soft: #5b6472; --line: #e3e7ee; --blue: #2457d6; --paper: #fff; }
* { box-sizing: border-box; }
body { margin: 0; background: #f5f6f9; color: var(--ink);
       font: 16px/1.6 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 860px; margin: 0 auto; padding: 48px 24px 72px; }
h1 { font-size: 30px; line-height: 1.25; margin: 0 0 10px; letter-spacing: -0.01em; }
h2 { font-size: 20px; margin: 0 0 6px; }
p { margin: 6px 0 12px; max-width: 68ch; }
.lead { color: var(--soft); font-size: 17px; margin-bottom: 28px; }
.cards { display: grid; grid-template-columns: repeat(4, 1fr); gap: 12px; margin: 0 0 20px; }
.card { background: var(--paper); border: 1px solid var(--line); border-radius: 10px;
        padding: 16px 16px 14px; }
.card b { display: block; font-size: 27px; line-height: 1.15; font-weight: 650;
          font-variant-numeric: tabular-nums; letter-spacing: -0.02em; }
.card.main b { color: var(--blue); }
.card span { display: block; font-size: 13px; line-height: 1.4; color: var(--soft);
             margin-top: 6px; }
section { background: var(--paper); border: 1px solid var(--line); border-radius: 10px;
          padding: 24px 26px 18px; margin: 16px 0; }
svg { width: 100%; height: auto; display: block; margin: 10px 0 6px;
      font-family: system-ui, "Segoe UI", Roboto, Arial, sans-serif; }
table { border-collapse: collapse; width: 100%; font-size: 14.5px; margin: 8px 0 12px;
        font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 6px 0 6px 18px; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
thead th { color: var(--soft); font-weight: 500; font-size: 13px; }
tbody th { font-weight: 400; }
pre { background: #f5f6f9; border-radius: 8px; padding: 14px 16px; margin: 10px 0 14px;
      font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace;
      white-space: pre-wrap; overflow-wrap: anywhere; }
pre mark { background: none; color: var(--blue); font-weight: 600; }
.note { color: var(--soft); font-size: 14px; }
code { font: 0.9em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
@media (max-width: 700px) { .cards { grid-template-columns: repeat(2, 1fr); } }
"""


def render(report: dict[str, Any], figures: dict[str, str]) -> str:
    """The page for a finished demo.

    Args:
        report: what ``report.json`` holds.
        figures: SVG texts "rows", "curves", "speeds" and "timelines".
    """
    dense, l3, serving = report["dense"], report["l3"], report["serving"]
    gain = 100 * (1 - l3["ppl"] / dense["ppl"])
    verdict = f"{gain:.1f} % lower" if gain >= 0 else f"{-gain:.1f} % higher"
    equal = "the same" if report["outputs_equal"] else "DIFFERENT"
    body = f"""
<h1>Large Lookup Layers on {escape(report["corpus"]["name"])}</h1>
<p class="lead">Two small Llamas, trained on the same tokens in the same order. One has a lookup
layer, whose table grows the model without making a token more expensive; the table was then moved
out of the model, to RAM and to disk.</p>
<div class="cards">
{_card(f"{l3['ppl']:.2f}", f"held-out perplexity with L3, {verdict} than dense", main=True)}
{_card(f"{dense['ppl']:.2f}", "held-out perplexity of the dense model, no fewer active parameters")}
{_card(equal, f"text from model, RAM and disk, in all {3 * serving['runs_per_tier']} runs")}
{
        _card(
            _percent(report["exposed_fraction"]["disk"]),
            "of the time, decoding waited for rows from disk "
            f"({_percent(report['exposed_fraction']['ram'])} from RAM)",
        )
    }
</div>
{_section("Training", _training(report), figures["curves"])}
{_section("Who owns the rows", _allocation(report), figures["rows"])}
{_section("Serving", _serving(report), figures["speeds"])}
{_section("Fetch against compute", _timeline(report), figures["timelines"])}
{_section("What it writes", _samples(report))}
{_section("How the numbers were made", _method(report))}
"""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>l3ext demo</title><style>{_CSS}</style></head>\n<body><main>{body}</main></body>"
        "</html>\n"
    )


def _card(value: str, text: str, *, main: bool = False) -> str:
    kind = "card main" if main else "card"
    return f'<div class="{kind}"><b>{escape(value)}</b><span>{escape(text)}</span></div>'


def _section(title: str, text: str, figure: str = "") -> str:
    return f"<section><h2>{escape(title)}</h2>\n{text}\n{figure}</section>"


def _training(report: dict[str, Any]) -> str:
    rows = [
        ("active parameters", "{:,}", lambda m: m["parameters"]["active"]),
        ("all parameters", "{:,}", lambda m: m["parameters"]["total"]),
        ("width of the MLPs", "{:,}", lambda m: m["intermediate_size"]),
        ("training tokens", "{:,}", lambda m: m["train_tokens"]),
        ("training tokens/s", "{:,.0f}", lambda m: m["train_tokens_per_second"]),
        ("held-out loss, nats per token", "{:.4f}", lambda m: m["loss"]),
        ("held-out perplexity", "{:.2f}", lambda m: m["ppl"]),
    ]
    lines = [
        [label, *(form.format(value(report[model])) for model in ("dense", "l3"))]
        for label, form, value in rows
    ]
    table = _table(["", "dense", "with L3"], lines)
    return (
        f"{table}<p>Active are all parameters that one token's pass may read: everything but the "
        f"table, and as many rows of it as the largest owner has "
        f"({report['allocation']['max_rows']}; a token of this text owns "
        f"{report['allocation']['mean_rows_per_corpus_token']:.1f} on average). The dense model's "
        f"MLPs were widened until it had at least as many.</p>"
    )


def _allocation(report: dict[str, Any]) -> str:
    a = report["allocation"]
    return (
        f"<p>An LZW parse of the training tokens found {a['codewords']:,} codewords. Each grants a "
        f"row to its last token, the most frequent codewords first, until {a['total_rows']:,} rows "
        f"are given away: {a['tokens_with_one_row']:,} of {a['vocab_size']:,} tokens keep one, "
        f"{a['tokens_with_max_rows']:,} reach the limit of {a['max_rows']}.</p>"
    )


def _serving(report: dict[str, Any]) -> str:
    s = report["serving"]
    disk = s["placement"]["disk"]
    direct = "past the page cache (O_DIRECT)" if disk["direct_io"] else "through the page cache"
    return (
        f"<p>Sampling {s['new_tokens']} tokens after each of {len(s['samples'])} prompts, one "
        f"prompt at a time. The table takes {_size(disk['table_bytes'])}; outside the model, a hot "
        f"set of {_size(disk['hot_bytes'])} stays beside it, and the rest is fetched each step, "
        f"from disk {direct}. A wait for rows that were not there in time is "
        f"<em>exposed</em>: {_percent(report['exposed_fraction']['ram'])} of the time from RAM, "
        f"{_percent(report['exposed_fraction']['disk'])} from disk.</p>"
    )


def _timeline(report: dict[str, Any]) -> str:
    return (
        "<p>Consecutive decode steps from the runtime's ledger. The ids of a step are known "
        "before its first layer, so its rows are fetched while the layers below the lookup layer "
        "compute; only what is not there in time is waited for.</p>"
    )


def _samples(report: dict[str, Any]) -> str:
    blocks = [
        f"<pre><mark>{escape(sample['prompt'])}</mark>{escape(sample['text'])}</pre>"
        for sample in report["serving"]["samples"]
    ]
    return (
        "<p>Prompts in blue. With so little training it is the shape that was learned, not the "
        "sense.</p>" + "\n".join(blocks)
    )


def _method(report: dict[str, Any]) -> str:
    c, config, machine = report["corpus"], report["l3"]["config"], report["machine"]
    phases = [
        [p["name"], f"{p['seconds']:.1f} s", f"{p['cpu_seconds']:.1f} s"] for p in report["phases"]
    ]
    total = sum(p["seconds"] for p in report["phases"])
    cpu = sum(p["cpu_seconds"] for p in report["phases"])
    phases.append(["total", f"{total:.1f} s", f"{cpu:.1f} s"])
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    return f"""
<p>Corpus: {escape(c["name"])}, {c["train_documents"]:,} documents with {c["train_tokens"]:,} tokens
to train on, {c["held_out_documents"]:,} with {c["held_out_tokens"]:,} held out, of which
{report["l3"]["eval_tokens"]:,} were predicted, the same for both models. Byte-level BPE of
{report["allocation"]["vocab_size"]:,} ids, trained on the training documents.</p>
<p>Both models: {config["steps"]:,} steps of {config["batch_size"]} sequences of
{config["sequence_length"]} tokens, AdamW, cosine schedule, peak learning rates
{config["learning_rate"]:g} (matrices) and {config["embedding_learning_rate"]:g} (embeddings);
the table's {config["table_learning_rate"]:g}. Same seed, same order of the data. The first two
rates were chosen beforehand by the dense model's held-out loss, and the model with L3 uses them as
they are.</p>
<p>Speeds are medians over {report["serving"]["runs_per_tier"]} runs a tier, in the order model,
RAM, disk, disk, RAM, model. Exposed is what the runtime's ledger says that decoding was blocked
for, divided by the time of the runs.</p>
{_table(["phase", "wall clock", "processor"], phases)}
<p class="note">{escape(machine["processor"])}, {machine["cores"]} cores, kernels
<code>{escape(machine["isa"])}</code>. {escape(versions)}. Command:
<code>{escape(report["command"])}</code></p>
"""


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [
        f"<tr><th>{escape(row[0])}</th>"
        + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    ]
    header = "".join(f"<th>{escape(name)}</th>" for name in head)
    return (
        f"<table><thead><tr>{header}</tr></thead><tbody>{'</tr>'.join(lines)}</tr></tbody></table>"
    )


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.2f} %"


def _size(count: int) -> str:
    return f"{count / (1 << 20):.1f} MiB"
