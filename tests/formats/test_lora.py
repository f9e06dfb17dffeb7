"""LoRAs: held to peft on an independent Lens, merged into fused weights, taken out again bit for bit, refused when wrong."""

import json
import re
import signal
import struct
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lens import LensPipeline
from lens.engine.residency import PRESETS
from lens.formats import lora
from lens.formats.files import CheckpointError
from lens.formats.patterns import fullmatch
from lens.formats.released import load_transformer, released_tensors
from tests.reference_model import ReferenceLens, as_lens, relative
from tests.small_pipeline import FOLDER, counted, fresh, same_bits

CONFIG = json.loads((FOLDER / "transformer" / "config.json").read_text())
ATTENTION = ["img_qkv", "txt_qkv", "to_out.0", "to_add_out"]
MLP = ["img_mlp.w1", "img_mlp.w3", "img_mlp.w2", "txt_mlp.w1", "txt_mlp.w3"]
OTHERS = ["img_mod.1", "img_in", "txt_in", "proj_out", "norm_out.linear", "timestep_embedder.linear_2"]
KEY = "base_model.model.transformer_blocks.0.attn.img_qkv.lora_A.weight"


def with_peft(seed=3, targets=(*ATTENTION, *MLP, *OTHERS), **settings):
    """An independent Lens with the golden weights under a random peft adapter."""
    peft = pytest.importorskip("peft")
    reference = ReferenceLens(CONFIG)
    reference.load_state_dict(load_file(next((FOLDER / "transformer").glob("*.safetensors"))))
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": list(targets), **settings})
    model = peft.get_peft_model(reference.float().eval(), config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.1)
    return model


@pytest.fixture(scope="module")
def peft_model():
    return with_peft(
        rank_pattern={"img_mlp.w1": 2}, alpha_pattern={"txt_qkv": 3, r"transformer_blocks\.1\.attn.img_qkv": 9}
    )


@pytest.fixture(scope="module")
def folder(peft_model, tmp_path_factory):
    path = tmp_path_factory.mktemp("style")
    peft_model.save_pretrained(path)
    return path


def lens():
    return load_transformer(FOLDER / "transformer", torch.float32, "cpu")


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def inputs():
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(2, 12, CONFIG["in_channels"], generator=generator)
    text = [torch.randn(2, 5, CONFIG["enc_hidden_dim"], generator=generator) for _ in CONFIG["selected_layer_index"]]
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    return image, text, mask, torch.tensor([0.3, 0.8])


def test_the_picture_of_peft(peft_model, folder):
    """peft's own forward pass, adapters beside the weights, on every kind of layer; w1 and w3 apart, ranks and alphas mixed."""
    ours, (image, text, mask, t) = lens(), inputs()
    plain = ours(image, text, mask, t, [(1, 3, 4)])
    found = lora.read(folder)
    assert len(found.pairs) == 3 * (len(ATTENTION) + len(MLP) + 1) + 5
    lora.Adapters(ours).add(found, 1.0)
    with torch.no_grad():
        theirs = peft_model(image, text, mask, t, (3, 4))
        with peft_model.disable_adapter():
            base = peft_model(image, text, mask, t, (3, 4))
    assert relative(plain, base) < 1e-5
    assert relative(base, theirs) > 0.1  # the adapter matters
    assert relative(ours(image, text, mask, t, [(1, 3, 4)]), theirs) < 1e-5


@pytest.mark.parametrize("rslora", [False, True])
def test_the_weights_of_pefts_merge(tmp_path, rslora):
    model = with_peft(use_rslora=rslora)
    model.save_pretrained(tmp_path)
    ours = lens()
    lora.Adapters(ours).add(lora.read(tmp_path), 1.0)
    merged = as_lens(model.merge_and_unload(), CONFIG).requires_grad_(False)
    for (name, p), q in zip(ours.named_parameters(), merged.parameters()):
        assert relative(p, q) < 1e-6, name


def test_bfloat16_is_rounded_once_and_comes_back(folder):
    exact, model, found = lens(), lens().bfloat16(), lora.read(folder)
    before = weights(model)
    loaded = lora.Adapters(model)
    with torch.no_grad():
        for p in exact.parameters():
            p.copy_(p.bfloat16())
    lora.Adapters(exact).add(found, 0.7)
    loaded.add(found, 0.7)
    for (name, p), q in zip(model.named_parameters(), exact.parameters()):
        assert torch.equal(p, q.bfloat16()), name
    loaded.add(found, -0.7)  # two of them cancel: summed before they are rounded
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert len(loaded.loaded) == 2
    loaded.clear()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not loaded.loaded
    assert loaded.clear() == set()


