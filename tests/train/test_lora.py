"""LoRA in training: the adapted layers are peft's to the last digit of float32, nothing else trains, runs resume and export."""

import argparse
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file

import lens.formats.lora
from lens import LensTransformer2DModel
from lens.config import LensConfig
from lens.formats.released import load_transformer, save_transformer, transformer_config
from lens.packing import plan
from tests.reference_model import ReferenceLens, relative
from tests.train.clocks import StopAfter
from train import configs, pretrain
from train import export as shipping
from train.loop.checkpoints import folder_tensors, load_state, save_state
from train.loop.keys import keyed
from train.loop.lora import (
    COMFYUI,
    NO_LORA,
    Lora,
    attach_lora,
    init_lora,
    keep_lora,
    lora_layers,
    merge_lora,
    parse_lora,
    save_lora,
)
from train.networks import generator
from train.networks.codec import Latents
from train.networks.denoiser import Denoiser

SHIPPED = Path(__file__).parents[2] / "lens" / "mini" / "base"
CONFIG = json.loads((SHIPPED / "transformer" / "config.json").read_text())
LORA = Lora(4, 6.0, "all")


def base(kind=LensTransformer2DModel, **options):
    """Mini's shipped weights in either of our models, float32."""
    model = kind(transformer_config(CONFIG), **options)
    model.load_state_dict(load_transformer(SHIPPED / "transformer", torch.float32, "cpu").state_dict())
    return model


def away_from_zero(model):
    with torch.no_grad():
        for i, (name, p) in enumerate(model.named_parameters()):
            if ".up." in name:
                p.copy_(torch.randn(p.shape, generator=keyed(i, "up")) * 0.05)


def batch():
    generator = torch.Generator().manual_seed(1)
    image, text = (
        torch.randn(2, 12, 32, generator=generator),
        [torch.randn(2, 5, 128, generator=generator) for _ in range(4)],
    )
    return image, text, torch.tensor([[True] * 5, [True] * 3 + [False] * 2]), torch.tensor([0.3, 0.8])


def forward(model):
    image, text, mask, t = batch()
    return model(image, text, mask, t, [(1, 3, 4)])


@pytest.mark.parametrize("targets", ["attention", "all"])
def test_saved_adapters_are_pefts_and_ours(tmp_path, targets):
    """Beside the weights in training, in peft's forward on an independent Lens, merged at inference: one picture."""
    peft = pytest.importorskip("peft")
    lora, model, reference = Lora(4, 6.0, targets), base().train(), ReferenceLens(CONFIG)
    attach_lora(model, lora)
    init_lora(model, 1)
    plain = forward(model)
    assert relative(plain, forward(base().train())) == 0  # up is zero at first
    away_from_zero(model)
    ours = forward(model)
    save_lora(model, lora, tmp_path)

    reference.load_state_dict({key: value.float() for key, value in folder_tensors(SHIPPED / "transformer").items()})
    theirs = peft.PeftModel.from_pretrained(reference.eval(), tmp_path)
    assert {name for name, p in theirs.named_parameters() if "lora_" in name and not p.any()} == set()  # all were found
    image, text, mask, t = batch()
    assert relative(ours.detach(), theirs(image, text, mask, t, (3, 4)).detach()) < 1e-5
    assert relative(ours, plain) > 0.01

    inference = base().eval()
    lens.formats.lora.Adapters(inference).add(lens.formats.lora.read(tmp_path), 1.0)
    assert relative(forward(inference), ours) < 1e-5
    one_file = lens.formats.lora.read(tmp_path / COMFYUI)
    assert one_file.fingerprint == lens.formats.lora.read(tmp_path).fingerprint
    keys = load_file(tmp_path / COMFYUI)
    assert len(keys) == 3 * len(one_file.pairs)
    assert set(keys) >= {
        f"diffusion_model.transformer_blocks.0.attn.img_qkv.{leaf}" for leaf in ("lora_up.weight", "alpha")
    }
    merge_lora(model)
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in inference.named_parameters()]
    for (name, p), q in zip(model.named_parameters(), inference.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7, msg=name)  # the last block's text branch is zero


def test_the_start_is_pefts_gaussian():
    model = base()
    attach_lora(model, Lora(64, 128.0))
    init_lora(model, 1)
    layers = dict(lora_layers(model))
    assert len(layers) == 4 * 6
    downs = torch.cat([p.flatten() for layer in layers.values() for p in layer.down])
    assert downs.std().item() == pytest.approx(1 / 64, rel=0.01)  # torch.nn.init.normal_(std=1 / r)
    assert not any(p.any() for layer in layers.values() for p in layer.up)
    firsts = [p.flatten()[0].item() for layer in layers.values() for p in layer.down]
    assert len(set(firsts)) == len(firsts), "each has a key of its own"
    first, again = layers["blocks.0.image.qkv"], base()
    attach_lora(again, Lora(64, 128.0, "all"))
    init_lora(again, 1)  # whatever else is adapted
    assert torch.equal(dict(lora_layers(again))["blocks.0.image.qkv"].down[0], first.down[0])


