"""lens generate: every option, every refusal, the recipe in the file, and what an interrupt leaves behind."""

import errno
import inspect
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
import unicodedata
import warnings
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from lens import LensPipeline, __version__, image_file
from lens.cli import __main__ as cli
from lens.cli import main, terminal
from lens.cli import request as cli_request
from lens.doctor.findings import Finding
from lens.formats import parts, released
from lens.formats.hub import EMBEDDED
from lens.formats.released import read_index
from tests.small_pipeline import shared

DEV = Path(__file__).parents[1] / "golden" / "dev"
FAST = ["--model", str(DEV), "--variant", "lens", "--steps", "2", "--size", "32x32"]
EXPECTED_RECIPE = {
    "prompt": "a red apple",
    "negative": "blurry",
    "seed": 7,
    "steps": 3,
    "guidance": 2.5,
    "size": (48, 32),
    "variant": "turbo",
    "chat_date": "2025-01-31",
    "truncation": "prompt",
    "model": "dev",
    "dtype": "float32",
    "version": __version__,
    "fingerprint": shared().fingerprint,
    "solver": "euler",
    "loras": (),
    "wish": "",
    "reasoner": "",
    "threads": 1,
    "hardware": image_file.Machine.here(torch.device("cpu"), 1).hardware,
    "torch_version": torch.__version__,
}


def run(*args, stdin=None):
    return CliRunner().invoke(cli.app, [str(a) for a in args], input=stdin)


def generate(*args, fast=True, stdin=None):
    return run("generate", *args, *(FAST if fast else []), stdin=stdin)


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image)


def written(result):
    """Paths on stdout, after checking that the command succeeded."""
    assert result.exit_code == 0, result.output
    return [Path(line) for line in result.stdout.splitlines()]


@pytest.fixture(scope="module")
def apple(tmp_path_factory):
    """One picture drawn with every value away from its default."""
    path = tmp_path_factory.mktemp("apple") / "apple.png"
    result = generate(
        "a red apple", "-o", path, "--model", DEV, "--negative", "blurry", "--seed", 7, "--steps", 3, "--guidance", 2.5,
        "--size", "32x48", "--variant", "turbo", "--chat-date", "2025-01-31", "--truncation", "prompt",
        "--device", "cpu", "--dtype", "float32", fast=False,
    )  # fmt: skip
    assert written(result) == [path]
    return path


def test_the_application_is_found_where_the_command_is():
    import lens.cli

    assert lens.cli.app is cli.app
    with pytest.raises(AttributeError, match="no attribute 'appp'"):
        getattr(lens.cli, "appp")  # noqa: B009


# ------------------------------------------------------------------------------------------------ pictures


def test_other_programs_read_prompt_and_settings(apple, tmp_path):
    """The chunk and the form of A1111; what is no Latin-1 and what holds a comma comes through, too."""
    with Image.open(apple) as image:
        assert image.text["parameters"] == (
            "a red apple\nNegative prompt: blurry\n"
            f"Steps: 3, Sampler: Euler, CFG scale: 2.5, Seed: 7, Size: 32x48, Model: dev, Version: Lens {__version__}"
        )
        other = replace(image_file.read_recipe(apple), prompt="日本, été", negative="", solver="dpm2m", model="a, b: c")
        image_file.save_png(image, tmp_path / "x.png", other)
    with Image.open(tmp_path / "x.png") as image:
        first, settings = image.text["parameters"].split("\n")
    assert first == "日本, été"
    assert "Sampler: DPM++ 2M, " in settings
    assert 'Model: "a, b: c", ' in settings
    assert image_file.read_recipe(tmp_path / "x.png") == other


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    """A peft file for the golden model, made by hand: alpha 8 over rank 2."""
    from safetensors.torch import save_file

    path, generator = tmp_path_factory.mktemp("lora") / "style.safetensors", torch.Generator().manual_seed(1)
    name, tensors = "base_model.model.transformer_blocks.{}.attn.to_out.0", {}
    for block in range(3):
        for side, shape in (("lora_A.weight", (2, 128)), ("lora_B.weight", (128, 2))):
            tensors[f"{name.format(block)}.{side}"] = torch.randn(shape, generator=generator)
        tensors[f"{name.format(block)}.alpha"] = torch.tensor(8.0)
    save_file(tensors, path)
    return path


def test_a_lora_is_drawn_with_and_stands_in_the_recipe(apple, lora, tmp_path):
    plain, styled, again, twice = (tmp_path / f"{name}.png" for name in ("plain", "styled", "again", "twice"))
    written(generate("a dog", "-s", 3, "-o", plain))
    written(generate("a dog", "-s", 3, "-o", styled, "--lora", lora, "--lora-scale", 0.75))
    assert not np.array_equal(pixels(styled), pixels(plain))
    pipe = LensPipeline.from_pretrained(DEV, variant="lens")
    pipe.load_lora(lora, 0.75)
    expected = pipe("a dog", height=32, width=32, num_inference_steps=2, seed=3).images[0]
    assert np.array_equal(pixels(styled), np.asarray(expected))
    recipe = image_file.read_recipe(styled)
    assert recipe.loras == tuple(pipe.loras) == (("style.safetensors", pipe.loras[0][1], 0.75),)
    assert "loras" not in json.loads(image_file.read_recipe(plain).to_json())

    refused = generate("--like", styled, "-o", again)
    assert refused.exit_code == 2
    assert "drawn with the LoRA style.safetensors: give it with --lora" in refused.stderr
    redrawn = generate("--like", styled, "-o", again, "--lora", lora)  # the scale is the recipe's
    assert written(redrawn) == [again]
    assert np.array_equal(pixels(again), pixels(styled))
    assert "another picture" not in redrawn.stderr
    other = generate("--like", styled, "-o", twice, "--lora", lora, "--lora", lora, "--lora-scale", 0.375)
    assert written(other) == [twice]
    assert np.array_equal(pixels(twice), pixels(styled))  # halves add up
    assert "drawn with style.safetensors, not with these" in " ".join(other.stderr.split())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lora-scale", "0.5"], "--lora-scale needs --lora"),
        (["--lora", "LORA", "--lora-scale", "1", "--lora-scale", "2"], r"once per --lora (1), got 2"),
        (["--lora", "LORA", "--lora-scale", "nan"], "--lora-scale must be a finite number"),
    ],
)
def test_lora_flags_that_make_no_sense(lora, flags, message):
    result = generate("a dog", *[lora if flag == "LORA" else flag for flag in flags])
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())


