"""Plans of memory against counted bytes, and parts that visit the device: the same pictures, nothing left behind."""

from __future__ import annotations

import dataclasses
import json
import threading
import time
import types
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from lens import LensConfig, LensTransformer2DModel, packing, pipeline
from lens.cost import (
    HOST_BYTES,
    cpu_decode_bytes,
    cpu_peak_bytes,
    decode_bytes,
    step_buffer_bytes,
    step_workspace_bytes,
    transformer_parameters,
)
from lens.engine import residency, run
from lens.engine.residency import PRESETS, Placement, Residency, Sizes
from lens.engine.schedule_table import table
from lens.formats.released import load_transformer, recall_modulation
from lens.formats.safetensors import Pages
from lens.modulation import Modulation
from lens.ops import backend
from lens.ops.attention import choice as attention_choice
from tests.engine.test_engine import job
from tests.recorded_graph import OFFSETS_ALONE, offsets_alone
from tests.small_pipeline import FOLDER, fresh, same_bits, shared

SMALL = dict(height=32, width=48, num_inference_steps=2, output_type="np", seed=1)


class Peak(TorchDispatchMode):
    """The most bytes alive at once that were made within the block."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self._given: set[int] = set()
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for t in pytree.tree_leaves((args, kwargs)):
            if isinstance(t, torch.Tensor) and t.untyped_storage()._cdata not in self._live:
                self._given.add(t.untyped_storage()._cdata)
        out = func(*args, **(kwargs or {}))
        self._live = {k: entry for k, entry in self._live.items() if not entry[0].expired()}
        for t in pytree.tree_leaves(out):
            if isinstance(t, torch.Tensor) and (storage := t.untyped_storage())._cdata not in self._given:
                self._live.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        self.bytes = max(self.bytes, sum(size for _, size in self._live.values()))
        return out


@pytest.mark.parametrize("config", [LensConfig(), LensConfig.tiny(), LensConfig.mini()], ids=["lens", "tiny", "mini"])
def test_parameters_by_formula(config):
    with torch.device("meta"):
        model = LensTransformer2DModel(config)
    modulation = sum(p.numel() for b in model.layers() for s in b.streams() for p in s.modulation.parameters())
    assert transformer_parameters(config) == (sum(p.numel() for p in model.parameters()), modulation)


def test_the_released_numbers():
    assert transformer_parameters(LensConfig()) == (4_104_225_152, 1_359_839_232)


@pytest.mark.parametrize(("grid", "texts"), [((64, 64), (0, 300)), ((90, 90), (200, 415)), ((32, 32), (0, 64))])
def test_a_step_by_formula(monkeypatch, grid, texts):
    """Width and rows as released; the blocks reuse their memory, so three of them tell the peak of all."""
    offsets_alone(monkeypatch, dataclasses.replace(OFFSETS_ALONE, device="meta", dtypes=(torch.bfloat16,)))
    monkeypatch.setattr(backend, "choose", lambda op, x: "cuda")
    config = dataclasses.replace(LensConfig(), num_layers=3)
    with torch.device("meta"):
        model = LensTransformer2DModel(config).eval().to(torch.bfloat16)
        given = job(dataclasses.replace(config, num_layers=1), grid, texts)
        blocks, final = torch.empty(32, 3, 2, 6, 1536), torch.empty(32, 2, 1536)
        table = Modulation(blocks.to(torch.bfloat16), final.to(torch.bfloat16))
    binned = packing.bin_texts(grid, [torch.arange(n) for n in texts])
    state = run.fixed_state(model, dataclasses.replace(given, table=table), binned)
    rows = 2 * grid[0] * grid[1]
    with torch.no_grad(), Peak() as peak:
        run.advance(model, state)
    assert peak.bytes == pytest.approx(step_workspace_bytes(config, rows, binned.rows), rel=0.02)
    held = sum(t.numel() * t.element_size() for t in state.tensors())
    assert held == pytest.approx(step_buffer_bytes(config, rows, binned.rows, 2), rel=0.02)
    attention_choice.choose.cache_clear()


@pytest.mark.parametrize("side", [32, 64])
def test_a_decode_by_formula(monkeypatch, side):
    """The released autoencoder's shape; the middle's attention as a kernel without a matrix of weights."""
    from diffusers import AutoencoderKLFlux2

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda q, k, v, **_: torch.empty_like(q))
    with torch.device("meta"):
        vae = AutoencoderKLFlux2().eval()
        latents = torch.empty(1, vae.config.latent_channels, 2 * side, 2 * side)
    channels = tuple(vae.config.block_out_channels)
    with torch.no_grad(), Peak() as peak:
        vae.decode(latents, return_dict=False)
    assert peak.bytes == pytest.approx(decode_bytes(channels, 256 * side**2, itemsize=4), rel=0.02)


# ------------------------------------------------------------------------------------------------ plans

GIB = 2**30
SIZES = Sizes(text_encoder=13, transformer=8, modulation=3, vae=1, encode=2, denoise=4, decode=6)


def test_what_a_plan_predicts():
    assert residency.predict(SIZES, PRESETS["resident"]) == {"encode": 24, "denoise": 26, "decode": 28}
    assert residency.predict(SIZES, PRESETS["trimmed"]) == {"encode": 21, "denoise": 23, "decode": 25}
    assert residency.predict(SIZES, PRESETS["balanced"]) == {"encode": 21, "denoise": 10, "decode": 12}
    assert residency.predict(SIZES, PRESETS["lean"]) == {"encode": 15, "denoise": 12, "decode": 7}
    assert [residency.peak(SIZES, r) for r in PRESETS.values()] == [28, 25, 21, 15]


@pytest.mark.parametrize(("free", "name"), [(31, "resident"), (30, "trimmed"), (27, "balanced"), (17, "lean")])
def test_auto_takes_the_first_that_fits(free, name):
    assert residency.choose("auto", SIZES, free) == PRESETS[name]


def test_auto_where_nothing_fits_or_nothing_bounds():
    assert residency.choose("auto", SIZES, None) == PRESETS["resident"]
    with pytest.raises(MemoryError, match=r"no plan fits 0\.0 GiB of free device memory: resident 0\.0 GiB"):
        residency.choose("auto", SIZES, 16)
    with pytest.raises(MemoryError):  # what cannot move is not asked to
        residency.choose("auto", SIZES, 17, fixed=["text_encoder"])
    assert residency.choose("auto", SIZES, 28, fixed=["text_encoder"]) == PRESETS["trimmed"]
    own = Residency(vae="on_demand")
    assert residency.choose(own, SIZES, 1) is own
    with pytest.raises(ValueError, match="must be a Residency or one of auto, resident, trimmed, balanced, lean"):
        residency.choose("small", SIZES, 1)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(vae="host"), "Residency: vae must be one of resident, on_demand, got 'host'"),
        (dict(modulation="on_demand"), "Residency: modulation must be one of resident, host"),
        (dict(modulation="host", transformer="on_demand"), "needs a resident transformer"),
    ],
)
def test_wrong_policies(wrong, message):
    with pytest.raises(ValueError, match=message):
        Residency(**wrong)


def test_a_plan_in_words():
    line = residency.describe(dataclasses.replace(SIZES, text_encoder=13 * GIB), PRESETS["lean"])
    assert line.startswith("text_encoder on_demand, transformer on_demand, vae on_demand, modulation resident; ")
    assert line.endswith("predicted GiB: encode 13.00, denoise 0.00, decode 0.00")


# ------------------------------------------------------------------------------------------------ visits


@pytest.fixture
def visits(monkeypatch):
    """On the CPU a visit is a copy; the list says what visited, by bytes."""
    made = []
    monkeypatch.setattr(Placement, "_visit", lambda self, host: made.append(host.nbytes) or host.clone())
    return made


def addresses(module: nn.Module) -> list[int]:
    return [t.data_ptr() for t in (*module.parameters(), *module.buffers()) if not t.is_meta]


def test_a_part_visits_and_leaves(visits):
    module = nn.BatchNorm1d(3)
    module.left_out = nn.Parameter(torch.empty(2, device="meta"))
    placement = Placement(Residency(vae="on_demand"), torch.device("cpu"))
    placement.add("vae", module)
    placement.add("transformer", nn.Linear(2, 2))
    home = addresses(module)
    with placement.using("vae"):
        away = addresses(module)
        assert not set(away) & set(home)
        with placement.using("vae"), placement.using("transformer"):
            assert addresses(module) == away
        assert addresses(module) == away
    assert addresses(module) == home
    with pytest.raises(ZeroDivisionError), placement.using("vae"):
        raise ZeroDivisionError
    assert addresses(module) == home
    assert len(visits) == 2 * len(home)
    assert module.left_out.is_meta


def packed_encoder() -> nn.Module:
    """As transformers leaves one: the weights in the kernels' own objects, the biases as parameters."""
    experts = type("Mxfp4GptOssExperts", (nn.Module,), {})()
    experts.gate_up_proj_bias = nn.Parameter(torch.zeros(5))
    experts.gate_up_proj = types.SimpleNamespace(storage=types.SimpleNamespace(data=torch.zeros(7, dtype=torch.uint8)))
    scale = types.SimpleNamespace(storage=types.SimpleNamespace(data=torch.zeros(3, dtype=torch.uint8)))
    experts.gate_up_proj_precision_config = types.SimpleNamespace(weight_scale=scale)
    return nn.Sequential(nn.Linear(2, 2, bias=False), experts)


