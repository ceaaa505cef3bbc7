"""One rank of a job that strains its groups; rank 0 prints what it has seen to be right.

With the word ``storeless``, rank 0 goes in mid-collective and takes the job's store with it.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel


def main(words: Sequence[str]) -> None:
    torch.set_num_threads(1)
    torch.optim.SGD(network().parameters(), lr=0.1)  # imports what would hold a group otherwise
    dist.init_process_group("gentree", timeout=timedelta(seconds=60))
    rank, size = dist.get_rank(), dist.get_world_size()
    if "storeless" in words:
        storeless(rank)
    for check in (two_threads, forked, many_at_once, compressed, replicated_and_sharded, destroyed):
        if not words or check.__name__ in words:
            check(rank, size)
            dist.barrier()
            if rank == 0:
                print(f"right: {check.__name__}", flush=True)
    dist.destroy_process_group()


def storeless(rank: int) -> None:
    tensor = torch.ones(100_000)
    dist.all_reduce(tensor)
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=5), dist.group.WORLD)
    began_s = time.monotonic()
    works = []
    try:
        for turn in range(100):
            if rank == 0 and turn == 20:
                os.kill(os.getpid(), signal.SIGKILL)
            works.append(dist.all_reduce(tensor.fill_(1), async_op=True))
            if turn % 5 == 4:
                works.pop(0).wait()
    except RuntimeError as error:
        print(f"after {time.monotonic() - began_s:.1f} s: {error}", flush=True)
    for work in works:
        try:
            work.wait()
        except RuntimeError:
            continue
    dist.destroy_process_group()
    print("destroyed", flush=True)
    os._exit(0)


def two_threads(rank: int, size: int) -> None:
    """Each of two threads has a group of its own; their calls meet in no order."""
    groups = [dist.new_group(), dist.new_group()]
    wrong: list[str] = []

    def call(which: int) -> None:
        for turn in range(40):
            tensor = torch.full((1000 + 500 * which,), rank + 10.0 * turn + which)
            work = dist.all_reduce(tensor, group=groups[which], async_op=turn % 4 == 3)
            if work is not None:
                work.wait()
            total = size * (10.0 * turn + which) + size * (size - 1) / 2
            if not tensor.eq(total).all():
                wrong.append(f"{which} {turn}: {tensor[0]}, not {total}")

    threads = [threading.Thread(target=call, args=(which,)) for which in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, wrong
    for group in groups:
        dist.destroy_process_group(group)


def forked(rank: int, size: int) -> None:
    """A child that leaves the groups alone, as a loader of data does, disturbs no call."""
    many = [torch.full((100_000,), rank + float(index)) for index in range(8)]
    works = [dist.all_reduce(tensor, async_op=True) for tensor in many]
    children = []
    for _ in range(2):
        child = os.fork()
        if child == 0:
            os._exit(7 if torch.ones(3).sum().item() == 3 else 1)
        children.append(child)
    for index, work in enumerate(works):
        work.wait()
        assert many[index].eq(size * index + size * (size - 1) / 2).all()
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [7, 7]
    after = torch.full((9,), float(rank))
    dist.all_reduce(after)
    assert after.tolist() == [size * (size - 1) / 2] * 9


def many_at_once(rank: int, size: int) -> None:
    lengths = [(index * index * 7919) % 20_011 for index in range(100)]
    many = [torch.full((n,), rank + float(i)) for i, n in enumerate(lengths)]
    works = [dist.all_reduce(tensor, async_op=True) for tensor in many]
    for index in reversed(range(100)):
        works[index].wait()
        assert many[index].eq(size * index + size * (size - 1) / 2).all(), index


def compressed(rank: int, size: int) -> None:
    """Gradients in half precision, through a hook that goes on with the future of a call."""
    losses = []
    for backend in ("gloo", "gentree", "gentree"):
        group = dist.new_group(backend=backend)
        torch.manual_seed(0)
        parallel = DistributedDataParallel(network(), process_group=group, bucket_cap_mb=0.1)
        parallel.register_comm_hook(group, fp16_compress_hook)
        losses.append(trained(parallel, rank))
    alike(losses, rel=1e-3)


def replicated_and_sharded(rank: int, size: int) -> None:
    """HSDP: shards within a pair of ranks, of which there are two."""
    losses = []
    for backend in ("gloo", "gentree", "gentree"):
        rows = [dist.new_group([r, r + 1], backend=backend) for r in (0, 2)]
        columns = [dist.new_group([r, r + 2], backend=backend) for r in (0, 1)]
        own: list[Any] = [columns[rank % 2], rows[rank // 2]]
        mesh = DeviceMesh.from_group(
            own, "cpu", mesh=[[0, 1], [2, 3]], mesh_dim_names=("replicate", "shard")
        )
        torch.manual_seed(0)
        net = network()
        for layer in net:
            if list(layer.parameters()):
                fully_shard(layer, mesh=mesh)
        losses.append(trained(fully_shard(net, mesh=mesh), rank))
    alike(losses, rel=1e-6)


def alike(losses: list[list[float]], *, rel: float) -> None:
    gloo, ours, again = losses
    assert gloo[-1] < 0.9 * gloo[0], gloo
    assert all(abs(a - b) <= rel * b for a, b in zip(ours, gloo, strict=True)), losses
    assert ours == again, losses


def network() -> torch.nn.Sequential:
    return torch.nn.Sequential(
        torch.nn.Linear(64, 128), torch.nn.Tanh(), torch.nn.Linear(128, 64), torch.nn.Linear(64, 8)
    )


def trained(parallel: torch.nn.Module, rank: int) -> list[float]:
    """The losses of some steps, averaged over all ranks by the job's own group."""
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.05, momentum=0.9)
    generator = torch.Generator().manual_seed(rank)
    weights = torch.randn(64, 8, generator=torch.Generator().manual_seed(99))
    losses = []
    for _ in range(8):
        given = torch.randn(32, 64, generator=generator)
        loss = torch.nn.functional.mse_loss(parallel(given), given @ weights)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        shown = loss.detach().double()
        dist.all_reduce(shown, dist.ReduceOp.AVG)
        losses.append(shown.item())
    return losses


def destroyed(rank: int, size: int) -> None:
    """The end of a group comes behind the calls that were made before it."""
    group = dist.new_group()
    many = [torch.full((300_000,), rank + float(index)) for index in range(12)]
    works = [dist.all_reduce(tensor, group=group, async_op=True) for tensor in many]
    dist.destroy_process_group(group)
    assert all(work.is_completed() for work in works)
    for index, work in enumerate(works):
        work.wait()
        assert many[index].eq(size * index + size * (size - 1) / 2).all(), index


if __name__ == "__main__":
    main(sys.argv[1:])
