"""OneIG's style encoders from files in their released layouts: forward against one written anew, refusals, the score by hand."""

import argparse
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from tests.train.published_judges import CARD
from tests.train.test_text_benchmarks import coded, oneig_copy, oneig_options
from train.evaluate.published import command, drawing, oneig, styles
from train.evaluate.published.styles import Csd, OneigStyle, Styles, closeness, pixels

WIDTH, PATCH, SIDE, DEPTH, OUT = 128, 8, 16, 2, 12
RNG = np.random.default_rng(3)
IMAGES = [RNG.integers(0, 256, size).astype(np.uint8) for size in ((20, 31, 3), (16, 16, 3))]


def tensors():
    """CSD's names at small sizes; `DEPTH` blocks of two heads."""
    draw = torch.Generator().manual_seed(0)
    shapes = {
        "backbone.class_embedding": [WIDTH],
        "backbone.positional_embedding": [(SIDE // PATCH) ** 2 + 1, WIDTH],
        "backbone.conv1.weight": [WIDTH, 3, PATCH, PATCH],
        "last_layer_style": [WIDTH, OUT],
        "last_layer_content": [WIDTH, OUT],
    }
    for name in ("ln_pre", "ln_post"):
        shapes |= {f"backbone.{name}.weight": [WIDTH], f"backbone.{name}.bias": [WIDTH]}
    for n in range(DEPTH):
        block = f"backbone.transformer.resblocks.{n}."
        parts = {"attn.in_proj_": (3 * WIDTH, WIDTH), "attn.out_proj.": (WIDTH, WIDTH)}
        parts |= {"mlp.c_fc.": (4 * WIDTH, WIDTH), "mlp.c_proj.": (WIDTH, 4 * WIDTH)}
        for name, (rows, columns) in parts.items():
            shapes |= {f"{block}{name}weight": [rows, columns], f"{block}{name}bias": [rows]}
        for name in ("ln_1", "ln_2"):
            shapes |= {f"{block}{name}.weight": [WIDTH], f"{block}{name}.bias": [WIDTH]}
    made = {name: torch.randn(shape, generator=draw) * 0.1 for name, shape in shapes.items()}
    return {k: v + 1 if ".ln_" in k and k.endswith("weight") else v for k, v in made.items()}


def by_formula(state, x):
    """OpenAI's vision transformer with CSD's head, float32 [N, 3, S, S] -> [N, OUT]."""
    part = {k.removeprefix("backbone."): v for k, v in state.items()}

    def norm(y, name):
        return F.layer_norm(y, (WIDTH,), part[f"{name}.weight"], part[f"{name}.bias"])

    def linear(y, name):
        return y @ part[f"{name}.weight"].T + part[f"{name}.bias"]

    patches = F.conv2d(x, part["conv1.weight"], stride=PATCH).flatten(2).transpose(1, 2)
    y = torch.cat([part["class_embedding"].expand(len(x), 1, -1), patches], 1) + part["positional_embedding"]
    y = norm(y, "ln_pre")
    for n in range(DEPTH):
        block = f"transformer.resblocks.{n}."
        seen = norm(y, f"{block}ln_1") @ part[f"{block}attn.in_proj_weight"].T + part[f"{block}attn.in_proj_bias"]
        q, k, v = seen.view(len(x), -1, 3, WIDTH // 64, 64).permute(2, 0, 3, 1, 4)
        mixed = (q @ k.transpose(-1, -2) / math.sqrt(64)).softmax(-1) @ v
        y = y + linear(mixed.transpose(1, 2).flatten(2), f"{block}attn.out_proj")
        hidden = linear(norm(y, f"{block}ln_2"), f"{block}mlp.c_fc")
        y = y + linear(hidden * torch.sigmoid(1.702 * hidden), f"{block}mlp.c_proj")
    return norm(y[:, 0], "ln_post") @ part["last_layer_style"]


def checkpoint(path, state, prefix="module."):
    """As CSD's training writes it: weights of a parallel model, its optimiser and its options beside them."""
    named = {prefix + k: v for k, v in state.items()}
    torch.save({"model_state_dict": named, "opt_bb": {"state": {}}, "iter": 7, "args": argparse.Namespace(lr=1)}, path)
    return path


@pytest.mark.parametrize("prefix", ["module.", ""])
def test_csds_vectors_are_those_of_the_formula(tmp_path, prefix):
    state = tensors()
    encoder = Csd(checkpoint(tmp_path / "checkpoint.pth", state, prefix))
    want = F.normalize(by_formula(state, pixels(IMAGES, SIDE, True)), dim=-1)
    assert torch.allclose(encoder.embed(IMAGES), want, atol=2e-6)
    assert want[0] @ want[1] < 0.9999  # the images are told apart
    assert encoder.card.judge == "CSD checkpoint.pth"
    assert encoder.card.revision.startswith("local ")


def edited(**changes):
    def edit(state):
        for key, value in changes.items():
            state.pop(key) if value is None else state.update({key: value})
        return state

    return lambda: edit(tensors())


BLOCK = "backbone.transformer.resblocks.1."


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (edited(**{"last_layer_style": None}), "expected last_layer_style of 2 dimensions"),
        (edited(**{f"{BLOCK}ln_2.bias": None}), f"{BLOCK}ln_2.bias missing"),
        (
            edited(**{"backbone.ln_pre.weight": torch.ones(3)}),
            r"backbone.ln_pre.weight must have shape \[128\], got \[3\]",
        ),
        (edited(**{"backbone.proj": torch.ones(3)}), "1 unexpected keys, first 'backbone.proj'"),
        (edited(**{"backbone.positional_embedding": torch.ones(3)}), "of 2 dimensions, .*got shape"),
        (lambda: {"conv.weight": torch.ones(3)}, "expected backbone.conv1.weight .* got conv.weight"),
    ],
)
def test_another_checkpoint_is_refused(tmp_path, state, words):
    path = checkpoint(tmp_path / "checkpoint.pth", state())
    with pytest.raises(ValueError, match=words) as told:
        Csd(path)
    assert str(path) in str(told.value)


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path):
    path = tmp_path / "checkpoint.pth"
    with pytest.raises(ValueError, match="not found"):
        Csd(path)
    torch.save(tensors(), path)
    with pytest.raises(ValueError, match="no tensors in 'model_state_dict'"):
        Csd(path)
    torch.save({"model_state_dict": Image.new("RGB", (2, 2))}, path)  # whatever has to be imported is not
    with pytest.raises(ValueError, match=r"not a file of torch.save with tensors and options alone"):
        Csd(path)
    path.write_bytes(b"<html>")
    with pytest.raises(ValueError, match=r"not a file of torch.save"):
        Csd(path)


