"""The fast loop of a CPU: the padded MMDiT is the packed one, a pool of encoded scenes is a law of (seed, turn), resume."""

import argparse
import dataclasses
import json
from types import ModuleType

import pytest
import torch

from lens.config import LensConfig
from lens.formats.released import load_transformer
from lens.model import LensTransformer2DModel
from train import configs
from train import pretrain_on_pool as pooled
from train.__main__ import main
from train.data.pool import Pool, PoolPart
from train.loop.checkpoints import load_state
from train.loop.log import read_log
from train.networks.padded import Padded
from train.networks.warm_start import widened

CONFIG = LensConfig(
    num_layers=3,
    num_attention_heads=2,
    attention_head_dim=16,
    in_channels=8,
    out_channels=2,
    axes_dims_rope=(4, 6, 6),
    enc_hidden_dim=12,
    selected_layer_index=(0, 1),
)


def model_of(config=CONFIG, seed=0):
    """No weight is zero, so that every part of the model shows."""
    model = LensTransformer2DModel(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    model.batch_invariant = False
    return model


def inputs(batch=4, grid=(2, 3), text=7):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, grid[0] * grid[1], CONFIG.in_channels, generator=generator)
    features = torch.randn(batch, text, 2 * CONFIG.enc_hidden_dim, generator=generator)
    lengths = torch.tensor([text, 3, 0, 1])
    return x, torch.rand(batch, generator=generator), features, lengths, grid


def packed(model, x, t, features, lengths, grid):
    mask = torch.arange(features.shape[1])[None] < lengths[:, None]
    return model(x, list(features.chunk(2, -1)), mask, t, [(1, *grid)])


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.nightly)])
def test_padded_is_the_packed_model_with_its_gradients(compiled):
    model, given = model_of(), inputs()
    want = packed(model, *given)
    want.square().mean().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    got = Padded(model, compiled)(*given)
    got.square().mean().backward()
    torch.testing.assert_close(got, want, rtol=0, atol=2e-6)
    for name, p in model.named_parameters():
        if name in gradients:  # the end of the last text stream has none in either
            torch.testing.assert_close(p.grad, gradients[name], rtol=1e-4, atol=1e-6, msg=name)


def test_bfloat16_products_keep_float32_weights_sums_and_gradients():
    model, given = model_of(), inputs()
    want = Padded(model, False)(*given)
    want.square().mean().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    got = Padded(model, False, torch.bfloat16)(*given)
    got.square().mean().backward()
    assert got.dtype == torch.float32
    assert 0 < (got - want).norm() / want.norm() < 0.02
    for name, p in model.named_parameters():
        if name in gradients:
            assert p.grad.dtype == torch.float32
            assert (p.grad - gradients[name]).norm() < 0.1 * gradients[name].norm() + 1e-6, name


def test_what_pads_a_text_changes_nothing():
    x, t, features, lengths, grid = inputs()
    longer = torch.cat([features, torch.full((4, 5, features.shape[2]), 9.0)], 1)
    model = model_of()
    torch.testing.assert_close(
        Padded(model, False)(x, t, longer, lengths, grid), Padded(model, False)(x, t, features, lengths, grid)
    )


@pytest.mark.parametrize("change", [{"num_layers": 5}, {"num_attention_heads": 3}, {"num_attention_heads": 4}])
def test_a_wider_or_deeper_model_starts_where_the_small_one_is(change):
    small, given = model_of(), inputs()
    with torch.no_grad():  # the final norm takes the mean over all channels: the one thing that width moves
        small.image_in.weight -= small.image_in.weight.mean(0)
        small.image_in.bias -= small.image_in.bias.mean()
        for block in small.layers():
            for linear in (block.image.out, block.image.w2):
                linear.weight -= linear.weight.mean(0)
            block.image.out.bias -= block.image.out.bias.mean()
            block.image.modulation.weight.view(6, 32, -1)[[2, 5]] = 0.0
            block.image.modulation.bias.view(6, 32)[[2, 5]] = 0.3
    wide = widened(small, dataclasses.replace(CONFIG, **change), torch.Generator().manual_seed(2))
    want, got = (Padded(m, False)(*given) for m in (small, wide))
    torch.testing.assert_close(got, want, rtol=0, atol=2e-5)
    got.square().mean().backward()
    if "num_attention_heads" in change:
        assert (wide.layers()[0].image.w2.weight.grad[32:] != 0).any()  # what is new can learn
        assert (wide.layers()[0].image.out.weight.grad[:32, 32:] != 0).any()


def pool_recipe(**changes):
    recipe = ModuleType("recipe")
    recipe.__dict__.update(SEED=1, FIRST_SEED=100, BATCH=4, POOL={"chunk": 40, "kept": 4, "reuse": 2}, **changes)
    return recipe


