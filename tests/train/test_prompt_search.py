"""The search over system prompts, on a scripted server: it finds a planted fix, accepts nothing worse, resumes, ends in time."""

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("openai")
pytest.importorskip("tenacity")

from lens.chat_client import Chat, ChatClient, ChatError
from lens.reasoner import ServerReasoner
from tests import chat_server
from tests.chat_server import serving
from train import prompt_search
from train.image_client import ImageClient
from train.rewards.rubric_judge import RubricJudge
from train.search.loop import Candidate, Item, Search, read_items, rise, split

ITEMS = [Item(f"item {k}", f"wish {k}", ("is red", "is there")) for k in range(16)]
START, NOTHING, WORSE, FIX = "Write well.", "Write very well.", "Be brief.", "Name the colour."
EDITS = [NOTHING, WORSE, FIX, WORSE, NOTHING]


def script(call, _):
    """Reasoner, writer and judge in one. Under START and NOTHING a quarter of the pictures are red; WORSE makes none."""
    said = call.system
    if call.body["model"] == "reasoner":
        lucky = int(call.user.split()[1]) % 4 == 0
        red = said.startswith(FIX) or (lucky and not said.startswith(WORSE))
        return json.dumps({"prompt": f"{call.user}{', red' if red else ''}", "refuse": None})
    if call.body["model"] == "writer":
        told = json.loads(call.user)
        assert told["failures"] == [] or told["failures"][0]["failed"] == ["is red: seen"]
        done = EDITS.index(told["system_prompt"]) + 1 if told["system_prompt"] in EDITS else 0
        script.asked += 1
        return json.dumps({"diagnosis": f"edit after {done}", "prompt": EDITS[script.asked - 1]})
    red = pixels_red(call.images[0])
    entries = [{"rubric": n, "reason": "seen", "verdict": v} for n, v in ((1, red), (2, True))]
    return json.dumps({"verdicts": entries})


def pixels_red(url):
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).getpixel((0, 0))[0] > 100


