"""The process of one shard: counts the chunks that come on stdin, then writes its counter.

    python -m l3ext._shard_worker VOCAB_SIZE PARSE [MAX_CODEWORDS or ""] PATH

Started by ``l3ext.shards``. It leaves without a file where stdin ends without the end's frame: then
whoever sent it is gone. No torch here, which would take longer to import than most shards to count.
"""

from __future__ import annotations

import struct
import sys
from typing import BinaryIO

import numpy as np

# What precedes a chunk: entries of its offsets, and tokens. No offsets: the end.
FRAME = struct.Struct("<qq")


def main() -> None:
    """Entry point."""
    from l3ext import _C  # not for those who only want FRAME: they have to import torch first

    vocab_size, parse, bound, path = sys.argv[1:]
    counter = _C.LZWCounter(int(vocab_size), parse, int(bound) if bound else None)
    stream = sys.stdin.buffer
    while True:
        num_offsets, num_tokens = FRAME.unpack(_read(stream, FRAME.size))
        if num_offsets == 0:
            break
        offsets = np.frombuffer(_read(stream, 8 * num_offsets), "<i8")
        tokens = np.frombuffer(_read(stream, 4 * num_tokens), "<i4")
        counter.update(tokens, offsets)
    counter.save(path)


def _read(stream: BinaryIO, size: int) -> bytes:
    content = stream.read(size)
    if len(content) != size:
        raise EOFError("the sender has gone")
    return content


if __name__ == "__main__":
    main()