def test_packed_experts_are_known_and_counted_by_what_was_loaded():
    module = packed_encoder()
    assert residency.module_bytes(module) == 16 + 20 + 7 + 3
    module.is_quantized, module.hf_quantizer = False, None
    assert residency.immovable(module)
    expanded = nn.Linear(2, 2)
    expanded.is_quantized, expanded.hf_quantizer = True, object()
    assert residency.immovable(expanded) == ""
    sizes = [residency.released_sizes(packed=packed).text_encoder for packed in (True, False)]
    assert sizes == [residency.ENCODER_BYTES, residency.EXPANDED_BYTES]


def test_what_cannot_move_is_said():
    module = packed_encoder()
    placement = Placement(Residency(text_encoder="on_demand"), torch.device("cpu"))
    with pytest.raises(ValueError, match="text_encoder cannot be on_demand: its packed MXFP4 experts"):
        placement.add("text_encoder", module)


@pytest.mark.parametrize("name", ["resident", "trimmed", "balanced", "lean"])
def test_pictures_are_the_same_wherever_parts_live(visits, name):
    pipe = fresh()
    bytes_of = {part: residency.module_bytes(m) for part, m in pipe.parts().items()}
    assert pipe.set_residency(PRESETS[name]) == PRESETS[name]
    assert type(pipe).live is type(pipe).set_residency  # the earlier name still serves
    inside = []

    def watch(p, i, t, tensors):
        inside.append(sum(visits))

    call = dict(prompt="a red apple", negative_prompt="blurry", **SMALL)
    got = pipe(**call, callback_on_step_end=watch).images
    assert same_bits(got, shared()(**call).images)
    visiting = [part for part in bytes_of if PRESETS[name].tier(part) != "resident"]
    assert sum(visits) == sum(bytes_of[part] for part in visiting)
    assert inside == [sum(bytes_of[p] for p in visiting if p != "vae")] * 2  # the decoder has not come yet
    assert pipe.engine.weights_move == (name == "lean")
    assert same_bits(pipe(**call).images, got)