def single_file(folder, path, prefix, metadata=True, alpha=None):
    tensors = load_file(folder / lora.WEIGHTS)
    tensors = {prefix + key.removeprefix("base_model.model."): value for key, value in tensors.items()}
    if alpha is not None:
        for key in [k for k in tensors if "lora_A" in k]:
            tensors[key.replace(".lora_A.weight", ".alpha")] = torch.tensor(alpha)
    config = json.loads((folder / lora.CONFIG).read_text())
    keep = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")
    packed = {lora.METADATA: json.dumps({f"transformer.{k}": config[k] for k in keep})}
    save_file(tensors, path, packed if metadata else None)
    return path


def test_diffusers_files_and_bare_ones(folder, tmp_path):
    whole = lora.read(folder)
    packed = lora.read(single_file(folder, tmp_path / "a.safetensors", "transformer."))
    assert packed.fingerprint == whole.fingerprint
    bare = lora.read(single_file(folder, tmp_path / "b.safetensors", "", metadata=False))
    assert {pair.factor for pair in bare.pairs.values()} == {1.0}  # nothing says alpha: r
    assert bare.fingerprint != whole.fingerprint
    alpha = lora.read(single_file(folder, tmp_path / "c.safetensors", "diffusion_model.", False, 8.0))
    assert {pair.factor for pair in alpha.pairs.values()} == {2.0, 4.0}  # ranks 4 and 2
    assert lora.read(folder / lora.WEIGHTS).fingerprint == whole.fingerprint  # the configuration lies beside it


def damaged(path, change):
    tensors = load_file(path / lora.WEIGHTS)
    change(tensors)
    save_file(tensors, path / lora.WEIGHTS)


def renamed(tensors, old, new):
    for key in [k for k in tensors if old in k]:
        tensors[key.replace(old, new)] = tensors.pop(key)


