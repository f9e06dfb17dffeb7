"""The text encoder's training path equals transformers' own forward; its labels and state are exact."""

import pytest
import torch

from lens import checkpoint
from lens.checkpoint import load_text_encoder
from lens.text_encoder import PREFIX_TOKENS, TextEncoder
from train import configs, text_path
from train import encoder as stage
from train.data.sprites import KINDS, PALETTE
from train.data.world import World

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
    checkpoint.save_text_encoder(model, tmp_path)
    loaded = load_text_encoder(tmp_path, torch.float32, "cpu")
    encoder = TextEncoder(tokenizer.chat, loaded, CONFIG.LAYERS)
    rounded = stage.build(CONFIG)
    rounded.load_state_dict({k: v.bfloat16().float() for k, v in model.state_dict().items()})
    ids, _ = tokenizer.encode("a penguin under a starry sky")
    own = text_path.encode_batch(rounded, [ids], tokenizer.prefix)[0]
    for layer, features in enumerate(encoder.features(tokenizer.prefix + ids)):
        assert (features - own[:, layer]).norm() <= 1e-5 * own[:, layer].norm()


def test_labels_point_at_the_nouns(tokenizer):
    world, kinds, colours = World(), list(KINDS), [*PALETTE, None]
    for seed in range(200):
        scene = world.scene(seed)
        ids, offsets = tokenizer.encode(scene.caption)
        nouns, whole = stage.labels(scene, offsets)
        assert {(kinds[k], colours[c]) for _, k, c in nouns} == {(t.kind, t.colour) for t in scene.things}
        for token, kind, _ in nouns:
            _, end = offsets[token]
            word = scene.caption[:end].lower()
            assert word.endswith((KINDS[kinds[kind]].noun, KINDS[kinds[kind]].plural)), (scene.caption, word)
        assert len(whole) == 8
        assert len(ids) == len(offsets) + 1