def test_a_broken_lora_is_named(lora, tmp_path):
    (tmp_path / "half.safetensors").write_bytes(lora.read_bytes()[:400])
    result = generate("a dog", "-o", tmp_path / "x.png", "--lora", tmp_path / "half.safetensors")
    assert result.exit_code == 1
    assert "half.safetensors: truncated" in " ".join(result.stderr.split())
    assert not (tmp_path / "x.png").exists()


def test_a_limit_of_memory_is_kept_or_refused(apple, tmp_path):
    again = tmp_path / "again.png"
    call = ["generate", "--like", apple, "--model", DEV, "--device", "cpu", "-o", again]
    result = run(*call, "--memory", 8)
    assert result.exit_code == 0
    assert again.read_bytes() == apple.read_bytes()
    assert "text_encoder resident" in result.stderr
    assert "modulation host" in result.stderr
    result = run(*call, "--memory", 0.2)
    assert result.exit_code == 1
    assert "memory: 0.2 GB are too few, at least needed: trimmed" in result.stderr
    assert run(*call, "--memory", 0).exit_code == 2
    assert run(*call, "--memory", 8, "--residency", "lean").exit_code == 2
    result = run(*call, "--memory", 1.2, "--size", "2048x2048")  # larger than what loading foresaw
    assert result.exit_code == 1
    assert "memory: 1.2 GB are too few" in result.stderr


@pytest.mark.parametrize("residency", ["auto", "lean"])
def test_residency_is_planned_and_changes_no_pixel(apple, tmp_path, residency):
    again = tmp_path / "again.png"
    result = run("generate", "--like", apple, "--model", DEV, "--device", "cpu", "-o", again, "--residency", residency)
    assert written(result) == [again]
    assert (pixels(again) == pixels(apple)).all()
    encoder = "on_demand" if residency == "lean" else "resident"  # which is all that can leave a CPU's memory
    modulation = "host" if residency == "lean" else "resident"
    plan = f"text_encoder {encoder}, transformer resident, vae resident, modulation {modulation}"
    assert plan in " ".join(result.stderr.split())
    assert "predicted GiB: encode 0." in " ".join(result.stderr.split())


def test_the_picture_is_the_librarys_and_carries_its_recipe(apple):
    pipe = LensPipeline.from_pretrained(DEV, variant="turbo")
    expected = pipe(
        "a red apple", "blurry", height=48, width=32, num_inference_steps=3, guidance_scale=2.5, seed=7,
        chat_date="2025-01-31", truncation="prompt",
    ).images[0]  # fmt: skip
    assert np.array_equal(pixels(apple), np.asarray(expected))
    assert asdict(image_file.read_recipe(apple)) == EXPECTED_RECIPE
    with Image.open(apple) as image:
        assert json.loads(image.text["lens"])["size"] == [48, 32]  # plain JSON under one key


def test_prompts_images_per_prompt_and_seeds_are_prompt_major(tmp_path):
    paths = written(generate("a dog", "Zwei Äpfel, 猫!", "-n", 2, "-s", 5, "-o", tmp_path / "new" / "folder"))
    assert [p.name for p in paths] == [
        "000-a-dog-5.png", "001-a-dog-6.png", "002-zwei-äpfel-猫-7.png", "003-zwei-äpfel-猫-8.png",
    ]  # fmt: skip
    recipes = [image_file.read_recipe(p) for p in paths]
    assert [(r.prompt, r.seed) for r in recipes] == [
        ("a dog", 5),
        ("a dog", 6),
        ("Zwei Äpfel, 猫!", 7),
        ("Zwei Äpfel, 猫!", 8),
    ]
    assert len({pixels(p).tobytes() for p in paths}) == 4


def test_a_list_of_seeds_sets_the_number_of_pictures(tmp_path):
    paths = written(generate("a dog", "a cat", "-s", "9,2,9,1", "-o", tmp_path))
    assert [(r.prompt, r.seed) for r in map(image_file.read_recipe, paths)] == [
        ("a dog", 9), ("a dog", 2), ("a cat", 9), ("a cat", 1),
    ]  # fmt: skip