FAULTS = {
    "nan": (lambda t: t[KEY].view(-1)[3].fill_(float("nan")), r"img_qkv\.lora_A\.weight holds NaN or infinity"),
    "one side": (lambda t: t.pop(KEY), r"blocks\.0\.attn\.img_qkv has lora_B alone, expected lora_A and lora_B"),
    "other model": (lambda t: renamed(t, "attn.img_qkv", "attn.qkv"), r"blocks\.0\.attn\.qkv is no linear layer of this"),
    "shape": (
        lambda t: t.update({KEY: torch.zeros(4, 96)}),
        r"img_qkv must adapt a weight of shape \[384, 128\], got lora_B @ lora_A of \[384, 96\]",
    ),
    "rank": (lambda t: t.update({KEY: torch.zeros(3, 128)}), r"lora_A \[3, 128\] and lora_B \[384, 4\] do not share a rank"),
    "dora": (
        lambda t: t.update({KEY.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(4)}),
        r"a magnitude must have shape \[384, 1\] or \[1, 128\], got \[4\]",
    ),
    "tucker": (lambda t: t.update({KEY.replace("lora_A", "lora_mid"): torch.ones(4, 4)}), "is no LoRA of a linear layer"),
    "bias of B": (lambda t: t.update({KEY.replace("lora_A.weight", "lora_B.bias"): torch.ones(384)}), "is no LoRA of a linear"),
    "two kinds": (lambda t: t.update({KEY.replace("lora_A.weight", "lokr_w1"): torch.ones(4, 4)}), "expected one kind of adapter"),
    "integers": (lambda t: t.update({KEY: torch.ones(4, 128, dtype=torch.int64)}), r"has dtype torch\.int64, expected a float"),
    "no matrix": (lambda t: t.update({KEY: torch.ones(4, 128, 1)}), r"of shape \[4, 128, 1\] is no LoRA of a linear layer"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_file_is_refused_and_changes_nothing(folder, tmp_path, fault):
    for name in (lora.WEIGHTS, lora.CONFIG):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    change, message = FAULTS[fault]
    damaged(tmp_path, change)
    pipe = fresh()
    before = weights(pipe.transformer)
    with pytest.raises(CheckpointError, match=message):
        pipe.load_lora(tmp_path)
    assert not pipe.loras
    assert all(torch.equal(p, before[name]) for name, p in pipe.transformer.named_parameters())


def test_a_truncated_or_missing_file_is_refused(folder, tmp_path):
    (tmp_path / lora.CONFIG).write_bytes((folder / lora.CONFIG).read_bytes())
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors: file not found; a LoRA is"):
        lora.read(tmp_path)
    whole = (folder / lora.WEIGHTS).read_bytes()
    for size in (4, 200, len(whole) - 1):
        (tmp_path / lora.WEIGHTS).write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors: truncated"):
            lora.read(tmp_path)
    (tmp_path / lora.WEIGHTS).write_bytes(struct.pack("<Q", 2) + b"{}")
    with pytest.raises(CheckpointError, match="holds no LoRA"):
        lora.read(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "BOFT"}, "peft_type must be one of LORA, LOKR, LOHA, got 'BOFT'"),
        ({"use_dora": True}, "use_dora is set, but adapter_model.safetensors has no magnitude vectors"),
        ({"rank_pattern": [4]}, "rank_pattern must be an object of at most 2000 patterns"),
        ({"rank_pattern": {"(": 4}}, r"rank_pattern: '\(' is no pattern that is read here: it ends too early"),
        (
            {"alpha_pattern": {"(?=a)": 4}},
            "alpha_pattern: .* is no pattern that is read here: a group that looks around",
        ),
        ({"alpha_pattern": {"([a-z_.0]+)+X": 4}, "rank_pattern": {}, "r": 5}, "must have rank r = 5"),
        ({"lora_alpha": 10**300}, "lora_alpha of .* must be a number, got '1000"),
        ({"bias": "all"}, "bias must be 'none', got 'all'"),
        ({"modules_to_save": ["proj_out"]}, "modules_to_save is not supported"),
        ({"r": 5}, "must have rank r = 5, got 4"),
        ({"lora_alpha": "6"}, "lora_alpha of .* must be a number, got '6'"),
    ],
)
def test_a_configuration_that_means_something_else_is_refused(folder, tmp_path, change, message):
    (tmp_path / lora.WEIGHTS).write_bytes((folder / lora.WEIGHTS).read_bytes())
    config = json.loads((folder / lora.CONFIG).read_text())
    (tmp_path / lora.CONFIG).write_text(json.dumps({**config, **change}))
    with pytest.raises(CheckpointError, match=message):
        lora.read(tmp_path)


def test_broken_settings_inside_a_file_are_refused(folder, tmp_path):
    tensors = load_file(folder / lora.WEIGHTS)
    for text, message in (
        ("[1]", "lora_adapter_metadata in its header: expected a JSON object"),
        ("[" * 100_000, "nested too deep"),
        ('{"r": ' + "9" * 5000 + "}", "an integer of 5000 digits"),
        ('{"transformer.lora_alpha": 1e999}', "1e999 is no finite number"),
    ):
        save_file(tensors, tmp_path / "a.safetensors", {lora.METADATA: text})
        with pytest.raises(CheckpointError, match=message):
            lora.read(tmp_path / "a.safetensors")


