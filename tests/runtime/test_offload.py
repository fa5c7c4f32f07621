"""Offloading: the same text and bits from RAM and from disk; failures leave the model as it was."""

from __future__ import annotations

import copy
import os
import pickle

import numpy as np
import pytest
import torch
from torch import nn

import l3ext
from l3ext.allocation import Allocation
from l3ext.models import L3LlamaConfig, L3LlamaForCausalLM

VOCAB = 64


def make_model(*, tied=False, dtype=torch.float32):
    torch.manual_seed(0)
    random = np.random.default_rng(0)
    allocation = Allocation.from_rows(
        random.integers(1, 9, VOCAB).astype(np.int32),
        frequency=random.integers(0, 99, VOCAB).astype(np.int64),
    )
    config = L3LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        l3_layers=[1, 2],
        l3_d_emb=32 if tied else 16,
        l3_d_up=24,
        l3_tied=tied,
        allocation=allocation,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
    )
    return L3LlamaForCausalLM(config).to(dtype).eval()


def tables(model):
    return [layer.table for layer in model.model.l3_layers]


def generate(model):
    ids = torch.randint(1, VOCAB, (2, 5), generator=torch.Generator().manual_seed(1))
    return model.generate(ids, max_new_tokens=12, do_sample=False, use_cache=True)


@pytest.mark.parametrize("tier", ["ram", "disk"])
@pytest.mark.parametrize(
    "options",
    [{}, {"in_place": False}, {"cache_bytes": 4000, "in_place": False}, {"ring_bytes": 0}],
    ids=str,
)
@pytest.mark.parametrize(("tied", "dtype"), [(False, torch.float32), (True, torch.bfloat16)])
def test_the_same_bits(tier, options, tied, dtype, tmp_path):
    model = make_model(tied=tied, dtype=dtype)
    ids = torch.arange(40).reshape(2, 20)
    with torch.no_grad():
        text, logits = generate(model), model(ids).logits
        path = tmp_path / "tables" if tier == "disk" else None
        runtime = l3ext.offload(model, tier, path, **options, poison=True)
        assert tables(model) == [None, None]
        assert torch.equal(generate(model), text)
        assert torch.equal(model(ids).logits, logits)
    assert runtime.placement.tier == tier
    assert runtime.ledger.totals.steps == 13
    assert runtime.placement.in_place == (tier == "ram" and options.get("in_place", True))
    assert (runtime.ledger.totals.hits > 0) == ("cache_bytes" in options)
    runtime.close()


def test_a_path_of_bytes(tmp_path):
    model = make_model()
    text = generate(model)
    with l3ext.offload(model, "disk", os.fsencode(tmp_path / "tables")) as runtime:
        assert torch.equal(generate(model), text)
        assert runtime.placement.path == str(tmp_path / "tables")


def test_a_hot_set_is_of_no_use_to_tables_read_in_place():
    model = make_model()
    with l3ext.offload(model, "ram", cache_bytes=1 << 20) as runtime:
        generate(model)
        totals = runtime.ledger.totals
        assert (totals.hits, totals.bytes) == (0, 0)
        assert totals.in_place_bytes > 0


def test_what_is_no_model():
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got NoneType"):
        l3ext.offload(None, "ram")


def test_an_existing_file_is_used_if_it_is_the_same(tmp_path):
    path = tmp_path / "tables"
    l3ext.offload(make_model(), "disk", path).close()
    before = os.stat(path)
    l3ext.offload(make_model(), "disk", path).close()
    assert os.stat(path).st_mtime_ns == before.st_mtime_ns

    other = make_model()
    with torch.no_grad():
        tables(other)[1][0, 0] += 1
    with pytest.raises(
        ValueError,
        match=r"path: .* tables\[1\]: the file holds other rows for 1 tokens.* or choose another",
    ):
        l3ext.offload(other, "disk", path)
    assert all(table is not None for table in tables(other))
    path.write_bytes(b"something else")
    with pytest.raises(OSError, match="header"):
        l3ext.offload(other, "disk", path)
    assert path.read_bytes() == b"something else"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"tier": "gpu"}, ValueError, 'tier: expected "ram" or "disk"'),
        ({"tier": "disk"}, ValueError, "path: expected the path of the table file, got None"),
        ({"tier": "ram", "cache_bytes": -1}, ValueError, "cache_bytes: expected at least 0"),
        ({"tier": "ram", "device": "cuda"}, RuntimeError, "device: expected cpu, got cuda"),
        ({"tier": "disk", "path": "/no/such/folder/file"}, OSError, "cannot create"),
        ({"tier": "ram", "num_workers": 0}, ValueError, "num_workers"),
        ({"tier": "disk", "path": 5}, TypeError, "path: expected a path .* got 5"),
        ({"tier": "ram", "path": 0}, TypeError, "path: expected a path .* got 0"),
    ],
)
def test_a_failure_leaves_the_model_as_it_was(arguments, error, message):
    model = make_model()
    text, before = generate(model), tables(model)
    with pytest.raises(error, match=message):
        l3ext.offload(model, **arguments)
    assert all(a is b for a, b in zip(tables(model), before, strict=True))
    assert torch.equal(generate(model), text)


def test_offloading_twice():
    model = make_model()
    runtime = l3ext.offload(model, "ram")
    with pytest.raises(RuntimeError, match="offloaded already"):
        l3ext.offload(model, "ram")
    assert model.model.l3_runtime is runtime


@pytest.mark.parametrize("graphs", [False, True])
def test_copies_and_pickles_say_what_is_in_the_way(graphs):
    model = make_model()
    with l3ext.offload(model, "ram", graphs=graphs) as runtime:
        for copied in (model, runtime, runtime.begin(torch.tensor([1]))):
            for way in (copy.deepcopy, pickle.dumps):
                with pytest.raises(TypeError, match="neither copied nor pickled"):
                    way(copied)
        model.model.l3_runtime = None
        assert copy.deepcopy(model).model.l3_runtime is None
        pickle.dumps(model)


def test_a_model_without_lookup_layers():
    with pytest.raises(ValueError, match="expected one model with lookup layers, got 0"):
        l3ext.offload(nn.Linear(2, 2), "ram")


def test_a_closed_runtime_and_a_wrong_id_are_clear():
    model = make_model()
    runtime = l3ext.offload(model, "ram")
    with pytest.raises((ValueError, IndexError)):
        model(torch.tensor([[VOCAB]]))
    model(torch.tensor([[1]]))
    runtime.close()
    with pytest.raises(RuntimeError, match="the runtime is closed"):
        model(torch.tensor([[1]]))
