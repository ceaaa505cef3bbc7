"""Data-parallel training on the CPU whose gradients are summed by a plan for the network.

TRIMTAB_HOST=localhost TRIMTAB_GENTREE_TOPOLOGY=examples/gentree/cluster.yaml \
  torchrun --nproc-per-node 4 examples/gentree/train.py
"""

from __future__ import annotations

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

STEPS = 20


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    # Before the group: the first optimizer imports modules whose defaults would hold the group.
    net = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.Tanh(), torch.nn.Linear(64, 1))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    distributed.init_process_group("gentree")
    train(net, optimizer)
    distributed.destroy_process_group()


def train(net: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    rank = distributed.get_rank()
    parallel = DistributedDataParallel(net)
    generator = torch.Generator().manual_seed(rank)
    for step in range(STEPS):
        given = torch.randn(64, 32, generator=generator)
        wanted = given.sum(dim=1, keepdim=True).sin()
        loss = torch.nn.functional.mse_loss(parallel(given), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        distributed.all_reduce(loss.detach_(), distributed.ReduceOp.AVG)
        if rank == 0:
            print(f"step {step} loss {loss.item():.5f}", flush=True)


if __name__ == "__main__":
    main()