def chunk(seeds):
    """Every sample's latents are its seed; even seeds have short texts."""
    out = {}
    for bin_, own in ((8, [s for s in seeds if s % 2 == 0]), (16, [s for s in seeds if s % 2])):
        latents = torch.tensor(own, dtype=torch.float16)[:, None, None].expand(-1, 4, 1)
        out[(32, 32), bin_] = PoolPart(latents, torch.zeros(len(own), bin_, 1), torch.full((len(own),), bin_))
    return out


def seeds_of(part):
    return part.latents[:, 0, 0].int().tolist()


def test_every_scene_is_met_about_reuse_times_and_never_twice_in_a_turn():
    pool, met = Pool(pool_recipe(), chunk), []
    for turn in range(12):
        pool.turn_to(turn)
        seen = [seed for _, part in pool.batches(turn) for seed in seeds_of(part)]
        assert len(seen) == len(set(seen)) == 80
        met += seen
    whole = [met.count(seed) for seed in range(100 + 3 * 40, 100 + 12 * 40)]  # those whose every turn was seen
    assert 1.8 < sum(whole) / len(whole) < 2.2
    assert len(pool.chunks) == 4


def test_a_turn_depends_on_its_number_alone():
    one, other = Pool(pool_recipe(), chunk), Pool(pool_recipe(), chunk)
    one.turn_to(0)
    one.turn_to(1)
    other.turn_to(1)
    first, second = ([seeds_of(part) for _, part in pool.batches(1)] for pool in (one, other))
    assert first == second
    one.turn_to(2)
    assert [seeds_of(part) for _, part in one.batches(2)] != first


def test_a_caption_longer_than_every_bin_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"TEXT_BINS: a caption of \d+ tokens is longer than 9"):
        train(tmp_path, 1, TEXT_BINS=(9,))


def train(out, steps, **changes):
    recipe = configs.load("mini/pretrain_128", "pretrain")
    recipe = configs.override(
        recipe,
        [
            "COMPILED=False",
            "GEMM=float32",
            "VALIDATION=4",
            "VALIDATE_EVERY=100",
            "LOG_EVERY=2",
            "BATCH=2",
            "STRAIGHTEN=64",
        ],
    )
    recipe.POOL, recipe.SIZES = {"chunk": 6, "kept": 2, "reuse": 1}, {(64, 64): 0.5, (48, 96): 0.5}
    recipe.TIMES, recipe.TEXT_BINS = (0.1, 0.9), (160,)  # one: more would leave most of so few scenes without a batch
    vars(recipe).update(changes)
    options = argparse.Namespace(
        out=out, stop_after=None, init=configs_root() / "lens/mini/base", steps=steps, decay=0, lr_scale=1.0,
        config="mini/pretrain_128",
    )  # fmt: skip
    pooled.train(recipe, options)
    return load_state(out / "pretrain.pt", "pretrain")


def configs_root():
    from train.networks.text_path import ROOT

    return ROOT


def test_training_resumes_bit_for_bit_and_logs_its_losses(tmp_path):
    """Three steps, of which the resumed one lies in another turn of the pool."""
    whole = train(tmp_path / "whole", 3)
    before = train(tmp_path / "parts", 2)
    parts = train(tmp_path / "parts", 3)
    assert (before["data"]["turn"], parts["data"]["turn"]) == (0, 1)
    for kind in ("model", "ema"):
        one, other = (s[kind] if kind == "model" else s[kind]["average"] for s in (whole, parts))
        assert all(torch.equal(one[name], other[name]) for name in one)
    rows = read_log(tmp_path / "whole" / "log.jsonl")
    assert {"validation_64x64", "loss_at_48x96/0.1"} <= rows[-1].keys()

    # exported whole and blended with what it started from
    start = configs_root() / "lens/mini/base"
    found = {}
    for name, blend in (("all", None), ("some", 0.25)):
        asked = argparse.Namespace(
            out=tmp_path / "whole", export=tmp_path / name, blend=blend, config="mini/pretrain_128"
        )
        pooled.export(configs.load("mini/pretrain_128", "pretrain"), asked)
        found[name] = load_transformer(tmp_path / name / "transformer", torch.float32, "cpu").state_dict()
    before, average = (
        load_transformer(start / "transformer", torch.float32, "cpu").state_dict(),
        whole["ema"]["average"],
    )
    assert any(not torch.equal(average[name].bfloat16().float(), value) for name, value in before.items())
    for name, value in before.items():
        assert torch.equal(found["all"][name], average[name].bfloat16().float())
        torch.testing.assert_close(found["some"][name], 0.75 * value + 0.25 * average[name], rtol=2**-8, atol=1e-12)
    recipes = {n: json.loads((tmp_path / n / "recipe.json").read_text())["pretrain_128"].get("BLEND") for n in found}
    assert recipes == {"all": None, "some": 0.25}


def test_a_blend_is_asked_for_where_there_is_one():
    for words in (
        ["--config", "mini/pretrain_128", "--blend", "0.5"],
        ["--config", "mini", "--export", "x", "--blend", ".5"],
    ):
        with pytest.raises(SystemExit, match="--blend: expected with --export"):
            main(["pretrain", *words])
