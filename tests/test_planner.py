"""The planner equals plain computation over the same steps, and what the prefetch runtime does."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import l3ext
from l3ext.planner import Link, RowFormat, choose_hot_set, hot_order, plan_tables
from l3ext.step_sampler import StepSample, StepSampler, StepShape
from tests.lzw.reference import ReferenceCounter

LINK = Link(gigabytes_per_second=10.0, window_ms=0.0005)
ONE_ROW = l3ext.Allocation.from_rows([1])
DECODE, PREFILL = StepShape("decode", 6), StepShape("prefill", 40)


def zipf_tokens(count, vocab_size=60, seed=0):
    generator = np.random.default_rng(seed)
    return np.minimum(generator.zipf(1.4, count) - 1, vocab_size - 1).astype(np.int32)


def counted(tokens, vocab_size=60):
    counter = l3ext.LZWCounter(vocab_size)
    counter.update(tokens)
    return counter


def sampled(tokens, shapes, steps=50, seed=0):
    sampler = StepSampler(shapes, steps=steps, seed=seed)
    for chunk in np.array_split(tokens, 7):
        sampler.add(chunk)
    return sampler.samples()


def greedy(rows, frequency, budget):
    """The hot set by its definition: one token after the other."""
    order = sorted(range(len(rows)), key=lambda t: (-frequency[t], -rows[t], t))
    hot = set()
    for token in order:
        if rows[token] <= budget:
            hot.add(token)
            budget -= rows[token]
    return hot


# --- steps --------------------------------------------------------------------------------------


@given(steps=st.lists(st.lists(st.integers(0, 9), min_size=4, max_size=4), min_size=1, max_size=9))
def test_a_sample_holds_the_distinct_tokens_of_each_step(steps):
    sample = StepSample.of_steps(np.array(steps))
    rows = np.arange(10) ** 2 + 1
    parts = [sample.ids[a:b].tolist() for a, b in itertools.pairwise(sample.offsets)]
    assert parts == [sorted(set(step)) for step in steps]
    assert sample.rows(rows).tolist() == [sum(rows[t] for t in set(step)) for step in steps]


@pytest.mark.parametrize("chunks", [[1000], [1] * 300 + [700], [3, 500, 0, 2, 495]])
def test_prefill_steps_are_consecutive_and_cross_chunks(chunks):
    stream = np.arange(sum(chunks))
    sampler = StepSampler([StepShape("prefill", 5)], steps=4000)
    for chunk in np.split(stream, np.cumsum(chunks)[:-1]):
        sampler.add(chunk)
    (sample,) = sampler.samples().values()
    steps = sample.ids.reshape(4000, 5)
    assert np.array_equal(steps, steps[:, :1] + np.arange(5))
    begins = np.bincount(steps[:, 0], minlength=996)
    assert begins.size == 996  # the last possible place, and none beyond
    expected = 4000 / 996
    assert ((begins - expected) ** 2 / expected).sum() < 996 + 6 * math.sqrt(2 * 996)  # chi square


def test_decode_steps_are_places_anywhere():
    stream = np.arange(1000)
    (sample,) = sampled(stream, [StepShape("decode", 3)], steps=5000).values()
    seen = np.bincount(sample.ids, minlength=1000)
    expected = sample.ids.size / 1000
    assert ((seen - expected) ** 2 / expected).sum() < 1000 + 6 * math.sqrt(2 * 1000)


def test_the_seed_decides():
    tokens = zipf_tokens(5000)
    first, again, other = (
        sampled(tokens, [DECODE, PREFILL], seed=seed)[PREFILL].ids.tolist() for seed in (1, 1, 2)
    )
    assert first == again != other


def test_a_shorter_step_is_the_beginning_of_the_longest():
    tokens = np.arange(500)
    samples = sampled(tokens, [StepShape("prefill", 4), StepShape("prefill", 9)])
    short, long = (sample.ids.reshape(50, -1) for sample in samples.values())
    assert np.array_equal(short, long[:, :4])


# --- costs --------------------------------------------------------------------------------------


@given(
    owners=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 5)), min_size=1, max_size=30),
    budget=st.integers(0, 120),
)
@settings(max_examples=300)
def test_the_hot_set_takes_each_token_that_still_fits(owners, budget):
    rows, frequency = map(list, zip(*owners, strict=True))
    allocation = l3ext.Allocation.from_rows(rows, frequency=frequency)
    hot = choose_hot_set(allocation, hot_order(allocation), budget)
    assert set(np.flatnonzero(hot).tolist()) == greedy(rows, frequency, budget)
    unknown = l3ext.Allocation.from_rows(rows)
    hot = choose_hot_set(unknown, hot_order(unknown), budget)
    assert set(np.flatnonzero(hot).tolist()) == greedy(rows, [0] * len(rows), budget)


@pytest.mark.parametrize("seed", range(4))
def test_equals_plain_computation(seed):
    tokens = zipf_tokens(6000, seed=seed)
    counter = counted(tokens)
    samples = sampled(tokens, [DECODE, PREFILL], steps=130, seed=seed)
    format = RowFormat(32, 16, "bfloat16")
    costs = plan_tables(
        counter, samples, sizes=[(180, 16), (240, 64)], formats=[format], link=LINK,
        memory_bytes=3000, hot_shares=[0.1, 0.5, 1.0],
    )  # fmt: skip
    for cost, (total_rows, max_rows) in zip(costs, [(180, 16), (240, 64)], strict=True):
        rows = counter.allocate(total_rows, max_rows).rows.tolist()
        frequency = np.bincount(tokens, minlength=60).tolist()
        assert (cost.total_rows, cost.max_rows) == (total_rows, max_rows)
        assert (cost.row_bytes, cost.table_bytes) == (96, 96 * total_rows)
        traffic = [f * d for f, d in zip(frequency, rows, strict=True)]
        budgets = [0, 3000 // 96, *(int(share * total_rows) for share in (0.1, 0.5, 1.0))]
        labels = ["none", "memory", "10 %", "50 %", "100 %"]
        assert [hot.label for hot in cost.hot_sets] == labels
        for place, budget in enumerate(budgets):
            hot = greedy(rows, frequency, budget)
            told = cost.hot_sets[place]
            assert (told.tokens, told.rows) == (len(hot), sum(rows[t] for t in hot))
            assert told.bytes == 96 * told.rows <= told.budget_bytes
            share = sum(traffic[t] for t in hot) / sum(traffic)
            assert told.traffic_share == pytest.approx(share)
            for step in cost.steps:
                sample = samples[step.shape]
                sets = [set(sample.ids[a:b]) for a, b in itertools.pairwise(sample.offsets)]
                all_rows = sorted(sum(rows[t] for t in ids) for ids in sets)
                assert step.rows_mean == pytest.approx(sum(all_rows) / 130)
                assert step.rows_p99 == all_rows[math.ceil(0.99 * 130) - 1]
                moved = sorted(96 * sum(rows[t] for t in ids - hot) for ids in sets)
                exposed = [max(0.0, nbytes / 10e6 - 0.0005) for nbytes in moved]
                transfer = step.transfers[place]
                assert transfer.hot_set == labels[place]
                assert transfer.bytes_mean == pytest.approx(sum(moved) / 130)
                assert transfer.bytes_p99 == moved[math.ceil(0.99 * 130) - 1]
                assert transfer.link_ms_p99 == pytest.approx(transfer.bytes_p99 / 10e6)
                assert transfer.link_ms_mean == pytest.approx(transfer.bytes_mean / 10e6)
                assert transfer.exposed_ms_mean == pytest.approx(sum(exposed) / 130)
                assert transfer.exposed_ms_p99 == pytest.approx(exposed[math.ceil(0.99 * 130) - 1])
                assert transfer.fits == (transfer.link_ms_p99 <= 0.0005)
        assert {t.fits for step in cost.steps for t in step.transfers} == {True, False}
        assert cost.steps[0].transfers[-1].bytes_p99 == 0  # the whole table is hot


def zipf_corpus(vocab_size=500, count=60_000, document=80):
    """Tokens by Zipf's law, P ~ 1 / rank, drawn through its sums; ids have nothing of the rank."""
    generator = np.random.default_rng(3)
    law = np.cumsum(1 / np.arange(1, vocab_size + 1))
    ranks = np.searchsorted(law, generator.random(count) * law[-1], side="right")
    tokens = generator.permutation(vocab_size)[ranks].astype(np.int32)
    return tokens, np.append(np.arange(0, count, document), count)


