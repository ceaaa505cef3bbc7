"""One rank that trains by each stage of DeepSpeed's ZeRO, and prints its losses.

It names no backend. Its first word is the network that its configuration has a block for, or
``none``; its second one the stages, such as ``0123``, and its third one how often each is run.
Without any it only initialises torch.distributed, before DeepSpeed reads the configuration that
further words name.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import deepspeed
import torch
from torch import distributed as dist


def main(topology: str, stages: str, times: str = "1") -> None:
    torch.set_num_threads(1)
    # Its shared-memory reduction would be compiled first.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not stages:
        deepspeed.init_distributed()
    for stage in map(int, stages):
        for run in range(int(times)):
            losses = train(configuration(stage, topology))
            if dist.get_rank() == 0:
                print(stage, run, *losses, flush=True)
    # One write, so that lines of several ranks do not mix.
    os.write(1, f"backend {dist.get_backend()}\n".encode())
    dist.barrier()
    dist.destroy_process_group()


def configuration(stage: int, topology: str) -> dict[str, Any]:
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 16,
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 20_000},
        "zero_allow_untested_optimizer": True,
    }
    if topology != "none":
        config["trimtab"] = {"gentree": {"topology": topology, "always": True}}
    return config


def train(config: dict[str, Any]) -> list[str]:
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Linear(32, 96), torch.nn.Tanh(), torch.nn.Linear(96, 96), torch.nn.Linear(96, 4)
    )
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    engine, *_ = deepspeed.initialize(model=net, optimizer=optimizer, config=config)
    generator = torch.Generator().manual_seed(dist.get_rank())
    weights = torch.randn(32, 4, generator=torch.Generator().manual_seed(99))
    losses = []
    for _ in range(6):
        given = torch.randn(16, 32, generator=generator)
        loss = torch.nn.functional.mse_loss(engine(given), given @ weights)
        engine.backward(loss)
        engine.step()
        shown = loss.detach().double()
        dist.all_reduce(shown)
        losses.append(f"{shown.item():.12g}")
    engine.destroy()
    return losses


if __name__ == "__main__":
    main(*sys.argv[1:4])
