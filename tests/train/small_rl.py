"""An RL run small enough for a test of a second: a two-block model, latents that are colours, a judge that likes bright pictures."""

from types import ModuleType

import numpy as np
import torch

from lens.config import LensConfig
from lens.sampler import Scheduler
from train import configs
from train.data.prompts import Prompt
from train.loop.checkpoints import Checkpoints
from train.loop.keys import keyed
from train.loop.lora import attach_lora, init_lora, keep_lora, lora_layers, lora_of
from train.loop.ranks import Ranks, wrap
from train.loop.trainer import Trainer
from train.networks.denoiser import Denoiser
from train.rewards.judge import Scores
from train.rl_method import OLD, Nft
from train.rollout import Rollouts, Texts

SHAPE = {
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 8,
    "out_channels": 2,
    "axes_dims_rope": (4, 6, 6),
    "enc_hidden_dim": 12,
    "selected_layer_index": (0, 1),
}
ALONE = Ranks(torch.device("cpu"))
PROMPTS = [
    Prompt(f"p{i}", "objects", "single_object", "x", (), f"prompt {i}", (f"rubric {i}",) * 10, ("full",))
    for i in range(5)
]


def recipe(**changes):
    module = ModuleType("recipe")
    module.__dict__.update(configs.fields(configs.load("mini", "rl")))
    module.__dict__.update(GROUPS=2, GROUP=4, SLOTS=4, SAMPLING_STEPS=4, TIMES=2, STEPS=40, DECAY=0, COSINE=False)
    module.__dict__.update(
        LORA="r=2,alpha=4,targets=all",
        BASES=(64,),
        ASPECTS=("1:1", "1:2"),
        DIVERSITY_WEIGHT=0.0,
        NEUTRAL=(),
        LR=1e-2,
        STOP={},
    )
    module.__dict__.update(
        VALIDATE_EVERY=0, SAVE_EVERY=0, PROMPTS=("prompt 0",), SHEET={"steps": 2, "guidance": 1.0, "base": 64}
    )
    module.__dict__.update(changes)
    return module


def encode(prompt):
    return torch.randn(2 + len(prompt) % 3 + int(prompt[-1]), 2, 12, generator=keyed(1, prompt))


def decode(x, grid):
    """A pixel's colour is its token's first three channels."""
    colours = (x[:, :3].clamp(-2, 2) * 60 + 128).byte().numpy().reshape(*grid, 3)
    return colours.repeat(16, 0).repeat(16, 1)


class Bright:
    """Score: mean brightness. failing: of every so many pictures one fails."""

    def __init__(self, failing=0):
        self.failing, self.asked = failing, 0

    def score(self, prompts, rubrics, images):
        score = np.array([image.mean() / 255 for image in images], np.float32)
        valid = np.ones(len(images), bool)
        for i in range(len(images)):
            self.asked += 1
            if self.failing and self.asked % self.failing == 0:
                valid[i], score[i] = False, np.nan
        table = np.repeat(score[:, None], len(rubrics[0]), 1)
        return Scores(score, valid, table, [["" if v else "no answer"] for v in valid])


def model_of(settings, group=ALONE, old_moved=False):
    model = Denoiser(LensConfig(**SHAPE), torch.float32, settings.RECOMPUTE)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn(p.shape, generator=keyed(5, name)) * 0.15 + float(p.dim() == 1 and "norm" in name))
    attach_lora(model, lora_of(settings), summed=settings.SUMMED)
    init_lora(model, 1)
    for i, (_, layer) in enumerate(lora_layers(model)):
        for up in layer.up:
            with torch.no_grad():
                up.copy_(torch.randn(up.shape, generator=keyed(i, "up")) * 0.1)
    keep_lora(model, OLD)
    if old_moved:
        with torch.no_grad():
            for _, layer in lora_layers(model):
                for p in (*layer.sides(OLD)[0], *layer.sides(OLD)[1]):
                    p.mul_(-0.7)
    model.eval()
    model.batch_invariant = True
    return model, wrap(model, group)


def method_of(settings, group=ALONE, judge=None, **options):
    model, wrapped = model_of(settings, group, **options)
    rollouts = Rollouts(model, Scheduler(False, 1.6), settings.SAMPLING_STEPS, settings.SOLVER, "float32")
    return Nft(settings, wrapped, group, rollouts, Texts(encode), decode, judge or Bright(), PROMPTS, "all of it")


def trainer_of(out, settings, group=ALONE, **options):
    method = method_of(settings, group, **options)
    states = Checkpoints(out / "checkpoints", group)
    return Trainer(method.plan(), method, states, out, group)


def trained(trainer):
    """What trains and the old adapters, as NumPy."""
    return {n: v.numpy().copy() for n, v in trainer.tensors().items() if ".down" in n or ".up" in n or "ema" in n}


def weights_after(group, folder, steps, settings):
    """For tests of several processes."""
    trainer = trainer_of(folder / f"rank{group.rank}", recipe(**settings), group)
    batches = trainer.method.batches()
    found = [trainer.train_step(batches) for _ in range(steps)]
    return trained(trainer), [step["loss"] for step in found]
