"""Layer, model, generation and training on the device, against the CPU."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from l3ext import Allocation, L3Layer
from l3ext.models import L3LlamaConfig, L3LlamaForCausalLM
from l3ext.training import TrainConfig, train

VOCAB = 61
ALLOCATION = Allocation.from_rows(np.random.default_rng(0).integers(1, 12, VOCAB))


def make_layer(tied=False, **options):
    torch.manual_seed(0)
    d_emb = 128 if tied else 64
    return L3Layer(128, d_emb, 192, ALLOCATION, tied=tied, **options)


def make_model():
    torch.manual_seed(0)
    config = L3LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=2,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
        l3_layers=[1, 2],
        l3_d_emb=64,
        l3_d_up=64,
        allocation=ALLOCATION,
    )
    return L3LlamaForCausalLM(config).eval()


def random_ids(*shape, seed=1):
    return torch.randint(0, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("sequence", [9, 900])
def test_layer(device, tied, sequence):
    layer = make_layer(tied)
    with torch.no_grad():
        layer.table.mul_(30)  # scores that matter
    there = copy.deepcopy(layer).to(device)
    assert there.offsets.device.type == device.type
    x, ids = torch.randn(2, sequence, 128), random_ids(2, sequence)
    out, out_there = layer(x, ids), there(x.to(device), ids.to(device))
    torch.testing.assert_close(out_there.cpu(), out, rtol=1e-4, atol=1e-5)
    upstream = torch.randn_like(out)
    out.backward(upstream)
    out_there.backward(upstream.to(device))
    for (name, a), b in zip(there.named_parameters(), layer.parameters(), strict=True):
        scale = b.grad.abs().max().item()
        torch.testing.assert_close(
            a.grad.cpu(), b.grad, rtol=1e-3, atol=1e-4 * scale, msg=lambda m, name=name: name + m
        )


def test_layer_made_on_the_device(device):
    layer = make_layer(device=device, dtype=torch.bfloat16)
    x = torch.randn(3, 128, device=device, dtype=torch.bfloat16)
    out = layer(x, torch.tensor([0, 3, 5], device=device))
    assert out.dtype == torch.bfloat16
    assert torch.isfinite(out).all()


def test_layer_under_autocast(device):
    layer = make_layer(device=device)
    x, ids = torch.randn(2, 5, 128, device=device), random_ids(2, 5).to(device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        out = layer(x, ids)
    out.float().sum().backward()
    assert layer.table.grad.dtype == torch.float32
    torch.testing.assert_close(out.float(), layer(x, ids), rtol=0.05, atol=0.02)


def test_layer_compiles_and_its_step_needs_no_wait(device):
    layer = make_layer(device=device)
    compiled = torch.compile(layer, fullgraph=True)
    for seed in (1, 2):
        x, ids = torch.randn(2, 5, 128, device=device), random_ids(2, 5, seed=seed).to(device)
        torch.testing.assert_close(compiled(x, ids), layer(x, ids), rtol=1e-4, atol=1e-5)
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        layer(x, ids).sum().backward()
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("optimizer", ["SparseAdam", "SGD"])
@pytest.mark.parametrize("tied", [False, True])
def test_sparse_layer_trains_as_the_dense_one(device, optimizer, tied):
    """SGD: the same weights. SparseAdam: those of Adam where every row is touched every step."""
    dense, sparse = make_layer(tied, device=device), make_layer(tied, sparse=True, device=device)
    assert "sparse=True" in repr(sparse)
    peer = "Adam" if optimizer == "SparseAdam" else "SGD"
    rates = {"lr": 0.01}
    first = getattr(torch.optim, peer)([dense.table], **rates)
    second = getattr(torch.optim, optimizer)([sparse.table], **rates)
    for seed in range(3):
        x = torch.randn(200, 128, device=device)
        ids = random_ids(200, seed=seed) if optimizer == "SGD" else torch.arange(200) % VOCAB
        for layer, steps in ((dense, first), (sparse, second)):
            steps.zero_grad()
            layer(x, ids.to(device)).square().sum().backward()
            steps.step()
        assert sparse.table.grad.is_sparse
    # Adam divides by the size of gradients that are next to nothing but rounding.
    bound = 1e-6 if optimizer == "SGD" else 1e-3
    torch.testing.assert_close(sparse.table, dense.table, rtol=0, atol=bound)


def test_llama(device):
    model = make_model()
    there = copy.deepcopy(model).to(device)
    ids = random_ids(4, 40)
    out, out_there = model(ids, labels=ids), there(ids.to(device), labels=ids.to(device))
    torch.testing.assert_close(out_there.logits.cpu(), out.logits, rtol=1e-3, atol=1e-4)
    out_there.loss.backward()
    for name, parameter in there.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


def test_llama_generates_the_same_with_a_cache(device):
    model = make_model()
    ids = random_ids(3, 6)
    want = model.generate(ids, max_new_tokens=12, do_sample=False)
    there = model.to(device)
    for cached in (True, False):
        got = there.generate(ids.to(device), max_new_tokens=12, do_sample=False, use_cache=cached)
        assert torch.equal(got.cpu(), want)


def test_checkpoints_go_from_device_to_device(device, tmp_path):
    model = make_model().to(device)
    model.save_pretrained(tmp_path)
    loaded = L3LlamaForCausalLM.from_pretrained(tmp_path).to(device)
    ids = random_ids(2, 9).to(device)
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_training_and_its_resumption(device, precision, tmp_path):
    tokens = random_ids(4000).numpy()
    config = TrainConfig(
        steps=6,
        sequence_length=32,
        batch_size=4,
        checkpoint_every=3,
        precision=precision,
        device=str(device),
    )
    options = {"output": tmp_path, "eval_tokens": tokens[:500], "progress": False}
    model = make_model()
    result = train(model, tokens, config, **options)
    assert result.loss < 1.2 * np.log(VOCAB)
    last = tmp_path / "checkpoint-00000006"
    assert last.is_dir()
    # The second half again, from the checkpoint between.
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    last.rename(tmp_path / "aside")
    resumed = train(model, tokens, config, **options)
    assert resumed.resumed_from == 3
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, weights[name], rtol=1e-3, atol=1e-3)
