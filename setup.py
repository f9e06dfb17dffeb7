"""Drives CMakeLists.txt and names the build tools this machine lacks; metadata is in pyproject.toml,
but for the description, which is README.md as it can be read elsewhere.

Environment:
    LENS_CUDA        AUTO (default): CUDA kernels where there is an NVIDIA driver (nvcc comes from PyPI where it is
                     missing), or where LENS_CUDA_ARCHS names targets and nvcc is found; else the CPU kernels alone, and
                     the build says so. ON: CUDA kernels or an error; OFF: CPU kernels alone
    LENS_CUDA_ARCHS  targets instead of the default list, e.g. "80 90a"
    LENS_CUTLASS     OFF (default); ON: also the CUTLASS instance that the matrix products are measured against, with
                     the headers of an installed nvidia-cutlass; or the folder that holds them
    LENS_BUILD_DIR   object files, kept for the next build (default: build/cmake-<python tag>)
    LENS_JOBS        parallel compilations (default: the CPUs this process may use)
nvcc, 12.5 or newer, is looked for in CUDACXX, PATH, CUDA_HOME (unset: the default toolkit folder), then among the
wheels; an older one is passed over, with a word, unless CUDACXX names it, which is an error.
"""

import contextlib
import fcntl
import importlib.util
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator

from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = pathlib.Path(__file__).parent.resolve()
OLDEST_NVCC = (12, 5)  # cudaGetDriverEntryPointByVersion
TOOLS = {"cmake": (3, 24), "ninja": (1, 10)}
DRIVER_FILES = ["/dev/nvidiactl", "/proc/driver/nvidia/version"]
# One consistent toolkit from PyPI: compiler driver, its headers, the optimiser, the static runtime, libcu++.
CUDA_WHEELS = [
    "nvidia-cuda-nvcc==13.0.88",
    "nvidia-cuda-crt==13.0.88",
    "nvidia-nvvm==13.0.88",
    "nvidia-cuda-runtime==13.0.96",
    "nvidia-cuda-cccl==13.0.85",
]


def cuda_mode() -> str:
    mode = os.environ.get("LENS_CUDA", "AUTO").upper()
    if mode not in ("AUTO", "ON", "OFF"):
        sys.exit(f"lens: LENS_CUDA must be AUTO, ON or OFF, got {mode!r}")
    return mode


def nvcc_version(nvcc: str) -> tuple[int, int]:
    """(0, 0) where it does not tell: the build then says what is wrong."""
    answer = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"release (\d+)\.(\d+)", answer)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def too_old(nvcc: str) -> str:
    """What is wrong with the version of an nvcc, or ""."""
    version = nvcc_version(nvcc)
    if not (0, 0) < version < OLDEST_NVCC:
        return ""
    return f"{nvcc} is of CUDA {version[0]}.{version[1]}, and the CUDA kernels need {OLDEST_NVCC[0]}.{OLDEST_NVCC[1]}"


def toolkit_nvcc() -> str | None:
    """nvcc of an installed toolkit."""
    if named := os.environ.get("CUDACXX"):
        if (found := shutil.which(named)) is None:
            sys.exit(f"lens: CUDACXX names {named!r}, which is not an executable")
        if why := too_old(found):
            sys.exit(f"lens: CUDACXX names an nvcc that is too old: {why}; LENS_CUDA=OFF builds the CPU kernels alone")
        return found
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    for found in (shutil.which("nvcc"), shutil.which("nvcc", path=os.path.join(home, "bin"))):
        if found and not (why := too_old(found)):
            return found
        if found:
            print(f"lens: passed over an nvcc that is too old: {why}", file=sys.stderr)
    return None


def wheel_nvcc() -> str | None:
    """nvcc of the PyPI wheels, where they are installed in the building environment."""
    with contextlib.suppress(ModuleNotFoundError):
        spec = importlib.util.find_spec("nvidia.cu13")
        for folder in (spec.submodule_search_locations or []) if spec else []:
            if found := shutil.which("nvcc", path=os.path.join(folder, "bin")):
                return found
    return None


