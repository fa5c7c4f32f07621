"""``l3ext merge``: counters of parts of a corpus in, one counter out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from l3ext.cli._counting import check_writable, merge_counters
from l3ext.cli._output import JsonOption, print_facts, print_json, remark


def merge(
    counters: Annotated[
        list[Path], typer.Argument(help="Counters, as --checkpoint of l3ext allocate keeps them.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The counter to write.")],
    as_json: JsonOption = False,
) -> None:
    """Merge counters of parts of a corpus: counts add up, codeword by codeword.

    Merging is associative: parts may be merged in any grouping, also merged ones with others. The
    order matters for ties only. The result is that of counting in shards, an approximation.

    \b
    Examples:
      l3ext allocate part-1.parquet --tokenizer tokenizer.json --checkpoint 1.counter
      l3ext allocate part-2.parquet --tokenizer tokenizer.json --checkpoint 2.counter
      l3ext merge 1.counter 2.counter -o corpus.counter
      l3ext allocate corpus.counter --rows 4x -o allocation.safetensors
    """
    check_writable("--output", output)
    merged = merge_counters(counters)
    merged.save(output)
    facts = {
        "counters": len(counters),
        "tokens": merged.num_tokens,
        "codewords": merged.num_codewords,
        "vocab_size": merged.vocab_size,
        "counter_bytes": merged.nbytes,
    }
    if as_json:
        print_json(facts)
        return
    print_facts(facts)
    remark(f"written to {output}")