def draw(prompts, seeds):
    """Red where the prompt says so; the seed is in the picture, so that no two items share a judgement."""
    images = [np.zeros((4, 4, 3), np.uint8) for _ in prompts]
    for image, prompt, seed in zip(images, prompts, seeds):
        image[:, :, 0] = 200 if prompt.endswith("red") else 0
        image[1, 1] = [seed % 256, seed // 256 % 256, seed // 65536 % 256]
    return images


@pytest.fixture
def server():
    script.asked = 0
    with serving(script) as running:
        yield running


def search(server, out, generate=draw, **client):
    common = {"cache": out / "cache", "transcript": out / "calls.jsonl", "wait": (0.001, 0.01), **client}
    ask = {name: ChatClient(server.url, name, **common) for name in ("reasoner", "writer", "judge")}
    make = lambda path: ServerReasoner(ask["reasoner"], path)  # noqa: E731
    return Search(ITEMS, START, make, generate, RubricJudge(ask["judge"]), ask["writer"], out), ask


def quiet(_):
    pass


def test_it_finds_the_planted_fix_and_accepts_nothing_worse(server, tmp_path):
    ours, _ = search(server, tmp_path)
    final = ours.run(4, quiet)
    assert [c.text for c in ours.archive] == [START, NOTHING, WORSE, FIX, WORSE]
    assert [c.accepted for c in ours.archive] == [True, False, False, True, False]
    assert [c.parent for c in ours.archive] == [None, 0, 0, 0, 3]
    nothing, worse, fix = ours.archive[1:4]
    assert (nothing.rise, worse.rise < 0, fix.rise > fix.error > 0) == (0, True, True)
    assert final.text == FIX
    assert set(final.dev) == set(final.held) == {1.0}
    assert (tmp_path / "best.md").read_text() == FIX + "\n"
    assert ours.archive[4].rise is None  # a known text is not drawn again
    assert min(ours.archive[0].held) == 0.5  # the first one is judged on the held-out prompts, too
    assert [c.held for c in ours.archive if not c.accepted] == [[]] * 3


@pytest.mark.parametrize("broken_at", [0, 2, 3])
def test_it_goes_on_where_it_was_interrupted(server, tmp_path, broken_at):
    drawn = []

    def once(prompts, seeds):
        drawn.append(len(prompts))
        if len(drawn) == broken_at + 1:
            raise KeyboardInterrupt
        return draw(prompts, seeds)

    whole, _ = search(server, tmp_path / "a")
    whole.run(3, quiet)
    before, script.asked = len(server.calls), 0
    ours, _ = search(server, tmp_path / "b", once)
    with pytest.raises(KeyboardInterrupt):
        ours.run(3, quiet)
    again, _ = search(server, tmp_path / "b")
    assert len(again.archive) == broken_at
    again.run(3, quiet)
    assert again.archive == whole.archive
    assert len(server.calls) - before == before  # nothing was asked twice
    assert len((tmp_path / "b" / "calls.jsonl").read_text().splitlines()) >= before
    other = [*ITEMS[:-1], Item("another", "wish 3", ("is red",))]
    with pytest.raises(ValueError, match="of other prompts"):
        Search(other, START, again.reasoner, draw, again.judge, again.writer, tmp_path / "b")


def test_the_archive_of_another_judge_or_generator_is_refused(tmp_path):
    nothing = None

    def made(fulfilled=0.5, **by):
        return Search(ITEMS, START, nothing, nothing, nothing, nothing, tmp_path, fulfilled=fulfilled, made_by=by)

    made(judge="a", generator="lens:mini 0123").keep(Candidate(START, None, accepted=True))
    assert len(made(judge="a", generator="lens:mini 0123").archive) == 1
    for fulfilled, by, other in (
        (0.5, {"judge": "b", "generator": "lens:mini 0123"}, "judge"),
        (0.5, {"judge": "a", "generator": "lens:mini 4567", "writer": "c"}, "generator, writer"),
        (0.9, {"judge": "a", "generator": "lens:mini 0123"}, "fulfilled"),
    ):
        with pytest.raises(ValueError, match=rf"search.json: of other {other}; give another --out"):
            made(fulfilled, **by)
    state = json.loads((tmp_path / "search.json").read_text())
    del state["made_by"]  # as it was once, and under the name of then
    (tmp_path / "search.json").write_text(json.dumps({**state, "search": "0123"}))
    with pytest.raises(ValueError, match="does not say judge, generator and models; give another --out"):
        made(judge="a", generator="lens:mini 0123")


def test_a_spent_budget_ends_the_search_with_what_was_found(server, tmp_path):
    dev, _ = split(ITEMS, 0.3)
    ours, ask = search(server, tmp_path, max_calls=3 * len(dev) + 1)
    lines = []
    final = ours.run(9, lines.append)
    assert final.text == START
    assert "stopped: reasoner: all" in lines[-1]
    assert max(client.counters.calls for client in ask.values()) <= 3 * len(dev) + 1
    assert len(ours.archive) == 3


def test_the_final_choice_is_made_on_the_held_out_prompts(tmp_path):
    """What developing prefers loses to what holds on prompts that it never saw; not all judged: the last accepted; equal: the first."""
    nothing = None
    search = Search(ITEMS, START, nothing, nothing, nothing, nothing, tmp_path)
    search.archive = [
        Candidate(text, None, accepted=True, dev=[dev]) for text, dev in (("a", 0.1), ("b", 0.5), ("c", 0.9))
    ]
    search.archive.append(Candidate("d", 2, dev=[1.0], held=[1.0]))  # was not accepted
    assert search.chosen().text == "c"
    for candidate, held in zip(search.archive, (0.2, 0.7, 0.3)):
        candidate.held = [held]
    assert search.chosen().text == "b"
    search.archive[0].held = [0.7]
    assert search.chosen().text == "a"
    assert (tmp_path / "best.md").read_text() == "a\n"


def test_the_error_of_a_rise_is_the_bootstraps():
    old = [0.0] * 8
    assert rise([0.25] * 8, old, 0) == (0.25, 0.0)
    assert rise([None] * 8, old, 0) == (0.0, float("inf"))
    differences = np.random.default_rng(1).normal(0.1, 0.3, 200)
    mean, error = rise(differences.tolist(), [0.0] * 200, 0)
    assert mean == pytest.approx(differences.mean())
    assert error == pytest.approx(differences.std() / 200**0.5, rel=0.1)
    assert rise([1.0, None, 0.0], [0.0, 0.0, None], 0) == (1.0, 0.0)


def test_prompts_are_read_and_split(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text(
        '{"id": 1, "prompt": "a fox", "rubrics": ["is a fox"]}\n\n{"id": 2, "prompt": "b", "rubrics": []}\n'
    )
    with pytest.raises(ValueError, match="line 3"):
        read_items(path)
    path.write_text('{"id": 1, "prompt": "a fox", "rubrics": ["is a fox"]}\n')
    assert read_items(path) == [Item("1", "a fox", ("is a fox",))]
    dev, held = split(ITEMS, 0.3)
    assert sorted(i.id for i in [*dev, *held]) == sorted(i.id for i in ITEMS)
    assert split([*ITEMS[::-1], Item("more", "x", ("y",))], 0.3)[1][:1] == held[-1:]
    with pytest.raises(ValueError, match="0 held out"):
        split(ITEMS[:1], 0.0)


def test_the_command_searches(server, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(prompt_search, "generator", lambda source: (draw, "weights") if source == "lens:mini" else None)
    path = tmp_path / "p.jsonl"
    lines = [{"id": str(k), "prompt": f"wish {k}", "rubrics": ["is red", "is there"]} for k in (1, 2)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    from train.__main__ import main

    argv = [
        "prompt_search",
        "--prompts",
        path,
        "--url",
        server.url,
        "--reasoner-model",
        "reasoner",
        "--out",
        tmp_path / "o",
    ]
    argv += ["--judge-model", "judge", "--iterations", "0", "--held", "0.5"]
    assert main([str(a) for a in argv]) == 0
    said = capsys.readouterr().out
    assert "start: dev" in said
    assert (tmp_path / "o" / "best.md").read_text() == prompt_search.PROMPTS.joinpath("general.v1.md").read_text()
    assert json.loads((tmp_path / "o" / "search.json").read_text())["made_by"] == {
        "fulfilled": 0.5, "reasoner": "reasoner, policy.v1", "writer": "reasoner", "judge": "judge, binary.v1",
        "generator": "lens:mini weights", "optimizer": "own",
    }  # fmt: skip
    for option, other in (
        ("--writer-model", "writer"),
        ("--judge-model", "judge"),
        ("--reasoner-model", "reasoner, writer"),
    ):
        with pytest.raises(ValueError, match=f"of other {other}; give another --out"):
            main([*map(str, argv), option, "another"])
    monkeypatch.setattr(prompt_search, "generator", lambda source: (draw, "other weights"))
    with pytest.raises(ValueError, match="of other generator; give another --out"):
        main([str(a) for a in argv])


def test_a_bound_of_money_has_prices(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prompt_search, "generator", lambda source: (draw, "weights"))
    from train.__main__ import main

    path = tmp_path / "p.jsonl"
    lines = [{"id": str(k), "prompt": f"wish {k}", "rubrics": ["is red", "is there"]} for k in (1, 2)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    argv = ["prompt_search", "--prompts", str(path), "--url", server.url, "--reasoner-model", "reasoner"]
    argv += ["--iterations", "0", "--held", "0.5", "--out", str(tmp_path / "o"), "--max-cost", "10"]
    with pytest.raises(ValueError, match="the price of reasoner is not known: expected --prices READ,WRITTEN"):
        main(argv)
    # 100 tokens read and 20 written a call
    assert main([*argv, "--judge-model", "judge", "--prices", "1e4,5e4"]) == 0
    assert "reasoner: Counters(calls=2, " in (said := capsys.readouterr().out)
    assert said.count("cost=4.0)") == 2  # of reasoner and judge
    with pytest.raises(ValueError, match=r"prices must be at least 0, got \(nan, 1.0\)"):
        main([*argv, "--prices", "nan,1"])
    argv += ["--prices", "1,1", "--generator", f"openai:{server.url}", "--generator-model", "painter"]
    with pytest.raises(ValueError, match=r"--max-cost: what an image of .* expected --price-image USD"):
        main(argv)


# ---------------------------------------------------------------- another generator, over HTTP


def image_reply(array):
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, "PNG")
    return chat_server.raw(json.dumps({"data": [{"b64_json": base64.b64encode(stream.getvalue()).decode()}]}).encode())


def painting(call, number):
    """The images API beside the chat: what `draw` draws."""
    if "prompt" not in call.body:
        return script(call, number)
    (image,) = draw([call.body["prompt"]], [call.body["seed"]])
    return image_reply(image)


def test_a_server_draws_each_prompt_once_and_keeps_it(tmp_path):
    with serving(painting) as server:
        with ImageClient(server.url, "painter", tmp_path) as client:
            made = client.draw(["a cat, red", "a cat"], [7, 300])
        with ImageClient(server.url, "painter", tmp_path) as client:
            again = client.draw(["a cat", "a cat, red"], [300, 7])
            assert client.counters.calls == 0
            client.draw(["a cat"], [301])
        bodies = [call.body for call in server.calls]
    for one, two, want in zip(made, again[::-1], draw(["a cat, red", "a cat"], [7, 300]), strict=True):
        np.testing.assert_array_equal(one, want)
        np.testing.assert_array_equal(two, want)
    assert len(bodies) == 3
    told = {"model": "painter", "prompt": "a cat", "n": 1, "response_format": "b64_json", "seed": 301}
    assert bodies[-1] == told


def test_openai_s_own_models_are_sent_what_they_take(tmp_path):
    own = ImageClient("https://api.openai.com/v1", "gpt-image-1", tmp_path)
    old = ImageClient("https://api.openai.com/v1", "dall-e-3", tmp_path)
    chat = Chat("a cat", seed=3)
    assert own._body(chat) == {"model": "gpt-image-1", "prompt": "a cat", "n": 1}
    assert old._body(chat)["response_format"] == "b64_json"


def test_images_are_drawn_up_to_a_bound_of_money(tmp_path):
    with (
        serving(painting) as server,
        ImageClient(server.url, "painter", tmp_path, 1, max_cost=0.1, price=0.05) as client,
    ):
        client.draw(["a cat", "a cow"], [1, 2])
        assert client.counters.cost == pytest.approx(0.1)
        with pytest.raises(ChatError, match=r"painter: 0\.1000 of 0\.1 USD are spent"):
            client.draw(["a fox"], [3])
    assert len(server.calls) == 2
    with pytest.raises(ValueError, match="max_cost needs prices"):
        ImageClient("http://127.0.0.1:1/v1", "painter", tmp_path, max_cost=1.0)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (chat_server.raw(b'{"data": [{"url": "http://127.0.0.1/cat.png"}]}'), "no image as b64_json"),
        (chat_server.raw(b'{"data": []}'), "no image as b64_json"),
        (chat_server.raw(b'{"data": [{"b64_json": "bm8="}]}'), "not a picture"),
        (chat_server.error(400, "no such model"), "HTTP 400: .*no such model"),
    ],
)
def test_what_is_no_image_ends_it(tmp_path, answer, message):
    with (
        serving(lambda *_: answer) as server,
        ImageClient(server.url, "painter", tmp_path) as client,
        pytest.raises(ChatError, match=message),
    ):
        client.draw(["a cat"], [1])


def test_a_prompt_that_the_generator_refuses_scores_nothing(tmp_path):
    def refusing(call, number):
        if call.body.get("prompt", "").startswith("wish 3"):
            return chat_server.error(400, "rejected: content_policy_violation")
        return painting(call, number)

    with serving(refusing) as server, ImageClient(server.url, "painter", tmp_path / "images") as painter:
        ours, _ = search(server, tmp_path, painter.draw)
        scores, failures = ours.scores(FIX, ITEMS[2:5])
        assert painter.counters.calls == 3
    assert scores == [1.0, 0.0, 1.0]
    assert failures == [{"wish": "wish 3", "prompt": "wish 3, red", "failed": ["refused by the generator"]}]


def test_the_command_searches_for_another_generator(tmp_path, capsys):
    from train.__main__ import main

    path, out = tmp_path / "p.jsonl", tmp_path / "o"
    lines = [{"id": str(k), "prompt": f"wish {k}", "rubrics": ["is red", "is there"]} for k in (1, 2)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    script.asked = 0
    with serving(painting) as server:
        argv = ["prompt_search", "--prompts", path, "--url", server.url, "--reasoner-model", "reasoner", "--out", out]
        argv += ["--judge-model", "judge", "--iterations", "0", "--held", "0.5", "--generator", f"openai:{server.url}"]
        with pytest.raises(ValueError, match="expected --generator-model NAME beside it"):
            main([str(a) for a in argv])
        assert main([*map(str, argv), "--generator-model", "painter"]) == 0
        assert sum("prompt" in call.body for call in server.calls) == 2
    assert "painter: Counters(calls=2" in capsys.readouterr().out
