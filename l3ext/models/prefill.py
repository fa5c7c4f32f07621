"""Long prompts of an offloaded model: chunk by chunk, the next one's rows on their way."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, LlamaModel

_CACHE_NAMES = ("cache", "past_key_values")
#: What transformers' decoders call their cache of keys and values, as an argument and in what they
#: return: renamed within version 5; the old name is taken for a while.
CACHE_NAME = next(
    name for name in _CACHE_NAMES if name in inspect.signature(LlamaModel.forward).parameters
)

# What says how to run, not what to compute, or is cut along with the ids.
_CUT_ALONG = ("attention_mask", "position_ids", *_CACHE_NAMES, "inputs_embeds", "use_cache")
_OUTPUTS = ("output_hidden_states", "output_attentions")


def chunk_length(runtime: Any, config: Any, token_ids: Tensor, kwargs: dict[str, Any]) -> int:
    """Positions a sequence of a chunk of this call; 0: it must run whole.

    In chunks runs what has more positions than ``runtime.prefill_chunk`` over all sequences, keeps
    keys and values in a cache, and has no gradient: only then is a prompt in pieces the same
    computation. What cannot be cut along with the ids (a mask of four dimensions, packed sequences,
    outputs of every layer) runs whole too, and so does a call with a cache under both names: what
    that is, an error or a warning, transformers says itself.
    """
    limit = runtime.prefill_chunk
    if token_ids.dim() != 2 or not 0 < limit < token_ids.numel():
        return 0
    batch, length = token_ids.shape
    if all(kwargs.get(name) is not None for name in _CACHE_NAMES):
        return 0  # which one counts, or that neither does, is for transformers to say
    cache = _cache_of(kwargs)
    use_cache = kwargs.get("use_cache")
    keeps = config.use_cache if use_cache is None else use_cache
    if not keeps or not (cache is None or isinstance(cache, Cache)):
        return 0
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return 0
    past = 0 if cache is None else cache.get_seq_length()
    mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
    if mask is not None and (not isinstance(mask, Tensor) or mask.shape != (batch, past + length)):
        return 0
    if positions is not None and positions.shape[-1] != length:
        return 0
    if any(kwargs.get(name) or getattr(config, name, False) for name in _OUTPUTS):
        return 0
    if kwargs.get("return_dict") is False:
        return 0
    others = (value for name, value in kwargs.items() if name not in _CUT_ALONG)
    if any(isinstance(value, Tensor) for value in others):
        return 0
    chunk = max(1, limit // batch)
    return chunk if chunk < length else 0


def run_in_chunks(
    runtime: Any,
    token_ids: Tensor,
    chunk: int,
    run: Callable[..., Any],
    input_ids: Tensor | None,
    kwargs: dict[str, Any],
) -> Any:
    """Run a decoder over a prompt in chunks; while one is computed the next one's rows come.

    Args:
        runtime: that serves the tables.
        token_ids: integers [batch, sequence] that the lookup layers see.
        chunk: positions a sequence.
        run: the decoder: takes ``input_ids``, ``l3_step`` and ``kwargs``.
        input_ids: as ``token_ids``, or None where ``kwargs`` hold ``inputs_embeds``.
        kwargs: of the whole call.

    Returns:
        The last chunk's output, with the hidden states of all.
    """
    cache = _cache_of(kwargs)
    kwargs = {name: value for name, value in kwargs.items() if name not in _CACHE_NAMES}
    past = 0 if cache is None else cache.get_seq_length()
    length = token_ids.shape[1]
    starts = range(0, length, chunk)
    hidden = []
    with contextlib.ExitStack() as steps:
        step = steps.enter_context(runtime.begin(token_ids[:, :chunk]))
        for start in starts:
            end = min(start + chunk, length)
            following = None
            if end < length:
                following = steps.enter_context(runtime.begin(token_ids[:, end : end + chunk]))
            part = _part(kwargs, start, end, past)
            ids = None if input_ids is None else input_ids[:, start:end]
            output = run(ids, l3_step=step, **part | {CACHE_NAME: cache})
            step.end()
            cache = getattr(output, CACHE_NAME)
            hidden.append(output.last_hidden_state)
            step = following
    output.last_hidden_state = torch.cat(hidden, dim=1)
    return output


def _cache_of(kwargs: dict[str, Any]) -> Any:
    """The cache that a call came with, under either name, or None."""
    given = (kwargs.get(name) for name in _CACHE_NAMES)
    return next((cache for cache in given if cache is not None), None)


def _part(kwargs: dict[str, Any], start: int, end: int, past: int) -> dict[str, Any]:
    part = dict(kwargs)
    if part.get("attention_mask") is not None:
        part["attention_mask"] = part["attention_mask"][:, : past + end]
    if part.get("position_ids") is not None:
        part["position_ids"] = part["position_ids"][..., start:end]
    if part.get("inputs_embeds") is not None:
        part["inputs_embeds"] = part["inputs_embeds"][:, start:end]
    return part