@pytest.mark.parametrize(
    ("call", "reads"),
    [
        (dict(), False),
        (dict(negative_prompt="blurry"), True),
        (dict(negative_prompt="blurry", guidance_scale=1.0), False),
        (dict(embedded_negative=True), False),
    ],
    ids=["blank negative", "negative", "unread negative", "negative embeddings"],
)
def test_the_text_encoder_stays_away_where_no_prompt_is_read(visits, call, reads):
    pipe = fresh()
    features, mask = pipe.encode_text("a red apple")
    call = dict(prompt_embeds=features, prompt_mask=mask, **{"guidance_scale": 4.0, **SMALL, **call})
    if call.pop("embedded_negative", False):
        call |= dict(negative_prompt_embeds=features, negative_prompt_mask=mask)
    expected = pipe(**call).images
    pipe.set_residency(Residency(text_encoder="on_demand"))
    assert same_bits(pipe(**call).images, expected)
    assert sum(visits) == reads * residency.module_bytes(pipe.text_encoder.model)


def test_loaded_to_where_it_lives(monkeypatch):
    """A named policy is known before loading; its parts are on the host as soon as they are read."""

    asked, parts = {}, ("transformer", "text_encoder", "vae")
    for part in parts:
        name = "load_gpt_oss" if part == "text_encoder" else f"load_{part}"
        load = getattr(pipeline, name)

        def spy(folder, dtype, device, *depth, part=part, load=load):
            asked[part] = str(device)
            return load(folder, dtype, "cpu", *depth)

        monkeypatch.setattr(pipeline, name, spy)
    fresh(residency="lean")
    assert asked == dict.fromkeys(parts, "cpu")
    monkeypatch.setattr(pipeline, "usable_placement", lambda *_: (torch.device("meta"), torch.float32))
    monkeypatch.setattr(Placement, "add", lambda *_: None)
    fresh(residency=Residency(vae="on_demand"))
    assert asked == {"transformer": "meta", "text_encoder": "meta", "vae": "cpu"}
    fresh(residency="balanced")
    assert asked == {"transformer": "meta", "text_encoder": "cpu", "vae": "meta"}
    fresh(residency="auto")
    assert asked == dict.fromkeys(parts, "cpu")
    fresh()
    assert asked == dict.fromkeys(parts, "meta")
    monkeypatch.setattr(pipeline, "packed_experts", lambda folder: True)
    monkeypatch.setattr(pipeline, "load_text_encoder", pipeline.load_gpt_oss)
    for name in (
        "balanced",
        "auto",
    ):  # transformers' kernels hold them where they were loaded: counted, or refused, there
        fresh(residency=name, encoder="transformers")
        assert asked["text_encoder"] == "meta"


