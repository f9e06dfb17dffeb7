"""The autoencoder's objective by hand, token labels, both kinds of latent space, the joint training."""

import argparse
import math
from types import ModuleType

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from lens.vae import patchify
from tests.train.clocks import FOREVER, StopAfter
from train import configs, vae
from train.data.small_world.labels import CLASSES, COLOURS, labelled, token_labels
from train.data.small_world.scene import Scene, Thing
from train.data.small_world.world import World
from train.loop.checkpoints import load_state, save_state
from train.loop.keys import keyed
from train.loop.log import read_log
from train.networks import codec, joint
from train.networks.codec import Latents, LinearCodec, psnr, to_model
from train.objectives.autoencoding import (
    TokenHead,
    detail_at,
    edge_loss,
    head_accuracy,
    head_loss,
    kl_loss,
    reconstruction_loss,
    token_grid,
)
from train.vae import codec as codec_part
from train.vae import halves as halves_part
from train.vae import joint as joint_part


def recipe(**changes):
    module = ModuleType("recipe")
    module.__dict__.update({k: v for k, v in vars(configs.load("mini", "vae")).items() if k.isupper()})
    for name, value in changes.items():
        old = getattr(module, name)
        setattr(module, name, {**old, **value} if isinstance(old, dict) else value)
    return module


TINY = {
    "MODEL": {"block_out_channels": (8, 8, 8, 8), "decoder_block_out_channels": (8, 8, 8, 8)},
    "STATISTICS_SCENES": 4,
    "VALIDATION": 2,
    "LOG_EVERY": 1,
    "EVALUATE_EVERY": 2,
}


def options(out, **changes):
    given = {"init": None, "steps": None, "lr": None, "decay": None, "head": None, "device": "cpu", "compile": False}
    return argparse.Namespace(out=out, **{**given, **changes})


def train(config, out, stop=10, **changes):
    out.mkdir(exist_ok=True)
    return joint_part.train_joint(config, options(out, **changes), StopAfter(stop))


# the objective


def test_edge_loss_by_hand():
    """A vertical step of height h at column 4 of 8: one of 7, one of 3 and one of 1 differences at scales 1, 2 and 4."""
    error = torch.zeros(2, 3, 8, 8)
    error[..., 4:] = 0.5
    assert edge_loss(error).item() == pytest.approx(0.5 * (1 / 7 + 1 / 3 + 1) / 3, rel=1e-6)
    assert edge_loss(error.transpose(2, 3)).item() == pytest.approx(0.5 * (1 / 7 + 1 / 3 + 1) / 3, rel=1e-6)
    checker = torch.zeros(1, 3, 8, 8)
    checker[..., ::2, ::2] = checker[..., 1::2, 1::2] = 1.0  # one-pixel checks vanish in the means of 2x2
    assert edge_loss(checker).item() == pytest.approx(2 / 3, rel=1e-6)
    assert edge_loss(torch.full((1, 3, 8, 8), 0.7)).item() == pytest.approx(0, abs=1e-6)


def test_reconstruction_loss_by_hand():
    target, output = torch.zeros(1, 3, 8, 8), torch.full((1, 3, 8, 8), 0.5)
    assert reconstruction_loss(output, target, 0.0).item() == pytest.approx(4 * 0.25 + 4 * 0.25)
    assert reconstruction_loss(output, target, 1.0).item() == pytest.approx(2 + 0.5 * 0.5)
    output[..., 4:] = 0.0  # half of the pixels, one step
    expected = 4 * 0.125 + 4 * 0.25**2 + 0.5 * (0.5 * 0.25 + 0.5 * 0.5 * (1 / 7 + 1 / 3 + 1) / 3)
    assert reconstruction_loss(output, target, 0.5).item() == pytest.approx(expected, rel=1e-6)
    assert [detail_at(step, 10, 20) for step in (0, 10, 15, 20, 99)] == [0, 0, 0.5, 1, 1]


