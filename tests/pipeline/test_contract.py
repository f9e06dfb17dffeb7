"""The public contract of a call: arguments, defaults, order, seeds, callbacks, outputs, refusals."""

from __future__ import annotations

import inspect
import json
import math
import threading
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from lens import LensPipeline, LensPipelineOutput, pipeline, sampler, vae
from lens.config import Defaults
from lens.engine.overlap import HostThread
from lens.sampler import Scheduler
from tests.reference_model import relative
from tests.small_pipeline import FOLDER, counted, fresh, same_bits, shared

A, B = "a red apple", "three cats under a green tree"
TWO = dict(num_inference_steps=2, height=32, width=48)
LATENT = dict(TWO, output_type="latent")


def draw(*args, **kwargs):
    return shared()(*args, **{**LATENT, **kwargs}).images


def test_signature_is_the_published_one():
    call = inspect.signature(LensPipeline.__call__).parameters
    assert {name: p.default for name, p in call.items() if name != "self"} == {
        "prompt": None, "negative_prompt": "", "height": None, "width": None, "base_resolution": None,
        "aspect_ratio": None, "sizes": None, "num_inference_steps": None, "guidance_scale": None,
        "num_images_per_prompt": 1, "seed": None, "generator": None, "latents": None, "prompt_embeds": None,
        "prompt_mask": None, "negative_prompt_embeds": None, "negative_prompt_mask": None, "max_sequence_length": 512,
        "truncation": "reference", "output_type": "pil", "return_dict": True, "callback_on_step_end": None,
        "callback_on_step_end_tensor_inputs": ("latents",), "chat_date": "2026-05-23", "solver": "euler",
        "reason": None,
    }  # fmt: skip
    load = inspect.signature(LensPipeline.from_pretrained).parameters
    expected = {"source": "mini", "variant": None, "device": None, "dtype": None, "residency": None}
    expected["torch_dtype"] = None  # dtype by diffusers' name
    expected |= dict.fromkeys(
        ("transformer", "text_encoder", "vae", "tokenizer", "weights_variant", "revision", "encoder", "memory")
    )
    assert {n: p.default for n, p in load.items()} == expected


# ---------------------------------------------------------------------------------------------- defaults, variants


@pytest.mark.parametrize(("variant", "steps", "guidance"), [("lens", 20, 5.0), ("turbo", 4, 1.0), ("base", 50, 5.0)])
def test_variant_sets_steps_and_guidance(variant, steps, guidance):
    pipe, calls = fresh(variant=variant), []
    pipe.defaults = Defaults.choose(variant, {"base_resolution": 64}, "")
    pipe(A, callback_on_step_end=lambda p, i, t, k: calls.append(k["latents"].shape) or {}, output_type="latent")
    assert len(calls) == steps
    assert calls[0] == (1, 16, 128)  # the base, square
    with counted(pipe.transformer, "denoise") as forwards:
        pipe(A, num_inference_steps=1)
    assert forwards[0][0][3].batch_size == (1 if guidance == 1.0 else 2)


def test_default_size_is_the_released_base():
    assert (Defaults("lens", 20, 5.0).base_resolution, Defaults("lens", 20, 5.0).max_resolution) == (1024, 1440)
    assert shared().defaults == Defaults("lens", 20, 5.0)


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("microsoft/Lens", "lens"), ("microsoft/Lens-Turbo", "turbo"), ("someone/lens_base_bf16", "base"),
        ("LensTurbo", "turbo"), ("my-lens", "lens"), ("Lens-3.8B-4bit", "lens"), ("BASE", "base"),
    ],
)  # fmt: skip
def test_variant_from_the_name(name, variant, recwarn):
    assert Defaults.choose(None, None, name).variant == variant
    assert not recwarn.list


@pytest.mark.parametrize("name", ["database", "checkpoint-7", "turbocharged", "lenses", ""])
def test_variant_unknown_is_lens_with_a_notice(name):
    with pytest.warns(UserWarning, match="nothing tells which Lens"):
        assert Defaults.choose(None, None, name) == Defaults("lens", 20, 5.0)


def test_variant_order_caller_metadata_name(recwarn):
    metadata = {"variant": "base", "num_inference_steps": 7, "guidance_scale": 2.5, "base_resolution": 64}
    assert Defaults.choose(None, metadata, "Lens-Turbo") == Defaults("base", 7, 2.5, 64)
    assert Defaults.choose("base", metadata, "Lens-Turbo") == Defaults("base", 7, 2.5, 64)
    assert Defaults.choose("turbo", metadata, "Lens") == Defaults("turbo", 4, 1.0, 64)  # the numbers were base's
    assert Defaults.choose(None, {"base_resolution": 96}, "Lens-Turbo") == Defaults("turbo", 4, 1.0, 96)
    assert not recwarn.list
    with pytest.raises(ValueError, match=r"variant must be one of.*weights_variant"):
        Defaults.choose("fast", metadata, "Lens")