@pytest.mark.parametrize(("name", "times"), [("resident", 0), ("balanced", 1), ("lean", 1)])
def test_on_a_cpu_an_encoder_that_visits_gives_its_pages_back(monkeypatch, name, times):
    """Weights stored in bfloat16 and wanted so stay in their file; what they say is the same before and after."""
    drop, dropped = Pages.drop, []
    monkeypatch.setattr(Pages, "drop", lambda self: (dropped.append(len(self._maps)), drop(self)))
    pipe = fresh(dtype=torch.bfloat16, residency=name)
    features, _ = pipe.encode_text("a red apple")
    passes = len(pipe.text_encoder.model.layers) + 1  # after each layer, and when the prompt is read
    assert dropped == [1] * times * passes
    assert same_bits(pipe.encode_text("a red apple")[0], features)
    pipe.set_residency("resident")
    dropped.clear()
    assert same_bits(pipe.encode_text("a red apple")[0], features)
    assert dropped == []


def test_sizes_of_a_pipeline():
    sizes = shared().sizes(image_tokens=24, images=2, guided=False)
    assert sizes.transformer == 4 * transformer_parameters(shared().transformer.config)[0]
    config, channels = shared().transformer.config, tuple(shared().codec.vae.config.block_out_channels)
    buffers = step_buffer_bytes(config, 48, 1024, 1, itemsize=4)
    assert sizes.decode == buffers + cpu_decode_bytes(channels, 256 * 24, 4)
    more = shared().sizes(image_tokens=24, images=4, guided=True)
    assert more.denoise > sizes.denoise
    on_a_gpu = shared()._sizes(torch.device("cuda"), 24, 2, False)
    assert on_a_gpu.decode == decode_bytes(channels, 256 * 24)  # one picture is decoded at a time


