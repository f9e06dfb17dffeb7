"""A training small enough for a test of a second: a two-block model, batches of several buckets made from keys."""

import dataclasses
from types import ModuleType

import numpy as np
import torch

from lens.config import LensConfig
from lens.formats.released import save_transformer
from train import configs
from train import pretrain_on_shards as flow
from train.data.buckets import Bucket
from train.loop import ranks
from train.loop.checkpoints import Checkpoints, read_state
from train.loop.clock import Clock, Interrupted
from train.loop.keys import keyed
from train.loop.trainer import Trainer
from train.networks.denoiser import Denoiser

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
BUCKETS = (Bucket(64, "1:1"), Bucket(64, "1:2"), Bucket(96, "1:1"))
SIZES = {BUCKETS[0]: 3, BUCKETS[1]: 2, BUCKETS[2]: 1}  # pictures of a micro-batch


@dataclasses.dataclass
class Micro:
    step: int
    slot: int
    bucket: Bucket
    keys: tuple
    lengths: list
    latents: torch.Tensor
    features: torch.Tensor
    skipped: tuple = ()

    @property
    def encoded(self):
        return self.latents, self.features


def recipe(**changes):
    source = configs.load("mini/on_shards", "pretrain")
    module = ModuleType("recipe")
    module.__dict__.update(configs.fields(source))
    module.__dict__.update(MODEL=SHAPE, SLOTS=8, STEPS=100, WARMUP=2, DECAY=0, LR=1e-2, CLIP=0.5, LOG_EVERY=2)
    module.__dict__.update(SAVE_EVERY=1_000, KEEP_LAST=2, KEEP_EVERY=0, EMA=0.9)
    module.__dict__.update(changes)
    return module


def micro(step, slot):
    """The batch of a slot: its bucket, its texts (some dropped), its numbers follow from (step, slot)."""
    generator = keyed(11, "micro", step, slot)
    bucket = BUCKETS[(step + slot) % 3]
    count = SIZES[bucket]
    lengths = [0 if (slot + i) % 4 == 0 else 1 + (step + slot + i) % 5 for i in range(count)]
    latents = torch.randn(count, bucket.tokens, SHAPE["in_channels"], generator=generator)
    features = torch.randn(sum(lengths), 2, SHAPE["enc_hidden_dim"], generator=generator)
    keys = tuple(f"{step}-{slot}-{i}" for i in range(count))
    return Micro(step, slot, bucket, keys, lengths, latents, features)


def batches(start, rank, world, slots=8, spoil=lambda batch: None):
    step = start
    while True:
        for slot in range(rank, slots, world):
            batch = micro(step, slot)
            spoil(batch)
            yield batch
        step += 1


def model_on(group, settings):
    """Wrapped; no weight is zero, so that every part of it has a gradient."""
    with torch.device("meta"):
        model = Denoiser(LensConfig(**settings.MODEL), flow.DTYPES[settings.COMPUTE], settings.RECOMPUTE).train()
    wrapped = ranks.wrap(model, group, settings.RESHARD) if group.shard > 1 else None
    ranks.materialise(model, group.device, settings.SEED)
    for name, parameter in model.named_parameters():
        whole = torch.randn(parameter.shape, generator=keyed(5, name)) * 0.1
        ranks.place(parameter, whole + float(parameter.dim() == 1 and "norm" in name))
    return wrapped if wrapped is not None else ranks.wrap(model, group)


def trainer_on(group, out, init=None, parts=(), peak=None, **changes):
    """init: the folder of a checkpoint to start from, by the stage's own way."""
    settings = recipe(**changes)
    objective = flow.FlowMatching(settings, LensConfig(**settings.MODEL))
    out.mkdir(parents=True, exist_ok=True)
    model = model_on(group, settings) if init is None else flow.build(settings, group, init)
    states = Checkpoints(out / "checkpoints", group, settings.KEEP_LAST, settings.KEEP_EVERY)
    method = flow.OnShards(settings, model, objective, BUCKETS, **dict(parts))
    return Trainer(method.plan("pretrain"), method, states, out, group, configs.fields(settings), peak)


def the_network(trainer):
    (network,) = trainer.networks.values()
    return network


def checkpoint_in(folder):
    """A model in the released layout, none of whose weights is zero."""
    model = model_on(ranks.Ranks(torch.device("cpu")), recipe())
    save_transformer(model, folder / "transformer", torch.float32)
    return folder / "transformer"


def whole(tensor):
    full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    full = full.view(torch.uint16) if full.dtype == torch.bfloat16 else full  # its bits, for NumPy lacks it
    return full.detach().numpy().copy()


def weights(trainer):
    return {name: whole(value) for name, value in trainer.tensors().items()}


