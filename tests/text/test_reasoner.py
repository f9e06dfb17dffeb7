"""The reasoner: what an answer means, whatever it is wrapped in; 80 wishes; the encoder that writes; pipeline and command."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

pytest.importorskip("openai")
pytest.importorskip("tenacity")

import lens
from lens import CheckpointError, LensPipeline, image_file
from lens.chat_client import BadAnswer, ChatClient, ChatError
from lens.cli import __main__ as cli
from lens.formats import parts
from lens.formats.gpt_oss import REASONER, load_writer
from lens.formats.safetensors import save_tensors
from lens.formats.text_encoder import load_text_encoder, with_lm_head
from lens.reasoner import (
    CATEGORIES,
    PROMPTS,
    SYSTEMS,
    EmbeddedReasoner,
    PromptsRefused,
    Refined,
    Refused,
    ServerReasoner,
    decided,
    final_text,
    language,
    system_prompt,
)
from tests import chat_server
from tests.chat_server import serving
from tests.small_pipeline import fresh, shared
from tests.text.wishes import HARMLESS, UNSAFE

DEV = Path(__file__).parents[1] / "golden" / "dev"
DRAWING = ["--model", str(DEV), "--variant", "lens", "--steps", "1", "--size", "32x32", "--seed", "5"]


def drawn(prompt):
    return json.dumps({"prompt": prompt, "refuse": None})


def refusal(category, reason="because"):
    return json.dumps({"prompt": None, "refuse": {"category": category, "reason": reason}})


WRAPPINGS = (
    "{}",
    "  {}\n",
    "```json\n{}\n```",
    '<think>I cannot... {{"prompt": "no"}}</think>\n{}',
    "a template opened this block itself</think>{}",
    "<|channel|>analysis<|message|>Is it safe? I'm sorry.<|end|><|start|>assistant<|channel|>final<|message|>{}<|return|>",
    "<|start|>assistant<|channel|>final <|constrain|>json<|message|>{}",
)


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_an_answer_is_found_in_its_wrapping(wrapping):
    assert decided("a fox", wrapping.format(drawn("a red fox")), "s") == Refined("a fox", "a red fox", "s")
    assert decided("a fox", wrapping.format(refusal("hate")), "s") == Refused("hate", "because")


@pytest.mark.parametrize(
    ("raw", "flag"),
    [
        ("", "empty"),
        ("<think>and so on without end", "empty"),
        ("<|channel|>analysis<|message|>only thoughts<|end|>", "empty"),
        (drawn("  "), "empty"),
        (drawn(None), "empty"),
        ("a red fox", "broken"),
        ("I'm sorry, but I can't help with that.", "broken"),
        ('{"prompt": "a red fo', "broken"),
        ('{"prompt": "a"} {"prompt": "b"}', "broken"),
        ("[1]", "broken"),
        (drawn(3), "broken"),
        (drawn("a fox<|end|>"), "broken"),
        (drawn("a fox \ud800"), "broken"),
        (drawn("x" * 7000), "broken"),
        (drawn("It is soft. It is soft. It is soft. It is soft."), "broken"),
        (drawn("ein roter Fuchs und ein Hase auf der Wiese im Wald"), "language"),
        (drawn("木の上の赤い狐がいる"), "language"),
    ],
)
def test_an_answer_that_is_no_use_is_flagged(raw, flag):
    with pytest.raises(BadAnswer) as raised:
        decided("a fox and a hare on the meadow with the sun", raw, "s")
    assert str(raised.value).partition(": ")[0] == flag


@pytest.mark.parametrize(
    "given",
    [{"category": "unheard of", "reason": ""}, {"category": "other"}, True, "I refuse"],
)
def test_a_refusal_of_any_form_refuses(given):
    raw = json.dumps({"prompt": "and a prompt", "refuse": given})
    assert decided("x", raw, "s") == Refused("other", "no reason given")
    assert final_text(raw) == raw


@pytest.mark.parametrize(
    "given",
    ["null", " None ", "false", "no", "", {"category": "", "reason": ""}, {"category": "none", "reason": "n/a"},
     {"category": None, "reason": None}, {"category": "NULL", "reason": "harmless"}],
)  # fmt: skip
def test_no_in_words_is_no_refusal_of_a_prompt(given):
    """As servers without strict schemas write it."""
    raw = json.dumps({"prompt": "a red fox", "refuse": given})
    assert decided("a fox", raw, "s") == Refined("a fox", "a red fox", "s")


def test_a_reason_without_a_category_refuses_and_so_does_any_word_without_a_prompt():
    raw = json.dumps({"prompt": "a red fox", "refuse": {"category": "", "reason": "it would  hurt"}})
    assert decided("a fox", raw, "s") == Refused("other", "it would hurt")
    raw = json.dumps({"prompt": None, "refuse": "none"})
    assert decided("a fox", raw, "s") == Refused("other", "no reason given")


def test_languages():
    said = {w: language(w) for w in HARMLESS}
    assert said["一只红色的苹果放在木桌上"] == "zh"
    assert said["赤いりんごが木の机の上にある"] == "ja"
    assert said["красное яблоко на столе"] == "ru"
    assert said["ein rotes Auto und ein grüner Baum im Schnee"] == "de"
    assert said["un gato negro con los ojos verdes sobre el tejado"] == "es"
    assert language("le chat est sur la table avec un chien") == "fr"
    assert language('un cartel en el que se lee "THE CAT IS ON THE MAT"') == "es"
    assert language("two owls") == language("") == ""  # too little to tell: nothing is refused for it


# ------------------------------------------------------------------------------------------------ system prompts

HASHES = {
    "general": "9134c9141d1f8e4c",
    "geneval": "685de13b9eac26ba",
    "oneig": "841696363ea4f3a5",
    "text": "1f944f3571b8fd4c",
    "policy": "907b3ec0d1532d13",
}


@pytest.mark.parametrize("name", HASHES)
def test_a_changed_system_prompt_gets_a_new_version(name):
    """Recipes and scores name versions: what a version says never changes. A new text is a new file."""
    text = (PROMPTS / f"{name}.v1.md").read_bytes()
    assert hashlib.sha256(text).hexdigest()[:16] == HASHES[name]


def test_every_system_prompt_ends_with_the_policy(tmp_path):
    policy = (PROMPTS / "policy.v1.md").read_text()
    own = tmp_path / "mine.md"
    own.write_text("Be terse.")
    for name in (*SYSTEMS, own):
        assert system_prompt(name).text.endswith(policy)
        assert "policy.v1" in system_prompt(name).name
    assert system_prompt(own).text.startswith("Be terse.")
    assert all(f"- {category}: " in policy for category in CATEGORIES)
    with pytest.raises(ValueError, match="expected one of general, "):
        system_prompt("nothing")


# ------------------------------------------------------------------------------------------------ a server


def reasoner(server, system="general", **kwargs):
    return ServerReasoner(ChatClient(server.url, "m", wait=(0.001, 0.01), timeout=20, **kwargs), system)


def test_forty_harmless_and_forty_unsafe_wishes():
    """A server that answers in every wrapping, and to some harmless wishes with prose that sounds like a refusal."""
    unsafe = {wish: category for category, wish in UNSAFE}
    assert len(set(HARMLESS)) == len(unsafe) == 40
    assert set(unsafe.values()) == set(CATEGORIES)
    prosaic = set(HARMLESS[10:15])

    def answer(call, _):
        wish = call.user
        if wish in prosaic:
            return "I'm sorry, but I can't help with that."
        where = sorted([*HARMLESS, *unsafe]).index(wish) % len(WRAPPINGS)
        return WRAPPINGS[where].format(refusal(unsafe[wish], "no") if wish in unsafe else drawn(f"{wish}. {wish}"))

    with serving(answer) as server:
        made = dict(zip([*HARMLESS, *unsafe], reasoner(server)([*HARMLESS, *unsafe])))
    assert all(call.system == system_prompt("general").text for call in server.calls)
    assert {w: a.category for w, a in made.items() if isinstance(a, Refused)} == unsafe
    refined = [made[wish] for wish in HARMLESS]
    assert [a.prompt for a in refined] == [w if w in prosaic else f"{w}. {w}" for w in HARMLESS]
    assert {a.wish for a in refined if a.flag} == prosaic
    assert {a.flag for a in refined if a.wish in prosaic} == {"broken"}


def test_fields_of_the_protocol_refuse_and_a_cut_answer_falls_back():
    ways = {
        "a": chat_server.text(None, finish="content_filter"),
        "b": chat_server.text(drawn("half"), finish="length"),
        "c": chat_server.raw(b'{"choices": [{"message": {"content": null, "refusal": "I will not."}}]}'),
        "d": chat_server.raw(b"<html>"),
    }
    with serving(lambda call, _: ways[call.user]) as server:
        a, b, c, d = reasoner(server)(list("abcd"))
    assert (a, c) == (Refused("other", "filtered by the server"), Refused("other", "I will not."))
    assert [(x.prompt, x.flag) for x in (b, d)] == [("b", "broken"), ("d", "broken")]
    assert "token limit" in b.note


def test_a_server_that_does_not_serve_is_an_error_not_a_fallback():
    with (
        serving(lambda *_: chat_server.error(404, "no such model")) as server,
        pytest.raises(ChatError, match="no such"),
    ):
        reasoner(server)(["a fox"])


# ------------------------------------------------------------------------------------------------ the encoder itself


MINI = Path(lens.__file__).parent / "mini"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Lens-Mini with layers to write with that are not its encoder's."""
    made = tmp_path_factory.mktemp("mini")
    for part in (MINI / "base").iterdir():
        if part.name != REASONER:
            (made / part.name).symlink_to(part)
    tensors, noise = load_file(MINI / "base" / "text_encoder" / "model.safetensors"), torch.Generator().manual_seed(1)
    learned = {
        n.removeprefix("model."): v for n, v in tensors.items() if n.startswith(("model.layers.", "model.norm."))
    }
    other = {
        n: v + 0.2 * v.float().std(correction=0) * torch.randn(v.shape, generator=noise) for n, v in learned.items()
    }
    save_tensors(made / REASONER, "model", {n: v.bfloat16() for n, v in other.items()})
    return made