# ------------------------------------------------------------------------------------------------ a limit of memory

RELEASED = dict(encoder=11_445_000_000, layer=477_000_000, autoencoder=168_000_000, channels=(128, 256, 512, 512))


@pytest.mark.parametrize(
    ("memory", "name"), [(24, "trimmed"), (20.2, "trimmed"), (16, "balanced"), (12, "balanced"), (8, "balanced")]
)
def test_what_a_limit_of_memory_picks_on_a_cpu(memory, name):
    """The released model at 512x512: everything but the modulation in 18.1 GB, without the encoder's other layers in 6.9."""
    sizes = residency.cpu_sizes(LensConfig(), tokens=1024, images=1, guided=False, **RELEASED)
    assert residency.within(memory, sizes) == PRESETS[name]
    assert residency.peak(sizes, PRESETS["trimmed"]) == pytest.approx(18.06e9, rel=0.01)
    assert residency.peak(sizes, PRESETS["balanced"]) == pytest.approx(6.9e9, rel=0.01)


@pytest.mark.parametrize(("tokens", "gigabytes"), [(1024, 6.9), (4096, 7.83), (8100, 9.41)])
def test_lean_is_balanced_on_a_cpu(tokens, gigabytes):
    """Which has nothing smaller: under the 12 GB that it is to need, at 512, 1024 and 1440 pixels a side."""
    cpu = torch.device("cpu")
    assert residency.named("lean", cpu) == PRESETS["balanced"]
    assert residency.named("lean", torch.device("cuda")) == PRESETS["lean"]
    own = Residency(vae="on_demand")
    assert [residency.named(x, cpu) for x in ("auto", "trimmed", own, None)] == ["auto", PRESETS["trimmed"], own, None]
    sizes = residency.cpu_sizes(LensConfig(), tokens=tokens, images=1, guided=False, **RELEASED)
    assert residency.peak(sizes, PRESETS["balanced"]) == pytest.approx(gigabytes * 1e9, rel=0.01)
    # a policy of one's own is carried out, and predicted as it is: transformer, modulation and VAE are always there
    moving = residency.predict(sizes, PRESETS["lean"])
    kept = residency.predict(sizes, PRESETS["balanced"])
    assert {stage: n - kept[stage] for stage, n in moving.items()} == dict.fromkeys(kept, sizes.modulation)
    pipe = fresh(residency="lean")
    assert pipe.placement.residency == PRESETS["balanced"]
    assert pipe.set_residency("resident") == PRESETS["resident"]
    assert pipe.set_residency("lean") == PRESETS["balanced"]


def test_a_limit_of_memory_that_nothing_fits():
    sizes = residency.cpu_sizes(LensConfig(), tokens=1024, images=1, guided=False, **RELEASED)
    with pytest.raises(
        MemoryError, match=r"memory: 6 GB are too few, at least needed: trimmed \d+\.\d GB, balanced 7\.\d GB"
    ):
        residency.within(6, sizes)
    large = residency.cpu_sizes(LensConfig(), tokens=90 * 90, images=8, guided=True, **RELEASED)
    with pytest.raises(MemoryError, match="memory: 8 GB are too few"):
        residency.within(8, large)


