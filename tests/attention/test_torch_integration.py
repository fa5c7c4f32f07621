"""The operators as torch sees them: opcheck, gradcheck, compile, every instruction set."""

from __future__ import annotations

import copy
import dataclasses
import os
import subprocess
import sys
from typing import ClassVar

import pytest
import torch
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import l3ext
from l3ext import _C, _operators
from l3ext.ops import table_attention
from tests import reference


def step(dtype=torch.float64, tokens=9, d_in=5, d_emb=3):
    x, table, offsets, ids = reference.make_step([1, 2, 4, 3], tokens, d_in, d_emb, dtype)
    return x, table, offsets, ids


def test_opcheck_plan():
    _, _, offsets, ids = step()
    torch.library.opcheck(torch.ops.l3ext.plan.default, (ids, offsets, True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_opcheck_attention(dtype):
    x, table, offsets, ids = step(dtype)
    arrays = l3ext.plan(ids, offsets)._arrays()
    keys, values = table[:, :5].contiguous(), table[:, 5:].contiguous()
    for tensor in (x, keys, values, table):
        tensor.requires_grad_()
    torch.library.opcheck(
        torch.ops.l3ext.segmented_attention.default, (x, keys, values, *arrays, 0.7)
    )
    torch.library.opcheck(
        torch.ops.l3ext.table_attention.default, (x, table, 5, False, *arrays, 0.7)
    )


def test_opcheck_backward():
    x, table, offsets, ids = step()
    arrays = l3ext.plan(ids, offsets)._arrays()
    dy = torch.randn(9, 3, dtype=torch.float64)
    for wants in [(True, True), (True, False), (False, True)]:
        torch.library.opcheck(
            torch.ops.l3ext.segmented_attention_backward.default,
            (dy, x, table[:, :5], table[:, 5:], *arrays, 1.0, *wants),
        )
        torch.library.opcheck(
            torch.ops.l3ext.table_attention_backward.default,
            (dy, x, table, 5, False, *arrays, 1.0, *wants),
        )


class _Names(TorchDispatchMode):
    """Writes down which of our operators run."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "l3ext":
            self.seen.append(func.__name__)
        return func(*args, **(kwargs or {}))


def test_only_what_may_need_a_gradient_is_recorded():
    x, table, offsets, ids = step()
    plan = l3ext.plan(ids, offsets)
    expected = table_attention(x, table, plan, tied=False)
    assert not expected.requires_grad
    for leaf in (x, table):
        leaf.requires_grad_()
        recorded = table_attention(x, table, plan, tied=False)
        assert recorded.requires_grad
        assert torch.equal(recorded, expected)
        with torch.no_grad():
            unrecorded = table_attention(x, table, plan, tied=False)
        assert not unrecorded.requires_grad
        assert torch.equal(unrecorded, expected)
        leaf.requires_grad_(False)


def test_modes_and_transforms_see_the_call_without_a_gradient():
    x, table, offsets, ids = step()
    plan = l3ext.plan(ids, offsets)
    with _Names() as names:
        y = table_attention(x, table, plan, tied=False)
    assert names.seen == ["table_attention.default"]
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = table_attention(mode.from_tensor(x), mode.from_tensor(table), plan, tied=False)
    assert isinstance(fake, FakeTensor)
    assert fake.shape == y.shape


class _Calls(torch.overrides.TorchFunctionMode):
    """Counts the functions of torch that run."""

    seen = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen += "l3ext" in str(func)
        return func(*args, **(kwargs or {}))


class _Wrapper(torch.Tensor):
    """Holds a tensor and says which operators meet it."""

    met: ClassVar[list[str]] = []

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        cls.met.append(func.name())
        plain = [a.inner if isinstance(a, cls) else a for a in args]
        return func(*plain, **(kwargs or {}))


def test_a_call_that_torch_would_only_pass_on_goes_to_the_kernel():
    x, table, offsets, ids = step()
    plan = l3ext.plan(ids, offsets)
    at_once = _operators.computes_at_once
    assert at_once(plan, x, table)
    leaf = torch.nn.Parameter(table)
    assert not at_once(plan, x, leaf)
    with torch.no_grad(), torch.autocast("cpu"):
        assert at_once(plan, x, leaf)
    with torch.inference_mode():
        assert at_once(plan, x, table.clone())
    assert not at_once(plan, x.to("meta"), table)
    assert not at_once(plan, x, table.to_sparse())
    assert not at_once(plan, _Wrapper(x), table)
    wrapped = dataclasses.replace(plan, permutation=_Wrapper(plan.permutation))
    assert not at_once(wrapped, x, table)
    assert at_once(copy.deepcopy(plan), x, table)
    with torch.profiler.profile():
        assert not at_once(plan, x, table)
    for mode in (_Names(), _Calls(), FakeTensorMode()):
        with mode:
            assert not at_once(plan, x, table)
    with forward_ad.dual_level():
        assert not at_once(plan, x, table)

    def transformed(x):
        assert not at_once(plan, x, table)
        assert not at_once(plan, table, table)
        return x

    torch.vmap(transformed)(x[None])


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_who_watches_sees_the_call_without_a_gradient():
    x, table, offsets, ids = step()
    plan = l3ext.plan(ids, offsets)
    expected = table_attention(x, table, plan, tied=False)
    with torch.profiler.profile() as profile:
        table_attention(x, table, plan, tied=False)
    assert "l3ext::table_attention" in {event.name for event in profile.events()}
    with _Calls() as calls:
        table_attention(x, table, plan, tied=False)
    assert calls.seen == 1
    wrapped = table_attention(_Wrapper(x), table, plan, tied=False)
    assert "l3ext::table_attention" in _Wrapper.met
    assert torch.equal(wrapped, expected)
    traced = torch.jit.trace(lambda x: table_attention(x, table, plan, tied=False), x)
    assert "l3ext::table_attention" in str(traced.graph)


def gradients(loss, *inputs):
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    return torch.autograd.grad(loss(*leaves), leaves)


@pytest.mark.parametrize("sparse", [False, True])
def test_gradients_by_torch_func_are_those_of_autograd(sparse):
    x, table, offsets, ids = step()
    plan = l3ext.plan(ids, offsets)
    keys, values = table[:, :5].contiguous(), table[:, 5:].contiguous()

    def of_table(x, table):
        return table_attention(x, table, plan, tied=False, sparse=sparse).square().sum()

    def of_halves(x, keys, values):
        return l3ext.segmented_attention(x, keys, values, plan, 0.7, sparse=sparse).square().sum()

    for loss, inputs in ((of_table, (x, table)), (of_halves, (x, keys, values))):
        expected = gradients(loss, *inputs)
        argnums = tuple(range(len(inputs)))
        _, vjp = torch.func.vjp(loss, *inputs)
        one = torch.tensor(1.0, dtype=torch.float64)
        for got in (torch.func.grad(loss, argnums)(*inputs), vjp(one)):
            assert all(map(same, got, expected))
        (got,) = torch.func.grad(loss, argnums[-1:])(*inputs)
        assert same(got, expected[-1])


def same(a, b):
    return torch.equal(a.to_dense(), b.to_dense())


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_gradients_through_other_transforms():
    x, table, offsets, ids = step()
    plan = l3ext.plan(ids, offsets)
    both = torch.stack([x, x.flip(0)])

    def loss(x):
        return table_attention(x, table, plan, tied=False).square().sum()

    expected = torch.stack([gradients(loss, each)[0] for each in both])
    assert torch.equal(torch.vmap(torch.func.grad(loss))(both), expected)
    assert torch.equal(torch.func.grad(lambda xs: torch.vmap(loss)(xs).sum())(both), expected)
    # Within vmap no tensor says that a leaf outside requires a gradient.
    assert torch.equal(gradients(lambda xs: torch.vmap(loss)(xs).sum(), both)[0], expected)
    functional = torch.func.functionalize(loss)
    assert torch.equal(gradients(functional, x)[0], expected[0])


def test_gradients_of_a_layer_by_torch_func():
    layer = l3ext.L3Layer(5, 3, 6, l3ext.Allocation.from_rows([1, 2, 4, 3]), dtype=torch.float64)
    x, _, _, ids = step()

    def loss(parameters):
        return torch.func.functional_call(layer, parameters, (x, ids)).square().sum()

    got = torch.func.grad(loss)({name: p.detach() for name, p in layer.named_parameters()})
    layer(x, ids).square().sum().backward()
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad, rtol=1e-12, atol=1e-12)


def test_derivatives_that_there_are_not_are_errors_and_never_zeros():
    x, table, offsets, ids = step()
    plan = l3ext.plan(ids, offsets)

    def attend(x):
        return table_attention(x, table, plan, tied=False)

    no_jvp = r"table_attention.* no forward-mode derivative"
    with pytest.raises(RuntimeError, match=no_jvp), forward_ad.dual_level():
        forward_ad.unpack_dual(attend(forward_ad.make_dual(x, torch.ones_like(x))))
    for function in (attend, torch.func.grad(lambda x: attend(x).sum())):
        with pytest.raises(RuntimeError, match=no_jvp):
            torch.func.jvp(function, (x,), (torch.ones_like(x),))
    with pytest.raises(RuntimeError, match="gradients have no derivatives of their own"):
        torch.func.grad(lambda x: torch.func.grad(lambda x: attend(x).square().sum())(x).sum())(x)
    rows = l3ext.quantize_rows(table, 5)
    scales = {"key_scales": rows.key_scales, "value_scales": rows.value_scales}
    with pytest.raises(RuntimeError, match="for inference, they have no gradient"):
        torch.func.grad(
            lambda x: l3ext.segmented_attention(x, rows.keys, rows.values, plan, **scales).sum()
        )(x.float())
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(attend(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="gradients have no derivatives of their own"):
        gradient.sum().backward()


@pytest.mark.parametrize("scale", [1.0, -0.6])
def test_gradcheck(scale):
    x, table, offsets, ids = step()
    plan = l3ext.plan(ids, offsets)
    keys, values = table[:, :5].clone(), table[:, 5:].clone()
    operands = [t.requires_grad_() for t in (x, keys, values)]
    assert torch.autograd.gradcheck(lambda *t: l3ext.segmented_attention(*t, plan, scale), operands)
    table = table.clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda a, b: table_attention(a, b, plan, tied=False, scale=scale), [x, table]
    )
    square = torch.randn(10, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda a, b: l3ext.segmented_attention(a, b, b, plan, scale), [x, square]
    )


def test_compile_without_graph_breaks():
    x, table, offsets, ids = step(torch.float32, tokens=40, d_in=16, d_emb=8)
    x.requires_grad_()
    table.requires_grad_()

    def model(x, table, ids):
        plan = l3ext.plan(ids, offsets)
        return (table_attention(x * 2, table, plan, tied=False) ** 2).sum()

    model(x, table, ids).backward()
    want = x.grad.clone(), table.grad.clone()
    compiled = torch.compile(model, fullgraph=True)
    for order in (ids, ids.flip(0), ids):  # other ids, same graph: nothing is baked in
        x.grad = table.grad = None
        compiled(x, table, order).backward()
    torch.testing.assert_close(x.grad, want[0])
    torch.testing.assert_close(table.grad, want[1])


SCRIPT = """
import torch, l3ext
from l3ext import _C
from tests import reference
rows = [1, 2, 3, 5, 8, 17, 40]
for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
    for d_in, d_emb in ((64, 32), (37, 19)):
        x, table, offsets, ids = reference.make_step(rows, 90, d_in, d_emb, dtype)
        x.requires_grad_(); table.requires_grad_()
        plan = l3ext.plan(ids, offsets)
        y = l3ext.segmented_attention(x, table[:, :d_in], table[:, d_in:], plan)
        y.sum().backward()
        x64 = x.detach().double().requires_grad_(); t64 = table.detach().double().requires_grad_()
        want = reference.segmented_attention(x64, t64[:, :d_in], t64[:, d_in:], ids, offsets)
        want.sum().backward()
        reference.assert_close(y.detach(), want.detach(), f"y {dtype}")
        reference.assert_close(x.grad, x64.grad, f"dx {dtype}", factor=4)
        reference.assert_close(table.grad, t64.grad, f"dtable {dtype}", factor=4)
print(_C.cpu_isa())
"""


def test_a_machine_runs_the_baseline_and_what_it_chose():
    assert {"baseline", _C.cpu_isa()} <= set(_C.cpu_isas())


@pytest.mark.parametrize("isa", _C.cpu_isas())
def test_every_instruction_set_that_this_machine_runs(isa):
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={**os.environ, "L3EXT_CPU_ISA": isa},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == isa
