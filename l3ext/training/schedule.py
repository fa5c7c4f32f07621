"""The learning rate over a run: linear warm-up, then half a cosine."""

from __future__ import annotations

import math

from l3ext.training.config import TrainConfig


def learning_rate_factor(step: int, config: TrainConfig) -> float:
    """The learning rate of 0-based ``step`` as a fraction of its peak.

    Rises to 1 over ``warmup_steps``, falls to ``min_learning_rate`` at the last step.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    span = config.steps - 1 - config.warmup_steps
    progress = (step - config.warmup_steps) / span if span > 0 else 1.0
    cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.min_learning_rate + (1.0 - config.min_learning_rate) * cosine
