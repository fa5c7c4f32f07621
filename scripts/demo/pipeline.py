"""The phases of the demo, one after the other, and the report."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from corpus import Corpus, standard_library, text_file, tokenise
from serving import TIERS, serve
from sizes import Sizes
from training import build_dense, build_l3, train_and_measure

import l3ext
from l3ext import _C
from l3ext._files import atomic_path
from l3ext.training import TokenFile, train_tokenizer, write_token_file
from l3ext.training.parameters import count_parameters

_PACKAGES = ("torch", "transformers", "tokenizers", "numpy")


class Phases:
    """Wall-clock and processor time of each part, printed as it ends."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        print(f"* {name}", flush=True)
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        seconds = time.perf_counter() - wall
        self.records.append(
            {"name": name, "seconds": seconds, "cpu_seconds": time.process_time() - cpu}
        )
        print(f"    {seconds:.1f} s", flush=True)


def run(text: Path | None, out: Path, sizes: Sizes) -> None:
    """All phases, then the report."""
    from figures import rows_by_rank, speeds, timelines, training_curves
    from report import render

    work = out / "work"
    shutil.rmtree(work, ignore_errors=True)  # every demo starts afresh: its times are measured
    work.mkdir(parents=True)
    phase = Phases()

    with phase("read the corpus"):
        corpus = (
            standard_library(limit=sizes.corpus_bytes)
            if text is None
            else text_file(text, limit=sizes.corpus_bytes)
        )
    with phase("train a tokenizer"):
        tokenizer = train_tokenizer(corpus.train, vocab_size=sizes.vocab_size)
        vocab_size = len(tokenizer)
    with phase("tokenise"):
        train_file, held_out_file = (
            write_token_file(work / name, tokenise(texts, tokenizer), vocab_size=vocab_size)
            for name, texts in (
                ("train.tokens", corpus.train),
                ("held-out.tokens", corpus.held_out),
            )
        )
        print(f"    {len(train_file.tokens):,} tokens, {len(held_out_file.tokens):,} held out")
    with phase("allocate rows by LZW"):
        allocation, allocation_facts = _allocate(train_file, sizes)
        print(f"    {allocation.total_rows:,} rows, {allocation.max_rows} at most")

    l3_model = build_l3(sizes, vocab_size, allocation)
    active = count_parameters(l3_model).active
    dense_model = build_dense(sizes, vocab_size, active=active)
    trained = {}
    for name, model in (("dense", dense_model), ("l3", l3_model)):
        with phase(f"train the {'dense' if name == 'dense' else 'L3'} model"):
            trained[name] = train_and_measure(
                name,
                model,
                sizes,
                tokens=train_file.tokens,
                held_out=held_out_file.tokens,
                tokenizer=tokenizer,
                output=work / name,
            )
            print(f"    held-out perplexity {trained[name].facts['ppl']:.2f}")
    with phase("serve from the model, RAM and disk"):
        serving = serve(
            trained["l3"].checkpoint,
            corpus.prompts,
            tokenizer,
            sizes,
            table_file=work / "tables.safetensors",
        )
    report = {
        "format": "l3ext.demo.1",
        "dense": trained["dense"].facts,
        "l3": trained["l3"].facts,
        "outputs_equal": serving["outputs_equal"],
        "exposed_fraction": serving["exposed_fraction"],
        "tokens_per_second": serving["tokens_per_second"],
        "allocation": allocation_facts,
        "corpus": _describe(corpus, train_file, held_out_file),
        "serving": serving,
        "phases": phase.records,
        "machine": {
            "processor": _processor(),
            "cores": len(os.sched_getaffinity(0)),
            "isa": _C.cpu_isa(),
        },
        "versions": {
            "l3ext": l3ext.__version__,
            "Python": platform.python_version(),
            **{name: metadata.version(name) for name in _PACKAGES},
        },
        "command": " ".join(["python", *sys.argv]),
    }
    with phase("draw the report"):
        owners = np.argsort(-allocation.rows, kind="stable")[:6]
        figures = {
            "rows": rows_by_rank(
                allocation.rows,
                [repr(tokenizer.decode([token])) for token in owners],
                max_rows=allocation.max_rows,
            ),
            "curves": training_curves(
                {"dense": report["dense"]["curve"], "with L3": report["l3"]["curve"]}
            ),
            "speeds": speeds(serving["tokens_per_second_all"]),
            "timelines": timelines(serving["timeline"]),
        }
    for name, content in (
        ("report.json", json.dumps(report, indent=1)),
        ("report.html", render(report, figures)),
    ):
        with atomic_path(out / name) as temporary:
            temporary.write_text(content, encoding="utf-8")
    _print_summary(report, out)


def _allocate(file: TokenFile, sizes: Sizes) -> tuple[l3ext.Allocation, dict[str, Any]]:
    counter = l3ext.LZWCounter(file.vocab_size)
    counter.update(file.tokens, file.offsets)
    allocation = counter.allocate(sizes.rows_per_token * file.vocab_size, max_rows=sizes.max_rows)
    rows = allocation.rows
    return allocation, {
        "codewords": counter.num_codewords,
        "vocab_size": file.vocab_size,
        "total_rows": allocation.total_rows,
        "max_rows": allocation.max_rows,
        "tokens_with_one_row": int((rows == 1).sum()),
        "tokens_with_max_rows": int((rows == allocation.max_rows).sum()),
        "mean_rows_per_corpus_token": float(rows[file.tokens].mean()),
        "rows": rows.tolist(),
    }


def _describe(corpus: Corpus, train: TokenFile, held_out: TokenFile) -> dict[str, Any]:
    return {
        "name": corpus.name,
        "train_documents": len(corpus.train),
        "held_out_documents": len(corpus.held_out),
        "train_tokens": len(train.tokens),
        "held_out_tokens": len(held_out.tokens),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.machine()


def _print_summary(report: dict[str, Any], out: Path) -> None:
    dense, l3 = report["dense"], report["l3"]
    print(
        f"\nheld-out perplexity   dense {dense['ppl']:.2f}   with L3 {l3['ppl']:.2f}"
        f"\nactive parameters     dense {dense['parameters']['active']:,}   "
        f"with L3 {l3['parameters']['active']:,}"
    )
    for tier in TIERS:
        exposed = report["exposed_fraction"].get(tier)
        waited = (
            f", {100 * exposed:.2f} % of the time waiting for rows" if exposed is not None else ""
        )
        print(f"tables {tier:<9}      {report['tokens_per_second'][tier]:.1f} tokens/s{waited}")
    print(f"same text             {'yes' if report['outputs_equal'] else 'NO'}")
    sample = report["serving"]["samples"][0]
    print(f"\n{sample['prompt']}{sample['text']}\n")
    print(f"report: {out / 'report.html'}, {out / 'report.json'}")
