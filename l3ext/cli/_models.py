"""Finding and loading the model that a command was pointed at."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def usable_device(name: str) -> torch.device:
    """The device that ``--device`` names.

    Raises:
        ValueError: not one of those that l3ext computes on.
        RuntimeError: one that is not here.
    """
    import torch

    import l3ext

    if name.split(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f"--device: expected cpu or cuda, got {name!r}")
    device = torch.device(name)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise RuntimeError(f"--device {name}: torch finds no CUDA device here")
        if not l3ext.has_cuda:
            raise RuntimeError(f"--device {name}: this build of l3ext has no CUDA kernels")
    return device


def model_directory(path: Path) -> Path:
    """``path`` if it is a model's directory, else its newest checkpoint if it is a run's.

    A checkpoint of a run is verified by size and checksum.

    Raises:
        OSError: neither, or damaged.
    """
    from l3ext.training.checkpoint import MANIFEST, Checkpoint, latest_checkpoint

    if (path / MANIFEST).is_file():
        return Checkpoint.open(path).path
    if (path / "config.json").is_file():
        return path
    found = latest_checkpoint(path)
    if found is None:
        raise FileNotFoundError(
            errno.ENOENT, "expected a model's directory or a run of l3ext train", str(path)
        )
    return found.path


def load_model(directory: Path) -> PreTrainedModel:
    """The causal language model in ``directory``; OSError if its weights cannot be read."""
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    import l3ext.models  # noqa: F401  (registers the models with lookup layers)

    logging.disable_progress_bar()
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            directory, local_files_only=True
        )
    except SafetensorError as error:
        reason = f"its weights cannot be read ({error})"
        raise OSError(errno.EIO, reason, str(directory)) from error
    return model
