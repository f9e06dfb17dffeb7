"""Compiles every CUDA file and holds each kernel to the register limit written beside it; needs nvcc, no GPU.

    python tests/cuda_check.py [--source csrc]

Directly above a kernel stands its limit, in the form

    // registers <= 64: rms_norm_modulate_kernel
    // registers <= 96: rms_norm_modulate_kernel<double        (optional: instantiations that begin like this)

A kernel fails with more registers, with spills, with local memory (a stack frame), without a limit, or
when no file instantiates it. Those of cuda/gemm and cuda/attention are compiled for sm_90a alone and fail
unless their machine code holds matrix products of a warpgroup (HGMMA) and tile copies (UTMALDG), and no access
to local memory (LDL, STL); unless every role stays below the registers it was granted (USETMAXREG); and unless
a wait for products comes after those of a whole tile of K (the compiler did not put one behind each). Without
nvcc the script says so and passes, and without nvdisasm it says that no machine code was read; except with
CI=true, where it takes both from PyPI: the wheels that setup.py names, and nvdisasm's.
"""

import argparse
import ast
import collections
import concurrent.futures
import dataclasses
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
TARGETS = ("80", "90a")  # one portable target and Hopper's own
HOPPER = ("gemm", "attention")  # folders of kernels that exist on Hopper alone
CONTRACTED = ("attention",)  # folders compiled without -fmad=false, as in CMakeLists.txt
NVDISASM_WHEEL = "nvidia-cuda-nvdisasm==13.5.37"


class CheckError(Exception):
    """The check cannot be made, or the sources break its rules."""


@dataclasses.dataclass(frozen=True)
class Limit:
    name: str  # kernel name, or the beginning of an instantiation: "kernel<double"
    registers: int
    place: str  # file:line


@dataclasses.dataclass(frozen=True)
class Report:
    """What ptxas says of one function of one target."""

    function: str  # demangled, without parameters and namespaces of the kernel itself
    target: str
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    shared: int
    entry: bool  # False: a device function that was not inlined

    @property
    def kernel(self) -> str:
        return self.function.split("<")[0]


# ---- limits in the sources

LIMIT = re.compile(r"//[ \t]*registers[ \t]*<=[ \t]*(\d+)[ \t]*:[ \t]*(\S.*?)[ \t]*$", re.MULTILINE)
COMMENT_OR_STRING = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"', re.DOTALL)


def _blank(text: str) -> str:
    """Comments and strings replaced by spaces: every position stays where it was."""
    return COMMENT_OR_STRING.sub(lambda m: re.sub(r"[^\n]", " ", m.group()), text)


def _closing(code: str, opening: int) -> int:
    """Position after the parenthesis that closes the one at `opening`; end of text where none does."""
    depth = 0
    for i in range(opening, len(code)):
        depth += (code[i] == "(") - (code[i] == ")")
        if depth == 0:
            return i + 1
    return len(code)


def kernels_of(text: str) -> list[tuple[str, int]]:
    """(name, position of __global__) of each kernel a source defines; mere declarations do not count."""
    code = _blank(text)
    found = []
    for match in re.finditer(r"\b__global__\b", code):
        at = match.end()
        while True:  # the name is the identifier before the first parenthesis that is no attribute's
            head = re.compile(r"[^(){};]*?(\w+)\s*\(").match(code, at)
            if head is None:
                break
            after = _closing(code, head.end() - 1)
            if head.group(1) in ("__launch_bounds__", "__cluster_dims__", "__maxnreg__", "__attribute__"):
                at = after
                continue
            if code[after:].lstrip().startswith("{"):
                found.append((head.group(1), match.start()))
            break
    return found


def limits_of(text: str, file: str) -> list[Limit]:
    """The limits of a source's kernels. CheckError: a kernel without a limit, a limit without its kernel."""
    code = _blank(text)
    limits, used = [], set()
    notes = list(LIMIT.finditer(text))
    for name, at in kernels_of(text):
        own = []
        for note in notes:
            # directly above: between the note and the kernel only comments and the template line
            between = code[note.end() : at]
            if note.end() <= at and not re.search(r"[;{}]", between) and note.group(2).split("<")[0] == name:
                own.append(note)
        line = text.count("\n", 0, at) + 1
        if not any(note.group(2) == name for note in own):
            raise CheckError(f"{file}:{line}: kernel {name} has no limit; write `// registers <= N: {name}` above it")
        for note in own:
            used.add(note.start())
            limits.append(Limit(note.group(2), int(note.group(1)), f"{file}:{line}"))
    for note in notes:
        if note.start() not in used:
            line = text.count("\n", 0, note.start()) + 1
            raise CheckError(f"{file}:{line}: a limit for {note.group(2)!r}, no such kernel directly below")
    return limits


