"""Mini's pruned tokenizer is a closed part of GPT-OSS's: same pieces where it matters, bytes at worst."""

import json
import re
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from lens.text_encoder import PREFIX_TOKENS, ChatTokenizer
from train import configs
from train.data import tokenizer as stage
from train.data.small_world.captions import STYLES
from train.data.small_world.world import World

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / configs.load("mini", "encoder").TOKENIZER
SHIPPED = ROOT / "lens" / "mini" / "base"


@pytest.fixture(scope="module")
def pruned():
    return Tokenizer.from_file(str(FOLDER / "tokenizer.json"))


def test_rows_and_closure():
    document = json.loads((FOLDER / "tokenizer.json").read_text())
    vocabulary, merges = document["model"]["vocab"], document["model"]["merges"]
    specials = {t["content"]: t["id"] for t in document["added_tokens"]}
    assert len(vocabulary) + len(specials) == stage.ROWS
    assert sorted([*vocabulary.values(), *specials.values()]) == list(range(stage.ROWS))
    assert all(letter in vocabulary for letter in stage._byte_letters())
    assert all(a in vocabulary and b in vocabulary and a + b in vocabulary for a, b in merges)
    made = {a + b for a, b in merges}
    assert all(token in made for token in vocabulary if len(token) > 1), "a token no merge can reach"


@pytest.mark.parametrize("split", ["train", "held_out"])
@pytest.mark.parametrize("style", STYLES)
def test_captions_split_as_in_the_full_tokenizer(pruned, style, split):
    """All but the texts of signs, in every language; rows are few, so one caption in a hundred may open with rarer pieces."""
    world, full = World(split, captions=style), stage.official()
    captions = [re.sub('"[^"]*"', '"A"', world.scene(seed).caption) for seed in range(1_000_000, 1_000_100)]
    mine, whole = ([t.encode(c, add_special_tokens=False).tokens for c in captions] for t in (pruned, full))
    assert sum(a == b for a, b in zip(mine, whole)) >= 99


def test_texts_of_signs_fall_into_letters(pruned):
    """A reader of letters sees them: most words of a sign become one token per letter."""
    from train.data.small_world.signs import word_list

    pieces = [pruned.encode(f'"{word}"', add_special_tokens=False).tokens[1:-1] for word in word_list()]
    spelled = sum(all(len(piece) == 1 for piece in own) for own in pieces)
    assert spelled > 0.8 * len(pieces)


@pytest.mark.parametrize("folder", [FOLDER, SHIPPED / "tokenizer"], ids=["recipe", "shipped"])
@pytest.mark.parametrize("date", ["2024-01-01", "2026-05-23", "2031-12-31", "2035-10-10"])
def test_prefix_is_97_tokens_and_suffix_one(date, folder):
    chat = ChatTokenizer(folder)
    before, after = chat.frame(date)
    assert len(chat._encode(before)) == PREFIX_TOKENS
    assert chat._encode(after) == [chat._with_markers.token_to_id("<|end|>")]


@pytest.mark.parametrize("text", ["", " ", "rhinoceros", "你好 ünïcode\tx\n\n", "🦏", "it's 12345", "<|end|>"])
def test_any_text_survives(pruned, text):
    ids = pruned.encode(text, add_special_tokens=False).ids
    assert pruned.decode(ids, skip_special_tokens=False) == text
    assert all(0 <= i < stage.ROWS for i in ids)


def test_an_altered_vocabulary_is_refused():
    with pytest.raises(ValueError, match="SHA-256"):
        stage.check_official([b"a", b"b"], "some file")


@pytest.mark.parametrize("folder", [FOLDER, SHIPPED / "tokenizer"], ids=["recipe", "shipped"])
def test_the_template_is_the_written_one(folder):
    assert (folder / "chat_template.jinja").read_text() == stage.chat_template()


def test_the_shipped_tokenizer_belongs_to_the_shipped_weights():
    tokenizer = Tokenizer.from_file(str(SHIPPED / "tokenizer" / "tokenizer.json"))
    rows = json.loads((SHIPPED / "text_encoder" / "config.json").read_text())["vocab_size"]
    assert tokenizer.get_vocab_size() == rows