def test_the_embedded_reasoner_writes_the_most_probable_tokens_by_layers_of_its_own(folder):
    """Against transformers' whole forwards without a cache; and no bit of what is drawn from depends on them."""
    pipe = LensPipeline.from_pretrained(folder, device="cpu")
    before = LensPipeline.from_pretrained("mini", device="cpu").encode_text("a red apple")[0]
    ours = EmbeddedReasoner(pipe, max_tokens=3)
    ids = ours.prompt_ids("a red apple <|end|>")
    assert (
        ours.chat.text(ids)
        == "<|start|>user<|message|>a red apple <|end|><|end|><|start|>assistant<|channel|>final<|message|>"
    )
    assert ids.count(ours.chat.ids("<|end|>")[0]) == 1  # the typed one is text
    text, ended = ours.write("a red apple <|end|>")
    grown = list(ids)
    theirs = with_lm_head(load_text_encoder(folder / "text_encoder", torch.float32, "cpu"), folder / "text_encoder")
    encoders = theirs.lm_head.weight.clone()
    told = theirs.model.load_state_dict(load_file(folder / REASONER / "model.safetensors"), strict=False)
    assert (told.missing_keys, told.unexpected_keys) == (["embed_tokens.weight"], [])
    with torch.no_grad():
        for _ in range(3):
            grown.append(int(theirs(torch.tensor([grown]), use_cache=False).logits[0, -1].argmax()))
    assert torch.equal(theirs.lm_head.weight, encoders)
    assert (ours.chat.text(grown[len(ids) :]), ended) == (text, False)
    (answer,) = ours(["a red apple"])
    assert (answer.prompt, answer.flag) == ("a red apple", "broken")
    assert answer.described == "embedded: broken, the words as given"
    assert all(torch.equal(a, b) for a, b in zip(before, pipe.encode_text("a red apple")[0], strict=True))


