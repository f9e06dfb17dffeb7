"""The CUDA compile report: planted bad reports, broken limits, and kernels that really spill."""

import pathlib
import re
import textwrap

import pytest

from tests import cuda_check
from tests.cuda_check import (
    CheckError,
    Limit,
    faults,
    kernels_of,
    limits_of,
    machine_code,
    parse,
    products_per_wait,
    role_registers,
    sass_faults,
    short_name,
    table,
)
from tests.emulation import emulator

# `nvcc -Xptxas -v` of a kernel template: two instantiations, one device function that was not inlined
REPORT = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN4lens10row_kernelIdEEvPKT_PS1_i' for 'sm_90a'
ptxas info    : Function properties for _ZN4lens10row_kernelIdEEvPKT_PS1_i
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 128 bytes smem, 372 bytes cmem[0]
ptxas info    : Compile time = 5.1 ms
ptxas info    : Compiling entry function '_ZN4lens10row_kernelIfEEvPKT_PS1_i' for 'sm_90a'
ptxas info    : Function properties for _ZN4lens10row_kernelIfEEvPKT_PS1_i
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 24 registers, used 1 barriers, 64 bytes smem
ptxas info    : Function properties for _ZN4lens6helperEf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
"""
PLAIN = Limit("row_kernel", 40, "rows.cuh:9")


def test_parse_reads_every_function():
    double, single, helper = parse(REPORT)
    assert (double.function, double.target, double.registers, double.shared) == (
        "row_kernel<double>",
        "sm_90a",
        40,
        128,
    )
    assert (single.function, single.registers, single.shared, single.entry) == ("row_kernel<float>", 24, 64, True)
    assert (helper.function, helper.entry) == ("helper", False)
    assert faults([double, single, helper], [PLAIN]) == []


@pytest.mark.parametrize(
    ("clean", "planted", "sentence"),
    [
        ("0 bytes spill stores, 0 bytes spill loads", "8 bytes spill stores, 12 bytes spill loads", "spills: 8 bytes"),
        ("0 bytes spill loads", "4 bytes spill loads", "spills: 0 bytes stored, 4 loaded"),
        ("0 bytes stack frame", "40 bytes stack frame", "local memory: a stack frame of 40 bytes"),
        ("128 bytes smem", "128 bytes smem, 16 bytes lmem", "local memory: a stack frame of 16 bytes"),
        ("Used 40 registers", "Used 41 registers", "uses 41 registers, limit 40 (rows.cuh:9)"),
    ],
)
def test_planted_fault_is_found(clean, planted, sentence):
    found = faults(parse(REPORT.replace(clean, planted, 1)), [PLAIN])
    assert len(found) == 1
    assert sentence in found[0]
    assert "row_kernel<double>" in found[0]


def test_fault_of_a_function_that_was_not_inlined_is_found():
    head, _, tail = REPORT.rpartition("0 bytes stack frame")
    found = faults(parse(head + "24 bytes stack frame" + tail), [PLAIN])
    assert found == ["helper (sm_90a) uses local memory: a stack frame of 24 bytes"]


def test_kernel_without_limit_and_limit_without_kernel_are_found():
    found = faults(parse(REPORT), [Limit("other_kernel", 64, "other.cuh:3")])
    assert sum("row_kernel" in sentence and "has no limit" in sentence for sentence in found) == 2
    assert any("other_kernel (other.cuh:3) is compiled by no .cu file" in sentence for sentence in found)


def test_the_most_specific_limit_counts():
    tight = Limit("row_kernel", 24, "rows.cuh:9")
    assert len(faults(parse(REPORT), [tight])) == 1
    assert faults(parse(REPORT), [tight, Limit("row_kernel<double", 40, "rows.cuh:9")]) == []


def test_a_report_cut_short_is_an_error_not_a_pass():
    with pytest.raises(CheckError, match="says nothing of the stack or the registers"):
        parse(REPORT[: REPORT.index("ptxas info    : Used 24")])


def test_table_shows_numbers_and_limits():
    header, double, *_ = table(parse(REPORT), [PLAIN]).splitlines()[0:4]
    assert header.split()[:4] == ["kernel", "target", "registers", "limit"]
    rows = table(parse(REPORT), [PLAIN]).splitlines()
    assert any(row.split() == ["row_kernel<double>", "sm_90a", "40", "40", "0", "0/0", "128"] for row in rows), double


@pytest.mark.parametrize(
    ("demangled", "short"),
    [
        ("void lens::k<float, 8>(float const*, int)", "k<float, 8>"),
        ("void lens::(anonymous namespace)::k<lens::bf16>(lens::bf16*)", "k<bf16>"),
        ("lens::cuda::plain(int)", "plain"),
    ],
)
def test_short_name(demangled, short):
    assert short_name(demangled) == short


SOURCE = """
// registers <= 32: first_kernel
// registers <= 64: first_kernel<double
// reads a row per block
template <class T, int kWarps>
__global__ void __launch_bounds__(kWarps * (32), 2) first_kernel(const T* x, T* y) {
  y[0] = x[0];  // __global__ in a comment is no kernel
}

