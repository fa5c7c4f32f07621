"""How large the demo is. Fixed numbers: a slow machine takes longer, the results stay the same."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sizes:
    """Everything that decides what the demo computes, and so how long it takes."""

    vocab_size: int
    corpus_bytes: int  # text read at most
    hidden_size: int
    layers: int
    heads: int
    l3_intermediate_size: int  # the dense model's is widened until it has as many active parameters
    l3_layers: tuple[int, ...]
    l3_d_emb: int
    l3_d_up: int
    rows_per_token: int  # table rows, as a multiple of the vocabulary
    max_rows: int
    sequence_length: int
    batch_size: int
    steps: int
    warmup_steps: int
    evaluations: int
    eval_tokens: int  # of the final evaluation, at most
    new_tokens: int
    repetitions: int  # of the three tiers, each forth and back
    cache_bytes: int  # rows of the most frequent tokens that stay beside the model

    # The first two were chosen for the dense model, by its held-out perplexity after 400 steps, and
    # serve both models. Dense, at rates (matrices, embeddings): (3e-3, 6e-3) 110.9, (3e-3, 2e-2)
    # 83.0, (3e-3, 4e-2) 75.1, (3e-3, 8e-2) 78.4, (5e-3, 2e-2) 95.8. With L3 at the first three:
    # 81.7, 74.0, 70.3; its table's rate was not tuned at this size.
    learning_rate: float = 3e-3
    embedding_learning_rate: float = 4e-2
    table_learning_rate: float = 1e-2


DEMO = Sizes(
    vocab_size=4096,
    corpus_bytes=16 << 20,
    hidden_size=64,
    layers=3,
    heads=2,
    l3_intermediate_size=172,
    l3_layers=(2,),
    l3_d_emb=64,
    l3_d_up=128,
    rows_per_token=8,
    max_rows=128,
    sequence_length=128,
    batch_size=16,
    steps=640,
    warmup_steps=50,
    evaluations=5,
    eval_tokens=250_000,
    new_tokens=96,
    repetitions=3,
    cache_bytes=1 << 20,
)

# The same path in seconds, for the tests: too small to learn anything.
TINY = Sizes(
    vocab_size=300,
    corpus_bytes=600_000,
    hidden_size=32,
    layers=2,
    heads=2,
    l3_intermediate_size=64,
    l3_layers=(1,),
    l3_d_emb=16,
    l3_d_up=32,
    rows_per_token=4,
    max_rows=16,
    sequence_length=32,
    batch_size=4,
    steps=12,
    warmup_steps=2,
    evaluations=2,
    eval_tokens=2_000,
    new_tokens=8,
    repetitions=1,
    cache_bytes=1 << 12,
)