def test_without_a_seed_each_run_draws_its_own_and_reports_it(tmp_path):
    first, second = (written(generate("a dog", "-o", tmp_path / name))[0] for name in "ab")
    assert image_file.read_recipe(first).seed != image_file.read_recipe(second).seed
    assert str(image_file.read_recipe(first).seed) in first.name


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_prompts_from_a_file_and_from_stdin(tmp_path, ending):
    text = ending.join(["# fruit", "a red apple", "", "  a pear # 2  "])
    (tmp_path / "prompts.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    from_file = written(generate("--file", tmp_path / "prompts.txt", "-s", 1, "-o", tmp_path / "a"))
    from_stdin = written(generate("-f", "-", "-s", 1, "-o", tmp_path / "b", stdin=text))
    for paths in (from_file, from_stdin):
        assert [image_file.read_recipe(p).prompt for p in paths] == ["a red apple", "a pear # 2"]


@pytest.mark.parametrize(
    ("flags", "height_width"),
    [
        (["--size", "96x64"], (64, 96)),
        (["--height", "48", "--width", "32"], (48, 32)),
        (["--base", "96", "--aspect", "16:9"], (80, 128)),
        ([], (64, 64)),
    ],
)
def test_sizes(tmp_path, monkeypatch, flags, height_width):
    index = {**read_index(DEV), "lens": {"variant": "lens", "base_resolution": 64, "max_resolution": 64}}
    monkeypatch.setattr(released, "read_index", lambda root: index)
    result = generate("a dog", *flags, "--steps", 1, "-m", DEV, "-o", tmp_path / "x.png", fast=False)
    (path,) = written(result)
    assert pixels(path).shape[:2] == height_width
    assert ("larger than the largest size" in result.stderr) == (height_width[0] * height_width[1] > 64 * 64)


def test_one_size_per_prompt(tmp_path):
    result = run(
        "generate", "a", "b", "-m", DEV, "--steps", 1, "--size", "48x32", "--size", "32x64", "-n", 2, "-o", tmp_path
    )
    assert [pixels(p).shape[:2] for p in written(result)] == [(32, 48), (32, 48), (64, 32), (64, 32)]


def test_what_is_drawn_together_changes_no_picture(tmp_path):
    args = ["a dog", "a cat on a mat", "x", "--negative", "fog", "-s", 3]
    together = written(generate(*args, "-o", tmp_path / "a"))
    one_by_one = written(generate(*args, "--batch-size", 1, "-o", tmp_path / "b"))
    for a, b in zip(together, one_by_one, strict=True):
        assert a.read_bytes() == b.read_bytes()


def test_batches_hold_few_large_or_several_small_pictures():
    large, small = (1024, 1024), (64, 64)
    assert cli_request.batched([small] * 20, None) == [range(0, 8), range(8, 16), range(16, 20)]
    assert cli_request.batched([large] * 3, None) == [range(0, 2), range(2, 3)]
    assert cli_request.batched([(2048, 2048)] * 2, None) == [range(0, 1), range(1, 2)]
    assert cli_request.batched([large] * 3, 3) == [range(0, 3)]


def test_names(tmp_path):
    paths = written(generate("a dog", "b", "-s", 4, "--name", "{seed:04d}_{prompt}.PNG", "-o", tmp_path))
    assert [p.name for p in paths] == ["0004_a-dog.PNG", "0005_b.PNG"]
    assert image_file.slug("") == "picture"
    assert image_file.slug("../../etc/passwd") == "etc-passwd"
    assert image_file.slug("word " * 100) == "word-word-word-word-word-word-word-word"
    assert image_file.slug("a " * 30) == "-".join("a" * 20)
    assert image_file.slug("x" * 50) == "x" * 40


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("แอปเปิ้ลสีแดง", "แอปเปิ้ลสีแดง"),
        ("एक लाल सेब", "एक-लाल-सेब"),
        ("சிவப்பு ஆப்பிள்!", "சிவப்பு-ஆப்பிள்"),
        (unicodedata.normalize("NFD", "Äpfel für Zoë"), unicodedata.normalize("NFD", "äpfel-für-zoë")),
        ("\u0301 a\u200d", "a"),  # marks and joiners that join nothing
        ("क्" * 30, "क्" * 20),
        ("a" + "क्" * 30, "a" + "क्" * 19),  # never between a letter and its marks
    ],
)
def test_names_keep_combining_marks(prompt, name):
    assert image_file.slug(prompt) == name


def test_today_is_written_into_the_recipe_as_a_date(tmp_path):
    (path,) = written(generate("a dog", "--chat-date", "today", "-o", tmp_path / "x.png"))
    assert len(image_file.read_recipe(path).chat_date) == len("2026-05-23")


def test_json_tells_path_and_recipe_a_picture_a_line(tmp_path):
    sheet = tmp_path / "s.png"
    done = generate("a red apple", "two\nstars", "--seed", "3", "-o", tmp_path, "--json", "--sheet", sheet, "-q")
    assert done.exit_code == 0, done.output
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["prompt"] for line in lines] == ["a red apple", "two\nstars"]
    assert [line["seed"] for line in lines] == [3, 4]
    for line in lines:
        path = Path(line.pop("path"))
        assert json.loads(image_file.read_recipe(path).to_json()) == line
    assert sheet.is_file()


def test_quiet_prints_paths_alone(tmp_path):
    result = generate("a dog", "-q", "-o", tmp_path / "x.png")
    assert result.stdout == f"{tmp_path / 'x.png'}\n"
    assert result.stderr == ""


def test_the_summary_says_under_which_conditions(tmp_path):
    result = generate("a dog", "b", "--guidance", 3, "-o", tmp_path)
    assert "2 pictures of 32x32 drawn in" in result.stderr
    assert "2 steps, guidance 3, cpu with" in result.stderr


