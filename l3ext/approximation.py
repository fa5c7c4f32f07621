"""How far an allocation that was not counted exactly is from the exact one, on a sample."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from l3ext._checks import check_kind, integer
from l3ext.allocation import Allocation, LZWCounter
from l3ext.corpus import TokenChunk
from l3ext.shards import RUN_TOKENS, count_shards


@dataclasses.dataclass(frozen=True)
class Distance:
    """Of allocations of one sample, each as ``allocation_distance``.

    Attributes:
        tokens: of the sample.
        documents: of the sample.
        max_codewords: the bound in the sample's own proportion, or None.
        from_exact: the approximate allocation from the exact one.
        of_another_order: the exact allocation of the same documents, shuffled, from the exact one.
            A parse depends on the order of documents, which mostly means nothing: what is not much
            more than this is not much.
    """

    tokens: int
    documents: int
    max_codewords: int | None
    from_exact: float
    of_another_order: float


def allocation_distance(a: Allocation, b: Allocation) -> float:
    """sum |d_t - d'_t| / v: 0 where equal, at most 2; half of it is the share of rows that moved.

    Raises:
        ValueError: the vocabularies or the numbers of rows differ.
    """
    check_kind(a, Allocation, "a")
    check_kind(b, Allocation, "b")
    if (a.vocab_size, a.total_rows) != (b.vocab_size, b.total_rows):
        raise ValueError(
            f"b: expected {a.vocab_size} tokens and {a.total_rows} rows, got {b.vocab_size} and "
            f"{b.total_rows}"
        )
    return float(np.abs(a.rows.astype(np.int64) - b.rows).sum() / a.total_rows)


class DocumentSample:
    """Documents drawn evenly from a corpus that passes by once, kept in its order.

    The documents stand in a random order, and the first of them that have at most ``tokens`` tokens
    together are the sample: all, where the corpus is that small, and at least one. The same corpus
    and seed give the same sample, however it is cut into chunks.
    """

    def __init__(self, tokens: int, *, seed: int = 0) -> None:
        """Args:
        tokens: the most tokens of the sample, at least 1.
        seed: of the order.
        """
        if integer(tokens, "tokens") < 1:
            raise ValueError(f"tokens: expected a sample of at least 1, got {tokens}")
        self.tokens_seen = 0
        self._most = tokens
        self._random = np.random.default_rng(integer(seed, "seed", 0))
        self._last_place = np.inf  # documents from there on are out for good
        self._places = np.empty(0)
        self._chunk = TokenChunk(np.empty(0, np.int32), np.zeros(1, np.int64))

    def add(self, chunk: TokenChunk) -> None:
        """Let the next documents pass."""
        check_kind(chunk, TokenChunk, "chunk")
        self.tokens_seen += int(chunk.tokens.size)
        places = self._random.random(chunk.offsets.size - 1)
        chosen = places < self._last_place
        self._places = np.concatenate([self._places, places[chosen]])
        self._chunk = _joined(self._chunk, _select(chunk, chosen))
        lengths = np.diff(self._chunk.offsets)
        order = np.argsort(self._places)
        fitting = int(np.searchsorted(np.cumsum(lengths[order]), self._most, side="right"))
        if fitting < order.size:
            self._last_place = self._places[order[fitting]]
            kept = np.zeros(order.size, bool)
            kept[order[: max(fitting, 1)]] = True
            self._places = self._places[kept]
            self._chunk = _select(self._chunk, kept)

    def chunk(self) -> TokenChunk:
        """The sample so far."""
        return self._chunk

    def distance(
        self,
        vocab_size: int,
        total_rows: int,
        max_rows: int,
        *,
        parse: str = "paper",
        shards: int = 1,
        max_codewords: int | None = None,
    ) -> Distance:
        """Count the sample exactly and as ``count_shards`` does, and compare the allocations.

        As ``distances`` of one size.
        """
        (distance,) = self.distances(
            vocab_size, [(total_rows, max_rows)], parse=parse, shards=shards,
            max_codewords=max_codewords,
        )  # fmt: skip
        return distance

    def distances(
        self,
        vocab_size: int,
        sizes: Sequence[tuple[int, int]],
        *,
        parse: str = "paper",
        shards: int = 1,
        max_codewords: int | None = None,
    ) -> list[Distance]:
        """Count the sample once exactly and once as ``count_shards`` does; compare every size.

        Args:
            vocab_size: of the counters.
            sizes: (total_rows, max_rows) of the allocations.
            parse: "paper" or "lzw".
            shards: of the approximate count; 1: a bound alone.
            max_codewords: of the approximate count of the whole corpus, or None.

        A sample has fewer codewords than its corpus: ``max_codewords`` of further codewords than
        the single tokens shrink as the tokens do.
        """
        sample, bound = self._chunk, max_codewords
        if bound is not None and sample.tokens.size < self.tokens_seen:
            singles = shards * vocab_size
            bound = singles + round((bound - singles) * sample.tokens.size / self.tokens_seen)
        exact = LZWCounter(vocab_size, parse)
        exact.update(sample.tokens, sample.offsets)
        shuffled = LZWCounter(vocab_size, parse)
        other = _shuffled(sample, self._random)
        shuffled.update(other.tokens, other.offsets)
        # Runs in the sample's proportion too, or a small one would not reach all shards.
        run_tokens = max(1, RUN_TOKENS * sample.tokens.size // max(1, self.tokens_seen))
        approximate = count_shards(
            [sample], vocab_size, shards=shards, parse=parse, max_codewords=bound,
            run_tokens=run_tokens,
        )  # fmt: skip
        return [
            Distance(
                tokens=int(sample.tokens.size),
                documents=sample.offsets.size - 1,
                max_codewords=bound,
                from_exact=allocation_distance(exact.allocate(*size), approximate.allocate(*size)),
                of_another_order=allocation_distance(
                    exact.allocate(*size), shuffled.allocate(*size)
                ),
            )
            for size in sizes
        ]


def _select(chunk: TokenChunk, chosen: npt.NDArray[np.bool_]) -> TokenChunk:
    lengths = np.diff(chunk.offsets)
    offsets = np.concatenate([[0], np.cumsum(lengths[chosen])]).astype(np.int64)
    return TokenChunk(chunk.tokens[np.repeat(chosen, lengths)], offsets)


def _joined(a: TokenChunk, b: TokenChunk) -> TokenChunk:
    return TokenChunk(
        np.concatenate([a.tokens, b.tokens]),
        np.concatenate([a.offsets, b.offsets[1:] + a.offsets[-1]]),
    )


def _shuffled(chunk: TokenChunk, random: np.random.Generator) -> TokenChunk:
    order = random.permutation(chunk.offsets.size - 1)
    documents: list[npt.NDArray[Any]] = [
        chunk.tokens[chunk.offsets[d] : chunk.offsets[d + 1]] for d in order
    ]
    lengths = np.diff(chunk.offsets)[order]
    tokens = np.concatenate([chunk.tokens[:0], *documents])
    return TokenChunk(tokens, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))