def limit_for(report: Report, limits: list[Limit]) -> Limit | None:
    """The most specific limit that speaks of this instantiation."""
    compact = report.function.replace(" ", "")
    fitting = [
        limit
        for limit in limits
        if limit.name == report.kernel or ("<" in limit.name and compact.startswith(limit.name.replace(" ", "")))
    ]
    return max(fitting, key=lambda limit: len(limit.name), default=None)


# ---- the compiler's report

ENTRY = re.compile(r"Compiling entry function '([^']+)' for '(sm_\w+)'")
PROPERTIES = re.compile(r"Function properties for (\S+)")
FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers")
SHARED = re.compile(r"(\d+) bytes smem")
LOCAL = re.compile(r"(\d+) bytes lmem")


def short_name(demangled: str) -> str:
    """`void lens::(anonymous namespace)::k<float, 8>(float const*)` -> `k<float, 8>`."""
    text = demangled.replace("(anonymous namespace)::", "").removeprefix("void ")
    depth, end = 0, len(text)
    for i, letter in enumerate(text):  # the parameter list opens outside all template brackets
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            end = i
            break
    text = text[:end]
    head, bracket, rest = text.partition("<")
    return head.split("::")[-1] + bracket + re.sub(r"\b\w+::", "", rest)


def demangle(names: list[str]) -> dict[str, str]:
    if not names:
        return {}
    if (tool := shutil.which("c++filt")) is None:
        raise CheckError("c++filt, which comes with gcc's binutils, is not on PATH")
    out = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    return dict(zip(names, out.splitlines(), strict=True))


def parse(report: str) -> list[Report]:
    """The functions in the output of `nvcc -Xptxas -v` for one target."""
    raw: list[dict] = []
    target = ""
    entry_name = ""
    for line in report.splitlines():
        if match := ENTRY.search(line):
            entry_name, target = match.groups()
        elif match := PROPERTIES.search(line):
            raw.append({"name": match.group(1), "target": target, "entry": match.group(1) == entry_name})
        elif match := FRAME.search(line):
            if not raw:
                raise CheckError(f"ptxas reports a stack frame before any function: {line.strip()!r}")
            raw[-1]["frame"] = tuple(map(int, match.groups()))
        elif match := USED.search(line):
            mine = [item for item in raw if item["entry"] and item["name"] == entry_name]
            if not mine:
                raise CheckError(f"ptxas reports registers of no function: {line.strip()!r}")
            shared, local = SHARED.search(line), LOCAL.search(line)
            mine[-1]["registers"] = int(match.group(1))
            mine[-1]["shared"] = int(shared.group(1)) if shared else 0
            mine[-1]["local"] = int(local.group(1)) if local else 0
    for item in raw:
        if "frame" not in item or (item["entry"] and "registers" not in item):
            raise CheckError(f"ptxas says nothing of the stack or the registers of {item['name']}")
    names = demangle([item["name"] for item in raw])
    return [
        Report(
            function=short_name(names[item["name"]]),
            target=item["target"],
            registers=item.get("registers", 0),
            stack=max(item["frame"][0], item.get("local", 0)),
            spill_stores=item["frame"][1],
            spill_loads=item["frame"][2],
            shared=item.get("shared", 0),
            entry=item["entry"],
        )
        for item in raw
    ]


