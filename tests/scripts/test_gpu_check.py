"""The GPU check where there is no GPU: its messages, and what it does with fake tools."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts/gpu_check.sh"
PARTS = [
    "build",
    "device",
    "tests",
    "memcheck",
    "compiled",
    "bench",
    "profile",
    "tied",
    "graph",
    "sanitize",
    "peers",
    "choices",
    "text",
    "cpp",
    "fetch",
    "benchcpp",
]


def run(*arguments, script=SCRIPT, **environment):
    return subprocess.run(
        ["bash", str(script), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        env={"PATH": os.environ["PATH"], "PYTHON": sys.executable, **environment},
    )


def tool(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/usr/bin/env bash\n" + text)
    path.chmod(0o755)


@pytest.fixture
def fake(tmp_path):
    """A checkout whose tools are fakes that succeed; a test replaces the one it is about."""
    tree, tools = tmp_path / "tree", tmp_path / "tools"
    (tree / "scripts").mkdir(parents=True)
    (tree / "l3ext").mkdir()
    for name in ("gpu_check.sh", "summarize_bench.py"):
        shutil.copy(ROOT / "scripts" / name, tree / "scripts")
    tool(
        tools / "nvidia-smi",
        """case $1 in
*=name) echo "NVIDIA H200" ;;
*=compute_cap) echo 9.0 ;;
*=driver_version) echo 580.1 ;;
esac
""",
    )
    tool(tools / "nvcc", "")
    tool(tools / "ctest", "")
    tool(
        tools / "cmake",
        """echo "$@" >>cmake.log
mkdir -p build/gpu/tests/cpp
touch build/gpu/_C.fake.so
for test in cuda_device_test cuda_runtime_test; do
  [[ -e build/gpu/tests/cpp/$test ]] || printf '#!/usr/bin/env bash\n' >build/gpu/tests/cpp/$test
  chmod +x build/gpu/tests/cpp/$test
done
""",
    )
    tool(tools / "compute-sanitizer", "")
    # Everything but the summary is a no-op.
    tool(
        tools / "python",
        f"""case $1 in
