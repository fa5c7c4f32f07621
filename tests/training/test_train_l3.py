"""The loop over a model with lookup layers: every option, and resumption to the same bits."""

import numpy as np
import pytest
import torch
from test_loop import change, run, weights
from test_loop_hostile import interrupt
from tiny import VOCAB, build_tokens

import l3ext
from l3ext.models import L3LlamaConfig, L3LlamaForCausalLM
from l3ext.training.log import read_log
from l3ext.training.optimizer import parameter_kinds
from l3ext.training.parameters import count_parameters

OPTIONS = [{}, {"precision": "bfloat16"}, {"gradient_checkpointing": True}, {"accumulation": 2}]


def build_l3_model(seed=0, tied=False):
    rows = np.where(np.arange(VOCAB) % 5 == 0, 6, 1).astype(np.int32)
    torch.manual_seed(seed)
    return L3LlamaForCausalLM(
        L3LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=64,
            tie_word_embeddings=True,
            l3_layers=[1],
            l3_d_emb=16 if tied else 8,
            l3_d_up=12,
            l3_tied=tied,
            allocation=l3ext.Allocation.from_rows(rows),
        )
    )


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_interrupted_and_resumed_is_the_same_bits(tmp_path, options):
    config = change(table_learning_rate=2e-2, **options)
    straight, result = run(tmp_path, config, name="straight", model=build_l3_model())
    with pytest.raises(KeyboardInterrupt, match="resumes from it"):
        run(tmp_path, config, model=interrupt(build_l3_model(), at_call=5))
    resumed, again = run(tmp_path, config, model=build_l3_model(seed=1))
    assert 0 < again.resumed_from < 12
    assert torch.equal(weights(straight), weights(resumed))
    losses = [[r["loss"] for r in read_log(log)] for log in (result.log, again.log)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("tied", [False, True])
def test_it_learns(tmp_path, tied):
    held_out = build_tokens(seed=1)
    _, result = run(
        tmp_path, change(steps=100), model=build_l3_model(tied=tied), eval_tokens=held_out
    )
    assert result.evaluation.loss < np.log(VOCAB) - 1.5


def test_tables_are_told_apart_and_counted():
    model = build_l3_model()
    kinds = parameter_kinds(model)
    (table,) = [name for name, kind in kinds.items() if kind == "table"]
    rows, width = model.get_parameter(table).shape
    assert width == 16 + 8
    count = count_parameters(model)
    assert count.tables == rows * width
    assert count.active == count.total - count.tables + 6 * width


def test_an_offloaded_model_is_not_counted_and_not_trained(tmp_path):
    model = build_l3_model()
    l3ext.offload(model, tier="ram")
    with pytest.raises(ValueError, match="expected its tables in it"):
        count_parameters(model)
    with pytest.raises(RuntimeError, match="offload"):
        run(tmp_path, model=model)
