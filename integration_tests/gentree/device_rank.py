"""One rank that runs plans as on a device, over gloo, and compares them with `PlanRunner`'s."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta
from itertools import count
from typing import Any

import torch
import torch.distributed as dist

from trimtab.core.collectives import Layout, Schedule
from trimtab.core.collectives.combine import exchange, folded, ring, staged
from trimtab.hosts.torch.device_runner import DevicePlanRunner, device_sum
from trimtab.hosts.torch.plan_runner import PlannedRank, PlanRunner, adding

HOST = torch.device("cpu")
LIMIT = timedelta(seconds=60)
SUM = adding(torch.Tensor.add_, fused=True)
SIZES = [(torch.float32, 1), (torch.float32, 1001), (torch.float32, 70_003)]
SIZES += [(torch.bfloat16, 999), (torch.float16, 4096), (torch.float64, 77), (torch.int32, 64)]


def main() -> None:
    torch.set_num_threads(1)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, size, rank == 0, LIMIT)
    groups = [
        dist.ProcessGroupGloo(dist.PrefixStore(name, store), rank, size, LIMIT)
        for name in ("device", "host")
    ]
    device, host = DevicePlanRunner(groups[0], HOST), PlanRunner(groups[1], LIMIT)
    parties = [Layout.whole(r) for r in range(size)]
    made = {
        "staged": staged(parties, [2, (size + 1) // 2])[0],
        "folded": folded(parties, [1], [size - 1])[0],
        "ring": [ring(parties)[0]],
        "uneven": [exchange(parties, [float(2 * r + 1) for r in range(size)])[0]],
    }
    calls = count(1)
    for name, steps in made.items():
        for chunks in (1, 3):
            planned = PlannedRank(Schedule.of(size, steps, chunks), rank)
            for dtype, length in SIZES:
                compare(device, host, planned, dtype, length, next(calls))
        told(rank, groups[1], name)
    phases(device, host, PlannedRank(Schedule.of(size, made["ring"]), rank), calls)
    told(rank, groups[1], "phases")


def told(rank: int, group: Any, name: str) -> None:
    group.barrier().wait()
    if rank == 0:
        print(f"right: {name}", flush=True)


def values(rank: int, dtype: torch.dtype, length: int) -> torch.Tensor:
    drawn = 9 * torch.randn(length, generator=torch.Generator().manual_seed(rank))
    return drawn.to(dtype)


def compare(
    device: DevicePlanRunner,
    host: PlanRunner,
    planned: PlannedRank,
    dtype: torch.dtype,
    length: int,
    call: int,
) -> None:
    ours = values(planned.rank, dtype, length)
    theirs, chunks = ours.clone(), planned.schedule.chunks
    work = device.submit(
        [ours],
        [ours],
        lambda: device.run(planned.turns, ours, device_sum(), call=call, chunks=chunks),
    )
    assert work.wait()
    host.run(planned.turns, theirs, SUM, call=call, chunks=chunks)
    assert torch.equal(ours, theirs), (dtype, length)
    every = [values(r, dtype, length).double() for r in range(planned.schedule.ranks)]
    near(ours, every)


def near(ours: torch.Tensor, every: Sequence[torch.Tensor]) -> None:
    eps = torch.finfo(ours.dtype).eps if ours.is_floating_point() else 0
    bound = torch.stack([one.abs() for one in every]).sum(0) * eps * len(every)
    wrong = (ours.double() - torch.stack(list(every)).sum(0)).abs()
    assert (wrong <= bound).all(), (ours.dtype, wrong.max())


def phases(device: DevicePlanRunner, host: PlanRunner, planned: PlannedRank, calls: Any) -> None:
    """The reduce-scatter alone, then the all-gather alone."""
    assert planned.places is not None
    size, length = planned.schedule.ranks, 500
    ours = values(planned.rank, torch.float32, size * length)
    theirs, call = ours.clone(), next(calls)
    device.run(planned.reducing, ours, device_sum(), call=call)
    host.run(planned.reducing, theirs, SUM, call=call)
    place = planned.places[planned.rank]
    part = slice(place * length, (place + 1) * length)
    assert torch.equal(ours[part], theirs[part])
    every = [values(r, torch.float32, size * length).double()[part] for r in range(size)]
    near(ours[part], every)
    device.run(planned.gathering, ours, device_sum(), call=next(calls))
    host.run(planned.gathering, theirs, SUM, call=next(calls))
    assert torch.equal(ours, theirs)


if __name__ == "__main__":
    main()