def test_what_it_is_not_sure_of_gives_way_to_the_users_words(folder, monkeypatch):
    """Probabilities against transformers' softmax; every token below a half is named, none at a half or above."""
    ours = EmbeddedReasoner(LensPipeline.from_pretrained(folder, device="cpu"))
    ids, written = ours.prompt_ids("fruit"), ours.chat.ids("A red apple.")
    theirs = with_lm_head(load_text_encoder(folder / "text_encoder", torch.float32, "cpu"), folder / "text_encoder")
    theirs.model.load_state_dict(load_file(folder / REASONER / "model.safetensors"), strict=False)
    with torch.no_grad():
        logits = theirs(torch.tensor([ids + written]), use_cache=False).logits[0, len(ids) - 1 : -1]
    expected = logits.softmax(-1)[range(len(written)), written]
    found = ours.model.probabilities(ours.head, ids + written, len(ids))
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-7)

    monkeypatch.setattr(ours.model, "write", lambda *args, stop: written + list(stop))
    for shares, flag, note in (
        ([0.9, 0.499, 0.4, 0.9], "unsure", "40% for 'apple' in 'A red apple.'"),
        ([0.9, 0.5, 1, 0.9], "", ""),
    ):
        monkeypatch.setattr(ours.model, "probabilities", lambda *args, shares=shares: torch.tensor(shares))
        (answer,) = ours(["fruit"])
        assert (answer.flag, answer.note) == (flag, note)
        assert answer.prompt == ("fruit" if flag else "A red apple.")


