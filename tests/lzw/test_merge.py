"""Merging counters is merging dictionaries, and associative; a refused merge leaves no trace."""

import copy
import functools
import pickle
import signal
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import l3ext
from tests.lzw.helpers import counted, state, zipf_documents
from tests.lzw.test_lzw_hostile import forge_counter

PARSES = ["paper", "lzw"]


@st.composite
def parts(draw, count):
    """``count`` corpora over one tiny vocabulary, so that they share codewords."""
    vocab_size = draw(st.integers(1, 4))
    document = st.lists(st.integers(0, vocab_size - 1), max_size=30)
    documents = st.lists(document, max_size=8)
    return vocab_size, [draw(documents) for _ in range(count)]


def merged(*counters):
    """The first, merged with the others one by one; all stay as they are."""
    total = copy.deepcopy(counters[0])
    for counter in counters[1:]:
        total.merge(counter)
    return total


def contents(counter):
    """Everything but the memory, which depends on how the tables grew."""
    return (*state(counter)[:4], counter.max_codewords, counter.parse)


def merged_plainly(a, b):
    counts = dict(a.codewords())
    for codeword, count in b.codewords():
        counts[codeword] = counts.get(codeword, 0) + count
    return list(counts.items()), (a.frequency + b.frequency).tolist(), a.num_tokens + b.num_tokens


@pytest.mark.parametrize("parse", PARSES)
@given(corpora=parts(2))
@settings(max_examples=120, deadline=None)
def test_equals_the_definition(parse, corpora):
    vocab_size, (first, second) = corpora
    a, b = counted(first, vocab_size, parse), counted(second, vocab_size, parse)
    before = state(b)
    expected = merged_plainly(a, b)
    a.merge(b)
    assert state(a)[:3] == expected
    assert state(b) == before


@pytest.mark.parametrize("parse", PARSES)
@given(corpora=parts(3), bounds=st.tuples(*[st.none() | st.integers(4, 30)] * 3))
@settings(max_examples=80, deadline=None)
def test_it_is_associative(parse, corpora, bounds):
    vocab_size, documents = corpora
    a, b, c = (
        counted(part, vocab_size, parse, bound)
        for part, bound in zip(documents, bounds, strict=True)
    )
    left, right = merged(merged(a, b), c), merged(a, merged(b, c))
    assert contents(left) == contents(right)
    assert left.max_codewords == (None if None in bounds else sum(bounds))


@given(corpora=parts(2))
@settings(max_examples=60, deadline=None)
def test_its_counts_do_not_depend_on_the_order(corpora):
    vocab_size, documents = corpora
    a, b = (counted(part, vocab_size) for part in documents)
    ab, ba = merged(a, b), merged(b, a)
    assert dict(ab.codewords()) == dict(ba.codewords())
    assert ab.frequency.tolist() == ba.frequency.tolist()


@given(corpora=parts(1))
@settings(max_examples=60, deadline=None)
def test_an_unused_counter_changes_nothing(corpora):
    vocab_size, (documents,) = corpora
    counter, unused = counted(documents, vocab_size), l3ext.LZWCounter(vocab_size)
    assert contents(merged(counter, unused)) == contents(counter)
    assert contents(merged(unused, counter)) == contents(counter)


def test_a_large_merge_goes_on_like_a_loaded_one(tmp_path):
    documents = zipf_documents(5, documents=600, length=300, vocab_size=300)
    a, b = counted(documents[::2], 300), counted(documents[1::2], 300)
    expected = merged_plainly(a, b)
    a.merge(b)
    assert state(a)[:3] == expected
    a.save(tmp_path / "counter")
    loaded = l3ext.LZWCounter.load(tmp_path / "counter")
    for counter in (a, loaded):
        counter.update(np.arange(300), None)
        counter.merge(b)
    assert contents(a) == contents(loaded)


def test_with_itself_it_doubles():
    counter = counted(zipf_documents(6), 50)
    expected = [(codeword, 2 * count) for codeword, count in counter.codewords()]
    counter.merge(counter)
    assert list(counter.codewords()) == expected


