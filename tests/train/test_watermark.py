"""The watermark judge: stamps and decoys with exact labels, the loss by hand, a resumed training, the file, what ships."""

import io
import json
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.train.captioned_photographs import photographs
from train import configs, watermark
from train.data import stamps
from train.data.curation.classifiers import Models
from train.data.curation.watermark import ASSET, SIDE, STRIDE, MarkNet, Marks, Shape, loss, pixels, write
from train.data.small_world.photographs import PLACES
from train.data.stamps import HELD_OUT_PLACES, STYLES, UNSEEN, VISIBLE, Pen, Pictures
from train.watermark import Example, TrainMarks, calibrated, measured, pair

RECIPE = {k: v for k, v in vars(configs.load("mini", "watermark")).items() if k.isupper()}
PLAIN = Pen()  # Pillow's own font, which is everywhere


@pytest.fixture(scope="module")
def judge():
    return Marks.load()


@pytest.fixture(scope="module")
def grounds():
    held = Pictures(77, PLAIN, held_out=True)
    return [held.ground(number) for number in range(12)]


def recipe(**changes):
    made = ModuleType("small")
    made.__dict__.update(
        {**RECIPE, "GROUNDS": 3, "PAIRS": 2, "WIDTHS": (4, 4, 4, 4), "AUTOCAST": False, "STEPS": 3, **changes}
    )
    return made


@pytest.fixture
def plain_fonts(monkeypatch):
    monkeypatch.setattr(watermark, "pen_of", lambda folders, held_out: PLAIN)


# ------------------------------------------------------------------------------------------------ stamps


@pytest.mark.parametrize("style", STYLES)
def test_a_stamp_is_where_its_label_says_lets_the_picture_through_and_can_be_seen(grounds, style):
    for number, ground in enumerate(grounds):
        made, covered, said = stamps.stamped(ground, stamps.generator(3, style, number), PLAIN, [style])
        again, _, _ = stamps.stamped(ground, stamps.generator(3, style, number), PLAIN, [style])
        assert said == style
        assert np.array_equal(made, again)
        assert made.shape == ground.shape
        assert 0 < covered.mean() < 0.6
        change = np.abs(made.astype(int) - ground).mean(2)
        assert change[covered].mean() > 0.5 * VISIBLE  # a shadow before it may take some back
        reach = np.array(Image.fromarray(covered).convert("L").resize((64, 64), Image.Resampling.BOX)) > 0
        away = np.array(Image.fromarray(change.astype(np.float32)).resize((64, 64), Image.Resampling.BOX))
        near = np.pad(reach, 2)
        grown = np.any([near[i : i + 64, j : j + 64] for i in range(5) for j in range(5)], axis=0)
        assert away[~grown].max(initial=0) < 1  # beyond the label nothing changes


def test_a_stamp_is_never_more_opaque_than_its_limit():
    """Over black and over white, what stays of their difference is what the stamp lets through."""
    for number in range(40):
        black, white = (
            stamps.stamped(np.full((200, 240, 3), v, np.uint8), np.random.default_rng(number), PLAIN, ["across"])[0]
            for v in (0, 255)
        )
        # the colours may differ where one would not be seen: then both changed towards each other
        assert (white.astype(int) - black).min() > 255 * (1 - 2 * stamps.OPAQUE)


def test_decoys_change_the_picture_and_stay_none(grounds):
    changed = 0
    for number, ground in enumerate(grounds):
        rng = np.random.default_rng(number)
        changed += not np.array_equal(stamps.decoyed(ground, rng, PLAIN), ground)
        one, other = pair(ground, np.random.default_rng(number), PLAIN, STYLES, 1.0)
        assert (one.style, one.covered.max(), one.decoyed, other.decoyed) == (None, 0, True, True)
        assert other.style in STYLES
        assert other.covered.max() == 1
        assert one.seen.shape == (SIDE, SIDE, 3)
    assert changed == len(grounds)


def test_what_is_held_out_is_never_drawn_on_in_a_training():
    train, held = Pictures(1, PLAIN), Pictures(1, PLAIN, held_out=True)
    assert not {*train.photographs} & {*held.photographs}
    assert {path.name.rpartition("_")[0] for path in held.photographs} == set(HELD_OUT_PLACES) < set(PLACES)
    assert set(UNSEEN) < set(STYLES)
    with pytest.raises(ValueError, match="stamp 'ribbon': expected one of corner, across"):
        stamps.stamped(np.zeros((64, 64, 3), np.uint8), np.random.default_rng(0), PLAIN, ["ribbon"])


