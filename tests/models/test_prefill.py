"""Long prompts of an offloaded model, in chunks: the same answer, the next rows on their way."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
from transformers import DynamicCache, StaticCache

import l3ext
from l3ext.models.prefill import CACHE_NAME
from l3ext.runtime import PrefetchRuntime
from l3ext.tables import LookupTable
from tests.runtime.test_offload import VOCAB, make_model

LENGTH = 40


def prompts(batch=1, length=LENGTH, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCAB, (batch, length), generator=generator)


@pytest.fixture
def offloaded(tmp_path):
    """Two equal models, one whose tables are on disk, and its runtime by ``prefill_chunk``."""
    runtimes = []

    def make(prefill_chunk, **options):
        model = make_model()
        path = tmp_path / f"tables{len(runtimes)}"
        options = {"prefill_chunk": prefill_chunk, "poison": True} | options
        runtimes.append(l3ext.offload(model, "disk", path, **options))
        return model, runtimes[-1]

    with torch.no_grad():
        yield make
    for runtime in runtimes:
        runtime.close()


def cache_of(output):
    return getattr(output, CACHE_NAME)


def close(a, b):
    # Products of other shapes sum in another order; nothing else differs.
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ring_bytes", [0, 6000, 1 << 20])
@pytest.mark.parametrize(("batch", "chunk"), [(1, 7), (1, 39), (2, 16), (3, 2)])
def test_the_same_logits_and_cache_in_chunks(offloaded, batch, chunk, ring_bytes):
    whole = make_model()
    model, runtime = offloaded(chunk, ring_bytes=ring_bytes)
    ids = prompts(batch)
    expected, got = whole(ids), model(ids)
    close(got.logits, expected.logits)
    assert got.logits.shape == expected.logits.shape
    assert cache_of(got).get_seq_length() == LENGTH
    each = max(1, chunk // batch)
    assert runtime.ledger.totals.steps == -(-LENGTH // each)
    more = prompts(batch, 1, seed=4)
    close(
        model(more, **{CACHE_NAME: cache_of(got)}).logits,
        whole(more, **{CACHE_NAME: cache_of(expected)}).logits,
    )


def test_the_next_chunk_is_asked_for_before_this_one_is_computed(offloaded):
    model, runtime = offloaded(10)
    model(prompts())
    steps = runtime.ledger.steps
    assert len(steps) == 4
    for step, following in itertools.pairwise(steps):
        assert following.begin_us < step.layers[0].wait_begin_us
        assert step.end_us <= following.layers[0].wait_begin_us
    assert not any(layer.cancelled for step in steps for layer in step.layers)


def test_left_padding_and_several_lengths(offloaded):
    model, runtime = offloaded(12)
    ids = prompts(3)
    mask = torch.ones_like(ids)
    for row, padding in enumerate((0, 5, 23)):  # more than a whole chunk of 4 is padding
        ids[row, :padding] = 0
        mask[row, :padding] = 0
    expected = make_model()(ids, attention_mask=mask).logits
    got = model(ids, attention_mask=mask).logits
    assert runtime.ledger.totals.steps == 10
    close(got[mask.bool()], expected[mask.bool()])


@pytest.mark.parametrize("name", sorted({CACHE_NAME, "past_key_values"}))  # the old one as well
def test_positions_and_a_cache_with_something_in_it(offloaded, name):
    model, runtime = offloaded(9)
    whole = make_model()
    ids = prompts(2)
    positions = torch.arange(LENGTH).expand(2, -1) + torch.tensor([[0], [3]])
    halves = ids.split(LENGTH // 2, dim=1)
    results = []
    for each in (whole, model):
        cache = None
        for i, half in enumerate(halves):
            place = positions[:, i * 20 : (i + 1) * 20]
            mask = torch.ones(2, (i + 1) * 20, dtype=torch.int64)
            output = each(
                half, attention_mask=mask, position_ids=place, use_cache=True, **{name: cache}
            )
            cache = cache_of(output)
        results.append(output.logits)
    close(*results)
    assert runtime.ledger.totals.steps == 10


@pytest.mark.parametrize("options", [{}, {"prefill_chunk_size": 8}, {"prefill_chunk_size": 25}])
@pytest.mark.parametrize("batch", [1, 2])
def test_generate(offloaded, options, batch):
    model, runtime = offloaded(10)
    ids = prompts(batch)
    settings = {"max_new_tokens": 8, "do_sample": False}
    text = model.generate(ids, attention_mask=torch.ones_like(ids), **settings, **options)
    expected = make_model().generate(ids, attention_mask=torch.ones_like(ids), **settings)
    assert torch.equal(text, expected)
    assert runtime.ledger.totals.steps > LENGTH // 10


def test_a_static_cache(offloaded):
    model, runtime = offloaded(10)
    whole, ids = make_model(), prompts()
    outputs = [
        each(ids, **{CACHE_NAME: StaticCache(each.config, max_cache_len=64)})
        for each in (whole, model)
    ]
    close(outputs[1].logits, outputs[0].logits)
    assert runtime.ledger.totals.steps == 4


def test_embeddings_with_their_ids(offloaded):
    model, runtime = offloaded(10)
    ids = prompts()
    embeds = model.model.embed_tokens(ids)
    got = model.model(inputs_embeds=embeds, l3_token_ids=ids, use_cache=True)
    close(got.last_hidden_state, make_model().model(ids).last_hidden_state)
    assert runtime.ledger.totals.steps == 4


@pytest.mark.parametrize(
    "arguments",
    [
        {"use_cache": False},
        {"output_hidden_states": True},
        {"attention_mask": torch.zeros(1, 1, LENGTH, LENGTH)},
    ],
    ids=lambda arguments: next(iter(arguments)),
)
def test_what_cannot_be_cut_runs_whole(offloaded, arguments):
    model, runtime = offloaded(10)
    got, expected = model(prompts(), **arguments), make_model()(prompts(), **arguments)
    assert torch.equal(got[0], expected[0])
    assert runtime.ledger.totals.steps == 1


def test_what_to_make_of_two_caches_is_left_to_transformers(offloaded):
    model, runtime = offloaded(10)

    def run(each):
        caches = {"cache": DynamicCache(), "past_key_values": DynamicCache()}
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                hidden = each.model(prompts(), **caches).last_hidden_state
            except (TypeError, ValueError) as error:
                return None, [str(error)], []
        filled = [cache.get_seq_length() for cache in caches.values()]
        return hidden, [str(warning.message) for warning in said], filled

    expected_hidden, expected_words, expected_filled = run(make_model())
    hidden, words, filled = run(model)
    assert (words, filled) == (expected_words, expected_filled)
    assert (hidden is None) == (expected_hidden is None)
    assert hidden is None or torch.equal(hidden, expected_hidden)
    assert runtime.ledger.totals.steps == 1


def test_a_tuple_comes_of_a_whole_run(offloaded):
    model, runtime = offloaded(10)
    got = model.model(prompts(), return_dict=False)
    assert torch.equal(got[0], make_model().model(prompts(), return_dict=False)[0])
    assert runtime.ledger.totals.steps == 1


def test_with_gradients_it_runs_whole(offloaded):
    model, runtime = offloaded(10)
    with torch.enable_grad():
        model(prompts())
    assert runtime.ledger.totals.steps == 1


def test_a_failure_in_a_chunk_ends_all_steps(offloaded, monkeypatch):
    model, runtime = offloaded(10)
    layer = model.model.layers[2]
    forward, calls = layer.forward, []

    def fail_at_third(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("in the third chunk")
        return forward(*args, **kwargs)

    monkeypatch.setattr(layer, "forward", fail_at_third)
    with pytest.raises(RuntimeError, match="in the third chunk"):
        model(prompts())
    assert runtime.ledger.totals.steps == 4  # the fourth was on its way
    monkeypatch.undo()
    close(model(prompts()).logits, make_model()(prompts()).logits)


def test_a_bad_id_in_a_later_chunk(offloaded):
    model, _ = offloaded(10)
    ids = prompts()
    ids[0, 33] = VOCAB
    with pytest.raises((ValueError, IndexError)):
        model(ids)
    close(model(prompts()).logits, make_model()(prompts()).logits)


def test_the_chunk_that_is_chosen(offloaded):
    table = make_model().model.l3_layers[0]
    tables = [LookupTable(table.table.detach(), table.allocation, table.d_model)]
    with PrefetchRuntime(tables, in_place=False) as runtime:  # the same bits unless asked
        assert runtime.prefill_chunk == 0
    with PrefetchRuntime(tables, in_place=False, prefill_chunk=5) as runtime:
        assert runtime.prefill_chunk == 5
    with PrefetchRuntime(tables, prefill_chunk=5) as runtime:  # nothing is fetched
        assert runtime.placement.in_place
        assert runtime.prefill_chunk == 0
    with pytest.raises(ValueError, match="prefill_chunk: expected 0 or more, got -1"):
        PrefetchRuntime(tables, prefill_chunk=-1)
    model, runtime = offloaded(0)
    model(prompts())
    assert runtime.ledger.totals.steps == 1
