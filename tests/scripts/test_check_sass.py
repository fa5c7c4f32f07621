"""What the machine-code check sees, on dumps written by hand."""

import check_sass
import pytest
from check_sass import Expectation

FORWARD = "void l3ext::cuda::forward_kernel<l3ext::BFloat16, 8, true>(l3ext::cuda::ForwardArgs)"
EXACT = "void l3ext::cuda::forward_kernel<float, 1, false>(l3ext::cuda::ForwardArgs)"
SORT = "void cub::detail::radix_sort<l3ext::cuda::Key>(l3ext::cuda::Key*)"


def resources(name, *, architecture="sm_90a", registers=128, stack=0, shared=1024):
    return f"""
Fatbin elf code:
================
arch = {architecture}
code version = [1,8]

Resource usage:
 Common:
  GLOBAL:0
 Function {name}:
  REG:{registers} STACK:{stack} SHARED:{shared} LOCAL:0 CONSTANT[0]:672 TEXTURE:0
""".splitlines()


def sass(name, *instructions, architecture="sm_90a"):
    head = ["", f"\tcode for {architecture}", f"\t\tFunction : {name}"]
    return head + [
        f"        /*{16 * i:04x}*/                   {text} ;   /* 0x000000ff00097424 */"
        for i, text in enumerate(instructions)
    ]


GOOD = (
    "S2R R12, SR_TID.X",
    "@!P0 LDG.E.NA.LTC128B.128.CONSTANT R4, [R2.64]",
    "LDGSTS.E.BYPASS.128.ZFILL [R11], [R2.64], !P0",
    "HMMA.16816.F32.BF16 R4, R4, R8, RZ",
    "@P0 BRA 0x150",
)
WANTED = Expectation(r"::forward_kernel<l3ext::BFloat16\b", 128, ("HMMA", "LDG.128", "LDGSTS"))
FLOAT = Expectation(r"::forward_kernel<float\b", 255, ("LDG.128",), ("HMMA",))


def kernel(*instructions, name=FORWARD, **usage):
    (only,) = check_sass.read_kernels(resources(name, **usage), sass(name, *instructions))
    return only


def test_registers_shared_memory_and_instructions_are_read():
    good = kernel(*GOOD, registers=96, shared=2048)
    assert (good.registers, good.shared, good.stack, good.size) == (96, 2048, 0, len(GOOD))
    assert dict(good.counts) == {"HMMA": 1, "LDG.128": 1, "LDGSTS": 1, "LDL": 0, "STL": 0}
    assert good.short_name == "cuda::forward_kernel<BFloat16, 8, true>"
    assert check_sass.check([good], [WANTED]) == []


@pytest.mark.parametrize("narrow", ["LDG.E.LTC128B R4, [R2]", "LDG.E.64 R4, [R2]", "LDS.128 R4"])
def test_only_wide_global_loads_count_as_such(narrow):
    (fault,) = check_sass.check([kernel(GOOD[2], GOOD[3], narrow)], [WANTED])
    assert fault.endswith("(sm_90a): expected LDG.128, got none")


@pytest.mark.parametrize(
    ("instructions", "usage", "fault"),
    [
        (GOOD[:3], {}, "expected HMMA, got none"),
        ((*GOOD[:2], GOOD[3]), {}, "expected LDGSTS, got none"),
        (GOOD, {"registers": 129}, "expected at most 128 registers, got 129"),
        (GOOD, {"stack": 8}, "expected no local memory, got a stack of 8 bytes"),
        ((*GOOD, "LDL.LU.64 R4, [R1]"), {}, "got a stack of 0 bytes, 1 LDL"),
        ((*GOOD, "STL [R1], R4"), {}, "got a stack of 0 bytes, 1 STL"),
    ],
)
def test_what_is_not_meant_is_a_fault(instructions, usage, fault):
    (got,) = check_sass.check([kernel(*instructions, **usage)], [WANTED])
    assert got.endswith(fault)


def test_a_float32_kernel_with_matrix_products_is_a_fault():
    (fault,) = check_sass.check([kernel(*GOOD, name=EXACT)], [FLOAT])
    assert fault.endswith("expected no HMMA, got 1")


def test_a_kernel_that_is_missing_for_one_architecture_is_a_fault():
    old = {"architecture": "sm_80"}
    kernels = check_sass.read_kernels(
        [*resources(FORWARD), *resources(EXACT), *resources(FORWARD, **old)],
        [*sass(FORWARD, *GOOD), *sass(EXACT, GOOD[1]), *sass(FORWARD, *GOOD, **old)],
    )
    (fault,) = check_sass.check(kernels, [WANTED, FLOAT])
    assert fault.startswith("no kernel for sm_80 matches ::forward_kernel<float")
    assert check_sass.check([], [WANTED])


def test_kernels_of_others_are_not_looked_at():
    assert check_sass.read_kernels(resources(SORT, stack=64), sass(SORT, "STL [R1], R4")) == []


def test_two_dumps_that_disagree_are_an_error():
    with pytest.raises(ValueError, match="in the SASS, not in the resource usage"):
        check_sass.read_kernels(resources(EXACT), sass(FORWARD, *GOOD))
    with pytest.raises(ValueError, match="no SASS"):
        check_sass.read_kernels(resources(FORWARD), [])


def test_the_table_lines_up():
    lines = check_sass.format_table([kernel(*GOOD), kernel(*GOOD, name=EXACT)]).splitlines()
    assert len(lines) == 3
    assert len({len(line) for line in lines}) == 1
    assert lines[0].split() == [
        *("kernel", "for", "registers", "shared", "stack", "size"),
        *("HMMA", "LDG.128", "LDGSTS", "LDL", "STL"),
    ]


def test_every_expectation_is_of_the_attention_kernels():
    for name, further in (
        ("forward_kernel", ", 1, false"),
        ("forward_kernel", ", 8, true"),
        ("query_gradients_kernel", ", 1, false, false"),
        ("query_gradients_kernel", ", 1, false, true"),
        ("query_gradients_kernel", ", 4, true, false"),
        ("row_gradients_kernel", ""),
    ):
        for dtype, exact in (
            ("l3ext::BFloat16", False),
            ("l3ext::Float16", False),
            ("float", True),
        ):
            full = f"void l3ext::cuda::{name}<{dtype}{further}>(l3ext::cuda::Args)"
            matrix = ["HMMA.16816.F32 R4, R4, R8, RZ"]
            faults = check_sass.check([kernel(*GOOD[1:3], *matrix, name=full)])
            assert any("expected no HMMA" in fault for fault in faults) == exact
            faults = check_sass.check([kernel(*GOOD[1:3], name=full)])
            assert any("expected HMMA" in fault for fault in faults) != exact


def test_missing_tools_and_files_are_one_line_errors(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(check_sass.sysconfig, "get_path", lambda _: str(tmp_path))
    assert check_sass.main(["anything.a"]) == 2
    assert capsys.readouterr().err.startswith("check_sass: cuobjdump: not found on PATH")
    for tool in ("cuobjdump", "nvdisasm", "c++filt"):
        (tmp_path / tool).write_text("#!/bin/sh\necho no device code >&2\nexit 255\n")
        (tmp_path / tool).chmod(0o755)
    assert check_sass.main([str(tmp_path / "none.a")]) == 2
    assert "No such file" in capsys.readouterr().err
    assert check_sass.main([str(tmp_path / "cuobjdump")]) == 2
    assert "no device code" in capsys.readouterr().err
