"""Half-written, damaged and foreign checkpoints are passed over, said, and never half used."""

import json
import os
import shutil

import pytest
import torch
from test_loop import change, run, weights

from l3ext.training import Checkpoint, CheckpointWarning, latest_checkpoint

CONFIG = change(checkpoint_every=4, keep_checkpoints=3)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run's directory with checkpoints 4, 8 and 12, and its final weights."""
    root = tmp_path_factory.mktemp("finished")
    torch.set_num_threads(1)
    model, _ = run(root, CONFIG)
    return root / "run", weights(model)


@pytest.fixture
def copy(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    return tmp_path


def flip(path):
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


def shorten(path):
    os.truncate(path, path.stat().st_size - 1)


def remove(path):
    path.unlink()


@pytest.mark.parametrize("damage", [flip, shorten, remove])
@pytest.mark.parametrize(
    "name", ["model.safetensors", "training.safetensors", "config.json", "training.json"]
)
def test_damage_falls_back_to_the_one_before_and_the_same_bits(finished, copy, damage, name):
    damage(copy / "run/checkpoint-00000012" / name)
    with pytest.warns(CheckpointWarning, match="ignored.*checkpoint-00000012"):
        model, result = run(copy, CONFIG)
    assert result.resumed_from == 8
    assert torch.equal(weights(model), finished[1])
    assert latest_checkpoint(copy / "run").step == 12


def test_a_damaged_one_does_not_count_as_kept(copy):
    flip(copy / "run/checkpoint-00000012/model.safetensors")
    flip(copy / "run/checkpoint-00000008/model.safetensors")
    with pytest.warns(CheckpointWarning):
        run(copy, change(checkpoint_every=3, keep_checkpoints=1))
    assert [p.name for p in (copy / "run").glob("checkpoint-*")] == ["checkpoint-00000012"]
    assert latest_checkpoint(copy / "run").step == 12


def test_all_damaged_is_an_error_not_a_fresh_start(copy):
    for path in (copy / "run").glob("checkpoint-*/model.safetensors"):
        flip(path)
    with (
        pytest.warns(CheckpointWarning),
        pytest.raises(OSError, match="damaged: its checksum") as caught,
    ):
        run(copy, CONFIG)
    assert caught.value.filename.endswith("checkpoint-00000004/model.safetensors")


def test_a_half_written_one_is_ignored_said_and_cleaned(copy):
    partial = copy / "run/checkpoint-00000016.tmp.12345"
    shutil.copytree(copy / "run/checkpoint-00000012", partial)
    shutil.rmtree(copy / "run/checkpoint-00000012")
    with pytest.warns(CheckpointWarning, match="half written"):
        _, result = run(copy, CONFIG)
    assert result.resumed_from == 8
    assert not partial.exists()


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"format": "other", "files": {}, "step": 1}', '{"format": 3']
)
def test_foreign_manifests(copy, text):
    path = copy / "run/checkpoint-00000004"
    (path / "training.json").write_text(text)
    with pytest.raises(OSError, match="not a checkpoint's manifest"):
        Checkpoint.open(path)


def test_a_missing_file_is_named(copy):
    path = copy / "run/checkpoint-00000004"
    (path / "config.json").unlink()
    with pytest.raises(FileNotFoundError) as caught:
        Checkpoint.open(path)
    assert caught.value.filename == str(path / "config.json")


def test_nothing_in_a_checkpoint_is_pickled(finished):
    for path in finished[0].glob("checkpoint-*/*"):
        head = path.read_bytes()
        assert path.suffix in (".json", ".safetensors")
        json.loads(
            head[8 : 8 + int.from_bytes(head[:8], "little")] if "tensors" in path.suffix else head
        )
