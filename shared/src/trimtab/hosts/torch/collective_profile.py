"""Times collectives of many shapes among the ranks of a job, for `trimtab.core.cost.fit_model`.

Numbers of ranks from two up, direct exchange in groups, rings, and sums without a network: together
they tell the terms of GenModel apart. Calls take turns, so that what a machine does meanwhile is
spread over all of them. As a module it is a job of its own, see `main`.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from pydantic import TypeAdapter

from trimtab.core.collectives import Layout, Schedule
from trimtab.core.collectives.combine import ring, staged
from trimtab.core.cost import Run
from trimtab.hosts.torch.plan_runner import Combine, PlannedRank, PlanRunner, adding
from trimtab.hosts.torch.timing import timed

PAYLOADS_BYTES = (2**18, 2**20, 2**22)
SUMMED = range(2, 9)
MOST_RANKS = 16
"""More ranks below one switch are not needed to tell the constants apart."""

Kind = tuple[str, tuple[int, ...]]
"""A run's algorithm and groups."""


@dataclass(frozen=True, slots=True)
class Effort:
    """How collectives are timed.

    Attributes:
        payloads_bytes: on each rank.
        repeats: how often each is timed, after once that is not.
        timeout_s: of each message.
    """

    payloads_bytes: tuple[int, ...] = PAYLOADS_BYTES
    repeats: int = 5
    timeout_s: float = 300


def kinds(ranks: int) -> list[Kind]:
    """The collectives that are timed among so many ranks."""
    direct: list[Kind] = [("staged", (count,)) for count in range(2, ranks + 1)]
    two: list[Kind] = [
        ("staged", (a, b)) for a in range(2, ranks // 2 + 1) for b in (2, 3, 4) if a * b <= ranks
    ]
    halving: list[Kind] = [("staged", (2, 2, 2))] if ranks >= 8 else []
    rings: list[Kind] = [("ring", (count,)) for count in sorted({ranks // 2, ranks}) if count > 2]
    return [*direct, *two, *halving, *rings]


def timed_runs(ranks: Sequence[int], effort: Effort) -> list[Run]:
    """Times the collectives; every rank of the default group calls it.

    Args:
        ranks: those that take part, at most `MOST_RANKS` of them; they share one switch.
        effort: how.

    Returns:
        The runs on rank 0 of the default group, nothing on the others.
    """
    members = list(ranks)[:MOST_RANKS]
    timeout = timedelta(seconds=effort.timeout_s)
    group = dist.new_group(members, timeout=timeout)
    rank = members.index(dist.get_rank()) if dist.get_rank() in members else len(members)
    runner = PlanRunner(group, timeout)
    combine = adding(torch.Tensor.add_, fused=True)
    calls = dict(_calls(kinds(len(members)), rank, runner, combine, effort))
    seconds: dict[tuple[Kind, int], list[float]] = defaultdict(list)
    for repeat in range(effort.repeats + 1):
        for key, call in calls.items():
            took_s, _ = timed(call)
            if repeat:
                seconds[key].append(took_s)
    if dist.get_rank():
        return []
    return [
        Run(algorithm=algorithm, groups=groups, payload_bytes=size, seconds=tuple(times))
        for ((algorithm, groups), size), times in seconds.items()
    ]


def _calls(
    asked: Sequence[Kind], rank: int, runner: PlanRunner, combine: Combine, effort: Effort
) -> Iterator[tuple[tuple[Kind, int], Callable[[], None]]]:
    """What this rank does for each kind and size; nothing where it takes no part."""
    numbers = iter(range(1 << 40))
    for size in effort.payloads_bytes:
        data = torch.zeros(max(size // 4, 1))
        for kind in asked:
            planned = PlannedRank(_schedule(kind), rank)
            call = partial(_planned, runner, planned.turns, data, combine, numbers)
            yield (kind, size), call
        for operands in SUMMED:
            rows = data.new_zeros(operands - 1, len(data))
            yield (("sum", (operands,)), size), partial(combine, data, rows)


def _planned(
    runner: PlanRunner, turns: Sequence[Any], data: torch.Tensor, combine: Combine, numbers: Any
) -> None:
    # Every rank counts every call, so that all give the same one the same number.
    runner.run(turns, data, combine, call=next(numbers))


def _schedule(kind: Kind) -> Schedule:
    algorithm, groups = kind
    count = 1
    for size in groups:
        count *= size
    parties = [Layout.whole(rank) for rank in range(count)]
    steps = [ring(parties)[0]] if algorithm == "ring" else staged(parties, groups)[0]
    return Schedule.of(count, steps)


def main(arguments: Sequence[str]) -> None:
    """Takes part as one rank of a job; the first one prints its runs as JSON.

    Args:
        arguments: payloads in bytes, separated by commas, and how often each is timed.
    """
    payloads, repeats = arguments
    effort = Effort(tuple(map(int, payloads.split(","))), int(repeats))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=effort.timeout_s))
    runs = timed_runs(range(dist.get_world_size()), effort)
    if dist.get_rank() == 0:
        print(TypeAdapter(list[Run]).dump_json(runs).decode())
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
