"""The demo, whole but tiny, and its parts."""

import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import corpus
import figures
import numpy as np
import pytest
from sizes import TINY
from training import build_dense, build_l3

import l3ext
from l3ext.training.parameters import count_parameters

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "scripts/demo"


def run_demo(*arguments):
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, str(DEMO), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=240,
        env=environment,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The directory and the standard output of a tiny demo."""
    out = tmp_path_factory.mktemp("demo") / "demo-out"
    done = run_demo("--tiny", "--out", out)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_report_json_holds_what_is_promised(finished):
    report = json.loads((finished[0] / "report.json").read_text())
    assert report["outputs_equal"] is True
    assert report["dense"]["ppl"] > 1
    assert report["l3"]["ppl"] > 1
    assert report["dense"]["eval_tokens"] == report["l3"]["eval_tokens"] > 0
    assert report["dense"]["train_tokens"] == report["l3"]["train_tokens"]
    assert set(report["tokens_per_second"]) == {"resident", "ram", "disk"}
    assert all(speed > 0 for speed in report["tokens_per_second"].values())
    assert set(report["exposed_fraction"]) == {"ram", "disk"}
    assert all(0 <= fraction < 1 for fraction in report["exposed_fraction"].values())
    active = {name: report[name]["parameters"]["active"] for name in ("dense", "l3")}
    assert active["l3"] <= active["dense"] < 1.01 * active["l3"]
    assert report["l3"]["parameters"]["tables"] > 0
    assert sum(report["allocation"]["rows"]) == report["allocation"]["total_rows"]
    assert all(phase["seconds"] >= 0 for phase in report["phases"])


def test_both_models_saw_the_same_schedule(finished):
    report = json.loads((finished[0] / "report.json").read_text())
    assert report["dense"]["config"]["seed"] == report["l3"]["config"]["seed"]
    for name in ("steps", "batch_size", "sequence_length", "warmup_steps"):
        assert report["dense"]["config"][name] == report["l3"]["config"][name]
    steps = [[point["step"] for point in report[name]["curve"]] for name in ("dense", "l3")]
    assert steps[0] == steps[1] == list(range(1, TINY.steps + 1))


class Links(HTMLParser):
    def __init__(self):
        super().__init__()
        self.outward = []
        self.tags = []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.outward += [
            value
            for name, value in attributes
            if name in ("src", "href", "xlink:href") and not value.startswith("#")
        ]


def test_report_html_is_self_contained(finished):
    page = (finished[0] / "report.html").read_text()
    links = Links()
    links.feed(page)
    assert links.outward == []
    assert links.tags.count("svg") == 4
    report = json.loads((finished[0] / "report.json").read_text())
    assert f"{report['l3']['ppl']:.2f}" in page
    assert f"{report['dense']['ppl']:.2f}" in page


def test_the_summary_is_printed(finished):
    assert "held-out perplexity" in finished[1]
    assert "same text             yes" in finished[1]
    assert "report.html" in finished[1]


def test_a_text_of_ones_own(tmp_path):
    text = tmp_path / "text.txt"
    rng = np.random.default_rng(0)
    words = ["alpha", "beta", "gamma", "delta", "epsilon"]
    text.write_text("\n\n".join(" ".join(rng.choice(words, 60)) for _ in range(400)))
    done = run_demo("--tiny", "--text", text, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["corpus"]["name"] == "text.txt"
    assert report["outputs_equal"] is True


def test_bad_texts_are_one_line_errors(tmp_path):
    (tmp_path / "short.txt").write_text("too short")
    done = run_demo("--text", tmp_path / "short.txt", "--out", tmp_path / "out")
    assert done.returncode == 2
    assert done.stderr.startswith("error: --text: expected at least 50000 bytes")
    done = run_demo("--text", tmp_path / "none.txt", "--out", tmp_path / "out")
    assert done.returncode == 2
    assert "No such file" in done.stderr


def test_the_split_of_the_standard_library_is_fixed():
    one = corpus.standard_library(limit=2_000_000)
    two = corpus.standard_library(limit=2_000_000)
    assert one == two
    assert not set(one.train) & set(one.held_out)
    assert 0.02 < len(one.held_out) / (len(one.held_out) + len(one.train)) < 0.3


def test_long_lines_without_paragraphs_are_cut(tmp_path):
    path = tmp_path / "one-line.txt"
    path.write_text("word " * 20_000)
    cut = corpus.text_file(path, limit=1 << 20)
    assert "".join(cut.train + cut.held_out) == path.read_text()
    assert len(cut.prompts) == 3


def test_the_dense_model_has_no_fewer_active_parameters():
    allocation = l3ext.Allocation.from_rows(np.array([16] * 30 + [1] * 270, np.int32))
    l3 = count_parameters(build_l3(TINY, 300, allocation))
    dense = count_parameters(build_dense(TINY, 300, active=l3.active))
    width = TINY.hidden_size + TINY.l3_d_emb
    assert l3.tables == allocation.total_rows * (TINY.hidden_size + TINY.l3_d_emb)
    assert l3.active == l3.total - l3.tables + 16 * width
    one_unit = 3 * TINY.hidden_size * TINY.layers
    assert l3.active <= dense.active < l3.active + one_unit


def test_figures_are_well_formed_and_reproducible():
    rows = np.array([1, 1, 2, 8, 4, 1])
    curve = [{"tokens": 10 * s, "loss": 5.0 / s, "eval_loss": 5.2 / s} for s in (1, 2, 3)]
    layer = {
        "fetch_begin_us": 1.0,
        "fetch_us": 5.0,
        "exposed_us": 2.0,
        "wait_begin_us": 4.0,
    }
    steps = [{"begin_us": 0.0, "end_us": 10.0, "layers": [layer]}]
    for draw in (
        lambda: figures.rows_by_rank(rows, ["'<'", "'&'"], max_rows=8),
        lambda: figures.training_curves({"dense": curve, "with L3": curve}),
        lambda: figures.speeds({"resident": [10.0, 11.0], "ram": [9.0], "disk": [8.0]}),
        lambda: figures.timelines({"ram": steps, "disk": steps}),
    ):
        svg = draw()
        assert ET.fromstring(svg).tag.endswith("svg")
        assert draw() == svg
