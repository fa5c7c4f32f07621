"""Bad input, damaged files and closed runtimes: a clear error, and the next step works."""

from __future__ import annotations

import os
import signal

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import l3ext
from l3ext.runtime import PrefetchRuntime
from l3ext.tables import LookupTable, check_same_tables, save_tables
from tests.run_script import run_script
from tests.runtime.tables import Owners, make_table, rows_match
from tests.runtime.test_offload import generate, make_model

VOCAB = 30


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "tables.safetensors"
    save_tables(path, [make_table(VOCAB)])
    return path


@pytest.mark.parametrize("bad", [-1, VOCAB, 2**31, -(2**40)])
def test_an_id_outside_the_vocabulary(bad):
    with PrefetchRuntime([make_table(VOCAB)]) as runtime:
        with pytest.raises(ValueError, match=f"got {bad} at position 2"):
            runtime.begin([3, 0, bad, 4])
        assert runtime.ledger.totals.steps == 0
        runtime.begin([3]).wait(0)


def test_ids_of_a_wrong_type():
    with PrefetchRuntime([make_table(VOCAB)]) as runtime, pytest.raises(TypeError, match="integer"):
        runtime.begin(torch.tensor([1.0]))


def test_a_layer_that_is_not_there():
    with PrefetchRuntime([make_table(VOCAB)]) as runtime, runtime.begin([1]) as step:
        for layer in (-1, 1):
            with pytest.raises(ValueError, match=f"layer: expected 0 to 0, got {layer}"):
                step.wait(layer)
        with pytest.raises(TypeError, match="layer: expected an int, got None"):
            step.wait(None)


@pytest.mark.parametrize("runtime", [PrefetchRuntime, l3ext.GraphRuntime])
def test_what_is_no_device_no_layer_and_no_scale(runtime):
    table = make_table(VOCAB)
    with pytest.raises(RuntimeError, match=r"device: expected a torch\.device .* got 'gpu'"):
        runtime([table], device="gpu")
    with pytest.raises(TypeError, match="in_place: expected True or False, got 'no'"):
        runtime([table], in_place="no")
    with runtime([table]) as opened, opened.begin([1]) as step:
        with pytest.raises(TypeError, match="layer: expected an int, got '0'"):
            step.wait("0")
        with pytest.raises(TypeError, match="scale: expected a number, got None"):
            step.wait(0).attend(torch.zeros(1, table.d_in), scale=None)
        with pytest.raises(TypeError, match=r"x: expected a torch\.Tensor or .* got NoneType"):
            step.wait(0).attend(None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache_bytes": -1}, "cache_bytes: expected at least 0, got -1"),
        ({"ring_bytes": -1}, "ring_bytes: expected at least 0, got -1"),
        ({"num_workers": 0}, "num_workers: expected 1 to 256, got 0"),
        ({"queue_depth": 0}, "queue_depth: expected 1 to 1024, got 0"),
        ({"io_engine": "aio"}, "io_engine: expected"),
        (
            {"piece_bytes": 5000},
            "piece_bytes: expected a multiple of 4096 up to 1073741824, got 5000",
        ),
        ({"record_steps": -1}, "record_steps: expected at least 0, got -1"),
        ({"io_engine": None}, "io_engine: expected .* got None"),
        ({"io_engine": ["pread"]}, "io_engine: expected"),
        ({"direct_io": [True]}, "direct_io: expected True, False or"),
        ({"direct_io": "yes"}, "direct_io: expected True, False or"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        PrefetchRuntime([make_table(VOCAB)], **options)


@pytest.mark.parametrize("runtime", [PrefetchRuntime, l3ext.GraphRuntime])
def test_options_that_are_no_integers(runtime):
    with pytest.raises(TypeError, match=r"cache_bytes: expected an int, got 1000000000\.0"):
        runtime([make_table(VOCAB)], cache_bytes=1e9)
    with pytest.raises(TypeError, match="ring_bytes: expected an int, got '1 GB'"):
        runtime([make_table(VOCAB)], ring_bytes="1 GB")
    with pytest.raises(ValueError, match=r"ring_bytes: expected less than 2\*\*63"):
        runtime([make_table(VOCAB)], ring_bytes=2**70)
    with runtime([make_table(VOCAB)], cache_bytes=np.int32(100)) as good, good.begin([1]):
        pass


@pytest.mark.parametrize("runtime", [PrefetchRuntime, l3ext.GraphRuntime])
def test_what_is_no_table(runtime):
    table = make_table(VOCAB)
    with pytest.raises(TypeError, match=r"tables\[1\]: expected l3ext.LookupTable, got Tensor"):
        runtime([table, table.data])
    for wrong in (None, table, table.data, b"tables.safetensors"):
        with pytest.raises(TypeError, match=r"tables: expected a path .* got"):
            runtime(wrong)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": None}, r"data: expected a torch\.Tensor, a NumPy .* got NoneType"),
        (
            {"data": torch.empty(3, 37, device="meta")},
            r"data: .* in host memory, got one on meta",
        ),
        ({"allocation": None}, r"allocation: expected l3ext\.Allocation, got NoneType"),
        ({"allocation": [1, 2]}, r"allocation: expected l3ext\.Allocation, got list"),
        ({"d_in": None}, "d_in: expected an int, got None"),
        ({"d_in": 24.0}, r"d_in: expected an int, got 24\.0"),
        ({"tied": "yes"}, "tied: expected True or False, got 'yes'"),
    ],
)
def test_what_makes_no_lookup_table(change, message):
    good = make_table(VOCAB)
    arguments = {"data": good.data, "allocation": good.allocation, "d_in": good.d_in} | change
    with pytest.raises(TypeError, match=message):
        LookupTable(**arguments)


