"""Counting in several threads: the same counter, bit by bit, as in one."""

import copy
import os
import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import l3ext
from tests.lzw.helpers import state
from tests.lzw.test_lzw_hostile import cpu_seconds, interrupt_after

SHORT = 65_535  # the longest update that takes one thread
PARSES = ["paper", "lzw"]


def draw_corpus(seed, tokens, vocab_size, mean_length):
    """Zipf's tokens, of which the rare ones are many: insertions are dense and sparse in turn."""
    generator = np.random.default_rng(seed)
    ids = np.minimum(generator.zipf(1.2, tokens) - 1, generator.integers(0, vocab_size, tokens))
    cuts = np.flatnonzero(generator.random(tokens - 1) < 1 / mean_length) + 1
    return ids.astype(np.int32), np.concatenate([[0], cuts, [tokens]])


def count_in(threads, corpora, vocab_size, parse="paper", bound=None):
    counter = l3ext.LZWCounter(vocab_size, parse, max_codewords=bound)
    for tokens, offsets in corpora:
        counter.update(tokens, offsets, threads=threads)
    return counter


@pytest.mark.parametrize("parse", PARSES)
@given(
    seed=st.integers(0, 1 << 30),
    sizes=st.lists(st.integers(SHORT, 250_000), min_size=1, max_size=3),
    vocab_size=st.sampled_from([2, 40, 900, 70_000]),
    mean_length=st.sampled_from([1.5, 60, 5000, 1e9]),
    threads=st.integers(2, 6),
    room=st.none() | st.integers(0, 120_000),
)
@settings(max_examples=25, deadline=None)
def test_the_number_of_threads_changes_nothing(
    parse, seed, sizes, vocab_size, mean_length, threads, room
):
    corpora = [draw_corpus(seed + i, n, vocab_size, mean_length) for i, n in enumerate(sizes)]
    bound = None if room is None else vocab_size + room
    many = count_in(threads, corpora, vocab_size, parse, bound)
    assert state(many) == state(count_in(1, corpora, vocab_size, parse, bound))


@pytest.mark.parametrize("parse", PARSES)
def test_phrases_longer_than_what_is_read_ahead_at_once(parse):
    # One token only: the parse passes whole stretches, to none of whose guesses it comes.
    corpora = [(np.zeros(9_500_000, np.int32), None)]
    one, two = (count_in(threads, corpora, 1, parse) for threads in (1, 2))
    assert one.num_codewords > 4300
    assert (two.num_codewords, two.nbytes) == (one.num_codewords, one.nbytes)
    assert [count for _, count in two.codewords()] == [count for _, count in one.codewords()]


@pytest.mark.parametrize("parse", PARSES)
def test_saved_in_the_middle_it_goes_on_in_any_number_of_threads(parse, tmp_path):
    corpora = [draw_corpus(seed, 300_000, 5000, 100) for seed in range(2)]
    count_in(2, corpora[:1], 5000, parse).save(tmp_path / "counter")
    resumed = l3ext.LZWCounter.load(tmp_path / "counter")
    resumed.update(*corpora[1], threads=3)
    resumed.save(tmp_path / "resumed")
    count_in(1, corpora, 5000, parse).save(tmp_path / "whole")
    assert (tmp_path / "resumed").read_bytes() == (tmp_path / "whole").read_bytes()


@pytest.mark.parametrize("parse", PARSES)
def test_ctrl_c_in_several_threads_leaves_the_counter_unchanged(parse):
    tokens, offsets = draw_corpus(3, 12_000_000, 3000, 400)
    first = draw_corpus(4, 200_000, 3000, 50)
    counter = count_in(2, [first], 3000, parse)
    whole = cpu_seconds(lambda: count_in(2, [(tokens, offsets)], 3000, parse))
    for share in (0.2, 0.15, 0.1):  # by then the ids are checked, and the parse is on its way
        stopped = copy.deepcopy(counter)
        started = time.process_time()
        interrupted = interrupt_after(
            share * whole,
            lambda: stopped.update(tokens, offsets, threads=2),  # noqa: B023
        )
        soon = time.process_time() - started < whole / 2
        # The signal may come between the update and the return to Python.
        if interrupted and soon and stopped.num_tokens == counter.num_tokens:
            break
    else:
        pytest.fail("no update stopped before half of it was done")
    assert state(stopped) == state(counter)
    counter = stopped
    counter.update(*first, threads=2)
    assert state(counter) == state(count_in(1, [first, first], 3000, parse))


def test_a_rejected_update_in_several_threads_leaves_the_counter_unchanged():
    tokens, offsets = draw_corpus(5, 200_000, 50, 60)
    counter = count_in(2, [(tokens, offsets)], 50)
    before = state(counter)
    bad = tokens.copy()
    bad[150_000] = 50
    with pytest.raises(ValueError, match=r"expected ids in \[0, 50\), got 50 at position 150000 "):
        counter.update(bad, offsets, threads=2)
    with pytest.raises(ValueError, match="offsets: expected the last to be the number of tokens"):
        counter.update(tokens, offsets[:-1], threads=2)
    assert state(counter) == before


@pytest.mark.parametrize(
    ("threads", "error", "message"),
    [
        (0, ValueError, "threads: expected at least 1, got 0"),
        (-3, ValueError, "threads: expected at least 1, got -3"),
        (1.5, TypeError, "threads: expected an int, got 1.5"),
        ("2", TypeError, "threads: expected an int, got '2'"),
    ],
)
def test_no_number_of_threads(threads, error, message):
    with pytest.raises(error, match=message):
        l3ext.LZWCounter(2).update([0, 1], threads=threads)


def test_far_more_threads_than_there_are():
    corpora = [draw_corpus(6, 100_000, 50, 60)]
    assert state(count_in(2**70, corpora, 50)) == state(count_in(1, corpora, 50))


def threads_of_this_process():
    return set(os.listdir("/proc/self/task"))


def threads_started_during(action):
    """How many are listed that were not before: one that was joined stays listed for a moment."""
    seen, done = set(), threading.Event()

    def watch():
        while not done.is_set():
            seen.update(threads_of_this_process())

    watcher = threading.Thread(target=watch)
    before = threads_of_this_process()
    watcher.start()
    try:
        action()
    finally:
        done.set()
        watcher.join()
    return len(seen - before - {str(watcher.native_id)})


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="threads are listed on Linux")
def test_how_many_threads_count():
    tokens, offsets = draw_corpus(7, 1_500_000, 3000, 60)
    short = draw_corpus(8, SHORT, 3000, 60)

    def started(corpora, threads):
        return threads_started_during(lambda: count_in(threads, corpora, 3000))

    assert started([(tokens, offsets)], 1) == 0
    assert started([(tokens, offsets)], 3) == 2
    assert started([(tokens, offsets)], 100) == 3
    assert started([short] * 20, 4) == 0


def test_as_many_as_torch_has_where_not_said(monkeypatch):
    given = []

    class Native:
        def update(self, tokens, offsets, num_threads):
            given.append(num_threads)

    counter = l3ext.LZWCounter(2)
    counter._native = Native()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    counter.update([0, 1])
    counter.update([0, 1], threads=3)
    assert given == [7, 3]
