"""Peak memory of loading a checkpoint of 1 GB: at most 1.15 times the loaded size and 200 MB.

Measured in a child process, as the rise of the resident set over what the imported process held before loading: the
peak counter is reset after the imports, so their own memory counts neither for nor against.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from lens import LensConfig, LensTransformer2DModel
from lens.formats.files import write_json
from lens.formats.names import released_names
from lens.formats.released import released_config
from lens.formats.safetensors import save_tensors

# about 1.06 GB in float32
CONFIG = LensConfig(num_layers=7, num_attention_heads=16, enc_hidden_dim=64, selected_layer_index=(0, 1))

CHILD = """
import json, sys
from pathlib import Path
import torch
import lens
from lens import checkpoint

def status(key):
    return next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith(key))

torch.zeros(1000, 1000) @ torch.zeros(1000, 10)  # thread pools and buffers of the library
Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
before = status("VmRSS")
model = checkpoint.load_transformer(Path(sys.argv[1]), getattr(torch, sys.argv[2]), "cpu")
peak, after = status("VmHWM") - before, status("VmRSS") - before
size = sum(p.numel() * p.element_size() for p in model.parameters())
values = [float(p.double().mean()) for p in list(model.parameters())[::40]]
print(json.dumps({"peak": peak, "after": after, "size": size, "values": values}))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Shards of 200 MB in float32, each tensor filled with its own number; deleted after the test."""
    path = tmp_path_factory.mktemp("gigabyte")
    with torch.device("meta"):
        model = LensTransformer2DModel(CONFIG)
    tensors, stored = {}, 0
    for name, parameter in model.named_parameters():
        keys = released_names(name)
        for key in keys:
            shape = [parameter.shape[0] // len(keys), *parameter.shape[1:]] if len(keys) > 1 else parameter.shape
            tensors[key] = torch.full(shape, 1 / (1 + stored % 13))
            stored += 1
    save_tensors(path, "diffusion_pytorch_model", tensors, shard_bytes=200_000_000)
    write_json(path / "config.json", released_config(CONFIG))
    assert len(list(path.glob("*.safetensors"))) >= 5
    assert sum(f.stat().st_size for f in path.glob("*.safetensors")) > 1_000_000_000
    yield path
    for file in path.iterdir():
        file.unlink()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peak_of_loading_a_gigabyte(folder, dtype):
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(folder), dtype], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    size = result["size"]
    assert size == pytest.approx(1.06e9 if dtype == "float32" else 0.53e9, rel=0.02)
    assert result["after"] > 0.9 * size  # the weights are in memory, not mapped: the peak below means something
    assert result["peak"] <= 1.15 * size + 200e6, result
    assert len(set(result["values"])) > 1
