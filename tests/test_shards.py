"""Shards in processes are shards in one process, one shard is exact, and failures leave nothing."""

import itertools
import os
import signal
import subprocess
import sys
import tempfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import l3ext
from l3ext import shards as shards_module
from l3ext.corpus import TokenChunk
from l3ext.shards import count_shards, count_shards_in_processes, deal
from tests.lzw.helpers import counted, pack, state, zipf_documents


def chunks_of(documents, cuts=()):
    """The documents in chunks that end at ``cuts``."""
    bounds = [0, *sorted(cuts), len(documents)]
    for begin, end in itertools.pairwise(bounds):
        yield TokenChunk(*pack(documents[begin:end]))


@st.composite
def corpora(draw):
    vocab_size = draw(st.integers(1, 4))
    document = st.lists(st.integers(0, vocab_size - 1), max_size=20)
    documents = draw(st.lists(document, max_size=12))
    cuts = draw(st.lists(st.integers(0, len(documents)), max_size=4))
    return vocab_size, documents, cuts


def by_shard(documents, shards, run_tokens, token=0):
    """Documents by shard, by the definition: those that begin in one run of tokens together."""
    dealt = [[] for _ in range(shards)]
    for document in documents:
        dealt[token // run_tokens % shards].append(document)
        token += len(document)
    return dealt


@given(corpus=corpora(), shards=st.integers(1, 5), run=st.integers(1, 60), first=st.integers(0, 70))
def test_runs_of_documents_are_dealt_in_turn(corpus, shards, run, first):
    _, documents, _ = corpus
    parts = deal(TokenChunk(*pack(documents)), first, shards, run)
    got = [
        [part.tokens[a:b].tolist() for a, b in itertools.pairwise(part.offsets)] for part in parts
    ]
    assert got == by_shard(documents, shards, run, first)


@pytest.mark.parametrize("parse", ["paper", "lzw"])
@given(
    corpus=corpora(),
    shards=st.integers(1, 5),
    run=st.integers(1, 60),
    room=st.none() | st.integers(0, 30),
)
@settings(max_examples=100, deadline=None)
def test_shards_are_counters_of_their_own_merged_in_order(parse, corpus, shards, run, room):
    vocab_size, documents, cuts = corpus
    bound = None if room is None else shards * vocab_size + room
    each = None if bound is None else bound // shards
    dealt = by_shard(documents, shards, run)
    expected, *others = (counted(part, vocab_size, parse, each) for part in dealt)
    for other in others:
        expected.merge(other)
    counter = count_shards(
        chunks_of(documents, cuts), vocab_size, shards=shards, parse=parse, max_codewords=bound,
        run_tokens=run,
    )  # fmt: skip
    assert state(counter) == state(expected)
    if shards == 1:
        assert state(counter) == state(counted(documents, vocab_size, parse, bound))


@pytest.mark.parametrize(
    ("shards", "parse", "bound"), [(1, "paper", None), (3, "lzw", None), (4, "paper", 1000)]
)
def test_processes_count_what_one_process_counts(shards, parse, bound):
    documents = zipf_documents(3, documents=500, length=200, vocab_size=50)
    arguments = {"shards": shards, "parse": parse, "max_codewords": bound, "run_tokens": 999}
    here = count_shards(chunks_of(documents), 50, **arguments)
    there = count_shards_in_processes(chunks_of(documents, [100, 100, 333]), 50, **arguments)
    # Loaded counters have grown otherwise: everything but their memory is the same.
    assert state(there)[:4] == state(here)[:4]
    assert there.max_codewords == here.max_codewords
    assert (there.parse, there.allocate(200, 16)) == (parse, here.allocate(200, 16))


def test_more_shards_than_documents():
    counter = count_shards_in_processes(chunks_of([[0, 1, 0, 1]]), 3, shards=5)
    assert state(counter)[:4] == state(counted([[0, 1, 0, 1]], 3))[:4]
    assert count_shards_in_processes(iter([]), 3, shards=2).num_tokens == 0


# --- what is refused, and what breaks -----------------------------------------------------------


@pytest.mark.parametrize("count", [count_shards, count_shards_in_processes])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shards": 0}, "shards: expected 1 to 1024, got 0"),
        ({"shards": 2, "run_tokens": 0}, "run_tokens: expected at least 1, got 0"),
        ({"shards": 1025}, "shards: expected 1 to 1024, got 1025"),
        (
            {"shards": 3, "max_codewords": 149},
            r"at least shards \* vocab_size = 3 \* 50 .* got 149",
        ),
    ],
)
def test_nonsense(count, arguments, message):
    with pytest.raises(ValueError, match=message):
        count(iter([]), 50, **arguments)


