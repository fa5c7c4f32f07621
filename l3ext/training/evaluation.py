"""Held-out loss, exactly: every token of a fixed set of sequences counts once."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from l3ext.training.config import PRECISIONS


@dataclass(frozen=True)
class Evaluation:
    """Mean negative log-likelihood (nats per token) over ``tokens`` predicted tokens."""

    loss: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """exp(loss); inf where that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[Any]:
    """bfloat16 autocast for ``precision="bfloat16"``, nothing for "float32"."""
    if precision == "bfloat16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext()


def causal_loss(model: nn.Module, sequences: Tensor, *, reduction: str = "mean") -> Tensor:
    """Cross-entropy in float32 of each token given those before it; ``sequences`` int64 [B, L+1].

    The model's own loss is not used: it shifts, scales and casts differently from model to model.
    """
    inputs, labels = sequences[:, :-1], sequences[:, 1:]
    logits = model(input_ids=inputs, use_cache=False).logits
    return functional.cross_entropy(
        logits.float().flatten(0, 1), labels.flatten(), reduction=reduction
    )


def evaluate(
    model: nn.Module,
    tokens: npt.NDArray[np.integer],
    *,
    sequence_length: int,
    batch_size: int = 8,
    max_sequences: int | None = None,
    precision: str = "float32",
    device: str | torch.device | None = None,
) -> Evaluation:
    """Held-out loss of a causal language model over the first sequences of ``tokens``.

    The tokens are cut into sequences of ``sequence_length`` predicted tokens each, in order; a
    rest that fills none is left out. The model's mode (train or eval) is restored.

    Args:
        model: called as ``model(input_ids=..., use_cache=False).logits``.
        tokens: integer [T], T at least ``sequence_length + 1``.
        sequence_length: predicted tokens of one sequence.
        batch_size: sequences of one forward pass; changes the speed, not the set.
        max_sequences: how many sequences at most; None: all.
        precision: "float32" or "bfloat16" (autocast).
        device: where to compute; None: where the model's parameters are.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision: expected one of {PRECISIONS}, got {precision!r}")
    for name, value in (("sequence_length", sequence_length), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    if len(tokens) < sequence_length + 1:
        raise ValueError(
            f"tokens: expected at least sequence_length + 1 = {sequence_length + 1}, "
            f"got {len(tokens)}"
        )
    place = torch.device(device) if device is not None else next(model.parameters()).device
    count = (len(tokens) - 1) // sequence_length
    count = count if max_sequences is None else min(count, max_sequences)
    was_training = model.training
    model.eval()
    total = 0.0
    try:
        with torch.no_grad(), autocast(place, precision):
            for first in range(0, count, batch_size):
                starts = np.arange(first, min(first + batch_size, count)) * sequence_length
                rows = np.stack([tokens[s : s + sequence_length + 1] for s in starts])
                sequences = torch.from_numpy(rows.astype(np.int64)).to(place)
                total += causal_loss(model, sequences, reduction="sum").double().item()
    finally:
        model.train(was_training)
    return Evaluation(loss=total / (count * sequence_length), tokens=count * sequence_length)
