"""Which rows should stay near: a static hot set, what was used lately, or some of both?

    python benchmarks/compare_caches.py --train prose.txt --text prose-test.txt \\
        --text wiki-test.txt --tokenizer tokenizer.json --json out.json

Counts, by simulation, the bytes that decode steps fetch from a table of four rows an id, at most
512, allocated on --train. A step takes the next token of each of `batch` places of a text, evenly
spaced; equal ids are fetched once. Nothing is drawn: every run gives the same figures. A share of
the budget is static, the tokens that --train used most; the rest is one of

  ring    as the runtime has it: blocks are written round a buffer, a block that is still there is
          a hit, and a hit moves nothing;
  clock   the same, but a block that was hit since it was written is passed over, once;
  lru     the least recently used goes first, and no room is lost between blocks: no layout of
          contiguous blocks can do that without copies.

A static part that fills the budget has no room left for the rows of the step itself, which the
runtime needs too; the others have them in their dynamic part. A step with more rows than that part
has room for fetches what is missing into a buffer of its own ("spilled"), and leaves nothing.
"""

from __future__ import annotations

import argparse
import collections
import json
import time
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

import l3ext
from l3ext.bench import machine
from l3ext.corpus import read_tokens

BATCHES = (1, 8, 32)
BUDGETS = (0.05, 0.10, 0.20)
STATIC_SHARES = (0.0, 0.25, 0.5, 0.75, 0.9)
WARM_UP = 0.1  # of the steps, not counted


class Ring:
    """Blocks of rows round a buffer, in the order in which the head comes to them."""

    def __init__(self, rows, second_chance):
        self.rows, self.second_chance = rows, second_chance
        self.head = 0
        self.blocks = collections.deque()  # [begin, end, token]
        self.present = {}  # token: hit since it was written or passed over

    def step(self, tokens, rows_of):
        """Fetch what is missing of these distinct tokens; return the tokens found, and whether
        the step spilled."""
        found = {token for token in tokens if token in self.present}
        for token in found:
            self.present[token] = True
        pinned = set(found)
        for token in tokens:
            if token not in found:
                if not self._write(token, rows_of[token], pinned):
                    self._drop(pinned - found)
                    return found, True
                pinned.add(token)
        return found, False

    def _drop(self, tokens):
        self.blocks = collections.deque(block for block in self.blocks if block[2] not in tokens)
        for token in tokens:
            del self.present[token]

    def _write(self, token, rows, pinned):
        begin, rounds = self.head, 0
        while True:
            if begin + rows > self.rows:
                # Second chances are used up after one round, pinned blocks never go.
                rounds += 1
                if rounds > 3:
                    self.head = begin
                    return False
                for _ in range(len(self.blocks)):  # what lies behind `begin` comes last now
                    if self.blocks[0][0] < begin:
                        break
                    self.blocks.rotate(-1)
                begin = 0
                continue
            if not self.blocks or not begin <= self.blocks[0][0] < begin + rows:
                break
            old = self.blocks[0][2]
            if old in pinned or (self.second_chance and self.present[old]):
                if old not in pinned:
                    self.present[old] = False
                begin = self.blocks[0][1]
                self.blocks.rotate(-1)
            else:
                self.blocks.popleft()
                del self.present[old]
        self.head = begin + rows
        self.blocks.append((begin, self.head, token))
        self.present[token] = False
        return True


class Lru:
    """Whole blocks by recency, without a layout."""

    def __init__(self, rows):
        self.room = rows
        self.blocks = collections.OrderedDict()

    def step(self, tokens, rows_of):
        found = {token for token in tokens if token in self.blocks}
        missing = [token for token in tokens if token not in found]
        for token in found:
            self.blocks.move_to_end(token)
        written = set()
        for token in missing:
            while self.room < rows_of[token]:
                oldest = next(iter(self.blocks), None)
                if oldest is None or oldest in found or oldest in written:
                    # The oldest is this step's own, and so are all.
                    for own in written:
                        self.room += self.blocks.pop(own)
                    return found, True
                self.room += self.blocks.pop(oldest)
            self.room -= rows_of[token]
            self.blocks[token] = rows_of[token]
            written.add(token)
        return found, False


def static_set(allocation, budget_rows):
    """The tokens by frequency, each that still fits, as the runtime chooses them; their rows."""
    rows = allocation.rows
    chosen = set()
    for token in np.lexsort((np.arange(rows.size), -rows, -allocation.frequency)).tolist():
        if 0 < rows[token] <= budget_rows:
            budget_rows -= int(rows[token])
            chosen.add(token)
    return chosen, budget_rows


