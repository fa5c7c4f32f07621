"""Checkpoints that a reader sees whole or not at all.

A run's directory holds ``checkpoint-<step>`` directories. Each is a complete model for
``from_pretrained`` (with the tokenizer, if the run has one), the optimizer's and the random
generator's state in ``training.safetensors``, and ``training.json``: the step, the settings, and
the size and SHA-256 of every other file. It is written under a temporary name, flushed to the
device, and renamed; nothing in it is pickled.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FORMAT = "l3ext.checkpoint.1"
MANIFEST = "training.json"
STATE_FILE = "training.safetensors"
MODEL_FILE = "model.safetensors"
RNG_KEY = "rng/"  # in STATE_FILE, before the device's name; all else is the optimizer's
_NAME = re.compile(r"checkpoint-(\d+)")
_TEMPORARY = re.compile(r"checkpoint-\d+\.tmp\.\d+")


class CheckpointWarning(UserWarning):
    """A checkpoint was left aside: half written, or damaged since."""


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint: every file has the size and checksum it was written with."""

    path: Path
    step: int  # optimizer steps done
    manifest: dict[str, Any]

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Checkpoint:
        """Verify the checkpoint at ``path``; OSError naming the file that is missing or damaged."""
        path = Path(path)
        try:
            manifest = json.loads((path / MANIFEST).read_text())
            if manifest["format"] != FORMAT:
                raise ValueError(f"expected format {FORMAT!r}, got {manifest['format']!r}")
            files = {
                str(name): (int(f["bytes"]), str(f["sha256"]))
                for name, f in manifest["files"].items()
            }
            step = int(manifest["step"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise OSError(
                errno.EIO, f"not a checkpoint's manifest ({error!r})", str(path / MANIFEST)
            ) from error
        for name, expected in files.items():
            found = _fingerprint(path / name)
            if found != expected:
                what = "size" if found[0] != expected[0] else "checksum"
                raise OSError(
                    errno.EIO, f"damaged: its {what} is not the one written", str(path / name)
                )
        return cls(path, step, manifest)

    def load_model(self, model: PreTrainedModel) -> None:
        """Put the weights into ``model``, in place; ValueError where it is another model."""
        try:
            safetensors.torch.load_model(model, self.path / MODEL_FILE)
        except RuntimeError as error:  # torch's list of missing, unexpected and misshapen names
            raise ValueError(
                f"model: the weights in {self.path} belong to another model: {error}"
            ) from error

    def load_state(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The optimizer's tensors and the random generators' states by device name."""
        tensors = safetensors.torch.load_file(self.path / STATE_FILE)
        rng = {k.removeprefix(RNG_KEY): t for k, t in tensors.items() if k.startswith(RNG_KEY)}
        return {k: t for k, t in tensors.items() if not k.startswith(RNG_KEY)}, rng


def save_checkpoint(
    run: Path,
    *,
    step: int,
    model: PreTrainedModel,
    optimizer_tensors: dict[str, Tensor],
    rng: dict[str, Tensor],
    facts: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Path:
    """Write ``run/checkpoint-<step>``; on any failure nothing of it is left.

    Args:
        run: the run's directory.
        step: optimizer steps done.
        model: written by ``save_pretrained``.
        optimizer_tensors: by name, see :func:`l3ext.training.optimizer.optimizer_tensors`.
        rng: random generators' states by device name.
        facts: JSON values kept in the manifest.
        tokenizer: written beside the model.

    Raises:
        OSError: the disk is full or not writable.
    """
    target = run / f"checkpoint-{step:08d}"
    temporary = run / f"{target.name}.tmp.{os.getpid()}"
    try:
        temporary.mkdir(parents=True)
        with _without_progress_bar():
            # One file whatever the size: load_model reads one.
            model.save_pretrained(temporary, max_shard_size="1000TB")
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        state = optimizer_tensors | {RNG_KEY + device: state for device, state in rng.items()}
        safetensors.torch.save_file(state, temporary / STATE_FILE)
        files = sorted(p for p in temporary.rglob("*") if p.is_file())
        fingerprints = {str(p.relative_to(temporary)): _fingerprint(p) for p in files}
        manifest = {
            "format": FORMAT,
            "step": step,
            **facts,
            "files": {
                name: {"bytes": size, "sha256": digest}
                for name, (size, digest) in fingerprints.items()
            },
        }
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=2))
        for path in [*files, temporary / MANIFEST, temporary]:
            _flush(path)
        # A directory of this name can only be a damaged one: a whole one would have been resumed.
        shutil.rmtree(target, ignore_errors=True)
        os.replace(temporary, target)
        _flush(run)
    except SafetensorError as error:
        raise _as_os_error(error, temporary) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def latest_checkpoint(run: str | os.PathLike[str]) -> Checkpoint | None:
    """The newest whole checkpoint below ``run``, verified; None where there is none at all.

    Half-written and damaged ones are passed over with a :class:`CheckpointWarning`: an older one
    resumes to the same bits.

    Raises:
        OSError: there are checkpoints and every one is damaged.
    """
    failure: OSError | None = None
    for path in sorted(Path(run).glob("checkpoint-*"), reverse=True):
        if _TEMPORARY.fullmatch(path.name):
            warnings.warn(f"{path}: half written, ignored", CheckpointWarning, stacklevel=2)
        elif _NAME.fullmatch(path.name):
            try:
                return Checkpoint.open(path)
            except OSError as error:
                failure = error
                warnings.warn(f"ignored: {error}", CheckpointWarning, stacklevel=2)
    if failure is not None:
        raise failure
    return None


def prune_checkpoints(run: Path, *, newest: int, keep: int) -> None:
    """Keep the ``keep`` newest checkpoints up to step ``newest``; remove the others.

    What lies beyond ``newest``, the run's own step, was damaged and passed over at the start; what
    has a temporary name was left by a killed writer.
    """
    steps = {p: int(m[1]) for p in run.glob("checkpoint-*") if (m := _NAME.fullmatch(p.name))}
    whole = sorted((p for p in steps if steps[p] <= newest), key=lambda p: steps[p])
    damaged = [p for p in steps if steps[p] > newest]
    partial = [p for p in run.glob("checkpoint-*") if _TEMPORARY.fullmatch(p.name)]
    for path in [*whole[:-keep], *damaged, *partial]:
        shutil.rmtree(path, ignore_errors=True)


def rng_states(device: torch.device) -> dict[str, Tensor]:
    """The states of torch's generators that training on ``device`` draws from."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_rng_states(states: dict[str, Tensor], device: torch.device) -> None:
    """Put back what :func:`rng_states` gave, as far as ``device`` has it."""
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


@contextlib.contextmanager
def _without_progress_bar() -> Iterator[None]:
    """Keep transformers from drawing a bar of its own through the run's."""
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


def _fingerprint(path: Path) -> tuple[int, str]:
    digest = hashlib.sha256()
    size = 0
    with open(path, "rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
            size += len(block)
    return size, digest.hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _as_os_error(error: SafetensorError, path: Path) -> OSError:
    """The OSError inside a SafetensorError, whose text alone carries the system's code."""
    match = re.search(r"os error (\d+)", str(error))
    code = int(match[1]) if match else errno.EIO
    return OSError(code, os.strerror(code) if match else str(error), str(path))
