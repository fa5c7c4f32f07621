"""Shards, bounded dictionaries, counting in parts: what the commands say, refuse and leave."""

import functools
import itertools
import json
import os
import signal
import subprocess
import time

import numpy as np
import pytest
from command_line import command, invoke

import l3ext
from l3ext.corpus import TokenChunk
from l3ext.shards import count_shards
from tests.test_shards import is_running

VOCAB = 50


def write_tokens(path, count, seed=0):
    tokens = np.random.default_rng(seed).integers(0, VOCAB, count).astype(np.uint16)
    tokens[99::100] = 0
    tokens.tofile(path)
    return TokenChunk(
        tokens.astype(np.int32), np.unique([0, *np.flatnonzero(tokens == 0) + 1, count])
    )


@pytest.fixture
def corpus(tmp_path):
    chunk = write_tokens(tmp_path / "a.bin", 300_000)
    return chunk, [tmp_path / "a.bin", "--eos-id", 0, "--vocab-size", VOCAB, "--max-rows", 32]


def allocate(*arguments):
    return invoke("allocate", *arguments)


def succeed(*arguments):
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    return result


def test_shards_count_as_the_library_does(tmp_path, corpus):
    chunk, arguments = corpus
    out = ["--rows", "4x", "-o", tmp_path / "out", "--json"]
    result = succeed("allocate", *arguments, "--shards", 3, "--sample-tokens", 50_000, *out)
    expected = count_shards([chunk], VOCAB, shards=3).allocate(200, 32)
    assert l3ext.Allocation.load(tmp_path / "out") == expected
    facts = json.loads(result.stdout)
    assert facts["tokens"] == 300_000
    measured = facts["approximation"]
    assert 40_000 < measured["tokens"] <= 50_000
    assert measured["documents"] > 100
    assert 0 < measured["from_exact"] < 2
    assert 0 < measured["of_another_order"] < 2
    assert measured["max_codewords"] is None


def test_it_says_how_far_from_exact_it_is(tmp_path, corpus):
    chunk, arguments = corpus
    out = ["--rows", "4x", "-o", tmp_path / "out"]
    result = succeed("allocate", *arguments, "--max-codewords", 3000, *out)
    bounded, exact = (l3ext.LZWCounter(VOCAB, max_codewords=bound) for bound in (3000, None))
    for counter in (bounded, exact):
        counter.update(chunk.tokens, chunk.offsets)
    rows = [counter.allocate(200, 32).rows.astype(int) for counter in (bounded, exact)]
    assert l3ext.Allocation.load(tmp_path / "out").rows.tolist() == rows[0].tolist()
    distance = np.abs(rows[0] - rows[1]).sum() / 200
    sentence = next(line for line in result.stdout.splitlines() if line.startswith("approximate"))
    assert f"{distance:.4f} from the exact allocation" in sentence  # the sample is everything
    assert "300,000 tokens (and 3,000 codewords)" in sentence
    result = succeed("allocate", *arguments, "--max-codewords", 3000, *out, "--sample-tokens", 0)
    assert "approximate" not in result.stdout


def test_what_is_exact_says_nothing_of_distances(tmp_path, corpus):
    _, arguments = corpus
    out = ["--rows", "4x", "-o", tmp_path / "out"]
    assert "approximate" not in succeed("allocate", *arguments, *out).stdout
    exact = l3ext.Allocation.load(tmp_path / "out")
    assert "approximate" not in succeed("allocate", *arguments, "--shards", 1, *out).stdout
    assert l3ext.Allocation.load(tmp_path / "out") == exact


def test_parts_counted_apart_and_merged_are_shards(tmp_path, corpus):
    chunk, arguments = corpus
    parts = []
    bounds = chunk.offsets[np.linspace(0, chunk.offsets.size - 1, 4).astype(int)]
    for place, (begin, end) in enumerate(itertools.pairwise(bounds)):
        chunk.tokens[begin:end].astype(np.uint16).tofile(tmp_path / f"{place}.bin")
        part = [tmp_path / f"{place}.bin", *arguments[1:], "--checkpoint", tmp_path / f"{place}"]
        result = succeed("allocate", *part, "--json")
        assert "total_rows" not in json.loads(result.stdout)
        parts.append(tmp_path / f"{place}")
    merged = l3ext.LZWCounter.load(parts[0])
    for part in parts[1:]:
        merged.merge(l3ext.LZWCounter.load(part))
    out = ["--rows", "4x", "--max-rows", 32, "-o", tmp_path / "out"]
    succeed("merge", *parts[:2], "-o", tmp_path / "01")
    for counters in (parts, [tmp_path / "01", parts[2]]):
        facts = json.loads(succeed("merge", *counters, "-o", tmp_path / "all", "--json").stdout)
        assert (facts["tokens"], facts["codewords"]) == (300_000, merged.num_codewords)
        for inputs in ([tmp_path / "all"], counters):
            succeed("allocate", *inputs, *out)
            assert l3ext.Allocation.load(tmp_path / "out") == merged.allocate(200, 32)
    assert "codewords" in succeed("merge", *parts, "-o", tmp_path / "all").stdout


