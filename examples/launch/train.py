"""Data-parallel training on the CPU, for any launcher that sets RANK and WORLD_SIZE.

trimtab launch -- torchrun --nproc-per-node 4 examples/launch/train.py
"""

from __future__ import annotations

import argparse

import torch
from text import batch, model
from torch import distributed
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--local_rank", type=int, help="given by some launchers; not needed here")
    steps = parser.parse_args().steps

    torch.set_num_threads(1)
    # Before the group: the first optimizer imports modules whose defaults would hold the group.
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    distributed.init_process_group("gloo")
    train(net, optimizer, steps)
    # With no one holding the group, this joins gloo's threads: one that still frees a tensor while
    # Python ends aborts the process.
    distributed.destroy_process_group()


def train(net: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    rank = distributed.get_rank()
    parallel = DistributedDataParallel(net)
    for step in range(steps):
        contexts, following = batch(rank, step)
        loss = cross_entropy(parallel(contexts), following)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        distributed.all_reduce(loss.detach_(), distributed.ReduceOp.AVG)
        if rank == 0:
            print(f"step {step} loss {loss.item():.5f}", flush=True)


if __name__ == "__main__":
    main()
