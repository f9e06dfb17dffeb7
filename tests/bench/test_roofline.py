"""FLOPs and bytes by formula against what a profiler counts while the model itself runs, tiny."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from bench import roofline
from bench.suites.gemm import prepare as prepare_gemm
from bench.suites.ops import SHAPES, STEMS, arguments, work_of
from bench.work import weights
from bench.work.scale import TINY
from lens import ops
from lens.config import LensConfig
from lens.cost import (
    attention_flops,
    decoder_flops,
    encoder_flops,
    gemm_flops,
    step_flops,
    step_traffic_bytes,
    table_flops,
    text_projection_flops,
)
from lens.engine.schedule_table import table
from lens.ops import backend
from lens.packing import plan

CPU = torch.device("cpu")
CONFIG = TINY.config


@pytest.fixture(scope="module")
def model():
    return weights.transformer(CONFIG, CPU, torch.float32)


def counted(call):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call()
    return counter.get_total_flops()


@pytest.mark.parametrize(("grids", "texts"), [([(4, 4), (4, 4)], [5, 0]), ([(2, 3), (5, 4), (1, 1)], [7, 1, 3])])
def test_a_step_counts_what_the_profiler_counts(model, grids, texts):
    packing = plan(grids, texts, CONFIG.axes_dims_rope)
    images = packing.image_lengths
    rows, text = torch.randn(sum(images), CONFIG.in_channels), torch.randn(sum(texts), CONFIG.inner_dim)
    modulation = table(model, torch.rand(len(grids)))
    with backend.use("reference"):  # attention as two counted products
        total = counted(lambda: model.denoise(rows, text, modulation, packing))
    dead = sum(texts) * gemm_flops(1, CONFIG.inner_dim, CONFIG.inner_dim)  # text queries of the last block
    assert sum(step_flops(CONFIG, images, texts).values()) + dead == total


def test_table_and_text_projection_count_what_the_profiler_counts(model):

    assert table_flops(CONFIG, 3) == counted(lambda: model.modulate(torch.rand(3)))
    features = [torch.randn(9, CONFIG.enc_hidden_dim) for _ in range(4)]
    assert text_projection_flops(CONFIG, 9) == counted(lambda: model.project_text(features, [9]))


def test_the_released_step_is_the_known_one():
    """The published accounting: 17.7 TFLOP for a sample with 300 text tokens, 675 for 20 guided steps."""
    config = LensConfig()
    one = sum(step_flops(config, [4096], [300]).values())
    both = 20 * sum(step_flops(config, [4096] * 2, [300, 0]).values())
    assert one / 1e12 == pytest.approx(17.6, abs=0.15)
    assert both / 1e12 == pytest.approx(675, rel=0.005)


def test_the_encoder_counts_what_the_profiler_counts():
    """The library computes attention over all pairs; the formula counts those that the window and the order leave."""
    encoder = weights.text_encoder(CPU, torch.float32, True, 2)
    config, tokens = encoder.config, 40
    config._experts_implementation = "eager"  # products one by one, which the counter knows
    q = config.num_attention_heads * config.head_dim
    window = sum(min(i + 1, config.sliding_window) for i in range(tokens))
    pairs = {"sliding_attention": window, "full_attention": tokens * (tokens + 1) // 2}
    spared = 4 * q * sum(tokens**2 - pairs[kind] for kind in config.layer_types[:2])
    total = counted(lambda: encoder(input_ids=torch.arange(tokens)[None], use_cache=False))
    assert encoder_flops(config, tokens, 2) == total - spared


def test_the_decoder_counts_what_the_profiler_counts():
    vae = weights.autoencoder(CPU, torch.float32, True)
    ours = decoder_flops(vae.config, (2, 3))
    mid = attention_flops(4 * 6, 4 * 6, vae.config.block_out_channels[-1])
    total = counted(lambda: vae.decode(torch.randn(1, vae.config.latent_channels, 4, 6)))
    assert total in (ours, ours - mid)  # the counter knows the CPU's attention kernel, or does not


class Traffic(TorchDispatchMode):
    """Bytes of the tensors that go into and come out of the ops of `lens`."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.namespace == "lens":
            self.bytes += roofline.moved([args, kwargs or {}, out])
        return out


@pytest.mark.parametrize("stem", [s for s in STEMS if s not in ("pack_tokens", "joint_attention")])
def test_an_op_moves_what_the_profiler_sees_go_in_and_out(stem):
    named = arguments(stem, SHAPES["small"], torch.float32, CPU)
    with Traffic() as traffic, torch.no_grad():
        out = getattr(ops, stem)(**named)
    assert work_of(stem, SHAPES["small"], named, out, False)[1] == pytest.approx(traffic.bytes, rel=0.02)


def test_a_step_reads_every_weight_that_a_step_needs_once(model):
    """The blocks without their modulation, and both ends; what is computed once per prompt or schedule is not read."""
    needed = [p for name, p in model.blocks.named_parameters() if "modulation" not in name]
    needed += [model.image_in.weight, model.image_out.weight]
    assert step_traffic_bytes(CONFIG, [], [], 4) == roofline.moved(needed)
    one, more = (step_traffic_bytes(CONFIG, [n], [5], 2) - step_traffic_bytes(CONFIG, [], [5], 2) for n in (1, 7))
    assert more == 7 * one


def test_a_product_moves_its_rows_and_weights():
    work = prepare_gemm(TINY, "qkv", (16, 5), CPU)
    weights_bytes = 2 * 4 * (128 * 384 + 384)
    assert work.bytes == 4 * 21 * (128 + 384) + weights_bytes
    assert work.flops == counted(lambda: work.subjects["ours"].call(*work.inputs[0]))


def test_shares_of_the_ceilings():
    roof = roofline.roof(8e12, 1e9, 0.02, {"copy": 1e12, "matmul": 8e14})
    assert roof["of_matmul"] == pytest.approx(0.5)
    assert roof["of_copy"] == pytest.approx(0.05)
    assert roof["floor_s"] == pytest.approx(0.01)
    assert roof["of_floor"] == pytest.approx(0.5)
