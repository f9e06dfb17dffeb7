"""VTP's autoencoder from a folder in the released layout: numbers of its own code, and what is refused."""

import json

import pytest
import torch
from safetensors.torch import save_file

from lens import CheckpointError
from train.ablations.vtp import VtpAutoencoder, VtpLatents, settings_of

SIZES = {
    "vision_embed_dim": 32, "vision_depth": 2, "vision_num_heads": 2, "vision_feature_bottleneck": 8,
    "decoder_embed_dim": 24, "decoder_num_heads": 3, "decoder_depth": 2,
}  # fmt: skip
KINDS = {
    "released": {},
    "others": {
        "vision_use_qk_norm": True, "decoder_use_qk_norm": True, "vision_init_values": 1e-2, "decoder_init_values": 1e-2,
        "vision_ffn_layer": "mlp", "decoder_ffn_layer": "swiglu64", "vision_norm_layer": "layernormbf16",
    },
}  # fmt: skip
# What VTPModel at commit 5ce1eb6 computes of the same weights and pixels: a token, another, pixels, the sum of all tokens' sizes
RECORDED = {
    "released": (
        [2.204678535, 0.880127609, 0.491419047, 0.163035139, -0.174369663, -0.209714070, -0.431725562, -0.506474674],
        [1.955916882, 1.100376010, 0.367968261, 0.177769363, -0.108754329, -0.306524247, -0.352161288, -0.538338423],
        [[43, 216, 0], [220, 55, 136], [188, 35, 216], [21, 203, 55]],
        60.729076959,
    ),
    "others": (
        [2.307110786, 0.817831099, 0.509067535, 0.180184737, -0.208386123, -0.177553356, -0.448870897, -0.508486152],
        [2.083677292, 1.055721045, 0.351361513, 0.226178393, -0.159326032, -0.275375396, -0.355371803, -0.558457494],
        [[74, 187, 13], [215, 50, 151], [158, 65, 188], [33, 202, 46]],
        62.420701353,
    ),
}


def filled(name, shape):
    """Weights that the name alone decides."""
    if name.endswith("periods"):  # as VTP makes them, in bfloat16
        return 100.0 ** (2 * torch.arange(shape[0], dtype=torch.bfloat16) / (2 * shape[0]))
    count, k = torch.Size(shape).numel(), sum(name.encode()) % 97
    wave = torch.sin(torch.arange(count, dtype=torch.float64) * (0.37 + 0.011 * k) + k)
    if name.endswith(("norm.weight", "norm1.weight", "norm2.weight", "gamma")):
        wave = 1 + 0.2 * wave
    else:
        wave *= 0.1 if len(shape) < 2 else torch.Size(shape[1:]).numel() ** -0.5
    return wave.view(shape).float()


def written(folder, kind="released", config=(), drop=(), add=()):
    """A folder as `save_pretrained` writes it: parts that are not read are in the file, too."""
    given = {"model_type": "vtp", "architectures": ["VTPModel"], "text_depth": 1, **SIZES, **KINDS[kind]}
    (folder / "config.json").write_text(json.dumps({**given, **dict(config)}))
    with torch.device("meta"):
        model = VtpAutoencoder(settings_of(folder / "config.json"))
    tensors = {name: filled(name, list(t.shape)) for name, t in model.state_dict().items() if name not in drop}
    for name in (
        "token_embedding.weight",
        "text_transformer.resblocks.0.ln_1.bias",
        "visual_proj.weight",
        "logit_scale",
    ):
        tensors[name] = torch.zeros(2, 2)
    save_file({**tensors, **dict(add)}, folder / "model.safetensors")
    statistics = {"mean": torch.linspace(-1, 1, 8).view(1, 8, 1, 1), "std": torch.linspace(0.5, 2, 8).view(1, 8, 1, 1)}
    torch.save(statistics, folder / "latents_stats.pt")
    return folder


