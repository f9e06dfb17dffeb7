"""The build as users meet it: isolation, no torch, no nvcc, an sdist alone, an editable checkout."""

import importlib.util
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest
import setuptools

ROOT = pathlib.Path(__file__).resolve().parents[2]
PARTS = ["CMakeLists.txt", "LICENSE", "MANIFEST.in", "NOTICE", "README.md", "constraints.txt", "pyproject.toml"]
WHEELS = ["nvidia-cuda-nvcc", "nvidia-cuda-crt", "nvidia-nvvm", "nvidia-cuda-runtime", "nvidia-cuda-cccl"]


@pytest.fixture(scope="module")
def setup_py():
    """setup.py as a module, without its last statement's effect."""
    patch = pytest.MonkeyPatch()
    patch.setattr(setuptools, "setup", lambda **_: None)
    spec = importlib.util.spec_from_file_location("lens_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    patch.undo()
    return module


def copy_of_tree(folder: pathlib.Path) -> pathlib.Path:
    """What git would hand out of the package, without git, build folders and modules built in place."""
    folder.mkdir()
    skip = shutil.ignore_patterns("*.so", "__pycache__")
    for name in ["csrc", "lens"]:
        shutil.copytree(ROOT / name, folder / name, ignore=skip)
    for name in [*PARTS, "setup.py"]:
        shutil.copy2(ROOT / name, folder / name)
    return folder


def environment(**changes: str) -> dict[str, str]:
    """The caller's, without what would steer the build or the child's imports."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("LENS_", "PYTHON", "CUDA", "CMAKE_"))}
    return kept | {"LENS_JOBS": "2"} | changes


def without(tools: tuple[str, ...], folder: pathlib.Path) -> str:
    """PATH without these tools: a folder that has one is replaced by links to everything else in it."""
    entries = []
    for i, entry in enumerate(os.environ["PATH"].split(os.pathsep)):
        path = pathlib.Path(entry)
        if any((path / tool).exists() for tool in tools):
            links = folder / str(i)
            links.mkdir(parents=True)
            for item in path.iterdir():
                if item.name not in tools:
                    (links / item.name).symlink_to(item)
            path = links
        entries.append(str(path))
    return os.pathsep.join(entries)


def no_nvcc(folder: pathlib.Path) -> dict[str, str]:
    """A machine without CUDA toolkit."""
    return environment(PATH=without(("nvcc",), folder), CUDA_HOME=str(folder / "nowhere"))


def quick_compiler(folder: pathlib.Path) -> str:
    """The compiler with all optimisation off, in a third of the time: for a build whose parts and places are looked at."""
    real, quick = os.environ.get("CXX") or shutil.which("c++"), folder / "c++"
    quick.write_text(f'#!/bin/sh\nexec {real} "$@" -O0\n')
    quick.chmod(0o755)
    return str(quick)


def new_venv(folder: pathlib.Path) -> str:
    """A Python whose environment holds nothing but pip."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True, env=environment())
    python = str(folder / "bin" / "python")
    listed = subprocess.run(
        [python, "-m", "pip", "list", "--format=json"], check=True, capture_output=True, env=environment()
    )
    assert {item["name"] for item in json.loads(listed.stdout)} <= {"pip", "setuptools"}
    return python


def run(command: list[str], cwd: pathlib.Path, env: dict[str, str]) -> str:
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{command} failed:\n{done.stdout[-4000:]}\n{done.stderr[-8000:]}"
    return done.stdout


def load_alone(python: str, module: pathlib.Path) -> list[str]:
    """Public names of a built _C, loaded without `lens`, hence without torch."""
    code = (
        "import importlib.util as u, json, sys;"
        "s = u.spec_from_file_location('_C', sys.argv[1]); m = u.module_from_spec(s); s.loader.exec_module(m);"
        "assert 'torch' not in sys.modules; print(json.dumps([n for n in dir(m) if n[0] != '_']))"
    )
    return json.loads(run([python, "-c", code, str(module)], module.parent, environment()))


def needed(module: pathlib.Path) -> str:
    """The shared libraries the module asks the loader for."""
    lines = run(["readelf", "-d", str(module)], module.parent, environment()).splitlines()
    return " ".join(line for line in lines if "NEEDED" in line)


# ---- the decisions of setup.py


def requirements(source: pathlib.Path, env: dict[str, str], kind: str = "wheel") -> list[str]:
    """What pip is told to install before the build, beyond pyproject.toml."""
    code = (
        "import contextlib, io, json\nfrom setuptools import build_meta as b\n"
        f"with contextlib.redirect_stdout(io.StringIO()): r = b.get_requires_for_build_{kind}()\nprint(json.dumps(r))"
    )
    return json.loads(run([sys.executable, "-c", code], source, env))


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return copy_of_tree(tmp_path_factory.mktemp("requirements") / "tree")


@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_on_without_nvcc_asks_for_the_compiler_wheels(tree, tmp_path, kind):
    asked = requirements(tree, no_nvcc(tmp_path) | {"LENS_CUDA": "ON"}, kind)
    assert [name.split("==")[0] for name in asked if name.startswith("nvidia-")] == WHEELS
    assert all("==13.0." in name for name in asked if name.startswith("nvidia-")), "one toolkit version, pinned"


def test_off_asks_for_no_compiler(tree, tmp_path):
    asked = requirements(tree, no_nvcc(tmp_path) | {"LENS_CUDA": "OFF"})
    assert not any(name.startswith("nvidia-") for name in asked)


def test_an_installed_nvcc_is_not_asked_for_again(tree, tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").write_text("#!/bin/sh\n")
    (tmp_path / "bin" / "nvcc").chmod(0o755)
    asked = requirements(tree, no_nvcc(tmp_path / "hidden") | {"LENS_CUDA": "ON", "CUDA_HOME": str(tmp_path)})
    assert not any(name.startswith("nvidia-") for name in asked)


def test_an_nvcc_that_is_too_old_is_passed_over_with_a_word(setup_py, monkeypatch, tmp_path, capfd):
    """Two toolkits: the old one on PATH, another in CUDA_HOME; then the old one by name."""
    old, other = tmp_path / "old" / "nvcc", tmp_path / "home" / "bin" / "nvcc"
    for path, release in ((old, "12.4"), (other, "12.5")):
        path.parent.mkdir(parents=True)
        path.write_text(f"#!/bin/sh\necho Cuda compilation tools, release {release}, V{release}.1\n")
        path.chmod(0o755)
    for name in ("LENS_CUDA", "CUDACXX", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(old.parent))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert setup_py.toolkit_nvcc() == str(other)
    assert f"passed over an nvcc that is too old: {old} is of CUDA 12.4" in capfd.readouterr().err
    other.write_text(other.read_text().replace("12.5", "11.8"))
    assert setup_py.toolkit_nvcc() is None
    monkeypatch.setenv("CUDACXX", str(old))
    with pytest.raises(SystemExit, match=r"CUDACXX names an nvcc that is too old: .* the CUDA kernels need 12\.5"):
        setup_py.toolkit_nvcc()
    limit = re.search(r"CMAKE_CUDA_COMPILER_VERSION VERSION_LESS ([\d.]+)\)", (ROOT / "CMakeLists.txt").read_text())
    assert tuple(map(int, limit[1].split("."))) == setup_py.OLDEST_NVCC


def test_cmake_and_ninja_are_asked_for_where_missing_or_broken(setup_py, monkeypatch, tmp_path):
    monkeypatch.setenv("LENS_CUDA", "OFF")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert setup_py.build_tools() == ["cmake>=3.24", "ninja>=1.10"]
    for name, text in {"cmake": "echo cmake version 3.10.2", "ninja": "echo no module named ninja >&2; exit 1"}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    assert setup_py.build_tools() == ["cmake>=3.24", "ninja>=1.10"], "too old, and a launcher that cannot run"
    (tmp_path / "cmake").write_text("#!/bin/sh\necho cmake version 3.25.1\n")
    (tmp_path / "ninja").write_text("#!/bin/sh\necho 1.11.1\n")
    assert setup_py.build_tools() == []


@pytest.mark.parametrize("driver", [True, False])
def test_auto_takes_the_compiler_from_pypi_only_where_a_driver_is(setup_py, monkeypatch, tmp_path, driver):
    for name in ("LENS_CUDA", "CUDACXX", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", without(("nvcc",), tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(setup_py, "has_driver", lambda: driver)
    assert (setup_py.CUDA_WHEELS[0] in setup_py.build_tools()) is driver


@pytest.mark.parametrize(
    ("driver", "changes", "built"),
    [
        (True, {}, True),
        (False, {}, False),
        (False, {"LENS_CUDA": "ON"}, True),
        (False, {"LENS_CUDA_ARCHS": "90a"}, True),
    ],
)
def test_auto_without_a_driver_leaves_an_installed_nvcc_alone_and_says_so(
    setup_py, monkeypatch, tmp_path, capsys, driver, changes, built
):
    for name in ("LENS_CUDA", "LENS_CUDA_ARCHS", "CUDACXX"):
        monkeypatch.delenv(name, raising=False)
    for name, value in changes.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(setup_py, "toolkit_nvcc", lambda: "/opt/nvcc")
    monkeypatch.setattr(setup_py, "has_driver", lambda: driver)
    assert setup_py.nvcc_to_use() == ("/opt/nvcc" if built else None)
    assert ("no NVIDIA driver: building the CPU kernels alone" in capsys.readouterr().err) is not built


def test_driver_is_seen_through_its_device_or_its_library(setup_py, monkeypatch, tmp_path):
    monkeypatch.setattr(setup_py, "DRIVER_FILES", [str(tmp_path / "nvidiactl")])
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "ldconfig").write_text("#!/bin/sh\necho '\tlibc.so.6 (libc6,x86-64) => x'\n")
    (tmp_path / "ldconfig").chmod(0o755)
    assert not setup_py.has_driver()
    (tmp_path / "nvidiactl").touch()
    assert setup_py.has_driver()
    (tmp_path / "nvidiactl").unlink()
    (tmp_path / "ldconfig").write_text("#!/bin/sh\necho '\tlibcuda.so.1 (libc6,x86-64) => x'\n")
    assert setup_py.has_driver()


def test_the_description_needs_nothing_beside_it(setup_py):
    """An index page has neither the checkout's images nor its files, and no address of ours to look for them."""
    readme = (ROOT / "README.md").read_text()
    text = setup_py.description()
    targets = re.findall(r"\]\(([^)]*)\)", text)
    assert all(target.startswith(("https://", "#")) for target in targets), targets
    assert len(re.findall(r"\]\(", readme)) > len(targets), "nothing was taken out"
    assert text.splitlines()[0] == readme.splitlines()[0]
    words = [line for line in readme.splitlines() if line and "](" not in line]
    assert [line for line in words if line not in text.splitlines()] == []


def test_unknown_mode_is_refused(setup_py, monkeypatch):
    monkeypatch.setenv("LENS_CUDA", "MAYBE")
    with pytest.raises(SystemExit, match="LENS_CUDA must be AUTO, ON or OFF, got 'MAYBE'"):
        setup_py.cuda_mode()


def test_on_that_cannot_be_is_an_error(tree, tmp_path):
    env = no_nvcc(tmp_path) | {"LENS_CUDA": "ON"}
    command = [sys.executable, "-c", "from setuptools import build_meta as b; b.build_wheel('dist')"]
    done = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True)
    assert done.returncode != 0
    assert "lens: no nvcc for the CUDA kernels" in done.stderr
    assert "nvidia-cuda-nvcc==" in done.stderr


def test_objects_of_another_compiler_are_not_reused(setup_py, tmp_path):
    folder = tmp_path / "objects"
    setup_py.forget_other_tools(folder, ["source", "nvcc 1"])
    (folder / "kernel.o").touch()
    setup_py.forget_other_tools(folder, ["source", "nvcc 1"])
    assert (folder / "kernel.o").exists()
    setup_py.forget_other_tools(folder, ["source", "nvcc 2"])
    assert not (folder / "kernel.o").exists()


# ---- real builds


def test_sdist_alone_builds_a_wheel_of_lens_alone(tmp_path):
    """sdist -> clean folder without git -> isolated wheel, no torch anywhere -> installed beside nothing but pip."""
    source = copy_of_tree(tmp_path / "source")
    env = environment(LENS_CUDA="OFF", CXX=quick_compiler(tmp_path))
    code = "from setuptools import build_meta as b; print(b.build_sdist('dist'))"
    name = run([sys.executable, "-c", code], source, env).splitlines()[-1]
    with tarfile.open(source / "dist" / name) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    files = {str(path.relative_to(source)): path.suffix for path in (source / "lens").rglob("*")}
    expected = {name for name, suffix in files.items() if suffix in (".py", ".pyi", ".typed", ".safetensors")}
    shutil.rmtree(source)

    python = new_venv(tmp_path / "venv")
    run([python, "-m", "pip", "wheel", "--no-deps", "-w", str(tmp_path / "wheels"), "."], unpacked, env)
    (wheel,) = (tmp_path / "wheels").iterdir()
    assert wheel.name.startswith("lens_t2i-")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(next(n for n in names if n.endswith(".dist-info/METADATA"))).decode()
    assert "Description-Content-Type: text/markdown" in metadata
    assert "Project-URL: Paper, https://arxiv.org/abs/" in metadata
    assert "docs/images" not in re.sub(r"`[^`]*`", "", metadata)
    assert {n.split("/")[0].split("-")[0] for n in names} == {"lens", "lens_t2i"}
    assert expected <= set(names), f"missing from the wheel: {sorted(expected - set(names))}"
    assert sum(n.endswith(".so") for n in names) == 1
    assert not [n for n in names if n.endswith((".jsonl", ".log", ".pt"))], (
        "what a training wrote stays in the checkout"
    )

    run([python, "-m", "pip", "install", "--no-deps", str(wheel)], tmp_path, env)
    (module,) = (tmp_path / "venv").glob("lib/python*/site-packages/lens/_C*.so")
    assert load_alone(python, module)
    assert "cuda" not in needed(module)


@pytest.mark.nightly  # CI itself builds in an editable checkout and compiles with nvcc from PyPI
def test_editable_with_nvcc_from_pypi(tmp_path):
    """LENS_CUDA=ON with nvcc hidden: the compiler comes from PyPI, the module imports without a driver."""
    source = copy_of_tree(tmp_path / "source")
    python = new_venv(tmp_path / "venv")
    env = no_nvcc(tmp_path / "hidden") | {"LENS_CUDA": "ON", "LENS_CUDA_ARCHS": "90a"}
    assert shutil.which("nvcc", path=env["PATH"]) is None
    run([python, "-m", "pip", "install", "--no-deps", "-e", "."], source, env)
    (module,) = (source / "lens").glob("_C*.so")
    content = module.read_bytes()
    assert b"sm_90a" in content
    assert b"sm_80" not in content, "LENS_CUDA_ARCHS is the whole list"
    assert "cuda" not in needed(module), "static runtime, no driver library"
    exported = run(["nm", "-D", "--defined-only", str(module)], source, env)
    assert "PyInit__C" in exported
    assert "cuda" not in exported, "the runtime inside must not meet the one torch loads"
    assert load_alone(python, module)
    where = run([python, "-c", "import importlib.util as u; print(u.find_spec('lens').origin)"], tmp_path, env)
    assert pathlib.Path(where.strip()) == source / "lens" / "__init__.py"


def test_cutlass_headers_are_found_where_they_were_said_to_be(setup_py, monkeypatch, tmp_path):
    monkeypatch.setenv("LENS_CUDA", "AUTO")
    for off in (None, "OFF", "off"):
        monkeypatch.delenv("LENS_CUTLASS", raising=False)
        if off:
            monkeypatch.setenv("LENS_CUTLASS", off)
        assert setup_py.cutlass_headers() == ""
    package = tmp_path / "cutlass_library"
    headers = package / "source" / "include"
    (headers / "cutlass").mkdir(parents=True)
    (package / "__init__.py").touch()
    for asked in (str(headers), "ON"):
        monkeypatch.setenv("LENS_CUTLASS", asked)
        with pytest.raises(SystemExit, match=r"cutlass/cutlass\.h is not in"):
            setup_py.cutlass_headers()
    (headers / "cutlass" / "cutlass.h").touch()
    monkeypatch.setenv("LENS_CUTLASS", str(headers))
    assert setup_py.cutlass_headers() == str(headers)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("LENS_CUTLASS", "ON")
    assert setup_py.cutlass_headers() == str(headers)
    monkeypatch.setenv("LENS_CUDA", "OFF")
    with pytest.raises(SystemExit, match="needs the CUDA kernels"):
        setup_py.cutlass_headers()
