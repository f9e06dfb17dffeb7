"""Every stage resumes bit for bit on a CPU: n steps at once equal some, a stop, and the rest."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests.train.clocks import FOREVER, StopAfter
from train import configs, pretrain, vae
from train import export as shipping
from train import text_encoder as encoder
from train.__main__ import main
from train.loop.checkpoints import folder_tensors, load_state, save_state
from train.loop.clock import Clock, duration
from train.loop.ema import Ema
from train.loop.keys import keyed
from train.loop.log import JsonLog, read_log
from train.loop.method import learning_rate
from train.networks.codec import VALIDATION_SEED, Latents
from train.networks.generator import Mini

ROOT = Path(__file__).parents[2]
NARROW = {"block_out_channels": (8, 8, 8, 8), "decoder_block_out_channels": (8, 8, 8, 8)}  # of the VAE's halves


def recipe(stage, **changes):
    module = ModuleType("recipe")
    module.__dict__.update({k: v for k, v in vars(configs.load("mini", stage)).items() if k.isupper()})
    for name, value in changes.items():
        old = getattr(module, name)
        setattr(module, name, {**old, **value} if isinstance(old, dict) else value)
    return module


@pytest.fixture(scope="module")
def codec(tmp_path_factory):
    out = tmp_path_factory.mktemp("vae")
    config = recipe("vae", CODEC={"scenes": 64, "steps": 3, "batch": 8}, STATISTICS_SCENES=64, VALIDATION=2)
    vae.train_codec(config, out, FOREVER)
    return out


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def assert_same_state(one, two, stage):
    first, second = load_state(one, stage), load_state(two, stage)
    assert first.keys() == second.keys()
    for key in first:
        assert equal(first[key], second[key]), key


@pytest.mark.parametrize("part", ["decoder", "encoder"])
def test_vae_halves(codec, tmp_path, part):
    config = recipe(
        "vae",
        MODEL=NARROW,
        DECODER={"batch": 2, "detail_from": 0, "detail_full": 3},
        ENCODER={"batch": 2},
        VALIDATION=4,
    )
    for name, stops in (("whole", [4]), ("parts", [1, 4])):
        out = tmp_path / name
        out.mkdir()
        (out / "codec.pt").write_bytes((codec / "codec.pt").read_bytes())
        for stop in stops:
            # the schedule belongs to the whole run; a stop is only the clock running out
            clock = StopAfter(stop - (1 if len(stops) > 1 and stop == 4 else 0))
            vae.train_half(config, part, out, clock, None, 4)
    assert_same_state(tmp_path / "whole" / f"{part}.pt", tmp_path / "parts" / f"{part}.pt", f"vae {part}")


def test_encoder(tmp_path, monkeypatch):
    config = recipe("encoder", TRAIN={"batch": 4})
    monkeypatch.setattr(encoder, "VALIDATION_SEED", 10)
    for name, stops in (("whole", [3]), ("parts", [1, 2])):
        for stop in stops:
            encoder.train(config, tmp_path / name, StopAfter(stop), None, 3)
    assert_same_state(tmp_path / "whole" / "encoder.pt", tmp_path / "parts" / "encoder.pt", "encoder")


@pytest.fixture(scope="module")
def text_state(tmp_path_factory):
    out = tmp_path_factory.mktemp("encoder")
    encoder.train(recipe("encoder", TRAIN={"batch": 4}), out, StopAfter(1), None, 1)
    return out / "encoder.pt"


def test_pretrain_across_a_window_and_the_freeze(codec, text_state, tmp_path, monkeypatch):
    """12 steps: windows of 4 batches of 8, joint until step 6; stopped after 1, 5 and 7."""
    config = recipe(
        "pretrain", MODEL={"num_layers": 2, "num_attention_heads": 2}, WINDOW=32, BATCHES=((0, 8),), WARMUP=2
    )
    # every stop draws a sheet, every end also validates: pictures that nothing here looks at
    config.SHEET, config.PROMPTS, config.VALIDATION = {**config.SHEET, "steps": 1}, config.PROMPTS[:2], 4

    def run(out, stop):
        monkeypatch.setattr(pretrain, "Clock", lambda _limit: StopAfter(stop))
        options = argparse.Namespace(
            config="mini",
            out=out,
            vae=codec,
            encoder=text_state,
            stop_after=None,
            steps=12,
            decay=4,
            joint_steps=6,
            lr_scale=1.0,
            lora=None,
            device="cpu",
            workers=0,
            init=None,
        )
        pretrain.train(config, options)

    run(tmp_path / "whole", 99)
    for stop in (1, 4, 2, 99):
        run(tmp_path / "parts", stop)
    state = load_state(tmp_path / "whole" / "pretrain.pt", "pretrain")
    assert (state["step"], state["data"]) == (12, {"window": 2, "position": 4})
    assert_same_state(tmp_path / "whole" / "pretrain.pt", tmp_path / "parts" / "pretrain.pt", "pretrain")
    frozen = [k for k in state["model"] if k.startswith("encoder.") and "lm_head" not in k]
    drift = [(state["model"][k] - state["ema"]["average"][k]).abs().max().item() for k in frozen]
    assert max(drift) < 1e-5  # from the freeze on the average stands still on the weights in use


@pytest.mark.nightly  # the first stage's test crosses windows too, and a minute and a half is much
def test_mixed_resolution_across_a_window_from_a_shipped_folder(tmp_path, monkeypatch):
    """7 steps over two windows of 4 batches of several sizes, from released weights; stopped after 2 and 5."""
    config = recipe("mixed_resolution", WINDOW=4, WARMUP=2, VALIDATION=4)
    config.BUCKETS = {64: (0.5, 4), 96: (0.5, 2)}
    shipped, straighten = ROOT / "lens" / "mini" / "base", Latents.straighten
    monkeypatch.setattr(Latents, "straighten", lambda self, world, side: straighten(self, world, side, 160))

    def run(out, stop):
        monkeypatch.setattr(pretrain, "Clock", lambda _limit: StopAfter(stop))
        options = argparse.Namespace(
            config="mini",
            out=out,
            vae=shipped / "vae",
            encoder=None,
            stop_after=None,
            steps=7,
            decay=4,
            joint_steps=None,
            lr_scale=1.0,
            lora=None,
            device="cpu",
            workers=0,
            init=shipped,
        )
        pretrain.train(config, options, "mixed_resolution")

    run(tmp_path / "whole", 99)
    for stop in (2, 3, 99):
        run(tmp_path / "parts", stop)
    one, two = (tmp_path / name / "mixed_resolution.pt" for name in ("whole", "parts"))
    assert_same_state(one, two, "mixed_resolution")
    state = load_state(one, "mixed_resolution")
    assert (state["step"], state["data"]) == (7, {"window": 1, "position": 3})
    stored = folder_tensors(shipped / "text_encoder")
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(state["model"]["encoder." + name], stored[name])  # frozen from the first step on
    moved = state["model"]["transformer.image_in.weight"] - folder_tensors(shipped / "transformer")["img_in.weight"]
    assert 0 < moved.abs().max() < 0.05
    rows = read_log(tmp_path / "whole" / "log.jsonl")[1:]
    unseen = [row["step"] for row in rows if {"with_text_64", "with_text_96", "text_explains"} <= row.keys()]
    assert unseen == [0, 7]  # what it starts from, and what it comes to
    assert {"loss", "loss_of/64", "loss_of/96", "grad_norm", "eta_s"} <= rows[1].keys()

    out = tmp_path / "export"  # what it did not train comes from the folder it started from
    shipping.export(
        config,
        argparse.Namespace(config="mini", out=one.parent, vae=shipped / "vae", encoder=None, export=out),
        "mixed_resolution",
    )
    about = json.loads((out / "model_index.json").read_text())["lens"]
    before = json.loads((shipped / "model_index.json").read_text())["lens"]
    assert (about["base_resolution"], about["max_resolution"]) == (64, 96)
    assert about["trained_steps"] == before["trained_steps"] + 7
    assert equal(folder_tensors(out / "vae"), folder_tensors(shipped / "vae"))
    assert equal(folder_tensors(out / "text_encoder"), stored)
    recipes, earlier = (json.loads((f / "recipe.json").read_text()) for f in (out, shipped))
    assert recipes["mixed_resolution"]["STEPS"] == 7
    assert all(recipes[stage] == earlier[stage] for stage in ("world", "vae", "encoder", "pretrain"))
    for stage in ("vae", "encoder", "pretrain"):
        assert (out / f"{stage}.jsonl").read_bytes() == (shipped / f"{stage}.jsonl").read_bytes()
    assert (out / "mixed_resolution.jsonl").is_file()


def test_a_linear_encoder_is_found_again_and_another_is_kept(codec):
    shipped = ROOT / "lens" / "mini" / "base" / "vae"
    latents, world = Latents(shipped), configs.world("mini")
    pixels = world.batch(list(range(VALIDATION_SEED + 500, VALIDATION_SEED + 508)), 96, 64)[1]
    slow = latents.encode(pixels)
    assert latents.straighten(world, 64, 256, least=1.0) < 1
    assert torch.equal(latents.encode(pixels), slow)
    assert latents.straighten(world, 64, 256) > 0.99
    fast = latents.encode(pixels)
    assert not torch.equal(fast, slow)
    assert fast.shape == slow.shape == (8, 24, 32)
    assert ((fast - slow).pow(2).mean() / slow.var()).item() < 0.02


def test_stop_after_saves_and_exits_zero(codec, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "codec.pt").write_bytes((codec / "codec.pt").read_bytes())
    assert main(["vae", "--out", str(out), "--part", "encoder", "--stop-after", "1s"]) == 0
    assert load_state(out / "encoder.pt", "vae encoder")["step"] < configs.load("mini", "vae").ENCODER["steps"]


def test_a_stop_signal_to_all_processes_saves_and_exits_zero(codec, text_state, tmp_path):
    """The whole process group gets SIGTERM, as from a scheduler: the worker leaves it to the training, and ends with it."""
    out = tmp_path / "run"
    command = [sys.executable, "-m", "train", "pretrain", "--vae", codec, "--encoder", text_state, "--out", out]
    running = subprocess.Popen([*command, "--workers", "1"], cwd=ROOT, stderr=subprocess.PIPE, start_new_session=True)
    children = Path(f"/proc/{running.pid}/task/{running.pid}/children")
    until(lambda: len(children.read_text().split()) >= 2)  # the worker, and the tracker that goes with it
    os.killpg(running.pid, signal.SIGTERM)
    assert running.wait(120) == 0, running.stderr.read()
    assert load_state(out / "pretrain.pt", "pretrain")["step"] == 0
    until(lambda: not any_left(running.pid))


def until(true):
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


def any_left(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_state_files_are_typed_and_never_half_written(tmp_path):
    path = tmp_path / "a.pt"
    save_state(path, {"stage": "encoder", "step": 3})
    assert load_state(path, "encoder")["step"] == 3
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]
    with pytest.raises(ValueError, match="expected 'pretrain'"):
        load_state(path, "pretrain")
    with pytest.raises(FileNotFoundError, match="no training state here; `python -m train vae`"):
        load_state(tmp_path / "b.pt", "vae decoder")
    whole = path.read_bytes()
    for cut in (b"", whole[:40], whole[: len(whole) // 2], b"step 3"):
        path.write_bytes(cut)
        with pytest.raises(ValueError, match=r"a\.pt: not a training state, or only the first part"):
            load_state(path, "encoder")
    torch.save(torch.zeros(2), path)
    with pytest.raises(ValueError, match="holds a Tensor"):
        load_state(path, "encoder")


def test_a_failed_save_leaves_the_old_state_and_nothing_else(tmp_path):
    path = tmp_path / "a.pt"
    save_state(path, {"stage": "encoder", "step": 3})
    with pytest.raises(Exception, match="pickle"):
        save_state(path, {"stage": "encoder", "step": lambda: 4})
    assert load_state(path, "encoder")["step"] == 3
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]


def test_a_log_with_a_cut_line_is_read_without_it(tmp_path):
    path = tmp_path / "log.jsonl"
    JsonLog(path)(step=1, loss=0.5)
    with path.open("ab") as file:
        file.write(b'{"time": 1.0, "step": 2, "lo')
    for step in (3, 4):
        JsonLog(path)(step=step)
    with path.open("ab") as file:
        file.write(b'12\n{"step": 5, "\xc3')
    assert [row["step"] for row in read_log(path)] == [1, 3, 4]


def test_helpers():
    assert [duration(t) for t in ("90s", "9m", "1.5h", "30")] == [90, 540, 5400, 30]
    with pytest.raises(ValueError, match="9 minutes"):
        duration("9 minutes")
    assert [learning_rate(s, 1.0, 2, 10, 4) for s in (0, 1, 5, 8, 9, 10)] == [0.5, 1, 1, 0.5, 0.25, 0]
    assert torch.equal(torch.rand(3, generator=keyed(1, "a", 2)), torch.rand(3, generator=keyed(1, "a", 2)))
    assert not torch.equal(torch.rand(3, generator=keyed(1, "a", 2)), torch.rand(3, generator=keyed(1, "a", 3)))
    module = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(module.weight)
    ema = Ema(module, 0.5)
    torch.nn.init.ones_(module.weight)
    ema.update(module)  # decay (1 + 0) / (10 + 0)
    assert ema.average["weight"].item() == pytest.approx(0.9)
    assert Clock(None).over is False
    assert Clock(0).over is True


def test_every_stage_starts_from_the_shipped_weights(codec):
    """`--init lens/mini/base`: a clone without any state file continues from weights alone."""
    shipped = ROOT / "lens" / "mini" / "base"
    tensors = folder_tensors(shipped / "text_encoder")
    encoder_config = configs.load("mini", "encoder")
    model = Mini(configs.load("mini", "pretrain"), encoder_config, encoder.build(encoder_config))
    pretrain.start_from(model, shipped, encoder_config)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(model.encoder.state_dict()[name], tensors[name])
    carried = encoder.weights_of_folder(encoder_config, shipped)["model.embed_tokens.weight"]
    assert torch.equal(model.encoder.state_dict()["model.embed_tokens.weight"], carried)
    stored = folder_tensors(shipped / "transformer")
    large = configs.load("mini_gpu", "encoder")
    with pytest.raises(
        ValueError, match=r"--init .*base: its MMDiT has num_layers 6, expected 7; num_attention_heads 3"
    ):
        pretrain.start_from(Mini(configs.load("mini_gpu", "pretrain"), large, torch.nn.Module()), shipped, large)
    assert torch.equal(model.transformer.image_in.weight, stored["img_in.weight"])

    out = codec / "from-shipped"
    out.mkdir()
    (out / "codec.pt").write_bytes((codec / "codec.pt").read_bytes())
    config = recipe("vae", DECODER={"batch": 2}, VALIDATION=4)
    vae.train_half(config, "decoder", out, FOREVER, shipped, 1)
    first = load_state(out / "decoder.pt", "vae decoder")["model"]["body.conv_in.weight"]
    assert (first - folder_tensors(shipped / "vae")["decoder.conv_in.weight"]).abs().max() < 0.01  # one small step away
