from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import load_file

from l3ext.training import TokenFile, write_token_file


def chunk(tokens, offsets=None):
    tokens = np.asarray(tokens)
    return SimpleNamespace(
        tokens=tokens,
        offsets=np.asarray(offsets if offsets is not None else [0, len(tokens)], np.int64),
    )


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(100, np.uint16), (1 << 16, np.uint16), (1 << 17, np.uint32)]
)
def test_round_trip(tmp_path, vocab_size, dtype):
    chunks = [chunk([1, 2, 3, 99], [0, 1, 4]), chunk(np.zeros(0, np.int32), [0]), chunk([5])]
    file = write_token_file(tmp_path / "t", iter(chunks), vocab_size=vocab_size)
    assert file.tokens.dtype == dtype
    assert file.tokens.tolist() == [1, 2, 3, 99, 5]
    assert file.offsets.tolist() == [0, 1, 4, 5]
    assert file.vocab_size == vocab_size
    again = TokenFile.open(tmp_path / "t")
    assert again.tokens.tolist() == file.tokens.tolist()
    with pytest.raises(ValueError, match="read-only"):
        again.tokens[0] = 1


def test_any_safetensors_reader_opens_it(tmp_path):
    for count in range(5):  # every padding of the offsets
        write_token_file(tmp_path / "t", [chunk(np.arange(count))], vocab_size=9)
        arrays = load_file(tmp_path / "t")
        assert arrays["tokens"].tolist() == list(range(count))
        assert arrays["offsets"].tolist() == [0, count]


def test_an_empty_corpus_is_an_empty_file(tmp_path):
    file = write_token_file(tmp_path / "t", [], vocab_size=9)
    assert len(file.tokens) == 0
    assert file.offsets.tolist() == [0]


@pytest.mark.parametrize("bad", [-1, 9])
def test_an_id_outside_is_named_and_the_old_file_stays(tmp_path, bad):
    write_token_file(tmp_path / "t", [chunk([7])], vocab_size=9)
    with pytest.raises(ValueError, match=rf"ids in \[0, 9\), got {bad} at position 5"):
        write_token_file(tmp_path / "t", [chunk([1, 2, 3]), chunk([4, 5, bad])], vocab_size=9)
    assert TokenFile.open(tmp_path / "t").tokens.tolist() == [7]
    assert [path.name for path in tmp_path.iterdir()] == ["t"]


def test_ids_must_be_integers(tmp_path):
    with pytest.raises(TypeError, match="integer array, got float64"):
        write_token_file(tmp_path / "t", [chunk([0.5])], vocab_size=9)
    with pytest.raises(ValueError, match="vocab_size: expected 1 to"):
        write_token_file(tmp_path / "t", [], vocab_size=0)
