"""Parts from several places, in the names that people have: the picture of the released folder, or one sentence what to do."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lens
from lens import LensConfig, LensTransformer2DModel
from lens.formats.files import CheckpointError
from lens.formats.hub import EMBEDDED
from lens.formats.names import PREFIXES
from lens.formats.parts import find
from lens.formats.released import config_of_tensors, load_scheduler, load_transformer, released_tensors
from lens.formats.safetensors import open_shards, stored_as
from lens.formats.text_encoder import config_of_tensors as encoder_config
from lens.formats.text_encoder import load_text_encoder, text_encoder_tensors
from lens.formats.vae import load_vae
from lens.sampler import Scheduler
from tests.small_pipeline import FOLDER, fresh, shared

CALL = dict(prompt="a red apple", seed=1, height=32, width=32, num_inference_steps=1, output_type="latent")
WEIGHTS = {
    "transformer": "diffusion_pytorch_model.safetensors", "text_encoder": "model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
}  # fmt: skip


@pytest.fixture(scope="module")
def tensors():
    return {part: load_file(FOLDER / part / name) for part, name in WEIGHTS.items()}


@pytest.fixture
def copy(tmp_path):
    root = tmp_path / "Lens-Turbo"
    shutil.copytree(FOLDER, root, ignore=shutil.ignore_patterns("expected.safetensors", "cases.json"))
    return root


def refuse(message, **places):
    with pytest.raises(CheckpointError, match=message):
        fresh(**places)


# ------------------------------------------------------------------------------------------------ names


def comfyui_encoder(tensors):
    """ComfyUI's names of GPT-OSS: no "model.", experts [experts, outputs, inputs] as .weight, biases as .bias."""
    out = {
        "tokenizer_json": torch.tensor(list((FOLDER / "tokenizer" / "tokenizer.json").read_bytes()), dtype=torch.uint8)
    }
    for key, value in tensors.items():
        name = key.removeprefix("model.")
        if ".experts." in name and name.endswith("_bias"):
            out[name.removesuffix("_bias") + ".bias"] = value
        elif ".experts." in name:
            out[f"{name}.weight"] = value.transpose(1, 2).contiguous()
        elif not name.startswith("lm_head"):
            out[name] = value
    return out


def flux_vae(tensors):
    """The names of FLUX.2's own VAE, by hand: stages of the decoder counted from the other end, attention as convolutions."""
    out = {}
    for key, value in tensors.items():
        name = re.sub(r"\.down_blocks\.(\d)\.resnets\.(\d)\.", r".down.\1.block.\2.", key)
        name = re.sub(r"\.up_blocks\.(\d)\.", lambda m: f".up.{3 - int(m[1])}.", name).replace(".resnets.", ".block.")
        name = re.sub(r"\.down_blocks\.(\d)\.downsamplers\.0\.", r".down.\1.downsample.", name).replace(
            ".upsamplers.0.", ".upsample."
        )
        name = name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
        name = name.replace("mid_block.block.0", "mid.block_1").replace("mid_block.block.1", "mid.block_2")
        name = name.replace("mid_block.attentions.0.group_norm", "mid.attn_1.norm").replace(
            "mid_block.attentions.0.to_out.0", "mid.attn_1.proj_out"
        )
        name = re.sub(r"mid_block\.attentions\.0\.to_(\w)", r"mid.attn_1.\1", name)
        name = re.sub("^quant_conv", "encoder.quant_conv", re.sub("^post_quant_conv", "decoder.post_quant_conv", name))
        if re.search(r"attn_1\.(q|k|v|proj_out)\.weight", name):
            value = value[..., None, None].contiguous()
        out[name] = value
    return out


def test_three_single_files_in_comfyuis_names(tensors, tmp_path):
    """Each with its config.json beside it, and the tokenizer inside the text encoder's."""
    files = {}
    for part, renamed in (
        ("transformer", {f"model.diffusion_model.{k}": v for k, v in tensors["transformer"].items()}),
        ("text_encoder", comfyui_encoder(tensors["text_encoder"])), ("vae", flux_vae(tensors["vae"])),
    ):  # fmt: skip
        (tmp_path / part).mkdir()
        files[part] = tmp_path / part / f"lens_turbo_{part}.safetensors"
        save_file(renamed, files[part])
        shutil.copy(FOLDER / part / "config.json", tmp_path / part)
    shutil.copy(FOLDER / "tokenizer" / "chat_template.jinja", tmp_path / "text_encoder")
    pipe = fresh(
        files["transformer"], variant=None, text_encoder=files["text_encoder"], vae=files["vae"], tokenizer=FOLDER
    )
    assert pipe.defaults.variant == "turbo"  # by the file's name
    expected = shared()(**CALL, guidance_scale=1.0).images
    assert torch.equal(pipe(**CALL).images, expected)
    again = fresh(**files)  # the default source is not read
    assert again.text_encoder.tokenizer.encode("a cat", 512, "reference", None)
    assert again.fingerprint == pipe.fingerprint


