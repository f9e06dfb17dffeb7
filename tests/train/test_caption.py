"""Captions over HTTP: what is asked, what an answer must be, refusals, failures, resuming, and the way into shards."""

import base64
import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from lens.chat_client import BadAnswer, Reply
from tests import chat_server
from tests.chat_server import serving
from tests.train.captioned_photographs import answers, photographs
from train.__main__ import main
from train.caption import IN_A_ROW, pixels_of
from train.data.captions import PAPER_WORDS, Caption, histogram, instructions, read_caption, statistics, word_count
from train.data.sources import captions_of

DENSE = "A red enamel mug stands on a wooden table beside a folded linen cloth in soft light from the left."


def said(**changes):
    values = {
        "dense": DENSE,
        "brief": "A red mug on a table.",
        "visible_text": [{"text": "ÇAY 茶", "language": "tr"}],
        "scenario": "visual content",
        "category": "Object",
    }
    return json.dumps({**values, **changes}, ensure_ascii=False)


def mean_of(call):
    """The grey of the one image that was sent."""
    data = base64.b64decode(call.images[0].partition(",")[2])
    return round(float(np.asarray(Image.open(io.BytesIO(data))).mean()))


def write_images(folder, greys, size=(48, 32)):
    folder.mkdir(exist_ok=True)
    for grey in greys:
        Image.new("RGB", size, (grey,) * 3).save(folder / f"{grey:03d}.png")
    return folder


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def command(folder, server, out, *more):
    return ["caption", "--images", str(folder), "--url", server.url, "--out", str(out), "--timeout", "20", *more]


def test_instructions_have_what_is_asked_for_alone():
    both, dense, brief = (instructions(detail) for detail in ("both", "dense", "brief"))
    assert '"dense"' in dense
    assert '"brief":' not in dense
    assert '"brief":' in brief
    assert '"dense":' not in brief
    assert "[dense]" not in both
    assert both.count("\n") > dense.count("\n") > brief.count("\n")
    with pytest.raises(ValueError, match="detail must be one of dense, brief, both, got 'long'"):
        instructions("long")


def test_an_answer_is_read_and_its_text_left_in_its_language():
    made = read_caption(Reply(said()), "both")
    assert made == Caption(DENSE, "A red mug on a table.", (("tr", "ÇAY 茶"),), "visual content", "Object")
    assert read_caption(Reply(said(scenario="unknown", category="unknown")), "dense").scenario == "unknown"


REFUSED = {
    "the field": Reply("", refusal="I will not"),
    "the filter": Reply("", finish="content_filter"),
    "prose": Reply("I'm sorry, but I can't help with that."),
    "prose in JSON": Reply(said(dense="I cannot describe people.")),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_is_an_answer(name):
    assert read_caption(REFUSED[name], "both").refused


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (Reply("a red mug"), "expected a caption as JSON"),
        (Reply(said()[:60], finish="length"), "cut off at its token limit"),
        (Reply(said(scenario="still life")), "scenario: expected one of portrait"),
        (Reply(said(category="Mugs")), "category: expected one of Human"),
        (Reply(said(dense=" ")), "dense: expected text, got none"),
        (Reply(said(visible_text=["TEA"])), "expected a caption as JSON"),
        (Reply(said(brief=3)), "expected a caption as JSON"),
    ],
)
def test_any_other_form_is_a_bad_answer(reply, message):
    with pytest.raises(BadAnswer, match=message):
        read_caption(reply, "both")


def test_words_are_counted_in_every_script():
    assert word_count("A mother-in-law's tongue, 2 leaves.") == 5
    assert word_count("写着 OPEN 的牌子") == 6
    assert word_count("красный дом") == 2
    assert statistics([100, 110, 120])["mean"] == 110
    assert statistics([]) == {}
    assert histogram([8, 11, 12, 35]) == {"0 to 9": 1, "10 to 19": 2, "20 to 29": 0, "30 to 39": 1}
    assert histogram([31, 32], shown=(19,)) == {"10 to 19": 0, "20 to 29": 0, "30 to 39": 2}


