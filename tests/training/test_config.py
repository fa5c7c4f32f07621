import json
import math

import pytest

from l3ext.training import TrainConfig
from l3ext.training.schedule import learning_rate_factor


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"steps": 0}, ValueError, "steps: expected at least 1, got 0"),
        ({"steps": 1.5}, TypeError, "steps: expected an int, got float 1.5"),
        ({"steps": True}, TypeError, "steps: expected an int, got bool"),
        ({"batch_size": -1}, ValueError, "batch_size: expected at least 1"),
        ({"learning_rate": 0.0}, ValueError, "learning_rate: expected a number > 0, got 0.0"),
        ({"learning_rate": math.nan}, ValueError, "learning_rate: expected"),
        ({"learning_rate": "fast"}, TypeError, "learning_rate: expected a number, got str 'fast'"),
        ({"table_learning_rate": -1.0}, ValueError, "table_learning_rate"),
        ({"min_learning_rate": 1.5}, ValueError, "min_learning_rate: expected .* <= 1"),
        ({"beta2": 1.0}, ValueError, "beta2: expected a number >= 0 and < 1, got 1.0"),
        ({"clip_norm": 0}, ValueError, "clip_norm"),
        ({"precision": "float16"}, ValueError, "precision: expected one of"),
        ({"warmup_steps": 11}, ValueError, "warmup_steps: expected at most steps = 10, got 11"),
        ({"eval_sequences": 0}, ValueError, "eval_sequences"),
        ({"keep_checkpoints": 0}, ValueError, "keep_checkpoints"),
    ],
)
def test_bad_settings_say_which(changes, error, text):
    with pytest.raises(error, match=text):
        TrainConfig(**{"steps": 10, **changes})


def test_config_survives_json():
    config = TrainConfig(steps=3, table_learning_rate=0.01)
    assert TrainConfig(**json.loads(json.dumps(config.to_dict()))) == config


def test_schedule_rises_then_falls_to_its_floor():
    config = TrainConfig(steps=100, warmup_steps=10, min_learning_rate=0.1)
    factors = [learning_rate_factor(step, config) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9] == factors[10] == pytest.approx(1.0)
    assert factors[-1] == pytest.approx(0.1)
    assert factors[10:] == sorted(factors[10:], reverse=True)
    middle = 10 + 89 / 2
    assert (factors[54] + factors[55]) / 2 == pytest.approx(0.55, abs=1e-3), middle


def test_schedule_of_a_run_that_is_all_warmup():
    config = TrainConfig(steps=4, warmup_steps=4)
    assert [learning_rate_factor(step, config) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
