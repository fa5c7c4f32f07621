"""The grant equals its plain definition; an Allocation is immutable and survives its file."""

import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import l3ext
from tests.lzw.helpers import counted, pack, zipf_documents
from tests.lzw.reference import ReferenceCounter


@pytest.mark.parametrize("parse", ["paper", "lzw"])
@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_rows_equal_the_definition(parse, data):
    vocab_size = data.draw(st.integers(1, 5))
    token = st.integers(0, vocab_size - 1)
    documents = data.draw(st.lists(st.lists(token, max_size=25), max_size=8))
    max_rows = data.draw(st.integers(1, 9))
    total_rows = data.draw(st.integers(vocab_size, vocab_size * max_rows))
    reference = ReferenceCounter(vocab_size, parse)
    reference.update(documents)
    allocation = counted(documents, vocab_size, parse).allocate(total_rows, max_rows=max_rows)
    assert allocation.rows.tolist() == reference.rows(total_rows, max_rows)
    assert allocation.frequency.tolist() == reference.frequency


@pytest.mark.parametrize("max_rows", [8, 64, 10_000])
def test_rows_equal_the_definition_on_a_larger_corpus(max_rows):
    documents = zipf_documents(1, documents=400, length=300, vocab_size=1000)
    reference = ReferenceCounter(1000)
    reference.update(documents)
    counter = counted(documents, 1000)
    for total_rows in (1000, 1001, 4000, 8000):
        rows = counter.allocate(total_rows, max_rows=max_rows).rows
        assert rows.tolist() == reference.rows(total_rows, max_rows)


def test_counts_beyond_one_sorting_digit_are_in_order():
    # Counts above and below 65,536, the radix: two sorting passes.
    documents = np.repeat(np.array([2, 0, 1], np.int32), [70_000, 65_536, 4])
    offsets = np.arange(documents.size + 1)
    counter = l3ext.LZWCounter(4, parse="lzw")
    counter.update(documents, offsets)
    assert counter.allocate(5).rows.tolist() == [1, 1, 2, 1]
    assert counter.allocate(6).rows.tolist() == [2, 1, 2, 1]
    assert counter.allocate(7).rows.tolist() == [2, 2, 2, 1]


def test_ties_go_by_insertion():
    counter = l3ext.LZWCounter(3)
    counter.update([2, 0, 1, 0], offsets=[0, 2, 4])  # (2,0), then (1,0); (1,) and (2,) credited
    # By count 1: (1,), (2,), (2,0), (1,0); then (0,).
    assert [counter.allocate(v).rows.tolist() for v in range(3, 10)] == [
        [1, 1, 1], [1, 2, 1], [1, 2, 2], [2, 2, 2], [3, 2, 2], [4, 2, 2], [4, 3, 2],
    ]  # fmt: skip


def test_walks_again_when_the_codewords_run_out():
    counter = l3ext.LZWCounter(3)
    assert counter.allocate(11).rows.tolist() == [4, 4, 3]
    assert counter.allocate(1536).rows.tolist() == [512] * 3


def test_the_cap_holds_and_the_rest_goes_on():
    counter = l3ext.LZWCounter(4)
    counter.update(np.zeros(10_000, np.int32))
    rows = counter.allocate(100, max_rows=40).rows
    assert rows.max() == 40 == rows[0]
    assert rows.sum() == 100


@pytest.mark.parametrize(
    ("total_rows", "max_rows", "message"),
    [
        (2, 512, "total_rows: expected at least vocab_size = 3 .*, got 2"),
        (-1, 512, "total_rows: expected at least vocab_size = 3 .*, got -1"),
        (3 * 512 + 1, 512, r"total_rows: expected at most vocab_size \* max_rows = 3 \* 512, got"),
        (5, 0, "max_rows: expected at least 1, got 0"),
        (5, -(2**70), "max_rows: expected at least 1"),
        (2**62, 512, "total_rows: expected at most vocab_size"),
        (2**70, 2**70, "total_rows: expected at most"),
        (2**40, 2**40, "max_rows: expected at most 2147483647"),
    ],
)
def test_impossible_sizes(total_rows, max_rows, message):
    counter = l3ext.LZWCounter(3)
    with pytest.raises(ValueError, match=message):
        counter.allocate(total_rows, max_rows=max_rows)