@pytest.mark.parametrize(
    "entry",
    [
        {"variant": "fast"}, {"num_inference_steps": 0}, {"num_inference_steps": "4"}, {"guidance_scale": -1},
        {"base_resolution": 64.0}, {"time_dtype": "half"}, ["lens"],
    ],
)  # fmt: skip
def test_wrong_metadata_is_named(entry):
    with pytest.raises(ValueError, match=r"model_index.json: (lens\.\w+|'lens') must be"):
        Defaults.choose(None, entry, "Lens")


# ---------------------------------------------------------------------------------------------- order, seeds, noise


def test_order_is_prompt_major_and_seeds_count_up():
    out = shared()([A, B], num_images_per_prompt=2, seed=10, **LATENT)
    assert out.seeds == [10, 11, 12, 13]
    for k, prompt in enumerate([A, A, B, B]):
        assert torch.equal(out.images[k], draw(prompt, seed=10 + k)[0])


def test_seed_is_the_published_noise():
    """Picture k starts from torch.randn(1, I, 128) of its own CPU generator."""
    noise = [torch.randn((1, 6, 128), generator=torch.Generator("cpu").manual_seed(s)) for s in (3, 4)]
    assert torch.equal(draw([A, B], seed=3), draw([A, B], latents=torch.cat(noise)))
    assert torch.equal(draw([A, B], seed=[4, 3])[1:], draw(B, seed=3))


def test_seed_none_is_drawn_and_reported():
    first, second = shared()([A, B], **LATENT), shared()([A, B], **LATENT)
    assert first.seeds[1] == first.seeds[0] + 1
    assert first.seeds != second.seeds
    assert torch.equal(draw([A, B], seed=first.seeds), first.images)
    assert torch.equal(draw([A, B], seed=first.seeds[0]), first.images)


def test_numpy_and_large_seeds():
    assert torch.equal(draw(A, seed=np.int64(7)), draw(A, seed=7))
    assert shared()(A, seed=2**63 - 1, **LATENT).seeds == [2**63 - 1]


def test_numpy_counts():
    two = draw(A, seed=7, num_images_per_prompt=np.int64(2), num_inference_steps=np.int32(2))
    assert torch.equal(two, draw(A, seed=7, num_images_per_prompt=2))


def test_generators():
    def generators(*seeds):
        return [torch.Generator().manual_seed(s) for s in seeds]

    out = shared()([A, B], generator=generators(5, 6), **LATENT)
    assert out.seeds == [None, None]
    assert torch.equal(out.images, draw([A, B], seed=5))
    one = generators(9)[0]
    whole = torch.randn((2, 6, 128), generator=generators(9)[0])
    assert torch.equal(draw([A, B], generator=one), draw([A, B], latents=whole))
    shared_noise = generators(5)[0]
    again = shared()([A, A], generator=[shared_noise, shared_noise], **LATENT).images
    assert not torch.equal(again[0], again[1])  # one generator twice is consumed twice


def test_no_global_randomness():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    shared()(A, **LATENT)
    assert torch.equal(torch.get_rng_state(), before)


