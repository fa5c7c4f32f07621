"""The allocator in plain Python dictionaries: the definition that the C++ one must equal."""

from __future__ import annotations


class ReferenceCounter:
    """Keeps ``count``, codeword (tuple of ids) -> count, in insertion order."""

    def __init__(self, vocab_size, parse="paper", max_codewords=None):
        self.max_codewords = max_codewords
        self.count = {(token,): 0 for token in range(vocab_size)}
        self.frequency = [0] * vocab_size
        self._parse = {"paper": self._parse_paper, "lzw": self._parse_lzw}[parse]

    def update(self, documents):
        for document in documents:
            for token in document:
                self.frequency[token] += 1
            self._parse(tuple(document))

    def _parse_paper(self, d):
        count, n, i = self.count, len(d), 0
        while i + 1 < n:
            j = i + 1
            while j < n and d[i:j] in count:
                j += 1
            count[d[i : j - 1]] += 1
            if d[i:j] in count or not self._full():
                count[d[i:j]] = 1
            i = j

    def _parse_lzw(self, d):
        count, n, i = self.count, len(d), 0
        while i < n:
            j = i + 1
            while j < n and d[i : j + 1] in count:
                j += 1
            count[d[i:j]] += 1
            if j < n and not self._full():
                count[d[i : j + 1]] = 0
            i = j

    def _full(self):
        return len(self.count) == self.max_codewords

    def rows(self, total_rows, max_rows):
        rows = [1] * len(self.frequency)
        left = total_rows - len(rows)
        order = sorted(self.count, key=lambda codeword: -self.count[codeword])  # stable
        while left > 0:
            for codeword in order:
                if left > 0 and rows[codeword[-1]] < max_rows:
                    rows[codeword[-1]] += 1
                    left -= 1
        return rows