def test_progress_counts_every_step_of_every_batch(tmp_path, monkeypatch):
    monkeypatch.setattr(terminal, "_PLAIN_PROGRESS_SECONDS", 0.0)
    result = generate("a dog", "a cat", "--batch-size", 1, "-o", tmp_path)
    assert [line for line in result.stderr.splitlines() if line.startswith("step")] == [
        f"step {k}/4" for k in (1, 2, 3, 4)
    ]


def test_progress_on_a_terminal_is_a_bar(tmp_path, monkeypatch):
    monkeypatch.setattr(terminal, "console", terminal.Console(stderr=True, force_terminal=True, width=80))
    result = generate("a dog", "-o", tmp_path / "x.png")
    assert result.exit_code == 0
    assert "drawing" in result.stderr
    assert "2/2" in result.stderr


def test_nothing_from_a_file_drives_the_terminal(apple, tmp_path, monkeypatch):
    """Neither by an error, a warning, what a library logs, nor the doctor."""
    evil = "\x1b]0;owned\x07\x1b[2J\u202e"
    with Image.open(apple) as image:
        recipe = replace(image_file.read_recipe(apple), version=evil)
        image_file.save_png(image, tmp_path / "a.png", recipe)
        image_file.save_png(image, tmp_path / "b.png", replace(recipe, loras=((evil, "f", 1.0),), fingerprint=evil))
        image_file.save_png(image, tmp_path / "c.png", replace(recipe, model=evil))
    caught, logged = [], []

    def load(*args, **kwargs):
        warnings.warn(evil, stacklevel=1)
        logging.getLogger("diffusers").warning("unexpected %s", evil)
        raise ValueError(evil)

    monkeypatch.setattr(LensPipeline, "from_pretrained", load)
    handler = logging.Handler()
    handler.emit = lambda record: logged.append(handler.format(record))
    logging.getLogger("diffusers").addHandler(handler)
    try:
        for name in "abc":
            caught.append(generate("--like", tmp_path / f"{name}.png", "-o", tmp_path / "x.png", fast=name != "c"))
    finally:
        logging.getLogger("diffusers").removeHandler(handler)
    assert len(logged) == 1
    assert all(r.exit_code for r in caught)
    assert any("owned" in r.output for r in caught)
    for text in (*logged, *(r.output for r in caught), *(r.stderr for r in caught)):
        assert not set(text) & {"\x1b", "\x07", "\u202e"}
    monkeypatch.setattr("lens.doctor.report.examine", lambda *_: [Finding("a", "b", "ok", evil)])
    assert "\x1b" not in run("doctor").output


def test_sizes_that_are_not_square_are_said_in_words_once(tmp_path):
    result = generate("a", "b", "--size", "48x32", "-o", tmp_path, "--steps", 1)
    assert written(result)
    assert result.stderr.count("width 48, height 32") == 1
    assert pixels(written(result)[0]).shape == (32, 48, 3)


@pytest.mark.parametrize(
    ("flags", "note"),
    [
        (["-g", "0.5"], "guidance_scale 0.5 is below 1, so images are drawn partly without the prompt"),
        (["-g", "0"], "guidance_scale 0 is below 1, so images are drawn without the prompt"),
        (["-g", "1", "--negative", "fog"], "the negative prompt is not read at guidance_scale 1"),
        (["red " * 600], "tokens; only the first 412 are kept"),
        (["red " * 600 + "<|end|>"], "tokens; only the first 412 are kept"),
        (["-g", "1"], None),
        (["--negative", "fog"], None),
    ],
    ids=lambda value: str(value)[:20],
)
def test_traps_are_said_once(tmp_path, flags, note):
    result = generate(*([] if flags[0].startswith("red") else ["a"]), *flags, "--steps", 1, "-o", tmp_path / "x.png")
    assert written(result)
    notes = [line for line in result.stderr.splitlines() if line.startswith("note:")]
    assert len(notes) == (note is not None)
    assert note is None or note in notes[0]


# ------------------------------------------------------------------------------------------------ like


def test_like_redraws_bit_for_bit(apple, tmp_path):
    (again,) = written(run("generate", "--like", apple, "--model", DEV, "-o", tmp_path / "again.png"))
    assert again.read_bytes() == apple.read_bytes()


def test_like_redraws_one_picture_of_a_mixed_batch(tmp_path):
    args = [
        "a cat",
        "b",
        "c d e",
        "-m",
        DEV,
        "--size",
        "64x32",
        "--size",
        "32x64",
        "--size",
        "48x48",
        "--steps",
        3,
        "-s",
        1,
    ]
    for path in written(run("generate", *args, "-o", tmp_path)):
        (again,) = written(run("generate", "--like", path, "-m", DEV, "-o", tmp_path / "again.png"))
        assert again.read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("flags", "changed"),
    [
        (["a pear"], {"prompt": "a pear"}),
        (["--negative", ""], {"negative": ""}),
        (["--seed", "8"], {"seed": 8}),
        (["--steps", "2"], {"steps": 2}),
        (["--guidance", "1"], {"guidance": 1.0}),
        (["--size", "32x32"], {"size": (32, 32)}),
        (["--chat-date", "2025-02-01"], {"chat_date": "2025-02-01"}),
        (["--truncation", "reference"], {"truncation": "reference"}),
        (["--steps", "6", "--solver", "dpm2m"], {"steps": 6, "solver": "dpm2m"}),
        (["--dtype", "bfloat16"], {"dtype": "bfloat16"}),
        (["--variant", "lens", "--steps", "1"], {"variant": "lens", "steps": 1, "guidance": 5.0}),
    ],
)
def test_a_flag_overrides_its_part_of_the_recipe(apple, tmp_path, flags, changed):
    (path,) = written(run("generate", *flags, "--like", apple, "--model", DEV, "-o", tmp_path / "x.png"))
    assert asdict(image_file.read_recipe(path)) == {**EXPECTED_RECIPE, **changed}
    if set(changed) - {"truncation", "chat_date"}:  # which need not move an 8-bit value of this checkpoint
        assert pixels(path).tobytes() != pixels(apple).tobytes()


