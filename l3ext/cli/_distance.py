"""How far approximate allocations are from the exact ones, for the command line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from l3ext.cli._counting import Mode
from l3ext.cli._output import remark

if TYPE_CHECKING:
    from l3ext.approximation import Distance, DocumentSample


def open_sample(mode: Mode, tokens: int, seed: int) -> DocumentSample | None:
    """A sample to measure on, or None where the count is exact or 0 tokens are asked for."""
    if mode.exact or tokens == 0:
        return None
    from l3ext.approximation import DocumentSample

    return DocumentSample(tokens, seed=seed)


def measure(
    sample: DocumentSample | None, vocab_size: int, sizes: Sequence[tuple[int, int]], mode: Mode
) -> list[Distance]:
    """The distance at every size, (total_rows, max_rows); none without a sample."""
    if sample is None:
        return []
    remark("counting a sample exactly")
    return sample.distances(
        vocab_size, sizes, parse=mode.parse, shards=mode.shards or 1,
        max_codewords=mode.max_codewords,
    )  # fmt: skip


def sentence(distance: Distance) -> str:
    """What a distance means."""
    bound = distance.max_codewords
    bounded = "" if bound is None else f" (and {bound:,} codewords)"
    return (
        f"approximate: {distance.from_exact:.4f} from the exact allocation, as sum |d - d'| / v, "
        f"on a sample of {distance.tokens:,} tokens{bounded} in {distance.documents:,} documents; "
        f"counted exactly in another order, the same documents are {distance.of_another_order:.4f} "
        "from it"
    )