def test_ops_that_read_the_weight_find_the_adapter_in_it():
    model = base()
    attach_lora(model, LORA)
    init_lora(model, 1)
    away_from_zero(model)
    x = torch.randn(7, 128, generator=keyed(2, "x"))
    for name, layer in lora_layers(model):
        if layer.base.in_features == 128:
            whole = torch.nn.functional.linear(x, layer.weight, layer.bias)
            assert relative(whole, layer(x)) < 1e-5, name
            assert relative(layer.base(x), layer(x)) > 0.01, name


def backward(compute, frozen):
    """The scaled engine's model with adapters, after a backward pass; the names that would train without them."""
    model = base(Denoiser, compute=compute, recompute="block").train()
    alive = {name for name, p in model.named_parameters() if p.requires_grad}
    attach_lora(model, LORA, frozen)
    init_lora(model, 1)
    away_from_zero(model)
    image, text, _, t = batch()
    packing = plan([(3, 4)] * 2, [5, 3], model.config.axes_dims_rope)
    rows = torch.cat([torch.stack(text, 2)[0], torch.stack(text, 2)[1][:3]])
    model(image.flatten(0, 1), rows, t, packing).float().square().mean().backward()
    return model, alive


def test_frozen_weights_kept_rounded_are_those_rounded_where_they_are_used():
    (kept, _), (cast, _) = backward(torch.bfloat16, torch.bfloat16), backward(torch.bfloat16, None)
    for (name, p), q in zip(kept.named_parameters(), cast.parameters()):
        adapter = ".down." in name or ".up." in name
        assert p.dtype == (torch.float32 if adapter else torch.bfloat16)
        assert q.dtype == torch.float32
        assert (p.grad is None and q.grad is None) or torch.equal(p.grad, q.grad), name


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_only_adapters_train_in_the_model_of_the_scaled_engine(compute):
    model, alive = backward(compute, None)
    for name, p in model.named_parameters():
        trains = (".down." in name or ".up." in name) and f"{name.rsplit('.', 2)[0]}.weight" in alive
        assert p.requires_grad is trains, name
        assert (p.grad is not None and bool(p.grad.any())) is trains, name
        assert p.grad is None or p.grad.dtype == torch.float32
    dead = model.layers()[-1].text
    assert not any(p.requires_grad for p in dead.w2.parameters())  # nothing reads it


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("r=64", Lora(64, 128.0)),
        ("r=8, alpha=4", Lora(8, 4.0)),
        ("alpha=1.5,r=2,targets=all", Lora(2, 1.5, "all")),
        *(
            (text, None)
            for text in ("64", "alpha=3", "r=0", "r=x", "r=8,alpha=nan", "r=8,rank=3", "r=8,r=9", "r=8,targets=qkv")
        ),
    ],
)
def test_what_lora_may_say(text, expected):
    if expected is None:
        with pytest.raises(ValueError, match=r"--lora: .*expected for example r=64"):
            parse_lora(text)
    else:
        assert parse_lora(text) == expected
        assert parse_lora(str(expected)) == expected


# ------------------------------------------------------------------------------------------------ the stage


@pytest.fixture
def train(monkeypatch):
    config, straighten = ModuleType("recipe"), Latents.straighten
    config.__dict__.update({k: v for k, v in vars(configs.load("mini", "pretrain")).items() if k.isupper()})
    config.WINDOW, config.BATCHES, config.WARMUP = 16, ((0, 4),), 1
    # every stop draws a sheet, every end also validates: pictures that nothing here looks at
    config.SHEET, config.PROMPTS, config.VALIDATION = {**config.SHEET, "steps": 1}, config.PROMPTS[:2], 4
    monkeypatch.setattr(Latents, "straighten", lambda self, world, side: straighten(self, world, side, 160))

    def run(out, stop=99, lora=None, init=SHIPPED, steps=5):
        monkeypatch.setattr(pretrain, "Clock", lambda _limit: StopAfter(stop))
        options = dict(config="mini", out=out, vae=SHIPPED / "vae", encoder=None, stop_after=None, steps=steps, decay=2)
        options |= dict(joint_steps=None, lr_scale=1.0, device="cpu", workers=0, init=init, lora=lora)
        pretrain.train(config, argparse.Namespace(**options))
        return out / "pretrain.pt"

    run.config = config
    return run


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return len(a) == len(b) and all(map(same, a, b)) if isinstance(a, list | tuple) else a == b


