"""A distillation small enough for a test of a second: two blocks, batches of several buckets, held-out pictures."""

from types import ModuleType

import torch

from lens.config import LensConfig
from lens.sampler import Scheduler
from tests.train.small_training import BUCKETS, SHAPE, micro, weights
from train import configs, distill
from train.loop.checkpoints import Checkpoints
from train.loop.trainer import ALONE, Trainer
from train.objectives.distillation import Distillation

RELEASED = configs.load("released", "distill")


def recipe(**changes):
    module = ModuleType("recipe")
    module.__dict__.update(configs.fields(RELEASED))
    module.__dict__.update(MODEL=SHAPE, SLOTS=2, TAPS=(1, 2), HEAD_WIDTH=8, COMPUTE="float32", RECOMPUTE="none")
    module.__dict__.update(LR=1e-3, FAKE_LR=1e-3, NORMALISER_FLOOR=0.1, LOG_EVERY=1, SAVE_EVERY=100, WATCH_EVERY=1)
    module.__dict__.update(TEACHER_STEPS=2, GROUPS=1, GROUP=2, EMA=0.9, MU=0.5)
    module.__dict__.update(changes)
    return module


def batches(step, slots=2, group=ALONE):
    while True:
        for slot in range(group.rank, slots, group.world):
            yield micro(step, slot)
        step += 1


def method_on(folder, own, watched=False, group=ALONE, best=None):
    objective = Distillation(own, LensConfig(**SHAPE), Scheduler(), "float32", torch.float32)
    teacher = distill.teacher_of(own, group, folder)
    held_out = None
    if watched:
        held = [micro(99, 0)]
        held[0].captions = tuple(held[0].keys)
        held_out = distill.HeldOut(objective, teacher, held, decode)
    networks = distill.networks_of(own, group, folder)
    return distill.Distil(own, group, networks, teacher, objective, [b.name for b in BUCKETS], held_out, best)


def decode(latents, grid):
    """Two channels of the latents as colours, 2 x 2 pixels a token."""
    x = latents[..., :3].unflatten(1, grid).repeat_interleave(4, 1).repeat_interleave(4, 2)
    return ((x * 40 + 128).clamp(0, 255)).byte().numpy()


# ---- what the processes run


def a_cycle(group, folder, out, changes):
    """Four updates of fake score and heads, one of the student, IDA; then a check of what is held out, and a state.

    -> weights of all networks, losses by name, figures."""
    own = recipe(**changes)
    method = method_on(folder, own, True, group)
    trainer = Trainer(method.plan(1), method, Checkpoints(out / "checkpoints", group), out, group, configs.fields(own))
    data, losses = batches(0, own.SLOTS, group), []
    for _ in range(5):
        found = trainer.train_step(data)
        losses += [found[name] for name in sorted(found) if name.startswith("loss")]
    with trainer.averaged():
        figures = method.validate(5)
    trainer.save(last=True)
    return weights(trainer), losses, figures


def resumed(group, folder, out, changes):
    """The weights of the state that `a_cycle` left, loaded by these processes."""
    own = recipe(**changes)
    method = method_on(folder, own, True, group)
    trainer = Trainer(method.plan(1), method, Checkpoints(out / "checkpoints", group), out, group, configs.fields(own))
    trainer.resume(trainer.states.latest())
    return weights(trainer)
