"""Loading: every layout that must load, and every broken one refused with the file, the key and what was expected."""

from __future__ import annotations

import json
import re
import shutil
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lens
from lens import LensConfig, LensTransformer2DModel
from lens.formats.files import CheckpointError
from lens.formats.hub import EMBEDDED, resolve, variant_hint
from lens.formats.names import released_names
from lens.formats.released import load_transformer, released_config, save_transformer, transformer_config
from lens.formats.safetensors import save_tensors
from lens.formats.text_encoder import load_text_encoder, packed_experts
from tests.small_pipeline import FOLDER, fresh, same_bits, shared

CALL = dict(prompt="a red apple", seed=1, height=32, width=32, num_inference_steps=1, output_type="latent")
BAD_JSON = {"empty": "", "cut": '{"a": 1', "list": "[1]", "binary": "\xff\xfe{}"}


@pytest.fixture
def copy(tmp_path) -> Path:
    """A checkpoint of one's own to break."""
    root = tmp_path / "lens"
    shutil.copytree(
        FOLDER, root, ignore=shutil.ignore_patterns("expected.safetensors", "cases.json", "*.py", "__pycache__")
    )
    return root


def transformer_file(root: Path) -> Path:
    return root / "transformer" / "diffusion_pytorch_model.safetensors"


