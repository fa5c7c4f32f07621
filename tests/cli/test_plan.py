"""``l3ext allocate --plan``: the planner's figures as text, JSON and picture, and clear errors."""

import json
import sys
import xml.etree.ElementTree

import numpy as np
import pytest
from command_line import invoke

import l3ext
from l3ext.planner import Link, RowFormat, plan_tables
from l3ext.step_sampler import StepSampler, StepShape


@pytest.fixture
def tokens(tmp_path):
    generator = np.random.default_rng(0)
    tokens = np.minimum(generator.zipf(1.3, 50_000) - 1, 199).astype(np.uint16)
    tokens.tofile(tmp_path / "a.bin")
    return tokens


@pytest.fixture
def arguments(tmp_path, tokens):
    return [tmp_path / "a.bin", "--eos-id", 0, "--vocab-size", 200, "--plan", "--steps", 100]


OPTIONS = {
    "--rows": "4x", "--width": "64+32", "--decode": "8", "--link": "0.5", "--window": "0.05",
}  # fmt: skip


def words(options):
    return [word for option in options.items() for word in option if word is not None]


def plan(arguments, *more):
    result = invoke("allocate", *arguments, *words(OPTIONS), *more)
    assert result.exit_code == 0, result.output
    return result


def test_the_figures_are_the_planner_s(arguments, tokens):
    more = ["--rows", "2x", "--max-rows", 64, "--max-rows", 16, "--width", "48", "--row-dtype",
            "int8", "--row-dtype", "float32", "--prefill", 512, "--memory", "4KiB", "--seed",
            7]  # fmt: skip
    result = json.loads(plan(arguments, *more, "--json").stdout)
    shapes = [StepShape("decode", 8), StepShape("prefill", 512)]
    sampler = StepSampler(shapes, steps=100, seed=7)
    sampler.add(tokens)
    counter = l3ext.LZWCounter(200)
    counter.update(tokens, np.unique([0, *np.flatnonzero(tokens == 0) + 1, tokens.size]))
    formats = [
        RowFormat(64, 32, "int8"), RowFormat(64, 32, "float32"),
        RowFormat(48, 48, "int8", tied=True), RowFormat(48, 48, "float32", tied=True),
    ]  # fmt: skip
    sizes = [(800, 64), (800, 16), (400, 64), (400, 16)]
    costs = plan_tables(
        counter, sampler.samples(), sizes=sizes, formats=formats, link=Link(0.5, 0.05),
        memory_bytes=4096,
    )  # fmt: skip
    assert (result["tokens"], result["steps"], result["seed"], result["exact"]) == (
        50_000, 100, 7, True,
    )  # fmt: skip
    assert len(result["tables"]) == len(costs) == 16
    for told, cost in zip(result["tables"], costs, strict=True):
        assert (told["total_rows"], told["max_rows"]) == (cost.total_rows, cost.max_rows)
        assert told["format"]["dtype"] == cost.format.dtype
        assert told["table_bytes"] == cost.table_bytes
        assert [hot["label"] for hot in told["hot_sets"]] == [
            "none", "memory", "5 %", "10 %", "20 %",
        ]  # fmt: skip
        for place, hot in enumerate(cost.hot_sets):
            assert told["hot_sets"][place]["traffic_share"] == hot.traffic_share
        for place, step in enumerate(cost.steps):
            assert told["steps"][place]["shape"] == {
                "kind": step.shape.kind, "tokens": step.shape.tokens,
            }  # fmt: skip
            for number, transfer in enumerate(step.transfers):
                assert told["steps"][place]["transfers"][number]["bytes_p99"] == transfer.bytes_p99
                assert told["steps"][place]["transfers"][number]["fits"] == transfer.fits


