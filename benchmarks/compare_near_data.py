"""Near data against fetching, on the CPU with a table that stands for a far one; nothing is hidden.

Steps of tokens by Zipf's law, in turn forth and back, over 4,096 ids with 4 rows a token.
"""

from __future__ import annotations

import argparse
import time
from types import SimpleNamespace

import numpy as np
import torch

from l3ext.runtime import PrefetchRuntime
from l3ext.tables import LookupTable

VOCAB, D_IN, D_EMB = 4096, 1024, 512
WARM_UP = 40


def main() -> None:
    """Print µs of a step, median and 10th to 90th percentile, and ratios of paired steps."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    steps = parser.parse_args().steps + WARM_UP
    random = np.random.default_rng(0)
    weights = 1 / np.arange(1, VOCAB + 1)
    weights /= weights.sum()
    rows = np.clip(4 * VOCAB * weights, 1, 512).astype(np.int64)
    owners = SimpleNamespace(
        offsets=np.concatenate([[0], np.cumsum(rows)]), frequency=(1e9 * weights).astype(np.int64)
    )
    table = LookupTable(torch.randn(int(rows.sum()), D_IN + D_EMB), owners, D_IN)
    for share in (0.0, 0.2):
        for batch in (1, 8):
            options = {"in_place": False, "cache_bytes": int(share * table.data.nbytes)}
            runtimes = {
                mode: PrefetchRuntime([table], near_data=mode, ring_bytes=8 << 20, **options)
                for mode in (False, True, "auto")
            }
            x = torch.randn(batch, D_IN)
            times: dict[object, list[float]] = {mode: [] for mode in runtimes}
            for run in range(steps):
                ids = torch.from_numpy(random.choice(VOCAB, batch, p=weights))
                outputs = []
                for mode in list(runtimes)[:: 1 if run % 2 else -1]:
                    begin = time.perf_counter()
                    with runtimes[mode].begin(ids) as step:
                        outputs.append(step.wait(0).attend(x))
                    times[mode].append((time.perf_counter() - begin) * 1e6)
                assert all(torch.equal(outputs[0], output) for output in outputs)
            for mode, runtime in runtimes.items():
                seconds = np.array(times[mode])[WARM_UP:]
                ratio = np.median(seconds / np.array(times[False])[WARM_UP:])
                low, middle, high = np.percentile(seconds, [10, 50, 90])
                print(
                    f"hot {share}, batch {batch}, near_data={mode}: {middle:.0f} ({low:.0f} to "
                    f"{high:.0f}) µs, ratio {ratio:.2f}, {runtime.placement.near_costs}"
                )
                runtime.close()


if __name__ == "__main__":
    main()
