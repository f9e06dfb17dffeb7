"""GenEval: its prompts byte for byte, its rule on constructed detections, five languages, resume, missing judgements."""

import argparse
import hashlib
import json
import re
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lens.chat_client import ChatError
from tests.train.published_judges import CARD, Paints, Sees, options
from train.evaluate import benchmarks, mini_bench
from train.evaluate.published import command, drawing, geneval, geneval_languages, geneval_prompts, judging, models
from train.evaluate.published.judging import Card, Column, Figure
from train.evaluate.published.models import Found
from train.loop.clock import Interrupted


def entry(tag):
    return next(e for e in geneval_prompts.entries() if e["tag"] == tag)


def test_the_prompts_are_the_published_file():
    made = geneval_prompts.content()
    # the SHA-256 of evaluation_metadata.jsonl at commit af4902f, and of object_names.txt
    assert hashlib.sha256(made).hexdigest() == "5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13"
    names = "".join(f"{name}\n" for name in geneval_prompts.NAMES).encode()
    assert hashlib.sha256(names).hexdigest() == "608f6a0e5c8ca1c7a92b818430141fe268c85b7930b50f4160f1d65893b5bacd"
    counts = {tag: sum(e["tag"] == tag for e in geneval_prompts.entries()) for tag in geneval_prompts.TASKS}
    assert list(counts.values()) == [80, 99, 80, 94, 100, 100]


def test_another_generator_is_refused(monkeypatch):
    monkeypatch.setattr(geneval_prompts, "SEED", 44)
    with pytest.raises(RuntimeError, match="draws other prompts"):
        geneval_prompts.entries.__wrapped__()


@pytest.mark.parametrize(
    ("tag", "said"),
    [
        ("counting", {
            "zh": "一张照片，画面中有两个时钟", "fr": "une photo de deux horloges",
            "ja": "二個の時計の写真", "es": "una foto de dos relojes",
        }),
        ("position", {
            "zh": "一张照片，画面中一只狗在一只泰迪熊的右边", "fr": "une photo d'un chien à droite d'un ours en peluche",
            "ja": "テディベアの右にいる犬の写真", "es": "una foto de un perro a la derecha de un oso de peluche",
        }),
        ("color_attr", {
            "zh": "一张照片，画面中有一个紫色的红酒杯和一个黑色的苹果", "fr": "une photo d'un verre à vin violet et d'une pomme noire",
            "ja": "紫色のワイングラスと黒いりんごの写真", "es": "una foto de una copa de vino morada y una manzana negra",
        }),
    ],
)  # fmt: skip
def test_prompts_in_five_languages_by_hand(tag, said):
    for language, text in {**said, "en": entry(tag)["prompt"]}.items():
        assert geneval_languages.prompt(entry(tag), language) == text


def test_every_prompt_is_said_in_every_language():
    scripts = {"zh": "[\u4e00-\u9fff]", "ja": "[\u3040-\u30ff\u4e00-\u9fff]"}
    for language in ("zh", "ja", "fr", "es"):
        texts = [geneval_languages.prompt(e, language) for e in geneval_prompts.entries()]
        assert len(set(texts)) == 553  # no two objects share a name
        own = re.compile(scripts.get(language, "[a-zà-ÿœ]"))
        assert all(own.search(t) and "{" not in t for t in texts)
        assert not any(re.search("[A-Za-z]", t) for t in texts if language in scripts)
    with pytest.raises(ValueError, match="expected one of en, zh"):
        geneval_languages.prompt(entry("colors"), "de")
    table = geneval_languages.table()
    assert set(table["names"]) == set(geneval_prompts.NAMES)
    assert set(table["colours"]) == set(geneval_prompts.COLOURS)
    assert {g for n in table["names"].values() for g in (n["fr"][1], n["es"][1])} == {"m", "f"}


def test_a_changed_table_is_refused(monkeypatch, tmp_path):
    (tmp_path / "t.json").write_text("{}")
    monkeypatch.setattr(geneval_languages, "TABLE", tmp_path / "t.json")
    with pytest.raises(ValueError, match="its words were changed"):
        geneval_languages.table.__wrapped__()


# ------------------------------------------------------------------------------------------------ the rule


IMAGE = np.full((100, 100, 3), 0, np.uint8)
IMAGE[:, :50, 0] = 200  # red on the left
IMAGE[:, 50:, 2] = 200  # blue on the right