// registers <= 16: second_kernel
static __global__ void second_kernel(float* x) { x[0] = 1; }

template __global__ void first_kernel<float, 4>(const float*, float*);
__global__ void only_declared(float* x);
"""


def test_limits_are_read_beside_their_kernels():
    assert [name for name, _ in kernels_of(SOURCE)] == ["first_kernel", "second_kernel"]
    limits = limits_of(SOURCE, "rows.cuh")
    assert [(limit.name, limit.registers) for limit in limits] == [
        ("first_kernel", 32),
        ("first_kernel<double", 64),
        ("second_kernel", 16),
    ]
    assert limits[0].place == "rows.cuh:6"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("// registers <= 16: second_kernel", ""), "kernel second_kernel has no limit"),
        (("// registers <= 32: first_kernel\n", ""), "kernel first_kernel has no limit"),
        (("16: second_kernel", "16: secnd_kernel"), "kernel second_kernel has no limit"),
        (("static", "int between;\nstatic"), "kernel second_kernel has no limit"),
        (("template __global__", "// registers <= 8: gone\ntemplate __global__"), "no such kernel directly below"),
    ],
)
def test_broken_limits_are_errors(change, message):
    with pytest.raises(CheckError, match=message):
        limits_of(SOURCE.replace(*change, 1), "rows.cuh")


# ---- machine code

SASS = """
.text._ZN4lens10row_kernelIfEEvPKT_PS1_i:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/               @P2 BRA `(.L_x_2) ;
        /*0020*/                   USETMAXREG.DEALLOC.CTAPOOL 0x18 ;
        /*0030*/              @!P1 SYNCS.ARRIVE.TRANS64.A1T0 RZ, [UR8], RZ ;
        /*0040*/                   UTMALDG.2D [UR8], [UR4], desc[UR6] ;
        /*0050*/                   MOV R23, R22 ;
        /*0060*/                   EXIT ;
.L_x_2:
        /*0070*/                   USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0x60 ;
        /*0080*/              @!P0 BRA `(.L_x_2) ;
.L_x_7:
        /*0090*/                   WARPGROUP.ARRIVE ;
        /*00a0*/               @P0 HGMMA.64x128x16.F32.BF16 R24, gdesc[UR16], R24 ;
        /*00b0*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR16], R24 ;
        /*00c0*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR16], R24 ;
        /*00d0*/                   HGMMA.64x128x16.F32.BF16 R24, R88, gdesc[UR16], R24, gsb0 ;
        /*00e0*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*00f0*/               @P0 BRA `(.L_x_7) ;
        /*0100*/                   STG.E.128 desc[UR4][R2.64], R4 ;
        /*0110*/                   EXIT ;
.L_x_9:
        /*0120*/                   BRA `(.L_x_9) ;
