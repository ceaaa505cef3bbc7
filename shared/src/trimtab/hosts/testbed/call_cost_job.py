"""CPU time of a small AllReduce over gloo, and through a backend in several environments.

Each rank is run as ``python -m trimtab.hosts.testbed.call_cost_job TASK`` with its number in
``RANK``, where TASK is a JSON file (`Task`). All ways run in one set of processes and take turns.
The first rank prints one JSON line (`CallCost`) for each turn.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from pydantic import PositiveInt

from trimtab.core.documents import Document
from trimtab.hosts.testbed.ranked_job import GLOO, RankedTask, printed, run_rank

if TYPE_CHECKING:
    import torch


class Task(RankedTask):
    """What is run.

    Attributes:
        backend: whose calls are timed beside gloo's.
        ways: by its name, what each way sets in the environment when its group is made.
        payload_bytes: on each rank.
        calls: in each turn.
        repeats: turns of each way, after one that is not timed.
    """

    backend: str
    ways: dict[str, dict[str, str]]
    payload_bytes: PositiveInt
    calls: PositiveInt = 50
    repeats: PositiveInt = 7


class CallCost(Document):
    """One turn.

    Attributes:
        way: how the calls went.
        cpu_s: of all threads of a rank for one call, on average over ranks and calls.
    """

    way: str
    cpu_s: float


def _costs(task: Task, rank: int) -> Iterator[CallCost]:
    import torch
    from torch import distributed

    groups = {GLOO: distributed.group.WORLD}
    groups |= {way: _group(task.backend, changes) for way, changes in task.ways.items()}
    data = torch.empty(task.payload_bytes // 4)
    for group in groups.values():
        data.fill_(rank + 1.0)
        distributed.all_reduce(data, group=group)
        if not bool((data == task.ranks * (task.ranks + 1) / 2).all()):
            raise RuntimeError("an AllReduce computed something else than the sum")
    data.zero_()
    for repeat in range(task.repeats + 1):
        for way, group in groups.items():
            distributed.barrier()
            began_s = time.process_time()
            for _ in range(task.calls):
                distributed.all_reduce(data, group=group)
            spent_s = torch.tensor(time.process_time() - began_s, dtype=torch.float64)
            distributed.all_reduce(spent_s)
            if repeat:
                yield CallCost(way=way, cpu_s=spent_s.item() / task.calls / task.ranks)


def _group(backend: str, changes: Mapping[str, str]) -> torch.distributed.ProcessGroup:
    """All ranks over the backend, in an environment that is changed so."""
    from torch import distributed

    os.environ.update(changes)
    group: torch.distributed.ProcessGroup = distributed.new_group(backend=backend)
    return group


def costs(lines: Iterable[str]) -> Iterator[CallCost]:
    """What the job prints, line by line."""
    return printed(lines, CallCost)


if __name__ == "__main__":
    run_rank(Task, _costs)