def has_driver() -> bool:
    """Whether an NVIDIA driver serves this machine (a toolkit need not be installed for that)."""
    if any(os.path.exists(path) for path in DRIVER_FILES):
        return True
    ldconfig = shutil.which("ldconfig") or shutil.which("ldconfig", path="/sbin:/usr/sbin")
    if ldconfig is None:
        return False
    return "libcuda.so.1" in subprocess.run([ldconfig, "-p"], capture_output=True, text=True).stdout


def wants_cuda_wheels() -> bool:
    mode = cuda_mode()
    return mode != "OFF" and toolkit_nvcc() is None and (mode == "ON" or has_driver())


def nvcc_to_use() -> str | None:
    """The compiler of the CUDA kernels; None builds the CPU kernels alone."""
    if cuda_mode() == "OFF":
        return None
    nvcc = toolkit_nvcc() or wheel_nvcc()
    if nvcc and cuda_mode() == "AUTO" and not has_driver() and not os.environ.get("LENS_CUDA_ARCHS", "").strip():
        print(
            f"lens: {nvcc} is here, but no NVIDIA driver: building the CPU kernels alone. "
            'LENS_CUDA=ON builds CUDA kernels for every target, LENS_CUDA_ARCHS="90a" for those named.',
            file=sys.stderr,
        )
        return None
    if nvcc is None and wants_cuda_wheels():
        sys.exit(
            "lens: no nvcc for the CUDA kernels (12.5 or newer). Plain `pip install .` (with build isolation) takes it from "
            f"PyPI; without isolation run `pip install {' '.join(CUDA_WHEELS)}` first, or install a CUDA "
            "toolkit and set CUDA_HOME. LENS_CUDA=OFF builds the CPU kernels alone."
        )
    return nvcc


def cutlass_headers() -> str:
    """The folder that holds cutlass/cutlass.h, or "" where the instance is not asked for."""
    asked = os.environ.get("LENS_CUTLASS", "OFF")
    if asked.upper() == "OFF":
        return ""
    if cuda_mode() == "OFF":
        sys.exit(f"lens: LENS_CUTLASS={asked} needs the CUDA kernels, but LENS_CUDA is OFF")
    if asked.upper() == "ON":
        spec = importlib.util.find_spec("cutlass_library")  # the package in nvidia-cutlass that carries the headers
        folders = list(spec.submodule_search_locations or []) if spec else []
        candidates = [os.path.join(folder, "source", "include") for folder in folders]
    else:
        candidates = [os.path.abspath(asked)]
    for folder in candidates:
        if os.path.isfile(os.path.join(folder, "cutlass", "cutlass.h")):
            return folder
    sys.exit(
        f"lens: LENS_CUTLASS={asked}, but cutlass/cutlass.h is not in {candidates or 'an installed nvidia-cutlass'}. "
        "Either `pip install --no-deps nvidia-cutlass==4.2.0.0` and build without isolation, or unpack that wheel and "
        "name its folder cutlass_library/source/include"
    )


def find_tool(name: str, at_least: tuple[int, int]) -> str | None:
    """A tool that runs, from PATH or from beside this Python (a virtual environment need not be activated).

    It is asked for its version: the launcher of a tool that pip installed outside exists inside an isolated
    build, but cannot run there.
    """
    for path in (None, os.path.dirname(sys.executable)):
        if found := shutil.which(name, path=path):
            answer = subprocess.run([found, "--version"], capture_output=True, text=True)
            version = re.search(r"(\d+)\.(\d+)", answer.stdout)
            if answer.returncode == 0 and version and tuple(map(int, version.groups())) >= at_least:
                return found
    return None


def build_tools() -> list[str]:
    """Requirements beyond pyproject.toml's; setuptools hands them to pip as dynamic ones (PEP 517)."""
    tools = [f"{name}>={v[0]}.{v[1]}" for name, v in TOOLS.items() if find_tool(name, v) is None]
    return tools + (CUDA_WHEELS if wants_cuda_wheels() else [])


