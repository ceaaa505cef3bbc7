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

from trimtab.core.collectives import Layout, Schedule
from trimtab.core.collectives.combine import ring

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
        except (RuntimeError, MemoryError) as error:
            print(f"{fault}, after {time.monotonic() - began_s:.1f} s: {error}", flush=True)
            goes_on_failing(str(error), tensor, group)
    leave(rank)


def leave(rank: int) -> None:
    """Ends once all that live are told: till then they ask each other and the first one's store."""
    store = dist.PrefixStore("told", dist.distributed_c10d._get_default_store())
    for step in ("told", "leaving"):
        store.set(f"{step} {rank}", "")
        if step == "told" or rank == 0:
            store.wait([f"{step} {other}" for other in (0, 1, 3)])
    os._exit(0)


def spoil(fault: str, tensor: torch.Tensor, group: dist.ProcessGroup | None) -> None:
    if fault == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault == "size":
        dist.all_reduce(tensor[:50_000], group=group)
    elif fault == "gathered":
        gather(tensor[:50_000], group)
    elif fault == "dtype":
        dist.all_reduce(tensor.int(), group=group)
    elif fault == "operation":
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=group)
    elif fault == "plan":
        group._plans.schedule = around
        group._planned.cache_clear()
        dist.all_reduce(tensor, group=group)
    elif fault == "memory":
        group._runner.run = without_memory
        dist.all_reduce(tensor, group=group)
    else:
        time.sleep(9)


def goes_on_failing(told: str, tensor: torch.Tensor, group: dist.ProcessGroup | None) -> None:
    again = ""
    try:
        dist.all_reduce(tensor, group=group)
    except RuntimeError as error:
        again = str(error)
    assert told in again, again


def around(payload_bytes: int, **more: object) -> Schedule:
    return Schedule.of(4, [ring([Layout.whole(rank) for rank in range(4)])[0]])


def without_memory(*arguments: object, **more: object) -> None:
    raise MemoryError("400000 bytes are not there")


def gather(tensor: torch.Tensor, group: dist.ProcessGroup | None) -> None:
    dist.all_gather([torch.empty_like(tensor) for _ in range(4)], tensor, group=group)


if __name__ == "__main__":
    main(sys.argv[1:])