def test_what_is_no_lora_is_named(tmp_path):
    save_file(load_file(next((FOLDER / "vae").glob("*.safetensors"))), tmp_path / "vae.safetensors")
    with pytest.raises(CheckpointError, match=r"vae\.safetensors: .* is no LoRA of a linear layer"):
        lora.read(tmp_path / "vae.safetensors")
    with pytest.raises(CheckpointError, match=r"file not found; a LoRA is a \.safetensors file or a folder"):
        lora.read(tmp_path / ("x" * 5000))
    (tmp_path / "pytorch_lora_weights.bin").write_bytes(b"PK")
    (tmp_path / "vae.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"file not found; .*; it has pytorch_lora_weights\.bin, a pickle"):
        lora.read(tmp_path)


# ------------------------------------------------------------------------------------------------ dialects

QKV, OUT, NORM = (
    "transformer_blocks.0.attn.img_qkv",
    "transformer_blocks.1.attn.to_out.0",
    "transformer_blocks.0.img_norm1",
)
W1 = "transformer_blocks.2.txt_mlp.w1"
SHAPES = {QKV: (384, 128), OUT: (128, 128), W1: (341, 128)}


@pytest.fixture(scope="module")
def base():
    return lens()


@pytest.fixture(scope="module")
def factors():
    generator = torch.Generator().manual_seed(5)
    return {
        m: (torch.randn(4, i, generator=generator), torch.randn(o, 4, generator=generator))
        for m, (o, i) in SHAPES.items()
    }


def keys(factors, name="{}", down="lora_A.weight", up="lora_B.weight", flat=False):
    """Every module's two matrices under a spelling of its name."""
    spelled = {m: name.format(m.replace(".", "_") if flat else m) for m in factors}
    return {f"{spelled[m]}.{side}": value for m, pair in factors.items() for side, value in zip((down, up), pair)}


def changes(base, path):
    """Released name -> what the file adds to that weight of the golden model, where it adds anything."""
    model = lens()
    lora.Adapters(model).add(lora.read(path, model), 1.0)
    old = dict(released_tensors(base, torch.float32))
    new = {key: value - old[key] for key, value in released_tensors(model, torch.float32)}
    return {key: value for key, value in new.items() if value.any()}


def same(got, expected):
    assert sorted(got) == sorted(expected)
    for key, value in expected.items():
        assert relative(got[key], value) < 1e-5, key


SPELLINGS = {
    "peft": {"name": "base_model.model.{}"},
    "diffusers": {"name": "transformer.{}"},
    "bare": {},
    "comfyui": {"name": "diffusion_model.{}"},
    "wrapped": {"name": "transformer.base_model.model.{}", "down": "lora.down.weight", "up": "lora.up.weight"},
    "checkpoint": {"name": "model.diffusion_model.{}", "down": "lora_down.weight", "up": "lora_up.weight"},
    "compiled": {"name": "base_model.model._orig_mod.{}"},
    "named": {"name": "unet.{}", "down": "lora_A.default_0.weight", "up": "lora_B.default_0.weight"},
    "kohya": {"name": "lora_unet_{}", "down": "lora_down.weight", "up": "lora_up.weight", "flat": True},
    "lycoris": {"name": "lycoris_{}", "down": "lora_down.weight", "up": "lora_up.weight", "flat": True},
}


@pytest.mark.parametrize("spelling", SPELLINGS.values(), ids=SPELLINGS)
def test_every_spelling_of_a_name_is_the_models_own(base, factors, tmp_path, spelling):
    save_file(keys(factors, **spelling), tmp_path / "a.safetensors")
    same(changes(base, tmp_path / "a.safetensors"), {f"{m}.weight": up @ down for m, (down, up) in factors.items()})


def test_numbers_of_every_kind(base, factors, tmp_path):
    """Alpha 0-d, of one element, whole or half; matrices in fp8 and as 1x1 convolutions; a text encoder's keys beside."""
    whole = {m: (down.round(), up.round()) for m, (down, up) in factors.items()}
    tensors = keys(whole, "lora_unet_{}", "lora_down.weight", "lora_up.weight", flat=True)
    flat = {m: f"lora_unet_{m.replace('.', '_')}" for m in factors}
    tensors[f"{flat[QKV]}.lora_down.weight"] = whole[QKV][0].to(torch.float8_e4m3fn)
    tensors[f"{flat[OUT]}.lora_down.weight"] = whole[OUT][0][..., None, None].contiguous()
    tensors |= {
        f"{flat[QKV]}.alpha": torch.tensor(2),
        f"{flat[OUT]}.alpha": torch.tensor([1.0]).half(),
        f"{flat[W1]}.alpha": torch.tensor(8.0),
    }
    tensors |= {
        "lora_te_layers_0.lora_down.weight": torch.zeros(4, 8),
        "lora_te_layers_0.lora_up.weight": torch.zeros(8, 4),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.warns(UserWarning, match=r"a\.safetensors: 2 keys of a text encoder are left out"):
        got = changes(base, tmp_path / "a.safetensors")
    scale = {QKV: 0.5, OUT: 0.25, W1: 2.0}
    same(got, {f"{m}.weight": scale[m] * up @ down for m, (down, up) in whole.items()})


@pytest.mark.parametrize(("rank", "factor"), [("4", 0.5), (None, 0.5), ("8", 1.0)])
def test_alpha_of_the_header_counts_where_nothing_else_tells(factors, tmp_path, rank, factor):
    """And for the rank it was written for; another is told."""
    header = {"ss_network_alpha": "2"} | ({"ss_network_dim": rank} if rank else {})
    save_file(keys(factors), tmp_path / "a.safetensors", header)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = lora.read(tmp_path / "a.safetensors")
    assert {pair.factor for pair in found.pairs.values()} == {factor}
    assert any("ss_network_alpha = 2 in its header is for rank 8" in str(w.message) for w in told) == (rank == "8")
    save_file(keys(factors) | {f"{m}.alpha": torch.tensor(1.0) for m in factors}, tmp_path / "a.safetensors", header)
    assert {pair.factor for pair in lora.read(tmp_path / "a.safetensors").pairs.values()} == {0.25}


@pytest.mark.parametrize(
    ("header", "factor", "message"),
    [
        ({"ss_network_alpha": "abc"}, 1.0, "ss_network_alpha in its header must be a number, got 'abc': not used"),
        ({"ss_network_alpha": "1e999"}, 1.0, "ss_network_alpha in its header must be a number, got '1e999': not used"),
        (
            {"ss_network_alpha": "2", "ss_network_dim": "Dynamic"},
            0.5,
            "ss_network_dim in its header must be a number, got",
        ),
    ],
    ids=["word", "infinity", "rank"],
)
def test_numbers_of_the_header_that_are_none_are_told_where_they_count(factors, tmp_path, header, factor, message):
    path = tmp_path / "a.safetensors"
    save_file(keys(factors), path, header)
    with pytest.warns(UserWarning, match=re.escape(f"{path}: {message}")) as told:
        found = lora.read(path)
    assert len(told) == 1
    assert {pair.factor for pair in found.pairs.values()} == {factor}
    save_file(keys(factors) | {f"{m}.alpha": torch.tensor(1.0) for m in factors}, path, header)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert {pair.factor for pair in lora.read(path).pairs.values()} == {0.25}


@pytest.mark.parametrize(
    ("header", "config", "key"),
    [
        (
            {"modelspec.architecture": "flux-1-dev/lora"},
            {},
            "modelspec.architecture in its header names 'flux-1-dev/lora'",
        ),
        (
            {"ss_base_model_version": "a\x1b[2J" + "b" * 200},
            {},
            r"ss_base_model_version in its header names 'a\x1b[2Jb",
        ),
        ({}, {"base_model_name_or_path": "owner/Flux"}, "base_model_name_or_path names 'owner/Flux'"),
        ({"ss_base_model_version": "lens", "modelspec.architecture": "sd/lora"}, {}, None),
        ({"ss_base_model_version": "None"}, {"base_model_name_or_path": "../of/a/trainer"}, None),
    ],
    ids=["architecture", "escapes", "configuration", "lens", "path"],
)
def test_a_lora_of_another_model_is_told_with_both_names(factors, tmp_path, header, config, key):
    file = tmp_path / lora.WEIGHTS
    save_file(keys(factors), file, header)
    (tmp_path / lora.CONFIG).write_text(json.dumps({"r": 4, "lora_alpha": 4, **config}))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        lora.read(tmp_path)
    found = [str(w.message) for w in told]
    if key is None:
        assert found == []
    else:
        assert len(found) == 1
        assert found[0].startswith(f"{tmp_path / lora.CONFIG if config else file}: {key}")
        assert "another model than this Lens" in found[0]
        assert len(found[0]) < 400


def test_nothing_of_a_file_drives_a_terminal(factors, tmp_path):
    """Not from Python either, whose traceback prints an error as it is."""
    save_file(keys(factors), tmp_path / lora.WEIGHTS)
    (tmp_path / lora.CONFIG).write_text(json.dumps({"r": 4, "alpha_pattern": "\x1b[2J\x9b1m"}))
    with pytest.raises(CheckpointError, match=r"got \\x1b\[2J\\x9b1m"):
        lora.read(tmp_path)


def test_alpha_of_the_file_stands_before_the_configurations(factors, tmp_path):
    settings = {"r": 4, "lora_alpha": 4, "alpha_pattern": {"img_qkv": 12}}
    header = {lora.METADATA: json.dumps(settings), "ss_network_alpha": "40"}
    save_file(
        keys(factors) | {f"{OUT}.alpha": torch.tensor(2.0), f"{QKV}.alpha": torch.tensor(1.0)},
        tmp_path / "a.safetensors",
        header,
    )
    found = lora.read(tmp_path / "a.safetensors").pairs
    assert {m: pair.factor for m, pair in found.items()} == {QKV: 0.25, OUT: 0.5, W1: 1.0}


def test_norms_biases_and_whole_differences(base, tmp_path):
    generator = torch.Generator().manual_seed(1)
    wanted = {f"{NORM}.weight": 128, f"{OUT}.bias": 128, f"{QKV}.bias": 384, "txt_norm.1.weight": 64}
    values = {key: torch.randn(n, generator=generator) for key, n in wanted.items()}
    values["proj_out.weight"] = torch.randn(128, 128, generator=generator)
    spelled = {
        f"diffusion_model.{NORM}.diff": values[f"{NORM}.weight"], f"diffusion_model.{OUT}.diff_b": values[f"{OUT}.bias"],
        "lora_unet_transformer_blocks_0_attn_img_qkv.diff_b": values[f"{QKV}.bias"],
        "lycoris_txt_norm_1.w_norm": values["txt_norm.1.weight"], "transformer.proj_out.diff": values["proj_out.weight"],
    }  # fmt: skip
    save_file(spelled, tmp_path / "a.safetensors")
    same(changes(base, tmp_path / "a.safetensors"), values)


def test_split_queries_keys_and_values(base, tmp_path):
    generator = torch.Generator().manual_seed(2)
    names = {"attn.to_q": 0, "attn.to_k": 1, "attn.to_v": 2, "attn.add_k_proj": 1}
    tensors, expected = {}, {f"transformer_blocks.1.attn.{s}_qkv.weight": torch.zeros(384, 128) for s in ("img", "txt")}
    for name, third in names.items():
        down, up = torch.randn(2, 128, generator=generator), torch.randn(128, 2, generator=generator)
        tensors |= {f"transformer.transformer_blocks.1.{name}.lora_{s}.weight": t for s, t in (("A", down), ("B", up))}
        stream = "txt" if "add" in name else "img"
        expected[f"transformer_blocks.1.attn.{stream}_qkv.weight"][third * 128 : (third + 1) * 128] = up @ down
    tensors["transformer.transformer_blocks.1.attn.to_v.diff_b"] = torch.ones(128)
    expected["transformer_blocks.1.attn.img_qkv.bias"] = torch.cat([torch.zeros(256), torch.ones(128)])
    save_file(tensors, tmp_path / "a.safetensors")
    same(changes(base, tmp_path / "a.safetensors"), expected)


def test_kronecker_and_hadamard_products(base, tmp_path):
    """LyCORIS's formulas: kron(w1, w2) alpha / rank of the factored side, (a1 b1) * (a2 b2) alpha / r."""
    g = torch.Generator().manual_seed(3)
    r = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    w1, a2, b2 = r(8, 4), r(48, 3), r(3, 32)
    a1, b1, c2, d2 = r(341, 2), r(2, 128), r(341, 2), r(2, 128)
    tensors = {
        f"lycoris_{QKV.replace('.', '_')}.lokr_w1": w1, f"lycoris_{QKV.replace('.', '_')}.lokr_w2_a": a2,
        f"lycoris_{QKV.replace('.', '_')}.lokr_w2_b": b2, f"lycoris_{QKV.replace('.', '_')}.alpha": torch.tensor(6.0),
        f"{OUT}.lokr_w1": w1.clone(), f"{OUT}.lokr_w2": r(16, 32), f"{OUT}.alpha": torch.tensor(99.0),
        f"diffusion_model.{W1}.hada_w1_a": a1, f"diffusion_model.{W1}.hada_w1_b": b1, f"diffusion_model.{W1}.hada_w2_a": c2,
        f"diffusion_model.{W1}.hada_w2_b": d2, f"diffusion_model.{W1}.alpha": torch.tensor(1.0),
    }  # fmt: skip
    save_file(tensors, tmp_path / "a.safetensors")
    expected = {
        f"{QKV}.weight": torch.kron(w1, a2 @ b2) * 2,
        f"{OUT}.weight": torch.kron(w1, tensors[f"{OUT}.lokr_w2"]),
        f"{W1}.weight": (a1 @ b1) * (c2 @ d2) / 2,
    }
    same(changes(base, tmp_path / "a.safetensors"), expected)


@pytest.mark.parametrize("kind", ["LoKrConfig", "LoHaConfig", "dora"])
def test_pefts_other_adapters(tmp_path, kind):
    """Merged by peft itself: alpha of its configuration, names, the magnitude's norm."""
    peft = pytest.importorskip("peft")
    reference = ReferenceLens(CONFIG)
    reference.load_state_dict(load_file(next((FOLDER / "transformer").glob("*.safetensors"))))
    targets = ["img_qkv", "txt_mlp.w1", "to_out.0"]
    if kind == "dora":
        config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets, use_dora=True)
    else:
        config = getattr(peft, kind)(r=4, alpha=6, target_modules=targets)
    model = peft.get_peft_model(reference.float().eval(), config)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if any(leaf in name for leaf in ("lora_", "lokr_", "hada_")):
                p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    model.save_pretrained(tmp_path)
    ours = lens()
    lora.Adapters(ours).add(lora.read(tmp_path, ours), 1.0)
    merged = as_lens(model.merge_and_unload(), CONFIG).requires_grad_(False)
    for (name, p), q in zip(ours.named_parameters(), merged.parameters()):
        assert relative(p, q) < 1e-5, name


def test_a_magnitude_of_columns_and_half_a_scale(base, factors, tmp_path):
    """W + s (W' - W): nothing at 0, peft's W' at 1."""
    magnitude = torch.rand(1, 128) + 0.5
    save_file(keys({OUT: factors[OUT]}) | {f"{OUT}.dora_scale": magnitude}, tmp_path / "a.safetensors")
    weight = dict(released_tensors(base, torch.float32))[f"{OUT}.weight"]
    turned = weight + factors[OUT][1] @ factors[OUT][0]
    expected = magnitude * turned / turned.norm(dim=0, keepdim=True) - weight
    same(changes(base, tmp_path / "a.safetensors"), {f"{OUT}.weight": expected})
    model = lens()
    lora.Adapters(model).add(lora.read(tmp_path / "a.safetensors"), 0.5)
    assert relative(dict(released_tensors(model, torch.float32))[f"{OUT}.weight"], weight + expected / 2) < 1e-5


@pytest.mark.parametrize("name", ["pytorch_lora_weights.safetensors", "my_style.safetensors"])
def test_a_folder_as_diffusers_saves_it_or_with_one_file(factors, tmp_path, name):
    save_file(keys(factors, "transformer.{}"), tmp_path / name)
    assert sorted(lora.read(tmp_path).pairs) == sorted(SHAPES)


PATTERNS = [
    "img_mlp.w1", r"transformer_blocks\.1\.attn.img_qkv", r"^transformer_blocks\.[0-2]\..*qkv$", "(img|txt)_mlp.w[13]", r"\d+\.attn.*",
    "a{2,3}b?", "[^.]+", r"(?:ab)*\w?", "x*?y", "(a|ab)(c|bcd)", r"\bqkv\b", "", "a|", "[]a]", r"[\w-]+", "w{1}", ".{3}",
]  # fmt: skip


def test_patterns_match_as_pythons_do():
    texts = [*SHAPES, "img_mlp.w1", "aab", "aaab", "abab", "abcd", "xxy", "qkv", "", "a", "]", "a-b", "w", "a\nb"]
    for pattern in PATTERNS:
        for text in texts:
            assert fullmatch(pattern, text) == bool(re.fullmatch(pattern, text)), (pattern, text)


@pytest.mark.parametrize(
    "pattern",
    ["(", ")", "a**", "*a", "[a", r"a\1", "(?i)a", "(?<=a)b", "a{2,1}", "a++", "\\", "(" * 7 + ")" * 7, "a" * 501],
)
def test_patterns_that_are_not_read(pattern):
    with pytest.raises(ValueError, match=r"\w"):
        fullmatch(pattern, "a")


# ------------------------------------------------------------------------------------------------ pipeline


def draw(pipe):
    return pipe(
        "a red apple", height=32, width=48, num_inference_steps=3, guidance_scale=2.0, seed=5, output_type="latent"
    ).images


@pytest.mark.parametrize("residency", [None, "trimmed", PRESETS["lean"]], ids=["none", "trimmed", "lean"])
def test_a_picture_is_that_of_merged_weights_and_the_old_one_after_unloading(folder, tmp_path, residency):
    """Modulation included: tables made before must not be used after, wherever the weights live."""
    model, found = lens(), lora.read(folder)
    lora.Adapters(model).add(found, 0.8)
    expected = fresh()
    expected.transformer = model
    pipe = LensPipeline.from_pretrained(FOLDER, variant="lens", device="cpu", residency=residency)
    before = draw(pipe)
    pipe.load_lora(folder, 0.8)
    assert pipe.loras == [(folder.name, found.fingerprint, 0.8)]
    after = draw(pipe)
    assert same_bits(after, draw(expected))
    assert not torch.equal(after, before)
    pipe.unload_lora()
    assert pipe.loras == []
    assert same_bits(draw(pipe), before)
    pipe.load_lora(folder, 0.0)
    assert same_bits(draw(pipe), before)


def test_tables_are_forgotten_where_modulation_changes(folder, tmp_path):
    """Weights evicted to the host have versions nobody watches."""
    pipe = fresh()
    with counted(pipe._tables, "forget") as calls:
        pipe.load_lora(folder)
        pipe.unload_lora()
    assert len(calls) == 2
    for name in (lora.WEIGHTS, lora.CONFIG):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    damaged(tmp_path, lambda tensors: [tensors.pop(key) for key in list(tensors) if "attn" not in key])
    with counted(pipe._tables, "forget") as calls:
        pipe.load_lora(tmp_path)
    assert not calls


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), "1", True, 10**400])
def test_a_scale_that_is_no_number_is_refused(folder, scale):
    pipe = fresh()
    with pytest.raises(ValueError, match="load_lora: scale must be a finite number"):
        pipe.load_lora(folder, scale)