"""


def test_machine_code_is_counted():
    ((name, code),) = machine_code(SASS).items()
    assert name == "row_kernel<float>"
    assert code.counts["HGMMA"] == 4
    assert code.labels[".L_x_2"] == 7
    assert role_registers(code) == [(24, 24), (96, 92)]
    assert products_per_wait(code) == [4]
    assert sass_faults({name: code}) == []


@pytest.mark.parametrize(
    ("clean", "planted", "sentence"),
    [
        ("HGMMA.64x128x16.F32.BF16", "FFMA", "no matrix product of a warpgroup: HGMMA"),
        ("UTMALDG.2D", "LDG.E", "no tile copy: UTMALDG"),
        ("STG.E.128", "STL.128", "uses local memory: 0 LDL, 1 STL"),
        ("LDC R1", "LDL R1", "uses local memory: 1 LDL, 0 STL"),
        ("MOV R23", "MOV R24", "touches 25 registers in a role that is granted 24"),
        ("R2.64], R4", "R2.64], R93", "touches 97 registers in a role that is granted 96"),
        ("R24, R88, gdesc", "R24, R93, gdesc", "touches 97 registers in a role that is granted 96"),
        ("64x128x16", "64x192x16", "touches 120 registers in a role that is granted 96"),
        ("USETMAXREG.DEALLOC.CTAPOOL 0x18", "NOP", "has 1 USETMAXREG, which two roles need at least"),
        ("gdesc[UR16], R24 ;\n        /*00b0*/", "gdesc[UR16], R24 ;\n/*0*/ WARPGROUP.DEPBAR.LE gsb0, 0x0 ;\n /*00b0*/",
         "waits after 1 HGMMA, 4 at least belong together"),
    ],
)  # fmt: skip
def test_planted_machine_code_is_found(clean, planted, sentence):
    assert clean in SASS
    (found,) = sass_faults(machine_code(SASS.replace(clean, planted, 5 if "HGMMA" in clean or "x128x" in clean else 1)))
    assert found.startswith("row_kernel<float> (sm_90a) ")
    assert sentence in found


def test_a_branch_behind_which_nothing_can_be_seen_is_an_error():
    with pytest.raises(CheckError, match="a branch through a table"):
        sass_faults(machine_code(SASS.replace("MOV R23", "BRX R23")))


# ---- with the real compiler

SPILLS = """
// registers <= 255: spilling_kernel
__global__ void __launch_bounds__(1024, 2) spilling_kernel(const float* x, float* y) {
  float v[96];
#pragma unroll
  for (int i = 0; i < 96; ++i) v[i] = x[threadIdx.x + 1024 * i];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 96; ++i) y[threadIdx.x + 1024 * i] = v[i] * v[95 - i];
}
"""
LOCAL = """
// registers <= 255: indexing_kernel
__global__ void indexing_kernel(const int* x, int* y, int n) {
  int v[32];
  for (int i = 0; i < 32; ++i) v[i] = x[i];
  for (int i = 0; i < n; ++i) v[x[i] & 31] += i;
  y[0] = v[n & 31];
}
"""
CLEAN = """
// registers <= 32: scaling_kernel
__global__ void scaling_kernel(const float* x, float* y) { y[threadIdx.x] = 2 * x[threadIdx.x]; }
"""


@pytest.fixture
def nvcc():
    try:
        found = cuda_check.find_nvcc()
    except CheckError as error:
        pytest.fail(str(error))
    if found is None:
        pytest.skip("no nvcc on this machine")
    return found


def run(tmp_path: pathlib.Path, source: str) -> int:
    (tmp_path / "cuda").mkdir()
    (tmp_path / "cuda" / "planted.cu").write_text(textwrap.dedent(source))
    return cuda_check.main(["--source", str(tmp_path)])


def test_clean_kernel_passes(nvcc, tmp_path, capsys):
    assert run(tmp_path, CLEAN) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert {row[1] for row in rows if row[0] == "scaling_kernel"} == {"sm_80", "sm_90a"}


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        (SPILLS, "spilling_kernel (sm_90a) spills: "),
        (LOCAL, "indexing_kernel (sm_90a) uses local memory: a stack frame of 128 bytes"),
        (CLEAN.replace("<= 32", "<= 2"), "registers, limit 2 ("),
        (CLEAN.replace("// reg", "// no reg"), "kernel scaling_kernel has no limit"),
        (CLEAN.replace("2 *", "2 +* "), "planted.cu does not compile for sm_80"),
    ],
)
def test_bad_kernel_fails(nvcc, tmp_path, capsys, source, sentence):
    assert run(tmp_path, source) == 1
    assert sentence in capsys.readouterr().err


@pytest.fixture
def no_toolkit(monkeypatch, tmp_path):
    for name in ("CUDACXX", "CUDA_PATH", "CI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))


def test_without_nvcc_it_says_so_and_passes(no_toolkit, tmp_path, capsys):
    assert run(tmp_path, CLEAN) == 0
    assert "no nvcc on this machine, nothing was compiled" in capsys.readouterr().out


def test_in_ci_a_missing_compiler_fails(no_toolkit, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("CI", "true")
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # pip may look nowhere, so the wheels cannot be had either
    monkeypatch.setattr(cuda_check, "ROOT", tmp_path)
    (tmp_path / "setup.py").write_text('CUDA_WHEELS = ["lens-no-such-wheel==1"]\n')
    assert run(tmp_path, CLEAN) == 1
    assert "the PyPI wheels cannot be installed" in capsys.readouterr().err


def test_products_and_sums_are_contracted_where_the_build_contracts_them():
    """By CMakeLists.txt, which decides what runs, and by the emulator, which runs it on the CPU."""
    build = (cuda_check.ROOT / "CMakeLists.txt").read_text()
    assert build.count("-fmad=false)\n") == 2  # the portable kernels, Hopper's own
    assert re.findall(r'lens_uncontracted EXCLUDE REGEX "/csrc/cuda/(\w+)/"', build) == [*cuda_check.CONTRACTED]
    assert emulator.CONTRACTED_FOLDERS == cuda_check.CONTRACTED
