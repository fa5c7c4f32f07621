"""Train and generate, as a user would in one afternoon."""

import json
import shutil

import pytest
import torch
from command_line import SIZES, invoke, run_process

import l3ext


def test_train_json_is_alone_on_stdout_and_resumes(run_directory, corpus):
    result = invoke("train", corpus, "--output", run_directory, "--steps", 8, *SIZES, "--json")
    assert result.exit_code == 0, result.stderr
    summary = json.loads(result.stdout)
    assert summary["resumed_from"] == summary["steps"] == 8
    assert summary["eval_perplexity"] > 1
    assert summary["parameters"]["tables"] > 0
    assert "active" in result.stderr
    assert len((run_directory / "log.jsonl").read_text().splitlines()) == 8


def test_train_dense_from_the_token_file(run_directory, tmp_path):
    options = ("--tokenizer", run_directory, "--output", tmp_path / "dense", "--steps", 2)
    tokens = run_directory / "corpus.tokens"
    result = invoke("train", tokens, *options, *SIZES, "--dense", "--bf16", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["parameters"]["tables"] == 0


def test_train_with_an_allocation(corpus, tmp_path):
    l3ext.Allocation.uniform(280, 600).save(tmp_path / "rows")
    options = ("--output", tmp_path / "run", "--steps", 1, "--l3-tied", "--l3-layers", "1,2")
    result = invoke("train", corpus, *options, *SIZES, "--allocation", tmp_path / "rows", "--json")
    assert result.exit_code == 0, result.stderr
    # Two tied tables of 600 rows of 32.
    assert json.loads(result.stdout)["parameters"]["tables"] == 2 * 600 * 32


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--steps", 0), "steps: expected at least 1, got 0"),
        (("--l3-layers", "two"), "--l3-layers: expected numbers such as 2,4, got 'two'"),
        (("--l3-layers", "9"), "l3_layers: expected ascending positions"),
        (("--eval-fraction", 1), "--eval-fraction: expected a number between 0 and 1"),
        (("--rows-per-token", 0.5), "total_rows"),
        (("--learning-rate", -1), "learning_rate: expected a number > 0"),
        (("--allocation", "no-such-file"), "no-such-file"),
        (("--tokenizer", "no-such-file"), "no-such-file"),
        (("--device", "abacus"), "--device: expected cpu or cuda, got 'abacus'"),
        (("--rows-per-token", "nan"), "--rows-per-token: expected a number, got nan"),
        (("--rows-per-token", "inf"), "--rows-per-token: expected a number, got inf"),
        (("--heads", 3), "--heads: expected heads of an even width in --hidden-size 32, got 3"),
        (("--heads", 32), "--heads: expected heads of an even width"),
    ],
)
def test_train_refuses(corpus, tmp_path, options, text):
    steps = ("--steps", 1) if "--steps" not in options else ()
    result = invoke("train", corpus, "--output", tmp_path / "run", *steps, *SIZES, *options)
    assert result.exit_code == 2
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert text in line


@pytest.mark.parametrize("size", ["hidden-size", "intermediate-size", "layers", "heads"])
def test_train_refuses_sizes_below_one(corpus, tmp_path, size):
    options = (*SIZES, "--output", tmp_path / "run", "--steps", 1, f"--{size}", 0)
    result = invoke("train", corpus, *options)
    assert result.exit_code == 2
    assert f"--{size}" in result.stderr
    assert not (tmp_path / "run").exists()


