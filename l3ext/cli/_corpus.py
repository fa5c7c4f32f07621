"""A run's corpus: tokenised once into the run's directory, found again when it resumes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from l3ext.cli._output import remark

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from l3ext.corpus import TokenChunk
    from l3ext.training import TokenFile

RECORD = "corpus.json"
TOKENS = "corpus.tokens"
TOKENIZER = "tokenizer.json"


def prepare_tokens(
    corpus: list[Path],
    output: Path,
    *,
    tokenizer: Path | None,
    vocab_size: int,
    column: str,
    split: str,
) -> tuple[PreTrainedTokenizerFast, TokenFile]:
    """The tokenizer and the tokens of ``corpus``, made in ``output`` or found there.

    ``output`` keeps a record of what the tokens were made from: files (path, size, time of the
    last change) and options. With another corpus or other options it is refused, not mixed up.

    Raises:
        OSError: a corpus file cannot be read.
        ValueError: ``output`` holds the tokens of another corpus, or a token file came without the
            tokenizer that made it.
    """
    from l3ext.corpus import TOKEN_SUFFIXES, read_documents, read_tokens
    from l3ext.training import TokenFile, train_tokenizer, write_token_file
    from l3ext.training.token_file import is_token_file
    from l3ext.training.tokenizer import load_tokenizer

    ready = len(corpus) == 1 and is_token_file(corpus[0])
    if ready and tokenizer is None:
        raise ValueError("--tokenizer: a token file needs the tokenizer that made it")
    record: dict[str, Any] = {
        "files": [_identify(path) for path in corpus],
        "tokenizer": _identify(tokenizer) if tokenizer is not None else vocab_size,
        "column": column,
        "split": split,
    }
    if (output / RECORD).is_file():
        _check_same(record, output / RECORD)
        file = TokenFile.open(corpus[0] if ready else output / TOKENS)
        return load_tokenizer(output / TOKENIZER), file
    if tokenizer is not None:
        text_tokenizer = load_tokenizer(tokenizer)
    else:
        remark(f"training a tokenizer of {vocab_size:,} ids")
        documents = read_documents(corpus, column=column, split=split)
        text_tokenizer = train_tokenizer(documents, vocab_size=vocab_size)
    text_tokenizer.backend_tokenizer.save(str(output / TOKENIZER))
    if ready:
        file = TokenFile.open(corpus[0])
    else:
        remark(f"tokenising into {output / TOKENS}")
        size = len(text_tokenizer)
        options: dict[str, Any] = {"column": column, "split": split, "vocab_size": size}
        chunks = (
            chunk if path.suffix in TOKEN_SUFFIXES else _end_documents(chunk, text_tokenizer)
            for path in corpus
            for chunk in read_tokens(path, tokenizer=text_tokenizer, **options)
        )
        file = write_token_file(output / TOKENS, chunks, vocab_size=size)
    (output / RECORD).write_text(json.dumps(record, indent=2))  # last: what it names is whole
    return text_tokenizer, file


def _end_documents(chunk: TokenChunk, tokenizer: PreTrainedTokenizerFast) -> TokenChunk:
    """The chunk with an end-of-text token after each document, if the tokenizer has one."""
    import numpy as np

    from l3ext.corpus import TokenChunk

    end = tokenizer.eos_token_id
    if end is None:
        return chunk
    return TokenChunk(
        tokens=np.insert(chunk.tokens, chunk.offsets[1:], end),
        offsets=chunk.offsets + np.arange(len(chunk.offsets)),
    )


def _identify(path: Path) -> list[str | int]:
    status = path.stat()
    return [str(path.resolve()), status.st_size, status.st_mtime_ns]


def _check_same(record: dict[str, Any], path: Path) -> None:
    try:
        before = json.loads(path.read_text())
        differing = [name for name in record if before.get(name) != record[name]]
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path}: not the record of a run's corpus ({error})") from error
    if differing:
        raise ValueError(
            f"--output: {path.parent} holds the tokens of another corpus or other options "
            f"({', '.join(differing)} changed): choose another directory"
        )
