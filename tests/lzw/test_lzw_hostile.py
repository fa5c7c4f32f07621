"""Bad ids, bad offsets, bad files, full disks, Ctrl-C, forks: a clear error, and nothing lost."""

import os
import resource
import signal
import struct
import threading
import time

import numpy as np
import pytest
import safetensors.numpy
import torch

import l3ext
from l3ext import _C
from tests.lzw.helpers import counted, pack, state, zipf_documents
from tests.run_script import run_script


@pytest.fixture
def counter():
    return counted(zipf_documents(1, documents=30), 50)


def assert_rejected(counter, error, message, *arguments):
    before = state(counter)
    with pytest.raises(error, match=message):
        counter.update(*arguments)
    assert state(counter) == before


# --- ids and offsets ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize("bad", [-1, 50, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("position", [0, 5, 4095, 4096, 9999])
def test_an_id_out_of_range(counter, dtype, bad, position):
    tokens = np.zeros(10_000, dtype)
    tokens[position] = bad
    where = f"got {bad} at position {position} (document {1 + (position >= 4096)}, token "
    where += f"{position - (4096 if position >= 4096 else 0)} of it)"
    message = r"tokens: expected ids in \[0, 50\), " + where.replace("(", r"\(").replace(")", r"\)")
    assert_rejected(counter, ValueError, message, tokens, [0, 0, 4096, 10_000])


@pytest.mark.parametrize("bad", [50 + 2**32, -(2**63), 2**63 - 1])
def test_an_id_beyond_32_bits_does_not_wrap(counter, bad):
    assert_rejected(counter, ValueError, f"got {bad} at position 1", np.array([0, bad], np.int64))


def test_an_id_beyond_63_bits_does_not_wrap(counter):
    tokens = np.array([1, 2**64 - 1], np.uint64)
    message = r"tokens: expected values below 2\*\*63, got 18446744073709551615 at position 1"
    assert_rejected(counter, ValueError, message, tokens)


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([], "expected documents [+] 1 entries, got none"),
        ([1, 5], r"expected offsets\[0\] = 0, got 1"),
        ([-1, 5], r"expected offsets\[0\] = 0, got -1"),
        ([0, 4, 3, 5], r"expected no fall, got offsets\[2\] = 3 after offsets\[1\] = 4"),
        ([0, 2**62, 5], r"expected no fall, got offsets\[2\] = 5"),
        ([0, 3], "expected the last to be the number of tokens, 5, got 3"),
        ([0, 6], "expected the last to be the number of tokens, 5, got 6"),
        ([0], "expected the last to be the number of tokens, 5, got 0"),
        ([[0, 5]], "offsets: expected one dimension, got 2"),
    ],
)
def test_bad_offsets(counter, offsets, message):
    assert_rejected(counter, ValueError, message, [0, 1, 2, 3, 4], offsets)


@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        ([0.5, 1.0], TypeError, "tokens: expected integers, got dtype float64"),
        (np.zeros(3, np.float32), TypeError, "tokens: expected integers, got dtype float32"),
        (np.zeros(3, bool), TypeError, "tokens: expected integers, got dtype bool"),
        (torch.zeros(3), TypeError, "tokens: expected integers, got dtype float32"),
        (np.zeros((2, 2), np.int32), ValueError, r"expected one dimension, got 2 .*\[2, 2\]"),
        (np.int32(7), TypeError, "tokens: expected a NumPy array, a torch tensor or a list"),
        ("text", TypeError, "tokens: expected .*, got str"),
        (None, TypeError, "tokens: expected .*, got NoneType"),
        ([[1], [1, 2]], TypeError, "tokens: expected integers"),
        (["a"], TypeError, "tokens: expected integers"),
        (torch.zeros(3, dtype=torch.int32, device="meta"), TypeError, "tensor on meta"),
    ],
)
def test_tokens_that_are_none(counter, tokens, error, message):
    assert_rejected(counter, error, message, tokens)