def right(given, *found):
    return geneval.judged(given, IMAGE, found, Paints()).right


def ask(tag, *include, exclude=()):
    return {"tag": tag, "include": list(include), "exclude": list(exclude), "prompt": "p"}


CAT, DOG = {"class": "cat", "count": 1}, {"class": "dog", "count": 1}
LEFT, RIGHT = (0, 40, 20, 60), (70, 40, 90, 60)


def test_confidence_is_compared_in_float32():
    single = ask("single_object", CAT)
    assert not right(single, Found("cat", 0.3, LEFT))
    assert not right(single, Found("cat", 0.30000001, LEFT))  # the same float32 as 0.3
    assert right(single, Found("cat", 0.3000001, LEFT))
    counting = ask("counting", {"class": "cat", "count": 1}, exclude=[{"class": "cat", "count": 2}])
    assert not right(counting, Found("cat", 0.9, LEFT))
    assert right(counting, Found("cat", 0.91, LEFT), Found("cat", 0.89, RIGHT))


def test_counting_means_exactly_n():
    two = ask("counting", {"class": "cat", "count": 2}, exclude=[{"class": "cat", "count": 3}])
    cats = [Found("cat", 0.95, (k, 0, k + 5, 5)) for k in range(3)]
    assert not right(two, *cats[:1])
    assert right(two, *cats[:2])
    assert not right(two, *cats)
    # no suppression: a second box upon the first counts
    assert right(two, cats[0], cats[0])


def test_colours_are_of_the_most_confident_box_and_ties_go_to_the_later():
    red = ask("colors", {**CAT, "color": "red"})
    assert right(red, Found("cat", 0.9, LEFT), Found("cat", 0.8, RIGHT))
    assert not right(red, Found("cat", 0.8, LEFT), Found("cat", 0.9, RIGHT))
    assert not right(red, Found("cat", 0.9, LEFT), Found("cat", 0.9, RIGHT))
    assert right(red, Found("cat", 0.9, RIGHT), Found("cat", 0.9, LEFT))
    painter = Paints()
    geneval.judged(red, IMAGE, [Found("cat", 0.9, LEFT), Found("cat", 0.8, RIGHT), Found("dog", 0.9, LEFT)], painter)
    assert painter.asked == [("cat", 1)]  # nobody else's colour is asked for
    geneval.judged(red, IMAGE, [Found("dog", 0.9, LEFT)], painter)
    assert len(painter.asked) == 1


def test_relations_are_of_the_shrunk_offset():
    right_of = ask("position", CAT, {**DOG, "position": ["right of", 0]})
    above = ask("position", CAT, {**DOG, "position": ["above", 0]})
    assert right(right_of, Found("cat", 0.9, LEFT), Found("dog", 0.9, RIGHT))
    assert not right(right_of, Found("dog", 0.9, LEFT), Found("cat", 0.9, RIGHT))
    # offset (8, -20), sizes 20 + 20: shrunk by 4 to (4, -16), over |(8, -20)| = 21.54: -0.743 is above, 0.186 is not right of
    box = (8, 20, 28, 40)
    assert right(above, Found("cat", 0.9, (0, 40, 20, 60)), Found("dog", 0.9, box))
    assert not right(right_of, Found("cat", 0.9, (0, 40, 20, 60)), Found("dog", 0.9, box))
    # offset (4, 0): shrunk to nothing, no relation holds
    assert not right(right_of, Found("cat", 0.9, LEFT), Found("dog", 0.9, (4, 40, 24, 60)))


def test_presence_is_soft_by_hand():
    both = ask("two_object", CAT, DOG)
    found = [Found("cat", 0.2, LEFT), Found("cat", 0.7, RIGHT), Found("tv", 0.9, LEFT)]
    assert geneval.presence(both, found) == pytest.approx((0.7 + 0.0) / 2)  # below a threshold counts as well
    two = ask("counting", {"class": "cat", "count": 2}, exclude=[{"class": "cat", "count": 3}])
    assert geneval.presence(two, found) == pytest.approx(0.2)
    assert geneval.presence(two, [*found, Found("cat", 0.15, LEFT)]) == pytest.approx(0.2 * (1 - 0.15))
    assert geneval.presence(two, found[1:]) == 0.0


