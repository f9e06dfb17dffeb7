"""Many processes as one: who takes part, how the weights are laid over them, and the only place that communicates.

`torchrun --nproc-per-node 8 -m train pretrain ...` starts one process per GPU; without torchrun there is one process and
nothing is wrapped. The mesh is replicate x shard: parameters, gradients and optimiser state are sharded block by block
over `shard` ranks (FSDP2), normally those of a node, and replicated over the rest. One shard is plain data parallelism
(DDP). Masters are float32; where they are sharded, blocks are gathered in the compute dtype and gradients are summed in
float32. On CPUs the processes talk through gloo, on GPUs through NCCL.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from lens.formats.files import read_json
from lens.formats.names import released_names
from lens.formats.released import transformer_config
from lens.formats.safetensors import load_parameters
from lens.model import LensTransformer2DModel, init_parameter

from ..networks.denoiser import Denoiser
from .keys import keyed

T = TypeVar("T")


def device_of(name: str) -> torch.device:
    """ "cpu" or "cuda" -> the device; float32 GEMMs there are float32 ones (TF32 off). Errors: ValueError."""
    if name not in ("cpu", "cuda"):
        raise ValueError(f"--device: {name!r}, expected 'cpu' or 'cuda'")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device: 'cuda' was asked for, but torch finds no usable GPU; expected 'cpu' here")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    return torch.device(name)


def local_shard(tensor: Tensor) -> Tensor:
    """The part of a parameter, gradient or average that lies on this process; a view. All of it where nothing is sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@dataclass(frozen=True)
class Ranks:
    """This process among all. Every collective of the training is one of these methods; alone they return what they got."""

    device: torch.device
    rank: int = 0
    world: int = 1
    shard: int = 1  # ranks that hold one copy of the state together
    mesh: DeviceMesh | None = field(default=None, repr=False)
    writers: dist.ProcessGroup | None = field(default=None, repr=False)  # what the thread that saves talks through

    @property
    def main(self) -> bool:
        return self.rank == 0

    def sum(self, x: Tensor) -> Tensor:
        """The sum over all ranks, a new tensor."""
        return self._reduce(x, dist.ReduceOp.SUM, None)

    def highest(self, x: Tensor) -> Tensor:
        """The elementwise maximum over all ranks, a new tensor."""
        return self._reduce(x, dist.ReduceOp.MAX, None)

    def sum_of_shards(self, x: Tensor) -> Tensor:
        """The sum over the ranks that share one copy of the state."""
        if self.shard == 1:
            return x.clone()
        assert self.mesh is not None, "a mesh comes with several shards"
        return self._reduce(x, dist.ReduceOp.SUM, self.mesh.get_group("shard"))

    def _reduce(self, x: Tensor, op: Any, group: Any) -> Tensor:
        x = x.clone()
        if self.world > 1:
            dist.all_reduce(x, op, group)
        return x

    def gather(self, value: Any) -> list[Any]:
        """Every rank's small Python value, in order of ranks."""
        if self.world == 1:
            return [value]
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, value)
        return found

    def once_per_node(self, make: Callable[[], T]) -> T:
        """What the first process of this node made, a small Python value; every process calls it. `make` raises nothing."""
        if self.world == 1:
            return make()
        first = self.rank - int(os.environ["LOCAL_RANK"])
        found: T = self.gather(make() if self.rank == first else None)[first]
        return found

    def agree(self, what: str, value: Any) -> None:
        """RuntimeError on all ranks where they were given different values."""
        found = self.gather(value)
        if any(other != found[0] for other in found):
            raise RuntimeError(f"{what} differs between ranks: {found}")

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()


