"""What is measured: token streams and allocations, from text or drawn from Zipf's law."""

from __future__ import annotations

import dataclasses
import sysconfig
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from l3ext.allocation import Allocation, LZWCounter
from l3ext.training.tokenizer import train_tokenizer


@dataclasses.dataclass(frozen=True)
class Workload:
    """The ids that steps are cut from, and who owns how many rows."""

    source: str  #: for people
    tokens: np.ndarray  #: integer [T]
    allocation: Allocation

    def steps(self, count: int, num_tokens: int, device: torch.device) -> list[Tensor]:
        """``count`` steps of ``num_tokens`` ids, int64, evenly spaced over the stream."""
        last = self.tokens.shape[0] - num_tokens
        if last < 0:
            raise ValueError(
                f"num_tokens: expected at most {self.tokens.shape[0]}, the ids that there are, "
                f"got {num_tokens}"
            )
        starts = np.linspace(0, last, count).astype(int)
        return [
            torch.from_numpy(self.tokens[i : i + num_tokens].astype(np.int64)).to(device)
            for i in starts
        ]

    def decode_steps(self, count: int, batch: int) -> list[Tensor]:
        """``count`` steps int64 [batch, 1]: the next id of each of ``batch`` places of the stream.

        The places are evenly spaced.
        """
        last = self.tokens.shape[0] - count
        if last < 0:
            raise ValueError(
                f"count: expected at most {self.tokens.shape[0]}, the ids that there are, "
                f"got {count}"
            )
        starts = np.linspace(0, last, batch).astype(int)
        columns = [self.tokens[start : start + count].astype(np.int64) for start in starts]
        return list(torch.from_numpy(np.stack(columns, axis=1)).unsqueeze(-1))


def standard_library_documents() -> list[str]:
    """Lines of the Python standard library's modules: text that every machine has."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(root.glob("*.py"))
    return [line for file in files for line in file.read_text("utf-8", "replace").splitlines()]


def from_documents(
    documents: list[str],
    *,
    source: str,
    vocab_size: int = 16384,
    total_rows: int | None = None,
    max_rows: int = 512,
) -> Workload:
    """Train a byte-level BPE on the documents, tokenise them with it, allocate rows by LZW.

    Args:
        documents: the text.
        source: what to call it.
        vocab_size: of the tokenizer; a small text gives fewer ids.
        total_rows: of the table; None: four times as many as ids.
        max_rows: most rows a token owns.
    """
    tokenizer = train_tokenizer(documents, vocab_size=vocab_size)
    encoded = tokenizer.backend_tokenizer.encode_batch(documents, add_special_tokens=False)
    ids = [np.array(encoding.ids, dtype=np.int32) for encoding in encoded]
    tokens = np.concatenate(ids)
    counter = LZWCounter(len(tokenizer))
    counter.update(tokens, np.cumsum([0, *(len(document) for document in ids)]))
    rows = 4 * len(tokenizer) if total_rows is None else total_rows
    return Workload(source, tokens, counter.allocate(rows, max_rows=max_rows))


def from_zipf(
    *,
    num_tokens: int,
    vocab_size: int = 180_000,
    total_rows: int = 710_000,
    max_rows: int = 512,
    seed: int = 0,
) -> Workload:
    """Independent ids with probability ~ 1 / (id + 1), and rows in proportion to it.

    Token t owns ``clip(floor(c / (t + 1)), 1, max_rows)`` rows, with the largest c that gives at
    most ``total_rows`` in all. A model of a large vocabulary, not a text.

    Args:
        num_tokens: ids of the stream.
        vocab_size: V.
        total_rows: at least V.
        max_rows: most rows a token owns.
        seed: of the draw.
    """
    rank = np.arange(1, vocab_size + 1)

    def rows_at(c: float) -> np.ndarray:
        return np.clip(c // rank, 1, max_rows).astype(np.int32)

    if total_rows < vocab_size:
        raise ValueError(f"total_rows: expected at least {vocab_size}, one an id, got {total_rows}")
    low, high = 0.0, float(vocab_size * max_rows)
    while high - low > 0.5:  # rows_at changes where c is a multiple of a rank: at integers
        middle = (low + high) / 2
        low, high = (middle, high) if rows_at(middle).sum() <= total_rows else (low, middle)
    cumulative = np.cumsum(1.0 / rank)
    draws = np.random.default_rng(seed).uniform(0.0, cumulative[-1], num_tokens)
    # A draw can round up to the whole sum, which is behind the last id.
    tokens = np.minimum(np.searchsorted(cumulative, draws, side="right"), vocab_size - 1)
    return Workload("Zipf(1)", tokens.astype(np.int32), Allocation.from_rows(rows_at(low)))
