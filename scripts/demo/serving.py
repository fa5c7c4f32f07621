"""The same prompts with the tables in the model, in RAM outside it, and on disk."""

from __future__ import annotations

import dataclasses
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from sizes import Sizes
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import l3ext
from l3ext.models import L3LlamaForCausalLM

TIERS = ("resident", "ram", "disk")
_TIMELINE_STEPS = 12


@dataclasses.dataclass(frozen=True)
class Run:
    """One pass over the prompts."""

    ids: list[list[int]]
    seconds: float
    exposed_seconds: float
    new_tokens: int


def serve(
    checkpoint: Path,
    prompts: list[str],
    tokenizer: PreTrainedTokenizerFast,
    sizes: Sizes,
    *,
    table_file: Path,
) -> dict[str, Any]:
    """Generate in every tier, forth and back (ABBA), and compare ids, speed and exposed time."""
    models: dict[str, PreTrainedModel] = {}
    runtimes: dict[str, Any] = {}
    for tier in TIERS:
        models[tier] = L3LlamaForCausalLM.from_pretrained(checkpoint).eval()
        if tier != "resident":
            runtimes[tier] = l3ext.offload(
                models[tier],
                tier=tier,
                path=table_file if tier == "disk" else None,
                cache_bytes=sizes.cache_bytes,
            )
    runs: dict[str, list[Run]] = {tier: [] for tier in TIERS}
    try:
        for tier in TIERS:  # first calls pay for what later ones find done
            _generate(models[tier], prompts[:1], tokenizer, new_tokens=4, runtime=None)
        for _ in range(sizes.repetitions):
            for tier in (*TIERS, *reversed(TIERS)):
                runs[tier].append(
                    _generate(
                        models[tier],
                        prompts,
                        tokenizer,
                        new_tokens=sizes.new_tokens,
                        runtime=runtimes.get(tier),
                    )
                )
        timelines = {tier: _timeline(runtime) for tier, runtime in runtimes.items()}
        placements = {
            tier: dataclasses.asdict(runtime.placement) for tier, runtime in runtimes.items()
        }
    finally:
        for runtime in runtimes.values():
            runtime.close()
    reference = runs["resident"][0].ids
    speeds = {tier: [run.new_tokens / run.seconds for run in runs[tier]] for tier in TIERS}
    return {
        "outputs_equal": all(run.ids == reference for tier in TIERS for run in runs[tier]),
        "tokens_per_second": {tier: statistics.median(speeds[tier]) for tier in TIERS},
        "tokens_per_second_all": speeds,
        "exposed_fraction": {
            tier: sum(run.exposed_seconds for run in runs[tier])
            / sum(run.seconds for run in runs[tier])
            for tier in runtimes
        },
        "samples": [
            {"prompt": prompt, "text": tokenizer.decode(ids)}
            for prompt, ids in zip(prompts, reference, strict=True)
        ],
        "new_tokens": sizes.new_tokens,
        "runs_per_tier": 2 * sizes.repetitions,
        "cache_bytes": sizes.cache_bytes,
        "placement": placements,
        "timeline": timelines,
    }


def _generate(
    model: PreTrainedModel,
    prompts: list[str],
    tokenizer: PreTrainedTokenizerFast,
    *,
    new_tokens: int,
    runtime: Any,
) -> Run:
    """Sample ``new_tokens`` after each prompt; equal logits give equal ids, unequal ones do not."""
    all_ids: list[list[int]] = []
    exposed_before = runtime.ledger.totals.exposed_us if runtime is not None else 0.0
    started = time.perf_counter()
    for number, prompt in enumerate(prompts):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        torch.manual_seed(number)
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            do_sample=True,
            temperature=0.7,
            top_k=40,
            pad_token_id=0,
        )
        all_ids.append(output[0, ids.shape[1] :].tolist())
    seconds = time.perf_counter() - started
    exposed_after = runtime.ledger.totals.exposed_us if runtime is not None else 0.0
    return Run(
        ids=all_ids,
        seconds=seconds,
        exposed_seconds=(exposed_after - exposed_before) / 1e6,
        new_tokens=new_tokens * len(prompts),
    )


def _timeline(runtime: Any) -> list[dict[str, Any]]:
    """The last decode steps of the ledger; all of one generation, prefill left out."""
    steps = runtime.ledger.steps[-_TIMELINE_STEPS:]
    return [dataclasses.asdict(step) for step in steps]
