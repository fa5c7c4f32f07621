import pytest
import torch
from tiny import build_model
from torch import nn

from l3ext.training import TrainConfig
from l3ext.training.optimizer import (
    build_optimizer,
    load_optimizer_tensors,
    optimizer_tensors,
    parameter_kinds,
    set_learning_rate,
)


class WithTable(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.norm = nn.LayerNorm(3)
        self.project = nn.Linear(3, 5, bias=False)
        self.project.weight = self.embed.weight  # a tied head
        self.mix = nn.Linear(3, 3)
        self.table = nn.Parameter(torch.randn(7, 6))


def test_kinds():
    assert parameter_kinds(WithTable()) == {
        "embed.weight": "embedding",
        "norm.weight": "vector",
        "norm.bias": "vector",
        "mix.weight": "matrix",
        "mix.bias": "vector",
        "table": "table",
    }


def test_groups_carry_rates_and_decay():
    config = TrainConfig(steps=10, learning_rate=1e-3, table_learning_rate=1e-2, weight_decay=0.3)
    optimizer = build_optimizer(WithTable(), config)
    by_name = {name: group for group in optimizer.param_groups for name in group["names"]}
    assert by_name["mix.weight"]["weight_decay"] == 0.3
    assert by_name["norm.weight"]["weight_decay"] == 0.0
    assert by_name["embed.weight"]["weight_decay"] == by_name["table"]["weight_decay"] == 0.0
    set_learning_rate(optimizer, 0, config)
    assert by_name["table"]["lr"] == pytest.approx(1e-2)
    assert by_name["mix.weight"]["lr"] == pytest.approx(1e-3)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 6


def test_state_survives_by_name():
    torch.manual_seed(0)
    model, other = build_model(), build_model()
    config = TrainConfig(steps=10, sequence_length=8)
    optimizer = build_optimizer(model, config)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    saved = {name: tensor.clone() for name, tensor in optimizer_tensors(optimizer).items()}
    restored = build_optimizer(other, config)
    load_optimizer_tensors(restored, saved)
    again = optimizer_tensors(restored)
    assert again.keys() == saved.keys()
    assert all(torch.equal(again[name], saved[name]) for name in saved)


def test_state_of_another_model_is_refused():
    model = build_model()
    optimizer = build_optimizer(model, TrainConfig(steps=1))
    with pytest.raises(ValueError, match="'nowhere/exp_avg' names no parameter"):
        load_optimizer_tensors(optimizer, {"nowhere/exp_avg": torch.zeros(3)})
    name = next(iter(dict(model.named_parameters())))
    with pytest.raises(ValueError, match=f"{name}/exp_avg: expected shape"):
        load_optimizer_tensors(optimizer, {f"{name}/exp_avg": torch.zeros(3)})


def test_a_frozen_model_cannot_be_trained():
    model = build_model().requires_grad_(False)
    with pytest.raises(ValueError, match="requires a gradient"):
        build_optimizer(model, TrainConfig(steps=1))
