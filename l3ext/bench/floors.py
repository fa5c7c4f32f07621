"""The least that a step must move and multiply, whatever computes it."""

from __future__ import annotations

import dataclasses

from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Cost:
    """Bytes of memory traffic and floating-point operations."""

    nbytes: int
    flops: int

    def seconds(self, bandwidth: float, gemm: float) -> dict[str, float]:
        """Seconds by ``"bytes"`` and by ``"flops"``; the floor is the larger.

        Args:
            bandwidth: bytes/s.
            gemm: flop/s of a large matrix product.
        """
        return {"bytes": self.nbytes / bandwidth, "flops": self.flops / gemm}


@dataclasses.dataclass(frozen=True)
class StepShape:
    """What a step's cost depends on.

    A segment with one row needs no key, no query and no multiplication: its softmax is 1. What
    such segments save is counted, so that no implementation can be below the floor.
    """

    tokens: int  #: positions
    segments: int  #: distinct tokens
    rows: int  #: rows of the distinct tokens
    single_rows: int  #: of these, rows that are their token's only one
    single_tokens: int  #: positions whose token owns one row
    pairs: int  #: of a query and a row to attend to, without those of single rows

    @staticmethod
    def of(token_ids: Tensor, offsets: Tensor) -> StepShape:
        """The shape of a step of ``token_ids`` int64 [N] under ``offsets`` int64 [V+1]."""
        distinct = token_ids.unique()
        owned = offsets[distinct + 1] - offsets[distinct]
        queries_rows = offsets[token_ids + 1] - offsets[token_ids]
        single = queries_rows == 1
        return StepShape(
            tokens=token_ids.numel(),
            segments=distinct.numel(),
            rows=int(owned.sum()),
            single_rows=int((owned == 1).sum()),
            single_tokens=int(single.sum()),
            pairs=int(queries_rows[~single].sum()),
        )

    def forward(
        self,
        d_in: int,
        d_emb: int,
        itemsize: int,
        row_itemsize: int | None = None,
        *,
        tied: bool = False,
    ) -> Cost:
        """Reads the distinct tokens' rows and x once, writes y once.

        Args:
            d_in: width of queries and keys.
            d_emb: width of values.
            itemsize: bytes of an element of x and y.
            row_itemsize: bytes of an element of a row, if not as many.
            tied: rows are keys and values in one, as wide as either.
        """
        keys = 0 if tied else self.rows - self.single_rows
        rows = keys * d_in + self.rows * d_emb
        queries = (self.tokens - self.single_tokens) * d_in + self.tokens * d_emb
        nbytes = rows * (row_itemsize or itemsize) + queries * itemsize
        return Cost(nbytes, 2 * self.pairs * (d_in + d_emb))

    def backward(
        self, d_in: int, d_emb: int, itemsize: int, gradient_rows: int, *, tied: bool = False
    ) -> Cost:
        """Reads rows, x and dy once; writes dx and ``gradient_rows`` rows of gradients once.

        Args:
            gradient_rows: the table's rows, or ``rows`` where only touched rows are written.
            tied: as for ``forward``.
        """
        keys = 0 if tied else self.rows - self.single_rows
        read = (keys + self.tokens - self.single_tokens) * d_in
        read += (self.rows - self.single_rows + self.tokens) * d_emb
        written = self.tokens * d_in + gradient_rows * (d_emb if tied else d_in + d_emb)
        # Scores again, gradients of queries and of keys; gradients of weights and of values.
        return Cost((read + written) * itemsize, 2 * self.pairs * (3 * d_in + 2 * d_emb))
