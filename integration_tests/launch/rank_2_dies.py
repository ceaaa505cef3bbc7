"""Four ranks reduce over gloo; then rank 2 is killed, and the others wait for it in a reduction."""

import os
import signal

import torch
from torch import distributed

distributed.init_process_group("gloo")
rank = distributed.get_rank()
store = distributed.distributed_c10d._get_default_store()
for step in range(3):
    total = torch.tensor([float(rank)])
    distributed.all_reduce(total)
    if rank == 0:
        print(f"step {step} sum {total.item():g}", flush=True)
        store.set(f"shown {step}", "")
    if rank == 2 and step == 1:
        store.wait(["shown 1"])  # or the others may not have got this step's sum
        os.kill(os.getpid(), signal.SIGKILL)