def test_like_says_where_another_machine_may_give_other_bits(apple, tmp_path):
    recipe, notes = image_file.read_recipe(apple), {}
    for name, change in {
        "other.png": {"hardware": "cpu avx2", "torch_version": "9.9", "threads": 3},
        "unknown.png": {"hardware": "", "torch_version": "", "threads": 0},
    }.items():
        with Image.open(apple) as image:
            image_file.save_png(image, tmp_path / name, replace(recipe, **change))
        result = run("generate", "--like", tmp_path / name, "--model", DEV, "-o", tmp_path / "again.png")
        assert written(result)
        notes[name] = " ".join(result.stderr.split())
    here = recipe.machine
    assert (
        f"other.png was drawn with 3 threads (here 1), cpu avx2 (here {here.hardware}), torch 9.9 (here {here.torch_version}): "
        "the last bits may differ"
    ) in notes["other.png"]
    assert "was drawn with" not in notes["unknown.png"]
    assert "threads" not in json.loads(replace(recipe, threads=0).to_json())


def test_like_draws_on_as_many_threads_as_the_picture_was(apple, tmp_path, monkeypatch):
    """Of a model that is not small: the number decides bits, and one machine's cores are not another's."""
    monkeypatch.setattr("lens.engine.threads.SMALL_WIDTH", 16)
    before, drawn_with = torch.get_num_threads(), []
    draw = LensPipeline.draw
    monkeypatch.setattr(LensPipeline, "draw", lambda *a: drawn_with.append(torch.get_num_threads()) or draw(*a))
    with Image.open(apple) as image:
        image_file.save_png(image, tmp_path / "two.png", replace(image_file.read_recipe(apple), threads=2))
    try:
        torch.set_num_threads(1)
        again = run("generate", "--like", tmp_path / "two.png", "--model", DEV, "--steps", 1, "-o", tmp_path / "x.png")
        assert written(again)
    finally:
        torch.set_num_threads(before)
    assert drawn_with == [2]
    assert image_file.read_recipe(tmp_path / "x.png").threads == 2
    assert "threads" not in again.stderr.split("drawn in")[0]


def test_like_finds_embedded_weights_by_name_and_refuses_others(apple, tmp_path, monkeypatch):
    monkeypatch.setitem(EMBEDDED, "mini", str(DEV))
    recipe = replace(image_file.read_recipe(apple), model="mini")
    with Image.open(apple) as image:
        image_file.save_png(image, tmp_path / "mini.png", recipe)
        image_file.save_png(image, tmp_path / "other.png", replace(recipe, fingerprint="f" * 64))
        image_file.save_png(image, tmp_path / "old.png", replace(recipe, version="0.0.1"))
    (again,) = written(run("generate", "--like", tmp_path / "mini.png", "-o", tmp_path / "again.png"))
    assert np.array_equal(pixels(again), pixels(apple))
    refused = run("generate", "--like", tmp_path / "other.png", "-o", tmp_path / "no.png")
    assert refused.exit_code == 1
    assert "other weights (fingerprint ffffffffffff" in refused.stderr
    assert not (tmp_path / "no.png").exists()
    named = run("generate", "--like", tmp_path / "other.png", "-m", "mini", "-o", tmp_path / "yes.png")
    assert written(named) == [tmp_path / "yes.png"]
    assert "this will be another picture" in named.stderr
    old = run("generate", "--like", tmp_path / "old.png", "-o", tmp_path / "old-again.png")
    assert written(old)
    assert "drawn by version 0.0.1" in old.stderr


def test_like_of_weights_in_a_folder_asks_for_them(apple):
    result = run("generate", "--like", apple)
    assert result.exit_code == 2
    assert "a folder named 'dev': give it with --model" in result.stderr


def broken_recipes():
    good = json.loads(json.dumps(EXPECTED_RECIPE))
    yield "{", "not valid JSON"
    yield "[]", "must be a JSON object, got list"
    yield json.dumps({k: v for k, v in good.items() if k != "seed"}), "has no seed; it was written by version"
    yield (
        json.dumps({**good, "sampler": 1, "version": "9.9"}),
        f"unknown key 'sampler'; it was written by version '9.9', this is {__version__}",
    )
    yield json.dumps(good).replace('"seed": 7', f'"seed": {"7" * 5000}'), "not valid JSON"
    yield json.dumps(good).replace('"seed": 7', f'"seed": {"[" * 100_000}'), "not valid JSON"
    yield json.dumps(good).replace("2.5", "1e999"), "guidance of its recipe must be a finite number >= 0, got inf"
    yield json.dumps({**good, "threads": 10**6}), "threads of its recipe must be an integer from 1 to 1024"
    for key, value in [
        ("seed", -(2**63) - 1),
        ("seed", 2**64),
        ("size", [64, 2**60]),
        ("steps", 2**63),
        ("guidance", 10**400),
        ("loras", [["a", "b", 10**400]]),
        ("seed", True),
        ("size", [64]),
        ("size", "64x64"),
        ("steps", 0),
        ("guidance", "5"),
        ("prompt", 3),
        ("loras", [["a", "b"]]),
        ("loras", [["a", "b", "c"]]),
        ("loras", "style"),
    ]:
        yield json.dumps({**good, key: value}), f"{key} of its recipe"


