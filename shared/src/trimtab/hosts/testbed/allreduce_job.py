"""AllReduces of gloo, of other backends and by plans, one after the other, again and again.

Each rank is run as ``python -m trimtab.hosts.testbed.allreduce_job TASK`` with its number in
``RANK``, where TASK is a JSON file (`Task`). All algorithms run in one set of processes and take
turns, each time in another order, and each over connections of its own, so that all of them were
idle for as long. A time is that of the slowest rank. The first rank prints one JSON line
(`Timing`) for each call that is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from itertools import count
from typing import TYPE_CHECKING

from pydantic import PositiveInt

from trimtab.core.collectives import Schedule
from trimtab.core.documents import Document
from trimtab.hosts.testbed.ranked_job import GLOO, RankedTask, printed, run_rank

if TYPE_CHECKING:
    import torch


Call = Callable[[], object]


class Race(Document):
    """Algorithms that are compared for one size of the payload.

    Attributes:
        payload_bytes: on each rank.
        schedules: the planned ones, by name.
        repeats: how often each is timed, after once that is not.
    """

    payload_bytes: PositiveInt
    schedules: dict[str, Schedule]
    repeats: PositiveInt = 5


class Task(RankedTask):
    """What is run.

    Attributes:
        races: one for each size.
    """

    races: tuple[Race, ...]


class Timing(Document):
    """One call.

    Attributes:
        payload_bytes: on each rank.
        algorithm: a backend, or the name of a schedule.
        seconds: of the slowest rank.
    """

    payload_bytes: int
    algorithm: str
    seconds: float


def _timings(task: Task, rank: int) -> Iterator[Timing]:
    import torch
    from torch import distributed

    from trimtab.hosts.torch.timing import timed

    planned = dict.fromkeys(name for race in task.races for name in race.schedules)
    backends = {GLOO: GLOO} | {name: name for name in task.backends} | dict.fromkeys(planned, GLOO)
    groups = {name: distributed.new_group(backend=backend) for name, backend in backends.items()}
    for race in task.races:
        data = torch.empty(race.payload_bytes // 4)
        calls = _calls(task, race, rank, data, groups)
        for repeat in range(race.repeats + 1):
            for name, call in _turned(list(calls.items()), repeat):
                data.fill_(rank + 1.0)
                took_s, _ = timed(call)
                _check(data, task.ranks, name)
                if repeat:
                    yield Timing(payload_bytes=race.payload_bytes, algorithm=name, seconds=took_s)


def _turned(calls: list[tuple[str, Call]], by: int) -> list[tuple[str, Call]]:
    """The same in turn, with another one at the beginning."""
    first = by % len(calls)
    return calls[first:] + calls[:first]


def _calls(
    task: Task,
    race: Race,
    rank: int,
    data: torch.Tensor,
    groups: dict[str, torch.distributed.ProcessGroup],
) -> dict[str, Call]:
    """What is timed, by name."""
    import torch
    from torch import distributed

    from trimtab.hosts.torch.plan_runner import PlannedRank, PlanRunner, adding

    combine = adding(torch.Tensor.add_, fused=True)

    def grouped(name: str) -> Call:
        return lambda: distributed.all_reduce(data, group=groups[name])

    def planned(name: str, schedule: Schedule) -> Call:
        runner = PlanRunner(groups[name], timedelta(seconds=task.timeout_s))
        turns, chunks, numbers = PlannedRank(schedule, rank).turns, schedule.chunks, count()
        return lambda: runner.run(turns, data, combine, call=next(numbers), chunks=chunks)

    calls = {name: grouped(name) for name in (GLOO, *task.backends)}
    return calls | {name: planned(name, schedule) for name, schedule in race.schedules.items()}


def _check(data: torch.Tensor, ranks: int, name: str) -> None:
    if not bool((data == ranks * (ranks + 1) / 2).all()):
        raise RuntimeError(f"{name} computed something else than the sum")


def timings(lines: Iterable[str]) -> Iterator[Timing]:
    """What the job prints, line by line."""
    return printed(lines, Timing)


if __name__ == "__main__":
    run_rank(Task, _timings)
