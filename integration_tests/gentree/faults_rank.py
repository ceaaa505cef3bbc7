"""One rank of a job in which one thing after the other goes wrong; it prints what it is told.

Each fault has a group of its own.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from datetime import timedelta

import torch
from torch import distributed as dist

TIMEOUT = timedelta(seconds=5)


def main(faults: list[str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gentree", timeout=timedelta(seconds=60))
    rank = dist.get_rank()
    tensor = torch.ones(100_000)
    for fault in faults:
        group = dist.new_group(timeout=timedelta(seconds=60))
        dist.all_reduce(tensor, group=group)
        dist.distributed_c10d._set_pg_timeout(TIMEOUT, group)
        began_s = time.monotonic()
        try:
            if rank == 2:
                spoil(fault, tensor, group)
            elif fault == "gathered":
                gather(tensor, group)
            else:
                dist.all_reduce(tensor, group=group)
        except RuntimeError as error:
            print(f"{fault}, after {time.monotonic() - began_s:.1f} s: {error}", flush=True)
    time.sleep(5 if rank == 0 else 1)  # the first rank has the store, which the others still ask
    os._exit(0)


def spoil(fault: str, tensor: torch.Tensor, group: dist.ProcessGroup | None) -> None:
    if fault == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault == "size":
        dist.all_reduce(tensor[:50_000], group=group)
    elif fault == "gathered":
        gather(tensor[:50_000], group)
    else:
        time.sleep(9)


def gather(tensor: torch.Tensor, group: dist.ProcessGroup | None) -> None:
    dist.all_gather([torch.empty_like(tensor) for _ in range(4)], tensor, group=group)


if __name__ == "__main__":
    main(sys.argv[1:])