def edit(path: Path, change) -> None:
    """Rewrite a safetensors file after ``change(tensors)``."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def refuse(root: Path, *parts: str) -> str:
    """Loading must fail with a message that holds every one of ``parts``; an unreadable folder is never half loaded."""
    with pytest.raises(CheckpointError) as error:
        fresh(root)
    for part in parts:
        assert part in str(error.value), f"{part!r} is not in: {error.value}"
    return str(error.value)


# ---------------------------------------------------------------------------------------------- what must load


@pytest.fixture(scope="module")
def expected() -> torch.Tensor:
    return shared()(**CALL).images


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shard_bytes", [200_000, 10**9])
def test_stored_dtypes_and_shards(copy, expected, dtype, shard_bytes):
    """float32 or bfloat16 on disk, one file or shards behind an index: the same weights, the same bits."""
    for part, stem in (
        ("transformer", "diffusion_pytorch_model"), ("text_encoder", "model"), ("vae", "diffusion_pytorch_model"),
    ):  # fmt: skip
        path = copy / part / f"{stem}.safetensors"
        tensors = {k: v.to(dtype) if v.is_floating_point() else v for k, v in load_file(path).items()}
        path.unlink()
        save_tensors(copy / part, stem, tensors, shard_bytes)
        assert (copy / part / f"{stem}.safetensors.index.json").is_file() == (shard_bytes == 200_000)
    pipe = fresh(copy)
    assert pipe.dtype == torch.float32
    assert torch.equal(pipe(**CALL).images, expected)


def test_encoder_class_named_by_the_released_index_exists_nowhere():
    index = json.loads((FOLDER / "model_index.json").read_text())
    assert index["text_encoder"] == ["transformers", "LensGptOssEncoder"]
    import transformers

    assert not hasattr(transformers, "LensGptOssEncoder")
    assert shared().text_encoder.model.__class__.__name__ == "GptOssModel"


def test_encoder_without_head_and_prefix(copy, expected):
    """As GptOssModel.save_pretrained writes it."""
    path = copy / "text_encoder" / "model.safetensors"
    edit(path, lambda t: t.pop("lm_head.weight"))
    tensors = {k.removeprefix("model."): v for k, v in load_file(path).items()}
    save_file(tensors, path)
    assert torch.equal(fresh(copy)(**CALL).images, expected)


def test_encoder_layers_after_the_last_selected_are_checked_but_not_kept(copy):
    config = json.loads((copy / "transformer" / "config.json").read_text())
    config["selected_layer_index"] = [1, 0, 1, 2]
    (copy / "transformer" / "config.json").write_text(json.dumps(config))
    pipe = fresh(copy)
    assert len(pipe.text_encoder.model.layers) == 3
    features, theirs = pipe.encode_text("a red apple")[0], shared().encode_text("a red apple")[0]
    assert same_bits(features, [theirs[k] for k in (1, 0, 1, 2)])
    key = "model.layers.3.mlp.router.bias"
    edit(copy / "text_encoder" / "model.safetensors", lambda t: t.pop(key))
    refuse(copy, "model.safetensors: 1 keys missing", key)


def test_bf16_pipeline():
    pipe = fresh(dtype=torch.bfloat16)
    kinds = {p.dtype for part in (pipe.transformer, pipe.text_encoder.model, pipe.codec.vae) for p in part.parameters()}
    assert kinds == {torch.bfloat16}
    image = pipe(**CALL).images
    assert image.dtype == torch.float32
    assert torch.isfinite(image).all()
    with pytest.raises(ValueError, match=r"dtype must be torch.float32 or torch.bfloat16 .* got torch.float16"):
        fresh(dtype=torch.float16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_transformer_round_trip(tmp_path, dtype):
    config = LensConfig(
        num_layers=2, num_attention_heads=3, attention_head_dim=32, axes_dims_rope=(8, 12, 12), in_channels=32,
        out_channels=8, enc_hidden_dim=40, selected_layer_index=(1, 3),
    )  # fmt: skip
    model = LensTransformer2DModel(config).to(dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    save_transformer(model, tmp_path, dtype)
    again = load_transformer(tmp_path, dtype, "cpu")
    assert again.config == config
    assert not again.training
    for (name, a), (other, b) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert name == other
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def test_released_layout_is_reproduced(tmp_path):
    """Loading and saving gives back the released keys, shapes and bits."""
    model = load_transformer(FOLDER / "transformer", torch.bfloat16, "cpu")
    save_transformer(model, tmp_path)
    theirs, ours = load_file(transformer_file(FOLDER)), load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    assert sorted(theirs) == sorted(ours)
    assert all(torch.equal(theirs[k], ours[k]) for k in theirs)


def test_released_size():
    """4,104,225,152 parameters in 1,264 tensors, a third of them modulation."""
    with torch.device("meta"):
        model = LensTransformer2DModel(LensConfig())
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    assert sum(sizes.values()) == 4_104_225_152
    keys = [key for name in sizes for key in released_names(name)]
    assert len(keys) == len(set(keys)) == 1264
    assert sum(n for name, n in sizes.items() if ".modulation." in name) == 1_359_839_232
    assert transformer_config(released_config(LensConfig())) == LensConfig()


# ---------------------------------------------------------------------------------------------- MXFP4

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def dequantise(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """blocks uint8 [X, rows, groups, 16], scales uint8 [X, rows, groups] -> bfloat16 [X, groups * 32, rows].

    A byte holds two E2M1 numbers (sign, two bits of exponent, one of mantissa), the low half first; a scale s means
    2^(s - 127).
    """
    table = torch.tensor(E2M1 + [-v for v in E2M1], dtype=torch.float64)
    pairs = torch.stack([table[(blocks & 15).long()], table[(blocks >> 4).long()]], -1).flatten(-2)
    values = pairs * torch.exp2(scales.double() - 127)[..., None]
    return values.flatten(-2).transpose(1, 2).contiguous().bfloat16()


@pytest.fixture
def quantised(tmp_path) -> tuple[Path, Path]:
    """text_encoder folders: MXFP4 experts as GPT-OSS ships them, and its dequantised twin."""
    folders = tmp_path / "mxfp4", tmp_path / "twin"
    generator = torch.Generator().manual_seed(3)
    tensors = load_file(FOLDER / "text_encoder" / "model.safetensors")
    packed, plain = dict(tensors), dict(tensors)
    for key in [k for k in tensors if k.endswith(("gate_up_proj", "down_proj")) and ".experts." in k]:
        experts, inputs, outputs = tensors[key].shape
        blocks = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), generator=generator, dtype=torch.uint8)
        scales = torch.randint(121, 126, (experts, outputs, inputs // 32), generator=generator, dtype=torch.uint8)
        del packed[key]
        packed[f"{key}_blocks"], packed[f"{key}_scales"] = blocks, scales
        plain[key] = dequantise(blocks, scales)
        assert plain[key].shape == tensors[key].shape
    config = json.loads((FOLDER / "text_encoder" / "config.json").read_text())
    for folder, weights in zip(folders, (packed, plain), strict=True):
        folder.mkdir()
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config))
    skipped = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": skipped}
    (folders[0] / "config.json").write_text(json.dumps(config))
    return folders


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_mxfp4_equals_its_dequantised_twin(quantised, dtype):
    assert [packed_experts(folder) for folder in quantised] == [True, False]
    ours, twin = (load_text_encoder(folder, dtype, "cpu", 3) for folder in quantised)
    expected, got = dict(twin.named_parameters()), dict(ours.named_parameters())
    assert sorted(expected) == sorted(got)
    for name, value in got.items():
        assert value.dtype == dtype, name
        assert torch.equal(value, expected[name]), name
    ids = shared().tokenize("a red apple")[0]
    assert torch.equal(
        ours(input_ids=ids, use_cache=False).last_hidden_state, twin(input_ids=ids, use_cache=False).last_hidden_state
    )


def test_mxfp4_with_a_missing_scale(quantised):
    edit(quantised[0] / "model.safetensors", lambda t: t.pop("model.layers.1.mlp.experts.down_proj_scales"))
    with pytest.raises(CheckpointError) as error:
        load_text_encoder(quantised[0], torch.float32, "cpu")
    file, key = quantised[0] / "model.safetensors", "model.layers.1.mlp.experts.down_proj_scales"
    assert f"{file}: 1 keys missing, first '{key}', expected with shape [4, 64, 2]" in str(error.value)


def test_other_quantisation_is_refused(quantised):
    config = json.loads((quantised[0] / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq"}
    (quantised[0] / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        CheckpointError, match=r"config\.json: quantization_config must be absent or of quant_method mxfp4"
    ):
        load_text_encoder(quantised[0], torch.float32, "cpu")


# ---------------------------------------------------------------------------------------------- broken tensors

KEY = "transformer_blocks.1.attn.img_qkv.weight"


def test_missing_key(copy):
    edit(transformer_file(copy), lambda t: (t.pop(KEY), t.pop("proj_out.bias")))
    refuse(copy, str(transformer_file(copy)), "2 keys missing", "'proj_out.bias'", "[128]")


@pytest.mark.parametrize("part", ["w1", "w3"])
def test_missing_half_of_a_stacked_weight(copy, part):
    key = f"transformer_blocks.2.txt_mlp.{part}.weight"
    edit(transformer_file(copy), lambda t: t.pop(key))
    refuse(copy, str(transformer_file(copy)), f"'{key}'", "[341, 128]")


def test_extra_key(copy):
    edit(transformer_file(copy), lambda t: t.update({"pos_embed.freqs": torch.zeros(3)}))
    refuse(copy, str(transformer_file(copy)), "1 unexpected keys, first 'pos_embed.freqs'")


def test_misshapen_key(copy):
    edit(transformer_file(copy), lambda t: t.update({KEY: torch.zeros(128, 384)}))
    refuse(copy, str(transformer_file(copy)), f"{KEY} must have shape [384, 128], got [128, 384]")


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.float8_e4m3fn])
def test_wrong_dtype(copy, dtype):
    edit(transformer_file(copy), lambda t: t.update({KEY: torch.zeros(384, 128).to(dtype)}))
    names = {torch.int64: "I64", torch.uint8: "U8", torch.float8_e4m3fn: "F8_E4M3"}
    message = f"{KEY} must have a dtype of ['BF16', 'F16', 'F32', 'F64'], got {names[dtype]}"
    refuse(copy, str(transformer_file(copy)), message)


@pytest.mark.parametrize(
    ("part", "name", "key", "shape"),
    [
        ("text_encoder", "model.safetensors", "model.layers.2.self_attn.sinks", "[4]"),
        ("vae", "diffusion_pytorch_model.safetensors", "bn.running_mean", "[128]"),
    ],
)
def test_other_parts_are_as_strict(copy, part, name, key, shape):
    file = copy / part / name
    original = file.read_bytes()
    edit(file, lambda t: t.pop(key))
    refuse(copy, str(file), "1 keys missing", f"'{key}'", shape)
    file.write_bytes(original)
    edit(file, lambda t: t.update({key: torch.zeros(7)}))
    refuse(copy, str(file), f"{key} must have shape {shape}, got [7]")
    file.write_bytes(original)
    edit(file, lambda t: t.update({"strange": torch.zeros(7)}))
    refuse(copy, str(file), "1 unexpected keys, first 'strange'")
    file.write_bytes(original)
    edit(file, lambda t: t.update({key: torch.zeros(t[key].shape, dtype=torch.int32)}))
    refuse(copy, str(file), f"{key} must have a dtype of", "got I32")


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("transformer", "diffusion_pytorch_model.safetensors"), ("text_encoder", "model.safetensors"),
        ("vae", "diffusion_pytorch_model.safetensors"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_truncated_file(copy, part, name, keep):
    """Nothing, half the length field, half the header, all but the last byte."""
    file = copy / part / name
    data = file.read_bytes()
    file.write_bytes(data[:keep])
    assert refuse(copy, str(file), "truncated")
    if keep == -1:
        refuse(copy, f"ends at byte {len(data)}, the file has {len(data) - 1}")


def test_garbage_instead_of_a_header(copy):
    transformer_file(copy).write_bytes((40).to_bytes(8, "little") + b"x" * 4000)
    refuse(copy, str(transformer_file(copy)), "broken safetensors header")
    header = json.dumps({KEY: {"dtype": "F32", "shape": [384, 128], "data_offsets": [0, 8]}}).encode()
    transformer_file(copy).write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    refuse(copy, str(transformer_file(copy)), "keys missing")


def test_offsets_that_do_not_fit_the_shape(copy):
    data = transformer_file(copy).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["proj_out.bias"]["data_offsets"][1] -= 2
    text = json.dumps(header).encode()
    transformer_file(copy).write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    refuse(copy, str(transformer_file(copy)), "proj_out.bias", "cannot fill 254 bytes")


def sharded(copy: Path) -> tuple[Path, dict]:
    tensors = load_file(transformer_file(copy))
    transformer_file(copy).unlink()
    save_tensors(copy / "transformer", "diffusion_pytorch_model", tensors, 500_000)
    index = copy / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    return index, json.loads(index.read_text())


def test_missing_shard(copy):
    index, value = sharded(copy)
    shard = value["weight_map"][KEY]
    (index.parent / shard).unlink()
    refuse(copy, str(index.parent / shard), f"shard named by {index.name} not found")


def test_index_and_shards_disagree(copy):
    index, value = sharded(copy)
    names = sorted(set(value["weight_map"].values()))
    value["weight_map"][KEY] = next(n for n in names if n != value["weight_map"][KEY])
    index.write_text(json.dumps(value))
    refuse(copy, KEY, f"is promised by {index.name} but not in the file")


@pytest.mark.parametrize(
    "weights", [None, [], {"a": 3}, {"a": "../vae/x.safetensors"}, {"a": "/x.safetensors"}, {"a": ""}]
)
def test_impossible_index(copy, weights):
    index, _ = sharded(copy)
    index.write_text(json.dumps({"weight_map": weights}))
    refuse(copy, str(index), "expected a 'weight_map' object of keys and file names")


def test_key_in_two_files(copy):
    whole = transformer_file(copy)
    other = whole.with_name("other.safetensors")
    shutil.copy(whole, other)
    edit(other, lambda tensors: [tensors.pop(key) for key in list(tensors) if key != KEY])
    refuse(copy, KEY, "is also in")


def test_no_weights_at_all(copy):
    transformer_file(copy).unlink()
    refuse(copy, str(copy / "transformer"), "no .safetensors file")


# ---------------------------------------------------------------------------------------------- broken settings

JSON_FILES = [
    "model_index.json", "transformer/config.json", "text_encoder/config.json", "vae/config.json",
    "scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json",
]  # fmt: skip


@pytest.mark.parametrize("content", BAD_JSON.values(), ids=BAD_JSON.keys())
@pytest.mark.parametrize("name", JSON_FILES)
def test_broken_json(copy, name, content):
    (copy / name).write_bytes(content.encode("latin-1"))
    refuse(copy, str(copy / name), "JSON")


@pytest.mark.parametrize("name", [n for n in JSON_FILES if not n.startswith("tokenizer")])
def test_missing_json(copy, name):
    (copy / name).unlink()
    refuse(copy, str(copy / name), "file not found")


@pytest.mark.parametrize("part", ["transformer", "text_encoder", "tokenizer", "vae", "scheduler"])
def test_missing_part(copy, part):
    shutil.rmtree(copy / part)
    refuse(copy, str(copy / part), "folder not found, expected the released layout")


SETTINGS = [
    ("model_index.json", {"_class_name": "FluxPipeline"}, "_class_name must be LensPipeline, got 'FluxPipeline'"),
    ("model_index.json", {"lens": {"variant": "fast"}}, "lens.variant must be ['base', 'lens', 'turbo'], got 'fast'"),
    ("model_index.json", {"lens": 3}, "'lens' must be an object, got 3"),
    ("transformer/config.json", {"_class_name": "FluxTransformer2DModel"}, "_class_name must be LensTransformer2DModel"),
    ("transformer/config.json", {"gate_mlp": False}, "gate_mlp must be True, got False"),
    ("transformer/config.json", {"guidance_embeds": True}, "unknown key 'guidance_embeds'"),
    ("transformer/config.json", {"num_layers": "3"}, "num_layers must be a positive integer, got '3'"),
    ("transformer/config.json", {"num_layers": 0}, "num_layers must be a positive integer, got 0"),
    ("transformer/config.json", {"num_layers": 2**40}, "num_layers is 1099511627776, more than the keys stored in"),
    ("transformer/config.json", {"axes_dims_rope": [8, 28, 26]}, "sum to attention_head_dim = 64, got (8, 28, 26)"),
    ("transformer/config.json", {"axes_dims_rope": [7, 29, 28]}, "axes_dims_rope must be even"),
    ("transformer/config.json", {"axes_dims_rope": 64}, "axes_dims_rope must be a list of integers, got 64"),
    ("transformer/config.json", {"inner_dim": 1536}, "inner_dim must be num_attention_heads * attention_head_dim = 128"),
    ("transformer/config.json", {"in_channels": 64}, "in_channels must be patch_size^2 * out_channels = 128, got 64"),
    ("transformer/config.json", {"selected_layer_index": []}, "selected_layer_index must name at least one"),
    ("transformer/config.json", {"selected_layer_index": [0, -1]}, "selected_layer_index must name"),
    ("text_encoder/config.json", {"model_type": "llama"}, "model_type must be gpt_oss, got 'llama'"),
    ("text_encoder/config.json", {"hidden_size": "wide"}, "not a configuration of GPT-OSS"),
    ("vae/config.json", {"_class_name": "AutoencoderKL"}, "_class_name must be AutoencoderKLFlux2, got 'AutoencoderKL'"),
    ("vae/config.json", {"block_out_channels": 7}, "not a configuration of AutoencoderKLFlux2"),
    ("scheduler/scheduler_config.json", {"_class_name": "DDIMScheduler"}, "_class_name must be FlowMatchEuler"),
    ("scheduler/scheduler_config.json", {"use_karras_sigmas": True}, "use_karras_sigmas is not supported"),
    ("scheduler/scheduler_config.json", {"use_beta_sigmas": True}, "use_beta_sigmas is not supported"),
    ("scheduler/scheduler_config.json", {"use_exponential_sigmas": True}, "use_exponential_sigmas is not supported"),
    ("scheduler/scheduler_config.json", {"invert_sigmas": True}, "invert_sigmas is not supported"),
    ("scheduler/scheduler_config.json", {"shift_terminal": 0.1}, "shift_terminal is not supported"),
    ("scheduler/scheduler_config.json", {"time_shift_type": "linear"}, "time_shift_type must be 'exponential'"),
    ("scheduler/scheduler_config.json", {"num_train_timesteps": 500}, "num_train_timesteps must be 1000"),
    ("scheduler/scheduler_config.json", {"shift": "three"}, "shift must be a positive number, got 'three'"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "change", "message"), SETTINGS, ids=[f"{n}-{'-'.join(c)}" for n, c, _ in SETTINGS])
def test_wrong_settings(copy, name, change, message):
    value = json.loads((copy / name).read_text())
    (copy / name).write_text(json.dumps(value | change))
    refuse(copy, str(copy / name), message)


def test_parts_that_do_not_fit(copy):
    """Shapes agree with each part's own configuration, but the parts do not fit each other."""
    path = copy / "transformer" / "config.json"
    config = json.loads(path.read_text()) | {"enc_hidden_dim": 80}
    path.write_text(json.dumps(config))

    def widen(tensors):
        tensors["txt_in.weight"] = torch.zeros(128, 320)
        tensors.update({f"txt_norm.{k}.weight": torch.ones(80) for k in range(4)})

    edit(transformer_file(copy), widen)
    refuse(copy, str(path), "enc_hidden_dim must be the text encoder's hidden_size = 64, got 80")


