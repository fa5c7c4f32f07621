"""What a training run is made of."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

PRECISIONS = ("float32", "bfloat16")

# A resumed run may change these: they touch neither the weights nor the order of the data.
FREE_ON_RESUME = ("checkpoint_every", "keep_checkpoints", "eval_every", "eval_sequences")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of :func:`l3ext.training.train`; ValueError or TypeError for a bad one.

    One optimizer step sees ``batch_size * accumulation * sequence_length`` tokens.

    Weight decay applies to matrices only. Norms and biases are left alone because decay would
    pull a scale to zero; embeddings and L3 tables because a row that the step did not touch
    would still shrink, which for rare tokens outweighs what they learn.

    Args:
        steps: optimizer steps of the whole run; the learning rate's schedule spans them.
        sequence_length: tokens of one training sequence.
        batch_size: sequences of one forward pass.
        accumulation: forward passes of one optimizer step.
        learning_rate: peak of the cosine schedule.
        embedding_learning_rate, table_learning_rate: peaks for embeddings and for L3 tables;
            None: as ``learning_rate``. A row of either sees only its own token's positions, so
            both bear a larger one than matrices do.
        min_learning_rate: end of the schedule, as a fraction of the peak.
        warmup_steps: steps of linear warm-up from zero.
        weight_decay: decay of matrices other than embeddings and tables.
        embedding_weight_decay: decay of embeddings and tables.
        beta1, beta2, epsilon: AdamW's.
        clip_norm: bound on the gradient's global norm; None: no bound.
        precision: "float32", or "bfloat16" for autocast over float32 weights.
        gradient_checkpointing: recompute activations in the backward pass.
        seed: of the data's order and of dropout.
        eval_every: steps between evaluations; 0: only after the last step.
        eval_sequences: held-out sequences of one evaluation; None: all.
        checkpoint_every: steps between checkpoints; 0: only after the last step.
        keep_checkpoints: how many of the newest checkpoints stay.
        device: where the model trains, as torch names it.
    """

    steps: int
    sequence_length: int = 1024
    batch_size: int = 8
    accumulation: int = 1
    learning_rate: float = 1e-3
    embedding_learning_rate: float | None = None
    table_learning_rate: float | None = None
    min_learning_rate: float = 0.1
    warmup_steps: int = 0
    weight_decay: float = 0.1
    embedding_weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    clip_norm: float | None = 1.0
    precision: str = "float32"
    gradient_checkpointing: bool = False
    seed: int = 0
    eval_every: int = 0
    eval_sequences: int | None = None
    checkpoint_every: int = 0
    keep_checkpoints: int = 2
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name in ("steps", "sequence_length", "batch_size", "accumulation", "keep_checkpoints"):
            self._check_int(name, least=1)
        for name in ("warmup_steps", "seed", "eval_every", "checkpoint_every"):
            self._check_int(name, least=0)
        if self.eval_sequences is not None:
            self._check_int("eval_sequences", least=1)
        self._check_float("learning_rate", above=0.0)
        for name in ("embedding_learning_rate", "table_learning_rate"):
            if getattr(self, name) is not None:
                self._check_float(name, above=0.0)
        self._check_float("min_learning_rate", least=0.0, most=1.0)
        self._check_float("weight_decay", least=0.0)
        self._check_float("embedding_weight_decay", least=0.0)
        self._check_float("beta1", least=0.0, below=1.0)
        self._check_float("beta2", least=0.0, below=1.0)
        self._check_float("epsilon", above=0.0)
        if self.clip_norm is not None:
            self._check_float("clip_norm", above=0.0)
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision: expected one of {PRECISIONS}, got {self.precision!r}")
        if self.warmup_steps > self.steps:
            raise ValueError(
                f"warmup_steps: expected at most steps = {self.steps}, got {self.warmup_steps}"
            )

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one optimizer step sees."""
        return self.batch_size * self.accumulation * self.sequence_length

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON values."""
        return dataclasses.asdict(self)

    def _check_int(self, name: str, *, least: int) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}: expected an int, got {type(value).__name__} {value!r}")
        if value < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}")

    def _check_float(
        self,
        name: str,
        *,
        least: float = -math.inf,
        above: float = -math.inf,
        most: float = math.inf,
        below: float = math.inf,
    ) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"{name}: expected a number, got {type(value).__name__} {value!r}")
        if not (math.isfinite(value) and least <= value <= most and above < value < below):
            bounds = [
                f"{sign} {bound:g}"
                for sign, bound in ((">=", least), (">", above), ("<=", most), ("<", below))
                if math.isfinite(bound)
            ]
            raise ValueError(f"{name}: expected a number {' and '.join(bounds)}, got {value}")
