"""Two models of equal active size, trained on the same tokens in the same order."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sizes import Sizes
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from l3ext import Allocation
from l3ext.models import L3LlamaConfig, L3LlamaForCausalLM
from l3ext.training import TrainConfig, evaluate, train
from l3ext.training.log import read_log
from l3ext.training.parameters import count_parameters

_SEED = 0


@dataclass(frozen=True)
class Trained:
    """A trained model and what the report says of it."""

    model: PreTrainedModel
    checkpoint: Path
    facts: dict[str, Any]


def build_l3(sizes: Sizes, vocab_size: int, allocation: Allocation) -> PreTrainedModel:
    """The Llama with lookup layers."""
    torch.manual_seed(_SEED)
    return L3LlamaForCausalLM(
        L3LlamaConfig(
            **_shared(sizes, vocab_size),
            intermediate_size=sizes.l3_intermediate_size,
            l3_layers=sizes.l3_layers,
            l3_d_emb=sizes.l3_d_emb,
            l3_d_up=sizes.l3_d_up,
            allocation=allocation,
        )
    )


def build_dense(sizes: Sizes, vocab_size: int, *, active: int) -> PreTrainedModel:
    """The same Llama without lookup layers, its MLPs widened to at least ``active`` parameters."""
    per_unit = 3 * sizes.hidden_size * sizes.layers  # gate, up and down of every layer
    width = sizes.l3_intermediate_size
    shared = _shared(sizes, vocab_size)
    torch.manual_seed(_SEED)
    narrow = LlamaForCausalLM(LlamaConfig(**shared, intermediate_size=width))
    missing = active - count_parameters(narrow).active
    width += max(0, math.ceil(missing / per_unit))
    torch.manual_seed(_SEED)
    return LlamaForCausalLM(LlamaConfig(**shared, intermediate_size=width))


def train_and_measure(
    name: str,
    model: PreTrainedModel,
    sizes: Sizes,
    *,
    tokens: npt.NDArray[np.integer],
    held_out: npt.NDArray[np.integer],
    tokenizer: PreTrainedTokenizerFast,
    output: Path,
) -> Trained:
    """Train ``model``; its held-out perplexity is over the same sequences for every model."""
    config = TrainConfig(
        steps=sizes.steps,
        sequence_length=sizes.sequence_length,
        batch_size=sizes.batch_size,
        learning_rate=sizes.learning_rate,
        embedding_learning_rate=sizes.embedding_learning_rate,
        table_learning_rate=sizes.table_learning_rate,
        warmup_steps=sizes.warmup_steps,
        min_learning_rate=0.05,
        eval_every=max(1, sizes.steps // sizes.evaluations),
        eval_sequences=128,
        seed=_SEED,
    )
    count = count_parameters(model)
    result = train(
        model,
        tokens,
        config,
        output=output,
        eval_tokens=held_out,
        tokenizer=tokenizer,
        label=name,
    )
    final = evaluate(
        model,
        held_out,
        sequence_length=sizes.sequence_length,
        batch_size=16,
        max_sequences=max(1, sizes.eval_tokens // sizes.sequence_length),
    )
    records = read_log(result.log)
    seconds = sum(record["seconds"] for record in records)
    facts = {
        "ppl": final.perplexity,
        "loss": final.loss,
        "eval_tokens": final.tokens,
        "parameters": asdict(count),
        "intermediate_size": model.config.intermediate_size,
        "train_tokens": result.tokens,
        "train_seconds": seconds,
        "train_tokens_per_second": result.tokens / seconds,
        "config": config.to_dict(),
        "curve": [
            {k: r[k] for k in ("step", "tokens", "loss", "eval_loss", "seconds") if k in r}
            for r in records
        ],
    }
    return Trained(model=model, checkpoint=result.checkpoint, facts=facts)


def _shared(sizes: Sizes, vocab_size: int) -> dict[str, Any]:
    return {
        "vocab_size": vocab_size,
        "hidden_size": sizes.hidden_size,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.heads,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": 0,
    }