@pytest.mark.parametrize("count", [count_shards, count_shards_in_processes])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chunks": None}, "chunks: expected collections.abc.Iterable, got NoneType"),
        ({"chunks": [[1, 2]]}, "chunks: expected l3ext.corpus.TokenChunk, got list"),
        ({"vocab_size": None}, "vocab_size: expected an int, got None"),
        ({"shards": None}, "shards: expected an int, got None"),
        ({"parse": None}, 'parse: expected "paper" or "lzw", got NoneType'),
        ({"max_codewords": "9"}, "max_codewords: expected an int, got '9'"),
        ({"run_tokens": 1.5}, r"run_tokens: expected an int, got 1\.5"),
    ],
)
def test_arguments_of_another_kind(count, changes, message):
    arguments = {"chunks": [], "vocab_size": 50, "shards": 1} | changes
    with pytest.raises(TypeError, match=message):
        count(arguments.pop("chunks"), arguments.pop("vocab_size"), **arguments)


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """The directory of temporary files, empty."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.fixture
def processes(monkeypatch):
    """The worker processes that were started."""
    started = []

    class Recorded(subprocess.Popen):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            started.append(self)

    monkeypatch.setattr(shards_module.subprocess, "Popen", Recorded)
    return started


def assert_nothing_left(temporary, processes, count):
    assert len(processes) == count
    assert all(process.returncode is not None for process in processes)
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize("bad", [-1, 50, 2**40])
def test_an_id_out_of_range_is_named_by_its_place_in_the_corpus(bad, temporary, processes):
    good = TokenChunk(np.zeros(7, np.int64), np.array([0, 3, 7]))
    wrong = TokenChunk(np.array([1, 2, 3, bad, 4]), np.array([0, 0, 2, 5]))
    message = rf"tokens: expected ids in \[0, 50\), got {bad} at token 1 of document 4"
    with pytest.raises(ValueError, match=message):
        count_shards_in_processes(iter([good, wrong]), 50, shards=2)
    assert_nothing_left(temporary, processes, 2)


@pytest.mark.parametrize("when", ["while it is sent documents", "before it has written"])
def test_a_killed_process(when, temporary, processes):
    documents = [[1, 2, 3] * 2000] * 100

    def chunks():
        for chunk in chunks_of(documents, [10, 50, 90]):
            yield chunk
            if when == "while it is sent documents":
                processes[1].kill()
        processes[1].kill()

    message = r"shard 1 of 3: its process was killed by signal 9 \(Killed\)"
    with pytest.raises(RuntimeError, match=message):
        count_shards_in_processes(chunks(), 50, shards=3, run_tokens=1)
    assert_nothing_left(temporary, processes, 3)


def test_a_process_that_cannot_write_its_counter_says_why(temporary, processes):
    def chunks():
        yield from chunks_of([[1, 2, 3]])
        (folder,) = temporary.iterdir()
        (folder / "1").mkdir()  # where the second shard's counter would go

    with pytest.raises(RuntimeError, match=r"shard 1 of 2: .* status 1: IsADirectoryError"):
        count_shards_in_processes(chunks(), 50, shards=2)
    assert_nothing_left(temporary, processes, 2)


def test_a_process_that_cannot_start(temporary, processes, monkeypatch, tmp_path_factory):
    # The first one alone: of two, either might be found first.
    python = tmp_path_factory.mktemp("executable") / "python"
    python.write_text(
        "#!/bin/sh\nfor last; do :; done\n"
        f'case "$last" in */0) exit 1;; esac\nexec "{sys.executable}" "$@"\n'
    )
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(RuntimeError, match=r"shard 0 of 2: its process ended with status 1$"):
        count_shards_in_processes(chunks_of([[1] * 10] * 1000), 50, shards=2)
    assert_nothing_left(temporary, processes, 2)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_whatever_is_raised_nothing_is_left(error, temporary, processes):
    def chunks():
        yield from chunks_of([[1, 2, 3]])
        raise error

    with pytest.raises(error):
        count_shards_in_processes(chunks(), 50, shards=2)
    assert_nothing_left(temporary, processes, 2)


def test_processes_end_with_the_one_that_started_them(tmp_path):
    code = (
        "import os, signal, subprocess\n"
        "from l3ext import shards\n"
        "from l3ext.corpus import TokenChunk\n"
        "import numpy as np\n"
        "def chunks():\n"
        "    yield TokenChunk(np.zeros(5, np.int32), np.array([0, 5]))\n"
        "    here = f'/proc/{os.getpid()}/task/{os.getpid()}/children'\n"
        "    print(open(here).read(), flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "shards.count_shards_in_processes(chunks(), 3, shards=2)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=100,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TMPDIR": str(tmp_path)},
    )  # fmt: skip
    assert result.returncode == -signal.SIGKILL
    children = [int(child) for child in result.stdout.split()]
    assert len(children) == 2
    for child in children:
        for _ in range(300):
            if not is_running(child):
                break
            signal.sigtimedwait([], 0.1)
        assert not is_running(child)


def is_running(process):
    try:
        with open(f"/proc/{process}/stat") as stream:
            return stream.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_the_worker_imports_no_torch():
    code = "import sys; sys.argv[1:] = ['3', 'paper', '', '/nowhere/x']\n"
    code += "from l3ext._shard_worker import main\n"
    code += "try: main()\nexcept EOFError: pass\nprint('torch' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, stdin=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert result.stdout == "False\n", result.stderr


def test_an_empty_counter_is_a_shard(tmp_path):
    counter = count_shards(chunks_of([]), 3, shards=3)
    assert state(counter) == state(l3ext.LZWCounter(3))