def faults(reports: list[Report], limits: list[Limit]) -> list[str]:
    """One sentence for each thing that must not be."""
    found = []
    for report in reports:
        what = f"{report.function} ({report.target})"
        if report.spill_stores or report.spill_loads:
            found.append(f"{what} spills: {report.spill_stores} bytes stored, {report.spill_loads} loaded")
        elif report.stack:
            found.append(f"{what} uses local memory: a stack frame of {report.stack} bytes")
        if not report.entry:
            continue
        limit = limit_for(report, limits)
        if limit is None:
            found.append(f"{what} has no limit; write `// registers <= N: {report.kernel}` above the kernel")
        elif report.registers > limit.registers:
            found.append(f"{what} uses {report.registers} registers, limit {limit.registers} ({limit.place})")
    compiled = {report.kernel for report in reports if report.entry}
    for limit in limits:
        if limit.name.split("<")[0] not in compiled:
            found.append(f"{limit.name} ({limit.place}) is compiled by no .cu file")
    return found


# ---- machine code

FUNCTION = re.compile(r"^\.text\.(\S+):")
LABEL = re.compile(r"^(\.L_\w+):")
OPCODE = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)(\S*)\s*(.*?)\s*;")
Opcodes = collections.Counter[str]
LEAST_PRODUCTS = 4  # between waits: 64 of K, 16 each


@dataclasses.dataclass(frozen=True)
class Instruction:
    opcode: str
    suffix: str  # ".64x192x16.F32.BF16"
    operands: str
    guarded: bool  # by a predicate: what follows may run, too


@dataclasses.dataclass(frozen=True)
class Code:
    """A kernel's machine code: its instructions in order, and at which of them each label stands."""

    instructions: list[Instruction]
    labels: dict[str, int]

    @property
    def counts(self) -> Opcodes:
        return collections.Counter(i.opcode for i in self.instructions)


def machine_code(sass: str) -> dict[str, Code]:
    """Demangled kernel name -> its code, of what nvdisasm prints."""
    found: dict[str, Code] = {}
    current = Code([], {})
    for line in sass.splitlines():
        if match := FUNCTION.match(line):
            current = found.setdefault(match.group(1), Code([], {}))
        elif match := LABEL.match(line):
            current.labels[match.group(1)] = len(current.instructions)
        elif match := OPCODE.match(line):
            guard, *parts = match.groups()
            current.instructions.append(Instruction(*parts, guarded=bool(guard)))
    names = demangle(list(found))
    return {short_name(names[mangled]): code for mangled, code in found.items()}


REGISTER = re.compile(r"\bR(\d+)(\.64)?")