def test_an_adapter_writes_with_the_layers_of_its_base(folder, tmp_path):
    (tmp_path / "adapter_model.safetensors").symlink_to(MINI / "rl" / "adapter_model.safetensors")
    about = json.loads((MINI / "rl" / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**about, "base_model_name_or_path": str(folder)}))
    assert load_writer(parts.find(tmp_path).text_encoder, torch.float32, "cpu") is not None


def test_an_encoder_without_a_head_or_with_layers_left_out_cannot_write(monkeypatch):
    pipe = fresh()
    monkeypatch.setattr(pipe, "text_encoder_files", None)
    with pytest.raises(CheckpointError, match=r"lm_head.weight is missing"):
        EmbeddedReasoner(pipe)
    depth = len(pipe.text_encoder.model.layers)
    del pipe.text_encoder.model.layers[depth - 1 :]
    with pytest.raises(CheckpointError, match=f"{depth - 1} of {depth} layers"):
        EmbeddedReasoner(pipe)


# ------------------------------------------------------------------------------------------------ pipeline and command


def scripted(wishes):
    return [
        Refused("hate", "no") if "bad" in w else Refined(w, f"{w}, in the sun", "m") for w in wishes
    ]  # fmt: skip


def test_the_pipeline_draws_what_the_reasoner_wrote():
    small = {"sizes": [(32, 32)] * 2, "num_inference_steps": 1, "seed": 1, "output_type": "latent"}
    out = shared()(["a fox", "an owl"], reason=scripted, **small)
    assert [r.wish for r in out.reasoned] == ["a fox", "an owl"]
    plain = shared()(["a fox, in the sun", "an owl, in the sun"], **small)
    assert plain.reasoned is None
    assert all(torch.equal(a, b) for a, b in zip(out.images, plain.images))
    with pytest.raises(PromptsRefused, match="prompt 1: hate: no") as raised:
        shared()(["a fox", "bad"], reason=scripted, **small)
    assert raised.value.answers[0].prompt == "a fox, in the sun"


def command(*args):
    return CliRunner().invoke(cli.app, ["generate", *map(str, args)])


def test_the_command_draws_the_others_shows_and_stores_what_it_drew(tmp_path):
    answers = {"a fox": drawn("a red fox in the snow"), "bad": refusal("crime", "it is forged"), "an owl": "no JSON"}
    with serving(lambda call, _: answers[call.user]) as server:
        result = command(
            "a fox", "bad", "an owl", "-o", tmp_path, "--name", "{index}-{seed}", "--sheet", tmp_path / "all.png",
            "--reason", "--reasoner", server.url, "--reasoner-model", "m", *DRAWING,
        )  # fmt: skip
        alone = command(
            "bad", "-o", tmp_path / "alone", "--reason", "--reasoner", server.url, "--reasoner-model", "m", *DRAWING
        )
    assert result.exit_code == 3
    assert result.stdout.splitlines() == [str(tmp_path / n) for n in ("0-5.png", "2-7.png", "all.png")]
    said = " ".join(result.stderr.split())
    assert "refused: 'bad': crime: it is forged" in said
    assert "a fox -> a red fox in the snow" in said
    fox, owl = (image_file.read_recipe(tmp_path / n) for n in ("0-5.png", "2-7.png"))
    assert (fox.prompt, fox.wish, fox.reasoner) == ("a red fox in the snow", "a fox", "m, general.v1, policy.v1")
    assert (owl.prompt, owl.seed) == ("an owl", 7)
    assert owl.reasoner == "m, general.v1, policy.v1: broken, the words as given"
    assert (alone.exit_code, list((tmp_path / "alone").glob("*"))) == (3, [])

    again = command("--like", tmp_path / "0-5.png", "-o", tmp_path / "again.png", "--model", DEV)
    assert again.exit_code == 0, again.output
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "0-5.png").read_bytes()


def test_what_the_command_refuses_and_says():
    assert command("x", "--reasoner", "http://127.0.0.1:1/v1", *DRAWING).exit_code == 2
    assert command("x", "--reason", "--reasoner", "http://127.0.0.1:1/v1", *DRAWING).exit_code == 2
    assert command("x", "--reason", "--reasoner-prompt", "nothing", *DRAWING).exit_code == 2
    assert "nothing is filtered" in " ".join(command("--help").output.replace("│", " ").split())
