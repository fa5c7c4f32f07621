"""Several threads on one runtime: everyone gets what they would get alone."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

import l3ext
from l3ext.runtime import PrefetchRuntime
from l3ext.tables import save_tables
from tests.runtime.tables import make_table, rows_match
from tests.runtime.test_offload import VOCAB, make_model

THREADS = 4


@pytest.mark.parametrize(
    ("tier", "options"),
    [
        ("disk", {}),
        ("disk", {"cache_bytes": 4000, "ring_bytes": 2500}),
        ("disk", {"prefill_chunk": 4}),
        ("ram", {"ring_bytes": 2500, "in_place": False}),
    ],
    ids=["roomy", "tight", "chunks", "ram"],
)
def test_threads_that_generate_at_once(tmp_path, tier, options):
    model = make_model()
    prompts = [
        torch.randint(1, VOCAB, (1 + i % 2, 6 + i), generator=torch.Generator().manual_seed(i))
        for i in range(THREADS)
    ]

    def generate(prompt):
        return model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False
        )

    alone = [generate(prompt) for prompt in prompts]
    path = tmp_path / "tables" if tier == "disk" else None
    with (
        l3ext.offload(model, tier, path, poison=True, **options) as runtime,
        ThreadPoolExecutor(THREADS) as pool,
    ):
        together = list(pool.map(generate, prompts))
        assert runtime.ledger.totals.steps >= len(prompts) * 8
    for got, expected in zip(together, alone, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("ring_bytes", [1500, 1 << 20])
def test_steps_of_many_threads_and_their_rows(tmp_path, ring_bytes):
    """Steps that overlap, in every order of end; some are dropped, some wait twice."""
    table = make_table(VOCAB)
    path = tmp_path / "tables"
    save_tables(path, [table, table])
    wrong = []

    def work(seed):
        draw = np.random.default_rng(seed)
        open_steps = []
        for _ in range(120):
            tokens = draw.integers(0, VOCAB, draw.integers(1, 9))
            open_steps.append((runtime.begin(tokens), tokens))
            if len(open_steps) == 3:
                step, tokens = open_steps.pop(draw.integers(0, 3))
                if draw.random() < 0.8:
                    for layer in draw.permutation(2).tolist():
                        if not rows_match(step.wait(layer), table, tokens):
                            wrong.append((seed, tokens))
                step.end()

    with PrefetchRuntime(path, ring_bytes=ring_bytes, poison=True) as runtime:
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        totals = runtime.ledger.totals
        assert totals.steps == THREADS * 120
        if ring_bytes == 1500:
            assert totals.spilled > 100
        else:
            assert totals.spilled == 0
            assert totals.reused > totals.tokens / 10  # most open steps hold other tokens


def test_closing_under_threads_is_an_error_in_each(tmp_path):
    table = make_table(VOCAB)
    path = tmp_path / "tables"
    save_tables(path, [table])
    runtime = PrefetchRuntime(path)
    started = threading.Barrier(THREADS + 1)
    errors = []

    def work():
        started.wait()
        try:
            while True:
                with runtime.begin([1, 2, 3]) as step:
                    step.wait(0)
        except RuntimeError as error:
            errors.append(str(error))

    threads = [threading.Thread(target=work) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    started.wait()
    runtime.close()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    assert len(errors) == THREADS
    assert all("the runtime is closed" in error for error in errors)