def test_the_shares_of_a_zipf_corpus_are_those_of_brute_force():
    """From the tokens on, by nothing of ours: dictionaries, one token after the other, sums."""
    tokens, offsets = zipf_corpus()
    reference = ReferenceCounter(500)
    reference.update(document.tolist() for document in np.split(tokens, offsets[1:-1]))
    rows = np.array(reference.rows(2000, 64))
    frequency = np.array([(tokens == token).sum() for token in range(500)])
    row_traffic = np.array([rows[token] for token in tokens]).sum()  # a row for each read of one
    counter = l3ext.LZWCounter(500)
    counter.update(tokens, offsets)
    shares = (0.05, 0.1, 0.2, 0.3)
    (cost,) = plan_tables(
        counter, sampled(tokens, [DECODE]), sizes=[(2000, 64)],
        formats=[RowFormat(8, 8, "float32")], link=LINK, hot_shares=shares,
    )  # fmt: skip
    told = [hot.traffic_share for hot in cost.hot_sets[1:]]
    for share, hot, traffic_share in zip(shares, cost.hot_sets[1:], told, strict=True):
        kept = greedy(rows, frequency, int(share * 2000))
        assert hot.tokens == len(kept)
        expected = sum(int(rows[token]) for token in tokens if token in kept) / row_traffic
        assert traffic_share == pytest.approx(expected, abs=1e-12)
        # The tokens that own most fill the same share of the table, and no better: what a row saves
        # is its token's frequency, which the planner goes by.
        owners = np.argsort(-rows, kind="stable")
        owners = owners[np.cumsum(rows[owners]) <= share * 2000]
        assert traffic_share >= (rows * frequency)[owners].sum() / row_traffic - 1e-12
    # A small hot set is worth a lot, and each further share of the table less than the one before.
    assert 3 * shares[1] < told[1] < 1
    gained = np.diff([0, *told]) / np.diff([0, *shares])
    assert (np.diff(gained) < 0).all()


