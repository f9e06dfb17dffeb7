"""All ops in one graph without a break: torch.compile(fullgraph=True), forward and backward."""

import pytest
import torch

from lens import ops
from lens.ops.linear.fused import linear
from tests.ops.harness import Maker, compiled, offsets_of

IMAGE, TEXT, HEADS, HEAD_DIM, HIDDEN = [12, 5], [3, 0], 2, 16, 37
WIDTH = HEADS * HEAD_DIM
IMAGE_OFFSETS, TEXT_OFFSETS = offsets_of(IMAGE), offsets_of(TEXT)


def block(tokens, text, rows, table, weight, head_weight, image_qkv, text_qkv, up, cos, sin):
    """Every op of the model once, wired like a block of it."""
    gate, scale, shift = table[:, :WIDTH], table[:, WIDTH : 2 * WIDTH], table[:, 2 * WIDTH : 3 * WIDTH]
    x = ops.pack_tokens(tokens, rows)
    normed = ops.rms_norm_modulate(x, weight, scale, shift, IMAGE_OFFSETS)
    text_normed = ops.rms_norm_modulate(text, weight, scale, shift, TEXT_OFFSETS)
    qkv = ops.qk_norm_rope(
        normed @ image_qkv, text_normed @ text_qkv, *[head_weight] * 4, cos, sin, IMAGE_OFFSETS, TEXT_OFFSETS
    )
    attended, text_attended = ops.joint_attention(*qkv.unbind(0), IMAGE, TEXT, IMAGE_OFFSETS, TEXT_OFFSETS)
    x, normed = ops.gated_residual_norm_modulate(x, attended, gate, weight, scale, shift, IMAGE_OFFSETS)
    x = x + (ops.swiglu(normed @ up) ** 2).sum(1, keepdim=True)
    text = ops.gated_residual(text, text_attended, gate, TEXT_OFFSETS)
    return ops.unpack_tokens(x, rows, 2, 12), text


def arguments() -> list[torch.Tensor]:
    make = Maker()
    rows = torch.tensor([*range(12), *range(12, 17)])
    angle = make(sum(IMAGE) + sum(TEXT), HEAD_DIM // 2, grad=False)
    shapes = [(2, 3 * WIDTH), (WIDTH,), (HEAD_DIM,), (WIDTH, 3 * WIDTH), (WIDTH, 3 * WIDTH), (WIDTH, 2 * HIDDEN)]
    tensors = [make(2, 12, WIDTH), make(sum(TEXT), WIDTH), rows, *(make(*shape) for shape in shapes)]
    tensors += [angle.cos(), angle.sin()]
    return [t.detach().float().requires_grad_(t.requires_grad) if t.is_floating_point() else t for t in tensors]


@pytest.mark.parametrize("choice", ["compiled", "reference"])
def test_fullgraph_forward_and_backward(choice):
    """Traced and differentiated ahead of time; what Inductor makes of the graph is the next test."""
    made = arguments()
    leaves = [t for t in made if t.requires_grad]
    found = []
    for function in (block, torch.compile(block, fullgraph=True, backend="aot_eager")):
        with compiled(), ops.backend.use(choice):
            outputs = function(*made)
            loss = sum((out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum() for out in outputs)
            found.append([*outputs, *torch.autograd.grad(loss, leaves)])
    for eager, whole in zip(*found, strict=True):
        torch.testing.assert_close(whole, eager, rtol=1e-4, atol=1e-4 * eager.abs().max().item())


def test_fullgraph_in_bfloat16():
    """Which kernel serves bfloat16 on a CPU is asked of Python alone."""
    rows = torch.randn(9, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    layer = torch.nn.Linear(32, 32).bfloat16()

    def part(x, layer):
        heads = linear(layer, x).view(9, 2, 16)
        return ops.joint_attention(heads, heads, heads, [9], [0], offsets_of([9]), offsets_of([0]))[0]

    with compiled():
        for recorded in (True, False):
            with torch.set_grad_enabled(recorded):
                eager = part(rows, layer)
                whole = torch.compile(part, fullgraph=True, backend="aot_eager")(rows, layer)
            torch.testing.assert_close(whole.float(), eager.float(), rtol=2e-2, atol=2e-2)


@pytest.mark.nightly  # compilation takes most of two minutes; test_device.py trains through Inductor in every run
def test_inductor_forward_and_backward():
    make = Maker()
    x, weight = make(17, 24).float().detach().requires_grad_(), make(24).float().detach().requires_grad_()
    table = make(2, 72).float().detach()

    def part(x, weight, table):
        scale, shift, gate = table.chunk(3, 1)
        x = ops.gated_residual(x, ops.rms_norm_modulate(x, weight, scale, shift, IMAGE_OFFSETS), gate, IMAGE_OFFSETS)
        return ops.swiglu(x * 2)

    found = []
    for function in (part, torch.compile(part, fullgraph=True)):
        with compiled():
            out = function(x, weight, table)
            found.append([out, *torch.autograd.grad(out.square().sum(), (x, weight))])
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)


def test_fullgraph_guidance_step():
    make = Maker()
    x, cond, uncond, delta = make(17, 8).float(), make(17, 8).float(), make(17, 8).float(), make(2).float()

    def step(x, cond, uncond, delta):
        return ops.guidance_step(x, cond, uncond, delta, 4.0, IMAGE_OFFSETS)

    with compiled(), torch.no_grad():
        expected = step(x, cond, uncond, delta)
        assert torch.equal(torch.compile(step, fullgraph=True)(x, cond, uncond, delta), expected)