@pytest.mark.parametrize("prefix", PREFIXES)
def test_every_prefix_of_a_transformer(tensors, tmp_path, prefix):
    path = tmp_path / "x.safetensors"
    save_file({prefix + key: value for key, value in tensors["transformer"].items()}, path)
    shutil.copy(FOLDER / "transformer" / "config.json", tmp_path)
    model = load_transformer(find(FOLDER, transformer=path).transformer, torch.bfloat16, "cpu")
    assert all(
        torch.equal(value, tensors["transformer"][key]) for key, value in released_tensors(model, torch.bfloat16)
    )


def test_parts_in_place_of_a_folders_own(tensors, copy, tmp_path):
    """A file takes the folder's configuration; a folder may be the part's own or a whole checkpoint's."""
    file = tmp_path / "finetune.safetensors"
    save_file({k: v * 2 if k == "proj_out.bias" else v for k, v in tensors["transformer"].items()}, file)
    shutil.rmtree(copy / "transformer")
    shutil.copytree(FOLDER / "transformer", copy / "transformer", ignore=shutil.ignore_patterns("*.safetensors"))
    shutil.rmtree(copy / "vae")
    pipe = fresh(copy, transformer=file, vae=FOLDER, tokenizer=FOLDER / "tokenizer" / "tokenizer.json")
    assert torch.equal(pipe.transformer.image_out.bias, tensors["transformer"]["proj_out.bias"].float() * 2)
    assert pipe.fingerprint != shared().fingerprint
    assert fresh(copy, transformer=FOLDER / "transformer", vae=FOLDER / "vae").fingerprint == shared().fingerprint


def test_a_configuration_by_the_tensors(tmp_path):
    """Where a file has no config.json: sizes by the tensors, all else as released."""
    config = LensConfig(num_layers=1, num_attention_heads=2, in_channels=16, out_channels=4, enc_hidden_dim=40)
    save_file(dict(released_tensors(LensTransformer2DModel(config), torch.float32)), tmp_path / "x.safetensors")
    found = config_of_tensors(stored_as(open_shards(tmp_path / "x.safetensors")), tmp_path)
    assert found == config
    loaded = load_transformer(
        find("mini", tmp_path / "x.safetensors", FOLDER, FOLDER).transformer, torch.float32, "cpu"
    )
    assert loaded.config == found


def test_vae_and_encoder_without_a_configuration(tensors, tmp_path):
    found = encoder_config(text_encoder_tensors(FOLDER / "text_encoder"), FOLDER)
    config = json.loads((FOLDER / "text_encoder" / "config.json").read_text())
    known = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_local_experts",
        "vocab_size",
    )
    assert {key: found[key] for key in known} == {key: config[key] for key in known}
    save_file(flux_vae(tensors["vae"]), tmp_path / "vae.safetensors")
    vae = load_vae(find("mini", FOLDER, FOLDER, tmp_path / "vae.safetensors").vae, torch.float32, "cpu")
    assert all(torch.equal(vae.state_dict()[k], v.float()) for k, v in tensors["vae"].items() if "num_batches" not in k)


# ------------------------------------------------------------------------------------------------ what lies beside


def test_no_scheduler_and_no_index(copy):
    shutil.rmtree(copy / "scheduler")
    (copy / "model_index.json").unlink()
    pipe = fresh(copy, variant=None)
    assert pipe.scheduler == load_scheduler(None) == Scheduler() == shared().scheduler
    assert (pipe.defaults.variant, pipe.fingerprint) == ("turbo", shared().fingerprint)


@pytest.mark.parametrize("change", ["missing", "bfloat16"])
def test_a_counter_that_nothing_reads(copy, tensors, change):
    kept = {k: v.bfloat16() if k.endswith("num_batches_tracked") else v for k, v in tensors["vae"].items()}
    if change == "missing":
        del kept["bn.num_batches_tracked"]
    save_file(kept, copy / "vae" / WEIGHTS["vae"])
    assert fresh(copy).fingerprint == shared().fingerprint


