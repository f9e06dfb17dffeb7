"""The rules of the tree that a machine can hold: layers, stems, links, nothing unfinished or machine-bound."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
TOP = [
    "README.md",
    "CONTRIBUTING.md",
    "Makefile",
    "CMakeLists.txt",
    "setup.py",
    "pyproject.toml",
    "constraints.txt",
    ".ci/run",
]
FOLDERS = ["lens", "csrc", "train", "bench", "tests", "docs"]
TEXT = {".py", ".pyi", ".cpp", ".h", ".cu", ".cuh", ".md", ".toml", ".txt", ".json", ".jinja"}
CPP = {".cpp", ".h", ".cu", ".cuh"}


def files(*tops: str, suffixes: set[str] = TEXT) -> list[pathlib.Path]:
    found = [path for top in tops for path in (ROOT / top).rglob("*")]
    found = [path for path in found if path.is_file() and path.suffix in suffixes]
    return sorted(path for path in found if "__pycache__" not in path.parts)


def name(path: pathlib.Path) -> str:
    return str(path.relative_to(ROOT))


def lines_with(pattern: str, paths: list[pathlib.Path]) -> list[str]:
    """file:line of every match."""
    regex = re.compile(pattern)
    return [
        f"{name(path)}:{number}: {line.strip()[:100]}"
        for path in paths
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if regex.search(line)
    ]


def test_no_torch_header_in_csrc():
    assert lines_with(r"#include\s*[<\"](torch|ATen|c10|caffe2)/", files("csrc", suffixes=CPP)) == []


def test_inline_ptx_stands_in_one_header():
    others = [path for path in files("csrc/cuda", suffixes=CPP) if path.name != "hopper.cuh"]
    assert lines_with(r"\basm\b", others) == []


def test_no_float_atomics():
    assert lines_with(r"\batomicAdd\s*\(", files("csrc", suffixes=CPP)) == []


# keys and class names of the released files: of transformer/, of the scheduler, of the indices
FOREIGN = [
    r"transformer_blocks",
    r"\b(img|txt)_(in|mod|mlp|norm\d?|qkv)\b",
    r"time_text_embed",
    r"\bproj_out\b",
    r"\bnorm_out\b",
    r"to_add_out",
    r"norm_added_[qk]",
    r"gate_mlp",
    r"multi_layer_encoder_feature",
    r"_class_name",
    r"weight_map",
    r"FlowMatchEuler",
    r"use_(karras|beta|exponential)_sigmas",
    r"shift_terminal",
    r"time_shift_type",
    r"num_train_timesteps",
    r"_use_default_values",
]


def test_foreign_names_stop_at_the_formats():
    formats = ROOT / "lens" / "formats"
    others = {
        ROOT / "train" / "loop" / "lora.py",  # which writes what formats/lora.py reads
        ROOT / "train" / "ablations" / "vtp.py",  # another model, whose parameters have its own names
    }
    paths = [p for p in files("lens", "train", "bench", suffixes={".py"}) if p.parent != formats and p not in others]
    assert lines_with("|".join(FOREIGN), paths) == []
    own = "".join(path.read_text() for path in formats.glob("*.py"))
    assert [pattern for pattern in FOREIGN if not re.search(pattern, own)] == []


# the files of lens/ops that are no op
SHARED = {"__init__", "backend", "checks", "override", "reference"}
# rests on torch, hence without kernel files
ON_TORCH = {"joint_attention"}
# of the data engine, of the text encoder, of CPUs with AMX: no CUDA kernel
ON_CPU = {"image_scores", "sink_attention", "linear_rows"}
# the fused form of an op shares the op's files
FUSED = {"gated_residual_norm_modulate": "gated_residual"}
# for sm_90a alone, hence without CPU kernels: stem -> its kernels, and where tests run them
GEMMS = [f"gemm/linear{row_op}" for row_op in ("", "_qkv_norm_rope", "_swiglu", "_gated_residual")]
HOPPER = {"linear_fused": GEMMS, "denoise_step": ["denoise_step"]}
STEMS = sorted({p.stem for p in (ROOT / "lens" / "ops").glob("*.py")} - SHARED | set(HOPPER))


@pytest.mark.parametrize("stem", STEMS)
def test_one_stem_per_op(stem):
    stem = FUSED.get(stem, stem)
    places = [f"tests/ops/test_{stem}.py"]
    if stem in HOPPER:
        places = [f"tests/emulation/test_{stem}.py", f"tests/gpu/test_{stem}_gpu.py"]
        places += [f"csrc/cuda/{kernel}.{end}" for kernel in HOPPER[stem] for end in ("cuh", "cu")]
    elif stem in ON_CPU:
        places += [f"csrc/cpu/{stem}.cpp"]
    elif stem not in ON_TORCH:
        places += [f"csrc/cpu/{stem}.cpp", f"csrc/cuda/{stem}.cuh", f"csrc/cuda/{stem}.cu"]
    assert [place for place in places if not (ROOT / place).exists()] == []


def test_nothing_unfinished_and_nothing_of_one_machine():
    # assembled, so that this file does not match itself
    bad = ["TO" + "DO", "FIX" + "ME", "XX" + "X", "NotImplemented" + "Error"]
    bad += ["/" + place + "/" for place in ("work", "root", "home", "Users")]
    bad += ["file" + "://", "pypi" + r"\.org", "python" + "hosted"]
    paths = [*files(*FOLDERS), *(ROOT / top for top in TOP)]
    data = [path for path in paths if "golden" in path.parts or path.suffix == ".json"]
    assert lines_with("|".join(bad), [path for path in paths if path not in data]) == []


def test_every_file_that_contributors_are_sent_to_exists():
    text = re.sub("<op>", "swiglu", (ROOT / "CONTRIBUTING.md").read_text())  # the op that it says to copy
    named = [word for word in re.findall(r"`([\w./-]+)`", text) if re.search(r"/|\.(py|md|cuh?|h|cpp)$", word)]
    assert len(named) > 15
    assert [word for word in named if not (ROOT / word).exists() and not list(ROOT.rglob(word))] == []


def test_files_named_in_prose_and_comments_exist():
    """By their name, or by the end of their path; my/ is the reader's own folder in examples."""
    known = [f"/{name(path)}" for path in files(*FOLDERS, suffixes={*TEXT, ".sh"})] + [f"/{top}" for top in TOP]
    pages = [*ROOT.glob("*.md"), *files("docs", "bench", "tests", suffixes={".md"})]
    regex = re.compile(r"(?<![\w/.*<-])(?:\.\./)*((?:[\w-]+/)*[\w-]+\.(?:py|cpp|cuh?|sh))\b")
    gone = [
        f"{name(path)}: {word}"
        for path in [*pages, *files("lens", "train", "bench", "csrc", suffixes={".py", ".sh", *CPP})]
        for word in regex.findall(path.read_text())
        if not word.startswith("my/") and not any(file.endswith(f"/{word}") for file in known)
    ]
    assert gone == []


def test_links_in_the_documentation_lead_somewhere():
    dead = []
    for page in [*ROOT.glob("*.md"), *files("docs", suffixes={".md"})]:
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
            if "://" not in target and not target.startswith("mailto:") and not (page.parent / target).exists():
                dead.append(f"{name(page)} -> {target}")
    assert dead == []
