import json
import sys

import numpy as np
import pytest
from command_line import invoke

import l3ext


def inspect(*arguments):
    result = invoke("inspect", *arguments, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture
def allocation_file(tmp_path):
    l3ext.Allocation.from_rows(np.array([1, 5, 1, 3], np.int32)).save(tmp_path / "rows")
    return tmp_path / "rows"


def test_checkpoint(run_directory):
    facts = inspect(run_directory, "--top", 3)
    assert facts["kind"] == "checkpoint"
    assert facts["step"] == facts["steps"] == 8
    ((name, shape),) = facts["tables"].items()
    assert name.endswith(".table")
    assert shape == [facts["rows"]["total_rows"], 64]
    assert facts["table_parameters"] == shape[0] * 64 < facts["parameters"]
    assert len(facts["rows"]["top"]) == 3
    assert all(isinstance(owner["text"], str) for owner in facts["rows"]["top"])


def test_allocation(allocation_file):
    rows = inspect(allocation_file)["rows"]
    assert (rows["total_rows"], rows["vocab_size"], rows["max_rows"]) == (10, 4, 5)
    assert rows["tokens_with_one_row"] == 2
    top = [(owner["id"], owner["rows"]) for owner in rows["top"]]
    assert top == [(1, 5), (3, 3), (0, 1), (2, 1)]


def test_tokens(run_directory):
    facts = inspect(run_directory / "corpus.tokens")
    assert facts["kind"] == "tokens"
    assert facts["documents"] == 400
    assert facts["tokens"] > 400


def test_counter(tmp_path):
    counter = l3ext.LZWCounter(8)
    counter.update(np.array([1, 2, 1, 2, 1, 2], np.int32))
    counter.save(tmp_path / "counter")
    facts = inspect(tmp_path / "counter")
    assert facts["kind"] == "counter"
    assert facts["tokens"] == 6
    assert facts["codewords"] == counter.num_codewords


def test_tables(run_directory, tmp_path):
    options = ("--tier", "disk", "--path", tmp_path / "tables", "--max-new-tokens", 1)
    assert invoke("generate", run_directory, "--prompt", "the", *options).exit_code == 0
    facts = inspect(tmp_path / "tables")
    assert facts["kind"] == "tables"
    assert facts["rows"]["total_rows"] == inspect(run_directory)["rows"]["total_rows"]


def test_text_for_people(run_directory, allocation_file):
    text = invoke("inspect", run_directory).stdout
    assert "kind: checkpoint" in text
    rows = inspect(run_directory)["rows"]["total_rows"]
    assert f"table: {rows:,} rows of 64" in text
    text = invoke("inspect", allocation_file, "--tokenizer", run_directory).stdout
    assert "rows: 10 of 4 tokens; 2 own 1, 1 own 5" in text


def test_plot(allocation_file, tmp_path):
    pytest.importorskip("matplotlib")
    assert invoke("inspect", allocation_file, "--plot", tmp_path / "rows.png").exit_code == 0
    assert (tmp_path / "rows.png").read_bytes().startswith(b"\x89PNG")
    assert invoke("inspect", allocation_file, "--plot", tmp_path / "rows.svg").exit_code == 0
    assert b"<svg" in (tmp_path / "rows.svg").read_bytes()


def test_plot_refuses(allocation_file, run_directory, tmp_path, monkeypatch):
    result = invoke("inspect", run_directory / "corpus.tokens", "--plot", tmp_path / "x.png")
    assert "holds no allocation of rows" in result.stderr
    result = invoke("inspect", allocation_file, "--plot", tmp_path / "x.tiger")
    assert result.exit_code == 2
    assert "tiger" in result.stderr
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = invoke("inspect", allocation_file, "--plot", tmp_path / "x.png")
    assert result.exit_code == 2
    assert "l3ext[plots]" in result.stderr
    assert not (tmp_path / "x.png").exists()


def test_foreign_files(tmp_path):
    (tmp_path / "x").write_bytes(b"nothing of ours" * 1000)
    result = invoke("inspect", tmp_path / "x")
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {tmp_path / 'x'}: neither tokens nor tables")
    assert invoke("inspect", tmp_path).exit_code == 2