def test_what_is_outside_of_a_mask_is_grey():
    mask = np.zeros((100, 100), bool)
    mask[40:60, :10] = True
    crop = np.asarray(models.crop_of(IMAGE, Found("cat", 0.9, LEFT, mask)))
    assert crop.shape == (20, 20, 3)
    assert (crop[:, :10] == (200, 0, 0)).all()
    assert (crop[:, 10:] == 153).all()
    with pytest.raises(ValueError, match="mask"):
        models.crop_of(IMAGE, Found("cat", 0.9, LEFT, mask[:50]))


# ------------------------------------------------------------------------------------------------ the judges' own arithmetic


def test_instances_by_hand():
    """Two queries, one class and "nothing": query 0 is a square of logits 4 in its lower left, query 1 is empty."""
    classes = torch.tensor([[3.0, 0.0], [2.0, 0.0]])
    masks = torch.full((2, 4, 4), -4.0)
    masks[0, 2:, :2] = 4.0
    (label, score, mask), *rest = models.instances(classes, masks, (16, 16), (16, 16))
    assert (label, rest) == (0, [])
    box = models.box_of(mask.numpy())
    assert box == (0.0, 8.0, 8.0, 16.0)
    quality = score / torch.tensor([3.0, 0.0]).softmax(0)[0].item()
    assert 0.5 < quality < torch.sigmoid(torch.tensor(4.0)).item() + 1e-6
    # the padded right half of an input is no part of the image: the square then fills the image's width
    (_, _, mask), *_ = models.instances(classes, masks, (16, 8), (16, 8))
    assert mask[-1].all()


def test_boxes_end_one_pixel_beyond():
    mask = np.zeros((5, 7), bool)
    mask[1, 2] = mask[3, 5] = True
    assert models.box_of(mask) == (2.0, 1.0, 6.0, 4.0)


def test_zero_shot_is_the_nearest_mean_direction():
    texts = torch.tensor(
        [[[2.0, 0.0], [0.0, 8.0]], [[0.0, 1.0], [0.0, 3.0]]]
    )  # the first class points to (1, 1), not to (1, 4)
    images = torch.tensor([[1.0, 0.9], [0.1, 1.0], [5.0, 4.0]])
    assert models.zero_shot(images, texts).tolist() == [0, 1, 0]
    assert models.colour_texts("cat")[0] == [
        "a photo of a red cat",
        "a photo of a red-colored cat",
        "a photo of a red object",
    ]


def test_labels_of_either_spelling_are_genevals():
    old = {
        "motorcycle": "motorbike",
        "couch": "sofa",
        "tv": "tvmonitor",
        "computer mouse": "mouse",
        "tv remote": "remote",
    }
    labels = {
        k: {**old, "computer keyboard": "keyboard"}.get(name, name) for k, name in enumerate(geneval_prompts.NAMES)
    }
    assert models.named_labels(labels, "m") == dict(enumerate(geneval_prompts.NAMES))
    del labels[5]
    with pytest.raises(ValueError, match="judge m: knows no bus; expected COCO's 80 classes"):
        models.named_labels(labels, "m")


@pytest.mark.nightly
def test_both_judges_run_on_random_weights(tmp_path):
    """Real classes of transformers at small shapes: what they are given and what is read out of them fits."""
    from transformers import CLIPConfig, CLIPModel, Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    swin = SwinConfig(
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 1, 1],
        window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    small = {
        "feature_size": 32,
        "mask_feature_size": 32,
        "hidden_dim": 32,
        "encoder_feedforward_dim": 16,
        "dim_feedforward": 16,
    }
    config = Mask2FormerConfig(
        backbone_config=swin,
        **small,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        num_queries=5,
        num_labels=80,
    )
    config.id2label = dict(enumerate(geneval_prompts.NAMES))
    torch.manual_seed(0)
    Mask2FormerForUniversalSegmentation(config).save_pretrained(tmp_path / "m2f")
    detector = models.Mask2Former(str(tmp_path / "m2f"))
    detector.SHORT, detector.LONG = 64, 96
    image = np.random.default_rng(0).integers(0, 256, (40, 56, 3)).astype(np.uint8)
    x, valid = detector.prepared(image)
    assert (x.shape, valid) == ((1, 3, 64, 96), (64, 90))
    found = detector.detect(image)
    again = detector.detect(image)
    assert [(f.kind, f.score, f.box) for f in found] == [(f.kind, f.score, f.box) for f in again]
    assert {f.mask.shape for f in found} <= {(40, 56)}
    assert all(f.kind in geneval_prompts.NAMES and 0 <= f.score <= 1 and f.mask.any() for f in found)
    assert detector.card.revision == "local"
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    CLIPModel(
        CLIPConfig(text_config=text, vision_config={**text, "image_size": 32, "patch_size": 16}, projection_dim=8)
    ).save_pretrained(tmp_path / "clip")
    with pytest.raises(ValueError, match="cannot be loaded"):  # the processor's files are missing
        models.Clip(str(tmp_path / "clip"))