def test_quantised_rows_on_the_meta_device():
    rows = l3ext.QuantizedTable(
        torch.empty(3, 48, dtype=torch.uint8, device="meta"), torch.int8, 24, 13
    )
    with pytest.raises(TypeError, match=r"data: .* in host memory, got one on meta"):
        LookupTable(rows, Owners(np.array([3])), 24)


def test_a_model_without_weights_is_not_offloaded():
    with torch.device("meta"):
        model = make_model()
    with pytest.raises(ValueError, match="model: expected one with weights, got tables on meta"):
        l3ext.offload(model, "ram")


@pytest.mark.parametrize("wrong", [None, "tables", [None], torch.zeros(2, 3)])
def test_what_is_no_list_of_tables(path, wrong):
    for use in (save_tables, check_same_tables):
        with pytest.raises(TypeError, match=r"tables(\[0\])?: expected .*l3ext\.LookupTable, got"):
            use(path, wrong)


@pytest.mark.parametrize("runtime", [PrefetchRuntime, l3ext.GraphRuntime])
def test_queries_in_a_numpy_array(runtime):
    table = make_table(VOCAB)
    x = np.ones((1, table.d_in), np.float32)
    with runtime([table]) as opened, opened.begin([1]) as step:
        rows = step.wait(0)
        assert torch.equal(rows.attend(x), rows.attend(torch.from_numpy(x)))
        with pytest.raises(TypeError, match=r"x: expected a torch\.Tensor or .* got list"):
            rows.attend(x.tolist())


def test_bad_tables():
    good = make_table(VOCAB)
    with pytest.raises(ValueError, match="expected at least one"):
        PrefetchRuntime([])
    with pytest.raises(ValueError, match=r"tables\[1\]: expected a vocabulary of 30"):
        PrefetchRuntime([good, make_table(VOCAB + 1)])
    with pytest.raises(ValueError, match=r"offsets\[30\]: expected"):
        PrefetchRuntime([LookupTable(good.data[:-1], good.allocation, 24)])
    with pytest.raises(ValueError, match="contiguous"):
        PrefetchRuntime([LookupTable(good.data.t().contiguous().t(), good.allocation, 24)])
    with pytest.raises(TypeError, match="expected float64, float32, bfloat16 or float16"):
        PrefetchRuntime([LookupTable(good.data.to(torch.int32), good.allocation, 24)])
    with pytest.raises(ValueError, match="more than d_in = 37 columns"):
        PrefetchRuntime([LookupTable(good.data, good.allocation, 37)])
    with pytest.raises(TypeError, match=r"data: expected a torch\.Tensor, a NumPy .* got list"):
        PrefetchRuntime([LookupTable(good.data.tolist(), good.allocation, 24)])
    falling = Owners(np.array([3, -1, 2]))
    with pytest.raises(ValueError, match=r"offsets\[2\]: expected at least 3.*got 2"):
        PrefetchRuntime([LookupTable(good.data[:4], falling, 24)])


def test_a_closed_runtime_says_so():
    runtime = PrefetchRuntime([make_table(VOCAB)])
    step = runtime.begin([1])
    runtime.close()
    runtime.close()
    for use in (lambda: runtime.begin([1]), lambda: step.wait(0)):
        with pytest.raises(RuntimeError, match="the runtime is closed"):
            use()
    step.end()


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        PrefetchRuntime(tmp_path / "missing")
    assert caught.value.filename == str(tmp_path / "missing")


