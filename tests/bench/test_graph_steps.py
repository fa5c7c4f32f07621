"""The benchmark of decode steps in graphs, small and on the CPU: it compares what is the same."""

import json
import sys

import pytest

from tests.programs import load_benchmark

SMALL = "--device cpu --batch 1 5 --before 1 2 --hot 0 0.3 --layers 2 --vocab 50 --d-in 32 --d-emb 16 --runs 3 --budget 0.1"  # noqa: E501


@pytest.fixture(scope="module")
def program():
    return load_benchmark("compare_graph_steps")


def test_every_line_has_its_figures(program, monkeypatch, tmp_path, capsys):
    path = tmp_path / "out.json"
    monkeypatch.setattr(sys, "argv", ["", *SMALL.split(), "--output", str(path)])
    program.main()
    result = json.loads(path.read_text())
    assert result["settings"]["vocab"] == "50"
    assert "commit" in result["machine"]
    assert [(line["before"], line["hot"], line["batch"]) for line in result["lines"]] == [
        (before, hot, batch) for before in (1, 2) for hot in (0.0, 0.3) for batch in (1, 5)
    ]
    for line in result["lines"]:
        step = {name: row.get("a_step") for name, row in line["results"].items()}
        assert step["resident"] is None
        fetched, left = step["offloaded"], step["read in host memory"]
        assert 0 < fetched["fetched"] + fetched["resident"] <= line["batch"]
        assert fetched["left"] == left["fetched"] == left["fetched_bytes"] == 0
        assert left["left"] == fetched["fetched"]
        assert fetched["resident"] == 0 or line["hot"] > 0
        for row in line["results"].values():
            assert row["p10"] <= row["median"] <= row["p90"]
    assert capsys.readouterr().out.count("exposed") == 2 * len(result["lines"])


def test_other_bits_are_an_error(program, monkeypatch):
    from l3ext.graph_runtime import GraphRows

    attend = GraphRows.attend
    monkeypatch.setattr(GraphRows, "attend", lambda self, x: -attend(self, x))
    monkeypatch.setattr(sys, "argv", ["", *SMALL.split(), "--dtype", "float32"])
    with pytest.raises(RuntimeError, match="expected the bits of the resident table"):
        program.main()


def test_what_was_measured_stays_when_it_is_stopped(program, monkeypatch, tmp_path):
    compare, calls = program.compare, []

    def stopped(options, batch, before, *rest):
        calls.append((before, batch))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return compare(options, batch, before, *rest)

    path = tmp_path / "out.json"
    monkeypatch.setattr(program, "compare", stopped)
    monkeypatch.setattr(sys, "argv", ["", *SMALL.split(), "--output", str(path)])
    with pytest.raises(KeyboardInterrupt):
        program.main()
    measured = [(line["before"], line["batch"]) for line in json.loads(path.read_text())["lines"]]
    assert measured == calls[:3]
    assert list(tmp_path.iterdir()) == [path]
