"""What a GPU run computes, held to the CPU's float32 path: padded text, plans made on the device, bfloat16, backends."""

import argparse
import json
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from lens.config import LensConfig
from lens.ops import backend
from lens.packing import plan
from train import configs, pretrain
from train import export as shipping
from train import text_encoder as encoder
from train.data.small_world.batches import Step
from train.data.small_world.kinds import KINDS
from train.loop.checkpoints import load_state, save_state
from train.loop.keys import keyed
from train.loop.ranks import device_of
from train.networks import generator, text_path
from train.networks.codec import LinearCodec
from train.networks.generator import Mini

PREFIX = list(range(40, 60))
LENGTHS = [7, 5, 5, 2, 0]


@pytest.fixture(scope="module")
def model():
    config = ModuleType("recipe")
    config.__dict__.update(vars(configs.load("mini", "pretrain")))
    config.MODEL = {**config.MODEL, "num_layers": 2}
    encoder_config = configs.load("mini", "encoder")
    mini = Mini(config, encoder_config, encoder.build(encoder_config)).train()
    generator = keyed(7, "away from zero")
    with torch.no_grad():  # modulation and output start at zero, where half of the gradients would vanish
        for parameter in mini.transformer.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    return mini


@pytest.fixture(scope="module")
def step():
    generator = keyed(7, "step")
    ids = torch.randint(60, 900, (4, 7), generator=generator)
    for row, length in zip(ids, LENGTHS):
        row[length:] = 0
    x, target = (torch.randn(5, 16, 32, generator=generator) for _ in range(2))
    return Step(x, target, torch.rand(5, generator=generator), ids, LENGTHS, (4, 4))


def gradients(model, compute, step):
    model.zero_grad(set_to_none=True)
    flow, words = compute(step, model.past(PREFIX), True)
    (flow.mean() + 0.1 * words).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return flow.detach(), words.detach(), found


def test_padded_text_equals_each_caption_alone(model, step):
    packed, last = model.packed_text(step.ids, LENGTHS, model.past(PREFIX))
    alone = text_path.encode_batch(
        model.encoder, [ids[:n].tolist() for ids, n in zip(step.ids, LENGTHS)], PREFIX, model.layers
    )
    assert packed.shape == (sum(LENGTHS), 4, 128)
    assert (packed - torch.cat(alone)).norm() <= 1e-5 * packed.norm()
    assert torch.equal(last, packed[:, -1])


def test_next_token_loss_is_the_mean_over_what_follows(model, step):
    _, last = model.packed_text(step.ids, LENGTHS, model.past(PREFIX))
    with torch.no_grad():
        logits = [model.encoder.lm_head(model.encoder.model.norm(rows)) for rows in last.split(LENGTHS[:4])]
    expected = torch.cat(
        [F.cross_entropy(own[:-1], ids[1:n], reduction="none") for own, ids, n in zip(logits, step.ids, LENGTHS)]
    ).mean()
    torch.testing.assert_close(model.next_token(last, step.ids, LENGTHS).detach(), expected)


def test_the_plan_made_on_a_device_is_the_plan():
    for axes, lengths in (((8, 28, 28), [7, 3, 0, 130]), ((8, 12, 12), [0, 0])):
        ours = generator.packing_on((2, 4), lengths, axes, torch.device("cpu"))
        theirs = plan([(2, 4)] * len(lengths), lengths, axes)
        assert (ours.grids, ours.image_lengths, ours.text_lengths) == (
            theirs.grids,
            theirs.image_lengths,
            theirs.text_lengths,
        )
        for name in ("image_offsets", "text_offsets", "cos", "sin"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), name


def test_bfloat16_on_float32_weights_has_their_gradients(model, step):
    flow, words, exact = gradients(model, model, step)
    rough_flow, rough_words, rough = gradients(model, model.rounded, step)
    assert rough.keys() == exact.keys()
    assert all(p.dtype == torch.float32 for p in [*model.parameters(), *rough.values()])
    assert not torch.equal(flow, rough_flow)  # it is another arithmetic
    assert (flow - rough_flow).norm() < 0.02 * flow.norm()
    assert torch.equal(words, rough_words)  # the encoder's is not
    for part in ("transformer.", "encoder."):
        one, two = (torch.cat([g[n].flatten() for n in exact if n.startswith(part)]) for g in (exact, rough))
        assert F.cosine_similarity(one, two, 0) > 0.99, part


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_reference_ops_train_alike(model, step, precision):
    compute = model if precision == "float32" else model.rounded
    _, _, ours = gradients(model, compute, step)
    with backend.use("reference"):
        _, _, plain = gradients(model, compute, step)
    one, two = (torch.cat([g[n].flatten() for n in ours]) for g in (ours, plain))
    assert ours.keys() == plain.keys()
    assert (one - two).norm() < (1e-5 if precision == "float32" else 0.02) * two.norm()


def test_fused_rows_train_alike_with_one_graph_per_op(model, step):
    torch._dynamo.reset()
    with backend.use("reference"):
        _, _, plain = gradients(model, model, step)
        with generator.fused_rows("aot_eager"):
            _, _, fused = gradients(model, model, step)
            torch._dynamo.utils.counters.clear()
            shorter = Step(step.x, step.target, step.t, step.ids[:2], [7, 5, 0, 0, 0], step.grid)
            gradients(model, model, shorter)  # other lengths: the same graphs
            assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0
    one, two = (torch.cat([g[n].flatten() for n in plain]) for g in (fused, plain))
    assert (one - two).norm() < 1e-5 * two.norm()


