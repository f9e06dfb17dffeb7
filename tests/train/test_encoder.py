"""The text encoder's training path equals transformers' own forward; its questions, vocabulary and readers are exact."""

import argparse
import json
import multiprocessing
import os
import random
import signal

import pytest
import torch
from tokenizers import Tokenizer

from lens.formats.text_encoder import load_text_encoder, save_text_encoder
from lens.text_encoder import PREFIX_TOKENS, TextEncoder
from train import configs
from train import text_encoder as stage
from train.data.small_world import captions, questions
from train.data.small_world.mentions import mentions, nouns_of, said_background
from train.data.small_world.world import World
from train.evaluate import linear_probe
from train.loop.checkpoints import folder_tensors, save_state
from train.networks import text_path
from train.objectives import language

SHIPPED = text_path.ROOT / "lens" / "mini" / "base"
CONFIG = configs.load("mini", "encoder")


@pytest.fixture(scope="module")
def tokenizer():
    return stage.tokenizer_of(CONFIG.TOKENIZER)


@pytest.fixture(scope="module")
def model():
    built = stage.build(CONFIG)
    with torch.no_grad():  # sinks and router away from zero, so that they take part
        for layer in built.model.layers:
            layer.self_attn.sinks.normal_(generator=torch.Generator().manual_seed(1))
            layer.mlp.router.weight.normal_(generator=torch.Generator().manual_seed(2))
    return built


def hooked(model, ids):
    taken = {}
    hooks = [
        layer.register_forward_hook(
            lambda _m, _a, out, i=i: taken.__setitem__(i, out[0] if isinstance(out, tuple) else out)
        )
        for i, layer in enumerate(model.model.layers)
    ]
    with torch.no_grad():
        model(input_ids=torch.tensor([ids]), use_cache=False)
    for hook in hooks:
        hook.remove()
    return torch.stack([taken[i][0] for i in CONFIG.LAYERS], 1)


def test_prefix_cache_equals_the_whole_sequence(model, tokenizer):
    """Also beyond the sliding window of 128, which a prompt of 31 tokens reaches."""
    captions = [World().scene(seed).caption for seed in range(12)] + ["a red apple " * 20]
    tokens = [tokenizer.encode(caption)[0] for caption in captions]
    assert len(tokenizer.prefix) + max(map(len, tokens)) > CONFIG.MODEL["sliding_window"]
    for ids, features in zip(tokens, text_path.encode_batch(model, tokens, tokenizer.prefix)):
        whole = hooked(model, tokenizer.prefix + ids)[PREFIX_TOKENS:]
        assert features.shape == whole.shape
        assert (features - whole).norm() <= 1e-5 * whole.norm()


def test_gradients_equal_those_through_transformers(model, tokenizer):
    """With the prefix inside the sequence (no cache) every parameter's gradient agrees."""
    ids = torch.tensor([tokenizer.prefix[:5] + tokenizer.encode("two green books on grass")[0]])
    weight = torch.randn(ids.shape[1], CONFIG.MODEL["hidden_size"], generator=torch.Generator().manual_seed(3))

    def gradients(features):
        model.zero_grad()
        (features * weight).sum().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    ours = gradients(text_path.residuals(model, ids)[0][-1][0])
    taken = []
    hook = model.model.layers[-1].register_forward_hook(
        lambda _m, _a, out: taken.append(out[0] if isinstance(out, tuple) else out)
    )
    model(input_ids=ids, use_cache=False)
    hook.remove()
    theirs = gradients(taken[0].view(ids.shape[1], -1))
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert (ours[name] - value).norm() <= 1e-4 * value.norm() + 1e-7, name


def test_released_folder_gives_the_pipeline_the_same_features(model, tokenizer, tmp_path):
    save_text_encoder(model, tmp_path)
    loaded = load_text_encoder(tmp_path, torch.float32, "cpu")
    encoder = TextEncoder(tokenizer.chat, loaded, CONFIG.LAYERS)
    rounded = stage.build(CONFIG)
    rounded.load_state_dict({k: v.bfloat16().float() for k, v in model.state_dict().items()})
    ids, _ = tokenizer.encode("a penguin under a starry sky")
    own = text_path.encode_batch(rounded, [ids], tokenizer.prefix)[0]
    for layer, features in enumerate(encoder.features(tokenizer.prefix + ids)):
        assert (features - own[:, layer]).norm() <= 1e-5 * own[:, layer].norm()


