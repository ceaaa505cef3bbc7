"""The same training with DeepSpeed, whose configuration also switches trimtab's plugins on.

cd examples/launch; export DS_ACCELERATOR=cpu
trimtab launch -- deepspeed --num_gpus 4 train_deepspeed.py --deepspeed_config deepspeed.json
"""

from __future__ import annotations

import argparse

import deepspeed
import torch
from text import batch, model
from torch.distributed import get_backend
from torch.nn.functional import cross_entropy


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--local_rank", type=int)
    arguments = deepspeed.add_config_arguments(parser).parse_args()

    torch.set_num_threads(1)
    # On a CPU DeepSpeed would compile an operator at its start that only inference uses.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    net = model()
    engine, *_ = deepspeed.initialize(arguments, net, model_parameters=net.parameters())
    rank = deepspeed.comm.get_rank()
    for step in range(arguments.steps):
        contexts, following = batch(rank, step)
        loss = cross_entropy(engine(contexts), following)
        engine.backward(loss)
        engine.step()
        deepspeed.comm.all_reduce(loss.detach_(), deepspeed.comm.ReduceOp.AVG)
        if rank == 0:
            print(f"step {step} loss {loss.item():.5f}", flush=True)
    # Gloo's threads free the last tensors meanwhile: one that does so while Python ends aborts the
    # process, and DeepSpeed keeps the groups, so that destroying them would not join the threads.
    if get_backend() == "gloo":
        deepspeed.comm.monitored_barrier()
    deepspeed.comm.destroy_process_group()


if __name__ == "__main__":
    main()
