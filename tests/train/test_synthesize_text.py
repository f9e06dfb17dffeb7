"""Rendered text: what is written is where it says, by (seed, number) alone, shaped, refused where it cannot be drawn."""

import json
import multiprocessing
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFont, features

from train import synthesize_text
from train.__main__ import main
from train.data import lettering
from train.data.lettering import (
    CONTRAST,
    NoFont,
    agreement,
    contrast,
    drawn,
    font_files,
    fonts_of,
    generator,
    readable,
    style,
)
from train.data.sources import tars_of
from train.loop.clock import Interrupted

FONTS = Path("/usr/share/fonts")
DEJAVU = sorted(FONTS.rglob("DejaVuSans*.ttf")) if FONTS.is_dir() else []
needs_font = pytest.mark.skipif(not DEJAVU, reason="no DejaVu Sans among the system's fonts")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fonts")
    for path in DEJAVU:
        if path.name in ("DejaVuSans.ttf", "DejaVuSans-Bold.ttf"):
            (folder / path.name).symlink_to(path)
    return style(["Latin", "Greek", "Cyrillic"], [folder], None, (192, 256), 3)


@needs_font
def test_an_image_follows_from_seed_and_number(made):
    one, again = drawn(made, 5), drawn(made, 5)
    np.testing.assert_array_equal(one.image, again.image)
    assert one.record == again.record
    assert one.record["text"] != drawn(made, 6).record["text"]
    assert one.image.shape == (192, 256, 3)


def inside(quad, height, width):
    points = np.array(quad)
    grid = np.stack(np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5), -1)
    sides = np.roll(points, -1, 0) - points
    crosses = [
        (s[0] * (grid[..., 1] - p[1]) - s[1] * (grid[..., 0] - p[0])) / np.hypot(*s) for s, p in zip(sides, points)
    ]
    return np.all([distance >= -1 for distance in crosses], 0)  # a pixel of tolerance


@needs_font
def test_letters_are_inside_their_boxes_and_nowhere_else(made, monkeypatch):
    """On a plain ground what differs from it is the lettering: all of it in the lines' boxes, a good part of each word's box."""
    monkeypatch.setattr(lettering, "background", lambda style, rng: ("plain", Image.new("RGB", (256, 192), "white")))
    layouts, turned = set(), 0
    for number in range(24):
        one = drawn(made, number)
        layouts.add(one.record["layout"])
        turned += one.record["rotation"] != 0
        ink = (one.image.astype(int) < 235).any(-1)
        lines = one.record["lines"]
        boxes = np.any([inside(line["quad"], 192, 256) for line in lines], 0)
        blur = one.record["blur"]
        assert ink.any()
        assert (ink & ~boxes).sum() <= (0.35 if blur else 0.04) * ink.sum(), one.record
        for line in lines:
            assert " ".join(word["text"] for word in line["words"]) == line["text"]
            for word in line["words"]:
                room = inside(word["quad"], 192, 256)
                assert ink[room].mean() > 0.05, word
            assert f'"{line["text"]}"' in one.record["caption"]
        assert one.record["text"] == "\n".join(line["text"] for line in lines)
    assert layouts == {"line", "paragraph", "heading", "scattered"}
    assert turned > 4


@needs_font
def test_a_script_without_font_is_refused_by_name(made, tmp_path):
    files = [path for own in made.fonts.values() for path in own]
    with pytest.raises(NoFont, match=r"no font for Han: none of \d+ has all of its \d+ letters"):
        fonts_of("Han", files)
    with pytest.raises(NoFont, match="no words for the script 'Klingon'"):
        fonts_of("Klingon", files)
    (tmp_path / "broken.ttf").write_bytes(b"no font")
    with pytest.raises(NoFont, match="no font for Latin: none of 1"):
        fonts_of("Latin", font_files([tmp_path]))
    with pytest.raises(ValueError, match="is no folder"):
        font_files([tmp_path / "none"])