def test_things_that_are_no_table_file(tmp_path):
    with pytest.raises(OSError, match="expected a regular file"):
        PrefetchRuntime(tmp_path)
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with pytest.raises(OSError, match="expected a regular file"):
        PrefetchRuntime(fifo)
    for name, content in {"empty": b"", "text": b"hello, world" * 99, "zeros": bytes(9000)}.items():
        file = tmp_path / name
        file.write_bytes(content)
        with pytest.raises(OSError, match=r"header|table file") as caught:
            PrefetchRuntime(file)
        assert caught.value.filename == str(file)
    foreign = tmp_path / "model.safetensors"
    save_file({"w": torch.zeros(3)}, foreign)
    with pytest.raises(OSError, match="no table file"):
        PrefetchRuntime(foreign)
    save_file({"w": torch.zeros(3)}, foreign, metadata={"format": "pt"})
    with pytest.raises(OSError, match=r"expected format 'l3ext\.tables', got 'pt'"):
        PrefetchRuntime(foreign)


@pytest.mark.parametrize("direct_io", ["auto", False])
def test_a_truncated_file_while_open(path, direct_io):
    table = make_table(VOCAB)
    content = path.read_bytes()
    with PrefetchRuntime(path, direct_io=direct_io) as runtime:
        os.truncate(path, 4096 + 100)
        with runtime.begin([VOCAB - 1]) as step:
            with pytest.raises(OSError, match="the file is 4196 bytes long") as caught:
                step.wait(0)
            assert caught.value.filename == str(path)
        with open(path, "r+b") as stream:  # the same file is whole again
            stream.write(content)
        with runtime.begin([VOCAB - 1]) as step:
            assert rows_match(step.wait(0), table, [VOCAB - 1])


def test_a_replaced_file_while_open(path):
    table = make_table(VOCAB)
    with PrefetchRuntime(path) as runtime:
        save_tables(path, [make_table(VOCAB, seed=5)])
        with runtime.begin([3, 7]) as step:  # the runtime holds the file that it opened
            assert rows_match(step.wait(0), table, [3, 7])


@pytest.mark.parametrize("direct_io", ["auto", False])
@pytest.mark.parametrize("piece_bytes", [4096, 1 << 18])
def test_a_flipped_bit_is_found(tmp_path, direct_io, piece_bytes):
    path = tmp_path / "tables.safetensors"
    table = make_table(VOCAB, max_rows=200)
    save_tables(path, [table])
    token = int(np.argmax(table.allocation.rows))
    offset = 4096 + table.allocation.offsets[token] * 37 * 4
    with open(path, "r+b") as stream:
        stream.seek(offset + 9999)
        byte = stream.read(1)
        stream.seek(offset + 9999)
        stream.write(bytes([byte[0] ^ 4]))
    options = {"direct_io": direct_io, "piece_bytes": piece_bytes}
    with PrefetchRuntime(path, **options) as runtime:
        message = rf"offset {offset}: the rows of token {token} "
        with runtime.begin([0, token]) as step, pytest.raises(OSError, match=message) as caught:
            step.wait(0)
        assert caught.value.filename == str(path)
        others = [t for t in range(VOCAB) if t != token]
        with runtime.begin(others) as step:
            assert rows_match(step.wait(0), table, others)
    with pytest.raises(OSError, match=f"token {token} "):  # the hot set is checked as well
        PrefetchRuntime(path, cache_bytes=1 << 30, **options)
    with PrefetchRuntime(path, verify=False, **options) as runtime, runtime.begin([token]) as step:
        assert not rows_match(step.wait(0), table, [token])


def test_damage_at_any_place_is_found(tmp_path):
    """A flipped bit or a cut anywhere: an OSError, or exactly the right rows (spaces, padding)."""
    path = tmp_path / "tables.safetensors"
    table = make_table(6, max_rows=3)
    save_tables(path, [table])
    good = path.read_bytes()
    random = np.random.default_rng(0)
    places = np.concatenate([np.arange(0, 700, 3), random.integers(0, len(good), 200)])
    for place in places.tolist():
        damaged = bytearray(good)
        damaged[place] ^= 1 << random.integers(0, 8)
        for content in (bytes(damaged), good[:place]):
            path.write_bytes(content)
            try:
                with PrefetchRuntime(path) as runtime, runtime.begin(range(6)) as step:
                    assert rows_match(step.wait(0), table, range(6))
            except OSError as error:
                assert error.filename == str(path)  # noqa: PT017


def test_a_full_disk_leaves_the_old_file(path):
    old = path.read_bytes()
    run_script(
        f"""
        import resource, signal
        from l3ext.tables import save_tables
        from tests.runtime.tables import make_table
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
        try:
            save_tables({str(path)!r}, [make_table(30, max_rows=400)])
        except OSError as error:
            assert "the old file stays" in str(error), error
            assert error.filename == {str(path)!r}
        else:
            raise AssertionError("expected an OSError")
        """
    )
    assert path.read_bytes() == old
    assert os.listdir(path.parent) == [path.name]