def test_a_huge_cap_is_no_cap():
    assert l3ext.LZWCounter(3).allocate(7, max_rows=2**80).rows.tolist() == [3, 2, 2]


def test_sizes_are_integers():
    with pytest.raises(TypeError, match=r"total_rows: expected an int, got 8\.0"):
        l3ext.LZWCounter(3).allocate(8.0)
    assert l3ext.LZWCounter(np.int64(3)).allocate(np.int32(8)).total_rows == 8


def test_allocate_in_one_call():
    documents = zipf_documents(2)
    tokens, offsets = pack(documents)
    allocation = l3ext.allocate(tokens, offsets, vocab_size=50, total_rows=200, max_rows=16)
    assert allocation == counted(documents, 50).allocate(200, 16)
    textbook = l3ext.allocate(
        tokens, offsets, vocab_size=50, total_rows=200, max_rows=16, parse="lzw"
    )
    assert textbook == counted(documents, 50, "lzw").allocate(200, 16)
    assert textbook != allocation


def test_the_fields():
    allocation = l3ext.Allocation.from_rows([3, 1, 2], frequency=[9, 0, 4])
    assert allocation.rows.dtype == np.int32
    assert allocation.offsets.dtype == np.int64
    assert allocation.frequency.dtype == np.int64
    assert allocation.rows.tolist() == [3, 1, 2]
    assert allocation.offsets.tolist() == [0, 3, 4, 6]
    assert (allocation.vocab_size, allocation.total_rows, allocation.max_rows) == (3, 6, 3)
    assert repr(allocation) == (
        "Allocation(vocab_size=3, total_rows=6, max_rows=3, frequency=13 tokens)"
    )
    assert l3ext.Allocation.from_rows(torch.tensor([3, 1, 2])).frequency is None


def test_uniform():
    assert l3ext.Allocation.uniform(4, 10).rows.tolist() == [3, 3, 2, 2]
    with pytest.raises(ValueError, match="total_rows: expected at least vocab_size = 4"):
        l3ext.Allocation.uniform(4, 3)
    with pytest.raises(ValueError, match="vocab_size: expected 1 to 2147483647, got 0"):
        l3ext.Allocation.uniform(0, 3)


def test_it_is_immutable_and_its_own():
    source = np.array([3, 1, 2])
    allocation = l3ext.Allocation.from_rows(source, frequency=source)
    source[0] = 100
    assert allocation.rows.tolist() == [3, 1, 2]
    for array in (allocation.rows, allocation.offsets, allocation.frequency):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1
    with pytest.raises(AttributeError):
        allocation.rows = source
    assert copy.deepcopy(allocation) is allocation
    restored = pickle.loads(pickle.dumps(allocation))
    assert restored == allocation
    assert not restored.rows.flags.writeable


def test_equality_and_hash():
    from_rows = l3ext.Allocation.from_rows
    plain, seen = from_rows([1, 2]), from_rows([1, 2], frequency=[5, 6])
    assert plain == from_rows([1, 2])
    assert hash(plain) == hash(from_rows([1, 2]))
    assert seen == from_rows([1, 2], frequency=[5, 6])
    assert plain not in (seen, from_rows([2, 1]), from_rows([1, 2, 1]), [1, 2])
    assert seen != from_rows([1, 2], frequency=[5, 7])


@pytest.mark.parametrize("frequency", [None, [0, 2**62, 7]])
def test_save_and_load(tmp_path, frequency):
    allocation = l3ext.Allocation.from_rows([3, 1, 2], frequency=frequency)
    allocation.save(tmp_path / "allocation.safetensors")
    assert l3ext.Allocation.load(tmp_path / "allocation.safetensors") == allocation
    assert [path.name for path in tmp_path.iterdir()] == ["allocation.safetensors"]
