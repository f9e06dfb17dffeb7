"""Several processes that talk through gloo, as torchrun would start them; forked from one that has imported torch."""

import contextlib
import multiprocessing
import os
import socket

from train.loop.ranks import join

_CONTEXT = multiprocessing.get_context("forkserver")
# torch._dynamo: what every process with an optimiser loads, in half a second
_CONTEXT.set_forkserver_preload(["torch._dynamo", "train.pretrain_on_shards", "tests.train.processes"])


def _free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def _work(rank, world, port, shard, function, arguments, results):
    import torch

    torch.set_num_threads(1)
    if world > 1:
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in names.items()}, MASTER_ADDR="127.0.0.1")
    with join("cpu", shard) as group:
        found = function(group, *arguments)
    results.put((rank, found))


def start(world, function, *arguments, shard=None):
    """Start `function(group, *arguments)` on every rank; returns the processes and where their results come."""
    results, port = _CONTEXT.Queue(), _free_port()
    processes = [
        _CONTEXT.Process(target=_work, args=(rank, world, port, shard, function, arguments, results), daemon=True)
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    return processes, results


def run(world, function, *arguments, shard=None, seconds=600):
    """`function(group, *arguments)` on every rank -> what each returned (numbers, strings, NumPy arrays), by rank."""
    processes, results = start(world, function, *arguments, shard=shard)
    found = {}
    try:
        for _ in processes:
            while True:
                with contextlib.suppress(Exception):
                    rank, value = results.get(timeout=0.2)
                    found[rank] = value
                    break
                failed = [p for p in processes if p.exitcode not in (None, 0)]
                assert not failed, f"a process ended with {failed[0].exitcode}"
                seconds -= 0.2
                assert seconds > 0, "the processes did not end"
    finally:
        for process in processes:
            if process.is_alive() and len(found) < world:
                process.kill()
            process.join()
    return [found[rank] for rank in range(world)]