@pytest.mark.parametrize("fill", [0.0, 0.75])
def test_padded_calls_equal_one_call_per_length(model, tokenizer, fill):
    """Features and gradients; what pads a sample is read by nobody."""
    world = World(captions={"brief": 0.7, "dense": 0.3})
    tokens = [tokenizer.encode(world.scene(seed).caption)[0] for seed in range(10)]

    def run(fill):
        model.zero_grad()
        packed, lengths = text_path.encode_packed(model, tokens, tokenizer.prefix, fill=fill)
        packed.square().mean().backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        return packed.detach(), lengths, gradients

    (exact, lengths, gradients), (padded, same, others) = run(1.0), run(fill)
    assert lengths == same == [len(ids) for ids in tokens]
    assert (padded - exact).norm() <= 1e-5 * exact.norm()
    assert all((a - b).norm() <= 1e-4 * a.norm() + 1e-7 for a, b in zip(gradients, others))
    with pytest.raises(ValueError, match="at least one token"):
        text_path.encode_packed(model, [[1], []], tokenizer.prefix)


def test_an_answer_is_a_harmony_turn(tokenizer):
    ids, start = tokenizer.encode_answer("a red car", "The picture shows a red car.")
    text = tokenizer.chat._with_markers.decode(ids, skip_special_tokens=False)
    head = "a red car<|end|><|start|>assistant<|channel|>final<|message|>"
    assert text == head + "The picture shows a red car.<|return|>"
    assert tokenizer.chat._with_markers.decode(ids[:start], skip_special_tokens=False) == head


@pytest.mark.parametrize("style", captions.STYLES)
def test_questions_are_about_what_the_caption_says(tokenizer, style):
    world = World(captions=style)
    for seed in range(150):
        scene = world.scene(seed)
        ids, offsets = tokenizer.encode(scene.caption)
        found = mentions(scene)
        distinct = {(t.kind, t.colour) for t in scene.things}
        assert {(scene.things[m.thing].kind, scene.things[m.thing].colour) for m in found} == distinct, scene.caption
        for mention in found:
            for end in mention.nouns:
                assert scene.caption[:end].lower().endswith(nouns_of(scene.things[mention.thing].kind, scene.language))
        asked = questions.asks(scene, offsets, len(ids) - 1, first=1000)
        by = {name: [a for a in asked if a.attribute == name] for name in questions.SIZES}
        assert {questions.CLASSES[a.value] for a in by["class"]} == {kind for kind, _ in distinct}
        assert {questions.COLOURS[a.value] for a in by["colour"]} == {colour for _, colour in distinct}
        for ask in by["class"]:
            start, end = offsets[ask.token - 1000]
            assert any(start < noun <= end for m in found for noun in m.nouns)
        assert [a.value + 1 for a in by["count"]] == ([len(scene.things)] if scene.things else [])
        assert all(a.token == 1000 + len(ids) - 1 for a in by["count"] + by["relation"] + by["background"])
        assert len(by["paper"]) == len(by["ink"]) == (scene.sign is not None)


def test_a_relation_is_asked_as_it_is_said(tokenizer):
    """First named to second named: "x below y" is `below` although the scene stores `above`."""
    world, said = World(tasks={"position": 1.0}, captions="geneval"), set()
    for seed in range(40):
        scene = world.scene(seed)
        ids, offsets = tokenizer.encode(scene.caption)
        [ask] = [a for a in questions.asks(scene, offsets, len(ids) - 1) if a.attribute == "relation"]
        relation = questions.RELATIONS[ask.value]
        assert f" {relation} " in scene.caption
        said.add(relation)
    assert said == set(questions.RELATIONS)


