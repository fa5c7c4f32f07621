"""A run killed by SIGKILL at random moments ends with the bits of one that was not.

One process imports torch and forks a child per attempt, so that an attempt costs milliseconds.
Every step writes a checkpoint: most kills fall into the writing of one.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

RUNNER = """
import json, os, random, signal, sys, time, warnings
import torch
from test_loop import CONFIG, change, run, weights
from tiny import build_model, build_tokens
from pathlib import Path

torch.set_num_threads(1)
build_model()  # imports what transformers imports late, before the first fork
warnings.simplefilter("ignore")
root, seed = Path(sys.argv[1]), int(sys.argv[2])
config = change(steps=30, checkpoint_every=1, eval_every=7)

def attempt(name):
    child = os.fork()
    if child == 0:
        code = 1
        try:
            run(root, config, name=name, eval_tokens=build_tokens(200, seed=1))
            code = 0
        finally:
            os._exit(code)
    return child

def steps_done():
    return max((int(p.name[-8:]) for p in (root / "killed").glob("checkpoint-????????")), default=0)

began = time.monotonic()
assert os.waitpid(attempt("straight"), 0)[1] == 0
step = (time.monotonic() - began) / 30
rng, kills = random.Random(seed), 0
while True:
    goal = min(30, steps_done() + rng.randint(0, 4))
    child = attempt("killed")
    if kills < 12:
        # So many steps on, and a random moment: by steps, since a machine's speed may change.
        deadline = time.monotonic() + 60
        while steps_done() < goal and time.monotonic() < deadline:
            time.sleep(step / 10)
        time.sleep(rng.uniform(0.0, 2 * step))
        os.kill(child, signal.SIGKILL)  # a no-op on a child that ended and was not waited for
    if os.waitpid(child, 0)[1] == 0:
        break
    kills += 1
print(json.dumps({"kills": kills}))
"""


@pytest.mark.parametrize("seed", [0, 1])
def test_sigkill_at_random_moments(tmp_path, seed):
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", RUNNER, str(tmp_path), str(seed)],
        capture_output=True,
        text=True,
        timeout=200,
        cwd=here,
        env={**os.environ, "PYTHONPATH": f"{here}:{here.parents[1]}"},
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["kills"] >= 2
    straight, killed = (tmp_path / name / "checkpoint-00000030" for name in ("straight", "killed"))
    for file in ("model.safetensors", "training.safetensors"):
        assert (straight / file).read_bytes() == (killed / file).read_bytes()
    logs = []
    for name in ("straight", "killed"):
        lines = (tmp_path / name / "log.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        for record in records:
            del record["seconds"], record["tokens_per_second"]
        logs.append(records)
    assert logs[0] == logs[1]
    assert [record["step"] for record in logs[0]] == list(range(1, 31))
    assert not list((tmp_path / "killed").glob("*.tmp.*"))
