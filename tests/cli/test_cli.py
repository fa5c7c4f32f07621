"""What all commands have in common, and ``l3ext doctor``."""

import json
import re
import signal
import subprocess
import sys
import time

import pytest
from command_line import SIZES, command, invoke, run_process
from tokenizers import Tokenizer, models

import l3ext
from l3ext.cli._group import describe_error
from l3ext.cli._output import format_bytes, parse_bytes

COMMANDS = ("allocate", "train", "generate", "inspect", "doctor")


def test_version():
    assert invoke("--version").stdout.strip() == f"l3ext {l3ext.__version__}"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_examples_and_json(name):
    result = invoke(name, "--help")
    assert result.exit_code == 0
    assert re.search(rf"Examples:\s+l3ext {name}", result.stdout)
    assert "--json" in result.stdout


def run_probe(probe):
    line, environment = command()
    done = subprocess.run(
        [line[0], "-c", probe], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_help_does_not_import_torch():
    printed = run_probe(
        "import sys, l3ext.cli\n"
        "sys.argv = ['l3ext', '--help']\n"
        "try:\n    l3ext.cli.main()\n"
        "finally:\n    assert not {'torch', 'transformers'} & set(sys.modules), 'slow'\n"
    )
    assert all(name in printed for name in COMMANDS)


def test_modules_load_when_they_are_asked_for():
    run_probe(
        "import sys, l3ext\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)\n"
        "assert {'models', 'nn', 'L3Layer'} <= set(dir(l3ext))\n"
        "assert l3ext.nn.L3Layer is l3ext.L3Layer\n"
        "assert l3ext.nn is sys.modules['l3ext.nn']\n"
        "assert 'transformers' not in sys.modules\n"
        "assert l3ext.models.L3LlamaConfig.model_type == 'l3_llama'\n"
    )


def test_unknown_commands_and_options():
    assert invoke("fly").exit_code == 2
    assert "No such option" in invoke("doctor", "--fast").stderr


def test_an_error_is_one_line_without_traceback(tmp_path):
    done = run_process("inspect", tmp_path / "none")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == f"error: {tmp_path / 'none'}: no such file or directory\n"


def test_a_package_that_is_missing_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").touch()
    words = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    words.save(str(tmp_path / "tokenizer.json"))
    options = ("--tokenizer", tmp_path / "tokenizer.json", "--rows", 4, "-o", tmp_path / "out")
    result = invoke("allocate", tmp_path / "a.parquet", *options)
    assert result.exit_code == 2
    assert "Parquet needs pyarrow: pip install l3ext[data]" in result.stderr


def test_a_traceback_when_asked(tmp_path, monkeypatch):
    monkeypatch.setenv("L3EXT_TRACEBACK", "1")
    result = invoke("inspect", tmp_path / "none")
    assert isinstance(result.exception, FileNotFoundError)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError("k: expected 1\n  got 0"), "k: expected 1 got 0"),
        (OSError(2, "gone", "/a/b"), "/a/b: gone"),
        (OSError(5, "/a/b: torn", "/a/b"), "/a/b: torn"),
        (OSError("plain"), "plain"),
        (RuntimeError(), "RuntimeError"),
    ],
)
def test_describe_error(error, text):
    assert describe_error(error) == text


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("0", 0),
        ("4096", 4096),
        ("64MiB", 64 << 20),
        ("64 mib", 64 << 20),
        ("1.5GB", 1_500_000_000),
        ("2k", 2000),
        ("3KiB", 3072),
        ("7B", 7),
    ],
)
def test_parse_bytes(text, count):
    assert parse_bytes(text, "--memory") == count


@pytest.mark.parametrize("text", ["", "MiB", "-1", "1XB", "1 2", "nan", "1e3"])
def test_parse_bytes_refuses(text):
    with pytest.raises(ValueError, match="--memory: expected a size such as 64MiB"):
        parse_bytes(text, "--memory")


def test_format_bytes():
    sizes = [format_bytes(n) for n in (0, 1023, 1536, 64 << 20, 1 << 50)]
    assert sizes == ["0 B", "1023 B", "1.5 KiB", "64.0 MiB", "1024.0 TiB"]


def test_doctor(tmp_path):
    result = invoke("doctor", "--directory", tmp_path, "--json")
    assert result.exit_code == 0
    facts = json.loads(result.stdout)
    assert {"l3ext", "instruction sets", "CUDA in l3ext", "memlock limit", "O_DIRECT"} <= {
        fact["name"] for fact in facts
    }
    assert all(fact["value"] and fact["meaning"] for fact in facts)
    assert list(tmp_path.iterdir()) == []
    text = invoke("doctor", "--directory", tmp_path).stdout
    assert all(fact["name"] in text for fact in facts)


def test_doctor_where_nothing_can_be_written(tmp_path):
    assert "expected a directory" in invoke("doctor", "--directory", tmp_path / "none").stderr
    result = invoke("doctor", "--directory", "/proc", "--json")
    (uring,) = [fact for fact in json.loads(result.stdout) if fact["name"] == "io_uring"]
    assert uring["value"]
    (direct,) = [fact for fact in json.loads(result.stdout) if fact["name"] == "O_DIRECT"]
    assert "does not work in /proc" in direct["value"]


def test_ctrl_c_in_a_command_exits_130(tmp_path, corpus):
    output = tmp_path / "run"
    steps = ("--steps", 100_000, "--checkpoint-every", 0)
    line, environment = command("train", corpus, "--output", output, *steps, *SIZES)
    process = subprocess.Popen(
        line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    log = output / "log.jsonl"
    while process.poll() is None and not (log.exists() and log.stat().st_size > 0):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert stdout == ""
    match = re.search(r"stopped after step (\d+) of 100000; checkpoint (\S+); the same", stderr)
    assert match, stderr
    done = [json.loads(text)["step"] for text in log.read_text().splitlines()]
    assert done == list(range(1, int(match[1]) + 1))
    assert (output / f"checkpoint-{int(match[1]):08d}" / "training.json").is_file()
