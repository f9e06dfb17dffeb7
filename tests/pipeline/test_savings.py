"""What inference leaves out is left out exactly: same result as the plain path, and counted."""

from __future__ import annotations

import json
import threading

import pytest
import torch
from safetensors.torch import load_file

from lens import ops, packing
from lens.engine import schedule_table
from lens.engine.schedule_table import evict
from tests.reference_model import ReferenceLens, reference_sample, relative
from tests.small_pipeline import FOLDER, counted, fresh, same_bits, shared

SMALL = dict(height=32, width=48, num_inference_steps=2, output_type="latent")
PROMPTS = ["a red apple", "three cats under a green tree"]


@pytest.fixture(scope="module")
def plain() -> ReferenceLens:
    model = ReferenceLens(json.loads((FOLDER / "transformer" / "config.json").read_text()))
    model.load_state_dict(load_file(FOLDER / "transformer" / "diffusion_pytorch_model.safetensors"))
    return model.eval()


def noise(count: int) -> torch.Tensor:
    return torch.randn((count, 6, 128), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("guidance", [0.0, 0.5, 1.0, 5.0])
def test_no_mask_and_no_text_in_blank_negatives(plain, guidance):
    """The plain path pads, masks and doubles the batch at any guidance; the blank half has masked zeros for text."""
    start = noise(2)
    ours = shared()(PROMPTS, latents=start, guidance_scale=guidance, **SMALL).images
    theirs = reference_sample(plain, start, shared().encode_text(PROMPTS), None, (2, 3), 2, guidance)
    assert relative(ours, theirs) <= 1e-5


def test_written_and_blank_negatives_side_by_side(plain):
    start = noise(2)
    ours = shared()(PROMPTS, ["blurry", " \n"], latents=start, guidance_scale=4.0, **SMALL).images
    for k, negative in enumerate([shared().encode_text("blurry"), None]):
        one = slice(k, k + 1)
        theirs = reference_sample(plain, start[one], shared().encode_text(PROMPTS[k]), negative, (2, 3), 2, 4.0)
        assert relative(ours[one], theirs) <= 1e-5


def test_blank_negatives_carry_no_rows():
    with counted(shared().transformer, "denoise") as calls:
        shared()(PROMPTS, ["blurry", ""], guidance_scale=4.0, **SMALL)
    texts = [len(shared().encode_text(p)[0][0][0]) for p in (*PROMPTS, "blurry")]
    # the unconditional half first: with blank negatives each stream's rows then lie in one piece
    assert [args[3].text_lengths for args, _ in calls] == [[texts[2], 0, *texts[:2]]] * 2


def test_one_forward_at_guidance_1():
    for guidance, halves in ((1.0, 1), (1, 1), (0.999, 2), (0.0, 2), (5.0, 2)):
        with counted(shared().transformer, "denoise") as calls:
            shared()(PROMPTS, "blurry", guidance_scale=guidance, **SMALL)
        assert [args[3].batch_size for args, _ in calls] == [2 * halves] * 2
    with counted(shared().text_encoder, "read") as encoded:
        shared()(PROMPTS, "blurry", guidance_scale=1.0, **SMALL)
    assert [len(args[0]) for args, _ in encoded] == [2]  # the negative prompt is not even encoded
    given = shared().encode_text(["blurry", "dull"])
    with counted(shared().transformer, "denoise") as calls:
        shared()(PROMPTS, negative_prompt_embeds=given[0], negative_prompt_mask=given[1], guidance_scale=1.0, **SMALL)
    assert [args[3].batch_size for args, _ in calls] == [2] * 2


def test_text_is_encoded_and_projected_once_per_prompt():
    pipe = shared()
    with counted(pipe.transformer, "project_text") as projected, counted(pipe.text_encoder, "read") as encoded:
        pipe([*PROMPTS, PROMPTS[0]], "blurry", num_images_per_prompt=3, guidance_scale=4.0, **SMALL)
    assert len(projected) == 3  # two prompts and one negative; nine pictures, eighteen samples, two steps
    assert [len(args[0]) for args, _ in encoded] == [2, 1]


def test_dead_text_branch_is_skipped(monkeypatch):
    """The last block's text queries, output and MLP are not computed; computing them changes no bit of the image."""
    from lens import model as module

    pipe, queries, gates = shared(), [], []
    attention, residual = ops.joint_attention, ops.gated_residual

    def watch_attention(*args, **kwargs):
        queries.append(kwargs["text_queries"])
        return attention(*args, **kwargs)

    def watch_residual(x, *args):
        gates.append(len(x))
        return residual(x, *args)

    monkeypatch.setattr(module.ops, "joint_attention", watch_attention)
    monkeypatch.setattr(module.linear_fused, "gated_residual", watch_residual)
    lean = pipe(PROMPTS, seed=1, guidance_scale=1.0, **SMALL | {"num_inference_steps": 1}).images
    assert queries == [True, True, False]
    assert gates == [12]  # one gated residual without a following norm: the last block's, of the image rows alone
    denoise = pipe.transformer.denoise
    pipe.transformer.denoise = lambda *args, **options: denoise(*args, **options, blocks_out=[])
    try:
        full = pipe(PROMPTS, seed=1, guidance_scale=1.0, **SMALL | {"num_inference_steps": 1}).images
    finally:
        del pipe.transformer.denoise
    assert queries == [True, True, False, True, True, True]
    assert torch.equal(full, lean)


def test_one_table_per_schedule(monkeypatch):
    pipe, made = fresh(), []
    original = schedule_table.table
    monkeypatch.setattr(schedule_table, "table", lambda m, t: made.append(len(t)) or original(m, t))
    first = pipe(PROMPTS, seed=1, guidance_scale=4.0, **SMALL).images
    assert made == [2]
    again = pipe(PROMPTS, seed=1, guidance_scale=4.0, **SMALL).images
    assert made == [2]
    assert torch.equal(first, again)
    pipe(PROMPTS, sizes=[(32, 48), (32, 32)], num_inference_steps=2)  # one new size, one new table
    assert made == [2, 2]
    pipe(PROMPTS, sizes=[(48, 32), (32, 32)], num_inference_steps=2)  # mu depends on the tokens alone
    assert made == [2, 2]
    pipe(PROMPTS[0], height=32, width=48, num_inference_steps=3)
    assert made == [2, 2, 3]
    with torch.no_grad():  # trained or loaded weights make old tables wrong
        pipe.transformer.final_modulation.weight.mul_(1.5)
    other = pipe(PROMPTS, seed=1, guidance_scale=4.0, **SMALL).images
    assert made == [2, 2, 3, 2]
    assert not torch.equal(other, first)


@torch.no_grad()
def test_table_equals_the_modulation_of_each_step():
    """A table's rows have the bits of one step computed by itself, and of the padded call."""
    model = shared().transformer
    times = torch.linspace(1, 0.05, 7)
    table = schedule_table.table(model, times)
    for k, t in enumerate(times):
        one = model.modulate(t[None])
        assert torch.equal(table.blocks[k : k + 1], one.blocks)
        assert torch.equal(table.final[k : k + 1], one.final)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_eviction(device):
    pipe = fresh()
    expected = pipe(PROMPTS, seed=1, **SMALL).images
    pipe.prepare(image_tokens=4, num_inference_steps=3)
    for steps in range(1, 13):  # prepared tables outlive the cache of passing ones
        pipe._schedules([6], steps)
    pipe.prepare(image_tokens=6, num_inference_steps=2)
    blocks = pipe.transformer.layers()
    weights = [p for b in blocks for s in b.streams() for p in s.modulation.parameters()]
    assert evict(pipe.transformer, device) == sum(p.numel() * p.element_size() for p in weights)
    assert torch.equal(pipe(PROMPTS, seed=1, **SMALL).images, expected)
    pipe(PROMPTS[0], height=32, width=32, num_inference_steps=3)  # prepared
    if device == "cpu":
        pipe(PROMPTS[0], height=32, width=32, num_inference_steps=4)
    else:
        with pytest.raises(RuntimeError, match="only schedules prepared before can be drawn; reload"):
            pipe(PROMPTS[0], height=32, width=32, num_inference_steps=4)
        assert torch.equal(pipe(PROMPTS, seed=1, **SMALL).images, expected)


def test_prepare_pins_a_table_that_was_only_passing():
    """Drawn first and prepared then: eight later schedules do not push it out."""
    pipe = fresh()
    expected = pipe(PROMPTS, seed=1, **SMALL).images
    pipe.prepare(image_tokens=6, num_inference_steps=2)
    for steps in range(3, 13):
        pipe._schedules([6], steps)
    evict(pipe.transformer, "meta")
    assert torch.equal(pipe(PROMPTS, seed=1, **SMALL).images, expected)


def test_positions_follow_the_mask_not_the_packing():
    """Dropping padding in front of or between tokens keeps the place they had."""
    left = packing.plan([(4, 6)], [torch.tensor([3, 4, 7])], (8, 28, 28))
    whole = packing.plan([(4, 6)], [9], (8, 28, 28))
    assert torch.equal(left.cos[24:], whole.cos[24:][[3, 4, 7]])
    assert not same_bits(left.cos[24:], whole.cos[24:27])


def test_prepared_tables_survive_threads():
    """Two threads on one prepared, evicted pipeline: looking a table up never takes it away from the other."""
    pipe = fresh()
    pipe.prepare(image_tokens=6, num_inference_steps=2)
    evict(pipe.transformer, "meta")
    errors = []

    def look() -> None:
        try:
            for _ in range(3000):
                pipe._schedules([6], 2)
        except RuntimeError as error:
            errors.append(error)

    threads = [threading.Thread(target=look) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def test_changed_weights_change_the_table():
    """A block's own modulation weights count; weights in training are never cached; ``.data`` is watched."""
    pipe = fresh()
    first = pipe(PROMPTS, seed=1, **SMALL).images
    weight = pipe.transformer.blocks[0].image.modulation.weight
    with torch.no_grad():
        weight.mul_(1.5)
    second = pipe(PROMPTS, seed=1, **SMALL).images
    assert not torch.equal(first, second)
    weight.data.div_(1.5)  # behind torch's back
    assert torch.equal(pipe(PROMPTS, seed=1, **SMALL).images, first)
    for name, module in (
        ("time", pipe.transformer.time_embedding.linear_2),
        ("final", pipe.transformer.final_modulation),
    ):
        module.bias.data[3] += 0.5
        changed = pipe(PROMPTS, seed=1, **SMALL).images
        assert not torch.equal(changed, first), name
        module.bias.data[3] -= 0.5
        assert relative(pipe(PROMPTS, seed=1, **SMALL).images, first) <= 1e-5
    weight.requires_grad_(True)
    weight.data.mul_(1.5)
    assert torch.equal(pipe(PROMPTS, seed=1, **SMALL).images, second)
