"""Loading: every layout that must load, and every broken one refused with the file, the key and what was expected."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lens
from lens import LensConfig, LensPipeline, LensTransformer2DModel
from lens.cli.options import MODEL
from lens.formats.files import CheckpointError
from lens.formats.hub import EMBEDDED, resolve, shipped, variant_hint
from lens.formats.names import released_names
from lens.formats.released import load_transformer, released_config, save_transformer, transformer_config
from lens.formats.safetensors import open_shards, save_tensors
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
    assert shared().text_encoder.model.__class__.__name__ == "GptOss"


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
    write_header(transformer_file(copy), {KEY: {"dtype": "F32", "shape": [1, 2], "data_offsets": [0, 8]}}, bytes(8))
    refuse(copy, str(transformer_file(copy)), "keys missing")


def write_header(path: Path, header, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(shape=(2,), offsets=(0, 8), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


HEADERS = {
    "overlap": ({"a": entry(), "b": entry(offsets=(4, 12))}, "b overlaps the tensor before it"),
    "gap": ({"a": entry(), "b": entry(offsets=(12, 20))}, "b leaves 4 bytes before it unused"),
    "trailing": ({"a": entry()}, "16 bytes after the last tensor belong to none"),
    "twice": (b'{"a": 1, "a": 2}', "broken safetensors header: not valid JSON: the key 'a' comes twice"),
    "1e999": (b'{"a": {"dtype": "F32", "shape": [1e999], "data_offsets": [0, 8]}}', "1e999 is no finite number"),
    "float": ({"a": entry((2.0,))}, "a must have a dtype, at most 16 whole dimensions and two offsets"),
    "true": ({"a": entry((True,))}, "a must have a dtype, at most 16 whole dimensions"),
    "digits": (b'{"a": ' + b"9" * 5000 + b"}", "an integer of 5000 digits"),
    "huge": ({"a": entry((2**60, 2**60))}, "a has the impossible shape"),
    "negative": ({"a": entry((-2,))}, "a has the impossible shape"),
    "dimensions": ({"a": entry((1,) * 100_000)}, "at most 16 whole dimensions"),
    "deep": (b'{"a": ' * 100_000, "nested too deep"),
    "mark": (b'\xef\xbb\xbf{"__metadata__": {}}', "expected '{' as its first byte, got b'\\xef\\xbb\\xbf{\"__m'"),
    "space": (b" {}", "expected '{' as its first byte, got b' {}'"),
    "list": (b"[]", "expected '{' as its first byte, got b'[]'"),
    "no entry": ({"a": 7}, "a must have dtype, shape and data_offsets, got 7"),
    "metadata": ({"__metadata__": 5}, "__metadata__ must be an object of strings"),
    "numbers": ({"__metadata__": {"format": 1}}, "__metadata__ must be an object of strings"),
    "surrogate": (b'{"__metadata__": {"a": "\\ud800"}}', "not valid JSON: 'utf-8' codec can't encode"),
}


@pytest.mark.parametrize(("header", "message"), HEADERS.values(), ids=HEADERS)
def test_a_header_is_read_as_strictly_as_it_is_written(tmp_path, header, message):
    path = write_header(tmp_path / "model.safetensors", header, bytes(24))
    with pytest.raises(CheckpointError, match=re.escape(message)) as error:
        open_shards(tmp_path)
    assert str(error.value).startswith(str(path))


KINDS = {
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "is a git-lfs pointer, not the weights; run `git lfs pull`"),
    "gguf": (b"GGUF" + bytes(20), "is a GGUF file"),
    "zip": (b"PK\x03\x04" + bytes(20), "is a pickle, which could run any code when it is read and is refused on purpose"),
    "pickle": (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", "is a pickle"),
    "page": (b"<!DOCTYPE html><html>", "is a web page; download the file itself"),
}  # fmt: skip


@pytest.mark.parametrize(("data", "message"), KINDS.values(), ids=KINDS)
def test_a_file_of_another_kind_is_named(tmp_path, data, message):
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=re.escape(message)):
        open_shards(tmp_path)


def test_a_length_that_looks_like_a_pickle_is_none(tmp_path):
    header = b'{"__metadata__": {"a": "' + b"x" * (0x280 - 27) + b'"}}'
    assert len(header) == 0x280
    assert open_shards(write_header(tmp_path / "a.safetensors", header)) == {}


@pytest.mark.parametrize("kind", ["link", "folder", "pipe", "device", "long"])
@pytest.mark.parametrize(
    "name", ["transformer/diffusion_pytorch_model.safetensors", "vae/config.json", "model_index.json"]
)
def test_what_is_no_file_is_refused_before_it_is_read(copy, kind, name):
    """A named pipe or a device would never end."""
    path = copy / name
    path.unlink()
    message = {"link": "file not found: a link to nowhere", "folder": "expected a file, got a folder",
               "pipe": "expected a file, got a named pipe", "device": "expected a file, got a device", "long": ""}[kind]  # fmt: skip
    if kind == "long":
        if "safetensors" not in name:
            return
        path.with_name(path.name + ".index.json").write_text(json.dumps({"weight_map": {KEY: "x" * 5000}}))
        refuse(copy, "expected a 'weight_map' object of keys and file names")
        return
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("nowhere" if kind == "link" else "/dev/zero")
    refuse(copy, str(path), message)


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


def test_key_in_two_shards(copy):
    index, value = sharded(copy)
    other = index.with_name(next(n for n in value["weight_map"].values() if n != value["weight_map"][KEY]))
    edit(other, lambda tensors: tensors.update({KEY: torch.zeros(384, 128)}))
    refuse(copy, KEY, "is also in")


def test_prefixed_and_plain_names_in_one_file(copy):
    def wrap(tensors):
        for key in list(tensors):
            tensors[f"net.{key}"] = tensors.pop(key)
        tensors |= {"x": torch.zeros(1), "net.x": torch.zeros(1)}

    edit(transformer_file(copy), wrap)
    refuse(copy, "both x and net.x, expected one of them")


def test_no_weights_at_all(copy):
    transformer_file(copy).unlink()
    refuse(copy, str(copy / "transformer"), "no .safetensors file")
    (copy / "transformer" / "diffusion_pytorch_model.bin").write_bytes(b"")
    refuse(copy, "no .safetensors file; it has diffusion_pytorch_model.bin, a pickle, which could run any code")


# ---------------------------------------------------------------------------------------------- broken settings


def test_what_came_may_be_long_and_the_message_is_not(copy):
    path = copy / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"time_shift_type": "a" * 100_000 + "z"}))
    message = refuse(copy, str(path), "time_shift_type must be 'exponential', got 'aaaa", "aaaz'")
    assert len(message) < 2000


JSON_FILES = [
    "model_index.json", "transformer/config.json", "text_encoder/config.json", "vae/config.json",
    "scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json",
]  # fmt: skip


@pytest.mark.parametrize("content", BAD_JSON.values(), ids=BAD_JSON.keys())
@pytest.mark.parametrize("name", JSON_FILES)
def test_broken_json(copy, name, content):
    (copy / name).write_bytes(content.encode("latin-1"))
    refuse(copy, str(copy / name), "JSON")


@pytest.mark.parametrize("name", [n for n in JSON_FILES if n.count("config") and n[0] in "tv" and "token" not in n])
def test_missing_json(copy, name):
    (copy / name).unlink()
    refuse(copy, str(copy / name), "file not found")


@pytest.mark.parametrize("part", ["transformer", "text_encoder", "tokenizer", "vae"])
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
    ("model_index.json", {"lens": {"num_inference_steps": 1001}}, "lens.num_inference_steps must be an integer from 1 to 1000"),
    ("transformer/config.json", {"num_layers": "3"}, "num_layers must be a positive integer, got '3'"),
    ("transformer/config.json", {"num_layers": 0}, "num_layers must be a positive integer, got 0"),
    ("transformer/config.json", {"num_layers": 2**40}, "num_layers must be at most 1048576, got 1099511627776"),
    ("transformer/config.json", {"num_layers": 900}, "num_layers is 900, more than the keys stored in"),
    ("transformer/config.json", {"num_attention_heads": 10**9}, "num_attention_heads must be at most 1048576, got 1000000000"),
    ("transformer/config.json", {"num_attention_heads": 2**20}, "num_attention_heads * attention_head_dim must be at most"),
    ("transformer/config.json", {"enc_hidden_dim": 10**100}, "enc_hidden_dim must be at most 1048576, got 1000"),
    ("transformer/config.json", {"selected_layer_index": [0] * 100_000}, "selected_layer_index must be at most 64, got 100000"),
    ("text_encoder/config.json", {"num_experts_per_tok": -1}, "num_experts_per_tok must be a whole number from 1 to"),
    ("text_encoder/config.json", {"num_experts_per_tok": 5}, "num_experts_per_tok must be 1 to num_local_experts = 4, got 5"),
    ("text_encoder/config.json", {"sliding_window": None}, "sliding_window must be a positive whole number"),
    ("text_encoder/config.json", {"layer_types": ["other"] * 4}, "layer_types must be a list of sliding_attention and full"),
    ("text_encoder/config.json", {"layer_types": ["full_attention"]}, "not a configuration of GPT-OSS"),
    ("text_encoder/config.json", {"swiglu_limit": "x"}, "swiglu_limit must be a positive number, got x"),
    ("text_encoder/config.json", {"num_key_value_heads": 3}, "num_key_value_heads must divide num_attention_heads = 4"),
    ("text_encoder/config.json", {"num_hidden_layers": 999}, "num_hidden_layers is 999, more than the keys stored"),
    ("text_encoder/config.json", {"vocab_size": 10**400 // 10**100}, "vocab_size must be a whole number from 1 to"),
    ("vae/config.json", {"batch_norm_eps": None}, "batch_norm_eps must be a number from 0 to 1, got None"),
    ("vae/config.json", {"norm_num_groups": -1}, "norm_num_groups: not a configuration of AutoencoderKLFlux2: expected 1 to"),
    ("vae/config.json", {"layers_per_block": 10**5}, "layers_per_block: not a configuration of AutoencoderKLFlux2: expected 1"),
    ("scheduler/scheduler_config.json", {"use_dynamic_shifting": "false"}, "use_dynamic_shifting must be true or false, got"),
    ("model_index.json", {"lens": {"base_resolution": 7}}, "lens.base_resolution must be"),
    ("model_index.json", {"lens": {"base_resolution": 2**40}}, "lens.base_resolution must be"),
    ("model_index.json", {"lens": {"guidance_scale": True}}, "lens.guidance_scale must be a number >= 0, got True"),
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


def test_no_model_is_offered_that_is_not_shipped():
    """A name may be kept for later; help, docstrings, errors and documents speak of what can be had."""
    with pytest.raises(CheckpointError) as refused:
        resolve("mini-nonsense")
    texts = {
        "error": str(refused.value).partition("expected")[2],
        "help": MODEL,
        "call": LensPipeline.from_pretrained.__doc__,
    }
    assert re.search(r"\bmini-rl\b", texts["help"])
    root = Path(lens.__file__).parents[1]
    asked = re.compile(r"""(?:--model |-m |from_pretrained\(")(mini[\w-]*)(?![\w/-])""")
    documents = [root / "README.md", *(root / "docs").glob("*.md")]
    offered = {
        (name, found) for name, text in texts.items() for found in re.findall(r"(?<![\w/.])mini(?:-\w+)?\b", text)
    }
    offered |= {(file.name, found) for file in documents for found in asked.findall(file.read_text())}
    assert {"error", "help", "call", "README.md"} <= {where for where, _ in offered}
    assert {(where, name) for where, name in offered if name not in shipped()} == set()


def test_folder_before_hub(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # must not even be imported
    monkeypatch.chdir(tmp_path)
    (tmp_path / "someone" / "lens").mkdir(parents=True)
    assert resolve("someone/lens") == Path("someone/lens")
    assert resolve(tmp_path) == tmp_path
    for name in ("nothing", "./nowhere/lens", "/nowhere/lens", "a/b/c", ""):
        with pytest.raises(CheckpointError, match=re.escape(repr(name))):
            resolve(name)


class Hub(types.ModuleType):
    """huggingface_hub as far as we use it, over folders here."""

    def __init__(self, repositories: dict[str, Path]):
        super().__init__("huggingface_hub")
        self.repositories, self.fetched, self.revisions = repositories, [], set()

    def list_repo_files(self, name, revision=None):
        root = self.repositories[name]
        self.revisions.add(revision)
        return [p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()]

    def hf_hub_download(self, name, file, revision=None):
        path = self.repositories[name] / file
        self.revisions.add(revision)
        if not path.is_file():
            from huggingface_hub.errors import EntryNotFoundError

            raise EntryNotFoundError(file)
        self.fetched.append(file)
        return str(path)

    def snapshot_download(self, name, revision=None, allow_patterns=None, local_files_only=False):
        self.fetched += allow_patterns or ["everything fetched before"]
        self.revisions.add(revision)
        return str(self.repositories[name])


@pytest.fixture
def hub(monkeypatch, tmp_path):
    import huggingface_hub.errors

    made = Hub({})
    made.__path__ = huggingface_hub.__path__
    monkeypatch.setitem(sys.modules, "huggingface_hub", made)
    return made


def test_hub_id(hub, tmp_path, expected):
    """The index first, then only what is loaded; the variant is read from the id, and from the cache's folder name too."""
    snapshot = tmp_path / "models--someone--Lens-Turbo" / "snapshots" / "0123abcd"
    shutil.copytree(FOLDER, snapshot)
    sharded(snapshot)
    (snapshot / "text_encoder" / "original").mkdir()
    (snapshot / "reasoner").mkdir()  # fetched, and read where --reason asks for it
    for extra in (
        "lens.gguf",
        "reasoner/model.safetensors",
        "transformer/diffusion_pytorch_model.fp16.safetensors",
        "text_encoder/original/m.safetensors",
    ):
        (snapshot / extra).write_bytes(b"")
    hub.repositories["someone/Lens-Turbo"] = snapshot
    pipe = fresh("someone/Lens-Turbo", variant=None)
    assert hub.fetched[:2] == ["model_index.json", "transformer/diffusion_pytorch_model.safetensors.index.json"]
    read = [p.relative_to(snapshot).as_posix() for p in snapshot.rglob("*") if p.suffix != ".gguf" and p.is_file()]
    unread = (
        "fp16.safetensors",
        "original/m.safetensors",
        "generation_config.json",
        "cases.json",
        "expected.safetensors",
    )
    assert sorted(set(hub.fetched)) == sorted(file for file in read if not file.endswith(unread))
    assert pipe.defaults.variant == "turbo"
    assert torch.equal(pipe(**CALL, guidance_scale=5.0).images, expected)
    assert variant_hint(snapshot) == "models--someone--Lens-Turbo"


def test_a_wrong_hub_id_costs_its_index_alone(hub, tmp_path, monkeypatch):
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    hub.repositories["someone/flux"] = tmp_path
    refuse("someone/flux", "_class_name must be LensPipeline, got 'FluxPipeline': another model")
    assert hub.fetched == ["model_index.json"]
    (tmp_path / "model_index.json").unlink()
    (tmp_path / "diffusion_models").mkdir()
    (tmp_path / "diffusion_models" / "lens_bf16.safetensors").write_bytes(b"")
    refuse("someone/flux", "it has diffusion_models/lens_bf16.safetensors; single files: download them and name them")
    assert hub.fetched == ["model_index.json"]

    def fail(*_, **__):
        raise OSError("no connection")

    monkeypatch.setattr(hub, "hf_hub_download", fail)
    refuse("someone/gone", "'someone/gone' is neither a folder here nor a hub id", "no connection")
    monkeypatch.undo()


def test_without_a_connection_what_was_fetched_before_is_loaded(hub, monkeypatch):
    def fail(*_, **__):
        raise ConnectionError("no connection")

    hub.repositories["someone/lens"] = FOLDER
    monkeypatch.setattr(hub, "list_repo_files", fail)
    assert resolve("someone/lens") == FOLDER
    assert hub.fetched == ["model_index.json", "everything fetched before"]


def test_without_a_connection_what_was_never_fetched_is_said_so(hub, monkeypatch):
    from huggingface_hub.errors import LocalEntryNotFoundError

    def fail(*_, **__):
        raise LocalEntryNotFoundError("a paragraph about outgoing traffic and local_files_only")

    for name in ("hf_hub_download", "snapshot_download"):
        monkeypatch.setattr(hub, name, fail)
    refuse("someone/lens", "'someone/lens': no folder here, not fetched before, and the hub cannot be reached")


def test_a_revision_is_asked_for_once_and_its_commit_from_then_on(hub, tmp_path):
    snapshot = tmp_path / "snapshots" / "0123abcd"
    shutil.copytree(FOLDER, snapshot)
    hub.repositories["someone/lens"] = snapshot
    assert resolve("someone/lens", revision="v1.0") == snapshot
    assert hub.revisions == {"v1.0", "0123abcd"}


def test_a_revision_of_a_folder_is_not_read_and_said_so():
    with pytest.warns(UserWarning, match="revision 'main' is not read"):
        assert resolve(FOLDER, revision="main") == FOLDER