def test_tf32_is_off_inside_alone():
    torch.backends.cudnn.allow_tf32, before = True, torch.backends.cudnn.allow_tf32
    with models.exact_matmul():
        assert not torch.backends.cudnn.allow_tf32
        assert not torch.backends.cuda.matmul.allow_tf32
    assert torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = before


def test_the_detector_must_see_the_shipped_photographs():
    names = {drawing.read_image(p).tobytes(): p.stem for p in geneval.SHOWN.glob("*.webp")}
    assert set(names.values()) == {"cat", "cup", "person"}

    def sees(image):
        return [Found(names[image.tobytes()], 0.8, LEFT)] if image.tobytes() in names else []

    geneval.expect_sight(Sees(sees))
    with pytest.raises(ValueError, match=r"sees dog 0.99 in cat.webp, which shows a cat: not fit"):
        geneval.expect_sight(Sees(lambda image: [Found("dog", 0.99, LEFT)]))
    with pytest.raises(ValueError, match="in plain grey"):
        geneval.expect_sight(Sees(lambda image: sees(image) or [Found("tv", 0.95, LEFT)]))


# ------------------------------------------------------------------------------------------------ numbers


def test_shares_and_their_intervals_by_hand():
    # four prompts of two images, 5 of 8 right; deviations from 5/8 of the sums 2, 2, 1, 0: .75, .75, -.25, -1.25
    groups = [[1.0, 1.0], [1.0, 1.0], [1.0, 0.0], [0.0, 0.0]]
    figure = judging.share([*groups, []])
    error = np.sqrt(4 / 3 * (0.75**2 + 0.75**2 + 0.25**2 + 1.25**2)) / 8
    of = 0.625 * 0.375 / error**2
    z = 1.96
    half = z * np.sqrt(0.625 * 0.375 / of + z * z / (4 * of * of)) / (1 + z * z / of)
    middle = (0.625 + z * z / (2 * of)) / (1 + z * z / of)
    assert (figure.value, figure.of) == (0.625, 4)
    assert (figure.low, figure.high) == pytest.approx((middle - half, middle + half))
    # all right: Wilson's at the number of prompts, not of images
    assert judging.share([[1.0] * 4] * 10).low == pytest.approx(10 / (10 + z * z))
    assert judging.share([[], []]).value is None
    both = judging.averaged([Figure(0.5, 0.3, 0.7), Figure(0.9, 0.8, 0.94)])
    assert both.value == pytest.approx(0.7)
    assert both.low == pytest.approx(0.7 - np.hypot(0.2, 0.1) / 2)
    assert both.high == pytest.approx(0.7 + np.hypot(0.2, 0.04) / 2)
    assert judging.averaged([Figure(0.5), Figure(None, note="why")]).note == "why"


def test_progress_is_told_now_and_then(monkeypatch):
    now, lines = [0.0], []
    monkeypatch.setattr(judging.time, "monotonic", lambda: now[0])
    progress = judging.Progress("text", 8, lines.append)
    for seconds in (4.0, 8.0, 12.0, 16.0, 24.0):
        now[0] = seconds
        progress()
    assert lines == ["text: 3 of 8 prompts judged, 20 s left", "text: 5 of 8 prompts judged, 14 s left"]


def test_the_total_is_the_mean_of_six_tasks():
    column = Column("c", [CARD])
    verdicts = {task: [[1.0, 0.0]] * (k + 1) for k, task in enumerate(geneval_prompts.TASKS)}
    verdicts["counting"] = [[1.0, 1.0]]
    geneval.summarised(column, verdicts)
    assert column.figures["total"].value == pytest.approx((5 * 0.5 + 1) / 6)
    assert column.figures["any of 4"].value == 1.0
    assert column.figures["all images"].value == pytest.approx((18 * 1 + 2) / (2 * 19))
    geneval.summarised(part := Column("c", [CARD]), {"counting": [[1.0]]})
    assert part.figures["total"].note == "not all six tasks"


