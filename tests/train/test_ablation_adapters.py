"""FLUX.1's and SD3's latents, Qwen3's features, Lens-Toy: at shapes small enough for a test."""

import argparse
from types import SimpleNamespace

import pytest
import torch

from lens.config import LensConfig
from train import configs, cost, shards
from train import pretrain_on_shards as flow
from train.ablations.adapters import ChatModelText, ScaledLatents, TemplateTokens, relative_layers
from train.data.buckets import Bucket
from train.data.images import fitted
from train.data.shards import FEATURES, LATENTS, TEXT, ShardSet, array_of


@pytest.fixture(scope="module")
def vae():
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    return AutoencoderKL(
        **kinds, block_out_channels=(4, 4, 4, 4), layers_per_block=1, norm_num_groups=2, latent_channels=16,
        shift_factor=0.1159, scaling_factor=0.3611, use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip


def test_latents_are_shifted_scaled_and_patched(vae):
    codec = ScaledLatents(vae)
    pixels = torch.randint(0, 256, (2, 32, 48, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    tokens = codec.encode(pixels)
    assert tokens.shape == (2, 2 * 3, codec.channels) == (2, 6, 64)
    z = (vae.encode(pixels.float().permute(0, 3, 1, 2) / 127.5 - 1).latent_dist.mode() - 0.1159) * 0.3611
    # token (row 1, column 2): channels in the order (c p1 p2)
    assert torch.allclose(tokens[:, 1 * 3 + 2], z[:, :, 2:4, 4:6].flatten(1), atol=1e-6)
    back = codec.decode(tokens, (2, 3))
    assert (back.shape, back.dtype) == (pixels.shape, torch.uint8)
    direct = vae.decode(z / 0.3611 + 0.1159, return_dict=False)[0]
    assert torch.equal(back, ((direct.clamp(-1, 1) + 1) * 127.5).byte().permute(0, 2, 3, 1))


def test_another_stride_is_refused():
    with pytest.raises(ValueError, match="stride 4, expected 8"):
        ScaledLatents(SimpleNamespace(config=SimpleNamespace(block_out_channels=(4, 4, 4))))


def test_layers_at_the_same_relative_depth():
    assert relative_layers(24) == (5, 11, 17, 23)
    assert relative_layers(28) == (6, 13, 20, 27)  # Qwen3 0.6B and 1.7B
    assert relative_layers(36) == (8, 17, 26, 35)  # 4B
    with pytest.raises(ValueError, match="expected at least 4"):
        relative_layers(3)


def test_features_of_a_chat_model_are_those_of_the_whole_sequence():
    from transformers import Qwen3Config, Qwen3Model

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    model = Qwen3Model(config).eval()
    encoder = ChatModelText(model, SimpleNamespace(prefix=[1, 2, 3]), layers=(0, 1, 2))
    ids = [[4, 5, 6, 7], [8, 9], [10]]
    found = encoder.encode(ids)
    assert found.shape == (7, 3, 16)
    assert encoder.shape == (3, 16)
    for own, rows in zip(ids, found.split([4, 2, 1])):
        states = model(torch.tensor([[1, 2, 3, *own]]), output_hidden_states=True).hidden_states
        for k in range(3):
            assert torch.allclose(rows[:, k], states[k + 1][0, 3:], atol=1e-5)
    assert ChatModelText(model, SimpleNamespace(prefix=[1])).layers == (0, 1, 2, 3)


class Characters:
    """A tokenizer of one id a character, with a chat template of its own."""

    def apply_chat_template(self, turns, tokenize, add_generation_prompt):
        assert not tokenize
        assert not add_generation_prompt
        return "".join(f"[{turn['role']}]{turn['content']}[/]" for turn in turns)

    def __call__(self, text, add_special_tokens):
        return {"input_ids": [ord(c) for c in text]}


def test_the_prefix_is_what_all_captions_share():
    tokens = TemplateTokens(Characters(), longest=400)
    assert "".join(map(chr, tokens.prefix)).endswith("[/][user]")
    assert "".join(map(chr, tokens("a fox"))) == "a fox[/]"
    assert len(tokens("x" * 999)) == 400 - len(tokens.prefix)
    changing = Characters()
    changing.apply_chat_template = lambda turns, **_: f"{len(turns[1]['content'])}[user]{turns[1]['content']}"
    with pytest.raises(ValueError, match="depend on it: 'a fox'"):
        TemplateTokens(changing)("a fox")


def test_lens_toy_is_the_papers_size():
    toy = configs.load("released/lens_toy", "pretrain")
    config = flow.model_of(toy)
    assert (config.num_layers, config.inner_dim) == (14, LensConfig().inner_dim)
    total, _ = cost.parameters(config)
    assert 1.15e9 < total < 1.3e9  # "1.2B"
    assert set(toy.OPEN) >= {"SLOTS", "STEPS"}
    latents_of_16 = configs.override(toy, ["MODEL.in_channels=64", "MODEL.out_channels=16"])
    assert flow.model_of(latents_of_16).in_channels == 64
    text = cost.dry_run(toy, 8, None, "a100", 0.4)
    assert "GPU hours" in text


def test_shards_hold_what_another_autoencoder_and_encoder_make(vae, tmp_path):
    """`--vae kl:FOLDER --encoder chat:FOLDER`: numbers of these networks, found again by their fingerprints."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3Model

    vae.save_pretrained(tmp_path / "vae")
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=24, num_attention_heads=2, num_key_value_heads=1, head_dim=8)
    Qwen3Model(Qwen3Config(vocab_size=300, num_hidden_layers=4, **sizes)).save_pretrained(tmp_path / "chat")
    letters = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    letters.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast = PreTrainedTokenizerFast(tokenizer_object=letters)
    fast.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
    fast.save_pretrained(tmp_path / "chat")
    own = {"vae": f"kl:{tmp_path / 'vae'}", "encoder": f"chat:{tmp_path / 'chat'}"}

    def build(out, *more):
        parser = argparse.ArgumentParser()
        shards.add_arguments(parser)
        words = [
            "--world",
            "mini",
            "--bases",
            "64",
            "--aspects",
            "1:1",
            "--per-bucket",
            "2",
            "--out",
            str(tmp_path / out),
        ]
        assert shards.run(parser.parse_args([*words, *more])) == 0
        return ShardSet(tmp_path / out)

    found = build("both", "--precompute", "latents,text", "--vae", own["vae"], "--encoder", own["encoder"])
    codec = ScaledLatents(vae)
    tokens, text = ChatModelText.of_folder(tmp_path / "chat", dtype=torch.float32)
    assert found.precomputed == {"latents": codec.fingerprint, "text": text.fingerprint}
    sample = found.member(Bucket(64, "1:1"), 1)
    pixels = torch.from_numpy(fitted(sample.read("png"), (64, 64)))[None]
    assert torch.equal(array_of(sample.read(LATENTS)), codec.encode(pixels)[0])
    ids = tokens(sample.read(TEXT).decode())
    assert torch.equal(array_of(sample.read(FEATURES)), text.encode([ids]))
    beside = build("beside", "--precompute", "latents,text", "--model", "lens/mini/base", "--encoder", own["encoder"])
    assert beside.precomputed["text"] == text.fingerprint
    assert beside.precomputed["latents"] not in (codec.fingerprint, None)
    for flags, words in (
        (["--vae", "sd3:x"], "--vae sd3:x: expected a path, or one of kl, vtp before a colon"),
        (["--vae", "vtp:nowhere"], "--vae vtp:nowhere: no folder nowhere"),
        (["--encoder", own["encoder"], "--vae", "none"], "expected --model, or --vae and --encoder"),
    ):
        with pytest.raises(ValueError, match=words):
            build("not", "--precompute", "latents,text", *flags)
