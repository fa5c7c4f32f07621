"""The benchmark of the kernels' choices, small and on the CPU, where all are the same."""

import json
import sys

import pytest

from l3ext import _C
from tests.programs import load_benchmark

SMALL = (
    "--device cpu --dtype float32 --d-in 32 --d-emb 16 --vocab-size 50 --total-rows 200 "
    "--tokens 40 70 --batch 1 5 --runs 3 --budget 0.01"
)


@pytest.fixture(scope="module")
def program():
    return load_benchmark("compare_choices")


def test_every_choice_has_its_figures(program, monkeypatch, tmp_path, capsys):
    tuned = []
    monkeypatch.setattr(program._C, "tune_cuda", lambda **choice: tuned.append(choice))
    path = tmp_path / "out.json"
    monkeypatch.setattr(sys, "argv", ["", *SMALL.split(), "--output", str(path)])
    program.main()
    result = json.loads(path.read_text())
    assert result["options"]["vocab_size"] == 50
    assert "commit" in result["machine"]
    measured = [(m["regime"], m["num_tokens"]) for m in result["measurements"]]
    assert measured == [
        *((regime, tokens) for regime in ("forward", "backward") for tokens in (40, 70)),
        ("decode", 1), ("decode", 5), ("tied forward", 40), ("tied forward", 70),
    ]  # fmt: skip
    for measurement in result["measurements"]:
        others = dict(measurement["results"])
        assert "ratio" not in others.pop("default")
        assert list(others) == list(program.CHOICES[measurement["regime"]])
        for row in measurement["results"].values():
            assert row["p10"] <= row["median"] <= row["p90"]
            assert row["same_bits"]
        for row in others.values():
            assert row["ratio"]["low"] <= row["ratio"]["median"] <= row["ratio"]["high"]
    every = [choice for choices in program.CHOICES.values() for choice in choices.values()]
    assert all(choice in tuned for choice in every)
    assert tuned[-1] == {}  # as it was
    assert capsys.readouterr().out.count("tied forward") == 4


def test_other_bits_are_said(program):
    row = {"median": 1e-6, "ratio": {"median": 2.0, "low": 1.5, "high": 2.5}, "same_bits": False}
    results = {"default": {"median": 5e-7, "same_bits": True}, "1 turn": row}
    default, other = program.lines({"regime": "decode", "num_tokens": 7, "results": results})
    assert other.endswith("1.0  2.000 (1.500 to 2.500), other bits")
    assert "other bits" not in default


def test_what_was_measured_stays_when_it_is_stopped(program, monkeypatch, tmp_path):
    compare = program.compare

    def stopped(bench, regime, tokens):
        if regime == "decode":
            raise KeyboardInterrupt
        return compare(bench, regime, tokens)

    path = tmp_path / "out.json"
    monkeypatch.setattr(program, "compare", stopped)
    monkeypatch.setattr(sys, "argv", ["", *SMALL.split(), "--output", str(path)])
    with pytest.raises(KeyboardInterrupt):
        program.main()
    measured = [m["regime"] for m in json.loads(path.read_text())["measurements"]]
    assert measured == ["forward", "forward", "backward", "backward"]


def test_what_cannot_be_chosen_is_refused_by_name(program):
    for choice in ({"decode_turns": 0}, {"most_decode_tokens": 1025}):
        with pytest.raises(ValueError, match=f"{next(iter(choice))}: expected .*, got "):
            _C.tune_cuda(**choice)
    _C.tune_cuda()