def test_the_text_says_what_the_json_says(arguments):
    text = plan(arguments, "--row-dtype", "float8", "--row-dtype", "bfloat16").stdout
    result = json.loads(
        plan(arguments, "--row-dtype", "float8", "--row-dtype", "bfloat16", "--json").stdout
    )
    lines = text.splitlines()
    assert lines[0] == (
        "100 steps of each kind out of 50,000 tokens (seed 0); one lookup layer; link 0.5 GB/s, "
        "window 0.05 ms"
    )
    assert "v 800, k 512, 64+32 float8: 4 rows a token, 112 bytes a row, 87.5 KiB" in lines
    assert "v 800, k 512, 64+32 bfloat16: 4 rows a token, 192 bytes a row, 150.0 KiB" in lines
    table = result["tables"][1]
    for hot in table["hot_sets"]:
        share = f"{100 * hot['traffic_share']:.1f} %"
        assert any(hot["label"] in line and line.endswith(share) for line in lines)
    for transfer in table["steps"][0]["transfers"]:
        assert f"{transfer['link_ms_p99']:.3f} ms" in text
    fits = [line.split()[-1] for line in lines if line.endswith((" yes", " no"))]
    told = [t["fits"] for table in result["tables"] for t in table["steps"][0]["transfers"]]
    assert fits == ["yes" if fit else "no" for fit in told]
    assert set(fits) == {"yes", "no"}
    overview = lines[lines.index(next(line for line in lines if line.startswith("p99 on"))) :]
    assert len(overview) == 4
    assert ("*" in overview[3]) != table["steps"][0]["transfers"][0]["fits"]


def test_a_plan_counts_nothing_twice(arguments, tmp_path):
    checkpoint = ["--checkpoint", tmp_path / "counter"]
    first = plan(arguments, *checkpoint).stdout
    content = (tmp_path / "counter").read_bytes()
    assert plan(arguments, *checkpoint).stdout == first == plan(arguments).stdout
    assert (tmp_path / "counter").read_bytes() == content


def test_an_approximate_plan_says_so(arguments):
    assert "approximate" not in plan(arguments).stderr
    assert "approximate" in plan(arguments, "--shards", 2).stderr
    assert json.loads(plan(arguments, "--max-codewords", 500, "--json").stdout)["exact"] is False


def test_an_approximate_plan_says_how_far_from_exact_it_is(arguments, tokens):
    """Of each size by itself; the sample is everything, so the distance is the tables' own."""
    more = ["--max-codewords", 500, "--rows", "2x"]
    result = plan(arguments, *more)
    offsets = np.unique([0, *np.flatnonzero(tokens == 0) + 1, tokens.size])
    bounded, exact = (l3ext.LZWCounter(200, max_codewords=bound) for bound in (500, None))
    for counter in (bounded, exact):
        counter.update(tokens, offsets)
    tables = json.loads(plan(arguments, *more, "--json").stdout)["tables"]
    assert [table["total_rows"] for table in tables] == [800, 400]
    for table in tables:
        size = (table["total_rows"], table["max_rows"])
        d, d_exact = (counter.allocate(*size).rows.astype(int) for counter in (bounded, exact))
        distance = np.abs(d - d_exact).sum() / size[0]
        assert table["approximation"]["from_exact"] == pytest.approx(distance) != 0
        line = f"v {size[0]}, k {size[1]}: approximate: {distance:.4f} from the exact allocation"
        assert line in result.stdout
    assert "from the exact" not in plan(arguments).stdout
    assert "from the exact" not in plan(arguments, *more, "--sample-tokens", 0).stdout
    assert "approximation" not in json.loads(plan(arguments, "--json").stdout)["tables"][0]