def highest_register(i: Instruction) -> int:
    """The highest general register an instruction touches, the unnamed ones of a wide operand among them; -1 for none."""
    numbers = [int(n) + bool(pair) for n, pair in REGISTER.findall(i.operands)]
    if not numbers:
        return -1
    if i.opcode == "HGMMA":  # accumulators first and last, four registers of A or a descriptor between
        size = re.search(r"64x(\d+)x", i.suffix)
        return max(n + (int(size.group(1)) // 2 if n == numbers[0] and size else 4) - 1 for n in numbers)
    if ".WIDE" in i.suffix:
        return max(numbers) + 1
    # the data of a load come first, those of a store last; what has an address beside them is no wider than told
    data = numbers[-1] if i.opcode.startswith("ST") else numbers[0]
    wide = 4 if ".128" in i.suffix else 2 if ".64" in i.suffix else 1
    return max(*numbers, data + wide - 1)


def role_registers(code: Code) -> list[tuple[int, int]]:
    """Of every USETMAXREG, the registers it leaves a thread and how many the code behind it touches."""
    found = []
    for start, grant in enumerate(code.instructions):
        if grant.opcode != "USETMAXREG":
            continue
        todo, seen, most = [start + 1], set[int](), -1
        while todo:
            at = todo.pop()
            if at in seen or at >= len(code.instructions):
                continue
            seen.add(at)
            here = code.instructions[at]
            if here.opcode == "USETMAXREG":
                if at == start:  # a failed allocation tries again
                    todo.append(at + 1)
                continue
            if here.opcode in ("BRX", "JMX"):
                raise CheckError("a branch through a table, behind which cuda-check cannot look")
            most = max(most, highest_register(here))
            todo += [code.labels[label] for label in re.findall(r"`\((\.L_\w+)\)", here.operands)]
            if here.guarded or here.opcode not in ("BRA", "EXIT", "RET") or here.suffix.startswith(".DIV"):
                todo.append(at + 1)
        number = re.search(r"0x([0-9a-f]+)", grant.operands)
        if number is None:
            raise CheckError(f"USETMAXREG without a number: {grant.operands}")
        found.append((int(number.group(1), 16), most + 1))
    return found


def products_per_wait(code: Code) -> list[int]:
    """Of every wait for matrix products, how many were started since the one before it; of those with none, nothing."""
    found, started = [], 0
    for i in code.instructions:
        if i.opcode == "HGMMA":
            started += 1
        elif i.opcode == "WARPGROUP" and i.suffix.startswith(".DEPBAR") and started:
            found.append(started)
            started = 0
    return found


def sass_faults(kernels: dict[str, Code]) -> list[str]:
    """What the machine code of Hopper's own kernels lacks or should not have."""
    found = []
    for name, code in kernels.items():
        counts = code.counts
        for opcode, what in (("HGMMA", "matrix product of a warpgroup"), ("UTMALDG", "tile copy")):
            if not counts[opcode]:
                found.append(f"{name} (sm_90a) has no {what}: {opcode} is not in its machine code")
        if counts["LDL"] or counts["STL"]:
            found.append(f"{name} (sm_90a) uses local memory: {counts['LDL']} LDL, {counts['STL']} STL")
        roles = role_registers(code)
        if len(roles) < 2:
            found.append(f"{name} (sm_90a) has {len(roles)} USETMAXREG, which two roles need at least")
        for grant, used in roles:
            if used > grant:
                found.append(f"{name} (sm_90a) touches {used} registers in a role that is granted {grant}")
        if waits := [n for n in products_per_wait(code) if n < LEAST_PRODUCTS]:
            found.append(f"{name} (sm_90a) waits after {min(waits)} HGMMA, {LEAST_PRODUCTS} at least belong together")
    return found


def sass_line(name: str, code: Code) -> str:
    counts = ", ".join(f"{code.counts[opcode]} {opcode}" for opcode in ("HGMMA", "UTMALDG", "LDL", "STL"))
    roles = ", ".join(f"{used} of {grant}" for grant, used in role_registers(code))
    waits = "/".join(str(n) for n in sorted(set(products_per_wait(code))))
    return f"{name}: {counts}, {len(code.instructions)} instructions; registers {roles}; {waits} HGMMA a wait"


def table(reports: list[Report], limits: list[Limit]) -> str:
    rows = [("kernel", "target", "registers", "limit", "stack", "spill st/ld", "shared")]
    for report in sorted(reports, key=lambda r: (r.kernel, r.function, r.target)):
        limit = limit_for(report, limits) if report.entry else None
        registers = str(report.registers) if report.entry else "-"
        allowed = str(limit.registers) if limit else "-"
        spill = f"{report.spill_stores}/{report.spill_loads}"
        numbers = (registers, allowed, str(report.stack), spill, str(report.shared))
        rows.append((report.function, report.target, *numbers))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    )


# ---- compiling


def find_nvcc() -> str | None:
    """nvcc of a toolkit; with CI=true, of the PyPI wheels when there is no toolkit."""
    if named := os.environ.get("CUDACXX"):
        return shutil.which(named)
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    found = shutil.which("nvcc") or shutil.which("nvcc", path=os.path.join(home, "bin"))
    if found or os.environ.get("CI") != "true":
        return found
    return _from_wheels("nvcc", cuda_wheels())


def find_nvdisasm() -> str | None:
    """nvdisasm of a toolkit; with CI=true, of its PyPI wheel."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    found = shutil.which("nvdisasm") or shutil.which("nvdisasm", path=os.path.join(home, "bin"))
    if found or os.environ.get("CI") != "true":
        return found
    return _from_wheels("nvdisasm", [NVDISASM_WHEEL])


def _from_wheels(tool: str, wheels: list[str]) -> str | None:
    folder = ROOT / "build" / "cuda-wheels" / tool
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--upgrade", f"--target={folder}"]
    if subprocess.run([*install, *wheels]).returncode:
        raise CheckError(f"CI=true, no {tool} on this machine, and the PyPI wheels cannot be installed")
    return shutil.which(tool, path=str(folder / "nvidia" / "cu13" / "bin"))


def cuda_wheels() -> list[str]:
    """CUDA_WHEELS of setup.py, which cannot be imported without building."""
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "CUDA_WHEELS":
            return ast.literal_eval(node.value)
    raise CheckError("setup.py does not define CUDA_WHEELS")


def compile_report(
    nvcc: str, file: pathlib.Path, target: str, include: pathlib.Path, nvdisasm: str | None = None
) -> tuple[str, str]:
    """The texts of ptxas and of nvdisasm for one file and target. CheckError holds a failing tool's message."""
    sass = ""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            nvcc, "-O3", "-std=c++17", f"-I{include}", "-DLENS_WITH_CUDA=1", "-Xptxas", "-v", "-cubin",
            f"-gencode=arch=compute_{target},code=sm_{target}", "-o", f"{folder}/out.cubin", str(file),
            *([] if file.parent.name in CONTRACTED else ["-fmad=false"]),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise CheckError(f"{file.name} does not compile for sm_{target}:\n{done.stdout}{done.stderr}")
        if nvdisasm is not None:
            dump = subprocess.run([nvdisasm, "-c", f"{folder}/out.cubin"], capture_output=True, text=True)
            if dump.returncode:
                raise CheckError(f"nvdisasm cannot read {file.name} for sm_{target}:\n{dump.stderr}")
            sass = dump.stdout
    return done.stdout + done.stderr, sass


@dataclasses.dataclass(frozen=True)
class Findings:
    reports: list[Report]
    limits: list[Limit]
    code: dict[str, Code]  # of Hopper's own kernels
    faults: list[str]


def check(source: pathlib.Path, nvcc: str, nvdisasm: str | None) -> Findings:
    """Compile all of source/cuda."""
    folder = source / "cuda"
    files = sorted(folder.rglob("*.cu"))
    if not files:
        raise CheckError(f"no .cu file under {folder.name}/")
    limits = [
        limit
        for path in sorted([*folder.rglob("*.cuh"), *files])
        for limit in limits_of(path.read_text(), str(path.relative_to(source.parent)))
    ]
    hopper = {file for file in files if file.parent.name in HOPPER}
    with concurrent.futures.ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        jobs = [
            pool.submit(compile_report, nvcc, file, target, source, nvdisasm if file in hopper else None)
            for file in files
            for target in (TARGETS if file not in hopper else ("90a",))
        ]
        for count, job in enumerate(concurrent.futures.as_completed(jobs), 1):
            if not job.exception():
                print(f"cuda-check: {count} of {len(jobs)} compiled", file=sys.stderr, flush=True)
        done = [job.result() for job in jobs]
    # one kernel may be instantiated by several files; equal reports are one line
    reports = sorted({report for text, _ in done for report in parse(text)}, key=dataclasses.astuple)
    code = {name: found for _, sass in done for name, found in machine_code(sass).items()}
    found = faults(reports, limits) + sass_faults(code)
    lines = [line.strip() for text, _ in done for line in text.splitlines()]
    found += [line for line in lines if "Potential Performance Loss" in line]  # serialised wgmma
    return Findings(reports, limits, code, found)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=pathlib.Path, default=ROOT / "csrc", help="folder that holds cuda/")
    options = parser.parse_args(arguments)
    try:
        nvcc = find_nvcc()
        if nvcc is None:
            print("cuda-check: no nvcc on this machine, nothing was compiled (CI=true takes it from PyPI)")
            return 0
        nvdisasm = find_nvdisasm()
        found = check(options.source.resolve(), nvcc, nvdisasm)
    except CheckError as error:
        print(f"cuda-check: {error}", file=sys.stderr)
        return 1
    print(table(found.reports, found.limits))
    for name in sorted(found.code):
        print(sass_line(name, found.code[name]))
    if nvdisasm is None:
        print("cuda-check: no nvdisasm on this machine, no machine code was read (CI=true takes it from PyPI)")
    for sentence in found.faults:
        print(f"cuda-check: {sentence}", file=sys.stderr)
    kernels = len({report.kernel for report in found.reports if report.entry})
    targets = ", ".join(TARGETS)
    print(f"cuda-check: {kernels} kernels, {len(found.reports)} reports ({targets}), {len(found.faults)} faults")
    return 1 if found.faults else 0


if __name__ == "__main__":
    sys.exit(main())
