"""A workload from text: its tokens, and the allocation that the LZW parse of them gives."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np

import l3ext
from l3ext.bench.attention import Workload
from l3ext.corpus import read_documents, read_tokens
from l3ext.training.tokenizer import train_tokenizer


def standard_library(limit: int = 200) -> list[Path]:
    """Python sources that every machine has: the first ``limit`` modules of the library."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(path for path in root.glob("*.py") if path.stat().st_size > 0)
    return files[:limit]


def from_text(
    paths: Sequence[Path],
    *,
    vocab_size: int = 16384,
    rows_per_token: int = 4,
    max_rows: int = 512,
    num_tokens: int = 4096,
    d_in: int = 1024,
    d_emb: int = 512,
    documents: int | None = None,
) -> Workload:
    """Train a byte-level BPE on the text, tokenise it with that, allocate rows by LZW.

    Args:
        paths: text files, one document a line.
        vocab_size: of the tokenizer; a small text gives fewer ids.
        rows_per_token: rows of the table over the vocabulary.
        max_rows: most rows a token owns.
        num_tokens: ids of a step.
        d_in: width of queries and keys.
        d_emb: width of values.
        documents: read no more than this many.
    """

    def texts() -> Iterator[str]:
        return islice(read_documents(paths), documents)

    tokenizer = train_tokenizer(texts(), vocab_size=vocab_size)
    counter = l3ext.LZWCounter(len(tokenizer))
    chunks = []
    for chunk in read_tokens(paths, tokenizer=tokenizer):
        counter.update(chunk.tokens, chunk.offsets)
        chunks.append(np.asarray(chunk.tokens, dtype=np.int32))
    allocation = counter.allocate(rows_per_token * len(tokenizer), max_rows=max_rows)
    return Workload(np.concatenate(chunks), allocation, num_tokens, d_in, d_emb)
