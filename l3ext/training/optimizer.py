"""AdamW over three kinds of parameters: matrices, vectors and embeddings, L3 tables."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from l3ext.training.config import TrainConfig
from l3ext.training.schedule import learning_rate_factor

TABLE_NAME = "table"  # the attribute of an L3 layer that holds its rows


def parameter_kinds(model: nn.Module) -> dict[str, str]:
    """Which kind each parameter of ``model`` is: "matrix", "vector", "embedding" or "table"."""
    kinds: dict[str, str] = {}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for module in model.modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            name = names[id(parameter)]
            if leaf == TABLE_NAME:
                kinds[name] = "table"
            elif isinstance(module, nn.Embedding):
                kinds[name] = "embedding"  # a head tied to it is found first or last: it stays one
            elif parameter.ndim < 2:
                kinds[name] = "vector"
            else:
                kinds.setdefault(name, "matrix")
    return kinds


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW for ``model``; each group carries its ``peak_lr`` and its parameters' ``names``."""
    rate, decay = config.learning_rate, config.embedding_weight_decay
    settings = {
        "matrix": (rate, config.weight_decay),
        "vector": (rate, 0.0),
        "embedding": (config.embedding_learning_rate or rate, decay),
        "table": (config.table_learning_rate or rate, decay),
    }
    kinds = parameter_kinds(model)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise ValueError("model: expected at least one parameter that requires a gradient")
    groups: list[dict[str, Any]] = []
    for kind, (rate, decay) in settings.items():
        names = [name for name in parameters if kinds[name] == kind]
        if names:
            groups.append(
                {
                    "params": [parameters[name] for name in names],
                    "names": names,
                    "peak_lr": rate,
                    "lr": rate,
                    "weight_decay": decay,
                }
            )
    return torch.optim.AdamW(
        groups, betas=(config.beta1, config.beta2), eps=config.epsilon, fused=True
    )


def set_learning_rate(optimizer: torch.optim.AdamW, step: int, config: TrainConfig) -> float:
    """Set every group's rate for 0-based ``step``; returns the rate of the matrices."""
    factor = learning_rate_factor(step, config)
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
    return config.learning_rate * factor


def optimizer_tensors(optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    """The optimizer's state by name, ``"<parameter>/<moment>"``, for a safetensors file."""
    return {
        f"{name}/{key}": value.detach().cpu()
        for group in optimizer.param_groups
        for name, parameter in zip(group["names"], group["params"], strict=True)
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_tensors(optimizer: torch.optim.AdamW, tensors: dict[str, Tensor]) -> None:
    """Put back what :func:`optimizer_tensors` gave; ValueError for a state of another model."""
    state: dict[int, dict[str, Tensor]] = {}
    index = 0
    unused = set(tensors)
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            moments = {
                key: tensors[f"{name}/{key}"]
                for key in ("step", "exp_avg", "exp_avg_sq")
                if f"{name}/{key}" in tensors
            }
            unused.difference_update(f"{name}/{key}" for key in moments)
            for key, value in moments.items():
                if key != "step" and value.shape != parameter.shape:
                    raise ValueError(
                        f"optimizer state {name}/{key}: expected shape {list(parameter.shape)}, "
                        f"got {list(value.shape)}"
                    )
            if moments:
                state[index] = moments
            index += 1
    if unused:
        raise ValueError(f"optimizer state: {sorted(unused)[0]!r} names no parameter of the model")
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