@pytest.mark.parametrize(("text", "message"), list(broken_recipes()))
def test_a_broken_recipe_is_refused(tmp_path, text, message):
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_itxt("lens", text)
    Image.new("RGB", (4, 4)).save(tmp_path / "x.png", pnginfo=info)
    result = run("generate", "--like", tmp_path / "x.png")
    assert result.exit_code == 1
    assert message in result.stderr
    assert "x.png" in result.stderr


def test_the_solver_is_repeated_and_a_recipe_of_one_that_knew_no_other_is_eulers(apple, tmp_path):
    (second,) = written(
        generate("a dog", "-s", 1, "--steps", 6, "--solver", "dpm2m", "-o", tmp_path / "a.png", fast=False)
    )
    (again,) = written(run("generate", "--like", second, "-o", tmp_path / "b.png"))
    assert pixels(again).tobytes() == pixels(second).tobytes()
    assert image_file.read_recipe(again).solver == "dpm2m"
    values = json.loads(image_file.read_recipe(apple).to_json())
    del values["solver"]
    assert image_file.Recipe.from_json(json.dumps(values), "x").solver == "euler"
    with Image.open(apple) as image:
        image_file.save_png(image, tmp_path / "c.png", replace(image_file.read_recipe(apple), solver="heun"))
    result = run("generate", "--like", tmp_path / "c.png", "--model", DEV)
    assert (result.exit_code, "names the solver 'heun', expected one of euler, dpm2m" in result.stderr) == (1, True)


# ------------------------------------------------------------------------------------------------ contact sheet


def test_the_sheet_shows_every_pixel_enlarged_and_a_caption(tmp_path):
    result = generate(
        "a dog", "a cat", "-s", 1, "-o", tmp_path, "--sheet", tmp_path / "deep" / "sheet.png", "--scale", 4
    )
    *paths, sheet = written(result)
    page = pixels(sheet)
    for k, path in enumerate(paths):
        enlarged = pixels(path).repeat(4, 0).repeat(4, 1)
        left = 12 + k * (160 + 12)
        assert np.array_equal(page[12 : 12 + 128, left : left + 128], enlarged)
        assert (page[12 + 128 :, left : left + 160] < 100).any()  # ink of the caption
    with pytest.raises(image_file.RecipeError, match="no recipe"):
        image_file.read_recipe(sheet)


@pytest.mark.parametrize(("side", "shown"), [(64, 192), (96, 192), (128, 128), (512, 512), (1024, 512), (1440, 480)])
def test_the_sheet_brings_pictures_to_a_visible_size(side, shown):
    page = image_file.contact_sheet([Image.new("RGB", (side, side), (200, 0, 0))], ["x"])
    red = (np.asarray(page) == (200, 0, 0)).all(-1)
    assert (red.any(0).sum(), red.any(1).sum()) == (shown, shown)


def test_captions_wrap_at_words_and_only_then_inside_them():
    assert image_file._wrapped("a bb ccc dddd\nseed 3", 6, len) == ["a bb", "ccc", "dddd", "seed 3"]
    assert image_file._wrapped("abcdefghij k", 4, len) == ["abcd", "efgh", "ij k"]
    assert image_file._wrapped("", 4, len) == [""]
    assert image_file._wrapped("ab", 0, len) == ["a", "b"]


# ------------------------------------------------------------------------------------------------ refusals

