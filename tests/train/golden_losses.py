"""Every stage for a few steps of a recipe small enough for seconds, by its command: the values its loop goes backward from.

python -m tests.train.golden_losses        # write tests/golden/losses.json anew, where a change of numbers is meant
"""

import contextlib
import json
import sys
import tempfile
from pathlib import Path
from types import ModuleType

import torch

from train import configs
from train.__main__ import main

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden" / "losses.json"
SHIPPED = ROOT / "lens" / "mini" / "base"

_HALF = {"batch": 2, "warmup": 2, "steps": 6, "decay": 2, "detail_from": 0, "detail_full": 3}
CHANGES = {
    "vae": {
        "MODEL": {"block_out_channels": (8, 8, 8, 8), "decoder_block_out_channels": (8, 8, 8, 8)},
        "CODEC": {"scenes": 64, "steps": 8, "batch": 8},
        "PROBE": {"scenes": 32, "held": 8, "batch": 8, "steps": 6},
        "DECODER": _HALF,
        "ENCODER": {"batch": 2, "warmup": 2, "steps": 6, "decay": 2},
        "JOINT": _HALF,
        "STATISTICS_SCENES": 64,
        "VALIDATION": 2,
    },
    "encoder": {"TRAIN": {"batch": 4, "warmup": 2, "steps": 6, "decay": 2}, "VALIDATION": 2},
    "reasoner": {"TRAIN": {"batch": 2, "warmup": 2, "steps": 4, "decay": 1}, "AUTOCAST": False, "VALIDATION": 2},
    "pretrain": {
        "MODEL": {"num_layers": 2, "num_attention_heads": 2},
        "WINDOW": 16,
        "BATCHES": ((0, 4),),
        "WARMUP": 2,
        "JOINT_STEPS": 4,
        "STEPS": 8,
        "DECAY": 3,
        "SHEET": {"steps": 1},
        "PROMPTS": ("a red apple", "a blue car"),
        "VALIDATION": 2,
    },
    "mixed_resolution": {
        "MODEL": {"num_layers": 2, "num_attention_heads": 2},
        "WINDOW": 4,
        "BUCKETS": {64: (0.5, 3), 96: (0.5, 2)},
        "WARMUP": 2,
        "STEPS": 6,
        "DECAY": 2,
        "SHEET": {"steps": 1},
        "PROMPTS": ("a red apple", "a blue car"),
        "VALIDATION": 2,
    },
    "detector": {
        "SHAPE": {"widths": (8, 8, 16, 16), "blocks": (1, 1, 1), "neck": 16},
        "BATCHES": ((0, ((64, 64, 3, 1.0),)), (2, ((64, 64, 3, 0.5), (64, 96, 2, 0.5)))),
        "STEPS": 6,
        "WARMUP": 2,
        "DECAY": 2,
        "VALIDATION": 2,
    },
    "world": {},
    "pretrain_128": {
        "SIZES": {(64, 64): 0.5, (48, 96): 0.5},
        "BATCH": 4,
        "TEXT_BINS": (160,),  # one: more would leave most of so few scenes without a whole batch
        "POOL": {"chunk": 8, "kept": 2, "reuse": 1},
        "COMPILED": False,
        "GEMM": "float32",
        "LR": 2e-3,
        "STRAIGHTEN": 64,
        "WARMUP": 2,
        "STEPS": 6,
        "DECAY": 2,
        "VALIDATION": 2,
    },
}
AS_THEY_ARE = ("BUCKETS", "SIZES")  # tables that CHANGES replaces whole


@contextlib.contextmanager
def recipes(name="tiny"):
    """Inside, `--config tiny` is Mini's recipe with CHANGES."""
    made = {f"train.configs.{name}": ModuleType(name)}
    for stage, changes in CHANGES.items():
        module, source = ModuleType(f"train.configs.{name}.{stage}"), f"mini/{stage}"
        module.__dict__.update({k: v for k, v in vars(configs.load(source, stage)).items() if k.isupper()})
        for field, value in changes.items():
            old = getattr(module, field)
            merged = {**old, **value} if isinstance(old, dict) and field not in AS_THEY_ARE else value
            setattr(module, field, merged)
        made[module.__name__] = module
    sys.modules.update(made)
    try:
        yield name
    finally:
        for module in made:
            del sys.modules[module]


@contextlib.contextmanager
def watched():
    """The value of everything that goes backward inside, in order."""
    seen, backward = [], torch.Tensor.backward

    def noted(self, *arguments, **options):
        seen.append(self.item())
        return backward(self, *arguments, **options)

    torch.Tensor.backward = noted
    try:
        yield seen
    finally:
        torch.Tensor.backward = backward


def commands(out):
    """stage -> its command, in order: a later one reads what those before it wrote below `out`."""
    vae, text, base = out / "vae", out / "encoder" / "encoder.pt", out / "base"
    networks = f"--vae {vae} --encoder {text}"
    return {
        "vae codec": f"vae --part codec --out {vae}",
        "vae decoder": f"vae --part decoder --out {vae}",
        "vae encoder": f"vae --part encoder --out {vae}",
        "vae probe": f"vae --part probe --out {vae}",
        "vae joint": f"vae --part joint --out {out / 'joint'}",
        "encoder": f"encoder --out {out / 'encoder'}",
        "reasoner": f"reasoner --init {SHIPPED} --out {out / 'reasoner'}",
        "pretrain": f"pretrain {networks} --out {base}",
        "mixed_resolution": f"mixed_resolution --vae {vae} --init {base / 'pretrain.pt'} --out {out / 'mixed'}",
        "lora": f"pretrain --vae {vae} --init {base / 'pretrain.pt'} --lora r=4 --steps 4 --out {out / 'lora'}",
        "pool": f"pretrain --init {SHIPPED} --out {out / 'pool'}",
        "detector": f"detector --vae {vae} --out {out / 'detector'}",
    }


def run(stage, command):
    with recipes() as name, watched() as seen:
        assert main([*command.split(), "--config", f"{name}/pretrain_128" if stage == "pool" else name]) == 0
    return seen


def on_shards(out):
    """Three steps of four micro-batches on shards, from the shipped weights."""
    build = "shards --world mini --bases 64 --aspects 1:1 1:2 --per-bucket 10 --precompute latents,text"
    assert main([*build.split(), "--model", str(SHIPPED), "--out", str(out / "shards")]) == 0
    changes = ["BATCH.64=2", "LOG_EVERY=1", "SAVE_EVERY=100"]
    command = f"mixed_resolution --config mini/on_shards --data {out / 'shards'} --out {out / 'on_shards'}"
    words = [*command.split(), *(word for change in changes for word in ("--set", change))]
    with watched() as seen:
        assert main([*words, "--init", str(SHIPPED), "--steps", "3"]) == 0
    return seen


def all_losses(out):
    found = {stage: run(stage, command) for stage, command in commands(out).items()}
    return found | {"on_shards": on_shards(out)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        losses = all_losses(Path(folder))
    lines = [f"{json.dumps(stage)}: {json.dumps(values)}" for stage, values in losses.items()]
    GOLDEN.write_text("{\n" + ",\n".join(lines) + "\n}\n")