@contextmanager
def join(device: str = "cpu", shard: int | None = None, most: int = 8, minutes: float = 10) -> Iterator[Ranks]:
    """Join the processes that torchrun started, or be alone; leaves the group at the end.

    shard: ranks over which one copy of the state is laid; default: those of this node, at `most` so many. It must divide
    their number. Errors: ValueError for a `shard` that does not.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    shard = shard or min(most, int(os.environ.get("LOCAL_WORLD_SIZE", str(world))))
    if world % shard:
        raise ValueError(f"--shard: {shard} does not divide the {world} processes")
    chosen = device_of(device)
    if world == 1:
        yield Ranks(chosen)
        return
    if chosen.type == "cuda":
        chosen = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(chosen)
    # gloo beside NCCL: checkpoints are written from host memory
    backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(minutes=minutes))
    try:
        mesh = init_device_mesh(chosen.type, (world // shard, shard), mesh_dim_names=("replicate", "shard"))
        # a group of its own: two threads must not mix their collectives in one
        yield Ranks(chosen, dist.get_rank(), world, shard, mesh, dist.new_group(backend="gloo"))
    finally:
        dist.destroy_process_group()


# ------------------------------------------------------------------------------------------------ the model


def wrap(model: Denoiser, group: Ranks, reshard: bool = True) -> nn.Module:
    """The model as it is called: itself alone, DDP with one shard, else FSDP2 with every block a unit and the rest last.

    reshard: drop a block's gathered weights after its forward pass, as memory asks; False keeps them for the backward one.
    A model to be sharded may still be on the meta device: `materialise` it afterwards. DDP's must hold its weights.
    """
    if group.world == 1:
        return model
    if group.shard == 1:
        ids = [group.device.index] if group.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)
    assert group.mesh is not None, "a mesh comes with several processes"
    mesh = group.mesh if group.world > group.shard else group.mesh["shard"]
    # inputs are not cast: the time would lose digits; the model rounds what it reads itself
    policy = MixedPrecisionPolicy(
        param_dtype=model.compute if model.compute != torch.float32 else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    for block in model.layers():
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    fully_shard(
        model, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard
    )  # which gives its class to the model itself
    return model


def bare(model: nn.Module) -> Any:
    """The model inside `wrap`: a Denoiser, or what another stage trains."""
    return model.module if isinstance(model, DistributedDataParallel) else model


@contextmanager
def accumulating(model: nn.Module, last: bool) -> Iterator[None]:
    """A backward pass inside adds to the gradients; only the `last` of a step sums them over all ranks.

    Sharded gradients are summed within their shards every time, which keeps them sharded, and over replicas at the end.
    """
    if isinstance(model, DistributedDataParallel) and not last:
        with model.no_sync():
            yield
        return
    if isinstance(model, FSDPModule):
        model.set_is_last_backward(last)
        model.set_requires_all_reduce(last)
    yield


@torch.no_grad()
def place(parameter: Tensor, value: Tensor) -> None:
    """Copy a whole value that every rank holds into a parameter, or into this rank's shard of it. Communicates nothing."""
    if isinstance(parameter, DTensor):
        value = value.to(parameter.device, parameter.dtype)
        value = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None).to_local()
    local_shard(parameter).copy_(value)


def materialise(model: nn.Module, device: torch.device, seed: int) -> None:
    """Fresh weights for a model on the meta device: every parameter drawn from a key of its own, so that the weights are
    the same however they are sharded. One whole parameter at a time is held."""
    model.to_empty(device=device)
    for name, parameter in model.named_parameters():
        whole = torch.empty(parameter.shape)
        init_parameter(name, whole, keyed(seed, f"init {name}"))
        place(parameter, whole)


def load_released(model: LensTransformer2DModel, folder: Path, device: torch.device) -> None:
    """The weights of a `transformer/` folder in the released layout into a model on the meta device, sharded or not.

    Errors: `CheckpointError` for missing, extra or misshapen keys, ValueError where the folder's model has another shape.
    """
    found = transformer_config(read_json(folder / "config.json"), str(folder / "config.json"))
    ours, theirs = vars(model.config), vars(found)
    if other := [f"{name} {theirs[name]}, expected {ours[name]}" for name in ours if ours[name] != theirs[name]]:
        raise ValueError(f"--init {folder}: its MMDiT has {'; '.join(other)}")
    model.to_empty(device=device)
    with torch.device("meta"):  # as it is without adapters around its layers
        plain = LensTransformer2DModel(model.config)
    parameters = {name.replace(".base.", "."): p for name, p in model.named_parameters()}
    load_parameters(
        plain,
        folder,
        released_names,
        store=lambda _module, name, value, _parameter: place(parameters[name], value),
    )


# ------------------------------------------------------------------------------------------------ gradients


@torch.no_grad()
def norm(tensors: Sequence[Tensor], group: Ranks) -> Tensor:
    """The Euclidean norm of all tensors together, float64 on the device, whether they are whole or sharded."""
    parts = [local_shard(t) for t in tensors]
    sharded = [isinstance(t, DTensor) for t in tensors]
    squares = [torch.zeros((), dtype=torch.float64, device=group.device) for _ in range(2)]
    for kind in (False, True):
        mine = [p for p, own in zip(parts, sharded) if own is kind and p.numel()]
        if mine:
            norms = torch.stack(torch._foreach_norm(mine, 2, dtype=torch.float32))
            squares[kind] = norms.double().pow(2).sum()
    return (squares[False] + group.sum_of_shards(squares[True])).sqrt()


@torch.no_grad()
def scale_(tensors: Sequence[Tensor], factor: Tensor) -> None:
    """Multiply all by one number, in place."""
    mine = [p for p in map(local_shard, tensors) if p.numel()]
    torch._foreach_mul_(mine, factor.to(mine[0].dtype))