def test_kl_is_the_closed_form_per_pixel_value():
    generator = torch.Generator().manual_seed(0)
    moments = torch.randn(2, 16, 3, 3, generator=generator)
    mean, log_variance = moments.chunk(2, 1)
    oracle = DiagonalGaussianDistribution(moments).kl().mean() / 192  # sums over a picture's latents
    assert kl_loss(mean, log_variance, 192).item() == pytest.approx(oracle.item(), rel=1e-5)
    assert kl_loss(torch.zeros(1, 8, 2, 2), torch.zeros(1, 8, 2, 2), 3).item() == 0
    one = kl_loss(torch.full((1, 1, 1, 1), 2.0), torch.full((1, 1, 1, 1), math.log(3.0)), 1).item()
    assert one == pytest.approx(0.5 * (4 + 3 - 1 - math.log(3)), rel=1e-6)


def test_token_grid_is_the_order_of_the_released_layout():
    z = torch.randn(2, 8, 4, 6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(token_grid(z).flatten(2).transpose(1, 2), patchify(z))


def test_head_loss_and_accuracy_by_hand():
    labels = torch.tensor([[[[1, 2], [0, 0]]]])  # one object token, one of nothing
    logits = (torch.zeros(1, 4, 1, 2), torch.zeros(1, 3, 1, 2))
    assert head_loss(logits, labels).item() == pytest.approx(math.log(4) + math.log(3))
    logits[0][0, 1, 0, 0] = logits[1][0, 1, 0, 0] = 5.0  # class right, colour wrong
    assert head_accuracy(logits, labels) == (1.0, 0.0)


def test_the_heads_gradient_reaches_every_layer_of_the_encoder():
    config = recipe(**TINY)
    model = joint.Joint(config, 0.05)
    pixels, labels = labelled(range(2), 64)
    noises = joint.draw_noises(config, 0, 2, 0.2)
    terms = joint.objective(model, to_model(pixels), labels, noises, 1.0, 1e-6, 0.05)
    expected = terms["picture"] + 1e-6 * terms["kl"] + 0.05 * terms["head"]
    assert terms["loss"].item() == pytest.approx(expected.item(), rel=1e-6)
    terms["head"].backward()
    for name, p in (*model.vae.encoder.named_parameters(), *model.vae.quant_conv.named_parameters()):
        assert p.grad is not None, name
        assert p.grad.abs().sum() > 0, name
    assert all(p.grad is None for p in model.vae.decoder.parameters())


# labels


def test_labels_of_a_scene_made_by_hand(monkeypatch):
    """A solid square over the left two columns of tokens, a later one over the upper right and one column of the first."""
    from train.data.small_world import labels

    solid = type("Solid", (), {})

    def sprite(_kind, _colour, width, height):
        art = solid()
        art.keep = np.zeros((height, width, 1), np.float32)
        return art

    monkeypatch.setattr(labels, "sprite", sprite)
    things = (
        Thing("car", "red", (0, 0, 32, 64)),
        Thing("tree", "green", (28, 0, 60, 16)),
        Thing("house", None, (48, 48, 58, 54)),
    )
    scene = Scene(**{**World().scene(0).__dict__, "things": things, "sign": None})
    car, tree = [CLASSES.index("car"), COLOURS.index("red")], [CLASSES.index("tree"), COLOURS.index("green")]
    expected = np.zeros((4, 4, 2), np.int64)
    expected[:, :2] = car
    expected[0, 2:] = (
        tree  # 12 of 16 columns of the last token; the tree hides a quarter of the second: still the car's
    )
    assert np.array_equal(token_labels(scene), expected)  # the house covers 60 of 256 pixels: too few


def test_labels_follow_the_scenes():
    world = World()
    for seed in range(40):
        scene = world.scene(seed)
        found = token_labels(scene)
        names = {CLASSES[i] for i in found[..., 0].flat}
        signs = {"sign"} if scene.sign is not None else set()
        assert names <= {t.kind for t in scene.things} | signs | {"none"}
        assert {COLOURS[i] for i in found[..., 1].flat} <= {t.colour or "none" for t in scene.things} | {"none"} | (
            {scene.sign.paper} if scene.sign else set()
        )
        for thing in scene.things:
            x0, y0, x1, y1 = thing.box
            if (x1 - x0) * (y1 - y0) > 24 * 24 and len(scene.things) == 1 and not scene.sign:
                assert thing.kind in names


# codec


@pytest.fixture(scope="module")
def tiny_codecs(tmp_path_factory):
    """The same few steps without a head (weight 0) and with one."""
    out = {}
    for head in (0.0, 0.05):
        folder = tmp_path_factory.mktemp("codec")
        config = recipe(CODEC={"scenes": 64, "steps": 3, "batch": 8, "head": head}, STATISTICS_SCENES=32, VALIDATION=2)
        codec_part.train_codec(config, folder, FOREVER)
        out[head] = folder
    return out


def test_a_codec_stopped_on_the_way_goes_on_bit_for_bit(tiny_codecs, tmp_path):
    config = recipe(CODEC={"scenes": 64, "steps": 3, "batch": 8, "head": 0.05}, STATISTICS_SCENES=32, VALIDATION=2)
    assert not codec_part.train_codec(config, tmp_path, StopAfter(2))
    assert load_state(tmp_path / "codec_part.pt", "vae codec part")["step"] == 2
    assert not (tmp_path / "codec.pt").exists()
    assert codec_part.train_codec(config, tmp_path, FOREVER)
    assert not (tmp_path / "codec_part.pt").exists()
    straight, pieces = (load_state(folder / "codec.pt", "vae codec") for folder in (tiny_codecs[0.05], tmp_path))
    for name, value in straight["model"].items():
        assert torch.equal(value, pieces["model"][name]), name
    assert torch.equal(straight["mean"], pieces["mean"])


def test_a_head_of_weight_zero_is_no_head(tiny_codecs):
    """Bit for bit the plain reconstruction training, written out here; a weight above 0 changes the codec."""
    config = recipe(CODEC={"scenes": 64, "steps": 3, "batch": 8})
    pictures = labelled(range(64), 64)[0]
    with torch.random.fork_rng():
        torch.manual_seed(keyed(config.SEED, "codec init").initial_seed())
        plain = LinearCodec(8, 16, 24)
    plain.start_from_principal_components(to_model(pictures))
    optimizer = torch.optim.Adam(plain.parameters(), lr=3e-3)
    for step in range(3):
        generator = keyed(config.SEED, "codec", step)
        x = to_model(pictures[torch.randint(64, (8,), generator=generator).numpy()])
        z = plain.encode(x)
        loss = (plain.decode(z + 0.2 * torch.randn(z.shape, generator=generator)) - x).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = 3e-3 * (3 - step) / 3
        optimizer.step()
    states = [load_state(folder / "codec.pt", "vae codec")["model"] for folder in tiny_codecs.values()]
    assert all(torch.equal(value, states[0][name]) for name, value in plain.state_dict().items())
    assert not torch.equal(states[0]["encode_filter.weight"], states[1]["encode_filter.weight"])


def test_codec_latents_go_there_and_back(tiny_codecs):
    latents = Latents(tiny_codecs[0.05])
    pixels = World().batch(list(range(32)))[1]
    tokens = latents.encode(pixels)
    assert tokens.shape == (32, 16, 32)
    assert tokens.mean((0, 1)).abs().max() < 1e-3  # the statistics were measured on these scenes
    assert (tokens.var((0, 1), unbiased=False) - 1).abs().max() < 0.01
    z = latents.denormalise(tokens, 4, 4)
    assert torch.allclose(z, latents.latents(to_model(pixels)), atol=1e-4)
    assert psnr(latents.decode(z), to_model(pixels)) > 15
    assert torch.equal(latents.encode(torch.from_numpy(pixels)), tokens)


def test_the_probe_reads_more_where_there_is_more_to_read(tiny_codecs, tmp_path):
    config = recipe(PROBE={"scenes": 200, "held": 100, "steps": 60, "batch": 32})
    latents = Latents(tiny_codecs[0.05])
    found = codec_part.probe(config, latents, tmp_path, FOREVER)
    latents.codec.encode_filter.weight.zero_()  # the same space, blind
    blind = codec_part.probe(config, latents, tmp_path, FOREVER)
    assert found["colour"] > blind["colour"] + 0.1
    assert next(r for r in read_log(tmp_path / "log.jsonl") if "class" in r)["class_noisy"] == pytest.approx(
        found["class_noisy"], rel=1e-4
    )


def test_a_half_is_carried_over_to_another_basis(tiny_codecs):
    """Where the new latents are exactly affine in the old, the rebased halves do what the old ones did."""
    config = recipe(**TINY)
    whole = vae.build(config).eval()
    generator = torch.Generator().manual_seed(3)
    a, b = torch.eye(8) + 0.2 * torch.randn(8, 8, generator=generator), torch.randn(8, generator=generator)

    class Turned:
        def latents(self, x):
            return torch.einsum("ij,njhw->nihw", a, whole.encode(x).latent_dist.mode()) + b.view(1, 8, 1, 1)

    x = to_model(World().batch([1, 2])[1])
    with torch.no_grad():
        z = whole.encode(x).latent_dist.mode()
        picture, wanted = whole.decode(z).sample, Turned().latents(x)
        for part, given, expected in (("decoder", wanted, picture), ("encoder", x, wanted)):
            half = codec.Half(whole, part)
            half.point = torch.nn.Conv2d(half.point.in_channels, half.point.out_channels, 1)
            half.point.load_state_dict((whole.post_quant_conv if part == "decoder" else whole.quant_conv).state_dict())
            assert halves_part.rebase(half, whole, Turned(), 64, scenes=64) > 0.999
            found = half(given)[:, : expected.shape[1]]
            assert (found - expected).abs().max() < 1e-2 * expected.abs().max()


# joint training


def test_joint_resumes_bit_for_bit_and_serves_latents(tmp_path):
    config = recipe(**TINY, JOINT={"batch": 2, "detail_from": 0, "detail_full": 2})
    assert train(config, tmp_path / "whole", steps=3)
    assert not train(config, tmp_path / "parts", stop=1, steps=3)
    with pytest.raises(ValueError, match="at step 1, expected a finished training"):
        Latents(tmp_path / "parts")
    with pytest.raises(ValueError, match=r"trained with head 0\.02, now asked for 0\.0"):
        train(config, tmp_path / "parts", steps=3, head=0.0)
    assert train(config, tmp_path / "parts", steps=3)
    one, two = (load_state(tmp_path / name / "joint.pt", "vae joint") for name in ("whole", "parts"))
    assert one["step"] == two["step"] == 3
    for name in one["model"]:
        assert torch.equal(one["model"][name], two["model"][name]), name
    for name in one["ema"]["average"]:
        assert torch.equal(one["ema"]["average"][name], two["ema"]["average"][name]), name
    assert torch.equal(one["mean"], two["mean"])
    assert torch.equal(one["var"], two["var"])
    rows = read_log(tmp_path / "whole" / "log.jsonl")
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3]
    assert {"loss", "picture", "kl", "head", "grad_norm"} <= rows[0].keys()
    assert [row["step"] for row in rows if {"psnr", "class", "colour"} <= row.keys()] == [2, 3]

    latents = Latents(tmp_path / "whole")  # one interface, whichever training made the space
    pixels = World().batch(list(range(4)))[1]
    tokens = latents.encode(pixels)
    assert tokens.mean((0, 1)).abs().max() < 1e-3
    assert tokens.shape == (4, 16, 32)
    z = latents.denormalise(tokens, 4, 4)
    trained = joint.Joint(config, 0.05).eval()
    with torch.no_grad():
        for name, p in trained.named_parameters():
            p.copy_(one["ema"]["average"][name])
        assert torch.allclose(z, trained.moments(to_model(pixels))[0], atol=1e-4)
        assert torch.allclose(latents.decode(z), trained.pixels(z), atol=1e-5)

    vae.export(config, tmp_path / "whole", tmp_path / "vae")  # and it is the released layout
    from lens.formats.vae import load_vae
    from lens.vae import PixelCodec

    released = PixelCodec(load_vae(tmp_path / "vae", torch.float32, "cpu"))
    again = released.encode(to_model(pixels)[0].permute(1, 2, 0))
    assert (again - tokens[0]).abs().max() < 0.1  # bfloat16 weights

    (tmp_path / "whole" / "codec.pt").write_bytes(b"")
    with pytest.raises(ValueError, match="expected one latent space in a folder"):
        Latents(tmp_path / "whole")