def batched_steps(tokens, batch, limit):
    """The distinct ids of each step, in order."""
    length = tokens.size // batch
    streams = tokens[: length * batch].reshape(batch, length).T[: max(1, limit // batch)].tolist()
    return [list(dict.fromkeys(step)) for step in streams]


def simulate(steps, rows_of, allocation, budget_rows, share, kind):
    """Rows and tokens fetched, used and found, over the steps after the warm-up."""
    hot, left = static_set(allocation, int(budget_rows * share))
    dynamic_rows = left + budget_rows - int(budget_rows * share)
    dynamic = {
        "none": lambda: None,
        "ring": lambda: Ring(dynamic_rows, second_chance=False),
        "clock": lambda: Ring(dynamic_rows, second_chance=True),
        "lru": lambda: Lru(dynamic_rows),
    }[kind]()
    first = int(len(steps) * WARM_UP)
    used = fetched = tokens = hits = spilled = 0
    for index, step in enumerate(steps):
        rest = [token for token in step if token not in hot]
        found, spill = dynamic.step(rest, rows_of) if dynamic else ((), False)
        if index < first:
            continue
        used += sum(rows_of[token] for token in step)
        fetched += sum(rows_of[token] for token in rest if token not in found)
        tokens += len(step)
        hits += len(step) - len(rest) + len(found)
        spilled += spill
    counted = len(steps) - first
    return {
        "cache": kind,
        "static_share": share,
        "rows_a_step": used / counted,
        "fetched_rows_a_step": fetched / counted,
        "hit_share_of_bytes": 1 - fetched / used,
        "hit_share_of_tokens": hits / tokens,
        "spilled_share_of_steps": spilled / counted,
    }


def read(path, tokenizer):
    chunks = list(read_tokens(path, tokenizer=tokenizer))
    tokens = np.concatenate([chunk.tokens for chunk in chunks])
    lengths = np.concatenate([np.diff(chunk.offsets) for chunk in chunks])
    return tokens, np.concatenate([[0], np.cumsum(lengths)])


def print_table(results, row_bytes):
    """One block for each text, batch and budget: static shares down, caches across."""
    for result in results:
        by_place = {(r["cache"], r["static_share"]): r for r in result["caches"]}
        used = by_place["none", 1.0]["rows_a_step"] * row_bytes / 1e6
        print(
            f"\n{result['text']}, batch {result['batch']}, {100 * result['budget']:.0f} % of the "
            f"table: a step uses {used:.2f} MB and fetches, MB (hit share of bytes)"
        )
        print(f"{'static':>8}" + "".join(f"{kind:>18}" for kind in ("ring", "clock", "lru")))
        for share in STATIC_SHARES:
            line = f"{100 * share:6.0f} %"
            for kind in ("ring", "clock", "lru"):
                cell = by_place[kind, share]
                spilled = "*" if cell["spilled_share_of_steps"] > 0 else " "
                megabytes = cell["fetched_rows_a_step"] * row_bytes / 1e6
                line += f"{megabytes:8.3f} ({100 * cell['hit_share_of_bytes']:5.1f} %){spilled}"
            print(line)
        cell = by_place["none", 1.0]
        megabytes = cell["fetched_rows_a_step"] * row_bytes / 1e6
        print(f"   100 %{megabytes:8.3f} ({100 * cell['hit_share_of_bytes']:5.1f} %)")
    print("\n* some steps spilled")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", type=Path, required=True, help="what the rows are allocated on")
    parser.add_argument("--text", type=Path, action="append", required=True, help="repeatable")
    parser.add_argument("--tokenizer", type=Path, required=True, help="tokenizer.json")
    parser.add_argument("--row-bytes", type=int, default=6144, help="2048 + 1024 bfloat16 numbers")
    parser.add_argument("--tokens", type=int, default=120_000, help="of each text, at most")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    started = time.perf_counter()
    tokens, offsets = read(arguments.train, arguments.tokenizer)
    vocab_size = Tokenizer.from_file(str(arguments.tokenizer)).get_vocab_size()
    counter = l3ext.LZWCounter(vocab_size)
    counter.update(tokens, offsets)
    allocation = counter.allocate(4 * vocab_size, max_rows=512)
    rows_of = allocation.rows.tolist()
    results = []
    for text in arguments.text:
        tokens, _ = read(text, arguments.tokenizer)
        name = f"{text.parent.name}/{text.name}"
        for batch in BATCHES:
            steps = batched_steps(tokens, batch, arguments.tokens)
            for budget in BUDGETS:
                rows = int(budget * allocation.total_rows)
                caches = [simulate(steps, rows_of, allocation, rows, 1.0, "none")]
                caches += [
                    simulate(steps, rows_of, allocation, rows, share, kind)
                    for share in STATIC_SHARES
                    for kind in ("ring", "clock", "lru")
                ]
                results.append(
                    {"text": name, "batch": batch, "budget": budget, "steps": len(steps)}
                    | {"caches": caches}
                )
    print_table(results, arguments.row_bytes)
    print(f"{time.perf_counter() - started:.0f} s")
    if arguments.json:
        facts = {
            "machine": machine.describe(),
            "train": f"{arguments.train.parent.name}/{arguments.train.name}",
            "vocab_size": allocation.vocab_size,
            "table_rows": allocation.total_rows,
            "row_bytes": arguments.row_bytes,
            "results": results,
        }
        arguments.json.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