def test_the_picture(arguments, tmp_path):
    pytest.importorskip("matplotlib")
    more = ["--prefill", 64, "--decode", 1, "--prefill", 256, "--memory", "9KiB"]
    result = plan(arguments, *more, "--picture", tmp_path / "plan.svg")
    assert f"wrote {tmp_path / 'plan.svg'}" in result.stderr
    root = xml.etree.ElementTree.parse(tmp_path / "plan.svg").getroot()
    assert root.tag.endswith("svg")
    assert len([e for e in root.iter() if e.get("id", "").startswith("axes_")]) >= 5
    plan(arguments, "--picture", tmp_path / "plan.PNG")
    assert (tmp_path / "plan.PNG").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--rows": None}, "--rows: --plan needs it"),
        ({"--width": None}, "--width: --plan needs it"),
        ({"--decode": None}, "--decode or --prefill: --plan needs it"),
        ({"--link": None}, "--link: --plan needs it"),
        ({"--window": None}, "--window: --plan needs it"),
        ({"--rows": "1"}, "total_rows: expected at least vocab_size = 200"),
        ({"--rows": "x"}, "--rows: expected a number or a multiple"),
        ({"--max-rows": "0"}, "max_rows: expected at least 1, got 0"),
        ({"--width": "64x32"}, "--width: expected d_in+d_emb or one number, tied, got '64x32'"),
        ({"--width": "64+32+16"}, "--width: expected d_in+d_emb"),
        ({"--width": "0+1"}, "width: expected at least 1+1, got 0+1"),
        ({"--row-dtype": "int4"}, "dtype: expected one of float32"),
        ({"--decode": "0"}, "tokens: expected at least 1 a step, got 0"),
        ({"--prefill": "-5"}, "tokens: expected at least 1 a step, got -5"),
        ({"--prefill": "999999999"}, "steps: expected at most 268435456 tokens in all of them"),
        ({"--prefill": "60000"}, "shapes: expected a corpus of at least 60000 tokens, got 50000"),
        ({"--steps": "0"}, "--steps: expected at least 1, got 0"),
        ({"--link": "0"}, "link: expected GB/s above 0, got 0.0"),
        ({"--link": "nan"}, "link: expected GB/s above 0, got nan"),
        ({"--window": "-1"}, "window: expected at least 0 ms, got -1.0"),
        (
            {"--memory": "much"},
            "--memory: expected a size such as 64MiB, 1.5GB or 4096, got 'much'",
        ),
        ({"-o": "out"}, "--output: --plan writes no allocation"),
        ({"--picture": "plan.tiger"}, "--picture: expected a file of "),
        ({"--picture": "missing/plan.svg"}, "missing: --picture: no such directory"),
        ({"--shards": "2", "--checkpoint": "c"}, "--checkpoint: not of a run with --shards"),
    ],
)
def test_plans_that_cannot_be(tmp_path, arguments, monkeypatch, changes, message):
    monkeypatch.chdir(tmp_path)
    options = {name: value for name, value in {**OPTIONS, **changes}.items() if value is not None}
    result = invoke("allocate", *arguments, *words(options))
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.output.split())
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]


@pytest.mark.parametrize(
    "option", ["--width", "--row-dtype", "--decode", "--prefill", "--steps", "--link", "--window",
               "--memory", "--picture"],
)  # fmt: skip
def test_options_of_a_plan_alone(arguments, option):
    arguments = [argument for argument in arguments if argument not in ("--plan", "--steps", 100)]
    result = invoke("allocate", *arguments, "--rows", "4x", "-o", "out", option, 3)
    assert result.exit_code == 2
    assert f"{option}: belongs to --plan" in result.output


def test_a_plan_needs_the_corpus(tmp_path):
    l3ext.LZWCounter(200).save(tmp_path / "counter")
    result = invoke("allocate", tmp_path / "counter", "--plan", *words(OPTIONS))
    assert result.exit_code == 2
    assert "inputs: counters have been counted: only" in result.output


def test_a_picture_without_matplotlib(arguments, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    picture = ["--picture", tmp_path / "x.png"]
    result = invoke("allocate", *arguments, *words(OPTIONS), *picture)
    assert result.exit_code == 2
    assert "--picture: needs matplotlib, which the extra l3ext[plots] brings" in result.output
    assert not (tmp_path / "x.png").exists()
