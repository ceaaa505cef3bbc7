"""One rank of a job over gloo whose first rank prints what it finds, a JSON line for each.

Each rank is run as ``python -m MODULE TASK`` with its number in ``RANK``; TASK is a JSON file.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

from pydantic import PositiveInt

from trimtab.core.documents import Document, parse_json, read_json, validate

GLOO = "gloo"

F = TypeVar("F", bound=Document)


class RankedTask(Document):
    """What each such task says.

    Attributes:
        ranks: how many there are.
        address: ``HOST:PORT`` at which the first one waits for the others.
        backends: of torch.distributed, that are compared beside gloo.
        timeout_s: of each message.
    """

    ranks: PositiveInt
    address: str
    backends: tuple[str, ...] = ()
    timeout_s: PositiveInt = 60


T = TypeVar("T", bound=RankedTask)


def run_rank(kind: type[T], work: Callable[[T, int], Iterable[Document]]) -> None:
    """Runs this rank's part of a task.

    Args:
        kind: of the task.
        work: what a rank does, given the task and its number.
    """
    import torch
    from torch import distributed

    task = read_json(Path(sys.argv[1]), kind)
    rank = int(os.environ["RANK"])
    torch.set_num_threads(1)
    distributed.init_process_group(
        GLOO,
        init_method=f"tcp://{task.address}",
        rank=rank,
        world_size=task.ranks,
        timeout=timedelta(seconds=task.timeout_s),
    )
    try:
        for found in work(task, rank):
            if rank == 0:
                print(found.model_dump_json(), flush=True)
        distributed.barrier()
    finally:
        distributed.destroy_process_group()


def printed(lines: Iterable[str], kind: type[F]) -> Iterator[F]:
    """What the first rank prints, line by line."""
    return (validate(kind, parse_json(line, where="the job"), where="the job") for line in lines)
