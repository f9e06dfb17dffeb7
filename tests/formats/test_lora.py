"""LoRAs: held to peft on an independent Lens, merged into fused weights, taken out again bit for bit, refused when wrong."""

import json
import signal
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lens import LensPipeline
from lens.formats import lora
from lens.formats.files import CheckpointError
from lens.formats.released import load_transformer
from tests.reference_model import ReferenceLens, as_lens, relative
from tests.small_pipeline import FOLDER, counted, fresh, same_bits

CONFIG = json.loads((FOLDER / "transformer" / "config.json").read_text())
ATTENTION = ["img_qkv", "txt_qkv", "to_out.0", "to_add_out"]
MLP = ["img_mlp.w1", "img_mlp.w3", "img_mlp.w2", "txt_mlp.w1", "txt_mlp.w3"]
OTHERS = ["img_mod.1", "img_in", "txt_in", "proj_out", "norm_out.linear", "timestep_embedder.linear_2"]
KEY = "base_model.model.transformer_blocks.0.attn.img_qkv.lora_A.weight"


def with_peft(seed=3, targets=(*ATTENTION, *MLP, *OTHERS), **settings):
    """An independent Lens with the golden weights under a random peft adapter."""
    peft = pytest.importorskip("peft")
    reference = ReferenceLens(CONFIG)
    reference.load_state_dict(load_file(next((FOLDER / "transformer").glob("*.safetensors"))))
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": list(targets), **settings})
    model = peft.get_peft_model(reference.float().eval(), config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.1)
    return model


@pytest.fixture(scope="module")
def peft_model():
    return with_peft(
        rank_pattern={"img_mlp.w1": 2}, alpha_pattern={"txt_qkv": 3, r"transformer_blocks\.1\.attn.img_qkv": 9}
    )


@pytest.fixture(scope="module")
def folder(peft_model, tmp_path_factory):
    path = tmp_path_factory.mktemp("style")
    peft_model.save_pretrained(path)
    return path


def lens():
    return load_transformer(FOLDER / "transformer", torch.float32, "cpu")


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def inputs():
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(2, 12, CONFIG["in_channels"], generator=generator)
    text = [torch.randn(2, 5, CONFIG["enc_hidden_dim"], generator=generator) for _ in CONFIG["selected_layer_index"]]
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    return image, text, mask, torch.tensor([0.3, 0.8])


def test_the_picture_of_peft(peft_model, folder):
    """peft's own forward pass, adapters beside the weights, on every kind of layer; w1 and w3 apart, ranks and alphas mixed."""
    ours, (image, text, mask, t) = lens(), inputs()
    plain = ours(image, text, mask, t, [(1, 3, 4)])
    found = lora.read(folder)
    assert len(found.pairs) == 3 * (len(ATTENTION) + len(MLP) + 1) + 5
    lora.Adapters(ours).add(found, 1.0)
    with torch.no_grad():
        theirs = peft_model(image, text, mask, t, (3, 4))
        with peft_model.disable_adapter():
            base = peft_model(image, text, mask, t, (3, 4))
    assert relative(plain, base) < 1e-5
    assert relative(base, theirs) > 0.1  # the adapter matters
    assert relative(ours(image, text, mask, t, [(1, 3, 4)]), theirs) < 1e-5


@pytest.mark.parametrize("rslora", [False, True])
def test_the_weights_of_pefts_merge(tmp_path, rslora):
    model = with_peft(use_rslora=rslora)
    model.save_pretrained(tmp_path)
    ours = lens()
    lora.Adapters(ours).add(lora.read(tmp_path), 1.0)
    merged = as_lens(model.merge_and_unload(), CONFIG).requires_grad_(False)
    for (name, p), q in zip(ours.named_parameters(), merged.parameters()):
        assert relative(p, q) < 1e-6, name


def test_bfloat16_is_rounded_once_and_comes_back(folder):
    exact, model, found = lens(), lens().bfloat16(), lora.read(folder)
    before = weights(model)
    loaded = lora.Adapters(model)
    with torch.no_grad():
        for p in exact.parameters():
            p.copy_(p.bfloat16())
    lora.Adapters(exact).add(found, 0.7)
    loaded.add(found, 0.7)
    for (name, p), q in zip(model.named_parameters(), exact.parameters()):
        assert torch.equal(p, q.bfloat16()), name
    loaded.add(found, -0.7)  # two of them cancel: summed before they are rounded
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert len(loaded.loaded) == 2
    loaded.clear()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not loaded.loaded
    assert loaded.clear() == set()