def test_no_font_is_named(tmp_path):
    with pytest.raises(ValueError, match="no font for Latin"):
        stamps.pen_of([tmp_path], held_out=False)


# ------------------------------------------------------------------------------------------------ training


def test_loss_by_hand():
    whole, cells = torch.tensor([0.0, 2.0]), torch.zeros(2, 2, 2)
    cells[1] = 1.0
    covered = torch.tensor([[[0.0, 0.0], [0.0, 0.0]], [[1.0, 0.0], [0.0, 0.0]]])
    found = loss((whole, cells), torch.tensor([0.0, 1.0]), covered)
    log = np.log
    pictures = log(2), log(1 + np.exp(-2))
    places = log(2), (3 * log(1 + np.exp(-1)) + 3 * log(1 + np.exp(1))) / 4  # one covered cell counts as three
    assert np.allclose(found["loss"], [p + 2 * c for p, c in zip(pictures, places)], atol=1e-6)
    assert float(found["picture"]) == pytest.approx(np.mean(pictures), abs=1e-6)
    assert float(found["cells"]) == pytest.approx(np.mean(places), abs=1e-6)


def test_a_resumed_training_is_the_same_to_the_bit(tmp_path, monkeypatch, plain_fonts):
    monkeypatch.setattr(watermark.configs, "load", lambda name, stage: recipe())
    from train.__main__ import main

    def weights(out):
        method = TrainMarks(recipe(), [])
        trainer = watermark.Trainer(method.plan(3), method, watermark.StateFile(out / "watermark.pt"), out)
        trainer.resume(out / "watermark.pt")
        assert trainer.step == 3
        return method.net.state_dict()

    real = watermark.TrainMarks.batches
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(["watermark", "--out", str(whole)]) == 0

    def torn_off(self, step):
        for at, batch in enumerate(real(self, step)):
            if at == 2:
                raise KeyboardInterrupt
            yield batch

    monkeypatch.setattr(watermark.TrainMarks, "batches", torn_off)
    monkeypatch.setattr(watermark.configs, "load", lambda name, stage: recipe(SAVE_EVERY=1))
    with pytest.raises(KeyboardInterrupt):
        main(["watermark", "--out", str(parts)])
    monkeypatch.setattr(watermark.TrainMarks, "batches", real)
    assert main(["watermark", "--out", str(parts)]) == 0
    one, other = weights(whole), weights(parts)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_calibration_gives_the_lowest_threshold_of_a_precision(plain_fonts, monkeypatch):
    """Judged by one pixel: the threshold lies between the last that may be called stamped and the next."""
    config = recipe(CALIBRATION=4, LEAST_PRECISION=0.75)
    logits = np.array([0.0, 4.0, 3.0, 2.0, -1.0, 1.0, -2.0, -3.0])  # of pairs: as it is, stamped
    monkeypatch.setattr(watermark, "scored", lambda judge, made: logits)
    # stamped: 4, 2, 1, -3. Falling: 4 s, 3, 2 s, 1 s, 0, -1, -2, -3 s: precision .75 down to 1, never again
    assert calibrated(config, [], None) == pytest.approx(0.5)
    config.LEAST_PRECISION = 1.0
    assert calibrated(config, [], None) == pytest.approx(3.5)
    monkeypatch.setattr(watermark, "scored", lambda judge, made: -np.tile([0.0, 1.0], 4))
    with pytest.raises(ValueError, match=r"no threshold has a precision of 1\.0; expected a longer training"):
        calibrated(config, [], None)


def test_figures_count_what_is_called_stamped(monkeypatch):
    seen, cells = np.zeros((SIDE, SIDE, 3), np.uint8), np.zeros((16, 16), np.float32)
    examples = [Example(seen, cells, style, decoyed) for style, decoyed in
                ((None, False), ("corner", False), (None, True), ("seal", True), ("corner", True))]  # fmt: skip
    monkeypatch.setattr(watermark, "scored", lambda judge, made: np.array([-9.0, 1.0, 1.0, -1.0, -2.0]))
    found = measured(None, examples)
    assert (found["recall"], found["precision"], found["false_positives"]) == (0.3333, 0.5, 0.5)
    assert found["false_positives_with_decoys"] == 1
    assert found["at"]["0.2"] == {"recall": 0.6667, "false_positives": 0.5}  # -1.39
    assert found["at"]["0.1"] == {"recall": 1, "false_positives": 0.5}  # -2.20
    assert (found["recall_of"]["corner"], found["recall_of"]["seal"]) == (0.5, 0)


