"""Training: a corpus becomes tokens, tokens train a causal language model, runs survive a kill.

from l3ext.training import TrainConfig, train, evaluate

result = train(model, tokens, TrainConfig(steps=1000), output="runs/first")
evaluate(model, held_out, sequence_length=1024).perplexity
"""

from __future__ import annotations

from l3ext.training.checkpoint import Checkpoint, CheckpointWarning, latest_checkpoint
from l3ext.training.config import TrainConfig
from l3ext.training.evaluation import Evaluation, evaluate
from l3ext.training.loop import TrainResult, train
from l3ext.training.token_file import TokenFile, write_token_file
from l3ext.training.tokenizer import train_tokenizer

__all__ = [
    "Checkpoint",
    "CheckpointWarning",
    "Evaluation",
    "TokenFile",
    "TrainConfig",
    "TrainResult",
    "evaluate",
    "latest_checkpoint",
    "train",
    "train_tokenizer",
    "write_token_file",
]