def test_variants_as_diffusers_chooses_them(copy, tensors):
    """The default first; a named one where a part has it; one alone is the default; several need a name."""
    folder = copy / "transformer"
    changed = {k: v * 2 if k == "proj_out.bias" else v for k, v in tensors["transformer"].items()}
    save_file(changed, folder / "diffusion_pytorch_model.fp16.safetensors")
    save_file(changed, folder / "diffusion_pytorch_model_ema.safetensors")
    assert fresh(copy).fingerprint == shared().fingerprint
    other = fresh(copy, weights_variant="fp16")
    assert torch.equal(other.transformer.image_out.bias, changed["proj_out.bias"].float())
    refuse(r"no weights of the variant 'fp8', expected files such as diffusion_pytorch_model\.fp8\.safetensors",
           folder=copy, weights_variant="fp8")  # fmt: skip
    (folder / WEIGHTS["transformer"]).unlink()
    refuse(
        r"got diffusion_pytorch_model\.fp16\.safetensors, diffusion_pytorch_model_ema\.safetensors: name the file",
        folder=copy,
    )
    (folder / "diffusion_pytorch_model_ema.safetensors").unlink()
    assert fresh(copy).fingerprint == other.fingerprint
    keys = sorted(changed)
    (folder / "diffusion_pytorch_model.fp16.safetensors").unlink()
    weight_map = {}
    for k, part in enumerate((keys[:40], keys[40:]), 1):
        name = f"diffusion_pytorch_model.fp16-{k:05d}-of-00002.safetensors"
        save_file({key: changed[key] for key in part}, folder / name)
        weight_map |= dict.fromkeys(part, name)
    (folder / "diffusion_pytorch_model.safetensors.index.fp16.json").write_text(json.dumps({"weight_map": weight_map}))
    assert fresh(copy, weights_variant="fp16").fingerprint == other.fingerprint


# ------------------------------------------------------------------------------------------------ what to do


def test_a_transformer_alone_says_what_is_missing():
    refuse(r"these are a Lens transformer .*: name the other parts with --text-encoder and --vae, or a whole checkpoint's folder",
           folder=FOLDER / "transformer" / WEIGHTS["transformer"])  # fmt: skip
    refuse("these are a VAE", folder=FOLDER / "vae" / WEIGHTS["vae"], text_encoder=FOLDER)


def test_a_parts_folder_or_a_folder_of_files_says_what_it_is(tmp_path):
    refuse(
        "folder not found, expected the released layout; this is the folder of a vae: give the folder above",
        folder=FOLDER / "vae",
    )
    save_file({"x": torch.zeros(1)}, tmp_path / "lens.safetensors")
    refuse(r"it has the single file lens\.safetensors: give the file itself", folder=tmp_path)
    refuse(r"lens\.safetensors: no Lens transformer: img_in\.weight is missing; keys are such as x",
           folder=tmp_path / "lens.safetensors", text_encoder=FOLDER, vae=FOLDER)  # fmt: skip
    refuse(
        "nowhere: not found, expected a .safetensors file or a folder with the vae",
        folder=FOLDER,
        vae=tmp_path / "nowhere",
    )
    refuse("a file is the transformer, and .* was given as one, too",
           folder=tmp_path / "lens.safetensors", transformer=FOLDER, text_encoder=FOLDER, vae=None)  # fmt: skip


FOREIGN = {
    "scaled_fp8": ({"scaled_fp8": torch.zeros(2)}, r"scaled fp8 weights \(scaled_fp8\), which are not read yet"),
    "comfyui": ({"proj_out.comfy_quant": torch.zeros(2)}, r"weights quantised by ComfyUI \(proj_out\.comfy_quant\)"),
    "lora": (
        {"img_in.lora_A.weight": torch.zeros(2)},
        r"a LoRA \(img_in\.lora_A\.weight\): load it beside a model, with --lora",
    ),
}


@pytest.mark.parametrize(("extra", "message"), FOREIGN.values(), ids=FOREIGN)
def test_foreign_tensors_are_named(copy, tensors, extra, message):
    save_file(tensors["transformer"] | extra, copy / "transformer" / WEIGHTS["transformer"])
    refuse(f"1 unexpected keys, first .*; these are {message}", folder=copy)


def test_another_model_is_named(copy):
    save_file({"double_blocks.0.img_attn.qkv.weight": torch.zeros(1)}, copy / "transformer" / WEIGHTS["transformer"])
    refuse(r"94 keys missing, .*; these are a Flux transformer", folder=copy)
    save_file({"model.diffusion_model.a": torch.zeros(1)}, copy / "transformer" / WEIGHTS["transformer"])
    refuse(r"keys begin with model\.diffusion_model\.: a ComfyUI file", folder=copy)


