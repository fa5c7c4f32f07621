"""The counter equals its plain definition, however the corpus arrives."""

import itertools
import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import l3ext
from tests.lzw.helpers import counted, pack, state, zipf_documents
from tests.lzw.reference import ReferenceCounter

PARSES = ["paper", "lzw"]


@st.composite
def corpora(draw):
    """Tiny vocabularies, so that phrases come again, documents end in known tails, and so on."""
    vocab_size = draw(st.integers(1, 4))
    document = st.lists(st.integers(0, vocab_size - 1), max_size=30)
    return vocab_size, draw(st.lists(document, max_size=12))


def assert_equals_reference(counter, reference):
    assert list(counter.codewords()) == list(reference.count.items())
    assert counter.num_codewords == len(reference.count)
    assert counter.frequency.tolist() == reference.frequency
    assert counter.num_tokens == sum(reference.frequency)


@pytest.mark.parametrize("parse", PARSES)
@given(corpus=corpora())
@settings(max_examples=300, deadline=None)
def test_equals_the_definition(parse, corpus):
    vocab_size, documents = corpus
    reference = ReferenceCounter(vocab_size, parse)
    reference.update(documents)
    assert_equals_reference(counted(documents, vocab_size, parse), reference)


@pytest.mark.parametrize("parse", PARSES)
@pytest.mark.parametrize("vocab_size", [2, 50, 3000])
@pytest.mark.parametrize(("documents", "length"), [(400, 300), (30000, 3), (3, 60000)])
def test_equals_the_definition_on_a_larger_corpus(parse, vocab_size, documents, length):
    documents = zipf_documents(1, documents=documents, length=length, vocab_size=vocab_size)
    reference = ReferenceCounter(vocab_size, parse)
    reference.update(documents)
    assert_equals_reference(counted(documents, vocab_size, parse), reference)


@pytest.mark.parametrize("parse", PARSES)
@given(corpus=corpora(), room=st.integers(0, 40))
@settings(max_examples=300, deadline=None)
def test_a_bounded_dictionary_equals_its_definition(parse, corpus, room):
    vocab_size, documents = corpus
    bound = vocab_size + room
    reference = ReferenceCounter(vocab_size, parse, bound)
    reference.update(documents)
    bounded = counted(documents, vocab_size, parse, bound)
    assert_equals_reference(bounded, reference)
    exact = counted(documents, vocab_size, parse)
    assert [c for c, _ in bounded.codewords()] == [c for c, _ in exact.codewords(bound)]
    if exact.num_codewords <= bound:
        assert state(bounded) == state(exact)


@pytest.mark.parametrize("parse", PARSES)
@given(corpus=corpora(), room=st.integers(0, 40), cut=st.integers(0, 12))
@settings(max_examples=100, deadline=None)
def test_a_bounded_dictionary_goes_on_the_same_after_a_load(
    parse, corpus, room, cut, tmp_path_factory
):
    vocab_size, documents = corpus
    path = tmp_path_factory.getbasetemp() / "bounded"
    counted(documents[:cut], vocab_size, parse, vocab_size + room).save(path)
    resumed = l3ext.LZWCounter.load(path)
    assert resumed.max_codewords == vocab_size + room
    resumed.update(*pack(documents[cut:]))
    assert state(resumed) == state(counted(documents, vocab_size, parse, vocab_size + room))


def test_the_corner_cases_of_a_full_dictionary():
    # Of the paper's parse: 0 1 inserts, and then it is full.
    counter = counted([[0, 1], [0, 1, 0, 0, 1], [0, 1]], 2, "paper", max_codewords=3)
    # 0 1 0: its prefix is counted, it is not inserted; 0 1 ends its document: it is set back.
    assert dict(counter.codewords()) == {(0,): 3, (1,): 0, (0, 1): 1}
    counter = counted([[0, 1], [0, 1, 0, 0]], 2, "lzw", max_codewords=3)
    assert dict(counter.codewords()) == {(0,): 3, (1,): 1, (0, 1): 1}


def test_the_corner_cases_of_the_paper_parse():
    counter = l3ext.LZWCounter(3)
    for document in ([], [2], [0, 1], [0, 1], [0, 1]):
        counter.update(document)
    # (0, 1) ended every document: set back to 1 each time, its prefix credited each time.
    assert dict(counter.codewords()) == {(0,): 3, (1,): 0, (2,): 0, (0, 1): 1}


def test_the_corner_cases_of_the_lzw_parse():
    counter = l3ext.LZWCounter(3, parse="lzw")
    for document in ([], [2], [0, 1], [0, 1]):
        counter.update(document)
    assert dict(counter.codewords()) == {(0,): 1, (1,): 1, (2,): 1, (0, 1): 1}


def test_one_long_run_of_one_token():
    counter = l3ext.LZWCounter(1)
    counter.update(np.zeros(500_500, np.int32))
    lengths = [len(codeword) for codeword, _ in counter.codewords()]
    assert lengths == list(range(1, len(lengths) + 1))
    # New phrases of 2, 3, 4... tokens, then a known tail.
    whole = sum(range(2, len(lengths) + 1))
    assert whole <= 500_500 < whole + len(lengths) + 1


