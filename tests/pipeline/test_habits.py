"""What a diffusers user types works, or names our way; pipelines copy, pickle and print."""

from __future__ import annotations

import copy
import io
import pickle
import re
import sys
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lens import CheckpointError, LensPipeline
from lens.engine import progress
from lens.engine.residency import PRESETS
from lens.request import Request
from tests.small_pipeline import FOLDER, fresh, same_bits, shared

CALL = dict(prompt="a red apple", height=32, width=48, num_inference_steps=2, seed=1)


def test_torch_dtype_is_dtype():
    assert fresh(torch_dtype=torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="only one of dtype and torch_dtype"):
        fresh(torch_dtype=torch.bfloat16, dtype=torch.float32)


def test_a_single_file_is_the_transformer(tmp_path):
    (file,) = (FOLDER / "transformer").glob("*.safetensors")
    with pytest.raises(CheckpointError, match="a single file is taken as the transformer"):
        LensPipeline.from_single_file(file)
    parts = {part: FOLDER / part for part in ("text_encoder", "vae")}
    pipe = LensPipeline.from_single_file(file, "lens", "cpu", **parts)
    assert same_bits(pipe(**CALL, output_type="np").images, shared()(**CALL, output_type="np").images)


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
    [
        ("enable_model_cpu_offload", "set_residency"),
        ("encode_prompt", "encode_text"),
        ("set_adapters", "load_lora"),
        ("cuda", r"to\('cuda'"),
        ("compile", "compiled already"),
    ],
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


HUGE = 10**5000  # Python does not write it out


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: p(3), "prompt must be a string or a non-empty list of strings, got 3"),
        (lambda p: p("a", 64, 64), "negative_prompt must be a string or a non-empty list of strings, got 64"),
        (lambda p: p.encode_text(3), "prompt must be a string"),
        (lambda p: p("a", callback_on_step_end=3), "callback_on_step_end must be callable, got 3"),
        (lambda p: p("a", reason=3), "reason must be a lens.reasoner.Reasoner, got 3"),
        (lambda p: p("a", seed=True), "seed must be an int or one per picture (1), each of 64 bits, got True"),
        (lambda p: p.draw("a"), "request must be a lens.request.Request, got 'a'"),
        (lambda p: list(p.stream(["a"])), "request 0 of a queue must be a lens.request.Request, got 'a'"),
        (lambda p: list(p.stream([], seed=1)), "LensPipeline.stream has no argument 'seed'; of the text it takes"),
        (lambda p: list(p.stream([], max_tokens="x")), "max_tokens must be a positive integer, got 'x'"),
        (lambda p: p.to(where="cpu"), "LensPipeline.to has no argument 'where'"),
        (lambda p: p.load_lora("x", adapter_name="y"), "LensPipeline.load_lora has no argument 'adapter_name'; load_lora(path"),
        (lambda p: p.encode_text("x", device="cpu"), "LensPipeline.encode_text has no argument 'device'; it has prompts"),
        (lambda p: p.load_lora(3), "path must be a str or a path, got 3"),
        (lambda p: p.prepare(16, 10**6), "num_inference_steps must be at most 1000, got 1000000"),
        (lambda p: p.prepare(0, 4), "image_tokens must be a positive integer, got 0"),
        (lambda p: p.set_residency("lean", image_tokens="x"), "image_tokens must be a positive integer, got 'x'"),
        (lambda p: p.set_residency([]), "residency must be a Residency or one of"),
        (lambda p: p.tokenize("a", "x"), "max_sequence_length must be a positive integer, got 'x'"),
        (lambda p: LensPipeline.from_pretrained(None), "source must be a str or a path, got None"),
        (lambda p: LensPipeline.from_pretrained(FOLDER, vae=p.vae), "vae must be a str or a path, got AutoencoderKLFlux2("),
        (lambda p: LensPipeline.from_pretrained(FOLDER, variant=[]), "variant must be one of"),
        (lambda p: LensPipeline.from_pretrained(FOLDER, dtype="bfloat16"), "overflows in this model), got 'bfloat16'"),
        *((lambda p, name=name: p("a", **{name: HUGE}), "got an integer of 16610 bits") for name in
          ("chat_date", "seed", "output_type", "truncation", "solver", "guidance_scale", "num_inference_steps")),
        (lambda p: p("a", base_resolution=HUGE, aspect_ratio="1:1"), "got an integer of 16610 bits"),
        (lambda p: p("a", base_resolution=64, aspect_ratio="1" * 5000), "... (5002 characters)"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named_with_what_came(call, message):
    with pytest.raises((TypeError, ValueError), match=re.escape(message)) as raised:
        call(shared())
    assert len(str(raised.value)) < 600


def test_every_notice_is_at_the_callers_line(tmp_path):
    """Else Python, which shows a warning once for a line, would show the first alone and name a line of ours."""
    key = "transformer_blocks.0.attn.to_out.0"
    tensors = {f"{key}.lora_A.weight": torch.zeros(4, 128), f"{key}.lora_B.weight": torch.zeros(128, 4)}
    save_file(
        tensors,
        tmp_path / "style.safetensors",
        {"base_model": "another", "ss_network_alpha": "2", "ss_network_dim": "8"},
    )
    pipe, small = fresh(), dict(CALL, output_type="latent")
    calls = [
        lambda: pipe(**small, guidance_scale=0.5),
        lambda: pipe(**small, guidance_scale=1, negative_prompt="x"),
        lambda: pipe(**dict(small, prompt="a " * 600)),
        lambda: pipe(**dict(small, height=16)),
        lambda: pipe.encode_text("a " * 600),
        lambda: list(pipe.stream([Request("a " * 600, guidance_scale=0.5, size=(32, 32), num_inference_steps=1)])),
        lambda: pipe.load_lora(tmp_path / "style.safetensors"),
        lambda: LensPipeline.from_pretrained("mini", revision="x"),
        lambda: LensPipeline.from_pretrained(FOLDER, device="cpu"),
    ]
    for call in calls:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            call()
        assert told, "nothing is said"
        assert {(w.filename, w.lineno) for w in told} == {(__file__, call.__code__.co_firstlineno)}


def test_another_scheduler_is_refused_before_anything_is_drawn():
    pipe = fresh()
    pipe.scheduler = object()
    with pytest.raises(TypeError, match=r"pipe.scheduler must be a lens.sampler.Scheduler, got <object"):
        pipe(**CALL)


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
    pipe = fresh(residency=PRESETS["lean"])
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
