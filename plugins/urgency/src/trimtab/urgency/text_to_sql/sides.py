"""The servers that a comparison is between, and how all of them are started."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from trimtab.core.benchmark import Progress
from trimtab.hosts.vllm.server import SMALL_CPU_ENGINE, Server, running, small_cpu_environment
from trimtab.urgency.config import Order
from trimtab.urgency.text_to_sql.crowd import Hints

SEATS = 4
"""Calls that a server runs at once: few, so that calls wait in its queue and not in its batch."""


@dataclass(frozen=True, slots=True)
class Side:
    """A way to order the waiting calls.

    Attributes:
        name: as in reports.
        title: as people read it.
        arguments: what it adds to ``vllm serve``.
        hints: what clients tell it of their calls.
    """

    name: str
    title: str
    arguments: tuple[str, ...] = ()
    hints: Hints = "fields"


def host_side(order: Order) -> Side:
    """The host scheduler with the plugin's policy in one of its orders."""
    options = {"trimtab": {"urgency": {"order": order}}}
    return Side(
        f"urgency-{order}",
        f"trimtab urgency ({order})",
        (
            *("--scheduler-cls", "trimtab.hosts.vllm.Scheduler"),
            *("--middleware", "trimtab.hosts.vllm.Middleware"),
            *("--additional-config", json.dumps(options)),
        ),
    )


FCFS = Side("vllm-fcfs", "vLLM's own order")
PRIORITY = Side(
    "vllm-priority",
    "vLLM's priority by class",
    ("--scheduling-policy", "priority"),
    hints="priority",
)
URGENCY = host_side("edd")
PAPER = host_side("urgency")
MIDDLEWARE = Side(
    "urgency-middleware",
    "trimtab urgency, middleware only",
    (
        *("--scheduling-policy", "priority"),
        *("--middleware", "trimtab.urgency.PriorityMiddleware"),
    ),
)


@contextmanager
def servers(
    sides: Sequence[Side], model: Path | str, logs: Path, progress: Progress, port: int = 0
) -> Iterator[list[Server]]:
    """Starts a server for each side, all at once, and yields them when every one is ready.

    Args:
        sides: what is compared.
        model: the model that all of them serve.
        logs: the folder of their logs.
        progress: told while they start.
        port: the first server's port, the others taking the next ones; 0 for free ones.

    Raises:
        BadInput: a port is taken, or there is no such model.
        ServerFailed: a server ended, or was not ready in time.
    """
    titles = ", ".join(side.title for side in sides)
    say = partial(progress, f"starting a server each for {titles}")
    started = [
        Server(
            model,
            logs / f"{side.name}.log",
            [*SMALL_CPU_ENGINE, "--max-num-seqs", str(SEATS), *side.arguments],
            small_cpu_environment(),
            port=port and port + number,
        )
        for number, side in enumerate(sides)
    ]
    with running(started, say):
        yield started
