"""Byte-level BPE, trained on the corpus at hand."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
_LEAST_VOCAB = 257  # every byte and the end of a text


def train_tokenizer(documents: Iterable[str], *, vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE; every string encodes, and decodes to itself.

    Id 0 is the end-of-text token. A corpus too small for ``vocab_size`` gives fewer ids.

    Args:
        documents: the corpus.
        vocab_size: ids in all, at least 257.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab_size < _LEAST_VOCAB:
        raise ValueError(f"vocab_size: expected at least {_LEAST_VOCAB}, got {vocab_size}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_non_empty(documents), trainer)
    return _wrap(tokenizer)


def load_tokenizer(path: str | os.PathLike[str]) -> PreTrainedTokenizerFast:
    """Read a ``tokenizer.json``, or a directory (a checkpoint) that holds one; OSError if none."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    path = Path(path)
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(errno.ENOENT, "expected a tokenizer.json", str(file))
    try:
        if path.is_dir():  # tokenizer_config.json beside it names the special tokens
            return PreTrainedTokenizerFast.from_pretrained(path, local_files_only=True)
        return _wrap(Tokenizer.from_file(str(file)))
    except Exception as error:  # tokenizers raises bare Exception for a file it cannot parse
        raise OSError(errno.EIO, f"not a readable tokenizer ({error})", str(file)) from error


def _wrap(tokenizer: object) -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast

    has_end = tokenizer.token_to_id(END_OF_TEXT) is not None  # type: ignore[attr-defined]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT if has_end else None,
        clean_up_tokenization_spaces=False,
    )


def _non_empty(documents: Iterable[str]) -> Iterator[str]:
    seen = False
    for document in documents:
        seen = seen or bool(document)
        yield document
    if not seen:
        raise ValueError("documents: expected some text, got none")
