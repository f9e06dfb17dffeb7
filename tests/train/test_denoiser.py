"""The MMDiT as it is trained is the MMDiT: the same bits, whatever is computed again, and what is kept for that."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from lens.config import LensConfig
from lens.cost import gemm_flops, step_flops
from lens.model import LensTransformer2DModel
from lens.packing import plan
from train import cost
from train.loop.lora import NO_LORA, Lora, attach_lora, init_lora, keep_lora, lora_layers
from train.networks.denoiser import RECOMPUTE, Denoiser

CONFIG = LensConfig.tiny()
TEXTS = {"texts": [5, 0, 7], "no texts": [0, 0, 0]}


def filled(model):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.1, generator=generator)
    return model.train()


def inputs(texts, config=CONFIG, grid=(2, 3)):
    generator = torch.Generator().manual_seed(1)
    packing = plan([grid] * len(texts), texts, config.axes_dims_rope)
    x = torch.randn(len(texts) * grid[0] * grid[1], config.in_channels, generator=generator)
    features = torch.randn(sum(texts), len(config.selected_layer_index), config.enc_hidden_dim, generator=generator)
    return x, features, torch.rand(len(texts), generator=generator), packing


@pytest.fixture(scope="module", params=TEXTS.values(), ids=TEXTS)
def plain(request):
    """`lens.model`: velocity and gradients."""
    model = filled(LensTransformer2DModel(CONFIG))
    x, features, t, packing = inputs(request.param)
    v = model.denoise(x, model.project_text(list(features.unbind(1)), packing.text_lengths), model.modulate(t), packing)
    v.pow(2).mean().backward()
    return model, request.param, v.detach(), {n: p.grad for n, p in model.named_parameters()}


@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_velocity_and_gradients_are_the_models(plain, recompute):
    model, texts, want, gradients = plain
    own = Denoiser(CONFIG, recompute=recompute).train()
    own.load_state_dict(model.state_dict())
    v = own(*inputs(texts))
    v.pow(2).mean().backward()
    assert torch.equal(v, want)
    for name, p in own.named_parameters():
        assert (p.grad is None) == (gradients[name] is None) == (not p.requires_grad), name
        if p.grad is not None:
            assert torch.allclose(p.grad, gradients[name], rtol=1e-4, atol=1e-7), name


class Count(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen[str(function)] += 1
        return function(*args, **(kwargs or {}))


def calls(recompute):
    """Attention calls and matrix products of a forward and a backward pass."""
    model = filled(Denoiser(CONFIG, recompute=recompute))
    with Count() as count:
        model(*inputs([5, 0, 7])).pow(2).mean().backward()
    products = sum(n for name, n in count.seen.items() if name in ("aten.mm.default", "aten.addmm.default"))
    return count.seen["lens.joint_attention.default"], products


def test_what_is_computed_again():
    """Of three blocks: everything; or w13, of image and text, and the two modulations on which no gradient waits otherwise."""
    attention, products = zip(*map(calls, RECOMPUTE))
    assert attention == (3, 6, 3)
    none, block, selective = products
    # a block's products: two modulations, two qkv, two out, two w13, two w2; the last block's text has qkv alone
    assert block - none in range(20, 31)
    assert selective - none in range(5, 13)


def test_rounded_weights_get_gradients_of_their_own_kind(plain):
    """bfloat16 activations on float32 weights; the time keeps its digits."""
    model, texts, want, gradients = plain
    for recompute in RECOMPUTE:
        own = Denoiser(CONFIG, torch.bfloat16, recompute).train()
        own.load_state_dict(model.state_dict())
        v = own(*inputs(texts))
        v.float().pow(2).mean().backward()
        assert v.dtype == torch.bfloat16
        assert ((v.float() - want).norm() / want.norm()).item() < 0.02
        trained = {name: p for name, p in own.named_parameters() if p.grad is not None}
        assert {t for p in trained.values() for t in (p.dtype, p.grad.dtype)} == {torch.float32}
        all_of = torch.cat([p.grad.flatten() for p in trained.values()])
        exact = torch.cat([gradients[name].flatten() for name in trained])
        assert ((all_of - exact).norm() / exact.norm()).item() < 0.05
    x, features, t, packing = inputs(texts)
    near = torch.full_like(t, 0.995), torch.full_like(t, 0.9975)
    assert near[0].bfloat16().equal(near[1].bfloat16())
    assert not torch.equal(own(x, features, near[0], packing), own(x, features, near[1], packing))


def test_an_unknown_way_of_recomputing_is_refused():
    with pytest.raises(ValueError, match="recompute must be one of none, block, selective, got 'all'"):
        Denoiser(CONFIG, recompute="all")


def kept(layers, lora=None):
    """Numbers kept for the backward pass, in units of rows x width, in bfloat16."""
    config = LensConfig(num_layers=layers, num_attention_heads=4, enc_hidden_dim=64, selected_layer_index=(0, 1))
    model = Denoiser(config, torch.bfloat16)
    if lora is not None:
        attach_lora(model, lora)
    model = filled(model.bfloat16())
    own, seen = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes(), tensor
        return tensor

    x, features, t, packing = inputs([40] * 4, config, (8, 8))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        held = model(x, features, t, packing)
    rows = len(x) + len(features)
    return sum(size for size, _ in seen.values()) / (2 * rows * config.inner_dim), held


@pytest.mark.parametrize("lora", [None, Lora(8, 8.0), Lora(8, 8.0, "all")], ids=["whole", "attention", "all"])
def test_the_memory_that_the_dry_run_counts_is_what_a_block_keeps(lora):
    per_block = (kept(5, lora)[0] - kept(3, lora)[0]) / 2
    assert per_block == pytest.approx(cost.saved_activations(lora, 256), rel=0.01)


@pytest.mark.parametrize("lora", [Lora(8, 8.0), Lora(8, 8.0, "all")], ids=["attention", "all"])
def test_the_flops_of_adapters_are_those_a_step_does(lora):
    """Every product of a forward and a backward pass, counted by torch; attention is an op of ours, which it does not count."""
    texts, image, width = [5, 0, 7], 6, CONFIG.inner_dim
    model = Denoiser(CONFIG)
    attach_lora(model, lora)
    filled(model)
    with FlopCounterMode(display=False) as counter:
        model(*inputs(texts)).pow(2).mean().backward()
    own = cost.training_flops(CONFIG, image, texts, lora)
    attention = 3 * step_flops(CONFIG, [image] * 3, texts)["attention"]
    unread = 2 * gemm_flops(sum(texts), width, width)  # text queries of the last block: computed, not needed
    assert counter.get_total_flops() == own - attention + unread


@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_the_backward_pass_computes_again_under_the_adapter_of_its_forward_pass(recompute):
    """Gradients of one adapter are the same whatever was in force between its forward and its backward pass: the old
    policy, or none."""
    model = filled(Denoiser(CONFIG, recompute=recompute))
    attach_lora(model, Lora(4, 8.0, "all"))
    init_lora(model, 0)
    drawn = torch.Generator().manual_seed(7)

    def move():
        with torch.no_grad():
            for _, layer in lora_layers(model):
                for p in (*layer.down, *layer.up):
                    p.add_(torch.randn(p.shape, generator=drawn) * 0.2)

    move()
    keep_lora(model, "old")
    move()
    given = inputs([5, 0, 7])
    ways = {name: model(*given, name).detach() for name in (None, "old", NO_LORA)}
    assert not any(
        torch.allclose(ways[a], ways[b], rtol=1e-2) for a, b in ((None, "old"), (None, "none"), ("old", "none"))
    )

    def gradients(between):
        model.zero_grad()
        v = model(*given)
        for name in between:
            assert torch.equal(model(*given, name), ways[name])
        v.pow(2).mean().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    want = gradients([])
    assert len(want) == 2 * sum(len(layer.down) for _, layer in lora_layers(model)) - 8  # no dead text end
    for between in (["old"], [NO_LORA], ["old", NO_LORA]):
        got = gradients(between)
        assert got.keys() == want.keys()
        assert all(torch.equal(got[name], want[name]) for name in want)


def test_block_outputs_can_be_tapped():
    """After every block but the last, with the velocity's own bits; a gradient of a tap reaches the blocks before it alone."""
    model = filled(Denoiser(CONFIG))
    given, taps = inputs([5, 0, 7]), []
    assert torch.equal(model(*given, blocks_out=taps), model(*given))
    assert [tuple(x.shape) for pair in taps for x in pair] == [(18, 128), (12, 128)] * (CONFIG.num_layers - 1)
    whole = []
    plainly = LensTransformer2DModel(CONFIG)
    plainly.load_state_dict(model.state_dict())
    x, features, t, packing = given
    text = plainly.project_text(list(features.unbind(1)), packing.text_lengths)
    plainly.train().denoise(x, text, plainly.modulate(t), packing, whole)
    assert all(torch.equal(a, b) for own, other in zip(taps, whole) for a, b in zip(own, other))
    taps[0][0].sum().backward()
    reached = {name.split(".")[1] for name, p in model.named_parameters() if p.grad is not None and "blocks" in name}
    assert reached == {"0"}