@pytest.fixture
def pixels():
    return torch.randint(0, 256, (2, 32, 48, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", list(KINDS))
def test_tokens_and_pixels_are_those_of_its_own_code(tmp_path, pixels, kind):
    codec = VtpLatents.of_folder(written(tmp_path, kind))
    tokens = codec.encode(pixels)
    assert tokens.shape == (2, 2 * 3, codec.channels) == (2, 6, 8)
    one, other, shown, total = RECORDED[kind]
    assert torch.allclose(tokens[0, 1], torch.tensor(one), atol=2e-4)
    assert torch.allclose(tokens[1, 5], torch.tensor(other), atol=2e-4)
    assert tokens.double().abs().sum().item() == pytest.approx(total, abs=1e-2)
    back = codec.decode(tokens, (2, 3))
    assert (back.shape, back.dtype) == (pixels.shape, torch.uint8)
    assert (back[1, 5, 10:14].int() - torch.tensor(shown)).abs().max() <= 1


def test_large_calls_are_cut_and_change_no_number(tmp_path, pixels, monkeypatch):
    codec = VtpLatents.of_folder(written(tmp_path))
    whole = codec.encode(pixels)
    monkeypatch.setattr("train.ablations.vtp.CALL_PIXELS", 32 * 48)
    assert torch.allclose(codec.encode(pixels), whole, atol=1e-5)


def test_other_weights_or_statistics_have_another_fingerprint(tmp_path):
    one = VtpLatents.of_folder(written(tmp_path))
    again = VtpLatents.of_folder(written(tmp_path))
    norm = VtpLatents.of_folder(written(tmp_path, add={"trunk.norm.weight": torch.ones(32)}))
    torch.save({"mean": torch.zeros(8), "std": torch.ones(8)}, tmp_path / "other.pt")
    plain = VtpLatents.of_folder(written(tmp_path), tmp_path / "other.pt")
    assert one.fingerprint == again.fingerprint
    assert len({one.fingerprint, norm.fingerprint, plain.fingerprint}) == 3


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"drop": ["trunk.blocks.1.attn.qkv.bias"]}, r"1 keys missing, first 'trunk.blocks.1.attn.qkv.bias'"),
        ({"add": {"trunk.storage_tokens": torch.zeros(1, 4, 32)}}, "1 unexpected keys, first 'trunk.storage_tokens'"),
        ({"add": {"pixel_decoder.proj_in.weight": torch.zeros(24, 9, 1, 1)}}, r"shape \[24, 8, 1, 1\], got \[24, 9, 1, 1\]"),
        ({"config": {"model_type": "dinov3_vit"}}, "model_type must be 'vtp', got 'dinov3_vit'"),
        ({"config": {"vision_patch_size": 14}}, "vision_patch_size must be 16, got 14"),
        ({"config": {"vision_ffn_layer": "moe"}}, "vision_ffn_layer must be one of swiglu, .*, got 'moe'"),
        ({"config": {"train_reconstruction": False}}, "train_reconstruction must be true"),
        ({"config": {"decoder_num_heads": 0}}, "decoder_num_heads must be a positive integer, got 0"),
        ({"config": {"vision_num_heads": 3}}, r"a multiple of 4 x vision_num_heads \(3\), got 32"),
    ],
)  # fmt: skip
def test_a_folder_that_is_no_such_model_is_refused(tmp_path, damage, message):
    with pytest.raises(CheckpointError, match=message):
        VtpLatents.of_folder(written(tmp_path, **damage))


def test_statistics_that_are_missing_or_of_another_model_are_refused(tmp_path):
    folder = written(tmp_path)
    (folder / "latents_stats.pt").unlink()
    with pytest.raises(CheckpointError, match=r"latents_stats.pt: file not found: .* generation/latent_stats"):
        VtpLatents.of_folder(folder)
    for found, message in (
        ({"mean": torch.zeros(64), "std": torch.ones(64)}, r"mean must be 8 finite numbers, got shape \[64\]"),
        ({"mean": torch.zeros(8), "std": torch.zeros(8)}, "std must be positive, got 0"),
        ({"mean": torch.zeros(8)}, "expected tensors 'mean' and 'std'"),
    ):
        torch.save(found, folder / "latents_stats.pt")
        with pytest.raises(CheckpointError, match=message):
            VtpLatents.of_folder(folder)


def test_sides_that_are_no_multiples_are_refused(tmp_path):
    codec = VtpLatents.of_folder(written(tmp_path))
    with pytest.raises(ValueError, match="32x40 pixels, expected multiples of 16"):
        codec.encode(torch.zeros(1, 32, 40, 3, dtype=torch.uint8))
