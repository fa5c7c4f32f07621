"""``l3ext allocate`` in a process of its own and in this one."""

import functools
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from typer.testing import CliRunner

import l3ext
from l3ext.cli import app


def run(*arguments):
    return CliRunner().invoke(app, ["allocate", *(str(argument) for argument in arguments)])


def write_tokens(path, count, seed=0):
    tokens = np.random.default_rng(seed).integers(0, 50, count).astype(np.uint16)
    tokens[99::100] = 0
    tokens.tofile(path)
    return tokens


@pytest.fixture
def bin_arguments(tmp_path):
    write_tokens(tmp_path / "a.bin", 3_000_000)
    return [tmp_path / "a.bin", "--eos-id", 0, "--vocab-size", 50, "--max-rows", 32]


def test_allocates_like_the_library(tmp_path, bin_arguments):
    result = run(*bin_arguments, "--rows", "4x", "-o", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    tokens = np.fromfile(tmp_path / "a.bin", np.uint16)
    ends = np.flatnonzero(tokens == 0) + 1
    offsets = np.unique([0, *ends, tokens.size])
    expected = l3ext.allocate(tokens, offsets, vocab_size=50, total_rows=200, max_rows=32)
    assert l3ext.Allocation.load(tmp_path / "out") == expected
    assert (summary["tokens"], summary["total_rows"]) == (3_000_000, 200)
    assert summary["tokens_with_one_row"] == (expected.rows == 1).sum()
    assert summary["tokens_per_second"] > 0


def test_a_corpus_without_tokens_is_remarked_on(tmp_path):
    path = tmp_path / "empty.bin"
    path.write_bytes(b"")
    output = tmp_path / "a"
    result = run(path, "--vocab-size", 4, "--eos-id", 0, "--rows", 8, "-o", output)
    assert result.exit_code == 0
    assert "warning: the corpus holds no tokens" in result.stderr


def test_what_is_read_is_not_written_over(tmp_path, bin_arguments):
    corpus, counter = bin_arguments[0], tmp_path / "counter"
    before = corpus.read_bytes()
    for options in (
        ("-o", corpus),
        ("-o", tmp_path / ".." / tmp_path.name / corpus.name),
        ("-o", tmp_path / "a", "--checkpoint", corpus),
        ("-o", counter, "--checkpoint", counter),
    ):
        result = run(*bin_arguments, "--rows", 100, *options)
        assert result.exit_code == 2
        assert ": expected a file of its own, got " in result.stderr
    assert corpus.read_bytes() == before
    assert not counter.exists()


def test_threads_change_nothing(tmp_path, bin_arguments):
    for threads in (1, 3):
        out = tmp_path / f"{threads}"
        result = run(*bin_arguments, "--rows", "4x", "-o", out, "--threads", threads)
        assert result.exit_code == 0, result.output
    assert l3ext.Allocation.load(tmp_path / "1") == l3ext.Allocation.load(tmp_path / "3")


def test_text_with_a_tokenizer(tmp_path):
    tokenizer = Tokenizer(models.WordLevel({"?": 0, "a": 1, "b": 2}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "a.txt").write_text("a b a b\n\nb b x\n")
    result = run(tmp_path / "a.txt", "--tokenizer", tmp_path / "tokenizer.json", "--rows", 9,
                 "-o", tmp_path / "out", "--parse", "lzw")  # fmt: skip
    assert result.exit_code == 0, result.output
    expected = l3ext.allocate(
        [1, 2, 1, 2, 2, 2, 0], [0, 4, 7], vocab_size=3, total_rows=9, parse="lzw"
    )
    assert l3ext.Allocation.load(tmp_path / "out") == expected
    assert "tokens per second" in result.stdout


def test_a_finished_checkpoint_grants_other_rows(tmp_path, bin_arguments):
    checkpoint = ["--checkpoint", tmp_path / "counter"]
    assert run(*bin_arguments, *checkpoint, "--rows", "4x", "-o", tmp_path / "a").exit_code == 0
    content = (tmp_path / "counter").read_bytes()
    assert run(*bin_arguments, *checkpoint, "--rows", "500", "-o", tmp_path / "b").exit_code == 0
    assert run(*bin_arguments, "--rows", "10x", "-o", tmp_path / "c").exit_code == 0
    assert (tmp_path / "counter").read_bytes() == content
    assert l3ext.Allocation.load(tmp_path / "b") == l3ext.Allocation.load(tmp_path / "c")


def test_a_checkpoint_of_another_corpus_is_refused(tmp_path, bin_arguments):
    arguments = [*bin_arguments, "--rows", "4x", "-o", tmp_path / "out", "--checkpoint",
                 tmp_path / "counter"]  # fmt: skip
    assert run(*arguments).exit_code == 0
    content = (tmp_path / "counter").read_bytes()
    for count, seed in ((3_000_000, 1), (2_000_000, 0), (100, 0)):
        write_tokens(tmp_path / "a.bin", count, seed)
        result = run(*arguments)
        assert result.exit_code == 2
        assert "--checkpoint: it counted" in result.output
    result = run(*arguments, "--parse", "lzw")
    assert "--checkpoint: expected vocab_size 50, parse lzw," in result.output
    assert (tmp_path / "counter").read_bytes() == content


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--rows": "many"}, "--rows: expected a number or a multiple like 4x, got 'many'"),
        ({"--rows": "nanx"}, "--rows: expected a number"),
        ({"--rows": "0.5x"}, "total_rows: expected at least vocab_size = 50"),
        ({"--rows": "99x"}, "total_rows: expected at most vocab_size * max_rows = 50 * 32"),
        ({"--vocab-size": "49"}, "a.bin: expected ids in [0, 49), got 49 at position"),
        ({"--parse": "lz"}, 'parse: expected "paper" or "lzw"'),
        ({"--dtype": "float32"}, "dtype: expected an integer dtype"),
        ({"--tokenizer": "nowhere.json"}, "nowhere.json"),
    ],
)
def test_bad_options(tmp_path, bin_arguments, changes, message):
    options = {"--rows": "4x", "-o": tmp_path / "out", **changes}
    extra = [word for option in options.items() for word in option]
    result = run(*bin_arguments, *extra)
    assert result.exit_code == 2
    assert message in result.output
    assert not (tmp_path / "out").exists()


