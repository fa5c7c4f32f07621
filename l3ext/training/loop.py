"""The training loop: deterministic, interruptible, resumable to the same bits."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from l3ext.training.checkpoint import (
    Checkpoint,
    latest_checkpoint,
    prune_checkpoints,
    rng_states,
    save_checkpoint,
    set_rng_states,
)
from l3ext.training.config import FREE_ON_RESUME, TrainConfig
from l3ext.training.evaluation import Evaluation, autocast, causal_loss, evaluate
from l3ext.training.log import StepLog
from l3ext.training.optimizer import (
    build_optimizer,
    load_optimizer_tensors,
    optimizer_tensors,
    set_learning_rate,
)
from l3ext.training.progress import TrainProgress
from l3ext.training.sampling import SequenceSampler
from l3ext.training.token_file import check_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LOG_FILE = "log.jsonl"
_RATE_WINDOW = 0.9  # weight of the past in the tokens/s that are shown


@dataclass(frozen=True)
class TrainResult:
    """What a run came to."""

    steps: int
    tokens: int  # seen in training, over all resumptions
    loss: float | None  # of the last step; None where a finished run was found
    evaluation: Evaluation | None  # after the last step; None without eval_tokens
    checkpoint: Path
    log: Path
    resumed_from: int  # the step this call began at
    seconds: float  # of this call


def train(
    model: PreTrainedModel,
    tokens: npt.NDArray[np.integer],
    config: TrainConfig,
    *,
    output: str | os.PathLike[str],
    eval_tokens: npt.NDArray[np.integer] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    label: str = "train",
    progress: bool = True,
) -> TrainResult:
    """Train ``model`` in place; resumes from the newest whole checkpoint in ``output``.

    A run that was stopped at any point, SIGKILL included, and started again with the same
    arguments ends with the same weights, bit for bit, as one that was not (on the CPU, with the
    same number of torch threads). ``output`` receives ``checkpoint-<step>`` directories and
    ``log.jsonl``, one line per step: step, loss, learning_rate, gradient_norm, tokens,
    tokens_per_second, seconds and, after an evaluation, eval_loss and eval_perplexity.

    Args:
        model: a causal language model of transformers, freshly initialised or pretrained.
        tokens: integer [T] training ids, in memory or memory-mapped.
        config: the settings; on resumption the same, but for how often to evaluate and to save.
        output: the run's directory, made if missing.
        eval_tokens: integer [T'] held-out ids.
        tokenizer: saved into every checkpoint.
        label: what progress calls the run.
        progress: show progress on stderr.

    Raises:
        ValueError: ids outside the model's vocabulary, too few tokens, or a run in ``output`` made
            with other settings, tokens or weights' shapes.
        OSError: a checkpoint or the log cannot be written (the last whole checkpoint stays).
        RuntimeError: the loss is not finite.
        KeyboardInterrupt: after Ctrl-C, once the step is done and its checkpoint written; a second
            Ctrl-C does not wait.
    """
    run = Path(output)
    vocab_size = int(model.config.vocab_size)
    checksum = check_tokens(tokens, name="tokens", vocab_size=vocab_size)
    if eval_tokens is not None:
        check_tokens(eval_tokens, name="eval_tokens", vocab_size=vocab_size)
        if len(eval_tokens) < config.sequence_length + 1:
            raise ValueError(
                f"eval_tokens: expected at least sequence_length + 1 = "
                f"{config.sequence_length + 1}, got {len(eval_tokens)}"
            )
    sampler = SequenceSampler(tokens, sequence_length=config.sequence_length, seed=config.seed)
    device = torch.device(config.device)
    model.to(device)
    facts = {
        "config": config.to_dict(),
        "tokens": {"count": len(tokens), "crc32": checksum},
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    run.mkdir(parents=True, exist_ok=True)
    found = latest_checkpoint(run)
    if found is not None:
        _check_same_run(found, facts)
        found.load_model(model)
    if config.gradient_checkpointing:
        # transformers renamed the method in a 5.x release and will drop the old name.
        enable = getattr(model, "activation_checkpointing_enable", None)
        (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
    optimizer = build_optimizer(model, config)
    torch.manual_seed(config.seed)
    if found is not None:
        tensors, rng = found.load_state()
        load_optimizer_tensors(optimizer, tensors)
        set_rng_states(rng, device)
    loop = _Loop(model, optimizer, sampler, config, device)

    started = time.perf_counter()
    first = found.step if found is not None else 0
    length = int(found.manifest["log_bytes"]) if found is not None else 0
    checkpoint = found.path if found is not None else run
    loss = None
    evaluation = None
    rate = 0.0

    def evaluate_now() -> Evaluation | None:
        if eval_tokens is None:
            return None
        return evaluate(
            model,
            eval_tokens,
            sequence_length=config.sequence_length,
            batch_size=config.batch_size,
            max_sequences=config.eval_sequences,
            precision=config.precision,
        )

    with (
        StepLog(run / LOG_FILE, length=length) as log,
        TrainProgress(total_steps=config.steps, done=first, label=label, enabled=progress) as bar,
        _StopRequest() as stop,
    ):
        for step in range(first, config.steps):
            began = time.perf_counter()
            learning_rate = set_learning_rate(optimizer, step, config)
            loss, gradient_norm = loop.step(step, run)
            seconds = time.perf_counter() - began
            now = config.tokens_per_step / seconds
            rate = now if rate == 0.0 else _RATE_WINDOW * rate + (1 - _RATE_WINDOW) * now
            done = step + 1
            record: dict[str, Any] = {
                "step": done,
                "loss": loss,
                "learning_rate": learning_rate,
                "gradient_norm": gradient_norm,
                "tokens": done * config.tokens_per_step,
                "tokens_per_second": round(now, 1),
                "seconds": round(seconds, 6),
            }
            last = done == config.steps
            if last or _is_due(done, config.eval_every):
                evaluation = evaluate_now()
                if evaluation is not None:
                    record["eval_loss"] = evaluation.loss
                    record["eval_perplexity"] = evaluation.perplexity
            log.append(record)
            bar.update(done, loss=loss, tokens_per_second=rate)
            if last or stop.requested or _is_due(done, config.checkpoint_every):
                checkpoint = save_checkpoint(
                    run,
                    step=done,
                    model=model,
                    optimizer_tensors=optimizer_tensors(optimizer),
                    rng=rng_states(device),
                    facts={**facts, "log_bytes": log.sync()},
                    tokenizer=tokenizer,
                )
                prune_checkpoints(run, newest=done, keep=config.keep_checkpoints)
            if stop.requested and not last:
                raise KeyboardInterrupt(
                    f"stopped after step {done} of {config.steps}; checkpoint {checkpoint}; "
                    f"the same command resumes from it"
                )
    if evaluation is None:
        evaluation = evaluate_now()
    return TrainResult(
        steps=config.steps,
        tokens=config.steps * config.tokens_per_step,
        loss=loss,
        evaluation=evaluation,
        checkpoint=checkpoint,
        log=run / LOG_FILE,
        resumed_from=first,
        seconds=time.perf_counter() - started,
    )


class _Loop:
    """One optimizer step over ``accumulation`` batches."""

    def __init__(
        self,
        model: PreTrainedModel,
        optimizer: torch.optim.AdamW,
        sampler: SequenceSampler,
        config: TrainConfig,
        device: torch.device,
    ) -> None:
        self._model = model
        self._optimizer = optimizer
        self._sampler = sampler
        self._config = config
        self._device = device
        self._parameters = [p for p in model.parameters() if p.requires_grad]

    def step(self, step: int, run: Path) -> tuple[float, float]:
        """Take 0-based ``step``; returns (mean loss, gradient norm before clipping)."""
        config = self._config
        self._model.train()
        self._optimizer.zero_grad(set_to_none=True)
        loss = 0.0
        for part in range(config.accumulation):
            first = (step * config.accumulation + part) * config.batch_size
            batch = torch.from_numpy(self._sampler.batch(first, config.batch_size))
            with autocast(self._device, config.precision):
                part_loss = causal_loss(self._model, batch.to(self._device))
            (part_loss / config.accumulation).backward()
            loss += part_loss.item() / config.accumulation
        norm = torch.nn.utils.clip_grad_norm_(
            self._parameters, config.clip_norm if config.clip_norm is not None else math.inf
        ).item()
        # Checked before the update: the weights in memory, too, stay those of the last good step.
        for what, value in (("loss", loss), ("gradient norm", norm)):
            if not math.isfinite(value):
                raise RuntimeError(
                    f"the {what} is {value} at step {step + 1}; the weights were not updated and "
                    f"the checkpoints in {run} are as they were; a smaller learning rate, a longer "
                    f"warm-up or a tighter clip_norm may help"
                )
        self._optimizer.step()
        return loss, norm


class _StopRequest:
    """Turns the first Ctrl-C into a request that the loop sees between two steps."""

    def __init__(self) -> None:
        self.requested = False
        self._previous: Any = None

    def __enter__(self) -> _StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True


def _is_due(done: int, every: int) -> bool:
    return every > 0 and done % every == 0


def _check_same_run(found: Checkpoint, facts: dict[str, Any]) -> None:
    before, now = dict(found.manifest["config"]), dict(facts["config"])
    for name in FREE_ON_RESUME:
        before.pop(name, None)
        now.pop(name, None)
    differing = [
        f"{name} was {before.get(name)!r}, is {now.get(name)!r}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]
    if found.manifest["tokens"] != facts["tokens"]:
        differing.append("the training tokens are others")
    if differing:
        raise ValueError(
            f"config: {found.path} belongs to a run with other settings "
            f"({'; '.join(differing)}): resume with those, or choose another output directory"
        )