def test_a_device_that_is_not_there(corpus, run_directory, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    output = tmp_path / "run"
    for line in (
        ("train", corpus, "--output", output, "--steps", 1, *SIZES),
        ("generate", run_directory, "--prompt", "the"),
    ):
        result = invoke(*line, "--device", "cuda")
        assert result.exit_code == 2
        assert "--device cuda: torch finds no CUDA device here" in result.stderr
    assert not output.exists()  # said before the corpus is read


def test_generate_refuses_bytes_that_are_no_text(run_directory):
    result = invoke("generate", run_directory, "--prompt", "the \udcff")
    assert result.exit_code == 2
    assert "--prompt: expected text in UTF-8, got '\\udcff' at character 4" in result.stderr


def test_train_refuses_another_corpus(run_directory, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("other words\n" * 400)
    result = invoke("train", other, "--output", run_directory, "--steps", 8, *SIZES)
    assert result.exit_code == 2
    assert "tokens of another corpus or other options (files changed)" in result.stderr


def test_train_refuses_missing_files_and_tokens_without_tokenizer(run_directory, tmp_path):
    missing = invoke("train", tmp_path / "none.txt", "--output", tmp_path / "run", "--steps", 1)
    assert missing.exit_code == 2
    assert "none.txt" in missing.stderr
    tokens = run_directory / "corpus.tokens"
    result = invoke("train", tokens, "--output", tmp_path / "run", "--steps", 1)
    assert "--tokenizer: a token file needs the tokenizer that made it" in result.stderr


def generate(run_directory, *options):
    line = ("generate", run_directory, "--prompt", "the quick", "--max-new-tokens", 6)
    result = invoke(*line, *options, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def test_the_text_is_the_same_in_every_tier(run_directory, tmp_path):
    table_file = tmp_path / "tables"
    choice = ("--sample", "--seed", 3)
    tiers = [
        generate(run_directory, *choice),
        generate(run_directory, *choice, "--tier", "ram", "--cache-bytes", "4KiB"),
        generate(run_directory, *choice, "--tier", "disk", "--path", table_file),
        generate(run_directory, *choice, "--tier", "disk", "--path", table_file),
    ]
    assert len({tuple(result["ids"]) for result in tiers}) == 1
    assert 0 < len(tiers[0]["ids"]) <= 6
    assert "exposed_fraction" not in tiers[0]
    assert all(0 <= result["exposed_fraction"] <= 1 for result in tiers[1:])
    assert all(result["tokens_per_second"] > 0 for result in tiers)
    assert table_file.stat().st_size > 0


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_the_text_of_quantised_tables_is_the_same_in_every_tier(run_directory, dtype, tmp_path):
    choice = ("--table-dtype", dtype)
    tiers = [
        generate(run_directory, *choice),
        generate(run_directory, *choice, "--tier", "disk", "--path", tmp_path / "tables"),
    ]
    assert tiers[0]["ids"] == tiers[1]["ids"]
    assert tiers[0]["table_dtype"] == dtype
    exact = ("generate", run_directory, "--prompt", "the", "--tier", "disk")
    result = invoke(*exact, "--path", tmp_path / "tables")
    assert result.exit_code == 2
    assert f"dtype: expected float32, the file has {dtype}" in result.stderr


def test_disk_without_path_keeps_the_table_beside_the_model(run_directory, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run_directory, copy)
    generate(copy, "--tier", "disk")
    assert (copy / "checkpoint-00000008/l3_tables.safetensors").is_file()
    assert generate(copy, "--tier", "disk")["ids"] == generate(copy)["ids"]


def test_generate_streams_text_and_remarks_on_stderr(run_directory):
    done = run_process(
        *("generate", run_directory / "checkpoint-00000008", "--tier", "ram"),
        *("--max-new-tokens", 4),
        input="a lazy dog",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("a lazy dog")
    assert "tokens/s, tables: ram" in done.stderr
    assert "exposed fetch" in done.stderr


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--tier", "moon"), "--tier: expected one of none, ram, disk, got 'moon'"),
        (("--path", "x"), "--path: is the table file of --tier disk, got --tier none"),
        (("--cache-bytes", "lots"), "--cache-bytes: expected a size such as 64MiB"),
        (
            ("--table-dtype", "int4"),
            "--table-dtype: expected one of int8, float8_e4m3fn, got 'int4'",
        ),
        (
            ("--table-dtype", "int8", "--device", "cuda"),
            "--table-dtype: rows in 8 bits need the CPU",
        ),
        (("--temperature", 0), "--temperature: expected a number > 0"),
        (("--prompt", ""), "--prompt: expected some text"),
    ],
)
def test_generate_refuses(run_directory, options, text):
    result = invoke("generate", run_directory, "--prompt", "the", *options)
    assert result.exit_code == 2
    assert text in result.stderr


def test_generate_refuses_damaged_and_foreign_directories(run_directory, tmp_path):
    result = invoke("generate", tmp_path, "--prompt", "the")
    assert result.exit_code == 2
    assert "expected a model's directory or a run of l3ext train" in result.stderr
    copy = tmp_path / "run"
    shutil.copytree(run_directory, copy)
    weights = copy / "checkpoint-00000008/model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    result = invoke("generate", copy, "--prompt", "the")
    assert result.exit_code == 2
    assert "model.safetensors: damaged: its checksum" in result.stderr


def test_tiers_need_lookup_layers(run_directory, tmp_path):
    output = tmp_path / "dense"
    tokens = run_directory / "corpus.tokens"
    options = ("--tokenizer", run_directory, "--output", output, "--steps", 1, "--dense")
    assert invoke("train", tokens, *options, *SIZES).exit_code == 0
    result = invoke("generate", output, "--prompt", "the", "--tier", "ram")
    assert result.exit_code == 2
    assert "holds a model without lookup layers" in result.stderr
