"""The demo's text: the sources of Python's standard library, or a file of the user's."""

from __future__ import annotations

import errno
import hashlib
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerFast

# Not the library itself, its tests, and what machines wrote: code tables that differ in a few
# characters, the manual's text in one string.
_SKIPPED = {
    *("site-packages", "dist-packages", "test", "tests", "idle_test"),
    *("encodings", "pydoc_data"),
}
_HELD_OUT_SHARE = 0.1
_TAIL_SHARE = 0.05  # of a user's file
_LEAST_BYTES = 50_000
_CODE_PROMPTS = (
    "def read(self, size=-1):\n",
    "import os\nimport sys\n\n",
    "class Error(Exception):\n",
)


@dataclass(frozen=True)
class Corpus:
    """Documents to train on, documents held out, and prompts to continue."""

    name: str
    train: list[str]
    held_out: list[str]
    prompts: list[str]


@dataclass(frozen=True)
class Chunk:
    """Token ids of some documents, and where each begins."""

    tokens: npt.NDArray[np.int32]
    offsets: npt.NDArray[np.int64]


def standard_library(*, limit: int) -> Corpus:
    """The ``.py`` files of Python's standard library, tests left out: about ``limit`` bytes.

    A file is held out, or not, by a hash of its name: the same on every machine. A text that came
    before is left out, so that nothing held out was trained on.
    """
    root = Path(sysconfig.get_path("stdlib"))
    train: list[str] = []
    held_out: list[tuple[float, str]] = []
    seen: set[str] = set()
    size = 0
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if _SKIPPED & set(name.parts):
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        if text in seen:
            continue
        seen.add(text)
        size += len(text.encode())
        digest = hashlib.sha256(name.as_posix().encode()).digest()
        share = int.from_bytes(digest[:8], "big") / 2**64
        if share < _HELD_OUT_SHARE:
            held_out.append((share, text))
        else:
            train.append(text)
        if size > limit and train and held_out:
            break
    if not train or not held_out:
        raise OSError(errno.ENOENT, "expected Python's sources here; try --text FILE", str(root))
    version = sysconfig.get_python_version()
    return Corpus(
        name=f"the Python {version} standard library",
        train=train,
        # Shuffled by the same hash: the first part of it stands for the whole.
        held_out=[text for _, text in sorted(held_out)],
        prompts=list(_CODE_PROMPTS),
    )


def text_file(path: Path, *, limit: int) -> Corpus:
    """The first ``limit`` bytes of a text, its paragraphs as documents; the tail is held out."""
    with open(path, "rb") as stream:
        text = stream.read(limit).decode("utf-8", errors="replace")
    if len(text.encode()) < _LEAST_BYTES:
        raise ValueError(f"--text: expected at least {_LEAST_BYTES} bytes, {path} holds fewer")
    paragraphs = [part + "\n\n" for part in text.split("\n\n") if part.strip()]
    if len(paragraphs) < 20:  # one long line, or lines without paragraphs
        paragraphs = [text[at : at + 2000] for at in range(0, len(text), 2000)]
    cut = max(1, int(len(paragraphs) * (1 - _TAIL_SHARE)))
    train, held_out = paragraphs[:cut], paragraphs[cut:]
    longest = sorted(held_out, key=len, reverse=True)[:3]
    prompts = [" ".join(paragraph.split(" ")[:8]) for paragraph in longest]
    return Corpus(name=path.name, train=train, held_out=held_out, prompts=prompts)


def tokenise(documents: Iterable[str], tokenizer: PreTrainedTokenizerFast) -> Iterator[Chunk]:
    """Token ids of ``documents``, an end-of-text token after each, a few hundred at a time."""
    batch: list[str] = []
    for document in documents:
        batch.append(document)
        if len(batch) == 256:
            yield _encode(batch, tokenizer)
            batch = []
    if batch:
        yield _encode(batch, tokenizer)


def _encode(documents: list[str], tokenizer: PreTrainedTokenizerFast) -> Chunk:
    end = [tokenizer.eos_token_id]
    parts = [encoding.ids + end for encoding in tokenizer.backend_tokenizer.encode_batch(documents)]
    lengths = np.array([len(part) for part in parts], np.int64)
    tokens = np.concatenate([np.array(part, np.int32) for part in parts])
    return Chunk(tokens, np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]))