scripts/*) exec {sys.executable} "$@" ;;
*) echo "$@" >>python.log ;;
esac
""",
    )

    def check(*arguments):
        path = f"{tools}{os.pathsep}{os.environ['PATH']}"
        script = tree / "scripts/gpu_check.sh"
        return run(*arguments, script=script, PATH=path, PYTHON=str(tools / "python"))

    return tree, tools, check


def test_the_parts_are_listed_and_fit_the_time():
    done = run("--list")
    assert done.returncode == 0
    assert [line.split()[0] for line in done.stdout.splitlines()] == PARTS


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "kernels"], "--only: expected one of build device tests"),
        (["--only", ".*"], "--only: expected one of"),
        (["--only"], "--only: expected a value, got none"),
        (["--seconds", "ten"], "--seconds: expected a whole number, got ten"),
        (["--text", "/nowhere/text"], "--text: cannot read /nowhere/text"),
        (["now"], "expected --only, --out, --text, --seconds or --list, got now"),
    ],
)
def test_a_wrong_call_is_an_error(arguments, message):
    done = run(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith(f"gpu_check: {message}")


def test_without_a_gpu_it_says_so(tmp_path):
    for name in ("bash", "awk", "dirname", "basename", "cat"):
        (tmp_path / name).symlink_to(shutil.which(name))
    done = run(PATH=str(tmp_path))
    assert done.returncode == 3
    assert done.stderr == "gpu_check: no GPU here: nvidia-smi is not on PATH\n"
    tool(tmp_path / "nvidia-smi", "exit 9")
    done = run(PATH=str(tmp_path))
    assert done.returncode == 3
    assert done.stderr == "gpu_check: no GPU here: nvidia-smi finds none\n"


def test_a_python_without_torch_is_named(fake):
    _, tools, check = fake
    tool(tools / "python", "exit 1")
    done = check()
    assert done.returncode == 3
    assert "expected one with torch for CUDA, pybind11 and pytest" in done.stderr


def test_everything_runs_and_is_summed_up(fake):
    tree, _, check = fake
    done = check()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "NVIDIA H200, driver 580.1" in done.stdout
    summary = done.stdout.split("\n\n")[1].splitlines()
    assert [line.split()[0] for line in summary] == PARTS
    for line in summary[-2:]:
        assert line.endswith(
            "skipped: google-benchmark is not here: the C++ benchmark was not built"
        )
    assert all(line.endswith("passed") for line in summary[:-2])
    assert "-DCMAKE_CUDA_ARCHITECTURES=90a-real" in (tree / "cmake.log").read_text()
    assert (tree / "l3ext/_C.fake.so").exists()
    assert (tree / "benchmarks/results/nvidia-h200/gpu_check.log").exists()
    calls = (tree / "python.log").read_text()
    for part in ("values", "torch"):
        (tests,) = [line for line in calls.splitlines() if f"/test_{part}.py" in line]
        assert tests.startswith("-m pytest -vv -k not cpu -o faulthandler_timeout=")
        assert "--timeout-method=thread" in tests
    assert "-m l3ext bench attention --device cuda --output" in calls
    assert "benchmarks/compare_graph_steps.py --device cuda" in calls
    assert "benchmarks/compare_choices.py --device cuda --output" in calls
    assert "benchmarks/profile_attention.py --device cuda --output" in calls


def test_only_some_parts(fake, tmp_path):
    tree, _, check = fake
    text = tmp_path / "my text.txt"
    text.write_text("text")
    done = check("--only", "text", "--out", tmp_path / "out", "--text", text)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = done.stdout.split("\n\n")[1].splitlines()
    assert [line.split()[0] for line in summary] == ["build", "text"]
    assert f"/attention-text.json {text} --peer none" in (tree / "python.log").read_text()


def test_the_cpu_halves_alone_are_left_out():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-k", "not cpu", "tests/gpu"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    tests = [line for line in done.stdout.splitlines() if "::" in line]
    assert len(tests) > 100
    assert not [test for test in tests if "cpu" in test.lower()]
    for path in (ROOT / "tests/gpu").glob("test_*.py"):  # which -k looks at, too
        names = [path.name, *re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)]
        assert not [name for name in names if "cpu" in name.lower()]


def test_a_failure_is_said_before_a_later_test_ends_the_process(tmp_path):
    shutil.copy(ROOT / "tests/gpu/conftest.py", tmp_path)
    (tmp_path / "test_two.py").write_text(
        "import os\ndef test_fails():\n    assert 7 * 6 == 41\ndef test_dies():\n    os._exit(1)\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-v", tmp_path],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=280,
    )
    assert done.returncode == 1
    assert "assert 42 == 41" in done.stdout.replace("(7 * 6)", "42")


def test_every_file_of_tests_is_in_a_part(fake):
    tree, _, check = fake
    assert check("--only", "tests", "--only", "compiled").returncode == 0
    run = [word for word in (tree / "python.log").read_text().split() if word.endswith(".py")]
    assert run[0] == "tests/gpu/test_values.py"
    assert sorted(run) == sorted(
        str(path.relative_to(ROOT)) for path in (ROOT / "tests/gpu").glob("test_*.py")
    )


def test_no_more_than_eight_files_come_of_it(fake, tmp_path):
    """Whatever runs; an earlier archive is added to; what a stopped program left is gone."""
    tree, tools, check = fake
    (tools / "python").write_text(
        (tools / "python").read_text()
        + """while (($#)); do
  if [[ $1 == --output ]]; then
    echo "{}" >"$2"
    touch "$2.tmp.7.0"
  fi
  shift
done
"""
    )
    tool(
        tree / "build/gpu/benchmarks/bench_prefetch",
        'for word; do [[ $word == --benchmark_out=* ]] && echo "{}" >"${word#*=}"; done; :',
    )
    out = tmp_path / "out"
    done = check("--out", out)
    assert done.returncode == 0, done.stdout + done.stderr
    everything = sorted(path.name for path in out.iterdir())
    assert len(everything) == 8
    shutil.copy(
        tree / "build/gpu/benchmarks/bench_prefetch",
        tree / "build/gpu/benchmarks/bench_segmented_attention",
    )
    assert check("--out", out, "--only", "benchcpp").returncode == 0
    assert sorted(path.name for path in out.iterdir()) == everything
    with tarfile.open(out / "more.tar.gz") as archive:
        names = sorted(Path(name).name for name in archive.getnames() if name.endswith(".json"))
    assert names == ["attention-cpp.json", "attention-text.json", "prefetch-cpp.json"]


def test_a_part_that_overruns_is_stopped_and_the_rest_runs(fake):
    _, tools, check = fake
    tool(tools / "ctest", "echo working; sleep 30")
    done = check("--only", "cpp", "--only", "benchcpp", "--seconds", "5")
    assert done.returncode == 1
    summary = done.stdout.split("\n\n")[1].splitlines()
    assert "passed" in summary[0]
    assert "stopped after" in summary[1]
    assert "benchcpp" in summary[2]
    assert "    working" in done.stdout


def test_a_part_that_fails_shows_its_last_words_and_the_rest_runs(fake):
    _, tools, check = fake
    tool(tools / "ctest", "echo the reason; exit 8")
    done = check("--only", "cpp", "--only", "benchcpp")
    assert done.returncode == 1
    assert "failed with exit status 8" in done.stdout
    assert "    the reason" in done.stdout
    assert "skipped: google-benchmark" in done.stdout


def test_what_a_part_says_is_in_the_log_at_once(fake, tmp_path):
    """Even where all of it is killed."""
    tree, tools, _ = fake
    tool(tools / "ctest", "echo working; exec sleep 300")
    running = subprocess.Popen(
        ["bash", tree / "scripts/gpu_check.sh", "--only", "cpp", "--out", tmp_path / "out"],
        env={"PATH": f"{tools}:{os.environ['PATH']}", "PYTHON": str(tools / "python")},
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    log, end = tmp_path / "out/gpu_check.log", time.monotonic() + 50
    try:
        while not (log.exists() and "working" in log.read_text()):
            assert time.monotonic() < end
            time.sleep(0.1)
        assert "=== build: passed" in log.read_text()
    finally:
        for group in sessions_groups(running.pid):
            os.killpg(group, signal.SIGKILL)
        running.wait()


def sessions_groups(session):
    """The process groups of a session: a part is one of its own."""
    groups = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            of_group, of_session = stat.read_text().rpartition(")")[2].split()[2:4]
            if int(of_session) == session:
                groups.add(int(of_group))
    return groups


def test_nothing_stands_without_a_build(fake):
    _, tools, check = fake
    tool(tools / "cmake", "echo no compiler; exit 1")
    done = check()
    assert done.returncode == 1
    (only,) = done.stdout.split("\n\n")[1].splitlines()
    assert only.split() == ["build", "0", "s", "failed", "with", "exit", "status", "1"]


def test_a_test_that_does_not_compile_takes_nothing_with_it(fake):
    tree, tools, check = fake
    cmake = (tools / "cmake").read_text()
    tool(tools / "cmake", cmake + '[[ "$* " != *"cuda_runtime_test "* ]]')
    done = check("--only", "device", "--only", "tests")
    assert done.returncode == 1
    summary = [line.split() for line in done.stdout.split("\n\n")[1].splitlines()]
    assert [(line[0], line[3]) for line in summary] == [
        ("build", "failed"), ("device", "passed"), ("tests", "passed"),
    ]  # fmt: skip
    built = [
        line.split("--target ")[1] for line in (tree / "cmake.log").read_text().splitlines()[1:]
    ]
    assert built[:2] == ["_C -- -k", "cuda_device_test cuda_runtime_test -- -k"]


def test_one_program_that_fails_hides_no_other(fake):
    """Nor one that is killed."""
    tree, tools, check = fake
    for failing in ("exit 3", "kill -9 $$"):
        tool(tree / "build/gpu/tests/cpp/cuda_device_test", f"echo the first; {failing}")
        tool(tree / "build/gpu/tests/cpp/cuda_runtime_test", "echo the second")
        done = check("--only", "device")
        assert done.returncode == 1
        log = (tree / "benchmarks/results/nvidia-h200/gpu_check.log").read_text()
        assert "the first\n" in log
        assert "the second\n" in log
    tool(tools / "compute-sanitizer", "[[ $* != *initcheck* ]]")
    done = check("--only", "sanitize", "--only", "memcheck")
    assert done.returncode == 1
    summary = done.stdout.split("\n\n")[1].splitlines()
    assert [line.split()[3] for line in summary] == ["passed", "passed", "failed"]
    for tool_name in ("synccheck", "initcheck", "racecheck"):
        for program in ("cuda_device_test", "cuda_runtime_test"):
            assert f"== {tool_name} {program}" in done.stdout


def test_a_device_that_the_sanitizer_does_not_support_is_skipped(fake):
    _, tools, check = fake
    tool(tools / "compute-sanitizer", "echo run >>sanitizer.log; echo Device not supported; exit 1")
    done = check("--only", "sanitize", "--only", "memcheck")
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("skipped: compute-sanitizer does not support the device here") == 4
    assert (fake[0] / "sanitizer.log").read_text().count("run") == 2  # once each


def test_figures_are_summed_up(tmp_path, capsys):
    import summarize_bench

    row = {"median": 1e-3, "p10": 9e-4, "p90": 2e-3, "runs": 100, "fraction": 0.625}
    result = {
        "machine": {"cpu": "Xeon", "gpu": "NVIDIA H200", "torch": "2.11", "commit": "abc"},
        "source": "Zipf(1)",
        "table_rows": 710000,
        "d_in": 2048,
        "d_emb": 1024,
        "dtype": "bfloat16",
        "bandwidth": 4.3e12,
        "gemm": 7.9e14,
        "measurements": [
            {
                "regime": "forward",
                "num_tokens": 65536,
                "results": {"l3ext": row},
                "failures": {"FlexAttention": "RuntimeError: out of shared memory"},
            }
        ],
    }
    path = tmp_path / "attention-bench.json"
    path.write_text(json.dumps([result]))
    (tmp_path / "cpp.json").write_text("{}")
    assert summarize_bench.main([str(path), str(tmp_path / "cpp.json")]) == 0
    printed = capsys.readouterr().out
    assert "NVIDIA H200, torch 2.11, commit abc: Zipf(1), 710000 rows of 2048 + 1024" in printed
    assert "1000.0 µs   62.5 %" in printed
    assert "did not run: RuntimeError: out of shared memory" in printed
    kernels = [{"kernel": "forward_kernel<bf16, 8, true>", "share": 0.914, "total_us": 914.0}]
    profile = {
        "regime": "forward",
        "num_tokens": 16384,
        "span_us": 1000.0,
        "idle_us": 12.3,
        "kernels": kernels,
    }
    machine = result["machine"]
    path.write_text(json.dumps({"machine": machine, "profiles": [profile]}))
    assert summarize_bench.main([str(path)]) == 0
    printed = capsys.readouterr().out
    assert "NVIDIA H200, torch 2.11, commit abc" in printed
    assert "forward 16384" in printed
    assert "1000.0 µs, 12.3 idle; 91 % forward_kernel<bf16, 8, true>" in printed
    path.write_text("no JSON")
    assert summarize_bench.main([str(path)]) == 2
    assert "summarize_bench:" in capsys.readouterr().err
    good = tmp_path / "good.json"
    good.write_text(json.dumps([result]))
    assert summarize_bench.main([str(path), str(good)]) == 2
    assert "NVIDIA H200" in capsys.readouterr().out  # one that cannot be read hides no other
