"""What other orders of a table on disk would save: the bytes and reads of decode steps, counted.

A read with O_DIRECT moves whole pages of 4096 bytes, so a token's block brings up to two pages
more than it has. This counts, for rows granted by LZW (4 a token, at most 512) and steps of the
tokens at ``batch`` random places of the text, what is read over what was asked for, and the reads
(pieces of at most 256 KiB, neighbours together): with blocks packed or each on pages of its own,
and tokens in the order of ids or of frequency.

    python benchmarks/compare_table_layouts.py tokens.bin

``tokens.bin``: raw little-endian int32 ids, in which the largest id ends each document.
"""

import argparse
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import l3ext

PAGE = 4096
PIECE = 256 << 10
BATCHES = (1, 8, 32)
STEPS = 400
ROW_BYTES = {
    6144: "d_in 2048, d_emb 1024, bfloat16",
    3088: "the same, int8",
    3072: "d_in 1024, d_emb 512, bfloat16",
    2064: "d 2048 tied, int8",
}

Ints = NDArray[np.int64]


def pages(end: Ints | int) -> Ints | int:
    return (end + PAGE - 1) // PAGE * PAGE


def place(sizes: Ints, order: Ints, aligned: bool) -> tuple[Ints, int]:
    """Where each token's block starts, and the length of the table."""
    taken = np.asarray(pages(sizes[order])) if aligned else sizes[order]
    begin = np.empty_like(sizes)
    begin[order] = np.cumsum(taken) - taken
    return begin, int(taken.sum())


def read_step(begin: Ints, end: Ints, aligned: bool) -> tuple[int, int]:
    """Bytes and reads for these blocks, which ascend."""
    total = reads = i = 0
    while i < len(begin):
        j = i
        while j + 1 < len(begin):
            next_to = pages(end[j]) if aligned else end[j]
            if begin[j + 1] != next_to or end[j + 1] - begin[i] > PIECE:
                break
            j += 1
        first, last = int(begin[i]), int(end[j])
        total += int(pages(last)) - first // PAGE * PAGE
        reads += -(-last // PIECE) - first // PIECE if last - first > PIECE else 1
        i = j + 1
    return total, reads


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tokens", type=Path)
    tokens = np.fromfile(parser.parse_args().tokens, dtype="<i4")
    vocab_size = int(tokens.max()) + 1
    ends = np.flatnonzero(tokens == vocab_size - 1) + 1
    offsets = np.unique(np.concatenate([[0], ends, [len(tokens)]])).astype(np.int64)
    allocation = l3ext.allocate(
        tokens, offsets, vocab_size=vocab_size, total_rows=4 * vocab_size, max_rows=512
    )
    rows = np.asarray(allocation.rows).astype(np.int64)
    frequency = np.bincount(tokens, minlength=vocab_size)
    orders = {"ids": np.arange(vocab_size), "frequency": np.argsort(-frequency, kind="stable")}

    print("row_bytes order blocks file " + " ".join(f"batch_{b} reads" for b in BATCHES))
    for row_bytes in ROW_BYTES:
        sizes = rows * row_bytes
        for name, order in orders.items():
            for aligned in (False, True):
                begin, length = place(sizes, order, aligned)
                cells = []
                for batch in BATCHES:
                    random = np.random.default_rng(1)
                    asked = read = reads = 0
                    for _ in range(STEPS):
                        step = np.unique(tokens[random.integers(0, len(tokens), batch)])
                        step = step[np.argsort(begin[step])]
                        got = read_step(begin[step], begin[step] + sizes[step], aligned)
                        asked += int(sizes[step].sum())
                        read += got[0]
                        reads += got[1]
                    cells.append(f"{read / asked:.4f} {reads / STEPS:.1f}")
                blocks = "aligned" if aligned else "packed"
                print(row_bytes, name, blocks, f"{length / sizes.sum():.3f}", *cells)


if __name__ == "__main__":
    main()
