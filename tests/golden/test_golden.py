"""Every golden checkpoint beside this file: recorded outputs of the released code against ours, float32 on the CPU.

A golden checkpoint is a folder in the released layout with cases.json and expected.safetensors; drop another one in and
it is tested as well. The bfloat16 bounds are those of architecture.md: error of the whole model at most 1.1 times the
reference's own in every case and at most 1.0 times in the median over 16 seeds.
"""

from __future__ import annotations

import json
import statistics
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lens import LensConfig, LensPipeline
from lens.formats.released import load_transformer
from tests.reference_model import ReferenceLens, reference_sample, reference_sigmas, relative

ROOT = Path(__file__).parent
FOLDERS = sorted(p.parent.name for p in ROOT.glob("*/cases.json"))
PLAIN = {
    "prompt",
    "negative_prompt",
    "height",
    "width",
    "num_inference_steps",
    "guidance_scale",
    "num_images_per_prompt",
}


def cases(folder: str) -> dict:
    return json.loads((ROOT / folder / "cases.json").read_text(encoding="utf-8"))


def of(kind: str) -> list:
    return [
        pytest.param(folder, case, id=f"{folder}-{case['key']}")
        for folder in FOLDERS
        for case in cases(folder).get(kind, [])
    ]


@lru_cache(maxsize=1)
def expected(folder: str) -> dict[str, torch.Tensor]:
    return load_file(ROOT / folder / "expected.safetensors")


@lru_cache(maxsize=1)
def pipeline(folder: str) -> LensPipeline:
    return LensPipeline.from_pretrained(ROOT / folder, variant="lens", device="cpu", dtype=torch.float32)


@lru_cache(maxsize=2)
def reference(folder: str, dtype: torch.dtype = torch.float32) -> ReferenceLens:
    config = json.loads((ROOT / folder / "transformer" / "config.json").read_text())
    state = {}
    for path in (ROOT / folder / "transformer").glob("*.safetensors"):
        state.update(load_file(path))
    model = ReferenceLens(config)
    model.load_state_dict(state)
    return model.to(dtype).eval()


def transformer_inputs(folder: str, key: str) -> tuple:
    e = expected(folder)
    features = [e[f"{key}.feat{f}"] for f in range(sum(k.startswith(f"{key}.feat") for k in e))]
    return e[f"{key}.hidden_states"], features, e[f"{key}.mask"].bool(), e[f"{key}.timestep"]


def test_there_is_a_golden_checkpoint():
    assert FOLDERS


@pytest.mark.parametrize(("folder", "case"), of("transformer_cases"))
@torch.no_grad()
def test_transformer(folder, case):
    key, e = case["key"], expected(folder)
    hidden, features, mask, timestep = transformer_inputs(folder, key)
    grids = [(1, case["h"], case["w"])]
    ours = pipeline(folder).transformer(hidden, features, mask, timestep, grids)
    assert ours.dtype == torch.float32
    for b in range(len(hidden)):
        assert relative(ours[b], e[f"{key}.out"][b]) <= 1e-5
    blocks: list = []
    again = pipeline(folder).transformer(hidden, features, mask, timestep, grids, blocks_out=blocks)
    assert torch.equal(again, ours)  # recording the blocks computes the last text branch too; nothing reads it
    for layer, (image, text) in enumerate(blocks):
        if f"{key}.block{layer}.img" in e:
            assert relative(image, e[f"{key}.block{layer}.img"].flatten(0, 1)) <= 1e-5
            assert relative(text, e[f"{key}.block{layer}.txt"][mask]) <= 1e-5
    recorded = {int(k.split("block")[1].split(".")[0]) for k in e if k.startswith(f"{key}.block")}
    assert recorded <= set(range(len(blocks)))


@pytest.mark.parametrize(("folder", "case"), of("transformer_cases"))
@torch.no_grad()
def test_independent_model_meets_the_recording(folder, case):
    """The yardstick of the other tests, held to the recording itself."""
    key, e = case["key"], expected(folder)
    blocks: list = []
    out = reference(folder)(*transformer_inputs(folder, key), (case["h"], case["w"]), blocks)
    assert relative(out, e[f"{key}.out"]) <= 1e-5
    for layer, (image, text) in enumerate(blocks):
        if f"{key}.block{layer}.img" in e:
            assert relative(image, e[f"{key}.block{layer}.img"]) <= 1e-5
            assert relative(text, e[f"{key}.block{layer}.txt"]) <= 1e-5


@pytest.mark.parametrize("folder", FOLDERS)
def test_text(folder):
    recorded, e = cases(folder), expected(folder)
    if not recorded.get("prompts"):
        pytest.skip("this golden set records no text")
    prompts = recorded["prompts"]
    ids, mask = pipeline(folder).tokenize(prompts)
    expected_mask = e["text.attention_mask"].bool()
    assert torch.equal(mask, expected_mask)
    assert torch.equal(ids[mask], e["text.input_ids"][expected_mask])
    features, mask = pipeline(folder).encode_text(prompts)
    assert torch.equal(mask, expected_mask[:, 97:])
    assert len(features) == sum(k.startswith("text.feat") for k in e)
    for f, ours in enumerate(features):
        for b in range(len(prompts)):
            assert relative(ours[b][mask[b]], e[f"text.feat{f}"][b][mask[b]]) <= 1e-5
        assert not ours[~mask].any()