def test_scores_of_different_judges_are_refused():
    other = Card("stand-in", "2", "float32", "cpu")
    judging.expect_same_judges([Column("a", [CARD]), Column("b", [CARD])])
    with pytest.raises(ValueError, match=r"a was judged by stand-in, revision 1.*b by stand-in, revision 2"):
        judging.expect_same_judges([Column("a", [CARD]), Column("b", [other])])


# ------------------------------------------------------------------------------------------------ the command


def painted(prompt, seed):
    """An image that says its prompt: the detector below reads the first pixel."""
    found = np.zeros((16, 16, 3), np.uint8)
    found[0, 0] = (sum(map(ord, prompt)) % 251, seed % 251, 7)
    return found


def fake_model(drawn, stop_after=None):
    def draw(prompts, seeds):
        if stop_after is not None and len(drawn) >= stop_after:
            raise KeyboardInterrupt
        drawn.extend(zip(prompts, seeds))
        return [painted(p, s) for p, s in zip(prompts, seeds)]

    return drawing.Model("fake", {"weights": "w", "size": [16, 16]}, 5, draw)


def test_images_are_drawn_once_and_gone_on_with(tmp_path):
    asks = command.limited(geneval.Geneval().asks(options(), "en"), 1)
    assert [(a.id, a.seeds) for a in asks[:2]] == [("00000", (42, 43, 44, 45)), ("00080", (42, 43, 44, 45))]
    drawn: list = []
    with pytest.raises(KeyboardInterrupt):
        drawing.drawn(fake_model(drawn, 10), asks, tmp_path, lambda _: None)
    assert len(drawn) == 10
    assert drawing.drawn(fake_model(drawn), asks, tmp_path, lambda _: None) == 14
    assert len(set(drawn)) == len(drawn) == 24
    assert drawing.drawn(fake_model(drawn), asks, tmp_path, lambda _: None) == 0
    assert (tmp_path / "00179" / "samples" / "0003.png").is_file()
    other = fake_model([])
    other.settings["weights"] = "v"
    with pytest.raises(ValueError, match="weights 'w', now 'v'"):
        drawing.drawn(other, asks, tmp_path, lambda _: None)


def folder_of_images(tmp_path, asks):
    for a in asks:
        for file, seed in zip(a.files, a.seeds):
            drawing.write_image(painted(a.prompt, seed), tmp_path / file)


def seeing_all(image):
    return [Found(name, 0.95, LEFT) for name in geneval_prompts.NAMES]


def test_a_folder_is_scored_and_a_page_written(tmp_path, capsys):
    bench = geneval.Geneval(Sees(seeing_all), Paints())
    asks = command.limited(bench.asks(options(), "en"), 2)
    folder_of_images(tmp_path / "images", asks)
    given = options(images=tmp_path / "images", out=tmp_path / "out", limit=2)
    assert command.run(bench, given) == 0
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())["columns"][0]
    # every object is there once, in one place, black: single and two objects right, counts and relations wrong
    expected = {
        "single_object": 1.0,
        "two_object": 1.0,
        "counting": 0.0,
        "colors": 0.0,
        "position": 0.0,
        "color_attr": 0.0,
    }
    assert {task: scores["figures"][task]["value"] for task in expected} == expected
    assert scores["figures"]["total"]["value"] == pytest.approx(2 / 6)
    # 0.95 of each object; of two, three or four of a kind one alone is there
    single = [
        len(entry["include"]) for a in asks if (entry := geneval_prompts.entries()[int(a.id)])["tag"] != "counting"
    ]
    assert scores["figures"]["presence, soft"]["value"] == pytest.approx(0.95 * len(single) / len(asks))
    assert scores["judges"][0]["judge"] == "stand-in"
    page = (tmp_path / "out" / "index.html").read_text()
    assert "Lens (20-step), paper" in page
    assert "0.930" in page
    assert "stand-in, revision 1, float32, cpu" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "out" / "rows_images.jsonl").read_text().splitlines()]
    assert len(rows) == 12
    assert rows[0]["images"][0]["right"] is True
    assert (tmp_path / "out" / "sheet_images_counting.png").is_file()


