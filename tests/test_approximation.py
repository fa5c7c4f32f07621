"""The distance of allocations, and the sample that it is measured on."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import l3ext
from l3ext.approximation import DocumentSample, allocation_distance
from l3ext.corpus import TokenChunk
from l3ext.shards import count_shards
from tests.lzw.helpers import counted, pack, zipf_documents
from tests.test_shards import chunks_of

rows = l3ext.Allocation.from_rows


def sampled(documents, tokens, cuts=(), seed=0):
    sample = DocumentSample(tokens, seed=seed)
    for chunk in chunks_of(documents, cuts):
        sample.add(chunk)
    return sample


def documents_of(chunk):
    return [chunk.tokens[a:b].tolist() for a, b in zip(chunk.offsets, chunk.offsets[1:])]  # noqa: B905


def test_the_distance():
    assert allocation_distance(rows([3, 1, 2]), rows([3, 1, 2])) == 0
    assert allocation_distance(rows([4, 1, 1]), rows([1, 1, 4])) == 1.0
    with pytest.raises(ValueError, match="b: expected 2 tokens and 4 rows, got 2 and 5"):
        allocation_distance(rows([2, 2]), rows([2, 3]))
    with pytest.raises(ValueError, match="b: expected 2 tokens and 4 rows, got 3 and 4"):
        allocation_distance(rows([2, 2]), rows([1, 2, 1]))
    with pytest.raises(TypeError, match=r"b: expected l3ext\.Allocation, got list"):
        allocation_distance(rows([2, 2]), [2, 2])


@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=30),
    tokens=st.integers(1, 100),
    cuts=st.lists(st.integers(0, 30), max_size=5),
    seed=st.integers(0, 5),
)
@settings(max_examples=300)
def test_a_sample_is_the_first_documents_of_a_random_order(lengths, tokens, cuts, seed):
    # Each document is its own number, repeated; empty ones cannot be told apart.
    documents = [[place] * length for place, length in enumerate(lengths)]
    cuts = [min(cut, len(documents)) for cut in cuts]
    sample = sampled(documents, tokens, cuts, seed)
    order = np.argsort(np.random.default_rng(seed).random(len(documents)))
    expected, left = [], tokens
    for place in order.tolist():
        if expected and lengths[place] > left:
            break
        expected.append(place)
        left -= lengths[place]
        if left < 0:
            break
    assert documents_of(sample.chunk()) == [documents[place] for place in sorted(expected)]
    assert sample.tokens_seen == sum(lengths)


def test_every_document_is_as_likely():
    drawn = np.zeros(40)
    for seed in range(600):
        chunk = sampled([[place] * 5 for place in range(40)], 50, [7, 20], seed).chunk()
        drawn[np.unique(chunk.tokens)] += 1
    assert drawn.sum() == 600 * 10
    assert abs(drawn - 150).max() < 5 * np.sqrt(150)


def test_the_distances_of_a_sample():
    documents = zipf_documents(1, documents=300, length=200)
    sample = sampled(documents, 10_000, [100])
    chunk = sample.chunk()
    distance = sample.distance(50, 200, 16, shards=3, max_codewords=3000)
    bound = 150 + round(2850 * chunk.tokens.size / sample.tokens_seen)
    assert (distance.tokens, distance.documents) == (chunk.tokens.size, chunk.offsets.size - 1)
    assert distance.max_codewords == bound
    exact = counted(documents_of(chunk), 50).allocate(200, 16)
    run = 65536 * chunk.tokens.size // sample.tokens_seen
    approximate = count_shards([chunk], 50, shards=3, max_codewords=bound, run_tokens=run)
    approximate = approximate.allocate(200, 16)
    assert distance.from_exact == allocation_distance(exact, approximate) > 0
    assert 0 < distance.of_another_order < 2


def test_a_sample_of_everything_is_measured_as_counted():
    documents = zipf_documents(2, documents=100)
    distance = sampled(documents, 10**9).distance(50, 200, 16, parse="lzw", max_codewords=70)
    exact = counted(documents, 50, "lzw").allocate(200, 16)
    bounded = counted(documents, 50, "lzw", 70).allocate(200, 16)
    assert distance.max_codewords == 70
    assert distance.from_exact == allocation_distance(exact, bounded) > 0
    assert sampled(documents, 10**9).distance(50, 200, 16).from_exact == 0


def test_an_empty_corpus_is_at_no_distance():
    distance = DocumentSample(10).distance(50, 200, 16, shards=2)
    assert (distance.tokens, distance.documents, distance.from_exact) == (0, 0, 0.0)
    sample = DocumentSample(10)
    sample.add(TokenChunk(*pack([[], []])))
    assert sample.distance(50, 200, 16, shards=2).documents == 2


def test_a_sample_of_nothing():
    with pytest.raises(ValueError, match="tokens: expected a sample of at least 1, got 0"):
        DocumentSample(0)
    with pytest.raises(TypeError, match="tokens: expected an int, got None"):
        DocumentSample(None)
    with pytest.raises(TypeError, match="seed: expected an int, got '0'"):
        DocumentSample(1, seed="0")
    with pytest.raises(TypeError, match=r"chunk: expected l3ext\.corpus\.TokenChunk, got list"):
        DocumentSample(1).add([1])