MISTAKES = [
    ([], "nothing to draw"),
    (["a", "--size", "64"], "--size must be WIDTHxHEIGHT"),
    (
        ["a", "--size", "65x64"],
        "--size 65x64: width and height must be multiples of 16 pixels, from 16 to 65536, got 65; the nearest is 64x64",
    ),
    (["a", "--size", "1152921504606846976x64"], "the nearest is 65536x64"),
    (
        ["a", "--width", "72", "--height", "64"],
        "--width must be a positive multiple of 16 pixels, got 72: 64 or 80 is nearest",
    ),
    (["a", "--size", "0x64"], "got 0"),
    (["a", "b", "c", "--size", "64x64", "--size", "32x32"], "once per prompt (3), got 2"),
    (["a", "--height", "64"], "--height and --width must be given together"),
    (["a", "--base", "64"], "--base and --aspect must be given together"),
    (["a", "--base", "100", "--aspect", "1:1"], "--base must be one of"),
    (["a", "--base", "64", "--aspect", "5:1"], "--aspect must lie between"),
    (["a", "--size", "64x64", "--base", "64", "--aspect", "1:1"], "only one of --size"),
    (["a", "--seed", "x"], "--seed must be a whole number"),
    (["a", "--seed", "18446744073709551616"], "--seed must lie between -2^63 and 2^64 - 1"),
    (["a", "--seed", "18446744073709551615", "-n", "2"], "counts up to 18446744073709551616 for 2 pictures"),
    (["a", "-n", "1000000000000"], "100000"),
    (
        ["a", "b", "-n", "60000"],
        "a command draws at most 100000 pictures, got 2 prompts times --images-per-prompt 60000",
    ),
    (["a", "--steps", "1000000"], "1000"),
    (["a", "-o", "x" * 300 + ".png"], "at most 255 bytes, got 304"),
    (["a", "-o", "a/" * 2100 + "b.png"], "at most 4095 bytes"),
    (["a", "--sheet", "é" * 140 + ".png"], "at most 255 bytes, got 284"),
    (["a", "--name", "{index:1000000000}"], "no wider than 255"),
    (["a", "--name", "{index:{seed}}"], "no wider than 255"),
    (["a", "-o", "-"], "not written to stdout"),
    (["a", "-o", "x.png", "--sheet", "./x.png"], "--sheet x.png is also the file of a picture"),
    (["a", "--seed", "4", "--name", "{index}", "--sheet", "0.png"], "--sheet 0.png is also the file of a picture"),
    (["a", "--seed", "1,2", "-n", "3"], "one per picture (3), got 2"),
    (["a", "b", "--seed", "1,2,3"], "one per picture (2), got 3"),
    (["a", "--steps", "0"], "--steps"),
    (["a", "--guidance", "-1"], "--guidance"),
    (["a", "--guidance", "nan"], "--guidance"),
    (["a", "--guidance", "inf"], "--guidance must be a finite number"),
    (["a", "--chat-date", "23.5.2026"], "--chat-date must be YYYY-MM-DD"),
    (["a", "--truncation", "none"], "--truncation"),
    (["a", "--variant", "mega"], "--variant"),
    (["a", "--dtype", "float16"], "--dtype"),
    (["a", "--device", "tpu"], "--device must be"),
    (["a", "--device", "cuda:9"], "torch sees"),
    (["a", "--scale", "2"], "give --sheet"),
    (["a", "--sheet", "x.jpg"], "--sheet must name a .png file"),
    (["a", "-o", "x.jpg"], "written as .png"),
    (["a", "b", "-o", "x.png"], "one file for 2 pictures"),
    (["a", "-o", "x.png", "--name", "y"], "--output x.png is a file"),
    (["a", "--name", "{colour}"], "unknown field {colour}"),
    (["a", "--name", "{seed"], "cannot use '{seed'"),
    (["a", "--name", "up/{seed}"], "names a folder"),
    (["a", "a", "--name", "{prompt}"], "several pictures the same name"),
    (["--file", "missing.txt"], "--file missing.txt: No such file"),
    (["--like", "missing.png"], "--like missing.png: file not found"),
    (["--file", "."], "--file .: Is a directory"),
    (["a", "--nonsense"], "--nonsense"),
]


