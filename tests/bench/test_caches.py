"""The simulated caches hold what they may hold, and find what they hold."""

import random

import numpy as np
import pytest
import torch

import l3ext
from l3ext.tables import LookupTable, save_tables
from tests.programs import load_benchmark


@pytest.fixture(scope="module")
def caches():
    return load_benchmark("compare_caches")


def steps_of(draw, vocab):
    for _ in range(300):
        size = draw.choice([1, 4, 9])
        yield list(dict.fromkeys(int(draw.paretovariate(0.6)) % vocab for _ in range(size)))


@pytest.mark.parametrize("second_chance", [False, True])
@pytest.mark.parametrize("seed", range(10))
def test_blocks_of_a_ring_never_overlap(caches, second_chance, seed):
    draw = random.Random(seed)
    rows_of = [draw.choice([1, 2, 3, 10, 30, 50]) for _ in range(60)]
    ring = caches.Ring(draw.choice([40, 60, 120, 300]), second_chance)
    spills = 0
    for step in steps_of(draw, 60):
        before = set(ring.present)
        found, spilled = ring.step(step, rows_of)
        assert found == before & set(step)
        blocks = sorted(ring.blocks)
        assert {token for _, _, token in blocks} == set(ring.present)
        assert all(end - begin == rows_of[token] for begin, end, token in blocks)
        ends = [0, *(end for _, end, _ in blocks)]
        begins = [*(begin for begin, _, _ in blocks), ring.rows]
        assert all(end <= begin for end, begin in zip(ends, begins, strict=True))
        assert spilled or set(step) <= set(ring.present)
        spills += spilled
    assert (spills > 0) == (ring.rows < 300)


def test_a_ring_overwrites_in_order_and_a_second_chance_passes_over(caches):
    for second_chance, kept in ((False, {1, 2, 3}), (True, {0, 2, 3})):
        ring = caches.Ring(3, second_chance)
        for token in (0, 1, 2, 0, 3):
            ring.step([token], [1] * 4)
        assert set(ring.present) == kept


def test_the_least_recently_used_goes_first(caches):
    lru = caches.Lru(3)
    for token in (0, 1, 2, 0, 3):
        lru.step([token], [1] * 4)
    assert set(lru.blocks) == {0, 2, 3}
    assert lru.step([0, 1, 2, 3], [1] * 4) == ({0, 2, 3}, True)
    assert set(lru.blocks) == {0, 2, 3}


def test_the_static_set_is_the_runtimes(caches, tmp_path):
    draw = np.random.default_rng(0)
    allocation = l3ext.Allocation.from_rows(
        draw.integers(1, 20, 50).astype(np.int32), frequency=draw.integers(0, 9, 50)
    )
    table = LookupTable(torch.zeros(allocation.total_rows, 4), allocation, 2, False)
    path = tmp_path / "tables.safetensors"
    save_tables(path, [table])
    for budget in (0, 1, 30, 200, allocation.total_rows):
        chosen, left = caches.static_set(allocation, budget)
        with l3ext.PrefetchRuntime(path, cache_bytes=budget * 16) as runtime:
            assert runtime.placement.hot_tokens == len(chosen)
            assert runtime.placement.hot_bytes == (budget - left) * 16


def test_a_step_is_the_next_token_of_each_place(caches):
    assert caches.batched_steps(np.array([1, 2, 3, 4, 2, 6, 9]), 2, 100) == [[1, 4], [2], [3, 6]]
