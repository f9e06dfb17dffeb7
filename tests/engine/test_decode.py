"""The CPU's pixel decoder: diffusers' function, its own bits on any number of threads, from the weights as they are."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from lens.engine import decode, fixed_blocks
from lens.formats.vae import load_vae
from lens.vae import PixelCodec
from tests.small_pipeline import FOLDER, counted

LEVELS = dict(
    down_block_types=["DownEncoderBlock2D"] * 3, up_block_types=["UpDecoderBlock2D"] * 3, block_out_channels=[8, 16, 24],
    latent_channels=4, norm_num_groups=4, layers_per_block=1,
)  # fmt: skip


def made(**changes):
    from diffusers import AutoencoderKLFlux2

    torch.manual_seed(0)
    vae = AutoencoderKLFlux2(**{**LEVELS, **changes}).eval().requires_grad_(False)
    for parameter in vae.parameters():  # what is zero or one at first would hide a norm that is left out
        if parameter.dim() == 1:
            parameter += 0.3 * torch.randn_like(parameter)
    return vae


def latents(vae, height: int = 6, width: int = 10) -> Tensor:
    return torch.randn(1, vae.config.latent_channels, height, width, generator=torch.Generator().manual_seed(1))


def error(found: Tensor, exact: Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", ["released kind", "no attention, no 1x1", "golden"])
@torch.no_grad()
def test_it_is_as_near_to_the_exact_image_as_diffusers(kind, dtype):
    if kind == "golden":
        vae = load_vae(FOLDER / "vae", torch.float32, "cpu")
    else:
        vae = made(
            **({} if kind == "released kind" else {"mid_block_add_attention": False, "use_post_quant_conv": False})
        )
    z, vae = latents(vae).to(dtype), vae.to(dtype)
    exact = copy.deepcopy(vae).double().decode(z.double(), return_dict=False)[0]
    ours, theirs = decode.Decoder(vae)(z), vae.decode(z, return_dict=False)[0]
    assert ours.dtype == dtype
    assert ours.shape == theirs.shape
    if dtype == torch.float64:
        assert error(ours, exact) < 1e-13
    else:
        assert error(ours, exact) <= 1.1 * error(theirs, exact) + 2 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_bits_do_not_depend_on_the_number_of_threads(monkeypatch, dtype):
    """In blocks so small that every layer has several, and in blocks as they are."""
    vae, counts, each = made().to(dtype), [], fixed_blocks.each
    z, decoder = latents(vae, 9, 7).to(dtype), decode.Decoder(vae)
    monkeypatch.setattr(fixed_blocks, "each", lambda blocks: (counts.append(len(blocks)), each(blocks)))
    before = torch.get_num_threads()
    for small in (True, False):
        if small:
            monkeypatch.setattr(decode, "_BLOCK_FLOPS", 40_000)
            monkeypatch.setattr(decode, "_BLOCK_ROWS", 16)
            monkeypatch.setattr(decode, "_BLOCK_CHANNELS", 8)
        images = []
        try:
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                images.append(decoder(z))
                assert torch.get_num_threads() == threads
        finally:
            torch.set_num_threads(before)
        assert torch.equal(images[0], images[1])
        assert torch.equal(images[0], images[2])
        if small:
            assert min(counts) > 1
            monkeypatch.undo()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_doubled_pixel_meets_summed_taps(dtype):
    """Ones in, taps out: each parity's kernel sums to the taps that its pixels meet, rounded once."""
    weight = torch.randn(3, 2, 3, 3, generator=torch.Generator().manual_seed(2)).to(dtype)
    kernels = decode.folded(weight)
    assert kernels.shape == (2, 2, 3, 2, 2, 2)
    taps = weight.float() if dtype == torch.bfloat16 else weight
    assert torch.equal(kernels[0, 0, ..., 0, 0], weight[..., 0, 0])
    assert torch.equal(kernels[0, 1, ..., 1, 1], (taps[..., 1:, 2].sum(-1)).to(dtype))
    assert torch.equal(kernels[1, 0, ..., 0, 1], (taps[..., :2, 1] + taps[..., :2, 2]).sum(-1).to(dtype))


@torch.no_grad()
def test_it_reads_weights_as_they_are():
    vae = made()
    z, decoder = latents(vae), decode.Decoder(vae)
    first = decoder(z)
    vae.decoder.up_blocks[0].upsamplers[0].conv.weight.mul_(2)
    second = decoder(z)
    assert not torch.equal(first, second)
    assert error(second, vae.decode(z, return_dict=False)[0].double()) < 1e-5
    vae.decoder.up_blocks[0].upsamplers[0].conv.weight.data.div_(2)  # which torch does not count
    assert torch.equal(decoder(z), first)
    vae.decoder.conv_out.weight.data = torch.zeros_like(vae.decoder.conv_out.weight)
    assert torch.equal(decoder(z), vae.decoder.conv_out.bias.view(1, 3, 1, 1).expand_as(first))


def test_the_codec_takes_it_where_it_serves():
    vae = made()
    codec, rows = PixelCodec(vae), torch.randn(6, 16)
    with counted(vae, "decode") as calls:
        ours = codec.decode(rows, (2, 3))
        assert calls == []
        handle = vae.decoder.conv_in.register_forward_hook(lambda *_: None)
        theirs = codec.decode(rows, (2, 3))
        assert len(calls) == 1
        handle.remove()
    assert ours.shape == (16, 24, 3)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda vae: vae.register_to_config(act_fn="relu"), "the activation relu"),
        (lambda vae: vae.register_to_config(up_block_types=["AttnUpDecoderBlock2D"]), "blocks AttnUpDecoderBlock2D"),
        (lambda vae: vae.enable_tiling(), "its tiling is on"),
        (lambda vae: vae.decoder.to("meta"), "not on a CPU"),
        (lambda vae: vae.decoder.mid_block.register_forward_pre_hook(lambda *_: None), "a forward hook"),
        (lambda vae: delattr(vae, "decoder"), "it has no decoder"),
    ],
)
def test_what_it_leaves_to_diffusers(change, reason):
    vae = made()
    assert decode.why_unserved(vae) == ""
    change(vae)
    assert reason in decode.why_unserved(vae)


def test_an_error_in_a_block_reaches_the_caller():
    def fail() -> None:
        raise KeyError("block")

    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            with pytest.raises(KeyError, match="block"):
                fixed_blocks.each([lambda: None, fail])
    finally:
        torch.set_num_threads(before)
