"""What the allocator's tests share."""

import itertools

import numpy as np

import l3ext


def pack(documents, dtype=np.int32):
    """Documents as (tokens [n], offsets int64 [documents+1])."""
    tokens = np.array(list(itertools.chain.from_iterable(documents)), dtype=dtype)
    offsets = np.cumsum([0, *map(len, documents)], dtype=np.int64)
    return tokens, offsets


def state(counter):
    """Everything that a counter knows."""
    return (
        list(counter.codewords()),
        counter.frequency.tolist(),
        counter.num_tokens,
        counter.num_codewords,
        counter.nbytes,
    )


def zipf_documents(seed, documents=200, length=100, vocab_size=50):
    """Repetitive documents of very different lengths, empty and single-token ones among them."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(0, length, documents)
    return [
        np.minimum(generator.zipf(1.3, n) - 1, vocab_size - 1).astype(np.int32).tolist()
        for n in lengths
    ]


def counted(documents, vocab_size, parse="paper", max_codewords=None):
    counter = l3ext.LZWCounter(vocab_size, parse=parse, max_codewords=max_codewords)
    counter.update(*pack(documents))
    return counter