def single_file(folder, path, prefix, metadata=True, alpha=None):
    tensors = load_file(folder / lora.WEIGHTS)
    tensors = {prefix + key.removeprefix("base_model.model."): value for key, value in tensors.items()}
    if alpha is not None:
        for key in [k for k in tensors if "lora_A" in k]:
            tensors[key.replace(".lora_A.weight", ".alpha")] = torch.tensor(alpha)
    config = json.loads((folder / lora.CONFIG).read_text())
    keep = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")
    packed = {lora.METADATA: json.dumps({f"transformer.{k}": config[k] for k in keep})}
    save_file(tensors, path, packed if metadata else None)
    return path


def test_diffusers_files_and_bare_ones(folder, tmp_path):
    whole = lora.read(folder)
    packed = lora.read(single_file(folder, tmp_path / "a.safetensors", "transformer."))
    assert packed.fingerprint == whole.fingerprint
    bare = lora.read(single_file(folder, tmp_path / "b.safetensors", "", metadata=False))
    assert {pair.factor for pair in bare.pairs.values()} == {1.0}  # nothing says alpha: r
    assert bare.fingerprint != whole.fingerprint
    alpha = lora.read(single_file(folder, tmp_path / "c.safetensors", "diffusion_model.", False, 8.0))
    assert {pair.factor for pair in alpha.pairs.values()} == {2.0, 4.0}  # ranks 4 and 2
    assert lora.read(folder / lora.WEIGHTS).fingerprint == whole.fingerprint  # the configuration lies beside it


def damaged(path, change):
    tensors = load_file(path / lora.WEIGHTS)
    change(tensors)
    save_file(tensors, path / lora.WEIGHTS)


def renamed(tensors, old, new):
    for key in [k for k in tensors if old in k]:
        tensors[key.replace(old, new)] = tensors.pop(key)


FAULTS = {
    "nan": (lambda t: t[KEY].view(-1)[3].fill_(float("nan")), r"img_qkv\.lora_A\.weight holds NaN or infinity"),
    "one side": (lambda t: t.pop(KEY), r"blocks\.0\.attn\.img_qkv has lora_B alone, expected lora_A and lora_B"),
    "other model": (lambda t: renamed(t, "attn.img_qkv", "attn.to_q"), r"blocks\.0\.attn\.to_q is no linear layer of this"),
    "shape": (
        lambda t: t.update({KEY: torch.zeros(4, 96)}),
        r"img_qkv must adapt a weight of shape \[384, 128\], got lora_B @ lora_A of \[384, 96\]",
    ),
    "rank": (lambda t: t.update({KEY: torch.zeros(3, 128)}), r"lora_A \[3, 128\] and lora_B \[384, 4\] do not share a rank"),
    "dora": (lambda t: t.update({KEY.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(4)}), "is no LoRA of a"),
    "integers": (lambda t: t.update({KEY: torch.ones(4, 128, dtype=torch.int64)}), r"has dtype torch\.int64, expected a float"),
    "no matrix": (lambda t: t.update({KEY: torch.ones(4, 128, 1)}), r"of shape \[4, 128, 1\] is no LoRA of a linear layer"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_file_is_refused_and_changes_nothing(folder, tmp_path, fault):
    for name in (lora.WEIGHTS, lora.CONFIG):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    change, message = FAULTS[fault]
    damaged(tmp_path, change)
    pipe = fresh()
    before = weights(pipe.transformer)
    with pytest.raises(CheckpointError, match=message):
        pipe.load_lora(tmp_path)
    assert not pipe.loras
    assert all(torch.equal(p, before[name]) for name, p in pipe.transformer.named_parameters())


def test_a_truncated_or_missing_file_is_refused(folder, tmp_path):
    (tmp_path / lora.CONFIG).write_bytes((folder / lora.CONFIG).read_bytes())
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors: file not found; a LoRA is"):
        lora.read(tmp_path)
    whole = (folder / lora.WEIGHTS).read_bytes()
    for size in (4, 200, len(whole) - 1):
        (tmp_path / lora.WEIGHTS).write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors: truncated"):
            lora.read(tmp_path)
    (tmp_path / lora.WEIGHTS).write_bytes(struct.pack("<Q", 2) + b"{}")
    with pytest.raises(CheckpointError, match="holds no LoRA"):
        lora.read(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type must be LORA, got 'LOHA'"),
        ({"use_dora": True}, "use_dora is not supported"),
        ({"bias": "all"}, "bias must be 'none', got 'all'"),
        ({"modules_to_save": ["proj_out"]}, "modules_to_save is not supported"),
        ({"r": 5}, "must have rank r = 5, got 4"),
        ({"lora_alpha": "6"}, "lora_alpha of .* must be a number, got '6'"),
    ],
)
def test_a_configuration_that_means_something_else_is_refused(folder, tmp_path, change, message):
    (tmp_path / lora.WEIGHTS).write_bytes((folder / lora.WEIGHTS).read_bytes())
    config = json.loads((folder / lora.CONFIG).read_text())
    (tmp_path / lora.CONFIG).write_text(json.dumps({**config, **change}))
    with pytest.raises(CheckpointError, match=message):
        lora.read(tmp_path)


# ------------------------------------------------------------------------------------------------ pipeline


def draw(pipe):
    return pipe(
        "a red apple", height=32, width=48, num_inference_steps=3, guidance_scale=2.0, seed=5, output_type="latent"
    ).images


@pytest.mark.parametrize("residency", [None, "trimmed", "lean"])
def test_a_picture_is_that_of_merged_weights_and_the_old_one_after_unloading(folder, tmp_path, residency):
    """Modulation included: tables made before must not be used after, wherever the weights live."""
    model, found = lens(), lora.read(folder)
    lora.Adapters(model).add(found, 0.8)
    expected = fresh()
    expected.transformer = model
    pipe = LensPipeline.from_pretrained(FOLDER, variant="lens", device="cpu", residency=residency)
    before = draw(pipe)
    pipe.load_lora(folder, 0.8)
    assert pipe.loras == [(folder.name, found.fingerprint, 0.8)]
    after = draw(pipe)
    assert same_bits(after, draw(expected))
    assert not torch.equal(after, before)
    pipe.unload_lora()
    assert pipe.loras == []
    assert same_bits(draw(pipe), before)
    pipe.load_lora(folder, 0.0)
    assert same_bits(draw(pipe), before)


def test_tables_are_forgotten_where_modulation_changes(folder, tmp_path):
    """Weights evicted to the host have versions nobody watches."""
    pipe = fresh()
    with counted(pipe._tables, "forget") as calls:
        pipe.load_lora(folder)
        pipe.unload_lora()
    assert len(calls) == 2
    for name in (lora.WEIGHTS, lora.CONFIG):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    damaged(tmp_path, lambda tensors: [tensors.pop(key) for key in list(tensors) if "attn" not in key])
    with counted(pipe._tables, "forget") as calls:
        pipe.load_lora(tmp_path)
    assert not calls


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), "1", True])
def test_a_scale_that_is_no_number_is_refused(folder, scale):
    pipe = fresh()
    with pytest.raises(ValueError, match="load_lora: scale must be a finite number"):
        pipe.load_lora(folder, scale)


