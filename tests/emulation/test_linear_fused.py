"""The public ops over our kernels: both streams in one launch, one stream, no text, against the specification."""

import pytest
import torch
from torch import Tensor

from lens.ops import backend
from lens.ops.linear import choice as linear_choice
from lens.ops.linear import fused as linear_fused
from tests.ops.test_linear_fused import IMAGES, against_spec, by_op, inputs, layers, typed


@pytest.fixture
def fused(emulated, monkeypatch):
    monkeypatch.setattr(linear_choice, "why_unsupported", lambda call: "")
    with linear_choice.use("fused"):
        yield emulated


@pytest.mark.parametrize("case", IMAGES)
def test_against_the_spec(fused, case):
    fused.seed = 3
    against_spec(case, torch.bfloat16)
    ours = [name for name in fused.calls if name != "rms_norm_modulate"]
    # one launch for both streams; the residual with a bias, again with the norm, and without a bias
    residual = ["linear_gated_residual"] * 3
    assert ours == [*residual[:2], "linear_qkv_norm_rope", "linear_swiglu", residual[2]]


@torch.no_grad()
def test_one_stream_has_the_bits_it_has_beside_another(fused):
    """The last block's text is left out."""
    made = typed(inputs(*IMAGES["two samples"]), torch.bfloat16)
    both = by_op(made)
    image = {name: value[:1] if isinstance(value, list) else value for name, value in made.items()}
    out, rest = layers(image["out"], image["out_bias"]), (image["gate"], made["offsets"])
    assert torch.equal(linear_fused.linear_swiglu(image["normed"], layers(image["w13"]))[0], both["swiglu"][0])
    alone = linear_fused.linear_gated_residual(image["x"], image["hidden"], out, *rest)
    assert len(alone) == 1
    assert torch.equal(alone[0], both["residual"][0])


@torch.no_grad()
def test_what_lies_off_16_bytes_is_copied(fused):
    """The epilogues read 8 neighbours at once: of the biases, the norms' weights, the gate's rows and the angles."""
    made = typed(inputs(*IMAGES["two samples"]), torch.bfloat16)
    expected = by_op(made)

    def off(x: Tensor, stride: int = 0) -> Tensor:
        """x one element, with rows `stride` elements, further."""
        shifted = x.new_empty(1 + (x.shape[0] * stride if stride else x.numel()))[1:]
        shifted = shifted.view(x.shape[0], stride)[:, : x.shape[1]] if stride else shifted.view(x.shape)
        return shifted.copy_(x)

    for name, value in made.items():
        if name == "gate":
            made[name] = [off(table, table.shape[1] + 4) for table in value]
        elif name != "offsets":
            made[name] = [off(x) for x in value] if isinstance(value, list) else off(value)
    got = by_op(made)
    for name, value in expected.items():
        for one, other in zip(*((x if isinstance(x, list) else [x]) for x in (got[name], value)), strict=True):
            assert torch.equal(one, other), name


@torch.no_grad()
def test_refusals(fused):
    made = typed(inputs(*IMAGES["no text"]), torch.bfloat16)
    wide = [torch.nn.Linear(128, 192, dtype=torch.bfloat16) for _ in range(2)]
    with pytest.raises(ValueError, match=r"lens.linear_swiglu: layers must have no bias, got one of \[192\]"):
        linear_fused.linear_swiglu(made["normed"], wide)
    with pytest.raises(ValueError, match=r"lens.linear_swiglu: x must be \[R, K\] = \[13, 64\], got \[13, 128\]"):
        linear_fused.linear_swiglu(made["normed"], layers([w[:, :64] for w in made["w13"]]))
    out = layers(made["out"], made["out_bias"])
    with pytest.raises(ValueError, match=r"lens.linear_gated_residual: weight must be bfloat16, got float32"):
        linear_fused.linear_gated_residual(
            made["x"], made["hidden"], [layer.float() for layer in out], made["gate"], made["offsets"]
        )
    with pytest.raises(ValueError, match=r"layers and lengths must be one per stream, got 1 for 2 streams"):
        linear_fused.linear_swiglu(made["normed"], layers(made["w13"])[:1])
    heads = made["q_weight"], made["k_weight"], made["cos"], made["sin"], *made["offsets"]
    with pytest.raises(ValueError, match="layers must have a bias each, got none"):
        linear_fused.linear_qkv_norm_rope(made["normed"], layers(made["qkv"]), *heads)
    with backend.use("reference"):
        linear_fused.linear_swiglu(made["normed"], layers(made["w13"]))  # what is forced by name is forced