def test_failed_judgements_are_missing_and_too_many_end_the_run(tmp_path):
    asks = command.limited(geneval.Geneval().asks(options(), "en"), 4)
    folder_of_images(tmp_path / "images", asks)
    count = 0

    def failing(every):
        def found(image):
            nonlocal count
            count += 1
            if count % every == 0:
                raise RuntimeError("out of memory")
            return seeing_all(image)

        return Sees(found)

    few = geneval.Geneval(failing(40), Paints())
    assert command.run(few, options(images=tmp_path / "images", out=tmp_path / "few", limit=4)) == 0
    column = json.loads((tmp_path / "few" / "scores.json").read_text())["columns"][0]
    assert (column["missing"], column["judged"]) == (2, 96)
    assert column["figures"]["single_object"]["value"] == 1.0  # not less for what is missing
    count = 0
    many = failing(4)
    assert (
        command.run(
            geneval.Geneval(many, Paints()), options(images=tmp_path / "images", out=tmp_path / "many", limit=4)
        )
        == 1
    )
    column = json.loads((tmp_path / "many" / "scores.json").read_text())["columns"][0]
    assert column["figures"]["total"]["value"] is None
    assert many.calls < 40  # it stops where no total can come of it


def test_images_beyond_four_of_a_prompt_are_all_counted(tmp_path):
    """2 % of all images fail, which is more than 5 % of four a prompt; an early end is no total, whatever the shares."""
    asks = command.limited(geneval.Geneval().asks(options(), "en"), 4)
    for a in asks[:-1]:
        for n in range(12):
            drawing.write_image(painted(a.prompt, n), tmp_path / a.id / "samples" / f"{n:04d}.png")
    calls = 0

    def failing(image):
        nonlocal calls
        calls += 1
        if calls % 50 == 0:
            raise RuntimeError("out of memory")
        return seeing_all(image)

    column = geneval.Geneval(Sees(failing), Paints()).score(options(), asks, tmp_path, "c", "en")
    assert (len(column.rows), column.judged) == (24, 24 * 12)
    assert column.missing == 12 + 23 * 12 // 50  # a prompt without images counts as many as the others have
    stopped = judging.Count(1000, 100, 4, stopped=True)
    assert not stopped.complete
    column.counts = {"images": stopped}
    assert command.closed(column).figures["total"].note == (
        "no total: images: 4 of 100 judgements missing, the rest not made"
    )


def test_an_image_that_is_none_does_not_end_the_run(tmp_path):
    """Neither of a contact sheet, nor one that claims more pixels than Pillow opens."""
    bench = geneval.Geneval(Sees(seeing_all), Paints())
    asks = command.limited(bench.asks(options(), "en"), 4)
    folder_of_images(tmp_path / "images", asks)
    header = struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", b""), (b"IEND", b"")]
    raw = b"".join(struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    (tmp_path / "images" / asks[0].files[0]).write_bytes(b"\x89PNG\r\n\x1a\n" + raw)
    (tmp_path / "images" / asks[1].files[0]).write_bytes(b"<html>")
    with pytest.raises(ValueError, match=r"0000.png: not an image \(Image size"):
        drawing.read_image(tmp_path / "images" / asks[0].files[0])
    assert command.run(bench, options(images=tmp_path / "images", out=tmp_path / "out", limit=4)) == 0
    assert json.loads((tmp_path / "out" / "scores.json").read_text())["columns"][0]["missing"] == 2
    assert np.array_equal(
        command.first_image(asks[1], tmp_path / "images"), drawing.read_image(tmp_path / "images" / asks[1].files[1])
    )


def no_judge(*_):
    raise AssertionError("loaded a judge")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"images": "nowhere"}, "--images nowhere: no such folder"),
        ({"images": ".", "steps": 4}, "--steps has nothing to draw"),
        ({"images": ".", "guidance": 3.0}, "--guidance has nothing to draw"),
        ({"images": ".", "size": (64, 64)}, "--size has nothing to draw"),
        ({"model": "mini", "reasoner": "mini", "reasoner_prompt": "text"}, "--reasoner mini reads no system prompt"),
        ({"model": "mini", "reasoner": "mini", "reasoner_model": "m"}, "--reasoner mini does not read it"),
        ({"model": "mini", "reasoner_model": "m"}, "--reasoner none does not read it"),
    ],
)
def test_an_option_that_would_not_be_read_is_refused(monkeypatch, given, message):
    monkeypatch.setattr(geneval, "Mask2Former", no_judge)
    folder = {"images": Path(given["images"])} if "images" in given else {}
    with pytest.raises(ValueError, match=message):
        command.run(geneval.Geneval(), options(**{**given, **folder}, detector="d", clip="c"))