def test_the_middle_square_is_cut_out_as_each_library_does():
    image = np.zeros((16, 19, 3), np.uint8)
    image[:, :, 0] = np.arange(19)

    def first(rounded):
        x = pixels([image], 16, rounded)[0, 0, 0]
        return float((x[0] * styles.STD[0] + styles.MEAN[0]) * 255)

    assert (first(True), first(False)) == (
        pytest.approx(2, abs=1e-3),
        pytest.approx(1, abs=1e-3),
    )  # 1.5 to even, or down
    assert pixels(IMAGES, 8, True).shape == (2, 3, 8, 8)


def clip_folder(path):
    torch.manual_seed(1)
    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, patch_size=8, image_size=16,
        projection_dim=OUT,
    )  # fmt: skip
    CLIPVisionModelWithProjection(config).save_pretrained(path)
    return path


def test_oneigs_vectors_are_transformers_own_in_bfloat16(tmp_path):
    folder = clip_folder(tmp_path / "se")
    encoder = OneigStyle(folder)
    model = CLIPVisionModelWithProjection.from_pretrained(folder).to(torch.bfloat16).eval()
    with torch.no_grad():
        out = model(pixel_values=pixels(IMAGES, 16, False).bfloat16()).image_embeds
    want = F.normalize(out, p=2, dim=-1)
    assert encoder.embed(IMAGES).dtype == torch.bfloat16
    assert torch.equal(encoder.embed(IMAGES), want)
    assert (encoder.card.dtype, encoder.side) == ("bfloat16", 16)
    from safetensors.torch import load_file, save_file

    stored = load_file(folder / "model.safetensors")
    stored.pop("visual_projection.weight")
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"1 keys missing, first 'visual_projection.weight'"):
        OneigStyle(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no .safetensors file"):
        OneigStyle(folder)


def test_closeness_by_hand():
    known = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    seen = torch.tensor([[0.0, 1.0], [1.0, 0.0], [-1.0, 0.0], [-0.8, 0.6]])
    assert closeness(seen, known) == pytest.approx([0.8, 1.0, 0.0, 0.0], abs=1e-6)


class Points:
    """A vector that says how bright the image is."""

    card = CARD

    def __init__(self, turned=0.0):
        self.turned = turned

    def embed(self, images):
        angles = torch.tensor([float(image.mean()) / 255 * math.pi / 2 + self.turned for image in images])
        return torch.stack([angles.cos(), angles.sin()], -1)


def test_a_style_is_the_mean_of_both_encoders_by_hand(tmp_path):
    for name, vectors in (("a", [[1.0, 0.0]]), ("b", [[0.0, 1.0], [-1.0, 0.0]])):
        torch.save({"pop_art": torch.tensor(vectors)}, tmp_path / f"{name}.pt")
    both = Styles([(Points(), tmp_path / "a.pt"), (Points(), tmp_path / "b.pt")])
    angle = 51 / 255 * math.pi / 2
    (found,) = both.scores([coded(51)], "pop_art")
    assert found == pytest.approx((math.cos(angle) + math.sin(angle)) / 2, abs=1e-6)
    with pytest.raises(ValueError, match="no reference vectors of 'lego'; there are pop_art"):
        both.scores([coded(51)], "lego")
    torch.save({"pop_art": torch.zeros(1, 3)}, tmp_path / "c.pt")
    with pytest.raises(
        ValueError, match=r"c.pt: pop_art: expected vectors of 2, as the encoder makes them, got \[1, 3\]"
    ):
        Styles([(Points(), tmp_path / "c.pt")])
    torch.save([1], tmp_path / "c.pt")
    with pytest.raises(ValueError, match="expected a dictionary of styles, got list"):
        Styles([(Points(), tmp_path / "c.pt")])


def test_the_benchmark_asks_for_the_style_of_each_prompt(tmp_path):
    """Of two anime prompts one has a style; the prompt's score is the mean of its images', black cells are none."""
    oneig_copy(tmp_path / "copy", ["anime", "object", "text"])
    torch.save({"pop_art": torch.tensor([[1.0, 0.0]])}, tmp_path / "a.pt")
    drawing.write_image(
        oneig.joined([coded(v, 16) for v in (255, 51, 0, 102)], 2), tmp_path / "images" / "anime" / "m" / "000.webp"
    )
    given = oneig_options(tmp_path, images=tmp_path / "images", name="m")
    given.dimensions = ["style"]
    bench = oneig.OneIG(styles=Styles([(Points(), tmp_path / "a.pt")]))
    assert command.run(bench, given) == 0
    column = json.loads((tmp_path / "out" / "scores.json").read_text())["columns"][0]
    cosines = [math.cos(v / 255 * math.pi / 2) for v in (255, 51, 102)]
    assert column["figures"]["style"]["value"] == pytest.approx(sum(cosines) / 3, abs=1e-3)  # through JPEG
    assert (column["judged"], column["missing"]) == (3, 0)
    assert column["figures"]["style"]["of"] == 1
    rows = [json.loads(line) for line in (tmp_path / "out" / "rows_m.jsonl").read_text().splitlines()]
    assert rows[0]["images"][0]["style"] == "pop_art"
    given.csd = tmp_path / "checkpoint.pth"
    with pytest.raises(ValueError, match="style needs both: --csd FILE and --style-encoder DIR"):
        oneig.OneIG().prepare(given)
    # an image that is missing is a missing judgement
    (tmp_path / "images" / "anime" / "m" / "000.webp").unlink()
    given.csd, given.out = None, tmp_path / "out2"
    assert command.run(bench, given) == 1
    column = json.loads((tmp_path / "out2" / "scores.json").read_text())["columns"][0]
    assert (column["judged"], column["missing"]) == (4, 4)
    assert column["figures"]["style"]["value"] is None