def test_a_folder_is_captioned_and_goes_on_where_it_was(tmp_path, capsys):
    pytest.importorskip("openai")
    folder, out = write_images(tmp_path / "in", (10, 60, 110, 160, 210)), tmp_path / "out"
    (folder / "110_twin.png").write_bytes((folder / "110.png").read_bytes())
    (folder / "torn.jpg").write_bytes(b"no picture")
    slow, ill = [True], [True]

    def script(call, number):
        grey = mean_of(call)
        if slow and grey == 10:
            slow.clear()
            return chat_server.error(429, "slow down", Retry_After="0")
        if grey == 60:
            return chat_server.text(None, finish="content_filter")
        if grey == 160 and ill:
            return "No JSON <b>here</b>"
        return said(brief=f"Grey {grey} <script>.")

    with serving(script) as server:
        assert main(command(folder, server, out, "--concurrency", "2")) == 1  # one failed
        first = len(server.calls)
        assert first == 7  # five images, one again after 429, one again after an answer that is none
        assert main(command(folder, server, out)) == 1
        assert len(server.calls) == first + 2  # what failed is asked again, and nothing else
        ill.clear()
        with (out / "cache.jsonl").open("ab") as file:
            file.write(b'{"image": "torn')  # killed while it wrote
        assert main(command(folder, server, out)) == 0
        assert len(server.calls) == first + 3
        body = server.calls[0].body
    assert body["response_format"]["json_schema"]["strict"] is True
    rows = lines(out / "captions.jsonl")
    assert [row["file"] for row in rows] == ["010.png", "110.png", "110_twin.png", "160.png", "210.png"]
    assert {row["brief"] for row in rows} == {f"Grey {grey} <script>." for grey in (10, 110, 160, 210)}
    assert rows[1]["sha256"] == rows[2]["sha256"]
    assert rows[0]["caption"] == rows[0]["dense"] == DENSE
    assert rows[0]["words"] == word_count(DENSE)
    assert rows[0]["text"] == [{"language": "tr", "text": "ÇAY 茶"}]
    left = {row["file"]: row["reason"] for row in lines(out / "left_out.jsonl")}
    assert left == {"060.png": "refused: content_filter", "torn.jpg": "broken: not a picture"}
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["left_out"] == {"refused": 1, "broken": 1}
    assert manifest["calls"]["calls"] == 1
    assert manifest["calls"]["cost"] > 0
    text = (out / "index.html").read_text()
    assert "&lt;script&gt;" in text
    assert 'fill="#b3412e">100 to 109</text>' in text  # the paper's mean, which no caption here comes near
    assert "<script" not in text
    assert "ÇAY" in (out / "captions.jsonl").read_text(encoding="utf-8")
    assert len(captions_of(out / "captions.jsonl")) == 5  # as `shards --captions` reads them
    # another prompt is another question
    with serving(script) as server:
        assert main(command(folder, server, out, "--detail", "brief", "--only", str(out / "captions.jsonl"))) == 0
        assert len(server.calls) == 4
        assert "dense" not in server.calls[0].body["response_format"]["json_schema"]["schema"]["properties"]
    assert "5 captions" in capsys.readouterr().out


def test_tars_are_read_and_a_transcript_says_it_again(tmp_path):
    pytest.importorskip("openai")
    folder = write_images(tmp_path / "in", (10, 200))
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars" / "a.tar", "w") as tar:
        for path in sorted(folder.iterdir()):
            tar.add(path, f"x/{path.name}")
    source = ["caption", "--tars", str(tmp_path / "tars")]
    transcript = str(tmp_path / "t.jsonl")
    with serving(lambda call, _: said(brief=f"Grey {mean_of(call)}.")) as server:
        more = ["--url", server.url, "--transcript", transcript, "--out", str(tmp_path / "one")]
        assert main([*source, *more]) == 0
    assert main([*source, "--replay", transcript, "--out", str(tmp_path / "two")]) == 0
    rows = lines(tmp_path / "one" / "captions.jsonl")
    assert [(row["key"], row["file"], row["brief"]) for row in rows] == [
        ("a.tar/x/010.png", "x/010.png", "Grey 10."),
        ("a.tar/x/200.png", "x/200.png", "Grey 200."),
    ]
    assert lines(tmp_path / "two" / "captions.jsonl") == rows


