"""Counting a Ray Data dataset is counting its blocks in shards; with Ray where it is installed."""

import functools
import pickle
import sys

import numpy as np
import pyarrow as pa
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

import l3ext
from l3ext.integrations.ray_data import count_block, count_dataset
from tests.lzw.helpers import counted, state, zipf_documents

count = functools.partial(
    count_block, vocab_size=50, column="tokens", tokenizer=None, parse="paper", max_codewords=None
)


def block(documents, kind=None):
    return pa.table({"tokens": pa.array(documents, kind or pa.list_(pa.int32()))})


def counter_of(table):
    assert table.num_rows == 1
    return pickle.loads(table.column("counter")[0].as_py())


@pytest.fixture
def tokenizer(tmp_path):
    words = {"[UNK]": 0, "a": 1, "b": 2, "c": 3}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


@pytest.mark.parametrize(
    "kind", [pa.list_(pa.int32()), pa.large_list(pa.int64()), pa.list_(pa.uint16())]
)
def test_a_block_of_token_lists(kind):
    documents = zipf_documents(1)
    documents[7] = None
    table = pa.concat_tables([block(documents[:90], kind), block(documents[90:], kind).slice(3)])
    expected = counted([document or [] for document in documents[:90] + documents[93:]], 50)
    assert state(counter_of(count(table)))[:4] == state(expected)[:4]
    assert counter_of(count(block([]))).num_tokens == 0
    bounded = counter_of(count(table, max_codewords=60, parse="lzw"))
    assert (bounded.num_codewords, bounded.max_codewords, bounded.parse) == (60, 60, "lzw")


def test_a_block_of_texts(tokenizer):
    table = pa.table({"text": ["a b a b", None, "b c x"]})
    counter = counter_of(count(table, column="text", tokenizer=str(tokenizer)))
    assert state(counter)[:4] == state(counted([[1, 2, 1, 2], [], [2, 3, 0]], 50))[:4]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (pa.table({"text": ["a"]}), r"column: expected one of \['text'\], got 'tokens'"),
        (
            pa.table({"tokens": ["a"]}),
            "column 'tokens': expected lists of token ids, .* got string",
        ),
        (block([[1, 50]]), r"tokens: expected ids in \[0, 50\), got 50 at position 1"),
        (block([[1, None]]), "tokens: expected integers"),
    ],
)
def test_blocks_that_cannot_be_counted(table, message):
    with pytest.raises((ValueError, TypeError), match=message):
        count(table)


def test_without_ray(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setitem(sys.modules, "ray.data", None)
    with pytest.raises(ImportError, match=r"pip install l3ext\[ray\]"):
        count_dataset(None, vocab_size=3)


@pytest.fixture(scope="module")
def ray():
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=1, include_dashboard=False, logging_level="ERROR")
    yield ray
    ray.shutdown()


def test_a_dataset_in_shards(ray):
    documents = zipf_documents(2, documents=240)
    dataset = ray.data.from_arrow([block(documents[:100]), block(documents[100:])])
    parts = [counted(documents[i : i + 60], 50) for i in range(0, 240, 60)]
    expected = parts[0]
    for part in parts[1:]:
        expected.merge(part)
    counter = count_dataset(dataset, vocab_size=50, shards=4)
    assert state(counter)[:4] == state(expected)[:4]
    as_it_is = count_dataset(dataset, vocab_size=50)
    expected = counted(documents[:100], 50)
    expected.merge(counted(documents[100:], 50))
    assert as_it_is.allocate(200, 16) == expected.allocate(200, 16)
    exact = count_dataset(dataset, vocab_size=50, shards=1, max_codewords=10**9)
    assert exact.allocate(200, 16) == counted(documents, 50).allocate(200, 16)


def test_what_a_task_raises_says_why(ray):
    dataset = ray.data.from_arrow(block([[1, 50]]))
    with pytest.raises(ValueError, match=r"tokens: expected ids in \[0, 50\), got 50"):
        count_dataset(dataset, vocab_size=50)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        count_dataset(dataset, vocab_size=50, tokenizer="nowhere.json")
    with pytest.raises(ValueError, match="shards: expected at least 1, got 0"):
        count_dataset(dataset, vocab_size=50, shards=0)
    with pytest.raises(ValueError, match="vocab_size: expected 1 to"):
        count_dataset(dataset, vocab_size=0)
    assert isinstance(count_dataset(dataset, vocab_size=51), l3ext.LZWCounter)
    assert np.array_equal(count_dataset(dataset, vocab_size=51).frequency.nonzero()[0], [1, 50])
