"""Speculative decoding on an offloaded model: the same text; rows asked for on suspicion."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import l3ext
from l3ext.runtime import PrefetchRuntime
from l3ext.tables import save_tables
from tests.runtime.tables import make_table, rows_match
from tests.runtime.test_offload import VOCAB, make_model

TOKENS = [3, 7, 11, 12, 40]


@pytest.mark.parametrize("draft_length", [1, 4])
@pytest.mark.parametrize("options", [{}, {"cache_bytes": 4000, "ring_bytes": 3000}], ids=str)
def test_assisted_generation_gives_the_same_tokens(tmp_path, options, draft_length):
    model, assistant = make_model(), make_model()
    with torch.no_grad():
        for parameter in assistant.parameters():  # close enough to be accepted now and then
            parameter.add_(torch.randn_like(parameter), alpha=2e-3)
    assistant.generation_config.num_assistant_tokens = draft_length
    prompt = torch.arange(1, 9)[None]
    settings = {"max_new_tokens": 24, "do_sample": False}
    alone = model.generate(prompt, **settings)
    resident = model.generate(prompt, assistant_model=assistant, **settings)
    with l3ext.offload(model, "disk", tmp_path / "tables", poison=True, **options) as runtime:
        text = model.generate(prompt, assistant_model=assistant, **settings)
        assert torch.equal(text, resident)
        assert torch.equal(text, alone)
        # Several tokens a step were right, or nothing was speculated.
        assert runtime.ledger.totals.steps < 24


def test_both_models_may_be_offloaded(tmp_path):
    model, assistant = make_model(), make_model()
    prompt = torch.arange(1, 9)[None]
    expected = model.generate(prompt, max_new_tokens=12, do_sample=False)
    path = tmp_path / "tables"
    with l3ext.offload(model, "disk", path), l3ext.offload(assistant, "disk", path):
        text = model.generate(prompt, assistant_model=assistant, max_new_tokens=12, do_sample=False)
    assert torch.equal(text, expected)


# --- rows asked for before the choice is known ----------------------------------------------------
@pytest.fixture
def table():
    return make_table(VOCAB, max_rows=40)


@pytest.fixture
def path(tmp_path, table):
    path = tmp_path / "tables"
    save_tables(path, [table])
    return path


def row_bytes(table, tokens):
    return int(np.diff(table.allocation.offsets)[list(tokens)].sum()) * 37 * 4


def test_a_candidate_that_came_is_found_afterwards(path, table):
    with PrefetchRuntime(path, poison=False) as runtime:
        with runtime.begin(TOKENS) as candidates:
            candidates.wait(0)
        with runtime.begin(TOKENS[1:3]) as step:
            assert rows_match(step.wait(0), table, TOKENS[1:3])
        (record,) = runtime.ledger.steps[1].layers
        assert (record.reused, record.reused_bytes) == (2, row_bytes(table, TOKENS[1:3]))
        assert record.bytes == 0


def test_a_candidate_on_its_way_is_not_fetched_twice(path, table):
    """The order that documents name: candidates, the choice, and only then their end."""
    with PrefetchRuntime(path, poison=True) as runtime:
        candidates = runtime.begin(TOKENS)
        with runtime.begin([TOKENS[2], 50]) as step:
            candidates.end()
            assert rows_match(step.wait(0), table, [TOKENS[2], 50])
        first, second = (record.layers[0] for record in runtime.ledger.steps)
        assert first.bytes == row_bytes(table, TOKENS)
        assert second.bytes == row_bytes(table, [50])
        assert second.reused == 1


def test_candidates_that_nobody_chose_cost_nothing_later(path, table):
    with PrefetchRuntime(path, poison=True) as runtime:
        for _ in range(200):
            runtime.begin(range(VOCAB)).end()
        with runtime.begin([5]) as step:
            assert rows_match(step.wait(0), table, [5])


def test_a_bad_candidate_is_an_error_and_the_choice_goes_on(path, table):
    with PrefetchRuntime(path) as runtime, runtime.begin([1]) as step:
        with pytest.raises(ValueError, match=f"got {VOCAB} at position 1"):
            runtime.begin([2, VOCAB])
        assert rows_match(step.wait(0), table, [1])