def test_a_server_that_is_lost_and_a_spent_budget_end_it(tmp_path, capsys):
    pytest.importorskip("openai")
    folder = write_images(tmp_path / "in", range(IN_A_ROW + 6), (8, 8))
    with serving(lambda *_: chat_server.error(400, "no such model")) as server:
        assert main(command(folder, server, tmp_path / "a", "--concurrency", "1")) == 1
        assert len(server.calls) <= IN_A_ROW + 2
    assert f"the last {IN_A_ROW} images all failed" in capsys.readouterr().err
    with serving(lambda *_: said()) as server:
        arguments = command(folder, server, tmp_path / "b", "--concurrency", "1")
        assert main([*arguments, "--max-calls", "3"]) == 1
        assert "the same command goes on from here" in capsys.readouterr().err
        assert not (tmp_path / "b" / "captions.jsonl").exists()
        assert main(arguments) == 0
        assert len(server.calls) == IN_A_ROW + 6


def test_what_is_sent_is_upright_and_small(tmp_path):
    image = Image.new("RGB", (300, 100), "red")
    exif = Image.Exif()
    exif[274] = 6  # a quarter turn
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", exif=exif)
    assert pixels_of(buffer.getvalue(), 60).shape == (60, 20, 3)
    assert pixels_of(buffer.getvalue(), 1000).shape == (300, 100, 3)


def test_wrong_commands_are_named(tmp_path):
    with pytest.raises(ValueError, match="expected --url of a server, or --replay"):
        main(["caption", "--images", str(tmp_path)])
    with pytest.raises(ValueError, match="no image in"):
        main(["caption", "--images", str(tmp_path), "--url", "http://127.0.0.1:1/v1"])
    with pytest.raises(ValueError, match="is no folder"):
        main(["caption", "--tars", str(tmp_path / "none"), "--url", "http://127.0.0.1:1/v1"])
    (tmp_path / "a.png").write_bytes(b"")
    (tmp_path / "cache.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match=r"cache.jsonl, line 1: not of a cache"):
        main(["caption", "--images", str(tmp_path), "--url", "http://127.0.0.1:1/v1", "--out", str(tmp_path)])


def test_photographs_captioned_by_hand_go_into_shards(tmp_path):
    """24 CC0 photographs of the small world: a server says what a person wrote of each, `select` takes half, `shards` builds."""
    pytest.importorskip("openai")
    from train.data.shards import ShardSet

    said_of, folder = answers(), tmp_path / "in"
    folder.mkdir()
    for file, data in photographs().items():
        (folder / file).write_bytes(data)
    assert len(said_of) == 24
    out, chosen = tmp_path / "captions", tmp_path / "chosen.jsonl"
    with serving(lambda call, _: said_of[call.images[0]]) as server:
        assert main(command(folder, server, out)) == 0
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["captions"] == 24
    assert abs(manifest["words"]["dense"]["mean"] - PAPER_WORDS) < 15
    assert manifest["words"]["brief"]["mean"] < 20
    assert main(["select", "--rows", str(out / "captions.jsonl"), "--subset", "0.5", "--out", str(chosen)]) == 0
    bucket = ["--bases", "128", "--aspects", "1:1", "--out", str(tmp_path / "shards")]
    assert main(["shards", "--images", str(folder), "--captions", str(chosen), *bucket]) == 0
    made = ShardSet(tmp_path / "shards").manifest
    assert made["samples"] == len(lines(chosen)) > 6
    assert made["left_out"]["no caption"] == 24 - made["samples"]
