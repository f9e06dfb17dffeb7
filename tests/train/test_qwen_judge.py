"""Qwen2.5-VL as the judge on this machine: the texts of transformers' own `generate`, soft scores from logits, refusals, cache."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tests.train import small_qwen
from tests.train.published_judges import options
from train.evaluate.published import command, drawing, judge_choice, longtext
from train.evaluate.published.chat_judges import ASK, READ
from train.evaluate.published.qwen_judge import QwenJudge

RNG = np.random.default_rng(0)
IMAGES = [RNG.integers(0, 256, size).astype(np.uint8) for size in ((80, 100, 3), (60, 60, 3), (140, 70, 3))]
QUESTIONS = ["a cat?", "is there a very large dog behind the cat?", "red?"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("qwen") / "small"
    small_qwen.save(path)
    return path


@pytest.fixture(scope="module")
def judge(folder):
    return QwenJudge(folder, soft=True)


def plain(folder, image, text):
    """Model and inputs of one call, put together by hand: the model of `from_pretrained`, nothing padded."""
    words = small_qwen.tokenizer()
    seen = Qwen2VLImageProcessorPil.from_pretrained(folder)(images=[Image.fromarray(image)], return_tensors="pt")
    places = "<|image_pad|>" * int(seen["image_grid_thw"].prod() // 4)
    chat = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        f"<|vision_start|>{places}<|vision_end|>{text}<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = words(chat, return_tensors="pt")
    kinds = (ids["input_ids"] == words.convert_tokens_to_ids("<|image_pad|>")).int()
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    return model, words, {**ids, **seen, "mm_token_type_ids": kinds}


def test_texts_are_those_of_transformers_own_generate(folder, judge):
    """With the folder's own settings, sampling at 1e-6 and all; in a batch with images of other sizes, padded."""
    found = judge.read(IMAGES, 12)
    for image, text in zip(IMAGES, found, strict=True):
        model, words, inputs = plain(folder, image, READ)
        torch.manual_seed(0)
        out = model.generate(**inputs, max_new_tokens=12)[0, inputs["input_ids"].shape[1] :]
        assert text == words.decode(out, skip_special_tokens=True)
    assert len(set(found)) > 1  # the image is seen
    assert judge.read(IMAGES[:1], 12) == found[:1]


def test_soft_scores_are_of_the_first_tokens_logits(folder, judge):
    found = judge.answer(IMAGES[0], QUESTIONS)
    for question, said in zip(QUESTIONS, found, strict=True):
        model, words, inputs = plain(folder, IMAGES[0], ASK.format(question))
        with torch.no_grad():
            chances = model(**inputs).logits[0, -1].double().softmax(-1)
        yes, no = (
            sum(chances[words.convert_tokens_to_ids(token)] for token in pair) for pair in (("Yes", "ĠYes"), ("No", "ĠNo"))
        )  # fmt: skip
        assert said.soft == pytest.approx(float(yes / (yes + no)), abs=1e-5)
        assert not said.yes
    assert len({round(said.soft, 3) for said in found}) == 3
    assert all(said.soft is None for said in QwenJudge(folder).answer(IMAGES[0], QUESTIONS[:1]))


def test_only_yes_is_yes(judge, monkeypatch):
    monkeypatch.setattr(
        judge, "generated", lambda calls, limit: [("Yes" if "cat" in t else "Yes.", 0.5) for _, t in calls]
    )
    assert [said.yes for said in judge.answer(IMAGES[0], ["a cat?", "a dog?"])] == [True, False]


def test_a_call_that_fails_takes_no_other_with_it(judge):
    found = judge.read([IMAGES[0], np.zeros((2, 500, 3), np.uint8), IMAGES[1]], 4)
    assert "aspect ratio" in str(found[1])
    assert [found[0], found[2]] == judge.read(IMAGES[:2], 4)


def test_answers_are_kept_by_content(folder, tmp_path, monkeypatch):
    one = QwenJudge(folder, cache=tmp_path)
    texts, asked = one.read(IMAGES[:2], 4), []
    monkeypatch.setattr(
        QwenJudge, "generated", lambda self, calls, limit: [asked.append(limit) or ("new", 0.5) for _ in calls]
    )
    again = QwenJudge(folder, cache=tmp_path)
    assert again.read(IMAGES[:3], 4) == [*texts, "new"]
    assert asked == [4]
    again.read(IMAGES[:1], 5)  # another limit is another question
    assert asked == [4, 5]
    soft = QwenJudge(folder, soft=True, cache=tmp_path)
    soft.answer(IMAGES[0], ["a cat?"])
    again.soft = True
    (tmp_path / "x").mkdir()
    assert again.answer(IMAGES[0], ["a cat?"])[0].soft == 0.5
    assert len(asked) == 3