@needs_font
def test_shaping_joins_arabic_letters(monkeypatch):
    if not features.check("raqm"):
        pytest.skip("this Pillow has no raqm")
    (file,) = [path for path in DEJAVU if path.name == "DejaVuSans.ttf"]
    assert fonts_of("Arabic", [file]) == [file]
    joined = lettering.font(file, 40).getlength("مكتبة", direction="rtl")
    apart = ImageFont.truetype(str(file), 40, layout_engine=ImageFont.Layout.BASIC).getlength("مكتبة")
    assert joined < 0.9 * apart  # letters in the middle of a word are narrower than those alone
    monkeypatch.setattr(features, "check", lambda name: False)
    with pytest.raises(NoFont, match="Arabic needs shaping, and this Pillow is built without raqm"):
        fonts_of("Arabic", [file])


def test_colours_stand_out():
    assert contrast((0, 0, 0), (255, 255, 255)) == pytest.approx(21)
    assert contrast((118, 118, 118), (255, 255, 255)) == pytest.approx(4.54, abs=0.01)  # a known pair
    for number in range(40):
        rng = generator(1, number)
        behind = np.full((4, 4, 3), rng.integers(0, 256, 3), np.float64)
        assert contrast(readable(rng, behind), behind[0, 0]) >= CONTRAST


def test_agreement_counts_words():
    assert agreement("Café für 12", "CAFE xx 12.") == pytest.approx(2 / 3)
    assert agreement("欢迎 光临", "欢迎光") == pytest.approx(3 / 4)
    assert agreement("tea tea", "tea") == pytest.approx(1 / 2)


def command_of(made, out, *more):
    fonts = str(made.fonts["Latin"][0].parent)
    size = ["--count", "6", "--part", "4", "--size", "96", "128"]
    return ["synthesize_text", *size, "--fonts", fonts, "--scripts", "Latin", "Greek", "--out", str(out), *more]


def tars_in(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.tar")}


@needs_font
def test_the_stage_goes_on_and_gives_shards_their_captions(tmp_path, made, capsys):
    out = tmp_path / "out"
    command = command_of(made, out)
    assert main(command) == 0
    first = tars_in(out)
    assert sorted(first) == ["000000.tar", "000001.tar"]
    (out / "000001.tar").unlink()  # killed before the last one
    assert main(command) == 0
    assert "6 images in Latin, Greek, 2 to draw" in capsys.readouterr().out
    assert tars_in(out) == first
    for other in (["--seed", "1"], ["--part", "5"]):
        with pytest.raises(ValueError, match=r"plan.json: of another count, part, seed"):
            main([*command, *other])
    records = [record for record, _ in synthesize_text.read_images(out, 4, 6)]
    assert [record["number"] for record in records] == list(range(6))
    assert [record["number"] for record, _ in synthesize_text.read_images(out, 4, 3)] == [0, 1, 2]
    found = list(tars_of(out, None, []))  # as `shards --tars` reads them
    assert [picture.caption for picture, _, _ in found] == [record["caption"] for record in records]
    manifest = json.loads((out / "manifest.json").read_text())
    assert (manifest["source"], manifest["ocr"]) == ("text_synthetic", "not measured")


@needs_font
def test_processes_draw_the_same_bytes_and_one_that_dies_is_said(tmp_path, made, monkeypatch):
    assert main(command_of(made, tmp_path / "here")) == 0
    assert main(command_of(made, tmp_path / "apart", "--workers", "2")) == 0
    assert tars_in(tmp_path / "apart") == tars_in(tmp_path / "here")
    monkeypatch.setattr(synthesize_text, "write_part", kill_this_process)
    with pytest.raises(Interrupted, match="a worker died; what is finished is kept, the same command goes on"):
        main(command_of(made, tmp_path / "killed", "--workers", "1"))


def kill_this_process(*_, **__):
    assert multiprocessing.parent_process() is not None
    os.kill(os.getpid(), signal.SIGKILL)