def test_a_limit_of_memory_decides_before_anything_is_loaded(monkeypatch):
    loaded = []
    monkeypatch.setattr(pipeline, "load_transformer", lambda *_: loaded.append(1))
    with pytest.raises(MemoryError, match=r"memory: 0\.1 GB are too few"):
        fresh(memory=0.1)
    assert loaded == []
    for wrong in (0, -1, float("nan"), float("inf"), True, "8"):
        with pytest.raises(ValueError, match="memory must be a positive number of GB"):
            fresh(memory=wrong)
    with pytest.raises(ValueError, match="give only one of memory and residency, got 8 and 'lean'"):
        fresh(memory=8, residency="lean")
    with pytest.raises(ValueError, match="memory needs encoder='lens'"):
        fresh(memory=8, encoder="transformers")


def test_the_plan_before_loading_is_the_plan_after(monkeypatch):
    """By the headers of the files what the loaded parts say, in the dtype the files have; and the limits between two plans."""
    planned = []
    monkeypatch.setattr(
        pipeline, "within", lambda memory, sizes: (planned.append(sizes), residency.within(memory, sizes))[1]
    )
    pipe = fresh(memory=8, dtype=torch.bfloat16)
    before, after = planned
    for field in dataclasses.fields(Sizes):
        one, other = getattr(before, field.name), getattr(after, field.name)
        assert one == pytest.approx(other, rel=0.01), field.name
    assert pipe.placement.residency == PRESETS["trimmed"]
    ample, least = (residency.peak(after, PRESETS[n]) / residency.MARGIN for n in ("trimmed", "balanced"))
    call = dict(prompt="a red apple", **SMALL)
    expected = fresh(dtype=torch.bfloat16)(**call).images
    assert pipe.set_residency(memory=(ample + 10) / 1e9) == PRESETS["trimmed"]
    assert same_bits(pipe(**call).images, expected)
    assert pipe.set_residency(memory=(ample - 10) / 1e9) == PRESETS["balanced"]
    assert same_bits(pipe(**call).images, expected)
    with pytest.raises(MemoryError):
        pipe.set_residency(memory=(least - 10) / 1e9)
    with pytest.raises(MemoryError):
        pipe.set_residency(memory=(ample + 10) / 1e9, image_tokens=90 * 90, images=8)


def test_weights_that_are_not_in_a_file_stay_counted():
    """In float32 what is stored in bfloat16 is a copy, which no policy gives back."""
    sizes = fresh(dtype=torch.float32).sizes()
    model = fresh(dtype=torch.float32).text_encoder.model
    copies = sum(p.numel() * p.element_size() for p in model.parameters() if p not in model.pages)
    assert copies > 0
    assert sizes.process == HOST_BYTES + copies


def test_a_large_transformer_is_bfloat16_and_leaves_its_modulation_in_the_files(monkeypatch):
    small = fresh()
    assert (small.dtype, small.placement) == (torch.float32, None)
    monkeypatch.setattr(pipeline, "LARGE", 1000)
    large = fresh()
    assert (large.dtype, large.placement.residency) == (torch.bfloat16, PRESETS["trimmed"])
    assert all(s.modulation.weight.is_meta for b in large.transformer.layers() for s in b.streams())
    call = dict(prompt="a red apple", **SMALL)
    assert same_bits(large(**call).images, fresh(dtype=torch.bfloat16, residency="resident")(**call).images)
    wide = fresh(dtype=torch.float32)
    assert wide.dtype == torch.float32
    assert same_bits(wide(**call).images, small(**call).images)


def test_a_second_thread_finds_all_of_a_part_there(monkeypatch):
    """Threads may share a pipeline: the second must not compute while the first is still moving weights."""
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    placement = Placement(PRESETS["lean"], torch.device("cpu"))
    placement.add("vae", module)
    host = [p.data_ptr() for p in module.parameters()]
    begun, found = threading.Event(), []

    def slowly(self, tensor):
        begun.set()
        time.sleep(0.02)
        return tensor.clone()

    def second():
        begun.wait()
        with placement.using("vae"):
            found.extend(p.data_ptr() for p in module.parameters())

    monkeypatch.setattr(Placement, "_visit", slowly)
    thread = threading.Thread(target=second)
    thread.start()
    with placement.using("vae"):
        thread.join()
    assert len(found) == 4
    assert not set(found) & set(host)
    assert [p.data_ptr() for p in module.parameters()] == host