def test_who_judged_is_on_the_card(folder, judge):
    assert judge.card.judge == "Qwen2.5-VL small"
    assert judge.card.revision == f"local {judge.weights}"
    assert (judge.card.dtype, judge.card.device) == ("float32, TF32 off", "cpu")
    assert "Qwen2.5-VL-7B-Instruct, 2 layers of width 32 here" in judge.card.differs
    assert "published in bfloat16, float32 here" in judge.card.differs
    other = QwenJudge(folder, dtype="bfloat16")
    assert "float32" not in str(other.card) + other.card.differs


def changed(folder, path, edit):
    shutil.copytree(folder, path)
    edit(path)
    return path


def without(*keys):
    def edit(path):
        tensors = load_file(path / "model.safetensors")
        save_file({k: v for k, v in tensors.items() if k not in keys}, path / "model.safetensors", {"format": "pt"})

    return edit


def narrower(path):
    tensors = load_file(path / "model.safetensors")
    name = next(k for k in tensors if k.endswith("blocks.0.mlp.up_proj.weight"))
    tensors[name] = tensors[name][1:].contiguous()
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


def rewritten(name, **values):
    def edit(path):
        file = path / name
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))

    return edit


def bare(path):
    (path / "chat_template.jinja").unlink()
    (path / "chat_template.json").unlink()


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda path: (path / "config.json").unlink(), r"config.json: not found; --judge-model takes a folder"),
        (rewritten("config.json", model_type="llava"), "config.json: expected model_type 'qwen2_5_vl', got 'llava'"),
        (rewritten("config.json", image_token_id=3), r"config.json: image_token_id 3, but <\|image_pad\|> is"),
        (lambda path: (path / "model.safetensors").unlink(), "no .safetensors file"),
        (without("lm_head.weight"), "1 keys missing, first 'lm_head.weight'"),
        (narrower, r"blocks.0.mlp.up_proj.weight must have shape \[24, 16\], got \[23, 16\]"),
        (lambda path: (path / "preprocessor_config.json").unlink(), "cannot be loaded .*preprocessor_config"),
        (bare, "no chat template, neither in tokenizer_config.json nor in chat_template.json"),
    ],
)
def test_a_folder_that_is_not_one_is_refused(folder, tmp_path, edit, words):
    with pytest.raises(ValueError, match=words):
        QwenJudge(changed(folder, tmp_path / "other", edit))


def test_the_template_beside_the_tokenizer_serves(folder, tmp_path, judge):
    other = QwenJudge(changed(folder, tmp_path / "other", lambda path: (path / "chat_template.jinja").unlink()))
    assert other.read(IMAGES[:1], 6) == judge.read(IMAGES[:1], 6)


def test_tied_words_are_no_missing_key(tmp_path):
    small_qwen.save(tmp_path, tied=True)
    assert len(QwenJudge(tmp_path).read(IMAGES[:1], 4)) == 1


def test_the_command_reads_with_a_folder(folder, tmp_path):
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt_id": 0, "prompt": "a sign", "text": ["Tea"]}))
    drawing.write_image(IMAGES[0], tmp_path / "images" / "0_0.png")
    given = options(
        images=tmp_path / "images", out=tmp_path / "out", prompts=tmp_path / "p.jsonl", rapidocr=False, soft=False,
        judge_url=None, judge_model=str(folder), judge_dtype=None, max_calls=None,
    )  # fmt: skip
    longtext.TOKENS, before = 6, longtext.TOKENS
    try:
        assert command.run(longtext.LongText(), given) == 0
    finally:
        longtext.TOKENS = before
    (column,) = json.loads((tmp_path / "out" / "scores.json").read_text())["columns"]
    assert column["judges"][0]["judge"] == "Qwen2.5-VL small"
    assert (column["judged"], column["missing"]) == (1, 0)
    with pytest.raises(ValueError, match="--max-calls bounds calls to a server"):
        judge_choice.judge_of(options(judge_url=None, judge_model=str(folder), max_calls=3), tmp_path)
