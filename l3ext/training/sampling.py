"""Which tokens a step sees: a function of (seed, step) alone, so a resumed run needs no state."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


class SequenceSampler:
    """Shuffled fixed-length sequences over a flat array of token ids.

    An epoch cuts the tokens into windows of ``sequence_length`` + 1 (inputs, and labels one
    further), neighbours sharing one token, and visits each once in an order of its own. Every
    epoch starts its windows at another phase, so that their borders fall elsewhere.

    Args:
        tokens: integer [T], in memory or memory-mapped.
        sequence_length: L, tokens of one sequence; T must be at least L + 1.
        seed: of the order.
    """

    def __init__(self, tokens: npt.NDArray[np.integer], *, sequence_length: int, seed: int) -> None:
        if len(tokens) < sequence_length + 1:
            raise ValueError(
                f"tokens: expected at least sequence_length + 1 = {sequence_length + 1}, "
                f"got {len(tokens)}"
            )
        self._tokens = tokens
        self._length = sequence_length
        self._seed = seed
        # One window fewer than fit at phase 0 leaves room for every phase below the length.
        fit = (len(tokens) - 1) // sequence_length
        self.sequences_per_epoch = max(1, fit - 1)
        self._phases = sequence_length if fit > 1 else len(tokens) - sequence_length
        self._epoch = -1
        self._order: npt.NDArray[np.intp] = np.zeros(0, np.intp)
        self._phase = 0

    def batch(self, first: int, count: int) -> npt.NDArray[np.int64]:
        """Sequences ``first`` .. ``first + count`` of the run, int64 [count, L + 1]."""
        rows = np.empty((count, self._length + 1), np.int64)
        for row in range(count):
            epoch, place = divmod(first + row, self.sequences_per_epoch)
            if epoch != self._epoch:
                self._start_epoch(epoch)
            begin = self._phase + int(self._order[place]) * self._length
            rows[row] = self._tokens[begin : begin + self._length + 1]
        return rows

    def _start_epoch(self, epoch: int) -> None:
        # Philox's raw stream is fixed by NumPy's compatibility policy; Generator.permutation's
        # is not, and the same run must see the same order under another NumPy.
        raw = np.random.Philox(key=[self._seed, epoch]).random_raw(self.sequences_per_epoch + 1)
        self._phase = int(raw[0] % np.uint64(self._phases))
        self._order = np.argsort(raw[1:], kind="stable")
        self._epoch = epoch