def test_a_lora_trains_alone_resumes_and_is_exported_twice(train, tmp_path):
    whole = load_state(train(tmp_path / "whole", lora="r=4"), "pretrain")
    for stop in (2, 99):  # the second start need not say it again
        parts = train(tmp_path / "parts", stop, lora="r=4" if stop == 2 else None)
    assert same(whole, load_state(parts, "pretrain"))
    with pytest.raises(ValueError, match=r"--lora r=8,alpha=16,targets=attention: this training has r=4,alpha=8"):
        train(tmp_path / "parts", lora="r=8")

    assert len(whole["optimizer"]["exp_avg"]) == 2 * 4 * 6  # down and up of four layers in six blocks
    stored = folder_tensors(SHIPPED / "transformer")
    untouched = whole["model"]["transformer.blocks.0.image.qkv.base.weight"]
    assert torch.equal(untouched, stored["transformer_blocks.0.attn.img_qkv.weight"])
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(whole["model"]["encoder." + name], folder_tensors(SHIPPED / "text_encoder")[name])
    assert whole["model"]["transformer.blocks.0.image.qkv.up.0"].any()

    out = tmp_path / "export"
    options = argparse.Namespace(config="mini", out=tmp_path / "whole", vae=SHIPPED / "vae", encoder=None, export=out)
    shipping.export(train.config, options)
    found = lens.formats.lora.read(out / "lora")
    assert len(found.pairs) == 4 * 6
    assert {pair.factor for pair in found.pairs.values()} == {2.0}
    by_hand = load_transformer(SHIPPED / "transformer", torch.bfloat16, "cpu")
    lens.formats.lora.Adapters(by_hand).add(found, 1.0)
    merged = load_transformer(out / "transformer", torch.bfloat16, "cpu")
    assert all(torch.equal(p, q) for p, q in zip(merged.parameters(), by_hand.parameters()))
    assert json.loads((out / "recipe.json").read_text())["pretrain"]["LORA"] == "r=4,alpha=8,targets=attention"
    assert load_file(out / "lora" / "adapter_model.safetensors")  # a plain file


def test_fine_tuning_takes_the_architecture_from_the_checkpoint(train, tmp_path):
    """A folder with two blocks where the recipe has six; every weight but the encoder's trains, also after a stop."""
    folder = tmp_path / "two"
    small = LensTransformer2DModel(LensConfig(**{**vars(transformer_config(CONFIG)), "num_layers": 2}))
    state = base().state_dict()
    small.load_state_dict({name: state[name] for name in small.state_dict()})
    save_transformer(small, folder / "transformer")
    for part in ("text_encoder", "tokenizer"):
        (folder / part).symlink_to(SHIPPED / part)
    for name in ("model_index.json", "recipe.json"):
        (folder / name).symlink_to(SHIPPED / name)
    (folder / "vae").symlink_to(SHIPPED / "vae")
    train(tmp_path / "out", 1, init=folder, steps=3)
    path = train(tmp_path / "out", init=None, steps=3)
    tuned = load_state(path, "pretrain")
    assert tuned["step"] == 3
    assert "transformer.blocks.1.image.qkv.weight" in tuned["model"]
    assert "transformer.blocks.2.image.qkv.weight" not in tuned["model"]
    moved = tuned["model"]["transformer.blocks.0.image.qkv.weight"] - small.blocks[0].image.qkv.weight
    assert 0 < moved.abs().max() < 0.1
    model = generator.load_trained(train.config, "mini", path)
    assert len(model.transformer.blocks) == 2
    batch_of_one = model.transformer.modulate(torch.tensor([0.5]))
    assert batch_of_one.blocks.shape[1] == 2


def test_states_without_settings_are_refused_a_lora(train, tmp_path):
    path = train(tmp_path / "plain", 1)
    state = load_state(path, "pretrain")
    assert "LORA" not in state["settings"]
    save_state(path, state)
    with pytest.raises(ValueError, match="this training has none"):
        train(tmp_path / "plain", lora="r=2")


def test_summed_adapters_are_those_beside_the_weights():
    """The one that trains, a kept one and none; called at once and bound for several calls; gradients; only over float32."""
    found = {}
    for summed in (False, True):
        model = base()
        attach_lora(model, Lora(3, 6.0, "all"), summed=summed)
        init_lora(model, 2)
        away_from_zero(model)
        keep_lora(model, "old")
        layer = dict(lora_layers(model))["blocks.0.image.w13"]
        with torch.no_grad():
            layer.up[1].mul_(2)
        x = torch.randn(7, layer.base.in_features, generator=keyed(1, "x"), requires_grad=True)
        rows = [layer.bound(adapter)(x) for adapter in (None, "old", NO_LORA)]
        assert all(torch.equal(row, layer(x, adapter)) for row, adapter in zip(rows, (None, "old", NO_LORA)))
        rows[0].square().sum().backward()
        found[summed] = [*rows, x.grad, *(p.grad for p in (*layer.down, *layer.up))]
        assert layer.base.weight.grad is None
    for beside, one in zip(found[False], found[True]):
        assert relative(one, beside) < 1e-5
    assert relative(found[True][0], found[True][1]) > 0.01
    with pytest.raises(ValueError, match=r"summed adapters of weights in torch\.bfloat16"):
        attach_lora(base(), Lora(3, 6.0), torch.bfloat16, summed=True)
