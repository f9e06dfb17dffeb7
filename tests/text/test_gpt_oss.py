"""Our GPT-OSS against transformers': features layer by layer, what is written, what stays in its files."""

from __future__ import annotations

import copy
import json
import pickle
from functools import lru_cache

import pytest
import torch
from safetensors.torch import save_file
from transformers import GptOssConfig, GptOssForCausalLM

from lens.formats.files import CheckpointError
from lens.formats.gpt_oss import load_gpt_oss, load_lm_head
from lens.gpt_oss import Keys
from lens.ops import reference
from tests.small_pipeline import same_bits

YARN = {"rope_type": "yarn", "factor": 8.0, "beta_fast": 32.0, "beta_slow": 1.0, "rope_theta": 10000.0}
SHAPES = {
    # odd counts of layers and experts, a window that no block is a multiple of
    "odd": dict(
        num_hidden_layers=3, num_local_experts=5, num_experts_per_tok=3, sliding_window=7, hidden_size=96,
        intermediate_size=64, num_attention_heads=6, num_key_value_heads=2, head_dim=16,
        rope_parameters=YARN | {"original_max_position_embeddings": 64, "truncate": False},
    ),
    # one expert of one, a window of one, one key head, no biases of attention, other limits
    "least": dict(
        num_hidden_layers=2, num_local_experts=1, num_experts_per_tok=1, sliding_window=1, hidden_size=64,
        intermediate_size=32, num_attention_heads=3, num_key_value_heads=1, head_dim=8, attention_bias=False,
        swiglu_limit=0.5, swiglu_alpha=1.1, rope_parameters={"rope_type": "default", "rope_theta": 500.0},
    ),
    # a window longer than a block of queries, all layers alike but one
    "wide": dict(
        num_hidden_layers=3, num_local_experts=4, num_experts_per_tok=2, sliding_window=150, hidden_size=32,
        intermediate_size=96, num_attention_heads=4, num_key_value_heads=4, head_dim=8,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
        rope_parameters=YARN | {"original_max_position_embeddings": 32, "truncate": True},
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A function: shape, packed -> (folder, transformers' model of the same weights in float32)."""

    @lru_cache
    def make(shape: str, packed: bool):
        folder = tmp_path_factory.mktemp(f"{shape}-{packed}")
        config = GptOssConfig(
            **SHAPES[shape], vocab_size=211, initializer_range=0.2, pad_token_id=None, eos_token_id=None
        )  # fmt: skip
        torch.manual_seed(5)
        model = GptOssForCausalLM(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():  # but not its tables, which no file holds
                parameter.copy_(parameter.bfloat16())
        tensors = {k: v.clone() for k, v in model.state_dict().items()}
        generator = torch.Generator().manual_seed(6)
        for key in [k for k in tensors if k.endswith(("gate_up_proj", "down_proj")) and packed]:
            experts, inputs, outputs = tensors.pop(key).shape
            blocks = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), generator=generator, dtype=torch.uint8)
            scales = torch.randint(122, 125, (experts, outputs, inputs // 32), generator=generator, dtype=torch.uint8)
            tensors[f"{key}_blocks"], tensors[f"{key}_scales"] = blocks, scales
            with torch.no_grad():
                model.get_parameter(key).copy_(reference.mxfp4(blocks, scales).transpose(1, 2))
        stored = {k: v if v.dtype == torch.uint8 else v.bfloat16() for k, v in tensors.items()}
        save_file(stored, folder / "model.safetensors")
        settings = json.loads(config.to_json_string(use_diff=False))
        if packed:
            settings["quantization_config"] = {"quant_method": "mxfp4"}
        (folder / "config.json").write_text(json.dumps(settings))
        return folder, model

    return make


def tokens(count: int, seed: int = 0) -> list[int]:
    return torch.randint(0, 211, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.no_grad()
def residuals(model, ids) -> list[torch.Tensor]:
    """transformers' residual after every layer, [S, D] each."""
    found = []
    hooks = [
        layer.register_forward_hook(lambda _m, _i, out: found.append((out[0] if isinstance(out, tuple) else out)[0]))
        for layer in model.model.layers
    ]
    try:
        model.model(input_ids=torch.tensor([ids]), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def error(got, exact) -> float:
    return float((got.float() - exact.float()).norm() / exact.float().norm())


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "expanded"])
@pytest.mark.parametrize("shape", SHAPES)
def test_features_layer_by_layer(checkpoint, shape, packed):
    """float32: to rounding. bfloat16: within transformers' own error in bfloat16, on prompts of 1 to 300 tokens, packed."""
    folder, exact = checkpoint(shape, packed)
    layers = range(len(exact.model.layers))
    begin = tokens(19)
    prompts = [begin + tokens(count, count) for count in (1, 5, 131, 281)]
    wanted = [residuals(exact, ids) for ids in prompts]
    full, half = (load_gpt_oss(folder, kind, "cpu") for kind in (torch.float32, torch.bfloat16))
    for sample, states in zip(full.features(prompts, layers, len(begin)), wanted):
        for n in layers:
            assert error(sample[n], states[n][len(begin) :]) <= 1e-5
    theirs = copy.deepcopy(exact).bfloat16()
    theirs.model.rotary_emb = exact.model.rotary_emb  # as loaded in bfloat16: its tables are float32
    rounded = [residuals(theirs, ids) for ids in prompts]
    made = half.features(prompts, layers, len(begin))
    for n in layers:
        ours = torch.cat([sample[n] for sample in made])
        assert ours.dtype == torch.bfloat16
        truth, other = (torch.cat([states[n][len(begin) :] for states in run]) for run in (wanted, rounded))
        assert error(ours, truth) <= 1.2 * error(other, truth), n


def test_a_prompt_is_the_same_alone_in_company_and_after_others(checkpoint):
    """Bits: whatever was packed with it, and whether its beginning was read before."""
    folder, _ = checkpoint("odd", True)
    prompts = [tokens(40, 1), tokens(40, 1)[:20] + tokens(9, 2), tokens(97, 3)]
    first = load_gpt_oss(folder, torch.float32, "cpu")
    together = first.features(prompts, (0, 2), 20)
    assert len(first._prefixes) == 2
    for own, expected in zip(prompts, together):
        assert same_bits(first.features([own], (0, 2), 20)[0], expected)
        assert same_bits(load_gpt_oss(folder, torch.float32, "cpu").features([own], (0, 2), 20)[0], expected)
    again = pickle.loads(pickle.dumps(first))
    assert len(again._prefixes) == 0
    assert same_bits(again.features(prompts, (0, 2), 20), together)


@torch.no_grad()
def test_a_beginning_is_read_again_where_the_weights_were_edited(checkpoint, monkeypatch):
    """Through torch or behind its back; and only then, also where the weights lie elsewhere in memory since."""
    folder, _ = checkpoint("odd", False)
    model, prompt, begun = load_gpt_oss(folder, torch.float32, "cpu"), tokens(40, 1), []
    kept, keep = model._prefixes, type(model._prefixes).keep
    monkeypatch.setattr(type(kept), "keep", lambda self, *own: begun.append(self) or keep(self, *own))
    weights = dict(model.layers[0].named_parameters())
    edits = [
        lambda: weights["self_attn.q_proj.weight"][1].mul_(3),  # few elements, but counted
        lambda: weights["mlp.experts.down_proj"].data.mul_(1.5),
        lambda: weights["self_attn.k_proj.bias"].data[2:3].add_(1),
        lambda: weights["self_attn.sinks"].data[0:1].add_(1),
        lambda: model.embed_tokens.weight.data[prompt[3]].add_(1),
    ]
    before = model.features([prompt], (0, 2), 20)[0]
    for edit in edits:
        edit()
        made = model.features([prompt], (0, 2), 20)[0]
        assert not same_bits(made, before)
        assert same_bits(made, copy.deepcopy(model).features([prompt], (0, 2), 20)[0])
        before = made
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    assert same_bits(model.features([prompt], (0, 2), 20)[0], before)
    assert sum(own is kept for own in begun) == 1 + len(edits)


@torch.no_grad()
def test_streamed_weights_are_watched_without_reading_them(checkpoint, monkeypatch):
    """torch's counts tell of an edit; a glance at pages that were given back would read them from their file again."""
    model, prompt = load_gpt_oss(checkpoint("odd", False)[0], torch.float32, "cpu"), tokens(40, 1)
    model.streamed = True
    monkeypatch.setattr("lens.gpt_oss.glance", lambda weights: pytest.fail("streamed weights were read"))
    before = model.features([prompt], (0, 2), 20)[0]
    assert same_bits(model.features([prompt], (0, 2), 20)[0], before)
    model.layers[0].self_attn.q_proj.weight.mul_(3)
    made = model.features([prompt], (0, 2), 20)[0]
    assert not same_bits(made, before)
    assert same_bits(made, copy.deepcopy(model).features([prompt], (0, 2), 20)[0])


def test_every_layer_is_read_once_also_by_the_first_prompt(checkpoint):
    """The beginning runs in the same pass as what follows it: weights that must be fetched are fetched once."""
    model = load_gpt_oss(checkpoint("odd", True)[0], torch.float32, "cpu")
    rows: list[int] = []
    for layer in model.layers:
        layer.mlp.register_forward_pre_hook(lambda _, given: rows.append(len(given[0])))
    first = tokens(40, 1)
    model.features([first, first[:20] + tokens(5, 2)], (0, 2), 20)
    assert rows == [20 + 20 + 5] * 3
    rows.clear()
    model.features([tokens(40, 1)], (0, 2), 20)
    assert rows == [20] * 3


def test_only_as_many_beginnings_are_kept_as_the_cache_holds(checkpoint):
    model = load_gpt_oss(checkpoint("least", True)[0], torch.float32, "cpu")
    for seed in range(11):
        model.features([tokens(6, seed)], (1,), 4)
    assert len(model._prefixes) == 8


# ------------------------------------------------------------------------------------------------ writing


@pytest.mark.parametrize(("shape", "packed"), [("odd", True), ("odd", False), ("wide", True)])
def test_what_is_written_is_transformers_token_for_token(checkpoint, shape, packed):
    folder, theirs = checkpoint(shape, packed)  # not a window of one, which transformers' cache takes for none
    model = load_gpt_oss(folder, torch.float32, "cpu")
    head = load_lm_head(folder, model, "cpu")
    assert head.dtype == torch.bfloat16  # converted as it is read
    for seed, count in ((1, 1), (2, 40)):
        ids = tokens(count, seed)
        expected = theirs.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, count:].tolist()
        assert model.write(head, ids, 12) == expected
        end = expected[5]
        assert model.write(head, ids, 12, stop=[end]) == expected[: expected.index(end) + 1]


def test_writing_with_a_temperature_is_the_generators(checkpoint):
    folder, theirs = checkpoint("odd", True)
    model = load_gpt_oss(folder, torch.float32, "cpu")
    head, ids = load_lm_head(folder, model, "cpu"), tokens(12)

    def draw(seed, temperature):
        return model.write(head, ids, 1, temperature=temperature, generator=torch.Generator().manual_seed(seed))[0]

    assert [draw(s, 1.0) for s in range(3)] == [draw(s, 1.0) for s in range(3)]
    with torch.no_grad():
        shares = (theirs(torch.tensor([ids])).logits[0, -1] / 3.0).softmax(-1)
    generator = torch.Generator().manual_seed(4)  # the same token as softmax(logits / 3) of transformers draws
    expected = int(torch.multinomial(shares, 1, generator=torch.Generator().manual_seed(4)))
    assert model.write(head, ids, 1, temperature=3.0, generator=generator) == [expected]
    assert draw(1, 1e-4) == model.write(head, ids, 1)[0]
    with pytest.raises(ValueError, match=r"temperature must be 0, or positive with a generator, got 0\.5"):
        model.write(head, ids, 1, temperature=0.5)


def test_an_encoder_cut_short_cannot_write(checkpoint):
    folder, _ = checkpoint("odd", True)
    model = load_gpt_oss(folder, torch.float32, "cpu", 2)
    with pytest.raises(CheckpointError, match="2 of 3 layers are loaded: it cannot write"):
        load_lm_head(folder, model, "cpu")
    with pytest.raises(ValueError, match="needs all 3 layers, has 2"):
        model.write(torch.zeros(211, 96), [1], 1)


# ------------------------------------------------------------------------------------------------ files


def in_the_file(model) -> set[str]:
    """Names of the parameters that lie in the mapping."""
    (own,) = model.pages._maps
    view = torch.frombuffer(own, dtype=torch.uint8)
    begin, end = view.data_ptr(), view.data_ptr() + view.numel()
    return {name for name, p in model.named_parameters() if begin <= p.data_ptr() < end}


def test_weights_stay_in_their_file(checkpoint):
    """In the dtype they are stored in, all of them; in another the experts and the embedding; writing copies none."""
    folder, _ = checkpoint("odd", True)
    half, full = (load_gpt_oss(folder, kind, "cpu") for kind in (torch.bfloat16, torch.float32))
    names = {name for name, _ in half.named_parameters()}
    assert in_the_file(half) == names
    kept = {n for n in names if n.endswith(("_blocks", "_scales"))} | {"embed_tokens.weight"}
    assert in_the_file(full) == kept
    before = half.write(load_lm_head(folder, half, "cpu"), tokens(9), 4)
    assert in_the_file(half) == names
    half.pages.drop()  # and come back as they were
    assert half.write(load_lm_head(folder, half, "cpu"), tokens(9), 4) == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope_type must be default or yarn, got 'longrope'"),
        ({"rope_parameters": {**YARN, "factor": "x"}}, "factor must be a positive number, got x"),
        ({"hidden_act": "gelu"}, "hidden_act must be silu, got 'gelu'"),
        ({"layer_types": ["full_attention"]}, "layer_types names 1 layers, num_hidden_layers is 3"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_that_are_not_supported_are_refused(checkpoint, tmp_path, changes, message):
    folder, _ = checkpoint("odd", True)
    settings = json.loads((folder / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(settings))
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"config\.json: not a configuration of GPT-OSS: .*" + message):
        load_gpt_oss(tmp_path, torch.float32, "cpu")


def test_the_released_names_of_rope_are_read(checkpoint, tmp_path):
    """rope_scaling and rope_theta apart, as openai/gpt-oss-20b has them."""
    folder, _ = checkpoint("odd", True)
    settings = json.loads((folder / "config.json").read_text())
    rope = settings.pop("rope_parameters")
    settings |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    assert load_gpt_oss(tmp_path, torch.float32, "cpu").config == load_gpt_oss(folder, torch.float32, "cpu").config


def test_keys_grow_in_place():
    first = Keys(2)
    more = Keys(5, first)  # filled in the same pass, before the layer of those that follow
    held, _ = first.extended(0, torch.ones(2, 1, 4), torch.ones(2, 1, 4))
    keys, values = more.extended(0, torch.full((1, 1, 4), 7.0), torch.zeros(1, 1, 4))
    assert keys[:, 0, 0].tolist() == [1, 1, 7]
    assert values[:, 0, 0].tolist() == [1, 1, 0]
    assert held.shape[0] == 2