class CMakeBuild(build_ext):
    """lens._C through CMake and Ninja; objects stay in LENS_BUILD_DIR, so a second build is incremental."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11  # a build requirement: absent while pip asks for the requirements

        if sys.platform != "linux" or platform.machine() != "x86_64":
            sys.exit(f"lens: builds on Linux x86-64, this is {sys.platform} {platform.machine()}")
        cmake, ninja = (find_tool(name, version) for name, version in TOOLS.items())
        if cmake is None or ninja is None:
            sys.exit("lens: cmake >= 3.24 and ninja are needed: `pip install cmake ninja`")
        target = pathlib.Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        nvcc = nvcc_to_use()
        tag = sysconfig.get_config_var("SOABI") or sys.implementation.cache_tag
        folder = pathlib.Path(os.environ.get("LENS_BUILD_DIR") or ROOT / "build" / f"cmake-{tag}").resolve()
        jobs = os.environ.get("LENS_JOBS") or str(len(os.sched_getaffinity(0)))
        archs = re.sub(r"[\s,;]+", ";", os.environ.get("LENS_CUDA_ARCHS", "").strip())
        configure = [
            cmake, "-G", "Ninja", "-S", str(ROOT), "-B", str(folder), "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            f"-DCMAKE_CUDA_COMPILER={nvcc or ''}",
            f"-DLENS_CUDA={'ON' if nvcc else 'OFF'}",
            f"-DLENS_CUDA_ARCHS={archs}",
            f"-DLENS_CUTLASS={cutlass_headers()}",
        ]  # fmt: skip
        environment = dict(os.environ)
        if nvcc:
            # a toolkit keeps its static runtime in lib64, where nvcc looks; the wheels keep it in lib
            libraries = os.path.join(os.path.dirname(os.path.dirname(os.path.realpath(nvcc))), "lib")
            environment["LIBRARY_PATH"] = f"{libraries}:{os.environ.get('LIBRARY_PATH', '')}".rstrip(":")
        with exclusive(folder):
            forget_other_tools(folder, [str(ROOT), sys.executable, cmake, str(nvcc)])
            for command in (configure, [cmake, "--build", str(folder), "--parallel", jobs]):
                if subprocess.run(command, env=environment).returncode:
                    sys.exit("lens: the build of lens._C failed, the compiler's message stands above")
            # via a temporary name: a process that has the old module mapped keeps its own copy
            partial = target.with_name(f".{target.name}.{os.getpid()}")
            shutil.copy2(folder / "_C.so", partial)
            os.replace(partial, target)


class Build(build):
    """Starts from an empty staging folder: a module deleted since the last wheel must not be in the next."""

    def run(self) -> None:
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


@contextlib.contextmanager
def exclusive(folder: pathlib.Path) -> Iterator[None]:
    """Two builds in one folder at a time would corrupt it: the second waits."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_name(folder.name + ".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def forget_other_tools(folder: pathlib.Path, tools: list[str]) -> None:
    """CMake's cache holds absolute paths: after a move, or with another compiler, start afresh."""
    record = folder / "lens-tools.txt"
    if folder.exists() and not (record.exists() and record.read_text().splitlines() == tools):
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    record.write_text("\n".join(tools) + "\n")


def description() -> str:
    """README.md without what an index page has not beside it: images of the checkout go, links into it are words."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"!\[[^\]]*\]\((?!https?:)[^)]*\)\n*", "", text)
    return re.sub(r"\[([^\]]*)\]\((?!https?:|#)[^)]*\)", r"\1", text)


setup(
    long_description=description(),
    long_description_content_type="text/markdown",
    ext_modules=[Extension("lens._C", [])],
    cmdclass={"build": Build, "build_ext": CMakeBuild},
    setup_requires=build_tools(),
)