@pytest.mark.parametrize("parse", PARSES)
@given(corpus=corpora(), cuts=st.lists(st.integers(0, 12), max_size=4))
@settings(max_examples=150, deadline=None)
def test_many_updates_equal_one(parse, corpus, cuts):
    vocab_size, documents = corpus
    counter = l3ext.LZWCounter(vocab_size, parse=parse)
    bounds = [0, *sorted(cuts), len(documents)]
    for begin, end in itertools.pairwise(bounds):
        counter.update(*pack(documents[begin:end]))
    assert state(counter) == state(counted(documents, vocab_size, parse))


@pytest.mark.parametrize("parse", PARSES)
def test_saved_in_the_middle_it_goes_on_the_same(parse, tmp_path):
    documents = zipf_documents(2)
    counter = counted(documents[:90], 50, parse)
    counter.save(tmp_path / "counter")
    resumed = l3ext.LZWCounter.load(tmp_path / "counter")
    assert (resumed.parse, resumed.vocab_size, resumed.max_codewords) == (parse, 50, None)
    assert state(resumed) == state(counter)
    resumed.update(*pack(documents[90:]))
    whole = counted(documents, 50, parse)
    assert state(resumed) == state(whole)
    resumed.save(tmp_path / "resumed")
    whole.save(tmp_path / "whole")
    assert (tmp_path / "resumed").read_bytes() == (tmp_path / "whole").read_bytes()


def test_an_unused_counter_can_be_saved(tmp_path):
    l3ext.LZWCounter(3).save(tmp_path / "counter")
    assert state(l3ext.LZWCounter.load(tmp_path / "counter")) == state(l3ext.LZWCounter(3))


@pytest.mark.parametrize(
    "dtype", ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", ">i4"]
)
def test_any_integer_dtype(dtype):
    documents = zipf_documents(3)
    tokens, offsets = pack(documents)
    counter = l3ext.LZWCounter(50)
    counter.update(tokens.astype(dtype), offsets)
    assert state(counter) == state(counted(documents, 50))


def test_the_kinds_of_arrays_that_callers_hold(tmp_path):
    documents = zipf_documents(4)
    tokens, offsets = pack(documents)
    tokens.astype(np.uint16).tofile(tmp_path / "tokens.bin")
    read_only = tokens.copy()
    read_only.setflags(write=False)
    for given_tokens, given_offsets in [
        (tokens.tolist(), offsets.tolist()),
        (torch.tensor(tokens), torch.tensor(offsets)),
        (torch.tensor(tokens).to(torch.int16), offsets),
        (np.memmap(tmp_path / "tokens.bin", np.uint16, mode="r"), offsets),
        (np.repeat(tokens, 2)[::2], offsets.astype(np.int32)),
        (read_only, tuple(offsets.tolist())),
    ]:
        counter = l3ext.LZWCounter(50)
        counter.update(given_tokens, given_offsets)
        assert state(counter) == state(counted(documents, 50))


def test_empty_updates_and_documents_change_nothing():
    counter = counted(zipf_documents(5), 50)
    before = state(counter)
    counter.update([])
    counter.update([], offsets=[0])
    counter.update(np.empty(0, np.int32), offsets=[0, 0, 0])
    counter.update(torch.empty(0, dtype=torch.int64))
    assert state(counter) == before


def test_limit_of_codewords():
    counter = counted(zipf_documents(6), 50)
    everything = list(counter.codewords())
    assert len(everything) == counter.num_codewords > 2000
    for limit in (0, 1, 777, len(everything), len(everything) + 1):
        assert list(counter.codewords(limit)) == everything[:limit]
    assert list(counter.codewords(limit=3)) == everything[:3]
    with pytest.raises(ValueError, match="limit: expected at least 0, got -1"):
        counter.codewords(-1)


def test_nbytes_follows_the_codewords():
    counter = l3ext.LZWCounter(50)
    empty = counter.nbytes
    counter.update(*pack(zipf_documents(7)))
    per_codeword = (counter.nbytes - empty) / (counter.num_codewords - 50)
    assert 24 < per_codeword < 40


def test_repr_says_what_it_holds():
    text = repr(counted([[0, 1, 0, 1]], 2, "lzw"))
    assert "vocab_size=2" in text
    assert "parse='lzw'" in text
    assert "num_tokens=4" in text


def test_another_thread_runs_during_an_update():
    tokens = np.random.default_rng(0).integers(0, 1000, 3_000_000).astype(np.int32)
    counter = l3ext.LZWCounter(1000)
    worker = threading.Thread(target=counter.update, args=(tokens,))
    ticks = 0
    started = time.perf_counter()
    worker.start()
    while worker.is_alive():
        ticks += 1
        time.sleep(0.001)
    elapsed = time.perf_counter() - started
    assert counter.num_tokens == tokens.size
    # With the GIL held, sleep() would return only once the update is over: two ticks or three.
    assert ticks > 10, f"{ticks} ticks in {elapsed:.3f} s"


def test_two_threads_take_turns():
    documents = zipf_documents(8)
    counter = l3ext.LZWCounter(50)
    threads = [threading.Thread(target=counter.update, args=pack(documents)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert state(counter) == state(counted(documents * 4, 50))