def test_joint_without_a_head_trains_the_same_picture_terms(tmp_path):
    config = recipe(**TINY, JOINT={"batch": 2})
    train(config, tmp_path / "none", steps=1, head=0.0)
    train(config, tmp_path / "head", steps=1)
    without, with_head = (read_log(tmp_path / n / "log.jsonl")[0] for n in ("none", "head"))
    assert "head" not in without
    assert with_head["head"] > 0
    assert without["picture"] == with_head["picture"]
    assert without["kl"] == with_head["kl"]
    assert not any(k.startswith("head.") for k in load_state(tmp_path / "none" / "joint.pt", "vae joint")["model"])


def test_joint_starts_from_halves_or_from_a_joint_state(tiny_codecs, tmp_path):
    config = recipe(**TINY, JOINT={"batch": 2}, DECODER={"batch": 2}, ENCODER={"batch": 2})
    halves = tiny_codecs[0.0]
    for part in ("decoder", "encoder"):
        vae.train_half(config, part, halves, FOREVER, None, 1)
    model = joint.Joint(config, 0.05)
    joint.start_joint(model, halves)
    average = load_state(halves / "decoder.pt", "vae decoder")["ema"]["average"]
    assert torch.equal(model.vae.decoder.conv_in.weight, average["body.conv_in.weight"])
    assert torch.equal(model.vae.post_quant_conv.weight, average["point.weight"])
    state = {"stage": "vae joint", "ema": {"average": {k: v.detach() + 1 for k, v in model.named_parameters()}}}
    save_state(tmp_path / "other.pt", state)
    joint.start_joint(model, tmp_path / "other.pt")
    assert torch.equal(model.vae.decoder.conv_in.weight, average["body.conv_in.weight"] + 1)
    del state["ema"]["average"]["vae.quant_conv.weight"]
    save_state(tmp_path / "other.pt", state)
    with pytest.raises(ValueError, match=r"lacks \['quant_conv.weight'\]"):
        joint.start_joint(model, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="expected a folder of its own"):
        train(config, halves, steps=1)


