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
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    net = DistributedDataParallel(model())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    for step in range(steps):
        contexts, following = batch(rank, step)
        loss = cross_entropy(net(contexts), following)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        distributed.all_reduce(loss.detach_(), distributed.ReduceOp.AVG)
        if rank == 0:
            print(f"step {step} loss {loss.item():.5f}", flush=True)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