@pytest.mark.parametrize(("folder", "case"), of("pipeline_cases"))
def test_sigmas(folder, case):
    recorded = expected(folder)[f"{case['key']}.sigmas"]
    tokens = expected(folder)[f"{case['key']}.latents_in"].shape[1]
    ours = pipeline(folder).scheduler.sigmas(tokens, case["num_inference_steps"])
    torch.testing.assert_close(ours, recorded, rtol=0, atol=2e-7)
    torch.testing.assert_close(reference_sigmas(tokens, case["num_inference_steps"]), recorded, rtol=0, atol=2e-7)


@pytest.mark.parametrize(("folder", "case"), of("pipeline_cases"))
def test_latents_and_pictures(folder, case):
    e, key = expected(folder), case["key"]
    arguments = {k: v for k, v in case.items() if k != "key"}
    start = e[f"{key}.latents_in"]
    latents = pipeline(folder)(**arguments, latents=start, output_type="latent").images
    assert latents.dtype == torch.float32
    assert latents.shape == start.shape
    for ours, theirs in zip(latents, e[f"{key}.latents_out"], strict=True):
        assert relative(ours, theirs) <= 1e-4
    pictures = torch.from_numpy(pipeline(folder)(**arguments, latents=start, output_type="np").images)
    assert pictures.shape == e[f"{key}.image"].shape
    assert float((pictures - e[f"{key}.image"]).abs().max()) <= 2e-3


@pytest.mark.parametrize(("folder", "case"), of("pipeline_cases"))
def test_independent_sampler_meets_the_recording(folder, case):
    if set(case) - {"key"} != PLAIN:
        pytest.skip("the plain sampler knows only the basic arguments")
    pipe, e, key = pipeline(folder), expected(folder), case["key"]
    prompts = [case["prompt"]] if isinstance(case["prompt"], str) else case["prompt"]
    prompts = [p for p in prompts for _ in range(case["num_images_per_prompt"])]
    negatives = case["negative_prompt"]
    negatives = [negatives] * len(prompts) if isinstance(negatives, str) else negatives
    negative = pipe.encode_text(negatives) if any(n.strip() for n in negatives) else None
    latents = reference_sample(
        reference(folder),
        e[f"{key}.latents_in"],
        pipe.encode_text(prompts),
        negative,
        (case["height"] // 16, case["width"] // 16),
        case["num_inference_steps"],
        case["guidance_scale"],
    )
    assert relative(latents, e[f"{key}.latents_out"]) <= 1e-4


@lru_cache(maxsize=1)
def bf16_model(folder: str):
    return load_transformer(ROOT / folder / "transformer", torch.bfloat16, "cpu")


@pytest.mark.parametrize(
    ("folder", "case"),
    [p for p in of("transformer_cases") if f"{p.values[1]['key']}.out_bf16" in expected(p.values[0])],
)
@torch.no_grad()
def test_bf16_against_the_recorded_reference(folder, case):
    key, e = case["key"], expected(folder)
    ours = bf16_model(folder)(*transformer_inputs(folder, key), [(1, case["h"], case["w"])])
    assert ours.dtype == torch.bfloat16
    assert relative(ours, e[f"{key}.out"]) <= 1.1 * relative(e[f"{key}.out_bf16"], e[f"{key}.out"])


@pytest.mark.parametrize("folder", FOLDERS)
@torch.no_grad()
def test_bf16_over_seeds(folder):
    exact, rounded, ours = reference(folder), reference(folder, torch.bfloat16), bf16_model(folder)
    width, layers = ours.config.enc_hidden_dim, len(ours.config.selected_layer_index)
    ratios = []
    for seed in range(24):
        generator = torch.Generator().manual_seed(seed)
        h, w = (int(n) for n in torch.randint(3, 9, (2,), generator=generator))
        text = int(torch.randint(0, 24, (1,), generator=generator))
        hidden = torch.randn((1, h * w, ours.config.in_channels), generator=generator)
        features = [torch.randn((1, text, width), generator=generator) for _ in range(layers)]
        mask, time = torch.ones(1, text, dtype=torch.bool), torch.rand(1, generator=generator)
        truth = exact(hidden, features, mask, time, (h, w))
        theirs = relative(rounded(hidden, features, mask, time, (h, w)), truth)
        ratios.append(relative(ours(hidden, features, mask, time, [(1, h, w)]), truth) / theirs)
    assert max(ratios) <= 1.1, ratios
    assert statistics.median(ratios) <= 1.0, ratios


def test_tiny_is_the_shape_of_the_golden_checkpoint():
    assert load_transformer(ROOT / "dev" / "transformer", torch.float32, "cpu").config == LensConfig.tiny()