@torch.no_grad()
def test_modulation_weights_may_stay_in_the_files():
    """The same tables to the bit, of a model that never held them; each is read once for all steps."""
    whole = load_transformer(FOLDER / "transformer", torch.float32, "cpu")
    rest = load_transformer(FOLDER / "transformer", torch.float32, "cpu", modulation=False)
    left = [name for name, p in rest.named_parameters() if p.is_meta]
    assert len(left) == 4 * rest.config.num_layers
    assert all(".modulation." in name for name in left)
    times = torch.tensor([1.0, 0.7, 0.2])
    expected, read = table(whole, times), []
    stored = rest.stored_modulation
    rest.stored_modulation = lambda *which: (read.append(which), stored(*which))[1]
    made = table(rest, times)
    assert torch.equal(made.blocks, expected.blocks)
    assert torch.equal(made.final, expected.final)
    assert len(read) == len(set(read)) == 2 * rest.config.num_layers


@torch.no_grad()
def test_modulation_weights_are_read_when_something_is_to_change_them():
    whole = load_transformer(FOLDER / "transformer", torch.float32, "cpu")
    rest = load_transformer(FOLDER / "transformer", torch.float32, "cpu", modulation=False)
    recall_modulation(rest)
    assert same_bits(list(rest.state_dict().values()), list(whole.state_dict().values()))
    assert rest.stored_modulation is None
    recall_modulation(whole)  # where none was left


@pytest.mark.parametrize(("name", "file"), [("trimmed", "full_size.json"), ("balanced", "full_size_balanced.json")])
def test_predictions_for_the_released_model_are_near_what_was_measured(name, file):
    """512x512 without guidance, the process's highest resident bytes: within the 12 % that `--memory` promises."""
    results = Path(__file__).parents[2] / "bench/results/xeon"
    runs = json.loads((results / file).read_text(encoding="utf-8"))["benchmarks"]
    peak = max(run["extra_info"]["memory"]["peak"] for run in runs if run["extra_info"]["memory"])
    predicted = residency.peak(residency.released_cpu_sizes(1024, guided=False), PRESETS[name])
    assert abs(predicted - peak) <= 0.12 * peak


def test_what_a_cpu_needs_in_each_stage():
    """The released model: weights without modulation, then by stage what its work adds."""
    channels, held = (128, 256, 512, 512), 2 * (4_104_225_152 - 1_359_839_232)
    found = cpu_peak_bytes(LensConfig(), channels, 1024, 200, 4, False, encoder=1000, autoencoder=10)
    buffers = step_buffer_bytes(LensConfig(), 1024, 200, 1, 4)
    assert found["load transformer"] == held
    assert found["table"] == held + 1010 + buffers + 2 * 6 * 1536 * 1537
    assert found["denoise"] == held + 1010 + buffers + step_workspace_bytes(LensConfig(), 1024, 200)
    assert found["decode"] == held + 1010 + buffers + 3 * 256 * 512 * 512 * 2
    away = cpu_peak_bytes(LensConfig(), channels, 1024, 200, 4, False, encoder=1000, autoencoder=10, visiting=100)
    assert {stage: found[stage] - n for stage, n in away.items()} == {
        "load transformer": 0, "table": 1000, "prompt": 900, "denoise": 1000, "decode": 1000,
    }  # fmt: skip
    guided = cpu_peak_bytes(LensConfig(), channels, 1024, 200, 4, True, encoder=1000, autoencoder=10)
    assert guided["denoise"] > found["denoise"]
    wide = cpu_peak_bytes(LensConfig(), channels, 1024, 200, 4, False, encoder=1000, autoencoder=10, itemsize=4)
    assert wide["load transformer"] == 2 * held