def test_colour_is_known_after_the_later_word():
    """Behind the noun in French and Spanish, before it in English, Chinese and Japanese."""
    world = World(tasks={"color_attr": 1.0}, captions="translated")
    late = dict.fromkeys(("zh", "fr", "ja", "es"), 0)
    for seed in range(80):
        scene = world.scene(seed)
        for mention in mentions(scene):
            late[scene.language] += mention.known > mention.nouns[0]
    assert late["fr"] > 10
    assert late["es"] > 10
    assert late["zh"] == late["ja"] == 0


def test_a_background_is_asked_only_where_it_is_said():
    world, said = World(captions="brief"), 0
    for seed in range(100):
        scene = world.scene(seed)
        bare = captions.caption(scene, random.Random(0), "geneval") if captions.can_say(scene, "geneval") else ""
        assert said_background(scene) in (None, scene.background)
        said += said_background(scene) is not None
        assert said_background(type(scene)(**{**vars(scene), "style": "geneval", "caption": bare})) is None
    assert 60 <= said <= 95


def test_vocabulary_moves_by_spelling(tmp_path):
    """Shared tokens keep their rows; a new one starts from the mean of its pieces, or at random; other tensors pass unchanged."""
    target = text_path.ROOT / CONFIG.TOKENIZER
    weights = folder_tensors(SHIPPED / "text_encoder")
    moved = text_path.rebase_vocabulary(weights, SHIPPED / "tokenizer", target)
    old, new = (json.loads((f / "tokenizer.json").read_text()) for f in (SHIPPED / "tokenizer", target))
    name = "model.embed_tokens.weight"
    assert len(moved[name]) == len(moved["lm_head.weight"]) == stage.build(CONFIG).config.vocab_size
    before, after = ({**d["model"]["vocab"], **{t["content"]: t["id"] for t in d["added_tokens"]}} for d in (old, new))
    for token in ("\u0120apple", "\u0120red", "<|end|>", "a"):
        assert torch.equal(moved[name][after[token]], weights[name][before[token]])
    fresh = [t for t in after if t not in before]
    if fresh:  # as long as the shipped weights have a vocabulary of their own
        model = Tokenizer.from_file(str(SHIPPED / "tokenizer" / "tokenizer.json")).model
        drawn = []
        for token in fresh:
            pieces = model.tokenize(token)
            if all(len(piece.value) == 1 for piece in pieces):
                drawn.append(moved[name][after[token]])
            else:
                mean = torch.stack([weights[name][piece.id] for piece in pieces]).mean(0)
                assert torch.allclose(moved[name][after[token]], mean)
        spread = torch.stack(drawn).std() / weights[name].std()
        assert 0.8 < spread < 1.2
        assert len(torch.stack(drawn).unique(dim=0)) == len(drawn)
        again = text_path.rebase_vocabulary(weights, SHIPPED / "tokenizer", target)
        assert torch.equal(again[name], moved[name])
    assert moved["model.norm.weight"] is weights["model.norm.weight"]


def test_foreign_rows_are_refused(tmp_path):
    one, other = text_path.ROOT / CONFIG.TOKENIZER, tmp_path
    document = json.loads((one / "tokenizer.json").read_text())
    document["added_tokens"].append({**document["added_tokens"][0], "id": 9_999, "content": "<|new|>"})
    (other / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match=r"lm_head\.weight has 5 rows"):
        text_path.rebase_vocabulary({"lm_head.weight": torch.zeros(5, 2)}, one, other)


def test_a_batch_learns_from_captions_and_answers(model, tokenizer):
    make = stage.Maker.of(CONFIG)
    batch = make(3)
    assert batch == make(3)
    assert len(batch.ids) == CONFIG.TRAIN["batch"]
    assert batch.begins[: make.captions] == [0] * make.captions
    header = tokenizer.chat._encode(text_path.ANSWER)
    assert batch.ids[-1][batch.begins[-1] + 1 - len(header) : batch.begins[-1] + 1] == header
    width = len(CONFIG.LAYERS) * CONFIG.MODEL["hidden_size"]
    words, probe, right = stage.losses(model, language.Readers(width), tokenizer.prefix, CONFIG.LAYERS, batch)
    assert words > 0
    assert probe > 0
    assert {"class", "colour", "count"} <= right.keys()