def test_a_pool_gives_the_scenes_of_its_seeds():
    config = recipe(JOINT={"batch": 4, "pool": 6})
    scenes = joint_part.Scenes(config, torch.device("cpu"))
    x, labels = scenes.batch(5)
    pixels, expected = labelled(range(6), 64)
    pick = torch.randint(6, (4,), generator=keyed(config.SEED, "joint pick", 5))
    assert torch.equal(x, to_model(pixels)[pick])
    assert torch.equal(labels, expected[pick])


def test_recipes_of_both_machines_fit():
    """The GPU recipe: every field the joint part reads; a file small enough to ship beside the other networks."""
    cpu, gpu = configs.load("mini", "vae"), configs.load("mini_gpu", "vae")
    assert gpu.JOINT.keys() == cpu.JOINT.keys()
    assert gpu.MODEL.keys() == cpu.MODEL.keys()
    model = joint.Joint(gpu, gpu.JOINT["head"])
    assert 2 * sum(p.numel() for p in model.vae.parameters()) < 6e6  # bytes in bfloat16


def test_the_head_has_its_own_seed_and_leaves_the_global_one_alone():
    before = torch.random.get_rng_state()
    one, two = (codec.head_of(recipe(), name) for name in ("codec", "probe"))
    assert isinstance(one, TokenHead)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not torch.equal(one.layers[0].weight, two.layers[0].weight)
    assert [x.shape[1] for x in one(torch.zeros(2, 8, 8, 8))] == [len(CLASSES), len(COLOURS)]
