"""Bad input, a loss that is no number, Ctrl-C, a full disk: a clear error and nothing lost."""

import dataclasses
import os
import resource
import signal

import numpy as np
import pytest
import torch
from test_loop import CONFIG, change, run, weights
from tiny import build_model, build_tokens

from l3ext.training import latest_checkpoint
from l3ext.training.log import read_log


@pytest.mark.parametrize(
    ("tokens", "error", "text"),
    [
        (np.array([0, 64] * 20), ValueError, r"tokens: expected ids in \[0, 64\), got 64 at posi"),
        (np.full(40, -1), ValueError, "got -1 at position 0"),
        (np.zeros(16, np.int64), ValueError, "at least sequence_length \\+ 1 = 17, got 16"),
        (np.zeros((4, 40), np.int64), TypeError, "one-dimensional"),
        (np.zeros(40), TypeError, "integer array, got float64"),
        ([1] * 40, TypeError, "tokens: expected a NumPy array, got list"),
    ],
)
def test_bad_tokens(tmp_path, tokens, error, text):
    with pytest.raises(error, match=text):
        run(tmp_path, tokens=tokens)
    assert not (tmp_path / "run").exists()


def test_bad_eval_tokens(tmp_path):
    with pytest.raises(ValueError, match="eval_tokens: expected ids"):
        run(tmp_path, eval_tokens=np.full(40, 99))
    with pytest.raises(ValueError, match="eval_tokens: expected at least"):
        run(tmp_path, eval_tokens=np.zeros(3, np.int64))


def test_output_is_a_file(tmp_path):
    (tmp_path / "run").write_text("mine")
    with pytest.raises(FileExistsError):
        run(tmp_path)
    assert (tmp_path / "run").read_text() == "mine"


def poison(model, at_call):
    """Make the model's ``at_call``-th forward give NaN."""
    calls = iter(range(1, 1000))
    model.lm_head.register_forward_hook(
        lambda _m, _i, out: out * float("nan") if next(calls) == at_call else out
    )
    return model


def test_a_loss_that_is_no_number_stops_the_run(tmp_path):
    model = poison(build_model(), at_call=6)
    with pytest.raises(RuntimeError, match=r"the loss is nan at step 6; .*were not updated"):
        run(tmp_path, change(checkpoint_every=2), model=model)
    assert torch.isfinite(weights(model)).all()
    assert latest_checkpoint(tmp_path / "run").step == 4
    resumed, result = run(tmp_path, change(checkpoint_every=2))
    assert result.resumed_from == 4
    straight, _ = run(tmp_path, name="straight")
    assert torch.equal(weights(resumed), weights(straight))


def interrupt(model, at_call, times=1):
    """Press Ctrl-C ``times`` during the model's ``at_call``-th forward."""
    calls = iter(range(1, 1000))

    def press(*_):
        if next(calls) == at_call:
            for _press in range(times):
                os.kill(os.getpid(), signal.SIGINT)

    model.lm_head.register_forward_hook(press)
    return model


def test_ctrl_c_writes_a_checkpoint_and_resumes(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match=r"stopped after step 7 of 12; checkpoint .*00007"):
        run(tmp_path, model=interrupt(build_model(), at_call=7))
    assert signal.getsignal(signal.SIGINT) is before
    resumed, result = run(tmp_path)
    assert result.resumed_from == 7
    straight, _ = run(tmp_path, name="straight")
    assert torch.equal(weights(resumed), weights(straight))
    assert [record["step"] for record in read_log(result.log)] == list(range(1, 13))


def test_a_second_ctrl_c_does_not_wait(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, model=interrupt(build_model(), at_call=7, times=2))
    assert latest_checkpoint(tmp_path / "run") is None


def test_disk_full_during_a_checkpoint(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    run(tmp_path, change(checkpoint_every=4, steps=12), model=build_model())
    stray = latest_checkpoint(tmp_path / "run")
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    # The model fits, the optimizer's state does not.
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            run(tmp_path, change(checkpoint_every=4), name="full")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, previous)
    assert "checkpoint-00000004" in caught.value.filename
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["log.jsonl"]
    assert latest_checkpoint(tmp_path / "run").step == stray.step
    _, result = run(tmp_path, change(checkpoint_every=4), name="full")
    assert [record["step"] for record in read_log(result.log)] == list(range(1, 13))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"learning_rate": 2e-2}, "learning_rate was 0.01, is 0.02"),
        ({"steps": 20}, "steps was 12, is 20"),
    ],
)
def test_other_settings_do_not_resume(tmp_path, changes, text):
    run(tmp_path)
    with pytest.raises(ValueError, match=text):
        run(tmp_path, dataclasses.replace(CONFIG, **changes))


def test_other_tokens_do_not_resume(tmp_path):
    run(tmp_path)
    with pytest.raises(ValueError, match="the training tokens are others"):
        run(tmp_path, tokens=build_tokens(seed=5))


def test_another_model_does_not_resume(tmp_path):
    run(tmp_path)
    with pytest.raises(ValueError, match="belong to another model"):
        run(tmp_path, model=build_model(hidden_size=32))


def test_a_log_cut_short_is_refused(tmp_path):
    run(tmp_path)
    os.truncate(tmp_path / "run/log.jsonl", 10)
    with pytest.raises(OSError, match="expected the run's log"):
        run(tmp_path)
    assert (tmp_path / "run/log.jsonl").stat().st_size == 10