def test_settings_that_would_be_obeyed_are_not(copy):
    """Another attention, code from a hub, gigabytes of labels: none of it belongs to a text encoder of Lens."""
    path = copy / "text_encoder" / "config.json"
    foreign = {
        "attn_implementation": "org/repo",
        "_attn_implementation": "flex_attention",
        "num_labels": 10**9,
        "auto_map": {"a": "b"},
    }
    path.write_text(json.dumps(json.loads(path.read_text()) | foreign))
    model = load_text_encoder(copy / "text_encoder", torch.float32, "cpu")
    plain = load_text_encoder(FOLDER / "text_encoder", torch.float32, "cpu")
    assert model.config._attn_implementation == plain.config._attn_implementation
    assert model.config.num_labels == 2


# ------------------------------------------------------------------------------------------------ an adapter that names its base


def adapter_of(folder, base, alpha=4):
    """A folder of peft's for the golden checkpoint: one layer, r = 2."""
    config = json.loads((FOLDER / "transformer" / "config.json").read_text())
    width, module = config["num_attention_heads"] * config["attention_head_dim"], "transformer_blocks.1.attn.img_qkv"
    sides = {"A": (2, width), "B": (3 * width, 2)}
    generator = torch.Generator().manual_seed(4)
    numbers = {
        f"base_model.model.{module}.lora_{side}.weight": torch.randn(shape, generator=generator) * 0.1
        for side, shape in sides.items()
    }
    folder.mkdir(exist_ok=True)
    save_file(numbers, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": alpha, "base_model_name_or_path": base}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def test_an_adapters_folder_is_the_model_it_names_with_it(tmp_path):
    style = adapter_of(tmp_path / "style", str(FOLDER))
    pipe, beside = fresh(style), fresh()
    assert pipe.fingerprint != beside.fingerprint
    assert pipe.fingerprint != fresh(adapter_of(tmp_path / "stronger", str(FOLDER), alpha=5)).fingerprint
    assert pipe.defaults == beside.defaults
    plain = beside(**CALL).images
    beside.load_lora(style)
    drawn = pipe(**CALL).images
    assert torch.equal(drawn, beside(**CALL).images)
    assert not torch.equal(drawn, plain)
    assert pipe.loras == []
    pipe.unload_lora()  # it is part of these weights
    assert torch.equal(pipe(**CALL).images, drawn)
    assert torch.equal(fresh(style, transformer=FOLDER / "transformer")(**CALL).images, plain)
    index = {"_class_name": "LensPipeline", "lens": {"variant": "turbo", "base_resolution": 64}}
    (style / "model_index.json").write_text(json.dumps(index))
    assert fresh(style, variant=None).defaults.base_resolution == 64


@pytest.mark.parametrize("base", [None, "someone/lens", "./nothing", 5])
def test_an_adapters_base_is_embedded_or_here(tmp_path, base):
    style = adapter_of(tmp_path / "style", base)
    refuse(
        r"adapter_config.json: base_model_name_or_path must be an embedded model or the folder of a whole one",
        folder=style,
    )
    refuse("base_model_name_or_path must be", folder=adapter_of(tmp_path / "on it", str(style)))


@pytest.mark.parametrize("name", ["mini-rl", "mini-turbo"])
def test_an_embedded_adapter_draws_on_its_base(name):
    """By its name alone, with its own defaults, and not as the base does."""
    if not (Path(lens.__file__).parent / "mini" / EMBEDDED[name] / "model_index.json").is_file():
        pytest.skip(f"{name} is not part of this version")
    base, pipe = lens.LensPipeline.from_pretrained("mini"), lens.LensPipeline.from_pretrained(name)
    own = json.loads((Path(lens.__file__).parent / "mini" / EMBEDDED[name] / "model_index.json").read_text())["lens"]
    assert pipe.defaults.num_inference_steps == own["num_inference_steps"]
    assert pipe.defaults.guidance_scale == own["guidance_scale"]
    call = dict(height=64, width=64, num_inference_steps=2, guidance_scale=1.0, seed=1, output_type="latent")
    ours, theirs = (p("a red apple", **call).images[0] for p in (pipe, base))
    assert torch.isfinite(ours).all()
    apart = (ours - theirs).norm() / theirs.norm()
    assert 0.001 < apart < 0.5
