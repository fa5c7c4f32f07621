"""LZW counter against the plain Python listing, on one text file, in one run.

    python benchmarks/compare_lzw.py text.txt --tokenizer t.json --threads 1 2 --json out.json

Trains a byte-level BPE on the file where the tokenizer file does not exist yet. A line is a
document. Both sides count the same tokens and must end with the same dictionary. Numbers of threads
take turns; the plain listing has its own, as a system that takes freed memory back meanwhile lets
the next run pay for it.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import l3ext
from l3ext.corpus import read_tokens

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.lzw.reference import ReferenceCounter


def train_tokenizer(text, path, vocab_size):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train(
        [str(text)],
        trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer.save(str(path))


def read_corpus(text, tokenizer):
    chunks = list(read_tokens(text, tokenizer=tokenizer))
    tokens = np.concatenate([chunk.tokens for chunk in chunks])
    lengths = np.concatenate([np.diff(chunk.offsets) for chunk in chunks])
    return tokens, np.concatenate([[0], np.cumsum(lengths)])


def timed(action):
    started = time.perf_counter()
    result = action()
    return time.perf_counter() - started, result


def summary(seconds, tokens):
    rates = sorted(tokens / s for s in seconds)
    return {"median": statistics.median(rates), "min": rates[0], "max": rates[-1]}


def count(tokens, offsets, vocab_size, parse, threads):
    counter = l3ext.LZWCounter(vocab_size, parse=parse)
    counter.update(tokens, offsets, threads=threads)
    return counter


def count_plainly(documents, vocab_size, parse):
    reference = ReferenceCounter(vocab_size, parse)
    reference.update(documents)
    return reference


def compare(tokens, offsets, vocab_size, parse, threads, runs, plain_runs):
    documents = np.split(tokens, offsets[1:-1])
    documents = [document.tolist() for document in documents]
    ours, plain = {n: [] for n in threads}, []
    same = True
    for _ in range(plain_runs):
        seconds, reference = timed(lambda: count_plainly(documents, vocab_size, parse))
        plain.append(seconds)
    for run in range(runs):
        for n in threads if run % 2 == 0 else threads[::-1]:
            seconds, counter = timed(lambda n=n: count(tokens, offsets, vocab_size, parse, n))
            ours[n].append(seconds)
            if run == 0:
                same &= list(counter.codewords()) == list(reference.count.items())
    tracemalloc.start()
    reference = count_plainly(documents, vocab_size, parse)
    plain_bytes = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    allocation = counter.allocate(4 * vocab_size, 512)
    return {
        "parse": parse,
        "equal_dictionaries": same,
        "codewords": counter.num_codewords,
        "tokens_per_second": {n: summary(seconds, tokens.size) for n, seconds in ours.items()},
        "plain_tokens_per_second": summary(plain, tokens.size),
        "nbytes": counter.nbytes,
        "plain_nbytes": plain_bytes,
        "tokens_with_1_row": int((allocation.rows == 1).sum()),
        "tokens_with_512_rows": int((allocation.rows == 512).sum()),
        "mean_rows_per_corpus_token": float(
            (allocation.rows.astype(np.int64) * allocation.frequency).sum() / tokens.size
        ),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path, help="one document a line")
    parser.add_argument("--tokenizer", type=Path, required=True, help="tokenizer.json; made if new")
    parser.add_argument("--vocab-size", type=int, default=32768, help="of a new tokenizer")
    parser.add_argument("--threads", type=int, nargs="+", default=[1], help="that count, in turn")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--plain-runs", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    if not arguments.tokenizer.exists():
        train_tokenizer(arguments.text, arguments.tokenizer, arguments.vocab_size)
    vocab_size = Tokenizer.from_file(str(arguments.tokenizer)).get_vocab_size()
    tokens, offsets = read_corpus(arguments.text, arguments.tokenizer)
    print(f"{tokens.size:,} tokens, {offsets.size - 1:,} documents, vocabulary {vocab_size:,}")
    results = []
    for parse in ("paper", "lzw"):
        result = compare(
            tokens, offsets, vocab_size, parse, arguments.threads, arguments.runs,
            arguments.plain_runs,
        )  # fmt: skip
        results.append(result)
        plain = result["plain_tokens_per_second"]
        for threads, ours in result["tokens_per_second"].items():
            print(
                f"{parse:5}  C++, {threads} threads: {ours['median'] / 1e6:.2f} M tokens/s "
                f"({ours['min'] / 1e6:.2f}-{ours['max'] / 1e6:.2f}), "
                f"{1e9 / ours['median']:.1f} ns a token, {ours['median'] / plain['median']:.0f}x"
            )
        print(
            f"       Python {plain['median'] / 1e6:.2f} M tokens/s "
            f"({plain['min'] / 1e6:.2f}-{plain['max'] / 1e6:.2f});  memory "
            f"{result['nbytes'] / 1e6:.0f} MB and {result['plain_nbytes'] / 1e6:.0f} MB;  "
            f"{result['codewords']:,} codewords, "
            f"equal: {result['equal_dictionaries']};  rows: {result['tokens_with_1_row']:,} own 1, "
            f"{result['tokens_with_512_rows']} own 512, "
            f"mean {result['mean_rows_per_corpus_token']:.1f}"
        )
    if arguments.json:
        facts = {"machine": platform.processor() or platform.machine(), "text": arguments.text.name}
        facts |= {"tokens": int(tokens.size), "vocab_size": vocab_size, "results": results}
        arguments.json.write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