def test_ctrl_c_stops_the_writing_and_leaves_a_whole_file(path, tmp_path):
    table = make_table(VOCAB, max_rows=30000)
    save_tables(tmp_path / "new", [table])
    whole = (path.read_bytes(), (tmp_path / "new").read_bytes())

    def interrupt(*_):
        raise KeyboardInterrupt

    def save_for_ever():
        while True:
            save_tables(path, [table])

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.005)
        with pytest.raises(KeyboardInterrupt):
            save_for_ever()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert path.read_bytes() in whole
    assert sorted(os.listdir(tmp_path)) == ["new", path.name]


def test_no_locked_memory_and_no_huge_pages(path):
    run_script(
        f"""
        import ctypes, resource
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, 0))
        PR_SET_THP_DISABLE = 41
        assert ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0) == 0
        from l3ext.runtime import PrefetchRuntime
        from tests.runtime.tables import make_table, rows_match
        table = make_table(30)
        for tables in ({str(path)!r}, [table]):
            for direct_io in ("auto", False):
                with PrefetchRuntime(
                    tables, in_place=False, cache_bytes=2000, direct_io=direct_io
                ) as runtime:
                    for tokens in ([1, 2, 29], range(30)):
                        with runtime.begin(tokens) as step:
                            assert rows_match(step.wait(0), table, tokens)
        """
    )


def test_no_memory_for_a_ring_is_an_error_and_the_next_runtime_works(path):
    run_script(
        f"""
        import resource
        import torch
        from l3ext.runtime import PrefetchRuntime
        from l3ext.tables import LookupTable
        from tests.runtime.tables import Owners, make_table, rows_match
        import numpy as np
        table = make_table(30)
        large = LookupTable(torch.empty(1 << 22, 64), Owners(np.full(1 << 12, 1 << 10)), 64, True)
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (256 << 20), resource.RLIM_INFINITY))
        try:
            PrefetchRuntime([large], in_place=False, ring_bytes=1 << 30)
        except RuntimeError as error:
            assert "cannot allocate 1073741824 bytes" in str(error), error
        else:
            raise AssertionError("expected a RuntimeError")
        with PrefetchRuntime({str(path)!r}, num_workers=1) as runtime, runtime.begin([3]) as step:
            assert rows_match(step.wait(0), table, [3])
        """
    )


@pytest.mark.parametrize("direct_io", ["auto", False])
def test_a_file_cut_between_steps_says_where_and_the_model_lives(tmp_path, direct_io):
    """The path and the offset; whole again, the same model goes on with the same text."""
    model = make_model()
    expected = generate(model)
    path = tmp_path / "tables"
    with l3ext.offload(model, "disk", path, direct_io=direct_io, ring_bytes=0):
        assert torch.equal(generate(model), expected)
        content = path.read_bytes()
        os.truncate(path, 4096)
        with pytest.raises(OSError, match=r"offset \d+.*the file is 4096 bytes long") as caught:
            generate(model)
        assert caught.value.filename == str(path)
        with open(path, "r+b") as stream:
            stream.write(content)
        assert torch.equal(generate(model), expected)


def test_another_table_under_a_running_model(tmp_path):
    """Written anew under the same name: who has the old file open goes on with it."""
    model = make_model()
    expected = generate(model)
    path = tmp_path / "tables"
    with l3ext.offload(model, "disk", path, ring_bytes=0):
        save_tables(path, [make_table(VOCAB, seed=1)])
        assert torch.equal(generate(model), expected)
        path.unlink()
        assert torch.equal(generate(model), expected)


@pytest.mark.parametrize("tier", ["ram", "disk"])
def test_steps_of_no_token_and_of_one_many_times(tier, path):
    table = make_table(VOCAB)
    with PrefetchRuntime(
        path if tier == "disk" else [table], in_place=False, poison=True
    ) as runtime:
        for tokens in (torch.empty(0, dtype=torch.int64), torch.full((3, 500), 7), [VOCAB - 1]):
            with runtime.begin(tokens) as step:
                assert rows_match(step.wait(0), table, tokens)
        tokens = [record.layers[0].tokens for record in runtime.ledger.steps]
        assert tokens == [0, 1, 1]


@pytest.mark.parametrize("beyond", [0, 1])
def test_one_token_more_than_the_ring_holds(path, beyond):
    owners = Owners(np.full(VOCAB, 4))
    table = LookupTable(torch.randn(4 * VOCAB, 37), owners, 24)
    save_tables(path, [table])
    held = 9
    with PrefetchRuntime(path, ring_bytes=held * 4 * 37 * 4, poison=True) as runtime:
        for start in range(VOCAB - held):  # the head of the ring at any place
            tokens = range(start, start + held + beyond)
            with runtime.begin(tokens) as step:
                assert rows_match(step.wait(0), table, tokens)
        spilled = [record.layers[0].spilled for record in runtime.ledger.steps]
        assert spilled == [bool(beyond)] * len(spilled)