SEED = torch.Generator()
CLASHES = [
    (dict(seed=1, latents=torch.zeros(1, 6, 128)), "exclude each other"),
    (dict(seed=1, generator=SEED), "exclude each other"),
    (dict(generator=SEED, latents=torch.zeros(1, 6, 128)), "exclude each other"),
    (dict(seed=[1, 2]), r"seed must be an int or one per picture \(1\)"),
    (dict(seed=1.5), "seed must be an int"),
    (dict(seed="7"), "seed must be an int"),
    (dict(seed=2**64), "64 bits"),
    (dict(generator=[SEED, SEED]), r"one per picture \(1\), got 2"),
    (dict(latents=torch.zeros(1, 5, 128)), r"shapes \[I, C\] = \[\(6, 128\)\], got \[\(5, 128\)\]"),
    (dict(latents=torch.zeros(2, 6, 128)), "latents must be 1 tensors"),
    (dict(latents=torch.full((1, 6, 128), math.nan)), "latents holds NaN"),
    (dict(latents=torch.full((1, 6, 128), math.inf)), "latents holds NaN or infinity"),
    (dict(width=None), "height and width must be given together"),
    (dict(height=None, width=None, base_resolution=64), "base_resolution and aspect_ratio must be given together"),
    (dict(height=None, width=None, aspect_ratio="1:1"), "base_resolution and aspect_ratio must be given together"),
    (dict(base_resolution=64, aspect_ratio="1:1"), "give only one of sizes"),
    (dict(sizes=[(32, 32)]), "give only one of sizes"),
    (dict(height=None, width=None, sizes=[(32, 32), (32, 48)]), r"one \(height, width\) per prompt \(1\)"),
    (dict(height=None, width=None, sizes=[32, 32]), r"one \(height, width\) per prompt \(1\)"),
    (dict(height=33), "height must be a positive multiple of 16 pixels, got 33"),
    (dict(height=0), "height must be a positive multiple of 16"),
    (dict(width=-16), "width must be a positive multiple of 16"),
    (dict(width=32.0), "width must be a positive multiple of 16"),
    (dict(prompt=None), "exactly one of prompt and prompt_embeds"),
    (dict(prompt_embeds=[torch.zeros(1, 3, 64)] * 4), "exactly one of prompt and prompt_embeds"),
    (dict(prompt=[]), "non-empty list of strings"),
    (dict(prompt=[A, 3]), "non-empty list of strings"),
    (dict(negative_prompt=["x", "y"]), r"one string or one per prompt \(1\), got 2"),
    (dict(negative_prompt=[]), "negative_prompt must be a string or a non-empty list"),
    (dict(negative_prompt=["x", "y"], guidance_scale=1.0), r"one string or one per prompt \(1\), got 2"),
    (dict(negative_prompt="x", negative_prompt_embeds=[torch.zeros(1, 3, 64)] * 4), "only one of negative_prompt and"),
    (dict(prompt_mask=torch.ones(1, 3)), "prompt_mask belongs to prompt_embeds"),
    (dict(negative_prompt_mask=torch.ones(1, 3)), "negative_prompt_mask belongs to negative_prompt_embeds"),
    (dict(negative_prompt_embeds=[torch.zeros(1, 3, 64)] * 3), "must be a list of F = 4 tensors .* got 3 tensors"),
    (dict(negative_prompt_embeds=[torch.zeros(2, 3, 64)] * 4), r"one prompt or one per prompt \(1\), got 2"),
    (dict(prompt=None, prompt_embeds=torch.zeros(1, 3, 64)), "got one tensor"),
    (dict(prompt=None, prompt_embeds=[]), "must be a list of F tensors"),
    (dict(prompt=None, prompt_embeds=[torch.zeros(0, 3, 64)] * 4), "with B >= 1"),
    (dict(prompt=None, prompt_embeds=[torch.zeros(1, 3, 63)] * 4), r"\[B, T, E\] = \[1, 3, 64\], got \[1, 3, 63\]"),
    (dict(prompt=None, prompt_embeds=[torch.full((1, 3, 64), math.nan)] * 4), r"prompt_embeds\[0\] holds NaN"),
    (dict(prompt=None, prompt_embeds=[torch.zeros(1, 3, 64)] * 4, prompt_mask=torch.ones(1, 4)), r"must be \[B, T\]"),
    (dict(num_inference_steps=0), "num_inference_steps must be a positive integer"),
    (dict(num_inference_steps=2.0), "num_inference_steps must be a positive integer"),
    (dict(num_images_per_prompt=0), "num_images_per_prompt must be a positive integer"),
    (dict(guidance_scale=-0.1), "guidance_scale must be a finite number"),
    (dict(guidance_scale=math.nan), "guidance_scale must be a finite number"),
    (dict(guidance_scale=math.inf), "guidance_scale must be a finite number"),
    (dict(output_type="jpeg"), "output_type must be one of"),
    (dict(truncation="left"), "truncation must be one of"),
    (dict(max_sequence_length=0), "max_sequence_length must be a positive integer"),
    (dict(chat_date="23.5.2026"), 'chat_date must be "YYYY-MM-DD" or None'),
    (dict(callback_on_step_end_tensor_inputs=("latent",)), "callback_on_step_end_tensor_inputs must be among"),
    (dict(callback_on_step_end_tensor_inputs=None), "callback_on_step_end_tensor_inputs must be among"),
    (dict(latents=np.zeros((1, 6, 128), np.float32)), "latents must hold floating-point tensors, got ndarray"),
    (dict(latents=torch.zeros(1, 6, 128).cfloat()), r"latents must hold floating-point tensors, got torch\.complex64"),
    (dict(latents=3), "latents must hold floating-point tensors, got int"),
    (dict(generator=5), "generator must be one torch.Generator or one per picture"),
    (dict(generator=[1]), "generator must be one torch.Generator or one per picture"),
    (dict(prompt=None, prompt_embeds=[np.zeros((1, 3, 64))] * 4), "prompt_embeds must hold floating-point tensors"),
    (dict(prompt=None, prompt_embeds=[None] * 4), "prompt_embeds must hold floating-point tensors, got NoneType"),
    (dict(prompt=None, prompt_embeds=[torch.zeros(1, 3, 64)] * 4, prompt_mask=[[True] * 3]), "got list"),
    (dict(chat_date=5), 'chat_date must be "YYYY-MM-DD" or None, got 5'),
    (dict(guidance_scale="strong"), "guidance_scale must be a finite number"),
    (dict(height=None, width=None, sizes=[([], 48)]), "height must be a positive multiple of 16 pixels"),
    (dict(num_images_per_prompt=True), "num_images_per_prompt must be a positive integer"),
]