def test_peft_is_not_needed(folder):
    code = (
        "import sys; sys.modules['peft'] = None\n"
        "from lens import LensPipeline\n"
        f"pipe = LensPipeline.from_pretrained({str(FOLDER)!r}, variant='lens', device='cpu')\n"
        f"pipe.load_lora({str(folder)!r}, 0.5); print(pipe.loras[0][2])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False
    )
    assert done.stdout == "0.5\n", done.stderr


def test_an_adapter_of_lens_applies_to_turbo(folder):
    """The same shapes: only steps and guidance differ."""
    pipe = fresh(variant="turbo")
    plain = np.asarray(pipe("a red apple", height=32, width=32, seed=1).images[0])
    pipe.load_lora(folder)
    assert not np.array_equal(np.asarray(pipe("a red apple", height=32, width=32, seed=1).images[0]), plain)


@pytest.mark.parametrize("first", [False, True], ids=["the first", "another"])
@pytest.mark.parametrize("stop", ["ctrl-c", "ctrl-c at the end", "memory"])
def test_all_of_an_adapter_is_merged_or_nothing(folder, monkeypatch, stop, first):
    """Also under a second Ctrl-C while the first is being undone."""
    pipe = fresh()
    if first:
        pipe.load_lora(folder, 0.5)
    before, loras, merge, calls = weights(pipe.transformer), pipe.loras, lora.Adapters._merge, []

    def interrupted(self, weight, name, parts):
        merge(self, weight, name, parts)
        calls.append(name)
        if stop == "memory" and len(calls) == 7:
            raise torch.OutOfMemoryError("simulated")
        if stop != "memory" and len(calls) in ((7, 9) if stop == "ctrl-c" else (len(before_names),)):
            signal.raise_signal(signal.SIGINT)

    before_names = {lora.modules_of(pipe.transformer)[m][0] for m in lora.read(folder).pairs}
    monkeypatch.setattr(lora.Adapters, "_merge", interrupted)
    with pytest.raises(torch.OutOfMemoryError if stop == "memory" else KeyboardInterrupt):
        pipe.load_lora(folder)
    monkeypatch.undo()
    assert pipe.loras == loras
    assert same_bits(list(weights(pipe.transformer).values()), list(before.values()))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    pipe.load_lora(folder, 0.5)
    pipe.unload_lora()
    assert same_bits(list(weights(pipe.transformer).values()), list(weights(fresh().transformer).values()))
