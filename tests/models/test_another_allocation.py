"""Weights whose rows belong to other tokens: the shapes may fit, the model would not."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from l3ext import Allocation
from l3ext.models import L3LlamaConfig, L3LlamaForCausalLM

VOCAB = 64
HALVES = Allocation.from_rows([1] * 32 + [3] * 32)
UNIFORM = Allocation.uniform(VOCAB, 128)
MESSAGE = re.escape(
    "l3_allocation_rows: expected those of config.allocation, 2 for token 0, got 1 in what was "
    "loaded; 64 tokens differ"
)


def make_config(allocation):
    return L3LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=None,
        eos_token_id=None,
        l3_layers=[1],
        allocation=allocation,
    )


def make_model(allocation):
    return L3LlamaForCausalLM(make_config(allocation))


@pytest.mark.parametrize("strict", [True, False])
def test_a_state_dict(strict):
    model, other = make_model(UNIFORM), make_model(HALVES)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for part, prefix in ((other, ""), (other.model, "model.")):
        with pytest.raises(ValueError, match=MESSAGE):
            model.get_submodule(prefix[:-1]).load_state_dict(part.state_dict(), strict=strict)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_a_state_dict_of_the_same_rows():
    model = make_model(Allocation.from_rows(UNIFORM.rows, frequency=np.arange(VOCAB)))
    other = make_model(UNIFORM)
    model.load_state_dict(other.state_dict())
    assert torch.equal(model.model.l3_layers[0].table, other.model.l3_layers[0].table)
    partial = {"lm_head.weight": torch.zeros(VOCAB, 16)}
    model.load_state_dict(partial, strict=False)
    assert not model.lm_head.weight.any()


def test_a_state_dict_of_another_vocabulary():
    state = make_model(UNIFORM).state_dict()
    state["model.l3_allocation_rows"] = torch.ones(3, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"config.allocation, of 64 tokens, got shape \[3\]"):
        make_model(UNIFORM).load_state_dict(state)


@pytest.mark.parametrize("total_rows", [128, 256])
@pytest.mark.parametrize("files", ["one", "shards", "pickle"])
def test_from_pretrained(files, total_rows, tmp_path):
    model = make_model(HALVES)
    if files == "pickle":
        model.config.save_pretrained(tmp_path)
        torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    else:
        model.save_pretrained(tmp_path, max_shard_size="5KB" if files == "shards" else "1GB")
    config = make_config(Allocation.uniform(VOCAB, total_rows))
    if total_rows == 128 or files != "pickle":
        with pytest.raises(ValueError, match="l3_allocation_rows: expected those of"):
            L3LlamaForCausalLM.from_pretrained(tmp_path, config=config)
    config = make_config(HALVES)
    loaded, info = L3LlamaForCausalLM.from_pretrained(
        tmp_path, config=config, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert torch.equal(loaded.model.l3_layers[0].table, model.model.l3_layers[0].table)


def test_from_pretrained_with_a_state_dict():
    state = make_model(HALVES).state_dict()
    with pytest.raises(ValueError, match=MESSAGE):
        L3LlamaForCausalLM.from_pretrained(None, config=make_config(UNIFORM), state_dict=state)
    L3LlamaForCausalLM.from_pretrained(None, config=make_config(HALVES), state_dict=state)


def test_the_frequencies_may_be_in_another_shard(tmp_path):
    frequency = np.arange(VOCAB)
    model = make_model(Allocation.from_rows(HALVES.rows, frequency=frequency))
    model.save_pretrained(tmp_path, max_shard_size=600)
    assert len(list(tmp_path.glob("*.safetensors"))) > 5
    loaded = L3LlamaForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.allocation.frequency.tolist() == frequency.tolist()


def test_a_configuration_whose_weights_are_damaged_has_none(tmp_path):
    make_model(HALVES).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"version https://git-lfs")
    assert L3LlamaConfig.from_pretrained(tmp_path).allocation is None


def test_a_configuration_for_another_vocabulary_has_none(tmp_path):
    make_model(HALVES).save_pretrained(tmp_path)
    assert L3LlamaConfig.from_pretrained(tmp_path, vocab_size=65).allocation is None
    given = L3LlamaConfig.from_pretrained(tmp_path, allocation=UNIFORM)
    assert given.allocation == UNIFORM
