"""Documents and tokens come out of every kind of file, and errors say where."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from l3ext.corpus import load_tokenizer, read_documents, read_tokens


@pytest.fixture
def tokenizer():
    words = {"[UNK]": 0, "a": 1, "b": 2, "c": 3}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def documents_of(chunks):
    return [
        chunk.tokens[begin:end].tolist()
        for chunk in chunks
        for begin, end in zip(chunk.offsets[:-1], chunk.offsets[1:], strict=True)
    ]


def test_text_files(tmp_path):
    path = write(tmp_path / "a.txt", "\ufeffone\r\ntwo\n\n \nthree é\nfour")
    assert list(read_documents(path)) == ["one", "two", " ", "three é", "four"]
    assert list(read_documents(path, split="blank")) == ["one\ntwo", "three é\nfour"]
    assert list(read_documents([path], split="file")) == ["one\ntwo\n\n \nthree é\nfour"]
    assert list(read_documents(write(tmp_path / "empty.md", ""))) == []


def test_jsonl_and_parquet_agree(tmp_path):
    texts = ["one", None, "", "two\nlines", "é"]
    lines = "\n\n".join(json.dumps({"id": i, "body": text}) for i, text in enumerate(texts))
    jsonl = write(tmp_path / "a.jsonl", lines)
    pq.write_table(pa.table({"id": range(5), "body": texts}), tmp_path / "a.parquet")
    for path in (jsonl, tmp_path / "a.parquet"):
        assert list(read_documents(path, column="body")) == ["one", "two\nlines", "é"]


def test_parquet_is_read_batch_by_batch(tmp_path):
    texts = [f"text {i}" for i in range(5000)]
    pq.write_table(pa.table({"text": pa.array(texts, pa.large_string())}), tmp_path / "a.parquet")
    assert list(read_documents(tmp_path / "a.parquet")) == texts


def test_text_becomes_chunks_of_whole_documents(tmp_path, tokenizer):
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    path = write(tmp_path / "a.txt", "a b\nc\na a a a a\nb\nz")
    expected = [[1, 2], [3], [1, 1, 1, 1, 1], [2], [0]]
    for given in (tokenizer, tmp_path / "tokenizer.json", str(tmp_path / "tokenizer.json")):
        chunks = list(read_tokens([path, path], tokenizer=given, chunk_tokens=3))
        assert documents_of(chunks) == expected * 2
        assert [chunk.tokens.size for chunk in chunks] == [3, 5, 2, 3, 5, 2]
        assert all(chunk.tokens.dtype == np.int32 for chunk in chunks)
        assert all(chunk.offsets.dtype == np.int64 for chunk in chunks)


def test_many_batches_of_text(tmp_path, tokenizer):
    path = write(tmp_path / "a.txt", "\n".join("a b c " * 20_000 for _ in range(25)))
    documents = documents_of(read_tokens(path, tokenizer=tokenizer))
    assert documents == [[1, 2, 3] * 20_000] * 25


@pytest.mark.parametrize("chunk_tokens", range(1, 12))
@pytest.mark.parametrize("tail", [[], [7], [7, 8, 9, 7]])
def test_token_files_are_cut_at_eos(tmp_path, chunk_tokens, tail):
    documents = [[1, 2, 0], [0], [3, 4, 5, 6, 7, 8, 0], [1, 0], [2, 0], *([tail] if tail else [])]
    ids = np.array([token for document in documents for token in document])
    ids.astype("<u2").tofile(tmp_path / "a.bin")
    ids.astype("<i4").tofile(tmp_path / "b.bin")
    np.save(tmp_path / "a.npy", ids.astype(np.int64))
    for name, dtype in (("a.bin", None), ("b.bin", "int32"), ("a.npy", None)):
        chunks = list(
            read_tokens(tmp_path / name, dtype=dtype, eos_id=0, chunk_tokens=chunk_tokens)
        )
        assert documents_of(chunks) == documents
        for chunk in chunks:
            assert chunk.tokens.size <= chunk_tokens or chunk.offsets.size == 2


def test_a_token_file_without_eos_is_one_document(tmp_path):
    np.arange(10, dtype=np.uint16).tofile(tmp_path / "a.bin")
    write(tmp_path / "empty.bin", b"")
    chunks = list(read_tokens([tmp_path / "a.bin", tmp_path / "empty.bin"], chunk_tokens=3))
    assert documents_of(chunks) == [list(range(10))]


# --- errors -------------------------------------------------------------------------------------


def test_errors_show_before_anything_is_read(tmp_path, tokenizer):
    good = write(tmp_path / "a.txt", "a")
    with pytest.raises(FileNotFoundError) as caught:
        read_documents([good, tmp_path / "nowhere.txt"])
    assert caught.value.filename == str(tmp_path / "nowhere.txt")
    with pytest.raises(ValueError, match=r"a\.xyz: unknown suffix '\.xyz'; expected one of \.txt"):
        read_documents([good, write(tmp_path / "a.xyz", "")])
    with pytest.raises(ValueError, match=r"unknown suffix '\.bin'"):
        read_documents(write(tmp_path / "a.bin", b""))
    with pytest.raises(ValueError, match="paths: expected at least one file"):
        read_documents([])
    with pytest.raises(ValueError, match="split: expected"):
        read_documents(good, split="word")
    with pytest.raises(ValueError, match="tokenizer: expected one for text files, got None"):
        read_tokens(good)
    with pytest.raises(TypeError, match=r"tokenizer: expected .*, got object"):
        read_tokens(good, tokenizer=object())
    with pytest.raises(ValueError, match="chunk_tokens: expected at least 1, got 0"):
        read_tokens(good, tokenizer=tokenizer, chunk_tokens=0)
    with pytest.raises(TypeError, match="dtype: expected an integer dtype, got float32"):
        read_tokens(good, tokenizer=tokenizer, dtype=np.float32)
    with pytest.raises(TypeError, match="dtype: expected an integer dtype, got 'uint17'"):
        read_tokens(good, tokenizer=tokenizer, dtype="uint17")
    for wrong in (None, 1.5, b"a.txt", [good, None]):
        with pytest.raises(TypeError, match="paths: expected a path or a list of them, got"):
            read_documents(wrong)
    with pytest.raises(TypeError, match="chunk_tokens: expected an int, got None"):
        read_tokens(good, tokenizer=tokenizer, chunk_tokens=None)
    with pytest.raises(TypeError, match="eos_id: expected an int, got '0'"):
        read_tokens(good, tokenizer=tokenizer, eos_id="0")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"good\nba\xffd\n", r"a\.txt: not UTF-8 at byte 7"),
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', r"a\.jsonl, line 2: not JSON"),
        ("a.jsonl", b'{"b": 1, "a": 2}', r"line 1: no column 'text'; there are \['a', 'b'\]"),
        ("a.jsonl", b"[1]", "line 1: expected an object, got list"),
        ("a.jsonl", b'{"text": 5}', "line 1: column 'text': expected a string, got int"),
        ("a.jsonl", b"[" * 100_000, "line 1: not JSON"),
        ("a.jsonl", b'{"text": "\xff"}', "not UTF-8 at byte 10"),
    ],
)
def test_bad_documents(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message):
        list(read_documents(write(tmp_path / name, content)))


def test_bad_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"id": [1], "body": ["x"]}), path)
    with pytest.raises(ValueError, match=r"no column 'text'; there are \['body', 'id'\]"):
        list(read_documents(path))
    with pytest.raises(ValueError, match="column 'id': expected strings, got int64"):
        list(read_documents(path, column="id"))
    for content in (path.read_bytes()[:-9], b"", b"PAR1" * 10):
        with pytest.raises(OSError, match="not a usable Parquet file") as caught:
            list(read_documents(write(path, content)))
        assert caught.value.filename == str(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.bin", b"123", r"a\.bin: expected a multiple of 2 bytes \(uint16\), got 3"),
        ("a.npy", b"", r"a\.npy: not a usable \.npy file"),
        ("a.npy", b"\x93NUMPY\x01\x00", r"a\.npy: not a usable \.npy file"),
        ("a.npy", b"\x80\x04K\x01.", r"a\.npy: not a usable \.npy file"),  # a pickle
    ],
)
def test_bad_token_files(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message):
        list(read_tokens(write(tmp_path / name, content)))


@pytest.mark.parametrize("eos_id", [None, 0])
@pytest.mark.parametrize(
    ("dtype", "bad"), [("<u2", 9), ("<i4", -1), ("<i8", 2**40), ("<u8", 2**64 - 1)]
)
def test_ids_outside_the_vocabulary_are_named_by_file_and_position(tmp_path, dtype, bad, eos_id):
    good = np.tile(np.arange(9), 3).astype(dtype)
    wrong = good.copy()
    wrong[20:22] = bad
    np.save(tmp_path / "a.npy", good)
    np.save(tmp_path / "b.npy", wrong)
    write(tmp_path / "b.bin", wrong.tobytes())
    for name in ("b.npy", "b.bin"):
        paths = [tmp_path / "a.npy", tmp_path / name]
        options = {"dtype": dtype, "eos_id": eos_id, "chunk_tokens": 5}
        message = rf"{name}: expected ids in \[0, 9\), got {bad} at position 20"
        with pytest.raises(ValueError, match=message):
            list(read_tokens(paths, **options, vocab_size=9))
        assert sum(chunk.tokens.size for chunk in read_tokens(paths, **options)) == 54


def test_npy_files_that_hold_something_else(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((2, 3), np.int32))
    with pytest.raises(ValueError, match=r"expected one dimension of integers, got shape \[2, 3\]"):
        list(read_tokens(tmp_path / "a.npy"))
    np.save(tmp_path / "a.npy", np.zeros(3))
    with pytest.raises(ValueError, match="of float64"):
        list(read_tokens(tmp_path / "a.npy"))
    np.save(tmp_path / "a.npy", np.zeros(1000, np.int32))
    write(tmp_path / "a.npy", (tmp_path / "a.npy").read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"a\.npy: not a usable"):
        list(read_tokens(tmp_path / "a.npy"))


def test_a_file_that_is_no_tokenizer(tmp_path):
    with pytest.raises(OSError, match=r"not a usable tokenizer\.json") as caught:
        load_tokenizer(write(tmp_path / "tokenizer.json", "{}"))
    assert caught.value.filename == str(tmp_path / "tokenizer.json")