def test_a_tree_of_pickled_parts_is_the_chain():
    documents = zipf_documents(7)
    leaves = [pickle.dumps(counted(documents[i::5], 50)) for i in range(5)]
    chain = functools.reduce(merged, map(pickle.loads, leaves))
    a, b, c, d, e = map(pickle.loads, leaves)
    assert contents(merged(merged(merged(a, b), merged(c, d)), e)) == contents(chain)


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("other", "error", "message"),
    [
        (l3ext.LZWCounter(51), ValueError, "other: expected vocab_size 50, got 51"),
        (l3ext.LZWCounter(50, "lzw"), ValueError, "other: expected parse paper, got lzw"),
        ({}, TypeError, "other: expected an LZWCounter, got dict"),
        (None, TypeError, "other: expected an LZWCounter, got NoneType"),
    ],
)
def test_another_kind_of_counter(other, error, message):
    counter = counted(zipf_documents(8), 50)
    before = state(counter)
    with pytest.raises(error, match=message):
        counter.merge(other)
    assert state(counter) == before


def test_sums_that_do_not_fit_leave_no_trace(tmp_path):
    edges = [(0, 1), (2, 1)]
    small = l3ext.LZWCounter.load(forge_counter(tmp_path / "a", edges, [5, 6, 7, 8]))
    many = {"frequency": (2**62, 2**62 - 1), "num_tokens": 2**63 - 1}
    for changes, message in [
        ({"counts": [5, 6, 7, 8], **many}, "at most 9223372036854775804 further tokens"),
        # The last codeword only: the new one before it has been inserted by then.
        ({"edges": [(1, 1), (0, 1)], "counts": [0, 0, 4, 2**63 - 1]}, "got 7 and 9223372036854"),
    ]:
        forge_counter(tmp_path / "b", **{"edges": edges, **changes})
        other = l3ext.LZWCounter.load(tmp_path / "b")
        before, others = state(small), state(other)
        with pytest.raises(ValueError, match=message):
            small.merge(other)
        assert (state(small), state(other)) == (before, others)


def interrupt_once_the_gil_is_free(action):
    """Run ``action``, send what Ctrl-C sends as soon as another thread can; True if it stopped.

    Python code keeps the GIL for some milliseconds: what frees it sooner is a native call.
    """
    begun, done = threading.Event(), []

    def interrupt(signum, frame):
        if not done:  # a late signal must not end the whole run
            raise KeyboardInterrupt

    def send():
        begun.wait()
        signal.raise_signal(signal.SIGALRM)

    handler = signal.signal(signal.SIGALRM, interrupt)
    sender = threading.Thread(target=send)
    sender.start()
    try:
        begun.set()
        action()
        done.append(True)
    except KeyboardInterrupt:
        return True
    finally:
        done.append(True)
        sender.join()
        signal.signal(signal.SIGALRM, handler)
    return False


def test_ctrl_c_leaves_both_unchanged():
    generator = np.random.default_rng(1)
    a, b = l3ext.LZWCounter(50), l3ext.LZWCounter(50)
    a.update(generator.integers(0, 50, 100_000))
    b.update(generator.integers(0, 50, 1_500_000))
    whole, others = contents(merged(a, b)), contents(b)
    for _ in range(20):
        target = copy.deepcopy(a)
        before = state(target)
        interrupted = interrupt_once_the_gil_is_free(lambda: target.merge(b))  # noqa: B023
        # The signal may come before the merge, or between it and the return to Python.
        if interrupted and contents(target) != whole:
            break
    else:
        pytest.fail("no signal came during a merge")
    assert (state(target), contents(b)) == (before, others)
    target.merge(b)
    assert contents(target) == whole


def test_two_threads_that_merge_both_ways_do_not_deadlock():
    a, b = counted(zipf_documents(9), 50), counted(zipf_documents(10), 50)
    threads = [
        threading.Thread(
            target=lambda x, y: [x.merge(y) for _ in range(20)], args=pair, daemon=True
        )
        for pair in ((a, b), (b, a))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive()
    assert a.num_codewords == b.num_codewords


def test_a_signal_handler_that_merges_gets_an_error_not_a_deadlock():
    tokens = np.random.default_rng(1).integers(0, 50, 6_000_000).astype(np.int32)
    busy, idle = l3ext.LZWCounter(50), l3ext.LZWCounter(50)
    seen = []

    def try_both(*_):
        for x, y in ((busy, idle), (idle, busy), (busy, busy)):
            try:
                x.merge(y)
            except RuntimeError as error:
                seen.append(str(error))

    handler = signal.signal(signal.SIGALRM, try_both)
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    try:
        busy.update(tokens)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
    assert len(seen) == 3
    assert all("in use by the call" in error for error in seen)
    assert busy.num_tokens == tokens.size
