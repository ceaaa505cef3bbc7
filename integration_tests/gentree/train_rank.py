"""One rank that trains a small network over several groups in turn, and prints its losses."""

from __future__ import annotations

from typing import Any

import torch
from torch import distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel


def main() -> None:
    torch.set_num_threads(1)
    torch.optim.SGD(network().parameters(), lr=0.1)  # imports what would hold a group otherwise
    dist.init_process_group("gloo")
    groups = {
        "gloo": dist.group.WORLD,
        "gentree": dist.new_group(backend="gentree"),
        "again": dist.new_group(backend="gentree"),
    }
    for kind in ("sgd", "hook", "zero1", "fsdp2"):
        for name, group in groups.items():
            losses = train(kind, group)
            if dist.get_rank() == 0:
                print(kind, name, *(f"{loss:.12g}" for loss in losses), flush=True)
    dist.destroy_process_group()


def network() -> torch.nn.Module:
    return torch.nn.Sequential(
        torch.nn.Linear(64, 256),
        torch.nn.Tanh(),
        torch.nn.Linear(256, 256),
        torch.nn.Tanh(),
        torch.nn.Linear(256, 8),
    )


def train(kind: str, group: Any) -> list[float]:
    torch.manual_seed(0)
    net = network()
    parallel = spread(kind, net, group)
    optimizer: torch.optim.Optimizer
    if kind == "zero1":
        optimizer = ZeroRedundancyOptimizer(
            net.parameters(), torch.optim.Adam, process_group=group, lr=1e-2
        )
    else:
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    generator = torch.Generator().manual_seed(dist.get_rank())
    weights = torch.randn(64, 8, generator=torch.Generator().manual_seed(99))
    losses = []
    for _ in range(12):
        given = torch.randn(32, 64, generator=generator)
        loss = torch.nn.functional.mse_loss(parallel(given), given @ weights)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        shown = loss.detach().double()
        dist.all_reduce(shown, dist.ReduceOp.AVG, group=group)
        losses.append(shown.item())
    return losses


def spread(kind: str, net: torch.nn.Module, group: Any) -> torch.nn.Module:
    """The network as the ranks share it."""
    if kind == "fsdp2":
        mesh = DeviceMesh.from_group(group, "cpu")
        for layer in net:
            if list(layer.parameters()):
                fully_shard(layer, mesh=mesh)
        return fully_shard(net, mesh=mesh)
    parallel = DistributedDataParallel(net, process_group=group, bucket_cap_mb=0.2)
    if kind == "hook":
        parallel.register_comm_hook(group, allreduce_hook)
    return parallel


if __name__ == "__main__":
    main()
