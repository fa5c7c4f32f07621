import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from tiny import VOCAB, build_model, build_tokens

from l3ext.training import TrainConfig, evaluate, train
from l3ext.training.log import read_log

CONFIG = TrainConfig(
    steps=12, sequence_length=16, batch_size=4, learning_rate=1e-2, warmup_steps=3, eval_every=5
)


def change(**changes):
    return dataclasses.replace(CONFIG, **changes)


def run(tmp_path, config=CONFIG, name="run", model=None, tokens=None, **options):
    model = model if model is not None else build_model()
    tokens = tokens if tokens is not None else build_tokens()
    result = train(model, tokens, config, output=tmp_path / name, progress=False, **options)
    return model, result


def weights(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_it_learns_and_says_so(tmp_path, tokens):
    held_out = build_tokens(seed=1)
    before = evaluate(build_model(), held_out, sequence_length=16)
    _, result = run(tmp_path, change(steps=120), eval_tokens=held_out)
    assert before.loss == pytest.approx(math.log(VOCAB), rel=0.05)
    assert result.evaluation.loss < before.loss - 1.5
    assert result.evaluation.perplexity == pytest.approx(math.exp(result.evaluation.loss))
    assert (result.steps, result.tokens, result.resumed_from) == (120, 120 * 64, 0)


def test_the_log_has_one_line_per_step(tmp_path):
    _, result = run(tmp_path, eval_tokens=build_tokens(seed=1))
    records = read_log(result.log)
    assert [record["step"] for record in records] == list(range(1, 13))
    assert [record["tokens"] for record in records] == [64 * step for step in range(1, 13)]
    assert [r["step"] for r in records if "eval_loss" in r] == [5, 10, 12]
    assert records[-1]["loss"] == result.loss
    assert records[-1]["eval_loss"] == result.evaluation.loss
    assert records[2]["learning_rate"] == pytest.approx(1e-2)
    assert all(record["tokens_per_second"] > 0 for record in records)


def test_two_runs_are_the_same_bits_and_seeds_matter(tmp_path):
    one, _ = run(tmp_path, name="one")
    two, _ = run(tmp_path, name="two")
    other, _ = run(tmp_path, change(seed=1), name="other")
    assert torch.equal(weights(one), weights(two))
    assert not torch.equal(weights(one), weights(other))


def test_accumulation_equals_a_larger_batch(tmp_path):
    settings = {"attention_dropout": 0.0}
    whole, a = run(tmp_path, change(batch_size=8), name="a", model=build_model(**settings))
    parts, b = run(
        tmp_path, change(batch_size=2, accumulation=4), name="b", model=build_model(**settings)
    )
    assert b.loss == pytest.approx(a.loss, rel=1e-4)
    torch.testing.assert_close(weights(parts), weights(whole), rtol=0, atol=5e-3)


def test_gradient_checkpointing_changes_no_loss(tmp_path):
    settings = {"attention_dropout": 0.0}
    _, plain = run(tmp_path, name="a", model=build_model(**settings))
    _, recomputed = run(
        tmp_path, change(gradient_checkpointing=True), name="b", model=build_model(**settings)
    )
    assert recomputed.loss == pytest.approx(plain.loss, rel=1e-5)


def test_bfloat16_keeps_float32_weights_and_learns(tmp_path):
    model, result = run(
        tmp_path, change(steps=60, precision="bfloat16"), eval_tokens=build_tokens(seed=1)
    )
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert result.evaluation.loss < math.log(VOCAB) - 0.5


def test_clip_norm_none_logs_the_same_norm(tmp_path):
    _, a = run(tmp_path, change(steps=3, clip_norm=None), name="a")
    _, b = run(tmp_path, change(steps=3, clip_norm=1e-3), name="b")
    assert read_log(a.log)[0]["gradient_norm"] == read_log(b.log)[0]["gradient_norm"] > 0


def test_a_finished_run_is_found_finished(tmp_path):
    first, a = run(tmp_path, eval_tokens=build_tokens(seed=1))
    again, b = run(tmp_path, model=build_model(seed=9), eval_tokens=build_tokens(seed=1))
    assert torch.equal(weights(first), weights(again))
    assert b.resumed_from == 12
    assert b.loss is None
    assert b.evaluation == a.evaluation
    assert len(read_log(b.log)) == 12


def test_the_last_checkpoints_stay(tmp_path):
    run(tmp_path, change(checkpoint_every=2, keep_checkpoints=3))
    names = sorted(p.name for p in (tmp_path / "run").glob("checkpoint-*"))
    assert names == ["checkpoint-00000008", "checkpoint-00000010", "checkpoint-00000012"]


def test_a_checkpoint_is_a_pretrained_model(tmp_path):
    from transformers import AutoModelForCausalLM

    model, result = run(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(result.checkpoint)
    assert torch.equal(weights(model), weights(again))
    manifest = json.loads((result.checkpoint / "training.json").read_text())
    assert manifest["step"] == 12
    assert manifest["config"]["learning_rate"] == 1e-2


def test_evaluate_is_exact():
    """Against the definition, token by token, whatever the batch."""
    model = build_model().train()
    tokens = build_tokens(75)
    total = 0.0
    with torch.no_grad():
        model.eval()
        for begin in (0, 8, 16, 24):
            ids = torch.from_numpy(tokens[begin : begin + 9].astype(np.int64))
            scores = model(input_ids=ids[None, :-1]).logits[0].double().log_softmax(-1)
            total -= scores[torch.arange(8), ids[1:]].sum().item()
        model.train()
    for batch_size in (1, 3, 8):
        found = evaluate(model, tokens, sequence_length=8, batch_size=batch_size, max_sequences=4)
        assert found.tokens == 32
        assert found.loss == pytest.approx(total / 32, rel=1e-6)
    assert model.training
    assert evaluate(model, tokens, sequence_length=8).tokens == 72