def test_a_device_that_is_not_there_is_refused():
    assert device_of("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match="'tpu', expected 'cpu' or 'cuda'"):
        device_of("tpu")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="no usable GPU"):
            device_of("cuda")


def test_the_gpu_recipe_runs_small(tmp_path, monkeypatch):
    """Two steps of four pictures of 64 pixels with everything else as `mini_gpu` says."""
    recipe = ModuleType("recipe")
    recipe.__dict__.update({k: v for k, v in vars(configs.load("mini_gpu", "pretrain")).items() if k.isupper()})
    recipe.SIDE, recipe.WINDOW, recipe.BATCHES, recipe.VALIDATION = 64, 8, ((0, 4),), 4
    recipe.LOG_EVERY = recipe.VALIDATE_EVERY = recipe.SAVE_EVERY = 2
    recipe.SHEET, recipe.PROMPTS = {"steps": 1, "guidance": 3.0, "mu": 0.5}, recipe.PROMPTS[:2]
    encoder_config = configs.load("mini_gpu", "encoder")
    codec = LinearCodec(8, 16, 24)
    codec_state = {"model": codec.state_dict(), "shape": [8, 16, 24], "mean": torch.zeros(32), "var": torch.ones(32)}
    save_state(tmp_path / "codec.pt", {"stage": "vae codec", **codec_state})
    average = {f"model.{k}": v for k, v in encoder.build(encoder_config).named_parameters()}
    save_state(tmp_path / "encoder.pt", {"stage": "encoder", "ema": {"average": average}})
    options = argparse.Namespace(
        config="mini_gpu",
        out=tmp_path / "out",
        vae=tmp_path,
        encoder=tmp_path / "encoder.pt",
        stop_after=None,
        steps=2,
        decay=1,
        joint_steps=1,
        lr_scale=1.0,
        lora=None,
        device="cpu",
        workers=0,
        init=None,
    )
    monkeypatch.setattr(pretrain, "device_of", lambda _name: torch.device("cpu"))
    pretrain.train(recipe, options)
    state = load_state(tmp_path / "out" / "pretrain.pt", "pretrain")
    assert (state["step"], state["data"]) == (2, {"window": 0, "position": 2})
    assert (tmp_path / "out" / "sheet_000002.png").is_file()

    (tmp_path / "encoder").mkdir()
    (tmp_path / "encoder" / "log.jsonl").write_text('{"step": 7}\n')
    options.export, options.encoder = tmp_path / "mini", None
    monkeypatch.setattr(shipping.vae_stage, "export", lambda *_: None)  # its halves were not trained here
    shipping.export(recipe, options)
    written = json.loads((options.export / "recipe.json").read_text())
    assert written["pretrain"]["MODEL"]["num_layers"] == 7
    assert [written["pretrain"][name] for name in ("STEPS", "DECAY", "JOINT_STEPS")] == [2, 1, 1]  # as run
    assert written["encoder"]["MODEL"]["hidden_size"] == 160
    assert set(written["world"]) == {
        "SIDE",
        "CLASSES",
        "TASKS",
        "CAPTIONS",
        "PHOTOGRAPHS",
    }  # its own numbers, no other recipe's
    for stage in ("world", "vae", "encoder", "pretrain"):
        assert written[stage].keys() <= shipping.recipe("mini")[stage].keys() | {"JOINT"}
    assert (options.export / "encoder.jsonl").read_text() == '{"step": 7}\n'  # of the encoder that trained beside it
    assert (options.export / "pretrain.jsonl").read_bytes() == (tmp_path / "out" / "log.jsonl").read_bytes()
    facts = json.loads((options.export / "model_index.json").read_text())["lens"]
    assert facts["classes"] == list(KINDS)
    assert set(facts["caption_styles"]) == {"geneval", "brief", "dense", "translated"}
    assert facts["trained_steps"] == 2
    for file in (text_path.ROOT / encoder_config.TOKENIZER).iterdir():
        assert (options.export / "tokenizer" / file.name).read_bytes() == file.read_bytes()

    again = Mini(recipe, encoder_config, encoder.build(encoder_config))  # another machine goes on from what was shipped
    assert (again.shape.inner_dim, again.shape.num_layers) == (160, 7)
    pretrain.start_from(again, options.export, encoder_config)
    for name, value in again.named_parameters():
        assert torch.equal(value, state["ema"]["average"][name].bfloat16().float()), name


def test_the_preset_is_the_cpu_recipe():
    assert generator.shape_of(configs.load("mini", "pretrain"), configs.load("mini", "encoder")) == LensConfig.mini()


def test_the_gpu_recipe_ships_within_its_budget():
    """All parts in bfloat16 within 24 MB (1e6), each file within 15."""
    from train import vae

    encoder_config = configs.load("mini_gpu", "encoder")
    with torch.device("meta"):
        mini = Mini(configs.load("mini_gpu", "pretrain"), encoder_config, torch.nn.Module())
    sizes = [
        2 * sum(p.numel() for p in module.parameters())
        for module in (mini.transformer, encoder.build(encoder_config), vae.build(configs.load("mini_gpu", "vae")))
    ]
    assert sum(sizes) <= 24e6
    assert max(sizes) <= 15e6
