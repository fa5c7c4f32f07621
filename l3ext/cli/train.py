"""``l3ext train``: a corpus becomes a model with lookup layers (or a dense one)."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from l3ext.cli._output import JsonOption, print_json, remark

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from l3ext.allocation import Allocation
    from l3ext.training import TokenFile


def train(
    corpus: Annotated[
        list[Path],
        typer.Argument(help="Text, JSONL or Parquet files; or one token file of an earlier run."),
    ],
    output: Annotated[Path, typer.Option(help="The run's directory; a run there is resumed.")],
    steps: Annotated[int, typer.Option(help="Optimizer steps of the whole run.")],
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="tokenizer.json, or a directory that holds one; else one is trained."),
    ] = None,
    vocab_size: Annotated[int, typer.Option(help="Of a tokenizer that is trained.")] = 8192,
    column: Annotated[str, typer.Option(help="Text column of JSONL and Parquet.")] = "text",
    split: Annotated[str, typer.Option(help="What a document of a text file is.")] = "line",
    eval_fraction: Annotated[
        float, typer.Option(help="Share of the tokens, at the end, that is held out.")
    ] = 0.02,
    hidden_size: Annotated[int, typer.Option(min=1, help="Width of the model.")] = 256,
    intermediate_size: Annotated[int, typer.Option(min=1, help="Width of the MLPs.")] = 688,
    layers: Annotated[int, typer.Option(min=1, help="Decoder layers.")] = 6,
    heads: Annotated[int, typer.Option(min=1, help="Attention heads.")] = 4,
    dense: Annotated[bool, typer.Option("--dense", help="No lookup layers at all.")] = False,
    l3_layers: Annotated[
        str | None,
        typer.Option(help="Decoder layers that a lookup layer follows, as 2,4; else the middle."),
    ] = None,
    l3_d_emb: Annotated[
        int | None, typer.Option(min=1, help="Width of values; else the model's.")
    ] = None,
    l3_d_up: Annotated[
        int | None, typer.Option(min=1, help="Width of up-projection; else 2x.")
    ] = None,
    l3_tied: Annotated[bool, typer.Option("--l3-tied", help="Values are the keys.")] = False,
    allocation: Annotated[
        Path | None, typer.Option(help="Of l3ext allocate; else made from the corpus.")
    ] = None,
    rows_per_token: Annotated[
        float, typer.Option(help="Rows of a table, as a multiple of the vocabulary.")
    ] = 4.0,
    max_rows: Annotated[int, typer.Option(help="Rows of one token at most.")] = 512,
    sequence_length: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 512,
    batch_size: Annotated[int, typer.Option(help="Sequences of a forward pass.")] = 8,
    accumulation: Annotated[int, typer.Option(help="Forward passes of a step.")] = 1,
    learning_rate: Annotated[float, typer.Option(help="Peak, of matrices.")] = 1e-3,
    embedding_learning_rate: Annotated[float, typer.Option(help="Peak, of embeddings.")] = 1e-2,
    table_learning_rate: Annotated[float, typer.Option(help="Peak, of lookup tables.")] = 1e-2,
    warmup_steps: Annotated[int | None, typer.Option(help="Else 5 % of the steps.")] = None,
    weight_decay: Annotated[float, typer.Option(help="Of matrices.")] = 0.1,
    clip_norm: Annotated[float, typer.Option(help="Bound of the gradient's norm.")] = 1.0,
    bf16: Annotated[bool, typer.Option("--bf16", help="bfloat16 autocast.")] = False,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, more time.")
    ] = False,
    eval_every: Annotated[int, typer.Option(help="Steps; 0: only at the end.")] = 0,
    eval_sequences: Annotated[int, typer.Option(help="Sequences of an evaluation.")] = 64,
    checkpoint_every: Annotated[int, typer.Option(help="Steps; 0: only at the end.")] = 500,
    keep_checkpoints: Annotated[int, typer.Option(help="The newest that stay.")] = 2,
    seed: Annotated[int, typer.Option(help="Of weights, order and dropout.")] = 0,
    device: Annotated[str, typer.Option(help="Where to train, as torch names it.")] = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Train a language model with lookup layers on a corpus.

    Started again with the same options it resumes from the newest checkpoint, to the same bits.
    Ctrl-C writes a checkpoint first.

    \b
    Examples:
      l3ext train book.txt --output runs/first --steps 2000
      l3ext train *.jsonl --column content --output runs/code --steps 20000 --bf16
      l3ext train runs/first/corpus.tokens --tokenizer runs/first/tokenizer.json \\
          --dense --output runs/dense --steps 2000
    """
    from l3ext.cli._corpus import prepare_tokens
    from l3ext.cli._models import usable_device
    from l3ext.training import TrainConfig
    from l3ext.training import train as run_training
    from l3ext.training.parameters import count_parameters

    config = TrainConfig(
        steps=steps,
        sequence_length=sequence_length,
        batch_size=batch_size,
        accumulation=accumulation,
        learning_rate=learning_rate,
        embedding_learning_rate=embedding_learning_rate,
        table_learning_rate=table_learning_rate,
        warmup_steps=max(1, steps // 20) if warmup_steps is None else warmup_steps,
        weight_decay=weight_decay,
        clip_norm=clip_norm,
        precision="bfloat16" if bf16 else "float32",
        gradient_checkpointing=gradient_checkpointing,
        eval_every=eval_every,
        eval_sequences=eval_sequences,
        checkpoint_every=checkpoint_every,
        keep_checkpoints=keep_checkpoints,
        seed=seed,
        device=device,
    )
    if not 0.0 < eval_fraction < 1.0:
        raise ValueError(f"--eval-fraction: expected a number between 0 and 1, got {eval_fraction}")
    # What the corpus does not decide shows before it is read.
    usable_device(device)
    if hidden_size % (2 * heads) != 0:
        raise ValueError(
            f"--heads: expected heads of an even width in --hidden-size {hidden_size}, got {heads}"
        )
    if not math.isfinite(rows_per_token):
        raise ValueError(f"--rows-per-token: expected a number, got {rows_per_token}")
    output.mkdir(parents=True, exist_ok=True)
    text_tokenizer, file = prepare_tokens(
        corpus, output, tokenizer=tokenizer, vocab_size=vocab_size, column=column, split=split
    )
    cut = len(file.tokens) - int(len(file.tokens) * eval_fraction)
    sizes: dict[str, Any] = {
        "vocab_size": file.vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": max(2048, sequence_length),
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": text_tokenizer.eos_token_id,
    }
    if not dense:
        sizes |= {
            "l3_layers": _parse_layers(l3_layers, layers),
            "l3_d_emb": l3_d_emb or hidden_size,
            "l3_d_up": l3_d_up or 2 * hidden_size,
            "l3_tied": l3_tied,
            "allocation": _allocate(file, cut, allocation, rows_per_token, max_rows),
        }
    model = build_model(sizes, seed=seed)
    count = count_parameters(model)
    remark(
        f"{count.total:,} parameters, {count.active:,} active; {cut:,} training tokens, "
        f"{len(file.tokens) - cut:,} held out, {config.tokens_per_step:,} a step"
    )
    result = run_training(
        model,
        file.tokens[:cut],
        config,
        output=output,
        eval_tokens=file.tokens[cut:],
        tokenizer=text_tokenizer,
    )
    assert result.evaluation is not None
    summary = {
        "checkpoint": str(result.checkpoint),
        "log": str(result.log),
        "steps": result.steps,
        "tokens": result.tokens,
        "resumed_from": result.resumed_from,
        "seconds": result.seconds,
        "eval_loss": result.evaluation.loss,
        "eval_perplexity": result.evaluation.perplexity,
        "parameters": dataclasses.asdict(count),
    }
    if as_json:
        print_json(summary)
    else:
        typer.echo(
            f"held-out perplexity {result.evaluation.perplexity:.2f} after {result.steps} steps; "
            f"{result.checkpoint}"
        )


def build_model(sizes: dict[str, Any], *, seed: int) -> PreTrainedModel:
    """A freshly initialised Llama of these sizes, with lookup layers if they name an allocation."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    if "allocation" not in sizes:
        return LlamaForCausalLM(LlamaConfig(**sizes))
    from l3ext.models import L3LlamaConfig, L3LlamaForCausalLM

    return L3LlamaForCausalLM(L3LlamaConfig(**sizes))


def _allocate(
    file: TokenFile, cut: int, given: Path | None, rows_per_token: float, max_rows: int
) -> Allocation:
    """The allocation in the file ``given``, else one by LZW over the training tokens."""
    import numpy as np

    import l3ext

    if given is not None:
        return l3ext.Allocation.load(given)
    remark("allocating rows by LZW")
    offsets = np.append(file.offsets[file.offsets < cut], cut)
    return l3ext.allocate(
        file.tokens[:cut],
        offsets,
        vocab_size=file.vocab_size,
        total_rows=int(rows_per_token * file.vocab_size),
        max_rows=max_rows,
    )


def _parse_layers(text: str | None, layers: int) -> list[int]:
    if text is None:
        return [max(1, layers // 2)]
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--l3-layers: expected numbers such as 2,4, got {text!r}") from None
