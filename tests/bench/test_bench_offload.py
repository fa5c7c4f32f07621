"""The offload benchmark: the same bits, paired times, and figures that add up."""

import json
import os

import numpy as np
import pytest
import torch

import l3ext
from l3ext.bench import offload, timing
from l3ext.bench.workload import Workload, from_zipf
from l3ext.cli.bench import app
from l3ext.runtime import Step


@pytest.fixture(scope="module")
def workload():
    return from_zipf(num_tokens=600, vocab_size=60, total_rows=300, max_rows=32)


def options(folder, **changes):
    sizes = {"hidden_size": 64, "num_layers": 3, "d_emb": 32, "batches": (1, 3), "runs": 4}
    given = {"positions": (2,), "hot": (0.0, 0.2), "direct_io": False, "folder": folder}
    return offload.Options(**(sizes | given | changes))


# --- parts ----------------------------------------------------------------------------------------
def test_a_paired_ratio_is_of_the_same_runs():
    baseline = [1.0, 10.0, 100.0, 1000.0, 7.0]
    ratio = timing.paired_ratio([1.1 * seconds for seconds in baseline], baseline)
    assert np.allclose([ratio.median, ratio.low, ratio.high], 1.1)
    # The one that stopped earlier has fewer runs.
    assert timing.paired_ratio([2.0, 20.0], baseline).median == 2.0


def test_nineteen_of_twenty_intervals_hold_the_ratio_and_many_runs_narrow_them():
    draw = np.random.default_rng(0)
    widths = []
    for runs in (25, 400):
        ratios = []
        for _ in range(100):
            seconds = draw.normal(1.05, 0.05, runs).tolist()
            ratios.append(timing.paired_ratio(seconds, [1.0] * runs, resamples=400))
        assert all(ratio.low <= ratio.median <= ratio.high for ratio in ratios)
        assert 88 <= sum(ratio.low < 1.05 < ratio.high for ratio in ratios) <= 100
        widths.append(sum(ratio.high - ratio.low for ratio in ratios))
    assert 3 < widths[0] / widths[1] < 5  # by the square root of the runs


def test_decode_steps_go_on_at_each_place():
    steps = Workload("", np.arange(100), l3ext.Allocation.uniform(100, 100)).decode_steps(3, 3)
    assert [step.tolist() for step in steps] == [
        [[0], [48], [97]], [[1], [49], [98]], [[2], [50], [99]]
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"count: expected at most 100, .* got 101"):
        Workload("", np.arange(100), l3ext.Allocation.uniform(100, 100)).decode_steps(101, 1)


def test_the_lookup_layer_moves_without_another_model(workload, tmp_path):
    bench = offload._Bench(workload, options(tmp_path, tiers=()), tmp_path / "tables")
    for position in (3, 1, 2):
        bench.move_lookup_layer(position)
        decoder = bench.model.model
        assert [hasattr(layer, "l3") for layer in decoder.layers] == [
            i + 1 == position for i in range(3)
        ]
        assert [layer.self_attn.layer_idx for layer in decoder.layers] == [0, 1, 2]
        assert decoder.l3_layers[0].table.data_ptr() == bench.table.data.data_ptr()


# --- the whole ------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_tier_gives_the_same_bits_and_is_json(workload, tmp_path, dtype):
    saved = []
    trace = tmp_path / "trace.json"
    result = offload.run(
        workload,
        options(tmp_path, positions=(1, 3), dtype=dtype, trace=trace),
        lambda r: saved.append(json.dumps(r)),
    )
    assert json.loads(saved[-1]) == json.loads(json.dumps(result))
    places = [(m["position"], m["batch"]) for m in result["measurements"]]
    assert places == [(1, 1), (1, 3), (3, 1), (3, 3)]
    assert result["table_bytes"] == result["table_rows"] * 96 * dtype.itemsize
    assert result["page_cache"] == "dropped before every step"
    for measurement in result["measurements"]:
        assert measurement["bit_equal"]
        results = measurement["results"]
        assert list(results) == ["none", "ram", "disk, 0 % hot", "disk, 20 % hot"]
        assert results["none"]["ratio"] == {"median": 1.0, "low": 1.0, "high": 1.0}
        for name, row in results.items():
            assert row["runs"] == 4
            assert 0 < row["p10"] <= row["median"] <= row["p90"]
            if name != "none":
                assert row["ledger"]["steps"] == 4  # without the one that warmed up
                assert 0 <= row["exposed_share"] <= 1
        used = {
            name: sum(row["ledger"][part] for part in
                      ("bytes", "hit_bytes", "reused_bytes", "in_place_bytes"))
            for name, row in results.items() if name != "none"
        }  # fmt: skip
        assert len(set(used.values())) == 1  # each read what the ids need
        assert results["ram"]["ledger"]["bytes"] == 0
        disk = [results[f"disk, {share} % hot"]["ledger"] for share in (0, 20)]
        assert disk[0]["hits"] == 0 < disk[1]["hits"]
        assert disk[1]["bytes"] < disk[0]["bytes"]
    assert os.listdir(tmp_path) == [trace.name]
    events = json.loads(trace.read_text())
    assert events


