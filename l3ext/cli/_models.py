"""Finding and loading the model that a command was pointed at."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