def test_peft_is_not_needed(folder):
    code = (
        "import sys; sys.modules['peft'] = None\n"
        "from lens import LensPipeline\n"
        f"pipe = LensPipeline.from_pretrained({str(FOLDER)!r}, variant='lens', device='cpu')\n"
        f"pipe.load_lora({str(folder)!r}, 0.5); print(pipe.loras[0][2])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False
    )
    assert done.stdout == "0.5\n", done.stderr


def test_an_adapter_of_lens_applies_to_turbo(folder):
    """The same shapes: only steps and guidance differ."""
    pipe = fresh(variant="turbo")
    plain = np.asarray(pipe("a red apple", height=32, width=32, seed=1).images[0])
    pipe.load_lora(folder)
    assert not np.array_equal(np.asarray(pipe("a red apple", height=32, width=32, seed=1).images[0]), plain)


@pytest.mark.parametrize("first", [False, True], ids=["the first", "another"])
@pytest.mark.parametrize("stop", ["ctrl-c", "ctrl-c at the end", "memory"])
def test_all_of_an_adapter_is_merged_or_nothing(folder, monkeypatch, stop, first):
    """Also under a second Ctrl-C while the first is being undone."""
    pipe = fresh()
    if first:
        pipe.load_lora(folder, 0.5)
    before, loras, merge, calls = weights(pipe.transformer), pipe.loras, lora.Adapters._merge, []

    def interrupted(self, weight, name, parts):
        merge(self, weight, name, parts)
        calls.append(name)
        if stop == "memory" and len(calls) == 7:
            raise torch.OutOfMemoryError("simulated")
        if stop != "memory" and len(calls) in ((7, 9) if stop == "ctrl-c" else (len(before_names),)):
            signal.raise_signal(signal.SIGINT)

    before_names = {lora.modules_of(pipe.transformer)[m][0] for m in lora.read(folder).pairs}
    monkeypatch.setattr(lora.Adapters, "_merge", interrupted)
    with pytest.raises(torch.OutOfMemoryError if stop == "memory" else KeyboardInterrupt):
        pipe.load_lora(folder)
    monkeypatch.undo()
    assert pipe.loras == loras
    assert same_bits(list(weights(pipe.transformer).values()), list(before.values()))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    pipe.load_lora(folder, 0.5)
    pipe.unload_lora()
    assert same_bits(list(weights(pipe.transformer).values()), list(weights(fresh().transformer).values()))
