"""What a diffusers user types works, or names our way; pipelines copy, pickle and print."""

from __future__ import annotations

import copy
import io
import pickle
import re
import sys

import numpy as np
import pytest
import torch

from lens import LensPipeline
from lens.engine import progress
from tests.small_pipeline import FOLDER, fresh, same_bits, shared

CALL = dict(prompt="a red apple", height=32, width=48, num_inference_steps=2, seed=1)


def test_torch_dtype_is_dtype():
    assert fresh(torch_dtype=torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="only one of dtype and torch_dtype"):
        fresh(torch_dtype=torch.bfloat16, dtype=torch.float32)


def test_to_moves_and_casts_and_returns_the_pipeline():
    pipe = fresh()
    assert pipe.to("cpu") is pipe
    before = pipe(**CALL, output_type="latent").images
    assert pipe.to(torch.bfloat16).dtype == torch.bfloat16
    assert {p.dtype for part in pipe.parts().values() for p in part.parameters()} == {torch.bfloat16}
    expected = fresh(dtype=torch.bfloat16)(**CALL, output_type="np").images
    assert np.array_equal(pipe(**CALL, output_type="np").images, expected)
    assert pipe.to("cpu", torch.float32)(**CALL, output_type="latent").images.shape == before.shape
    expected = pipe(**CALL, output_type="np").images
    for asked, message in (
        (torch.int8, r"dtype must be torch\.float32, torch\.bfloat16 or torch\.float64, got torch\.int8"),
        (torch.float16, "got torch.float16"),
        ("cuda:99", "device 'cuda:99': torch sees . usable GPUs"),
        ("meta", "device 'meta': holds no data"),
        ("x", "device 'x': Expected one of cpu"),
        ("mps", 'device \'mps\': expected "cpu", "cuda" or "cuda:N"'),
    ):
        with pytest.raises(ValueError, match=f"LensPipeline.to: {message}" if asked != torch.float16 else message):
            pipe.to(asked)
        if isinstance(asked, str):
            with pytest.raises(ValueError, match=f"LensPipeline.set_residency: {message}"):
                pipe.set_residency("lean", asked)
            with pytest.raises(ValueError, match=f"LensPipeline.from_pretrained: {message}"):
                fresh(device=asked)
    assert np.array_equal(pipe(**CALL, output_type="np").images, expected)


def test_images_as_tensors():
    planes, arrays = (shared()(**CALL, output_type=kind).images for kind in ("pt", "np"))
    assert planes.shape == (1, 3, 32, 48)
    assert np.array_equal(planes.permute(0, 2, 3, 1).numpy(), arrays)
    mixed = shared()(["a", "b"], sizes=[(32, 48), (32, 32)], num_inference_steps=1, output_type="pt").images
    assert [tuple(p.shape) for p in mixed] == [(3, 32, 48), (3, 32, 32)]


def test_parts_by_their_names():
    pipe = shared()
    assert pipe.vae is pipe.codec.vae
    assert list(pipe.components) == ["text_encoder", "transformer", "vae", "tokenizer", "scheduler"]
    assert pipe.tokenizer.pad_id >= 0


@pytest.mark.parametrize(
    ("name", "way"),
    [("enable_model_cpu_offload", "set_residency"), ("encode_prompt", "encode_text"), ("set_adapters", "load_lora")],
)
def test_other_names_say_ours(name, way):
    with pytest.raises(AttributeError, match=rf"LensPipeline has no '{name}'; .*{way}"):
        getattr(shared(), name)
    with pytest.raises(AttributeError, match=r"LensPipeline has no 'nonsense'$"):
        shared().nonsense  # noqa: B018


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("sigmas", "the schedule follows from num_inference_steps, the image's size and pipe.scheduler"),
        ("true_cfg_scale", "guidance_scale is the one guidance"),
        ("image", "images are drawn from text alone"),
        ("num_inference_step", "did you mean 'num_inference_steps'?"),
        ("qqq", "it has prompt, negative_prompt, height, width"),
    ],
)
def test_arguments_there_are_not_say_what_there_is(name, way):
    with pytest.raises(TypeError, match=re.escape(f"LensPipeline() has no argument {name!r}; {way}")):
        shared()(**CALL, **{name: [1.0, 0.5]})


def test_arguments_of_loading_there_are_not_say_what_there_is():
    with pytest.raises(TypeError, match="from_pretrained has no argument 'cache_dir'; set HF_HOME"):
        LensPipeline.from_pretrained(FOLDER, cache_dir="x")
    with pytest.raises(TypeError, match="load_lora_weights has no argument 'weight_name'; name the file itself"):
        shared().load_lora_weights("x", weight_name="y.safetensors")


def test_lora_by_diffusers_names(monkeypatch):
    asked = []
    monkeypatch.setattr(LensPipeline, "load_lora", lambda self, *a: asked.append(a))
    monkeypatch.setattr(LensPipeline, "unload_lora", lambda self: asked.append("out"))
    shared().load_lora_weights("x", 0.5)
    shared().unload_lora_weights()
    assert asked == [("x", 0.5), "out"]


def test_repr_is_one_line_about_the_model():
    pipe = fresh()
    assert repr(pipe) == (
        "LensPipeline(lens: 3 blocks of width 128, text encoder of width 64 with expanded experts; 20 steps, guidance 5; "
        "torch.float32, cpu)"
    )
    pipe.set_residency("balanced")
    assert "cpu, Residency(text_encoder='on_demand'" in repr(pipe)


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_a_copy_draws_the_same_and_shares_nothing(way):
    pipe = fresh()
    expected = pipe(**CALL, output_type="np").images
    other = copy.deepcopy(pipe) if way == "deepcopy" else pickle.loads(pickle.dumps(pipe))
    for part in pipe.parts().values():
        for p in part.parameters():
            p.data.zero_()
    assert same_bits(other(**CALL, output_type="np").images, expected)
    marker = dict(CALL, prompt="a <|end|> b")  # a state of the tokenizer that pickling loses
    assert same_bits(other.tokenize(marker["prompt"])[0], shared().tokenize(marker["prompt"])[0])


def test_a_pipeline_whose_parts_visit_says_why_it_does_not_copy():
    pipe = fresh(residency="lean")
    with pytest.raises(TypeError, match="text_encoder, transformer, vae on demand cannot be copied or pickled"):
        pickle.dumps(pipe)
    pipe.set_residency("resident")
    assert copy.deepcopy(pipe).placement is not pipe.placement


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_steps_are_counted_on_a_terminal_and_wiped(monkeypatch):
    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    pipe = LensPipeline.from_pretrained(FOLDER, variant="lens", device="cpu")
    pipe(**CALL)
    assert screen.getvalue() == ""  # done within two seconds, or silent until then
    monkeypatch.setattr(progress, "DELAY", -1.0)
    pipe(**dict(CALL, num_inference_steps=3))
    lines = screen.getvalue().split("\r\033[K")
    assert [line.split(",")[0] for line in lines] == ["", "drawing: step 1/3", "drawing: step 2/3", ""]
    screen.truncate(0)
    screen.seek(0)
    pipe.set_progress_bar_config(disable=True)
    pipe(**CALL)
    assert screen.getvalue() == ""