@pytest.mark.parametrize("empty", [np.array([]), np.zeros(0, np.float32), torch.tensor([])])
def test_no_tokens_have_any_float_dtype(counter, empty):
    before = counter.num_tokens
    counter.update(empty)
    counter.update(empty, offsets=[0, 0])
    assert counter.num_tokens == before
    assert_rejected(counter, TypeError, "expected integers, got dtype bool", np.zeros(0, bool))


def test_an_array_on_a_device(counter):
    class DeviceArray:
        def __dlpack_device__(self):
            return (2, 0)  # kDLCUDA

    assert_rejected(counter, TypeError, "tokens: expected host memory, got an array on DLPack",
                    DeviceArray())  # fmt: skip


@pytest.mark.parametrize("vocab_size", [0, -1, 2**31, 2**80])
def test_bad_vocab_size(vocab_size):
    with pytest.raises(ValueError, match="vocab_size: expected 1 to 2147483647, got"):
        l3ext.LZWCounter(vocab_size)


@pytest.mark.parametrize("bound", [0, -1, 2, 2**32 - 1, 2**80])
def test_bad_max_codewords(bound):
    message = "max_codewords: expected vocab_size = 3 .* to 4294967294, got"
    with pytest.raises(ValueError, match=message):
        l3ext.LZWCounter(3, max_codewords=bound)


def test_max_codewords_of_another_type():
    with pytest.raises(TypeError, match=r"max_codewords: expected an int, got 3\.5"):
        l3ext.LZWCounter(3, max_codewords=3.5)


def test_parse_of_another_type():
    with pytest.raises(TypeError, match='parse: expected "paper" or "lzw", got NoneType'):
        l3ext.LZWCounter(4, parse=None)


@pytest.mark.parametrize("total_rows", [2**33, 2**70])
def test_more_uniform_rows_than_a_token_may_own(total_rows):
    with pytest.raises(ValueError, match=f"total_rows: expected at most .* got {total_rows}"):
        l3ext.Allocation.uniform(2, total_rows)


def test_frequencies_whose_sum_has_no_64_bits():
    with pytest.raises(ValueError, match=r"frequency: expected a sum below 2\^63"):
        l3ext.Allocation.from_rows([1, 1], frequency=[2**63 - 1, 5])


@pytest.mark.parametrize("path", ["", ".", "/"])
def test_a_path_that_names_no_file(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError, match="expected a file's path"):
        l3ext.Allocation.from_rows([1]).save(path)


@pytest.mark.parametrize("path", [5, None, 1.5])
def test_what_is_no_path(counter, path):
    allocation = l3ext.Allocation.from_rows([1])
    for call in (allocation.save, l3ext.Allocation.load, counter.save, l3ext.LZWCounter.load):
        with pytest.raises(TypeError, match=f"path: expected a path .*PathLike., got {path}"):
            call(path)


def test_a_path_of_bytes(tmp_path):
    path = os.fsencode(tmp_path / "allocation")
    l3ext.Allocation.from_rows([1, 2]).save(path)
    assert l3ext.Allocation.load(path).rows.tolist() == [1, 2]


def test_unknown_parse():
    with pytest.raises(ValueError, match='parse: expected "paper" or "lzw", got "lz78"'):
        l3ext.LZWCounter(3, parse="lz78")


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        ([], ValueError, "rows: expected at least one token"),
        ([1, 0, 1], ValueError, "rows: expected 1 to 2147483647 a token, got 0 at token 1"),
        ([1, 2**31], ValueError, "rows: expected 1 to 2147483647 a token, got 2147483648"),
        ([1.0], TypeError, "rows: expected integers"),
        ([[1]], ValueError, "rows: expected one dimension"),
    ],
)
def test_bad_rows(rows, error, message):
    with pytest.raises(error, match=message):
        l3ext.Allocation.from_rows(rows)


