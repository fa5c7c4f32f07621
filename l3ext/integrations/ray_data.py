"""Counting a Ray Data dataset: a counter for each block where the block is, merged in order.

>>> counter = count_dataset(ray.data.read_parquet("corpus/"), vocab_size=180_000, shards=64,
...                         column="text", tokenizer="tokenizer.json")
>>> counter.allocate(710_000).save("allocation.safetensors")
"""

from __future__ import annotations

import functools
import os
import pickle
from typing import TYPE_CHECKING, Any

import numpy as np

from l3ext.allocation import LZWCounter
from l3ext.corpus import load_tokenizer

if TYPE_CHECKING:
    import pyarrow as pa

_COUNTER = "counter"


def count_dataset(
    dataset: Any,
    *,
    vocab_size: int,
    shards: int | None = None,
    column: str = "tokens",
    tokenizer: str | os.PathLike[str] | None = None,
    parse: str = "paper",
    max_codewords: int | None = None,
) -> LZWCounter:
    """Count a dataset in shards, as ``l3ext.shards`` does, on the nodes that Ray has.

    A shard is a block: blocks are counted as they stream by, and this process merges their
    counters in the dataset's order. It holds the merged counter and one more.

    Args:
        dataset: a ``ray.data.Dataset``; each row is a document.
        vocab_size, parse: as of ``LZWCounter``.
        shards: so many blocks are made first; None: those that the dataset has.
        column: token ids (lists of integers), or texts for the tokenizer; null counts as empty.
        tokenizer: path of a ``tokenizer.json`` that every node can read, for texts.
        max_codewords: bound of each block's dictionary.

    Raises:
        ImportError: no Ray; names the extra.
        ValueError: no such column, a column of another type, or an id out of range.
        TypeError: lists of other than integers.
        OSError: the tokenizer cannot be read on a node.
    """
    try:
        from ray.data import DataContext
    except ImportError as error:
        raise ImportError("count_dataset needs Ray Data: pip install l3ext[ray]") from error
    merged = LZWCounter(vocab_size, parse)  # sees a wrong size before Ray starts
    if shards is not None:
        if shards < 1:
            raise ValueError(f"shards: expected at least 1, got {shards}")
        dataset = dataset.repartition(shards)
    count = functools.partial(
        _count_or_refuse,
        vocab_size=vocab_size,
        column=column,
        tokenizer=None if tokenizer is None else os.path.abspath(tokenizer),
        parse=parse,
        max_codewords=max_codewords,
    )
    counters = dataset.map_batches(count, batch_size=None, batch_format="pyarrow")
    options = DataContext.get_current().execution_options
    before, options.preserve_order = options.preserve_order, True
    try:
        for row in counters.iter_rows():
            counter = pickle.loads(row[_COUNTER])
            if isinstance(counter, Exception):
                raise counter
            merged.merge(counter)
    finally:
        options.preserve_order = before
    return merged


def count_block(
    block: pa.Table,
    *,
    vocab_size: int,
    column: str,
    tokenizer: str | None,
    parse: str,
    max_codewords: int | None,
) -> pa.Table:
    """One block's counter, pickled, as a block of one row; for any engine that has Arrow tables."""
    import pyarrow as pa

    if column not in block.column_names:
        raise ValueError(f"column: expected one of {sorted(block.column_names)}, got {column!r}")
    documents = block.column(column)
    counter = LZWCounter(vocab_size, parse, max_codewords=max_codewords)
    if tokenizer is not None:
        encodings = _tokenizer(tokenizer).encode_batch_fast(
            [text or "" for text in documents.to_pylist()], add_special_tokens=False
        )
        lists = [encoding.ids for encoding in encodings]
        documents = pa.chunked_array([pa.array(lists, pa.list_(pa.int32()))])
    for part in documents.chunks:
        if not (pa.types.is_list(part.type) or pa.types.is_large_list(part.type)):
            raise ValueError(
                f"column {column!r}: expected lists of token ids, or texts and a tokenizer, got "
                f"{part.type}"
            )
        tokens = part.flatten().to_numpy(zero_copy_only=False)
        lengths = part.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
        counter.update(tokens, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))
    return _row(counter)


def _count_or_refuse(block: pa.Table, **options: Any) -> pa.Table:
    """``count_block``, with what it raises in the counter's place: Ray would hand on its text only,
    and log its own frames.
    """
    try:
        return count_block(block, **options)
    except (ValueError, TypeError, OSError) as error:
        return _row(error)


def _row(result: LZWCounter | Exception) -> pa.Table:
    import pyarrow as pa

    return pa.table({_COUNTER: pa.array([pickle.dumps(result)], pa.large_binary())})


@functools.lru_cache(maxsize=1)
def _tokenizer(path: str) -> Any:
    return load_tokenizer(path)