def gradients_of_a_step(trainer, group):
    """The gradient as the optimiser would see it without a clip, by name; nothing is changed."""
    caught = {}

    def catch(_gradients, _learners, found):
        parameters = the_network(trainer).parameters
        names = [n for n, p in parameters.items() if p.grad is not None]
        caught.update({n: whole(parameters[n].grad) / found["weight"] for n in names})

    trainer._apply = catch
    found = trainer.train_step(batches(0, group.rank, group.world))
    return caught, found["loss"], found["grad_norm"]


# ---- what the processes run


def three_gradients(group, out, reductions):
    return [
        gradients_of_a_step(trainer_on(group, out / f"{r}-{group.rank}", LOSS_REDUCTION=r), group) for r in reductions
    ]


def gradients_and_norms(group, out, reductions):
    return three_gradients(group, out, reductions), clip_norms(group, out / "norms")


def gradient_and_steps(group, out, changes):
    """The gradient of a step; what four steps make of a state, and their losses."""
    gradient, _, _ = gradients_of_a_step(trainer_on(group, out / f"one-{group.rank}", **changes), group)
    return gradient, *steps_and_save(group, out, 4, None, changes)


def resume_both(group, back, first):
    """What is in the state that came back; the losses of two steps from the first one."""
    return resume_and_go_on(group, back, 0)[0], resume_and_go_on(group, first, 2)[2]


def steps_and_save(group, out, count, init=None, changes=None):
    """Some steps, saved; what the state holds, and the losses."""
    trainer, data = trainer_on(group, out, init, **(changes or {})), batches(0, group.rank, group.world)
    losses = [trainer.train_step(data)["loss"] for _ in range(count)]
    trainer.save(last=True)
    return weights(trainer), losses


def adapters_both_ways(group, out, init, changes, state):
    """Some steps of its own, saved; and a step after another's `state`."""
    return steps_and_save(group, out, 4, init, changes), resume_and_go_on(group, state, 1, None, init, changes)


def resume_and_go_on(group, out, count, again=None, init=None, changes=None):
    """A saved state, and after `count` more steps."""
    trainer = trainer_on(group, out, init, **(changes or {}))
    for p in ranks.bare(the_network(trainer).module).parameters():
        torch.nn.init.zeros_(p.data)
    state = trainer.resume(trainer.states.latest())
    before = weights(trainer)
    data = batches(trainer.step, group.rank, group.world)
    losses = [trainer.train_step(data)["loss"] for _ in range(count)]
    if again is not None:
        trainer.states.folder = again / "checkpoints"
        trainer.saved = None
        trainer.save(lambda step: state["data"], last=True)
    return before, weights(trainer), losses


def clip_norms(group, out):
    """The norm of random gradients by `ranks.norm`, and of the same, whole, by torch."""
    trainer = trainer_on(group, out / str(group.rank))
    found = []
    for name, p in the_network(trainer).parameters.items():
        p.grad = torch.zeros_like(p)
        ranks.place(p.grad, torch.randn(p.shape, generator=keyed(9, name)))
        found.append(p.grad)
    mine = ranks.norm(found, group).item()
    full = torch.nn.utils.get_total_norm([torch.from_numpy(whole(g)).double() for g in found]).item()
    return mine, full


def ending(batch, step, slot):
    """What a batch is spoiled with whose shard is gone."""
    if (batch.step, batch.slot) == (step, slot):
        raise Interrupted("a.tar: No such file or directory, asked for member b")


def data_ends_for_one(group, out):
    """The second rank's in the middle of the third step -> what each says, and the weights that all have."""
    trainer = trainer_on(group, out)
    data = batches(0, group.rank, group.world, spoil=lambda batch: ending(batch, 2, 5))
    try:
        trainer.run(data, Clock(None))
    except Interrupted as error:
        return str(error), weights(trainer)


def hang_in_the_second_save(group, out, mark):
    """Killed by the test while a state is half written."""
    import os
    import time

    trainer, data = trainer_on(group, out), batches(0, 0, 1)
    trainer.train_step(data)
    trainer.save(last=True)
    trainer.train_step(data)
    flush = os.fsync

    def stuck(handle):
        flush(handle)
        mark.touch()
        time.sleep(600)

    os.fsync = stuck
    trainer.save(last=True)


def train_until_told(group, out, kept):
    """``kept``: signals that the process was started without."""
    import signal

    signal.pthread_sigmask(signal.SIG_BLOCK, kept)
    trainer = trainer_on(group, out, STEPS=100_000)
    trainer.run(batches(0, group.rank, group.world), Clock(None))
    return trainer.step


def state_of(out):
    name = (out / "checkpoints" / "latest").read_text().strip()
    return read_state(out / "checkpoints" / name)


def distance(a, b):
    """Largest relative difference of a tensor, by its norm."""
    assert a.keys() == b.keys()
    return max(float(np.linalg.norm(a[n] - b[n]) / (np.linalg.norm(b[n]) + 1e-30)) for n in a)


def same(a, b):
    assert a.keys() == b.keys()
    return [name for name in a if not np.array_equal(a[name], b[name])]