def test_a_bounded_checkpoint_goes_on(tmp_path, corpus):
    _, arguments = corpus
    arguments = [*arguments, "--checkpoint", tmp_path / "counter"]
    succeed("allocate", *arguments, "--max-codewords", 3000)
    assert l3ext.LZWCounter.load(tmp_path / "counter").max_codewords == 3000
    content = (tmp_path / "counter").read_bytes()
    out = ["--rows", "4x", "-o", tmp_path / "out"]
    facts = succeed("allocate", *arguments, "--max-codewords", 3000, *out, "--json").stdout
    assert json.loads(facts)["approximation"]["tokens"] == 300_000  # of what it had counted
    result = allocate(*arguments, *out)
    assert result.exit_code == 2
    assert "expected vocab_size 50, parse paper, max_codewords None; got" in result.output
    assert (tmp_path / "counter").read_bytes() == content


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shards", 0, "--rows", "4x", "-o", "out"], "shards: expected 1 to 1024, got 0"),
        (["--shards", -3, "--rows", "4x", "-o", "out"], "shards: expected 1 to 1024, got -3"),
        (["--shards", 2, "--checkpoint", "c"], "--checkpoint: not of a run with --shards"),
        (["--shards", 2, "--threads", 2], "--threads: not of a run with --shards"),
        (["--threads", 0, "--rows", "4x", "-o", "out"], "Invalid value for '--threads'"),
        (["--shards", 2], "--rows: expected it and --output, or --checkpoint"),
        (["--max-codewords", 49, "--checkpoint", "c"], "max_codewords: expected vocab_size = 50"),
        (
            ["--max-codewords", 99, "--shards", 2, "--rows", "4x", "-o", "out"],
            "max_codewords: expected at least shards * vocab_size = 2 * 50",
        ),
        (["--rows", "4x"], "--output: expected the file to write the allocation to"),
        (["-o", "out"], "--rows: expected how many rows --output shall have"),
        (
            ["--rows", "4x", "--rows", "2x", "-o", "out"],
            "--rows: expected one without --plan, got 2",
        ),
        (["--rows", "4x", "-o", "out", "--max-rows", 9], "--max-rows: expected one without --plan"),
        (["--rows", "4x", "-o", "missing/out"], "missing: --output: no such directory"),
        (["--rows", "4x", "-o", "."], "--output: expected a file, got a directory"),
        (["--checkpoint", "missing/counter"], "missing: --checkpoint: no such directory"),
        (["--rows", "4x", "-o", "out", "--sample-tokens", -1, "--shards", 2], "--sample-tokens"),
        (["--rows", "4x", "-o", "out", "--seed", -1, "--shards", 2], "--seed"),
        (["--rows", "4x", "-o", "out", "--parse", "z", "--shards", 2], 'parse: expected "paper"'),
    ],
)
def test_options_that_cannot_be(tmp_path, corpus, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    result = allocate(*corpus[1], *options)
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
    assert {path.name for path in tmp_path.iterdir()} == {"a.bin"}


def test_counters_that_cannot_be_merged(tmp_path):
    for name, counter in {
        "a": l3ext.LZWCounter(50),
        "other-size": l3ext.LZWCounter(51),
        "other-parse": l3ext.LZWCounter(50, "lzw"),
    }.items():
        counter.save(tmp_path / name)
    (tmp_path / "corrupt").write_bytes((tmp_path / "a").read_bytes()[:-1])
    (tmp_path / "text.txt").write_text("no counter")
    os.mkfifo(tmp_path / "fifo")
    for name, message in [
        ("other-size", "other-size: cannot be merged with"),
        ("other-size", "other: expected vocab_size 50, got 51"),
        ("other-parse", "other: expected parse paper, got lzw"),
        ("corrupt", "corrupt: not a usable LZW counter"),
        ("text.txt", "text.txt: not a usable LZW counter"),
        ("nowhere", "nowhere: cannot open: No such file"),
        ("fifo", "fifo: not a usable LZW counter: expected a regular file"),
    ]:
        result = invoke("merge", tmp_path / "a", tmp_path / name, "-o", tmp_path / "out")
        assert result.exit_code == 2
        assert message in result.output
        result = allocate(tmp_path / "a", tmp_path / name, "--rows", "4x", "-o", tmp_path / "out")
        assert result.exit_code == 2
        assert not (tmp_path / "out").exists()


def test_counters_have_been_counted(tmp_path):
    l3ext.LZWCounter(50).save(tmp_path / "a")
    out = ["--rows", "4x", "-o", tmp_path / "out"]
    for options in (["--shards", 2, *out], ["--threads", 2, *out], ["--checkpoint", tmp_path / "c"],
                    ["--max-codewords", 99, *out]):  # fmt: skip
        result = allocate(tmp_path / "a", *options)
        assert result.exit_code == 2
        assert "inputs: counters have been counted: only" in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_merge_needs_a_place_to_write(tmp_path):
    l3ext.LZWCounter(50).save(tmp_path / "a")
    for output, message in (("no/out", "no such directory"), (".", "got a directory")):
        result = invoke("merge", tmp_path / "a", "-o", tmp_path / output)
        assert result.exit_code == 2
        assert message in result.output


# --- Ctrl-C -------------------------------------------------------------------------------------


def test_ctrl_c_ends_all_shards(tmp_path):
    write_tokens(tmp_path / "a.bin", 20_000_000)
    (tmp_path / "tmp").mkdir()
    line, environment = command(
        "allocate", tmp_path / "a.bin", "--eos-id", 0, "--vocab-size", VOCAB, "--shards", 2,
        "--rows", "4x", "-o", tmp_path / "out",
    )  # fmt: skip
    process = subprocess.Popen(
        line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env={**environment, "TMPDIR": str(tmp_path / "tmp")},
        # Whoever runs the tests in the background of a shell has it ignored.
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    children = f"/proc/{process.pid}/task/{process.pid}/children"
    while len(workers := read(children).split()) < 2:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    end = time.monotonic() + 60
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "interrupted: nothing is kept" in errors
    assert not (tmp_path / "out").exists()
    assert list((tmp_path / "tmp").iterdir()) == []
    for worker in map(int, workers):
        while is_running(worker):  # one that was just being started hears of it by its pipe
            assert time.monotonic() < end
            time.sleep(0.01)


def read(path):
    with open(path) as stream:
        return stream.read()
