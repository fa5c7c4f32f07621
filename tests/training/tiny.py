"""A model and a corpus small enough for a step to take milliseconds."""

from __future__ import annotations

import numpy as np
import torch

VOCAB = 64


def build_model(seed: int = 0, **changes):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    settings = {
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
        "attention_dropout": 0.1,  # so that a resumed run needs the random generator's state
    }
    return LlamaForCausalLM(LlamaConfig(**{**settings, **changes}))


def build_tokens(count: int = 4000, seed: int = 0) -> np.ndarray:
    """A noisy cycle: predictable, so that a loss can fall."""
    rng = np.random.default_rng(seed)
    tokens = (np.arange(count) * 7) % VOCAB
    noise = rng.random(count) < 0.1
    tokens[noise] = rng.integers(0, VOCAB, noise.sum())
    return tokens.astype(np.uint16)
