"""The README tells the truth about the tree: files, commands, flags, links and code."""

import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.main import get_command
from typer.testing import CliRunner

from lens.cli import __main__ as cli

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", TEXT, re.DOTALL)
SHELL = [line for language, block in BLOCKS if language in ("bash", "sh") for line in block.splitlines()]
INLINE = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", TEXT, flags=re.DOTALL))
COMMANDS = [line.split("#")[0].strip() for line in SHELL] + INLINE


def tree():
    """Paths of the annotated tree: indentation nests, two spaces end the names, the rest is the annotation."""
    (block,) = (body for language, body in BLOCKS if language == "text" and "lens/ " in body)
    folders: list[str] = []
    for line in filter(str.strip, block.splitlines()):
        depth = (len(line) - len(line.lstrip())) // 2
        for name in re.split(r"  +", line.strip())[0].split():
            folders[depth:] = []
            path = "".join(folders) + name
            if name.endswith("/"):
                folders.append(name)
            yield path


def test_length_budget():
    """Of what is seen before anything is unfolded."""
    folded = re.sub(r"<details>.*?</details>", "", TEXT, flags=re.DOTALL)
    assert len(folded.splitlines()) <= 160


def test_the_first_screen_is_a_sentence_a_picture_and_a_number():
    title, sentence, picture, caption, number, *_ = TEXT.split("\n\n")
    assert title == "# Lens"
    assert sentence.count(". ") == 0
    assert sentence.endswith(".")
    assert picture.startswith("![")
    assert "`lens generate" in caption
    assert re.match(r"\*\*[\d.]+ (s|ms|x)\*\* ", number)
    assert "`" in number, "the command that measures it"


def test_the_tree_names_enough_to_navigate():
    paths = list(tree())
    assert len(paths) > 40
    tops = {p.name for p in ROOT.iterdir() if p.is_dir() and (p / "__init__.py").exists()} | {"csrc", "tests", "docs"}
    assert tops <= {p.split("/")[0] for p in paths}
    modules = {f"lens/{p.name}" for p in (ROOT / "lens").glob("*.py")}
    assert modules <= set(paths), "a module of lens/ is missing from the tree"


@pytest.mark.parametrize("path", list(tree()))
def test_every_path_of_the_tree_exists(path):
    assert list(ROOT.glob(path)), f"README names {path}"
    assert (ROOT / path).is_dir() == path.endswith("/") or "*" in path


def test_every_relative_link_and_named_path_exists():
    links = re.findall(r"\]\(([^)\s#]+)", TEXT)
    assert links
    named = [
        w for w in INLINE if re.fullmatch(r"[\w.*-]+(/[\w.*-]+)+/?|[\w-]+\.(py|md|toml|txt)", w) and not w[0].isupper()
    ]
    made = {"demo/", "demo/sheet.png", "gallery/index.html"}  # by `make demo` and `make gallery`
    expected = [p for p in [*links, *named] if "://" not in p and p not in made]
    missing = [p for p in expected if not list(ROOT.glob(p.rstrip("/")))]
    assert missing == []


def test_every_make_target_exists():
    targets = {t for c in COMMANDS if c.startswith("make ") for t in c.split()[1:]}
    rules = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"demo", "test"} <= targets <= rules


def test_every_lens_command_and_flag_exists():
    commands = get_command(cli.app).commands
    flags = {
        name: {o for p in c.params for o in (*p.opts, *p.secondary_opts)} | {"--help"} for name, c in commands.items()
    }
    used = [re.sub(r"^.*?(?=\blens )", "", c) for c in COMMANDS if re.match(r"(\S*/)?lens [a-z-]", c)]
    assert any(c.startswith("lens generate") for c in used)
    assert any(c.startswith("lens doctor") for c in used)
    for command in used:
        words = re.sub(r'"[^"]*"', "TEXT", command).split()
        if words[1] != "--version":
            wrong = [w for w in words[2:] if w.startswith("-") and w.split("=")[0] not in flags[words[1]]]
            assert not wrong, f"{command}: no such flag {wrong}"
    loose = {w for w in INLINE if re.fullmatch(r"--[a-z-]+", w)}
    assert loose <= set().union(*flags.values())


def test_every_python_module_command_answers_help(monkeypatch, capsys):
    commands = {tuple(c.split()[2:4]) for c in COMMANDS if re.match(r"(\S*/)?python -m ", c)}
    assert {module for module, *_ in commands} >= {"train", "bench"}
    for module, *first in commands:
        stage = [word for word in first if re.fullmatch(r"[a-z_]+", word)]
        monkeypatch.setattr(sys, "argv", [module, *stage, "--help"])
        with pytest.raises(SystemExit) as leaving:
            runpy.run_module(module, run_name="__main__")
        assert leaving.value.code == 0, f"python -m {module} {stage}"
        assert "usage:" in capsys.readouterr().out


def test_the_python_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = [body for language, body in BLOCKS if language == "python"]
    exec(compile(code[0], "README.md", "exec"), {})
    assert list(tmp_path.glob("*.png"))


def test_its_picture_is_what_these_weights_draw(tmp_path):
    """The sheet's first picture, redrawn. Other CPUs round otherwise, so it is held to be alike, not equal."""
    command = next(c for c in COMMANDS if "docs/images/mini_sheet.png" in c)
    assert "generate --model mini-turbo --file lens/mini/demo_prompts.txt --seed 1 " in command
    first = next(line for line in (ROOT / "lens/mini/demo_prompts.txt").read_text().splitlines() if line[0] != "#")
    result = CliRunner().invoke(
        cli.app, ["generate", first, "--model", "mini-turbo", "--seed", "1", "-o", str(tmp_path / "x.png")]
    )
    assert result.exit_code == 0, result.output
    with Image.open(tmp_path / "x.png") as image, Image.open(ROOT / "docs/images/mini_sheet.png") as sheet:
        again = np.asarray(image.convert("RGB"), dtype=float)
        shown = np.asarray(sheet.convert("RGB").crop((12, 12, 140, 140)), dtype=float)
    assert abs(again - shown).mean() < 4, "redraw the sheet: the weights have changed"