def test_the_runtime_keeps_and_fetches_what_was_planned():
    tokens = zipf_tokens(6000)
    counter = counted(tokens)
    sample = sampled(tokens, [PREFILL], steps=20)[PREFILL]
    format = RowFormat(32, 16, "float32")
    (cost,) = plan_tables(
        counter, {PREFILL: sample}, sizes=[(240, 64)], formats=[format], link=LINK,
        memory_bytes=10_000, hot_shares=[],
    )  # fmt: skip
    allocation = counter.allocate(240, 64)
    table = l3ext.LookupTable(data=torch.zeros(240, 48), allocation=allocation, d_in=32)
    with l3ext.PrefetchRuntime([table], cache_bytes=10_000, in_place=False, poison=True) as runtime:
        placement = runtime.placement
        for begin, end in itertools.pairwise(sample.offsets):
            with runtime.begin(sample.ids[begin:end]) as step:
                step.wait(0)
        totals = runtime.ledger.totals
    hot, moved = cost.hot_sets[1], cost.steps[0].transfers[1]
    assert (placement.hot_tokens, placement.hot_bytes) == (hot.tokens, hot.bytes)
    assert totals.bytes / 20 == pytest.approx(moved.bytes_mean)
    assert totals.rows / 20 == pytest.approx(cost.steps[0].rows_mean)