def test_latent_channels_that_do_not_fit(copy):
    path = copy / "transformer" / "config.json"
    config = json.loads(path.read_text()) | {"in_channels": 64, "out_channels": 16}
    path.write_text(json.dumps(config))

    def narrow(tensors):
        tensors["img_in.weight"] = torch.zeros(128, 64)
        tensors["proj_out.weight"], tensors["proj_out.bias"] = torch.zeros(64, 128), torch.zeros(64)

    edit(transformer_file(copy), narrow)
    refuse(copy, str(path), "in_channels must be the VAE's 4 * latent_channels = 128, got 64")


def test_layer_the_encoder_does_not_have(copy):
    path = copy / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"selected_layer_index": [0, 1, 2, 4]}))
    refuse(copy, str(copy / "text_encoder" / "config.json"), "num_hidden_layers must be at least 5", "got 4")


# ---------------------------------------------------------------------------------------------- sources


def test_embedded_names_come_first(monkeypatch, tmp_path):
    """Not even a folder of that name in the working directory stands before an embedded model."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mini-rl").mkdir()
    for name, folder in EMBEDDED.items():
        shipped = Path(lens.__file__).parent / "mini" / folder
        if (shipped / "model_index.json").is_file():
            assert resolve(name) == shipped
        else:
            with pytest.raises(
                CheckpointError, match=f"'{name}' is not part of this version of Lens; embedded models:"
            ):
                resolve(name)


def test_folder_before_hub(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # must not even be imported
    monkeypatch.chdir(tmp_path)
    (tmp_path / "someone" / "lens").mkdir(parents=True)
    assert resolve("someone/lens") == Path("someone/lens")
    assert resolve(tmp_path) == tmp_path
    for name in ("nothing", "./nowhere/lens", "/nowhere/lens", "a/b/c", ""):
        with pytest.raises(CheckpointError, match=re.escape(repr(name))):
            resolve(name)


def test_hub_id(monkeypatch, tmp_path, expected):
    """Fetched by huggingface_hub; the variant is read from the id, and from the cache's folder name too."""
    snapshot = tmp_path / "models--someone--Lens-Turbo" / "snapshots" / "0123abcd"
    shutil.copytree(FOLDER, snapshot)
    asked = []
    hub = types.SimpleNamespace(snapshot_download=lambda name, **_: asked.append(name) or str(snapshot))
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    pipe = fresh("someone/Lens-Turbo", variant=None)
    assert asked == ["someone/Lens-Turbo"]
    assert pipe.defaults.variant == "turbo"
    assert torch.equal(pipe(**CALL, guidance_scale=5.0).images, expected)
    assert variant_hint(snapshot) == "models--someone--Lens-Turbo"

    def fail(name, **_):
        raise OSError("no connection")

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=fail))
    with pytest.raises(CheckpointError, match=r"'someone/gone' is neither a folder here nor a hub id .* no connection"):
        fresh("someone/gone")