@pytest.mark.parametrize(
    ("frequency", "message"),
    [([1], "expected 2 tokens as in rows, got 1"), ([1, -1], "expected 0 to .* at token 1")],
)
def test_bad_frequency(frequency, message):
    with pytest.raises(ValueError, match=message):
        l3ext.Allocation.from_rows([1, 1], frequency=frequency)


# --- files --------------------------------------------------------------------------------------

LOADERS = {"counter": l3ext.LZWCounter.load, "allocation": l3ext.Allocation.load}


@pytest.fixture(params=["counter", "allocation"])
def saved(request, tmp_path, counter):
    path = tmp_path / request.param
    (counter if request.param == "counter" else counter.allocate(200)).save(path)
    return path


def assert_unusable(path):
    with pytest.raises(OSError, match="not a usable") as caught:
        LOADERS[path.name](path)
    assert caught.value.filename == str(path)


def test_truncated_files(saved):
    content = saved.read_bytes()
    for length in [0, 1, 7, 8, 63, 64, *range(65, len(content), max(1, len(content) // 60))]:
        saved.write_bytes(content[:length])
        assert_unusable(saved)
    saved.write_bytes(content + b"\0")
    assert_unusable(saved)


def test_flipped_bits(saved):
    content = bytearray(saved.read_bytes())
    same = LOADERS[saved.name](saved)
    named = []
    header = range(160 if saved.name == "allocation" else 64)
    for position in [*header, *range(160, len(content), max(1, len(content) // 150))]:
        flipped = bytearray(content)
        flipped[position] ^= 1 << (position % 8)
        saved.write_bytes(flipped)
        try:
            loaded = LOADERS[saved.name](saved)
        except OSError as error:
            named.append(error.filename == str(saved))
        else:  # a flip in the spelling of a safetensors header may mean the same; data never does
            assert saved.name == "allocation"
            assert position < 400
            assert loaded == same
    assert len(named) > 50
    assert all(named)


def test_foreign_files(saved):
    saved.write_bytes(os.urandom(4096))
    assert_unusable(saved)
    safetensors.numpy.save_file({"rows": np.ones(3, np.int32)}, saved)
    assert_unusable(saved)


def test_files_that_cannot_be_opened(tmp_path, saved):
    load = LOADERS[saved.name]
    with pytest.raises(FileNotFoundError) as caught:
        load(tmp_path / "nowhere")
    assert caught.value.filename == str(tmp_path / "nowhere")
    with pytest.raises(OSError):
        load(tmp_path)


def crc(content):
    return _C.crc32c(np.frombuffer(content, np.uint8))


def forge_counter(
    path,
    edges,
    counts,
    frequency=(1, 2),
    vocab_size=2,
    parse=0,
    num_tokens=3,
    max_codewords=2**32 - 1,
    version=2,
):
    """A counter file whose size and checksums are right, whatever it holds."""
    sections = [
        np.array(frequency, "<i8").tobytes(),
        np.array(edges, "<u4").tobytes(),
        np.array(counts, "<i8").tobytes(),
    ]
    sizes = (version, parse, vocab_size, len(counts), max_codewords, num_tokens)
    header = struct.pack("<8sIIQQQQIII", b"L3LZW\r\n\0", *sizes, *map(crc, sections))
    path.write_bytes(header + struct.pack("<I", crc(header)) + b"".join(sections))
    return path


def test_a_forged_counter(tmp_path):
    path = tmp_path / "counter"
    good = l3ext.LZWCounter.load(forge_counter(path, [(0, 1), (2, 1)], [5, 6, 7, 8]))
    assert list(good.codewords()) == [((0,), 5), ((1,), 6), ((0, 1), 7), ((0, 1, 1), 8)]
    for changes, message in [
        ({"edges": [(0, 1), (3, 1)]}, "codeword 3 has parent 3 and token 1"),  # its own parent
        ({"edges": [(0, 2), (2, 1)]}, "codeword 2 has parent 0 and token 2"),
        ({"edges": [(2**32 - 1, 0), (2, 1)]}, "codeword 2 has parent 4294967295"),
        ({"edges": [(0, 1), (0, 1)]}, "codeword 3 has parent 0 and token 1"),  # twice
        ({"counts": [5, 6, -7, 8]}, "count -7 of codeword 2"),
        ({"frequency": [-1, 4]}, "frequency -1 of token 0"),
        ({"frequency": [2**63 - 1, 2**63 - 1]}, "frequency 9223372036854775807 of token 1"),
        ({"num_tokens": 4}, "expected frequencies that sum up to 4, got 3"),
        ({"vocab_size": 0}, "vocab_size 0"),
        ({"vocab_size": 2**61}, "vocab_size 2305843009213693952"),
        ({"vocab_size": 3}, "wrong checksum of the frequencies"),
        ({"parse": 2}, "unknown parse 2"),
        ({"max_codewords": 1}, "max_codewords 1"),
        ({"max_codewords": 3}, "num_codewords 4"),
        ({"max_codewords": 2**32}, "max_codewords 4294967296"),
        ({"version": 1}, "expected version 2, got 1"),
    ]:
        forge_counter(path, **{"edges": [(0, 1), (2, 1)], "counts": [5, 6, 7, 8], **changes})
        with pytest.raises(OSError, match=message):
            l3ext.LZWCounter.load(path)


def test_a_counter_does_not_wait_for_a_fifo(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(OSError, match="expected a regular file"):
        l3ext.LZWCounter.load(tmp_path / "fifo")


@pytest.mark.parametrize("kind", ["counter", "allocation"])
def test_a_full_disk_keeps_the_old_file(tmp_path, counter, kind):
    path = tmp_path / kind
    thing = counter if kind == "counter" else counter.allocate(200)
    thing.save(path)
    old = path.read_bytes()
    counter.update(*pack(zipf_documents(2)))
    thing = counter if kind == "counter" else counter.allocate(5000)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (300, before[1]))
        with pytest.raises(OSError, match="the old file stays") as caught:
            thing.save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert caught.value.filename == str(path)
    assert path.read_bytes() == old
    assert [entry.name for entry in tmp_path.iterdir()] == [kind]
    thing.save(path)
    assert path.read_bytes() != old


# --- Ctrl-C -------------------------------------------------------------------------------------


def interrupt_after(seconds, action):
    """Run ``action`` while a timer sends what Ctrl-C sends; True if it was interrupted."""
    done = []

    def interrupt(signum, frame):
        if not done:  # a late signal must not end the whole run
            raise KeyboardInterrupt

    handler = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        action()
        done.append(True)
    except KeyboardInterrupt:
        return True
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
    return False


def cpu_seconds(action):
    """What this process computed meanwhile, however long others kept the processor from it."""
    before = time.process_time()
    action()
    return time.process_time() - before


@pytest.mark.parametrize("parse", ["paper", "lzw"])
def test_ctrl_c_leaves_the_counter_unchanged(parse):
    generator = np.random.default_rng(1)
    tokens = generator.integers(0, 50, 12_000_000).astype(np.int32)
    offsets = np.arange(0, tokens.size + 1, 1000)
    before = state(counted(zipf_documents(1), 50, parse))
    whole = cpu_seconds(lambda: counted([], 50, parse).update(tokens, offsets))
    for share in (0.2, 0.15, 0.1):  # by then the ids are checked, and the parse is on its way
        counter = counted(zipf_documents(1), 50, parse)
        started = time.process_time()
        interrupted = interrupt_after(
            share * whole,
            lambda: counter.update(tokens, offsets),  # noqa: B023
        )
        soon = time.process_time() - started < whole / 2
        # The signal may come between the update and the return to Python.
        if interrupted and soon and counter.num_tokens < tokens.size:
            break
    else:
        pytest.fail("no update stopped before half of it was done")
    assert state(counter) == before
    part = slice(0, 100_001)
    counter.update(tokens[part], [0, 100_001])
    untouched = counted(zipf_documents(1), 50, parse)
    untouched.update(tokens[part], [0, 100_001])
    assert state(counter) == state(untouched)


def test_ctrl_c_in_a_long_grant():
    counter = l3ext.LZWCounter(1)
    assert interrupt_after(0.1, lambda: counter.allocate(2**31 - 1, max_rows=2**31 - 1))
    assert counter.allocate(5).rows.tolist() == [5]


def test_a_signal_handler_that_uses_the_counter_gets_an_error_not_a_deadlock():
    tokens = np.random.default_rng(1).integers(0, 50, 6_000_000).astype(np.int32)
    counter = l3ext.LZWCounter(50)
    seen = []

    def look(*_):
        try:
            seen.append(counter.num_tokens)
        except RuntimeError as error:
            seen.append(str(error))

    handler = signal.signal(signal.SIGALRM, look)
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    try:
        counter.update(tokens)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
    assert counter.num_tokens == tokens.size
    assert len(seen) == 1
    assert "in use by the call" in seen[0]


def test_reading_while_another_thread_counts():
    tokens = np.random.default_rng(1).integers(0, 50, 2_000_000).astype(np.int32)
    counter = l3ext.LZWCounter(50)
    worker = threading.Thread(target=counter.update, args=(tokens,))
    worker.start()
    for _ in range(100):
        assert counter.num_tokens in (0, tokens.size)
        assert len(list(counter.codewords(60))) >= 50
    worker.join()


# --- fork ---------------------------------------------------------------------------------------


# In a child the thread that was in a call is missing. Here it is the one that forks, in a signal's
# handler within the call, where the counter is in use for certain.
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_fork_during_an_update():
    run_script(
        """
        import gc, os, signal
        import numpy as np
        import l3ext
        busy, idle = l3ext.LZWCounter(100), l3ext.LZWCounter(100)
        tokens = np.random.default_rng(0).integers(0, 100, 1 << 20).astype(np.int32)
        idle.update(tokens[:1000])
        def use():
            global busy
            uses = [lambda: busy.num_tokens, lambda: busy.update([1]), lambda: busy.merge(idle),
                    lambda: idle.merge(busy), lambda: busy.save("counter")]
            for use in uses:
                try:
                    use()
                    return 1
                except RuntimeError as error:
                    expected = f"in use by a thread of process {os.getppid()} when fork() made"
                    assert expected in str(error), error
            del busy, use, uses
            gc.collect()
            idle.update(tokens, threads=2)
            return 0 if idle.num_tokens == tokens.size + 1000 else 2
        children = []
        def fork(*_):
            try:
                busy.num_tokens  # between two calls it is free
                return
            except RuntimeError:
                child = os.fork()
            if child == 0:
                signal.alarm(100)  # ends a child that hangs
                status = 3
                try:
                    status = use()
                finally:
                    os._exit(status)
            children.append(child)
        signal.signal(signal.SIGALRM, fork)
        while not children:
            signal.setitimer(signal.ITIMER_REAL, 0.002)
            busy.update(tokens, threads=2)
        assert os.waitstatus_to_exitcode(os.waitpid(children[0], 0)[1]) == 0
        before = busy.num_tokens
        busy.update(tokens, threads=2)
        assert busy.num_tokens == before + tokens.size
        """
    )


# A counter that nobody uses is the child's own, like any other memory.
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_child_counts_on():
    run_script(
        """
        import os, signal
        import numpy as np
        import l3ext
        counter = l3ext.LZWCounter(100)
        tokens = np.random.default_rng(0).integers(0, 100, 1 << 18).astype(np.int32)
        counter.update(tokens, threads=2)
        child = os.fork()
        if child == 0:
            signal.alarm(100)  # ends a child that hangs
            counter.update(tokens, threads=2)
            os._exit(0 if counter.num_tokens == 2 * tokens.size else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert counter.num_tokens == tokens.size
        """
    )
