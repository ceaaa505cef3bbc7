"""Gloo's AllReduce and planned ones on the same hosts, one after the other, again and again.

Run on each host as ``python -m trimtab.hosts.testbed.allreduce_job TASK``, where TASK is a JSON
file (`Task`). All algorithms run in one set of processes and take turns; a time is that of the
slowest rank. The first host prints one JSON line (`Timing`) for each call that is timed.
"""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

from pydantic import PositiveInt

from trimtab.core.collectives import Schedule
from trimtab.core.documents import Document, parse_json, read_json, validate

PORT = 29500
GLOO = "gloo"


class Race(Document):
    """Algorithms that are compared for one size of the payload.

    Attributes:
        payload_bytes: on each rank.
        schedules: the planned ones, by name.
    """

    payload_bytes: PositiveInt
    schedules: dict[str, Schedule]


class Task(Document):
    """What is run.

    Attributes:
        hosts: by rank.
        races: one for each size.
        repeats: how often each algorithm is timed, after once that is not.
        timeout_s: of each message.
    """

    hosts: tuple[str, ...]
    races: tuple[Race, ...]
    repeats: PositiveInt = 5
    timeout_s: PositiveInt = 60


class Timing(Document):
    """One call.

    Attributes:
        payload_bytes: on each rank.
        algorithm: ``gloo`` or the name of a schedule.
        seconds: of the slowest rank.
    """

    payload_bytes: int
    algorithm: str
    seconds: float


def main() -> None:
    """Runs this host's part of the task."""
    import torch
    from torch import distributed

    task = read_json(Path(sys.argv[1]), Task)
    rank = task.hosts.index(socket.gethostname())
    torch.set_num_threads(1)
    distributed.init_process_group(
        GLOO,
        init_method=f"tcp://{task.hosts[0]}:{PORT}",
        rank=rank,
        world_size=len(task.hosts),
        timeout=timedelta(seconds=task.timeout_s),
    )
    try:
        for timing in _timings(task, rank):
            if rank == 0:
                print(timing.model_dump_json(), flush=True)
        distributed.barrier()
    finally:
        distributed.destroy_process_group()


def _timings(task: Task, rank: int) -> Iterator[Timing]:
    import torch
    from torch import distributed

    for race in task.races:
        data = torch.empty(race.payload_bytes // 4)
        calls = _calls(task, race, rank, data)
        for repeat in range(task.repeats + 1):
            for name, call in calls.items():
                data.fill_(rank + 1.0)
                distributed.barrier()
                began_s = time.perf_counter()
                call()
                took_s = torch.tensor(time.perf_counter() - began_s, dtype=torch.float64)
                _check(data, len(task.hosts), name)
                distributed.all_reduce(took_s, distributed.ReduceOp.MAX)
                if repeat:
                    yield Timing(
                        payload_bytes=race.payload_bytes, algorithm=name, seconds=took_s.item()
                    )


def _calls(task: Task, race: Race, rank: int, data: object) -> dict[str, Callable[[], object]]:
    """What is timed, by name."""
    import torch
    from torch import distributed

    from trimtab.hosts.torch.plan_runner import PlannedRank, PlanRunner, adding

    assert isinstance(data, torch.Tensor)
    runner = PlanRunner(distributed.group.WORLD, timedelta(seconds=task.timeout_s))
    combine = adding(torch.Tensor.add_, fused=True)
    numbers = iter(range(1 << 30))

    def planned(schedule: Schedule) -> Callable[[], object]:
        turns, chunks = PlannedRank(schedule, rank).turns, schedule.chunks
        return lambda: runner.run(turns, data, combine, call=next(numbers), chunks=chunks)

    calls: dict[str, Callable[[], object]] = {GLOO: lambda: distributed.all_reduce(data)}
    return calls | {name: planned(schedule) for name, schedule in race.schedules.items()}


def _check(data: object, count: int, name: str) -> None:
    import torch

    assert isinstance(data, torch.Tensor)
    if not bool((data == count * (count + 1) / 2).all()):
        raise RuntimeError(f"{name} computed something else than the sum")


def timings(lines: Iterator[str]) -> Iterator[Timing]:
    """What the job prints, line by line."""
    return (validate(Timing, parse_json(line, where="the job"), where="the job") for line in lines)


if __name__ == "__main__":
    main()
