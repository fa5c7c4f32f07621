"""A workload from text: its tokens, and the allocation that the LZW parse of them gives."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import numpy as np

from l3ext.allocation import LZWCounter
from l3ext.bench.attention import Workload
from l3ext.training.tokenizer import train_tokenizer


def standard_library_documents() -> list[str]:
    """Lines of the Python standard library's modules: text that every machine has."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(root.glob("*.py"))
    return [line for file in files for line in file.read_text("utf-8", "replace").splitlines()]


def from_documents(
    documents: list[str],
    *,
    vocab_size: int = 16384,
    rows_per_token: int = 4,
    max_rows: int = 512,
    num_tokens: int = 4096,
    d_in: int = 1024,
    d_emb: int = 512,
) -> Workload:
    """Train a byte-level BPE on the documents, tokenise them with it, allocate rows by LZW.

    Args:
        documents: the text.
        vocab_size: of the tokenizer; a small text gives fewer ids.
        rows_per_token: rows of the table over the vocabulary.
        max_rows: most rows a token owns.
        num_tokens: ids of a step.
        d_in: width of queries and keys.
        d_emb: width of values.
    """
    tokenizer = train_tokenizer(documents, vocab_size=vocab_size)
    encoded = tokenizer.backend_tokenizer.encode_batch(documents, add_special_tokens=False)
    ids = [np.array(encoding.ids, dtype=np.int32) for encoding in encoded]
    tokens = np.concatenate(ids)
    counter = LZWCounter(len(tokenizer))
    counter.update(tokens, np.cumsum([0, *(len(document) for document in ids)]))
    allocation = counter.allocate(rows_per_token * len(tokenizer), max_rows=max_rows)
    return Workload(tokens, allocation, num_tokens, d_in, d_emb)