def test_other_bits_are_an_error_and_leave_no_file(workload, tmp_path, monkeypatch):
    wait = Step.wait

    def other_rows(step, layer):
        rows = wait(step, layer)
        rows.values[...] += 1
        return rows

    monkeypatch.setattr(Step, "wait", other_rows)
    with pytest.raises(RuntimeError, match=r"expected the same logits .* got others with disk"):
        offload.run(workload, options(tmp_path, tiers=("disk",)))
    assert os.listdir(tmp_path) == []


def test_the_file_is_read_with_direct_io(workload, tmp_path):
    chosen = options(tmp_path, tiers=("disk",), direct_io=True, batches=(2,))
    try:
        os.close(os.open(tmp_path / "probe", os.O_CREAT | os.O_RDWR | os.O_DIRECT))
    except OSError:
        with pytest.raises(OSError, match="O_DIRECT"):
            offload.run(workload, chosen)
        return
    result = offload.run(workload, chosen)
    assert result["page_cache"] == "past it, O_DIRECT"
    for name, row in result["measurements"][0]["results"].items():
        assert name == "none" or row["placement"]["direct_io"]


def test_sizes_that_do_not_fit(workload, tmp_path):
    with pytest.raises(ValueError, match="positions: expected 1 to 3, got 4"):
        offload.run(workload, options(tmp_path, positions=(4,)))
    with pytest.raises(ValueError, match="hidden_size: expected a multiple of 64, got 65"):
        offload.run(workload, options(tmp_path, hidden_size=65))


# --- the command ----------------------------------------------------------------------------------
SMALL = ["offload", "--vocab-size", "60", "--total-rows", "300", "--max-rows", "32"]
SMALL += ["--hidden-size", "64", "--layers", "2", "--position", "1", "--runs", "3", "--page-cache"]


def test_the_command_prints_tables_and_writes_the_same(tmp_path, capsys):
    path = tmp_path / "result.json"
    place = ["--folder", str(tmp_path), "--output", str(path)]
    app([*SMALL, *place, "--hot", "0,20", "--batch", "1,2"], standalone_mode=False)
    printed = capsys.readouterr().out
    for text in ("lookup after 1 decoder layers, batch 2, 3 steps", "disk, 20 % hot", "exposed"):
        assert text in printed
    assert len(json.loads(path.read_text())["measurements"]) == 2
    assert os.listdir(tmp_path) == [path.name]


def test_the_command_takes_rows_that_another_text_gave(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat and the dog sat on the cat\n" * 9)
    from l3ext.training.tokenizer import train_tokenizer

    tokenizer = train_tokenizer(["the cat sat on the mat"] * 3, vocab_size=280)
    tokenizer.save_pretrained(tmp_path)
    vocab = len(tokenizer)
    rows = tmp_path / "rows.safetensors"
    l3ext.allocate(np.arange(vocab), vocab_size=vocab, total_rows=2 * vocab, max_rows=32).save(rows)
    files = ["--tokenizer", str(tmp_path / "tokenizer.json"), "--allocation", str(rows)]
    arguments = [*SMALL, *files, "--batch", "2", "--folder", str(tmp_path), "--json"]
    app([*arguments, str(text)], standalone_mode=False)
    result = json.loads(capsys.readouterr().out)
    assert result["source"] == "text.txt, rows of rows.safetensors"
    assert (result["vocab_size"], result["table_rows"]) == (vocab, 2 * vocab)

    l3ext.Allocation.uniform(20, 20).save(rows)
    with pytest.raises(ValueError, match="--tokenizer: expected ids below 20"):
        app([*arguments, str(text)], standalone_mode=False)
    for missing in ([str(text), *files[:2]], [str(text), *files[2:]], files):
        with pytest.raises(ValueError, match="--allocation: expected it with --tokenizer"):
            app([*SMALL, *missing], standalone_mode=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tier", "gpu"], "--tier: expected one of ram, disk, got 'gpu'"),
        (["--dtype", "int8"], "--dtype: expected one of float32"),
        (["--position", "0"], "--position: expected 1 to 12, got 0"),
        (["--position", "13"], "--position: expected 1 to 12, got 13"),
        (["--hot", "5,200"], "--hot: expected 0 to 100, got 200"),
        (["--batch", "two"], "--batch: expected whole numbers like 1,8, got 'two'"),
        (["--runs", "0"], "--runs: expected 1 or more, got 0"),
    ],
)
def test_what_cannot_be_measured_is_an_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        app(["offload", *arguments], standalone_mode=False)