def test_what_a_reasoner_will_take(capsys):
    given = options(
        model="a/Lens", dry_run=True, language=["en", "zh"], reasoner="http://x/v1", reasoner_model="m", gpu_price=1.0
    )
    assert command.run(geneval.Geneval(), given) == 0
    text = capsys.readouterr().out
    assert re.search(r"images +8,848\n", text)  # two languages, with and without
    assert re.search(r"detector +8,848 judgements\n", text)
    assert re.search(r"reasoner +1,\d{3} rewrites, [\d.]+ and [\d.]+ million tokens", text)
    assert re.search(r"money +[\d.]+ USD, without the reasoner's", text)


def test_a_server_that_cannot_be_asked_is_one_line(monkeypatch):

    def spent(_):
        raise ChatError("budget", "--max-calls 3 are spent")

    monkeypatch.setattr(geneval, "run", spent)
    parser = argparse.ArgumentParser()
    benchmarks.add_arguments(parser)
    with pytest.raises(Interrupted, match="evaluate geneval: --max-calls 3 are spent"):
        benchmarks.run(parser.parse_args(["geneval", "--model", "mini"]))
    assert parser.parse_args(["mini_bench", "--model", "mini"]).run_benchmark is mini_bench.run


def test_a_judge_there_is_not_ends_the_run_before_anything_is_drawn(tmp_path, monkeypatch):
    def missing(source, device):
        raise ValueError(f"judge {source}: cannot be loaded")

    monkeypatch.setattr(geneval, "Mask2Former", missing)
    given = options(model="no such model either", out=tmp_path / "out", detector="nowhere", clip="nowhere")
    with pytest.raises(ValueError, match="judge nowhere: cannot be loaded"):
        command.run(geneval.Geneval(), given)
    assert not (tmp_path / "out").exists()


def test_images_that_are_no_images_or_of_other_prompts(tmp_path):
    bench = geneval.Geneval(Sees(seeing_all), Paints())
    asks = command.limited(bench.asks(options(), "en"), 1)
    folder_of_images(tmp_path, asks)
    (tmp_path / asks[0].files[0]).write_bytes(b"<html>")
    column = bench.score(options(), asks, tmp_path, "c", "en")
    assert column.missing == 1
    assert "not an image" in column.rows[0]["images"][0]["reasons"][0]
    (tmp_path / asks[1].id / "metadata.jsonl").write_text(json.dumps(geneval_prompts.entries()[0]))
    with pytest.raises(ValueError, match=r"metadata.jsonl: of another prompt"):
        bench.score(options(), asks, tmp_path, "c", "en")


def test_what_a_run_will_take():
    bench, given = geneval.Geneval(), options(model="a/Lens", dry_run=True, gpu_price=2.0)
    text = command.dry_run(bench, given, {"en": bench.asks(given, "en")})
    assert re.search(r"images +2,212", text)
    assert re.search(r"detector +2,212 judgements", text)
    assert "1024x1024" in text
    hours = float(re.search(r"drawing +([\d.]+) hours", text)[1])
    flops = float(re.search(r"FLOPs an image +([\d.]+)", text)[1])
    assert hours == pytest.approx(2212 * flops * 1e12 / (0.4 * 989.5e12) / 3600, rel=0.01)
    assert re.search(rf"money +{2 * hours:.1f}", text)


def test_a_real_pipeline_draws_and_goes_on(tmp_path):
    """Lens-Mini, one step: sizes and seeds reach it, prompts of different lengths go together, each image is its own."""
    given = options(model="mini", steps=1, size=(64, 80))
    model = drawing.model_of(given)
    assert model.settings["guidance"] > 1
    assert model.settings["size"] == [64, 80]
    asks = [
        replace(a, files=a.files[:2], seeds=a.seeds[:2])
        for a in command.limited(geneval.Geneval().asks(given, "en"), 1)[:2]
    ]
    assert drawing.drawn(model, asks, tmp_path, lambda _: None) == 4
    images = [drawing.read_image(tmp_path / file) for a in asks for file in a.files]
    assert {i.shape for i in images} == {(64, 80, 3)}
    assert len({i.tobytes() for i in images}) == 4
    # alone, an image is what it was in its batch
    (alone,) = model.draw([asks[1].drawn], [asks[1].seeds[1]])
    assert np.array_equal(alone, images[3])
    assert drawing.drawn(model, asks, tmp_path, lambda _: None) == 0
