"""Agents that come together as torchrun's do, all in one process, timed.

Run as ``python -m trimtab.hosts.testbed.rendezvous_agents TASK``, where TASK is a JSON file
(`Task`). It prints one JSON line (`Timing`) for each round of both kinds, in turn.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import PositiveInt

from trimtab.core.documents import Document, read_json
from trimtab.hosts.job_variables import HOST_VARIABLE

if TYPE_CHECKING:
    from torch.distributed.elastic.rendezvous import RendezvousHandler

_C10D, _PLANNED = "c10d", "trimtab"


class Task(Document):
    """What is run.

    Attributes:
        plan: the plan file that numbers the agents.
        hosts: the agents' host names.
        rounds: of each kind.
    """

    plan: str
    hosts: tuple[str, ...]
    rounds: PositiveInt = 3


class Timing(Document):
    """How long a round took, from when all agents are there until each has its rank.

    Attributes:
        c10d_s: with torchrun's own rendezvous.
        planned_s: with ranks in the plan's order.
        ranks: that the plan gave the hosts, in their order.
    """

    c10d_s: float
    planned_s: float
    ranks: tuple[int, ...]


def _handlers(backend: str, task: Task, round_: int) -> list[RendezvousHandler]:
    """An agent for each host; the first one holds the store."""
    from torch.distributed.elastic.rendezvous import RendezvousParameters
    from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler
    from torch.distributed.elastic.utils.distributed import get_free_port

    count = len(task.hosts)
    found: list[RendezvousHandler] = []
    endpoint = f"127.0.0.1:{get_free_port()}"  # type: ignore[no-untyped-call]
    settings = {"plan": task.plan} if backend == _PLANNED else {}
    for host in task.hosts:
        os.environ[HOST_VARIABLE] = host
        parameters = RendezvousParameters(
            backend, endpoint, f"{backend}-{round_}", count, count, "127.0.0.1", **settings
        )
        found.append(get_rendezvous_handler(parameters))
    return found


def _round(handlers: Sequence[RendezvousHandler]) -> tuple[float, tuple[int, ...]]:
    with ThreadPoolExecutor(len(handlers)) as pool:
        started = time.perf_counter()
        ranks = tuple(pool.map(lambda handler: handler.next_rendezvous().rank, handlers))
        return time.perf_counter() - started, ranks


def main() -> None:
    """Runs the task."""
    task = read_json(Path(sys.argv[1]), Task)
    for round_ in range(task.rounds):
        c10d_s, _ = _round(_handlers(_C10D, task, round_))
        planned_s, ranks = _round(_handlers(_PLANNED, task, round_))
        print(Timing(c10d_s=c10d_s, planned_s=planned_s, ranks=ranks).model_dump_json(), flush=True)
    os._exit(0)  # agents heartbeat in threads of their own until their stores close


if __name__ == "__main__":
    main()