@pytest.mark.parametrize(
    ("args", "message"), MISTAKES, ids=[" ".join(args)[:60] or "no prompt" for args, _ in MISTAKES]
)
def test_a_mistake_is_one_line_and_exit_code_2(args, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    common = ["generate", "--model", str(DEV), "--variant", "lens"]
    result = CliRunner(env={"COLUMNS": "200"}).invoke(cli.app, [*common, *args])
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert list(tmp_path.iterdir()) == []


def test_files_of_prompts_that_hold_none_or_no_text(tmp_path):
    (tmp_path / "empty.txt").write_text("# nothing\n\n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00\x81")
    for name, message in (("empty.txt", "no prompt in it"), ("binary.txt", "not UTF-8 text")):
        result = generate("--file", tmp_path / name)
        assert result.exit_code == 2
        assert message in result.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["a", "--model", "no-such-model"], "no-such-model"),
        (["a", "--model", "."], "transformer: folder not found, expected the released layout"),
        (["--like", "text.png"], "not a readable PNG"),
        (["--like", "plain.png"], "carries no recipe"),
        (["--like", "photo.jpg"], "not a readable PNG"),
    ],
)
def test_a_failure_is_one_line_and_exit_code_1(args, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("text.png").write_text("not a picture")
    Image.new("RGB", (4, 4)).save("plain.png")
    Image.new("RGB", (4, 4)).save("photo.jpg")
    result = run("generate", *args)
    assert result.exit_code == 1
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert len(result.stderr.strip().splitlines()) == 1


def test_an_output_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    result = generate("a dog", "-o", tmp_path / "file" / "x.png")
    assert result.exit_code == 1
    assert str(tmp_path / "file") in result.stderr


def test_a_full_disk_keeps_what_was_saved_and_leaves_no_half_file(tmp_path, monkeypatch):
    save, calls = Image.Image.save, []

    def fill(self, target, **kwargs):
        calls.append(target)
        if len(calls) == 2:
            Path(target).write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
        save(self, target, **kwargs)

    monkeypatch.setattr(Image.Image, "save", fill)
    result = generate("a dog", "a cat", "-s", 1, "-o", tmp_path)
    assert result.exit_code == 1
    assert "No space left on device" in result.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["000-a-dog-1.png"]


def test_out_of_memory_is_a_failure_with_advice(tmp_path, monkeypatch):
    import torch

    def exhausted(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore lines")

    monkeypatch.setattr(LensPipeline, "draw", exhausted)
    result = generate("a dog", "-o", tmp_path / "x.png")
    assert result.exit_code == 1
    assert "try a smaller --batch-size" in result.stderr


def test_a_bug_keeps_its_traceback(tmp_path, monkeypatch):
    def bug(*args, **kwargs):
        raise KeyError("inside")

    monkeypatch.setattr(LensPipeline, "draw", bug)
    assert isinstance(generate("a dog", "-o", tmp_path / "x.png").exception, KeyError)


def test_interrupt_exits_130_and_keeps_what_was_saved(tmp_path):
    command = ["generate", *"abcdefgh", *FAST, "--steps", "60", "--batch-size", "1", "-s", "1", "-o", str(tmp_path)]
    process = subprocess.Popen(
        [sys.executable, "-c", "from lens.cli import main; main()", *command],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs are born deaf to it
    )  # fmt: skip
    first = process.stdout.readline().strip()
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "interrupted; " in errors
    assert "Traceback" not in errors
    left = sorted(tmp_path.iterdir())
    assert Path(first) in left
    assert len(left) < 8
    assert all(p.suffix == ".png" and image_file.read_recipe(p).steps == 60 for p in left)


def test_parts_from_three_places(apple, tmp_path):
    """The same weights named apart: the same picture, and its recipe redraws it from there."""
    files = [
        "--transformer",
        DEV / "transformer" / "diffusion_pytorch_model.safetensors",
        "--vae",
        DEV,
        "--text-encoder",
        DEV / "text_encoder",
    ]
    options = ["--seed", 5, "--steps", 1, "--size", "32x32"]
    apart, whole = tmp_path / "apart.png", tmp_path / "whole.png"
    written(generate("a dog", "-o", apart, *files, "--variant", "lens", *options, fast=False))
    written(generate("a dog", "-o", whole, *options, "--model", DEV, "--variant", "lens", fast=False))
    assert np.array_equal(pixels(apart), pixels(whole))
    assert image_file.read_recipe(apart).model == "diffusion_pytorch_model.safetensors"
    assert image_file.read_recipe(apart).fingerprint == EXPECTED_RECIPE["fingerprint"]
    again = tmp_path / "again.png"
    written(generate("--like", apart, *files, "-o", again, fast=False))
    assert np.array_equal(pixels(again), pixels(apart))
    refused = generate("a dog", "-o", apart, "--model", files[1], fast=False)
    assert refused.exit_code == 1
    assert "name the other parts with --text-encoder and --vae" in " ".join(refused.output.split())


# ------------------------------------------------------------------------------------------------ help


def test_help_is_complete():
    root = CliRunner(env={"COLUMNS": "200"}).invoke(cli.app, ["--help"])
    assert root.exit_code == 0
    assert "generate" in root.output
    assert "doctor" in root.output
    text = CliRunner(env={"COLUMNS": "200"}).invoke(cli.app, ["generate", "--help"]).output
    options = {line.split()[1]: line for line in text.splitlines() if line.startswith("│ --")}
    for parameter in inspect.signature(cli.generate).parameters:
        if parameter != "prompts":
            line = options[f"--{parameter.removeprefix('as_').replace('_', '-')}"]
            assert re.search(r"  [A-Z\"m].*\.\s*│$", line), f"no help text: {line}"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["generate", "a", "--steps", "0"], "error: Invalid value for '--steps': must be greater than or equal to 1"),
        (["generate", "a", "-n", "x"], "error: Invalid value for '--images-per-prompt' / '-n': "),
        (["generate", "a", "--dtype", "float16"], "error: Invalid value for '--dtype': 'float16' is not one of 'float32', 'bf"),
        (["generate", "a", "--num-inference-steps", "3"], "error: No such option: --num-inference-steps: here it is --steps"),
        (["generate", "a", "--cfg", "3"], "here it is --guidance"),
        (["generate", "a", "--stepz", "3"], "error: No such option: --stepz"),
        (["paint"], "error: No such command 'paint'"),
    ],
)  # fmt: skip
def test_the_command_tells_mistakes_of_its_line_as_all_others(args, message, monkeypatch, capsys):
    """One line, no box: by what `lens` itself calls, and not by the application alone."""
    monkeypatch.setattr(sys, "argv", ["lens", *args])
    with pytest.raises(SystemExit) as ended:
        main()
    told = capsys.readouterr()
    assert (ended.value.code, told.out) == (2, "")
    assert message in told.err
    assert told.err.count("\n") == 1


def test_the_command_alone_is_its_help_and_its_codes_reach_the_shell(monkeypatch, capsys):
    for args, code, text in (
        ([], 2, "generate"),
        (["--version"], 0, f"lens {__version__}"),
        (["generate"], 2, "nothing to draw"),
    ):
        monkeypatch.setattr(sys, "argv", ["lens", *args])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == code
        assert text in "".join(capsys.readouterr())


def test_version():
    result = run("--version")
    assert (result.exit_code, result.stdout) == (0, f"lens {__version__}\n")


@pytest.mark.parametrize("model", ["../../etc", "./dev", "stranger/weights", "dev"])
def test_a_recipe_opens_no_path_and_fetches_nothing(apple, tmp_path, monkeypatch, model):
    monkeypatch.setattr(parts, "resolve", lambda source, _: pytest.fail(f"{source} was opened"))
    with Image.open(apple) as image:
        image_file.save_png(image, tmp_path / "a.png", replace(image_file.read_recipe(apple), model=model))
    result = generate("--like", tmp_path / "a.png", fast=False)
    assert result.exit_code == 2, result.output
    assert "give it with --model" in " ".join(result.stderr.split())


def test_chat_dates_have_one_spelling():
    assert generate("an apple", "--chat-date", "20260523").exit_code == 2


@pytest.mark.parametrize("option", ["-o", "--sheet"])
def test_a_folder_that_cannot_be_written_is_named_before_anything_is_loaded(option, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(cli, "_load", lambda *_: pytest.fail("loaded"))
    away = [] if option == "-o" else ["-o", tmp_path / "a.png"]
    result = run("generate", "a", *away, option, tmp_path / "file" / "x.png")
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1] in {
        f"error: {tmp_path / 'file'}: {why}" for why in ("File exists", "Not a directory")
    }
    monkeypatch.setattr("os.access", lambda *_: False)  # root may write anywhere
    assert "Permission denied" in run("generate", "a", *away, option, tmp_path / "x.png").stderr