# ------------------------------------------------------------------------------------------------ the file


def test_a_written_judge_reads_back_and_a_file_that_does_not_fit_is_refused(tmp_path):
    torch.manual_seed(0)
    net, path = MarkNet(Shape((4, 4, 4, 4))).eval(), tmp_path / "w.safetensors"
    write(path, net, {"step": 1})
    assert json.loads(path.with_suffix(".json").read_text()) == {"step": 1}
    again = Marks.load(path)
    x = pixels(torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, SIDE, SIDE, 3)).astype(np.uint8)))
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(net(x), again.net(x)))
        with pytest.raises(ValueError, match=r"x must be \[B, 3, 256, 256\], got \[2, 3, 128, 256\]"):
            net(x[:, :, :128])
    assert net(x)[1].shape == (2, SIDE // STRIDE, SIDE // STRIDE)
    own, header = load_file(path), {"widths": "[4, 4, 4, 4]"}
    faults = {
        "missing": ({k: v for k, v in own.items() if k != "cell.weight"}, header, r"cell\.weight must be .*, got None"),
        "more": ({**own, "extra": torch.zeros(1)}, header, "extra must be None, got"),
        "shape": ({**own, "whole.weight": torch.zeros(1, 2)}, header, r"whole\.weight must be .*\[1, 3\].*, got .*\[1, 2\]"),
        "other": (own, {}, "its header names no widths"),
    }  # fmt: skip
    for name, (tensors_, about, why) in faults.items():
        save_file(tensors_, tmp_path / f"{name}.safetensors", metadata=about)
        with pytest.raises(ValueError, match=rf"{name}\.safetensors: {why}"):
            Marks.load(tmp_path / f"{name}.safetensors")
    (tmp_path / "half.safetensors").write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"half\.safetensors: not a safetensors file that can be read"):
        Marks.load(tmp_path / "half.safetensors")
    with pytest.raises(FileNotFoundError, match="train watermark"):
        Marks.load(tmp_path / "gone.safetensors")


# ------------------------------------------------------------------------------------------------ what ships


def test_the_asset_is_small_and_is_the_default(judge):
    assert ASSET.stat().st_size <= 300_000
    assert judge.by.startswith("lens-watermark@")
    assert judge.by.endswith(" float32")
    assert Models().load("watermark").by == judge.by
    with pytest.raises(ValueError, match="--nsfw lens-watermark: expected a model for nsfw"):
        Models(nsfw="lens-watermark").load("nsfw")


def test_a_score_does_not_depend_on_its_neighbours(judge, grounds):
    batch = np.stack([judge.prepare(Image.fromarray(ground)) for ground in grounds[:3]])
    whole = judge.head(judge.backbone(batch))
    assert ((whole >= 0) & (whole <= 1)).all()
    assert judge.head(judge.backbone(batch[1:2]))[0] == whole[1]


def test_no_photograph_is_taken_for_stamped_and_plain_marks_are_found(judge, grounds):
    """It is a careful judge: of lines across and tiled lettering it misses some, of photographs it takes none."""
    own = [Image.open(io.BytesIO(data)).convert("RGB") for data in photographs().values()]
    clean = np.stack([judge.prepare(image) for image in [*own, *map(Image.fromarray, grounds)]])
    assert (judge.head(judge.backbone(clean)) > 0.5).sum() == 0
    found = {}
    for style in ("crossed", "tiled"):
        made = [
            stamps.stamped(ground, stamps.generator(5, style, i), PLAIN, [style])[0] for i, ground in enumerate(grounds)
        ]
        batch = np.stack([judge.prepare(Image.fromarray(one)) for one in made])
        found[style] = int((judge.head(judge.backbone(batch)) > 0.5).sum())
    assert found["crossed"] >= 9, found  # of 12
    assert found["tiled"] >= 3, found
