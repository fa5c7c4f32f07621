"""Killed at any moment, and started again: nothing is left behind, and nothing is missing."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest

# A child forks before it has threads, so that a hundred of them start in no time. Each offloads a
# model to the table file that is there and generates until it is killed.
KILLS = """
import os, random, select, signal, sys, time
import torch
torch.set_num_threads(1)
import l3ext
from tests.runtime.test_offload import make_model

path, kills = sys.argv[1], int(sys.argv[2])
model = make_model()
prompt = torch.arange(1, 9)[None]
settings = dict(max_new_tokens=6, do_sample=False)
expected = model.generate(prompt, **settings)
draw = random.Random(0)

def generate(report):
    runtime = l3ext.offload(model, "disk", path, cache_bytes=2000, num_workers=2, prefill_chunk=3)
    while True:
        if not torch.equal(model.generate(prompt, **settings), expected):
            os._exit(3)
        os.write(report, b"g")

generated = early = 0
for kill in range(kills):
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        generate(write)
    os.close(write)
    if kill % 2:  # while it generates; else while it starts
        select.select([read], [], [], 30)
    time.sleep(draw.uniform(0.0, 0.03))
    os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, status
    texts = len(os.read(read, 1 << 16))
    os.close(read)
    generated += texts > 0
    early += texts == 0
print(generated, early)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_a_hundred_times(tmp_path):
    import l3ext
    from tests.runtime.test_offload import generate, make_model

    folder = tmp_path / "tables"
    folder.mkdir()
    path = folder / "tables.safetensors"
    expected = generate(make_model())
    l3ext.offload(make_model(), "disk", path).close()
    content, shared = path.read_bytes(), sorted(os.listdir("/dev/shm"))

    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TMPDIR": str(folder)}
    command = [sys.executable, "-c", textwrap.dedent(KILLS), str(path), "100"]
    done = subprocess.run(
        command, check=True, timeout=120, env=environment, capture_output=True, text=True
    )
    generated, early = map(int, done.stdout.split())
    assert generated >= 50, (generated, early)
    assert early > 0, (generated, early)

    assert os.listdir(folder) == [path.name]
    assert path.read_bytes() == content
    assert sorted(os.listdir("/dev/shm")) == shared
    model = make_model()
    with l3ext.offload(model, "disk", path) as runtime:  # clean again
        assert (generate(model) == expected).all()
        assert runtime.ledger.totals.bytes > 0
