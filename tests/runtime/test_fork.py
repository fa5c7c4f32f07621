"""A child of fork gets errors from its parent's runtime, at once, and lets go of it."""

from __future__ import annotations

import os

import pytest

from tests.run_script import run_script

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

# What the scripts share. Torch's OpenMP has threads when they fork, as it mostly does.
START = """
import gc, os, signal, sys, tempfile, warnings
warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
import torch
import l3ext
from l3ext.runtime import PrefetchRuntime
from l3ext.tables import save_tables
from tests.runtime.tables import make_table, rows_match

torch.set_num_threads(2)
(torch.ones(1 << 20) * 2).sum()
tables = [make_table(30), make_table(30, seed=1)]
path = os.path.join(tempfile.mkdtemp(), "tables")
save_tables(path, tables)
MAKERS = {
    "ram": lambda: PrefetchRuntime(tables),
    "rings": lambda: PrefetchRuntime(tables, in_place=False),
    "near data": lambda: PrefetchRuntime(tables, in_place=False, near_data=True),
    "disk": lambda: PrefetchRuntime(path),
    "pread": lambda: PrefetchRuntime(path, io_engine="pread"),
    "mapped": lambda: PrefetchRuntime(path, mapped=True),
    "graph": lambda: l3ext.GraphRuntime(tables, in_place=False),
}

def status_of_a_child(run):
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        signal.alarm(100)  # ends a child that hangs
        run()
        sys.exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def refused(use, what="runtime"):
    expected = f"this {what} belongs to process {os.getppid()} and came to process {os.getpid()}"
    try:
        use()
    except RuntimeError as error:
        return str(error).startswith(expected) and "open a runtime in this process" in str(error)
    return False
"""

KINDS = ["ram", "rings", "near data", "disk", "pread", "mapped", "graph"]


@pytest.mark.parametrize("kind", KINDS)
def test_what_asks_for_rows_is_refused_and_the_parent_goes_on(kind):
    run_script(
        START,
        f"""
        runtime = MAKERS[{kind!r}]()
        step = runtime.begin([1, 2])
        many = torch.zeros(1 << 20, dtype=torch.int16)  # which torch widens in threads
        x = torch.zeros(2, 24)
        def ledger():
            return runtime.counts if {kind!r} == "graph" else runtime.ledger.totals
        def use():
            assert refused(lambda: runtime.begin([1]))
            assert refused(lambda: runtime.begin(many))
            assert refused(lambda: step.wait(0).attend(x))
            assert refused(ledger, "runtime" if {kind!r} == "graph" else "ledger")
            if {kind!r} != "graph":
                assert refused(lambda: runtime.ledger.steps, "ledger")
                assert refused(runtime.ledger.clear, "ledger")
                assert refused(lambda: runtime.ledger.to_chrome_trace("trace"), "ledger")
            repr(runtime)
            step.end()
            runtime.close()
        assert status_of_a_child(use) == 0
        rows = step.wait(1)
        if {kind!r} not in ("graph", "near data"):
            assert rows_match(rows, tables[1], [1, 2])
        assert rows.attend(x).shape == (2, 13)
        step.end()
        ledger()
        runtime.close()
        """,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_child_ends_however_it_likes(kind):
    run_script(
        START,
        f"""
        runtime = MAKERS[{kind!r}]()
        step = runtime.begin([1, 2])
        def drop():
            global runtime, step
            del runtime, step
            gc.collect()
        def leave_the_blocks():
            with runtime, step:
                sys.exit(3)
        assert status_of_a_child(lambda: None) == 0  # the interpreter ends with all still open
        assert status_of_a_child(lambda: os._exit(4)) == 4
        assert status_of_a_child(drop) == 0
        assert status_of_a_child(leave_the_blocks) == 3
        step.wait(0)
        with runtime.begin([3]) as other:
            other.wait(1)
        """,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_child_may_open_its_own(kind):
    run_script(
        START,
        f"""
        runtime = MAKERS[{kind!r}]()
        step = runtime.begin([1, 2])
        x = torch.ones(2, 24)
        expected = step.wait(1).attend(x)
        def serve():
            torch.set_num_threads(1)  # torch's own threads are missing too
            with MAKERS[{kind!r}]() as own, own.begin([1, 2]) as mine:
                assert torch.equal(mine.wait(1).attend(x), expected)
        assert status_of_a_child(serve) == 0
        """,
    )


@pytest.mark.parametrize("tier", ["ram", "disk"])
def test_workers_of_a_data_loader(tier, tmp_path):
    run_script(
        START,
        f"""
        from torch.utils.data import DataLoader, Dataset
        from tests.runtime.test_offload import generate, make_model
        model = make_model()
        expected = generate(model)
        path = None if {tier!r} == "ram" else {os.fspath(tmp_path / "tables")!r}
        l3ext.offload(model, tier={tier!r}, path=path)
        class Items(Dataset):
            def __init__(self, runs_the_model):
                self.model, self.runs_the_model = model, runs_the_model
            def __len__(self):
                return 8
            def __getitem__(self, index):
                if self.runs_the_model:
                    self.model(torch.tensor([[index]]))
                return index
        def load(runs_the_model):
            items = Items(runs_the_model)
            # One: after an error, torch waits 5 s for each to end.
            return DataLoader(items, num_workers=1, multiprocessing_context="fork", timeout=60)
        assert sorted(int(i) for i in load(False)) == list(range(8))
        def serve():
            torch.set_num_threads(1)
            model.model.l3_runtime = PrefetchRuntime(path)
            assert torch.equal(generate(model), expected)
        assert path is None or status_of_a_child(serve) == 0
        try:
            list(load(True))
        except RuntimeError as error:
            assert f"belongs to process {{os.getpid()}} and came to process" in str(error), error
        else:
            raise AssertionError("expected a RuntimeError")
        gc.collect()  # the loader's iterator, whose end torch takes for an error
        assert torch.equal(generate(model), expected)
        """,
    )
