"""The Llama with lookup layers, used as any transformers model is."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from l3ext import Allocation
from l3ext.models import L3LlamaConfig, L3LlamaForCausalLM

VOCAB = 61


def make_allocation():
    rows = np.random.default_rng(0).integers(1, 12, VOCAB)
    return Allocation.from_rows(rows, frequency=np.arange(VOCAB)[::-1].copy())


def make_config(**options):
    settings = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 0,
        "l3_layers": [1, 2],
        "l3_d_emb": 16,
        "l3_d_up": 24,
        "allocation": make_allocation(),
    }
    return L3LlamaConfig(**(settings | options))


def make_model(**options):
    torch.manual_seed(0)
    return L3LlamaForCausalLM(make_config(**options)).eval()


@pytest.fixture(scope="module")
def model():
    return make_model()


def random_ids(*shape, seed=1):
    return torch.randint(0, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def generate(model, ids, **options):
    return model.generate(ids, max_new_tokens=12, do_sample=False, **options)


def test_lookup_layers_follow_the_named_decoder_layers(model):
    stands = [hasattr(layer, "l3") for layer in model.model.layers]
    assert stands == [True, True, False]
    assert model.model.layers[0].l3_index == 0
    assert [layer.table.shape[1] for layer in model.model.l3_layers] == [48, 48]


def test_without_lookup_layers_it_is_a_llama():
    model = make_model(l3_layers=[])
    dense = LlamaForCausalLM(model.config)
    dense.load_state_dict(model.state_dict(), strict=False)
    ids = random_ids(2, 7)
    assert torch.equal(model(ids).logits, dense.eval()(ids).logits)


def test_without_lookup_layers_it_needs_no_allocation(tmp_path):
    config = make_config(l3_layers=[], allocation=None)
    model = L3LlamaForCausalLM(config).eval()
    assert (
        dict(model.named_buffers()).keys() == dict(LlamaForCausalLM(config).named_buffers()).keys()
    )
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = random_ids(2, 7)
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_gradients_reach_every_parameter(model):
    model = make_model().train()
    ids = random_ids(4, 30)
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_cache_and_no_cache_generate_the_same(model):
    ids = random_ids(3, 6)
    assert torch.equal(generate(model, ids), generate(model, ids, use_cache=False))


def test_left_padding_changes_nothing(model):
    ids = random_ids(1, 6)
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.int64), ids], dim=1)
    mask = torch.tensor([[0] * 4 + [1] * 6])
    alone = generate(model, ids, attention_mask=torch.ones_like(ids))[:, 6:]
    assert torch.equal(generate(model, padded, attention_mask=mask)[:, 10:], alone)


def test_gradient_checkpointing_gives_the_same_gradients():
    ids = random_ids(2, 12)
    plain, recomputed = make_model().train(), make_model().train()
    recomputed.gradient_checkpointing_enable()
    for model in (plain, recomputed):
        model(ids, labels=ids).loss.backward()
    for (name, a), b in zip(plain.named_parameters(), recomputed.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name


def test_save_and_load(model, tmp_path):
    ids = random_ids(2, 9)
    want = model(ids).logits
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    for directory in ("one", "shards"):
        loaded = L3LlamaForCausalLM.from_pretrained(tmp_path / directory)
        assert torch.equal(loaded(ids).logits, want)
        assert loaded.config.allocation == model.config.allocation
        auto = AutoModelForCausalLM.from_pretrained(tmp_path / directory)
        assert type(auto) is L3LlamaForCausalLM
        assert torch.equal(generate(auto, ids), generate(model, ids))
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "one", dtype=torch.bfloat16)
    assert half.model.l3_layers[0].table.dtype == torch.bfloat16
    assert half(ids).logits.dtype == torch.bfloat16


def test_the_allocation_is_in_the_safetensors_and_not_in_the_json(model, tmp_path):
    model.save_pretrained(tmp_path)
    assert "allocation" not in (tmp_path / "config.json").read_text()
    tensors = load_file(tmp_path / "model.safetensors")
    rows = tensors["model.l3_allocation_rows"]
    assert rows.tolist() == model.config.allocation.rows.tolist()
    assert L3LlamaConfig.from_pretrained(tmp_path).allocation == model.config.allocation
    config, unused = L3LlamaConfig.from_pretrained(tmp_path, return_unused_kwargs=True, other=1)
    assert (config.allocation, unused) == (model.config.allocation, {"other": 1})
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, L3LlamaConfig)
    assert config.allocation is None
    with pytest.raises(ValueError, match=r"config.allocation: expected an l3ext.Allocation"):
        L3LlamaForCausalLM(config)


def test_an_allocation_without_frequencies_stays_without(tmp_path):
    allocation = Allocation.uniform(VOCAB, 3 * VOCAB)
    make_model(allocation=allocation).save_pretrained(tmp_path)
    loaded = L3LlamaForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.allocation.frequency is None
    assert loaded.config.allocation == allocation


def test_auto_class_finds_it_in_a_fresh_process(model, tmp_path):
    model.save_pretrained(tmp_path)
    code = (
        "import sys, l3ext.models; from transformers import AutoModelForCausalLM as A; "
        "print(type(A.from_pretrained(sys.argv[1])).__name__)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "L3LlamaForCausalLM"


def test_inputs_embeds_need_token_ids(model):
    ids = random_ids(2, 5)
    embeds = model.get_input_embeddings()(ids)
    with pytest.raises(ValueError, match="pass l3_token_ids"):
        model(inputs_embeds=embeds)
    assert torch.equal(model(inputs_embeds=embeds, l3_token_ids=ids).logits, model(ids).logits)


def test_compile_the_whole_model_without_graph_breaks(model):
    compiled = torch.compile(model, fullgraph=True)
    for seed in (1, 2):
        ids = random_ids(2, 8, seed=seed)
        torch.testing.assert_close(compiled(ids).logits, model(ids).logits)


def test_tied_tables_and_hidden_states():
    model = make_model(l3_tied=True, l3_d_emb=32)
    out = model(random_ids(1, 4), output_hidden_states=True)
    assert len(out.hidden_states) == 4
    assert model.model.l3_layers[0].table.shape[1] == 32


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"l3_layers": [0]}, ValueError, "l3_layers: expected ascending positions from 1 to"),
        ({"l3_layers": "1"}, TypeError, "l3_layers: expected a list of integers, got '1'"),
        ({"l3_layers": [1.0]}, TypeError, "l3_layers: expected a list of integers"),
        ({"l3_layers": 1}, TypeError, "l3_layers: expected a list of integers, got 1"),
        ({"l3_layers": [4]}, ValueError, r"num_hidden_layers = 3, got \[4\]"),
        ({"l3_layers": [2, 1]}, ValueError, "l3_layers"),
        ({"l3_layers": [1, 1]}, ValueError, "l3_layers"),
        ({"l3_tied": True}, ValueError, "l3_d_emb: l3_tied needs hidden_size = 32, got 16"),
        ({"l3_tied": "no"}, TypeError, "l3_tied: expected True or False, got 'no'"),
        ({"l3_d_emb": 0}, ValueError, "l3_d_emb: expected 1 or more, got 0"),
        ({"l3_d_emb": 1.5}, TypeError, r"l3_d_emb: expected an int, got 1\.5"),
        ({"l3_d_up": -1}, ValueError, "l3_d_up: expected 1 or more, got -1"),
        ({"l3_allocation": None}, TypeError, "l3_allocation: expected l3_layers, .* or allocation"),
        ({"allocation": [1, 2]}, TypeError, "allocation: expected l3ext.Allocation, got list"),
        ({"vocab_size": 60}, ValueError, "allocation: expected vocab_size = 60 tokens, got 61"),
    ],
)
def test_wrong_configurations(options, error, message):
    with pytest.raises(error, match=message):
        make_config(**options)


@pytest.mark.parametrize("size", [{"new_num_tokens": VOCAB + 3}, {"pad_to_multiple_of": 64}])
def test_the_vocabulary_cannot_be_resized(model, size):
    # A checkpoint of it could not be loaded.
    with pytest.raises(ValueError, match=f"new_num_tokens: expected {VOCAB}, the tokens of the"):
        model.resize_token_embeddings(**size)
    assert model.config.vocab_size == VOCAB
    assert model.resize_token_embeddings(VOCAB) is model.get_input_embeddings()


def test_an_id_outside_the_vocabulary_is_named(model):
    with pytest.raises(
        ValueError, match=rf"expected ids in \[0, {VOCAB}\), got {VOCAB} at position 1"
    ):
        model(torch.tensor([[1, VOCAB]]))


def test_a_checkpoint_without_its_allocation_is_refused(model, tmp_path):
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.l3_allocation_rows"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(OSError, match="expected a safetensors checkpoint that holds"):
        L3LlamaForCausalLM.from_pretrained(tmp_path)


def test_the_json_round_trip_keeps_every_field(model, tmp_path):
    model.config.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    assert fields["l3_layers"] == [1, 2]
    assert fields["l3_d_emb"] == 16
    assert fields["l3_d_up"] == 24
    assert fields["l3_tied"] is False
    assert fields["model_type"] == "l3_llama"