# The signal that a terminal sends, in the second of the updates: no machine is too fast or slow.
INTERRUPTED = """
import os, signal
from l3ext.allocation import LZWCounter
from l3ext.cli import app

update, calls = LZWCounter.update, []

def update_or_stop(self, *arguments, **options):
    calls.append(self.num_tokens)
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGINT)
    update(self, *arguments, **options)

LZWCounter.update = update_or_stop
app()
"""


def test_ctrl_c_keeps_a_state_to_go_on_from(tmp_path):
    write_tokens(tmp_path / "a.bin", 20_000_000)
    arguments = [tmp_path / "a.bin", "--eos-id", 0, "--vocab-size", 50, "--rows", "4x",
                 "-o", tmp_path / "out", "--checkpoint", tmp_path / "counter"]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, "allocate", *map(str, arguments)],
        capture_output=True, text=True, timeout=60,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        # Whoever runs the tests in the background of a shell has it ignored.
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    assert done.returncode == 130, done.stderr
    assert f"the counter is kept in {tmp_path / 'counter'}" in done.stderr.replace("\n", "")
    assert not (tmp_path / "out").exists()
    kept = l3ext.LZWCounter.load(tmp_path / "counter").num_tokens
    assert 0 < kept < 20_000_000
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    whole = run(*arguments[:-2], "-o", tmp_path / "whole")
    assert whole.exit_code == 0, whole.output
    assert l3ext.Allocation.load(tmp_path / "out") == l3ext.Allocation.load(tmp_path / "whole")