def test_linear_readers_find_what_is_there():
    """What is linear in the features is separated; the decay is chosen on training data; noise stays unreadable."""
    generator = torch.Generator().manual_seed(0)
    x, other = (torch.randn(500, 16, generator=generator) for _ in range(2))
    truth = torch.randn(16, 5, generator=generator)
    read = linear_probe.reader(x, (x @ truth).argmax(-1), 5)
    assert (read(other) == (other @ truth).argmax(-1)).float().mean() > 0.9
    noise = torch.randint(5, (500,), generator=generator)
    assert (linear_probe.reader(x, noise, 5)(other) == noise).float().mean() < 0.3


def test_acceptance_reports_and_refuses(tmp_path, capsys, monkeypatch):
    """The shipped folder through the command's own path; 1.1 cannot be reached. A pretrain state gives the same encoder."""
    monkeypatch.setattr(linear_probe, "DECAYS", (1e-3,))
    options = argparse.Namespace(
        model=SHIPPED,
        state=None,
        out=tmp_path,
        device="cpu",
        scenes=96,
        held=48,
        json=tmp_path / "a.json",
        require=None,
    )
    assert linear_probe.run(CONFIG, options) == 0
    figures = json.loads((tmp_path / "a.json").read_text())
    assert {"class", "colour", "count", "relation"} <= figures.keys()
    assert figures["class"]["n"] >= 48
    assert figures["count"]["held_out"] > 0.3
    options.require = 1.1
    assert linear_probe.run(CONFIG, options) == 1
    assert "below 1.1: class, colour, count, relation" in capsys.readouterr().out
    held = linear_probe.scenes_of("held_out", 8)
    assert {scene.split for scene in held} == {"held_out"}
    assert len({scene.style for scene in held}) >= 3


@pytest.mark.parametrize(("kind", "prefix"), [("pretrain", "encoder."), ("encoder", "model.")])
def test_acceptance_reads_states_of_both_stages(model, tmp_path, kind, prefix):
    average = {prefix + name: p.detach() for name, p in model.named_parameters()} | {"transformer.x": torch.zeros(1)}
    save_state(tmp_path / "a.pt", {"stage": kind, "ema": {"average": average}})
    options = argparse.Namespace(model=None, state=tmp_path / "a.pt", out=tmp_path)
    loaded, _, layers = linear_probe.load(CONFIG, options)
    assert layers == CONFIG.LAYERS
    assert all(torch.equal(p, q) for p, q in zip(loaded.parameters(), model.parameters()))


def test_batches_of_workers_are_the_same():
    """In order, bit for bit, from any step on; a stop signal to the whole group is left to the training."""
    make = stage.Maker(CONFIG.TOKENIZER, (("brief", 1.0),), captions=2, pairs=1)
    ahead = stage.batches(make, 5, workers=1)
    assert next(ahead) == make(5)
    (worker,) = multiprocessing.active_children()
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(worker.pid, number)
    later = [next(ahead) for _ in range(3)]  # the last two were asked for after the signals
    assert later == [make(6), make(7), make(8)]
    ahead.close()
    assert not worker.is_alive()


def test_the_gpu_recipe_is_whole():
    config = configs.load("mini_gpu", "encoder")
    model = stage.build(config)
    make = stage.Maker.of(config)
    assert (make.captions + make.pairs, make.tokenizer) == (config.TRAIN["batch"], CONFIG.TOKENIZER)
    assert 2 * sum(p.numel() for p in model.parameters()) < 9e6  # bytes in bfloat16


def test_everything_follows_the_device_of_the_model(tokenizer):
    """On torch's meta device, which refuses to mix with tensors of the CPU as a GPU does."""
    make = stage.Maker(CONFIG.TOKENIZER, (("brief", 1.0),), captions=6, pairs=1)
    readers = language.Readers(len(CONFIG.LAYERS) * CONFIG.MODEL["hidden_size"]).to("meta")
    words, probe, right = stage.losses(
        stage.build(CONFIG).to("meta"), readers, tokenizer.prefix, CONFIG.LAYERS, make(0)
    )
    (words + probe).backward()
    assert words.device.type == probe.device.type == right["class"].device.type == "meta"