@pytest.mark.parametrize(("change", "message"), CLASHES, ids=[f"{i}-{'-'.join(c)}" for i, (c, _) in enumerate(CLASHES)])
def test_refusals(change, message):
    with counted(shared().transformer, "denoise") as calls, pytest.raises(ValueError, match=message):
        shared()(**{"prompt": A, **LATENT, **change})
    assert not calls


def test_one_generator_cannot_draw_mixed_sizes():
    with pytest.raises(ValueError, match=r"one generator draws .* pass one per picture"):
        shared()([A, B], sizes=[(32, 32), (32, 48)], generator=torch.Generator(), num_inference_steps=1)


# ---------------------------------------------------------------------------------------------- sizes, outputs


def test_sizes_one_per_prompt_and_output_types():
    sizes = [(32, 48), (64, 32), (32, 48)]
    pipe = shared()
    arguments = dict(sizes=sizes, seed=1, num_inference_steps=2, guidance_scale=1.0, num_images_per_prompt=2)
    latents = pipe([A, B, A], output_type="latent", **arguments).images
    assert [tuple(x.shape) for x in latents] == [(6, 128), (6, 128), (8, 128), (8, 128), (6, 128), (6, 128)]
    arrays = pipe([A, B, A], output_type="np", **arguments).images
    assert isinstance(arrays, list)
    assert [a.shape for a in arrays] == [(h, w, 3) for h, w in sizes for _ in range(2)]
    pictures = pipe([A, B, A], **arguments).images
    assert [p.size for p in pictures] == [(w, h) for h, w in sizes for _ in range(2)]
    for picture, array, rows, k in zip(pictures, arrays, latents, range(6), strict=True):
        assert array.dtype == np.float32
        assert array.min() >= 0
        assert array.max() <= 1
        decoded = pipe.codec.decode(rows, tuple(n // 16 for n in sizes[k // 2]))
        assert np.array_equal(array, vae.to_numpy(decoded))
        assert isinstance(picture, Image.Image)
        # truncated, not rounded
        assert np.array_equal(np.asarray(picture), ((decoded + 1).numpy() * np.float32(127.5)).astype(np.uint8))
    transposed = pipe([A, B], sizes=[(32, 48), (48, 32)], output_type="latent", num_inference_steps=1).images
    assert isinstance(transposed, list)  # as many tokens, still another size


def test_equal_sizes_give_arrays():
    assert shared()([A, B], **TWO, output_type="np").images.shape == (2, 32, 48, 3)
    assert draw([A, B]).shape == (2, 6, 128)
    assert draw([A, B]).dtype == torch.float32
    assert [p.size for p in shared()([A, B], **TWO).images] == [(48, 32)] * 2


def test_base_and_ratio_give_the_bucket():
    latents = shared()(A, base_resolution=64, aspect_ratio="2:1", num_inference_steps=1, output_type="np").images
    assert latents.shape == (1, 48, 96, 3)  # round16(64 / sqrt 2), round16(64 sqrt 2)


def test_return_dict():
    out = shared()(A, seed=3, **LATENT)
    assert isinstance(out, LensPipelineOutput)
    images = shared()(A, seed=3, return_dict=False, **LATENT)
    assert isinstance(images, tuple)
    assert len(images) == 1
    assert torch.equal(images[0], out.images)


def test_warnings_above_the_trained_size_and_ratio():
    pipe = fresh()
    pipe.defaults = Defaults("lens", 1, 1.0, base_resolution=32, max_resolution=48)
    with pytest.warns(
        UserWarning, match="height 64, width 48 is larger than the largest size this model is shown to work at"
    ):
        pipe([A, B], height=64, width=48, output_type="latent")
    with pytest.warns(
        UserWarning, match="height 16, width 48 lies outside the trained aspect ratios 1:2 to 2:1"
    ) as caught:
        pipe(A, height=16, width=48, output_type="latent")
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe(A, height=48, width=48, output_type="latent")


def test_noise_is_drawn_while_the_prompt_is_read(monkeypatch):
    """On a device the draw has a thread: each of the two waits for the other to have begun, and the bits stay."""
    pipe, drawing, reading = fresh(), threading.Event(), threading.Event()
    encode, draw = pipe.text_encoder.encode, sampler._draw

    def read(*args):
        reading.set()
        assert drawing.wait(20)
        return encode(*args)

    def drawn(*args):
        drawing.set()
        assert reading.wait(20)
        return draw(*args)

    expected = shared()([A, B], seed=5, **LATENT).images
    monkeypatch.setattr(pipeline, "host_lane_for", lambda device: HostThread())
    monkeypatch.setattr(sampler, "_draw", drawn)
    monkeypatch.setattr(pipe.text_encoder, "encode", read)
    assert same_bits(pipe([A, B], seed=5, **LATENT).images, expected)


def test_a_failure_on_the_thread_is_the_calls_own(monkeypatch):
    monkeypatch.setattr(pipeline, "host_lane_for", lambda device: HostThread())
    monkeypatch.setattr(sampler, "_draw", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        shared()(A, seed=5, **LATENT)


def test_a_generator_of_the_callers_is_drawn_from_before_anything_else(monkeypatch):
    """Its state after a call, even one that fails, does not depend on threads."""
    pipe, generator = fresh(), torch.Generator().manual_seed(3)
    after = torch.Generator().manual_seed(3)
    torch.randn((1, 6, pipe.transformer.config.in_channels), generator=after)
    monkeypatch.setattr(pipe.text_encoder, "encode", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pipe(A, generator=[generator], height=32, width=48)
    assert torch.equal(generator.get_state(), after.get_state())


def test_nan_in_the_model_is_refused():
    pipe = fresh()
    with torch.no_grad():
        pipe.transformer.image_out.bias[5] = math.nan
    said = "picture 0: the final latents hold NaN or infinity; so do the weights transformer/proj_out.bias$"
    with pytest.raises(FloatingPointError, match=said):
        pipe(A, **LATENT)
    with torch.no_grad():
        pipe.transformer.image_out.bias[5] = 3e38  # finite, and its square is not
    with pytest.raises(FloatingPointError, match=r"hold NaN or infinity; no weight does$"):
        pipe(A, guidance_scale=3.0, **LATENT)


def test_nan_in_the_decoder_is_no_black_picture():
    pipe = fresh()
    bias = pipe.codec.vae.decoder.conv_out.bias
    with torch.no_grad():
        bias[1] = math.nan
    with pytest.raises(FloatingPointError, match="decoded pixels hold NaN or infinity; so do the weights vae/decoder"):
        pipe(A, **{**LATENT, "output_type": "pil"})


# ---------------------------------------------------------------------------------------------- embeddings


def test_embeddings_equal_prompts():
    pipe = shared()
    embeds, mask = pipe.encode_text([A, B])
    negative, negative_mask = pipe.encode_text(["blurry", "low contrast, dull"])
    arguments = dict(seed=4, guidance_scale=4.0, num_images_per_prompt=2, **LATENT)
    by_prompt = pipe([A, B], ["blurry", "low contrast, dull"], **arguments).images
    by_embeds = pipe(
        prompt_embeds=embeds, prompt_mask=mask,
        negative_prompt_embeds=negative, negative_prompt_mask=negative_mask, **arguments,
    ).images  # fmt: skip
    assert torch.equal(by_embeds, by_prompt)
    unmasked = pipe(prompt_embeds=embeds, negative_prompt_embeds=negative, **arguments).images
    assert torch.equal(unmasked[2:], by_prompt[2:]) == bool(mask[1].all() and negative_mask[1].all())
    assert not torch.equal(unmasked, by_prompt)  # None: all are valid, padding too
    one = pipe(
        [A, B], negative_prompt_embeds=[f[:1] for f in negative], negative_prompt_mask=negative_mask[:1], **arguments
    )
    assert torch.equal(one.images, pipe([A, B], "blurry", **arguments).images)


def test_one_negative_for_all_prompts():
    both = draw([A, B], "blurry", seed=2, guidance_scale=4.0)
    assert torch.equal(both, draw([A, B], ["blurry", "blurry"], seed=2, guidance_scale=4.0))
    assert torch.equal(draw(A, None, seed=2), draw(A, "", seed=2))
    assert not torch.equal(both, draw([A, B], "", seed=2, guidance_scale=4.0))


def test_an_empty_prompt_is_encoded_like_any_other():
    with counted(shared().text_encoder, "read") as calls:
        shared()("", **LATENT)
    assert [len(args[0]) for args, _ in calls] == [1]


# ---------------------------------------------------------------------------------------------- callbacks


def run(fn, keys=("latents", "prompt_embeds", "negative_prompt_embeds", "noise_pred"), **kwargs):
    arguments = {**LATENT, "num_inference_steps": 3, "seed": 6, "guidance_scale": 4.0, **kwargs}
    return shared()(
        [A, B], "blurry", callback_on_step_end=fn, callback_on_step_end_tensor_inputs=keys, **arguments
    ).images


def test_callback_reads_every_tensor():
    seen = []
    final = run(lambda pipe, i, t, tensors: seen.append((pipe, i, t, tensors)) or {})
    assert torch.equal(final, run(lambda *args: None, ()))
    assert [s[1] for s in seen] == [0, 1, 2]
    sigmas = shared().scheduler.sigmas(6, 3)
    assert [float(s[2]) for s in seen] == [float(1000 * v) for v in sigmas[:-1]]
    assert all(s[0] is shared() for s in seen)
    embeds, negative = shared().encode_text([A, B])[0], shared().encode_text("blurry")[0]
    start = torch.cat([torch.randn((1, 6, 128), generator=torch.Generator().manual_seed(s)) for s in (6, 7)])
    for i, (*_, tensors) in enumerate(seen):
        assert list(tensors) == ["latents", "prompt_embeds", "negative_prompt_embeds", "noise_pred"]
        assert same_bits(tensors["prompt_embeds"], embeds)
        assert same_bits(tensors["negative_prompt_embeds"], [f.expand(2, -1, -1) for f in negative])
        moved = start + (sigmas[i + 1] - sigmas[i]) * tensors["noise_pred"]
        assert relative(tensors["latents"], moved) <= 1e-6
        start = tensors["latents"]
    assert torch.equal(start, final)


def test_callback_gets_only_what_it_names():
    seen = []
    run(lambda pipe, i, t, tensors: seen.append(list(tensors)) or {}, ("noise_pred",))
    assert seen == [["noise_pred"]] * 3
    shared()([A], callback_on_step_end=lambda p, i, t, k: seen.append(list(k)), **LATENT)
    assert seen[3:] == [["latents"]] * 2


def test_callback_replaces_latents():
    halved = run(lambda p, i, t, k: {"latents": k["latents"] * 0.5} if i == 2 else {})
    assert torch.equal(halved, 0.5 * run(lambda *a: {}))

    def in_place(pipe, i, t, tensors):
        if i == 2:
            tensors["latents"].mul_(0.5)
        return tensors

    assert torch.equal(run(in_place), halved)  # changed in place and returned


def test_callback_changes_nothing_in_place():
    """What it gets are copies; only what it returns counts."""

    def spoil(pipe, i, t, tensors):
        tensors["latents"].zero_()
        tensors["prompt_embeds"][0].zero_()

    assert torch.equal(run(spoil), run(lambda *a: {}))


def test_callback_returning_what_it_got_changes_no_bit():
    assert torch.equal(run(lambda p, i, t, k: k), run(lambda *a: {}))


def test_callback_replaces_the_velocity():
    """noise_pred replaced: the step is taken again with it."""
    previous = []

    def still(pipe, i, t, tensors):
        previous.append(tensors["latents"])
        return {"noise_pred": torch.zeros_like(tensors["noise_pred"])} if i == 2 else {}

    final = run(still)
    assert torch.equal(final, previous[1])


def test_callback_replaces_embeddings():
    pipe = shared()
    other, _other_mask = pipe.encode_text(["a blue cup", "green apples, soft light"])

    def swap(pipe, i, t, tensors):
        return {"prompt_embeds": [f[:, :7] for f in other]} if i == 0 else {}

    swapped = run(swap)
    noise = []
    run(lambda p, i, t, k: noise.append(k["latents"]))
    # the same by hand: two more steps from the first step's latents with the other text
    seen = []
    run(lambda p, i, t, k: seen.append(k["prompt_embeds"]) or swap(p, i, t, k))
    assert seen[0][0].shape != seen[1][0].shape
    assert same_bits(seen[1], [f[:, :7] for f in other])
    assert not torch.equal(swapped, noise[-1])
    same_text = run(lambda p, i, t, k: {"prompt_embeds": [f.clone() for f in k["prompt_embeds"]]})
    assert torch.equal(same_text, noise[-1])


def test_callback_replaces_the_negative():
    """From the first step on without text: the later steps are those of a blank negative."""
    pipe, first = shared(), []

    def blank(pipe, i, t, tensors):
        first.append(tensors["latents"])
        return {"negative_prompt_embeds": [f[:, :0] for f in tensors["negative_prompt_embeds"]]} if i == 0 else {}

    final = run(blank)
    later = []

    def start_there(pipe, i, t, tensors):
        later.append(tensors["latents"])
        return {"latents": first[0]} if i == 0 else {}

    arguments = {**LATENT, "num_inference_steps": 3, "seed": 6, "guidance_scale": 4.0}
    assert torch.equal(pipe([A, B], "", callback_on_step_end=start_there, **arguments).images, final)


def test_callback_replaces_embeddings_under_a_mask_with_holes():
    """Of the same T the mask and the tokens' places hold on: as if the new features had been given from that step on."""
    pipe, (features, mask) = shared(), shared().encode_text(["a red apple on a wooden table"])
    mask = mask.clone()
    mask[0, [1, 4]] = False
    other = [f + 0.5 for f in features]
    arguments = {**LATENT, "num_inference_steps": 2, "seed": 6, "guidance_scale": 1.0, "prompt_mask": mask}
    start = []

    def swap(pipe, i, t, tensors):
        start.append(tensors["latents"])
        return {"prompt_embeds": other_packed} if i == 0 else {}

    def jump(pipe, i, t, tensors):
        return {"latents": start[0]} if i == 0 else {}

    shown = []
    keys = ("latents", "prompt_embeds")
    pipe(
        prompt_embeds=features,
        callback_on_step_end=lambda p, i, t, k: shown.append(k),
        callback_on_step_end_tensor_inputs=keys,
        **arguments,
    )
    valid = mask[0].nonzero().squeeze(1)
    other_packed = [f[:, valid] for f in other]
    assert [f.shape for f in shown[0]["prompt_embeds"]] == [f.shape for f in other_packed]
    swapped = pipe(
        prompt_embeds=features, callback_on_step_end=swap, callback_on_step_end_tensor_inputs=keys, **arguments
    ).images
    expected = pipe(prompt_embeds=other, callback_on_step_end=jump, **arguments).images
    assert torch.equal(swapped, expected)
    dense = pipe(prompt_embeds=other_packed, callback_on_step_end=jump, **{**arguments, "prompt_mask": None}).images
    assert not torch.equal(dense, expected)  # without its holes the text lies in other places


def test_callback_with_mixed_sizes():
    seen = []

    def look(pipe, i, t, tensors):
        seen.append((t, tensors))
        return {"latents": [x * 1.0 for x in tensors["latents"]], "noise_pred": tensors["noise_pred"]}

    arguments = dict(sizes=[(32, 32), (48, 64)], seed=1, num_inference_steps=2, output_type="latent")
    keys = ("latents", "noise_pred")
    final = shared()([A, B], callback_on_step_end=look, callback_on_step_end_tensor_inputs=keys, **arguments).images
    assert same_bits(final, shared()([A, B], **arguments).images)
    expected = torch.stack([shared().scheduler.sigmas(n, 2) for n in (4, 12)])
    for i, (t, tensors) in enumerate(seen):
        assert torch.equal(t, 1000 * expected[:, i])
        assert [tuple(x.shape) for x in tensors["latents"]] == [(4, 128), (12, 128)]


BAD_RETURNS = [
    ({"latent": 1}, "must return a dict of"),
    ([1], "must return a dict of"),
    ({"latents": torch.zeros(2, 5, 128)}, r"latents must have shapes \[\(6, 128\), \(6, 128\)\]"),
    ({"latents": torch.full((2, 6, 128), math.nan)}, "latents holds NaN or infinity"),
    ({"latents": 5}, "callback_on_step_end: latents must hold floating-point tensors, got int"),
    ({"prompt_embeds": 5}, "callback_on_step_end: prompt_embeds must hold floating-point tensors, got int"),
    ({"noise_pred": torch.zeros(1, 6, 128)}, "noise_pred must have shapes"),
    ({"prompt_embeds": [torch.zeros(1, 3, 64)] * 4}, "prompt_embeds must hold B = 2 samples, got 1"),
    ({"prompt_embeds": [torch.full((2, 3, 64), math.inf)] * 4}, r"prompt_embeds\[0\] holds NaN or infinity"),
    ({"negative_prompt_embeds": [torch.zeros(2, 3, 64)] * 3}, "negative_prompt_embeds must be a list of F = 4"),
]


@pytest.mark.parametrize(("answer", "message"), BAD_RETURNS)
def test_wrong_callback_answers_are_named(answer, message):
    with pytest.raises(ValueError, match=message):
        run(lambda *args: answer)


def test_no_negative_to_replace_at_guidance_1():
    seen = []
    run(lambda p, i, t, k: seen.append(k["negative_prompt_embeds"]), guidance_scale=1.0)
    assert seen == [None] * 3
    with pytest.raises(ValueError, match="cannot be replaced at guidance 1"):
        run(lambda p, i, t, k: {"negative_prompt_embeds": [torch.zeros(2, 3, 64)] * 4}, guidance_scale=1.0)


# ---------------------------------------------------------------------------------------------- schedules


def test_static_shift():
    pipe = fresh()
    pipe.scheduler = Scheduler(use_dynamic_shifting=False, shift=3.0)
    times = []
    pipe(A, callback_on_step_end=lambda p, i, t, k: times.append(float(t)), **dict(LATENT, num_inference_steps=4))
    linear = [1, 0.75, 0.5, 0.25]
    assert times == pytest.approx([1000 * 3 * s / (1 + 2 * s) for s in linear], rel=1e-6)
    assert torch.equal(Scheduler(False, 1.0).sigmas(99, 4), torch.tensor([1, 0.75, 0.5, 0.25, 0]))


def test_stochastic_sampling():
    """x' = (1 - s_next)(x - s v) + s_next noise; noise keyed by the picture's own seed and the step."""
    pipe = fresh()
    pipe.scheduler = Scheduler(stochastic_sampling=True)
    seen = []
    arguments = {**LATENT, "num_inference_steps": 3, "guidance_scale": 3.0}
    keys = ("latents", "noise_pred")
    both = pipe([A, B], seed=[8, 20], callback_on_step_end=lambda p, i, t, k: seen.append(k),
                callback_on_step_end_tensor_inputs=keys, **arguments).images  # fmt: skip
    sigmas = pipe.scheduler.sigmas(6, 3)
    x = torch.stack([torch.randn((1, 6, 128), generator=torch.Generator().manual_seed(s))[0] for s in (8, 20)])
    for i, tensors in enumerate(seen):
        noise = torch.stack([sampler.step_noise(s, i, 6, 128) for s in (8, 20)])
        x = (1 - sigmas[i + 1]) * (x - sigmas[i] * tensors["noise_pred"]) + sigmas[i + 1] * noise
        assert relative(tensors["latents"], x) <= 1e-6
        x = tensors["latents"]
    assert torch.equal(both[1:], pipe(B, seed=20, **arguments).images)  # whatever is drawn beside it
    given = torch.randn((2, 6, 128), generator=torch.Generator().manual_seed(0))
    together = pipe([A, B], latents=given, **arguments).images
    assert torch.equal(together[1:], pipe(B, latents=given[1:], **arguments).images)
    drawn = [sampler.step_noise(s, i, 6, 128) for s in range(3) for i in range(3)]
    drawn += [torch.randn((6, 128), generator=torch.Generator().manual_seed(s)) for s in range(30)]
    assert len({d.numpy().tobytes() for d in drawn}) == len(drawn)


# ---------------------------------------------------------------------------------------------- threads, interruptions


def test_two_threads_share_a_pipeline():
    pipe = fresh()
    jobs = [
        dict(prompt=[A, B], negative_prompt="blurry", seed=1, **TWO, output_type="np"),
        dict(prompt=[B, "x y z"], sizes=[(48, 32), (64, 64)], seed=5, num_inference_steps=3, output_type="np"),
    ]
    alone = [pipe(**job).images for job in jobs]
    pipe = fresh()  # nothing cached yet
    results: list[list] = [[], []]

    def work(k: int) -> None:
        for _ in range(3):
            results[k].append(pipe(**jobs[k]).images)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for k in range(2):
        assert len(results[k]) == 3
        assert all(same_bits(list(images), list(alone[k])) for images in results[k])


@pytest.mark.parametrize("where", ["callback", "forward", "block", "encoder", "table", "decode"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), torch.OutOfMemoryError("simulated")], ids=["ctrl-c", "oom"])
def test_usable_after_an_interruption(where, error):
    pipe = fresh()
    arguments = dict(prompt=[A, B], negative_prompt="blurry", seed=1, guidance_scale=4.0, output_type="np", **TWO)
    if where != "table":
        expected = pipe(**arguments).images
    calls = []

    def fail(*_args, **_kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise error

    hook, callback = None, None
    if where == "callback":
        callback = fail
    elif where == "encoder":
        hook = pipe.text_encoder.model.layers[2].register_forward_hook(fail)
    elif where == "block":
        hook = pipe.transformer.layers()[1].image.w2.register_forward_hook(fail)
    elif where == "table":
        hook = pipe.transformer.time_embedding.register_forward_hook(fail)
    elif where == "decode":
        hook = pipe.codec.vae.decoder.register_forward_hook(fail)
    else:
        hook = pipe.transformer.image_in.register_forward_hook(fail)
    with pytest.raises(type(error)):
        pipe(**arguments, callback_on_step_end=callback)
    if hook is not None:
        hook.remove()
    if where == "table":
        expected = fresh()(**arguments).images
    assert same_bits(pipe(**arguments).images, expected)


def test_metadata_of_the_folder_reaches_the_pipeline(tmp_path):
    root = tmp_path / "plain-name"
    root.mkdir()
    for part in FOLDER.iterdir():
        if part.is_dir():
            (root / part.name).symlink_to(part)
    index = json.loads((FOLDER / "model_index.json").read_text())
    (root / "model_index.json").write_text(json.dumps(index))
    with pytest.warns(UserWarning, match="nothing tells which Lens 'plain-name' is"):
        assert fresh(root, variant=None).defaults.variant == "lens"
    index["lens"] = {"variant": "turbo", "base_resolution": 64, "max_resolution": 128, "time_dtype": "float32"}
    (root / "model_index.json").write_text(json.dumps(index))
    assert fresh(root, variant=None).defaults == Defaults("turbo", 4, 1.0, 64, 128, "float32")
