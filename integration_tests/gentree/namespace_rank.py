"""One rank on a host of its own: gloo and plans do the same AllReduce; then one rank is killed.

Its words are the hosts in the order of the ranks.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from datetime import timedelta

import torch
from torch import distributed as dist

KILLED = 5


def main(hosts: list[str]) -> None:
    torch.set_num_threads(1)
    rank, size = hosts.index(socket.gethostname()), len(hosts)
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://{hosts[0]}:29500",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=60),
    )
    told = dist.PrefixStore("told", dist.distributed_c10d._get_default_store())
    planned = dist.new_group(backend="gentree", timeout=timedelta(seconds=15))
    for length in (1, 5, 16_384, 250_001):
        compare(rank, size, length, planned)
    if rank == KILLED:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        dist.all_reduce(torch.ones(100_000), group=planned)
    except RuntimeError as error:
        print(f"told: {error}", flush=True)
    told.set(f"told/{rank}", "")
    if rank == 0:  # the first rank has the store, which the others still ask
        told.wait([f"told/{other}" for other in range(size) if other != KILLED])
    os._exit(0)


def compare(rank: int, size: int, length: int, planned: dist.ProcessGroup) -> None:
    whole = torch.arange(length) % 251 + rank
    for group in (dist.group.WORLD, planned):
        ours = whole.clone()
        dist.all_reduce(ours, group=group)
        assert torch.equal(ours, size * (whole - rank) + size * (size - 1) // 2)
    values = torch.randn(length, generator=torch.Generator().manual_seed(rank))
    by_gloo, by_plan = values.clone(), values.clone()
    dist.all_reduce(by_gloo)
    dist.all_reduce(by_plan, group=planned)
    torch.testing.assert_close(by_plan, by_gloo, rtol=1e-5, atol=1e-5)
    everywhere = [torch.empty(length) for _ in range(size)]
    dist.all_gather(everywhere, by_plan)
    assert all(torch.equal(other, by_plan) for other in everywhere)
    print(f"right: {length}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