@pytest.mark.parametrize(
    ("format", "row_bytes"),
    [
        (RowFormat(2048, 1024, "bfloat16"), 6144),
        (RowFormat(2048, 1024, "float16"), 6144),
        (RowFormat(2048, 1024, "float32"), 12288),
        (RowFormat(2048, 1024, "float8"), 3088),
        (RowFormat(2048, 1024, "int8"), 3088),
        (RowFormat(2048, 2048, "bfloat16", tied=True), 4096),
        (RowFormat(2048, 2048, "int8", tied=True), 2064),
    ],
)
def test_row_bytes(format, row_bytes):
    assert format.row_bytes == row_bytes


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: StepShape("training", 4), 'kind: expected "decode" or "prefill", got'),
        (lambda: StepShape("decode", 0), "tokens: expected at least 1 a step, got 0"),
        (lambda: RowFormat(0, 4, "int8"), r"width: expected at least 1\+1, got 0\+4"),
        (lambda: RowFormat(4, 8, "int8", tied=True), "tied: expected d_in = d_emb, got 4 and 8"),
        (lambda: RowFormat(4, 4, "int4"), "dtype: expected one of float32, .*, got 'int4'"),
        (lambda: Link(0, 1), "link: expected GB/s above 0, got 0"),
        (lambda: Link(float("nan"), 1), "link: expected GB/s above 0, got nan"),
        (lambda: Link(1, -1), "window: expected at least 0 ms, got -1"),
        (lambda: Link(1, float("inf")), "window: expected at least 0 ms, got inf"),
        (lambda: StepSampler([]), "shapes: expected at least one"),
        (lambda: StepSampler([DECODE], steps=0), "steps: expected at least 1, got 0"),
        (lambda: StepSampler([StepShape("prefill", 2**40)]), "steps: expected at most 268435456"),
    ],
)
def test_nonsense(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: StepShape("decode", None), "tokens: expected an int, got None"),
        (lambda: RowFormat(4.0, 4, "int8"), r"d_in: expected an int, got 4\.0"),
        (lambda: RowFormat(4, "4", "int8"), "d_emb: expected an int, got '4'"),
        (lambda: Link("55", 1), "gigabytes_per_second: expected a number, got '55'"),
        (lambda: Link(1, None), "window_ms: expected a number, got None"),
        (lambda: StepSampler(None), r"shapes: expected a list of .*StepShape, got NoneType"),
        (lambda: StepSampler(["decode"]), r"shapes\[0\]: expected .*StepShape, got str"),
        (lambda: StepSampler([DECODE], steps=1.5), r"steps: expected an int, got 1\.5"),
        (lambda: StepSampler([DECODE], seed="0"), "seed: expected an int, got '0'"),
        (lambda: StepSampler([DECODE]).add([1]), r"tokens: expected numpy\.ndarray, got list"),
        (lambda: hot_order(None), r"allocation: expected l3ext\.Allocation, got NoneType"),
        (lambda: choose_hot_set(ONE_ROW, [0], 1), r"order: expected numpy\.ndarray, got list"),
        (
            lambda: choose_hot_set(ONE_ROW, np.array([0]), None),
            "budget_rows: expected an int, got None",
        ),
    ],
)
def test_arguments_of_another_kind(make, message):
    with pytest.raises(TypeError, match=message):
        make()


def test_a_corpus_shorter_than_a_step():
    sampler = StepSampler([DECODE, PREFILL], steps=5)
    sampler.add(np.arange(39))
    with pytest.raises(ValueError, match="expected a corpus of at least 40 tokens, got 39"):
        sampler.samples()
    sampler.add(np.arange(1))
    assert len(sampler.samples()) == 2
    with pytest.raises(ValueError, match="expected a corpus of at least 1 tokens, got 0"):
        StepSampler([DECODE]).samples()


def planned(**changes):
    """A small plan, but for these arguments."""
    tokens = zipf_tokens(2000)
    arguments = {
        "counter": counted(tokens),
        "samples": sampled(tokens, [DECODE]),
        "sizes": [(240, 64)],
        "formats": [RowFormat(8, 8, "int8")],
        "link": LINK,
    }
    return plan_tables(**(arguments | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"counter": None}, r"counter: expected l3ext\.LZWCounter, got NoneType"),
        ({"samples": None}, "samples: expected .*Mapping, got NoneType"),
        ({"sizes": 4}, "sizes: expected a list .*, got int"),
        ({"sizes": [("240", 64)]}, r"sizes\[0\]: expected an int, got '240'"),
        ({"formats": ["int8"]}, r"formats\[0\]: expected l3ext.planner.RowFormat, got str"),
        ({"link": 55}, r"link: expected l3ext.planner.Link, got int"),
        ({"memory_bytes": "1GiB"}, "memory_bytes: expected an int, got '1GiB'"),
        ({"hot_shares": ["10%"]}, r"hot_shares\[0\]: expected numbers.Real, got str"),
    ],
)
def test_plans_of_what_is_of_another_kind(changes, message):
    with pytest.raises(TypeError, match=message):
        planned(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sizes": [(240,)]}, r"sizes\[0\]: expected total_rows and max_rows, got 1 numbers"),
        ({"counter": l3ext.LZWCounter(60)}, "counter: expected a counted corpus, got one of 0"),
        ({"counter": counted([1, 2, 1], 5)}, r"samples: expected ids in \[0, 5\), got .* decode 6"),
        ({"memory_bytes": -1}, "memory_bytes: expected at least 0, got -1"),
        ({"hot_shares": [1.5]}, r"hot_shares: expected 0 to 1, got 1\.5"),
        ({"sizes": [(59, 4)]}, "total_rows: expected at least vocab_size = 60"),
    ],
)
def test_plans_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        planned(**changes)
