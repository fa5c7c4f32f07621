"""L3Layer against the formula, and its errors."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

import l3ext
from l3ext import Allocation
from l3ext.nn import L3Layer
from l3ext.runtime import Rows
from tests import reference

ROWS = np.array([1, 4, 2, 7, 1, 3])


def make_layer(tied=False, dtype=torch.float64, **options):
    torch.manual_seed(0)
    d_emb = 16 if tied else 12
    return L3Layer(16, d_emb, 20, Allocation.from_rows(ROWS), tied=tied, dtype=dtype, **options)


def rms_norm(x, weight, eps):
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def formula(layer, x, token_ids):
    """W_mix [RMSNorm_out(W_up a) ; x], position by position."""
    flat = x.reshape(-1, layer.d_model)
    keys = layer.table[:, : layer.d_model]
    values = layer.table if layer.tied else layer.table[:, layer.d_model :]
    q = rms_norm(flat, layer.norm_in.weight, layer.norm_in.eps)
    a = reference.segmented_attention(q, keys, values, token_ids, layer.offsets)
    up = rms_norm(a @ layer.up.weight.T, layer.norm_out.weight, layer.norm_out.eps)
    return (torch.cat([up, flat], -1) @ layer.mix.weight.T).reshape(x.shape)


@pytest.mark.parametrize("tied", [False, True])
def test_is_the_formula(tied):
    layer = make_layer(tied)
    with torch.no_grad():  # weights that a missing factor would show in
        layer.norm_in.weight.uniform_(0.5, 2)
        layer.norm_out.weight.uniform_(0.5, 2)
        layer.table.mul_(30)
    x = torch.randn(2, 9, 16, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(0, len(ROWS), (2, 9))
    out = layer(x, ids)
    reference.assert_close(out.detach(), formula(layer, x, ids).detach(), "out")
    parameters = [x, *layer.parameters()]
    upstream = torch.randn_like(out)
    got = torch.autograd.grad(out, parameters, upstream)
    want = torch.autograd.grad(formula(layer, x, ids), parameters, upstream)
    for a, b in zip(got, want, strict=True):
        reference.assert_close(a, b, "gradient", factor=10)


def test_a_shared_plan_and_fetched_rows_give_the_same_bits():
    layer = make_layer(dtype=torch.bfloat16)
    x = torch.randn(1, 30, 16, dtype=torch.bfloat16)
    ids = torch.randint(0, len(ROWS), (1, 30))
    plan = l3ext.plan(ids, layer.allocation.offsets)
    out = layer(x, ids)
    assert torch.equal(out, layer(x, plan=plan))
    table = layer.release_table()
    rows = Rows(table[:, :16], table[:, 16:], plan)
    assert layer.table is None
    assert torch.equal(out, layer(x, rows=rows))
    with pytest.raises(RuntimeError, match="moved out of the model"):
        layer(x, ids)
    layer.restore_table(table)
    assert torch.equal(out, layer(x, ids))


def test_initialisation_is_a_llama_linear_s():
    torch.manual_seed(0)
    layer = L3Layer(64, 64, 128, Allocation.uniform(500, 2000))
    for weight in (layer.table, layer.up.weight, layer.mix.weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert abs(weight.mean().item()) < 1e-3
    assert (layer.norm_in.weight == 1).all()
    assert (layer.norm_out.weight == 1).all()


def test_meta_device_then_materialised():
    layer = make_layer(device="meta", dtype=torch.float32)
    layer = layer.to_empty(device="cpu")
    layer.reset_parameters()
    out = layer(torch.randn(3, 16), torch.tensor([0, 3, 5]))
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("assign", [False, True])
def test_meta_device_then_loaded(assign):
    source, layer = make_layer(dtype=torch.float32), make_layer(device="meta", dtype=torch.float32)
    if not assign:
        layer = layer.to_empty(device="cpu")
        layer.offsets.fill_(-1)  # whatever was in that memory
    layer.load_state_dict(source.state_dict(), assign=assign)
    x, ids = torch.randn(3, 16), torch.tensor([0, 3, 5])
    assert torch.equal(layer(x, ids), source(x, ids))


def other_layer():
    """As many rows in all, but other tokens own them."""
    torch.manual_seed(1)
    return L3Layer(16, 12, 20, Allocation.from_rows(ROWS[::-1].copy()), dtype=torch.float32)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("within", [False, True])
def test_rows_of_another_allocation_are_refused(tmp_path, within, assign):
    def model(layer):
        return torch.nn.Sequential(torch.nn.Linear(16, 16), layer) if within else layer

    source, other = model(make_layer(dtype=torch.float32)), other_layer()
    before = other.table.clone()
    torch.save(source.state_dict(), tmp_path / "weights.pt")
    weights = torch.load(tmp_path / "weights.pt", weights_only=True)
    with pytest.raises(RuntimeError, match="table: expected rows of this layer's allocation"):
        model(other).load_state_dict(weights, assign=assign)
    assert torch.equal(other.table, before)

    same = model(make_layer(dtype=torch.float32))
    same.load_state_dict(weights, assign=assign)
    x, ids = torch.randn(3, 16), torch.tensor([0, 3, 5])
    layers = [m[1] if within else m for m in (source, same)]
    assert torch.equal(layers[0](x, ids), layers[1](x, ids))


def test_weights_without_metadata_load_as_torch_s_do():
    source, same = make_layer(dtype=torch.float32), make_layer(dtype=torch.float32)
    same.load_state_dict(dict(source.state_dict()))
    assert torch.equal(same.table, source.table)


def test_what_belongs_to_no_token_loads_into_another_allocation_s_layer():
    source, other = make_layer(dtype=torch.float32), other_layer()
    before, weights = other.table.clone(), source.state_dict()
    del weights["table"]
    other.load_state_dict(weights, strict=False)
    assert torch.equal(other.mix.weight, source.mix.weight)
    assert torch.equal(other.table, before)


def test_rows_of_another_allocation_are_refused_quantised():
    source, other = make_layer(dtype=torch.float32).quantize_(), other_layer().quantize_()
    with pytest.raises(RuntimeError, match="expected rows of this layer's allocation"):
        other.load_state_dict(source.state_dict())


def test_autocast_keeps_the_table_in_float32():
    layer = make_layer(dtype=torch.float32)
    x = torch.randn(2, 5, 16)
    ids = torch.randint(0, len(ROWS), (2, 5))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x, ids)
    out.float().sum().backward()
    assert layer.table.grad.dtype == torch.float32
    reference.assert_close(out.float(), layer(x, ids).detach(), "out", factor=2e4)


def test_compile_without_graph_breaks():
    layer = make_layer(dtype=torch.float32)
    x, ids = torch.randn(2, 5, 16), torch.randint(0, len(ROWS), (2, 5))
    compiled = torch.compile(layer, fullgraph=True)
    torch.testing.assert_close(compiled(x, ids), layer(x, ids))


def test_empty_batch():
    out = make_layer()(torch.zeros(0, 7, 16, dtype=torch.float64), torch.zeros(0, 7).long())
    assert out.shape == (0, 7, 16)


def test_gradients_of_an_empty_batch():
    layer, x = make_layer(), torch.zeros(0, 7, 16, dtype=torch.float64, requires_grad=True)
    layer(x, torch.zeros(0, 7).long()).sum().backward()
    assert x.grad.shape == x.shape
    assert not layer.table.grad.any()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0, 4, 4), ValueError, "d_model: expected 1 or more, got 0"),
        ((4, 4, -1), ValueError, "d_up: expected 1 or more, got -1"),
        ((None, 4, 4), TypeError, "d_model: expected an int, got None"),
        ((4, "4", 4), TypeError, "d_emb: expected an int, got '4'"),
        ((4, 4, 4.0), TypeError, r"d_up: expected an int, got 4\.0"),
        ((4, 4, 4, "no"), TypeError, "tied: expected True or False, got 'no'"),
        ((4, 4, 4, False, None), TypeError, "eps: expected a number, got None"),
        ((4, 4, 4, False, -5.0), ValueError, r"eps: expected 0 or more, and finite, got -5\.0"),
        ((4, 4, 4, False, float("nan")), ValueError, "eps: expected 0 or more, .* got nan"),
        ((4, 4, 4, False, float("inf")), ValueError, "eps: expected 0 or more, .* got inf"),
        ((4, 5, 4, True), ValueError, "d_emb: a tied table needs d_emb == d_model = 4, got 5"),
    ],
)
def test_wrong_sizes(arguments, error, message):
    d_model, d_emb, d_up, *tied = arguments
    with pytest.raises(error, match=message):
        L3Layer(d_model, d_emb, d_up, Allocation.from_rows(ROWS), *tied)


def test_widths_of_other_integer_types_are_ints():
    layer = L3Layer(torch.tensor(8), np.int64(4), torch.tensor(6), Allocation.from_rows(ROWS))
    for width in (layer.d_model, layer.d_emb, layer.d_up):
        assert type(width) is int
    assert layer.mix.in_features == 14
    assert "d_model=8, d_emb=4, d_up=6" in repr(layer)


def test_arrays_and_lists_are_as_good_as_tensors():
    layer = make_layer()
    x, ids = torch.randn(2, 5, 16, dtype=torch.float64), torch.arange(10).reshape(2, 5) % 6
    want = layer(x, ids)
    for same in (ids.numpy(), ids.tolist(), ids.to(torch.uint8)):
        assert torch.equal(layer(x, same), want)
        assert torch.equal(layer(x, plan=layer.plan(same)), want)
    fixed = x.numpy()
    fixed.setflags(write=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(layer(fixed, ids), want)


def test_a_module_in_place_of_a_weight_has_the_say_over_dtypes():
    layer = make_layer(dtype=torch.float32)
    x, ids = torch.randn(3, 16), torch.tensor([0, 3, 5])

    class Packed(torch.nn.Linear):
        """Stores its weight in 8 bits, as libraries for quantisation do."""

        def forward(self, x):
            return torch.nn.functional.linear(x, self.weight.to(x.dtype) / 64)

    packed = Packed(36, 16, bias=False)
    packed.weight = torch.nn.Parameter((layer.mix.weight * 64).round().to(torch.int8), False)
    layer.mix.weight = torch.nn.Parameter(packed.weight.float() / 64)
    expected = layer(x, ids)
    layer.mix = packed
    assert torch.equal(layer(x, ids), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64])
def test_x_has_the_dtype_of_the_weights(dtype):
    layer = make_layer(dtype=torch.float32)
    x, ids = torch.ones(3, 16, dtype=dtype), torch.tensor([0, 3, 5])
    with pytest.raises(TypeError, match=f"x: expected torch.float32, the dtype .* got {dtype}"):
        layer(x, ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        if dtype == torch.bfloat16:
            assert torch.isfinite(layer(x, ids)).all()
        else:
            with pytest.raises(TypeError, match=r"x: expected torch\.float32, the dtype of"):
                layer(x, ids)


def test_wrong_calls():
    layer = make_layer()
    x, ids = torch.randn(2, 5, 16, dtype=torch.float64), torch.zeros(2, 5, dtype=torch.int64)
    with pytest.raises(TypeError, match=r"allocation: expected l3ext.Allocation, got ndarray"):
        L3Layer(4, 4, 4, ROWS)
    with pytest.raises(TypeError, match=r"dtype: expected a torch.dtype, got str"):
        L3Layer(4, 4, 4, Allocation.from_rows(ROWS), dtype="float32")
    with pytest.raises(RuntimeError, match=r"device: expected a torch.device .* got 'gpu'"):
        L3Layer(4, 4, 4, Allocation.from_rows(ROWS), device="gpu")
    with pytest.raises(TypeError, match=r"table: expected what release_table .* got NoneType"):
        layer.restore_table(None)
    with pytest.raises(TypeError, match=r"rows: expected those of a step, got str"):
        layer(x, rows="rows")
    with pytest.raises(TypeError, match=r"x: expected a torch.Tensor or .* got NoneType"):
        layer(None, ids)
    with pytest.raises(ValueError, match=r"token_ids, plan, rows: expected exactly .* none"):
        layer(x)
    with pytest.raises(ValueError, match="expected exactly one of them, got token_ids and plan"):
        layer(x, ids, plan=layer.plan(ids))
    with pytest.raises(ValueError, match=r"x: expected 16 in the last dimension.* \[2, 5, 8\]"):
        layer(x[..., :8], ids)
    with pytest.raises(ValueError, match=r"token_ids: expected shape \[2, 5\], got \[10\]"):
        layer(x, ids.reshape(-1))
    with pytest.raises(ValueError, match=r"x: expected 16 in the last dimension, got shape \[\]"):
        layer(x.sum(), ids)
    with pytest.raises(TypeError, match=r"x: expected a torch.Tensor or a NumPy .* got list"):
        layer(x.tolist(), ids)
    with pytest.raises(TypeError, match=r"token_ids: expected a tensor, .* got str"):
        layer(x, "ids")
    with pytest.raises(ValueError, match="got 6 at position 0"):
        layer(x, ids + 6)
