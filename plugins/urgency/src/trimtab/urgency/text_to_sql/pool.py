"""Three unequal servers, stock vLLM all of them, and the ways to spread a crowd's calls."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from trimtab.core.benchmark import Progress
from trimtab.hosts.vllm.server import SMALL_CPU_ENGINE, Server, running, small_cpu_environment
from trimtab.urgency.router.process import listening
from trimtab.urgency.text_to_sql.crowd import Hints

SEATS = (6, 2, 1)
"""Calls that each server runs at once. On a small machine it is this that makes servers unequal
without fail: decoding six sequences takes little longer than decoding one."""


@dataclass(frozen=True, slots=True)
class Route:
    """A way to spread calls.

    Attributes:
        name: as in reports.
        title: as people read it.
        rule: the router's dispatch rule.
        hints: what clients tell it of their calls.
    """

    name: str
    title: str
    rule: str
    hints: Hints


ROUND_ROBIN = Route("vllm-fcfs+round-robin", "round robin", "round-robin", "nothing")
LEAST_REQUESTS = Route("vllm-fcfs+least-requests", "least requests", "least-requests", "nothing")
DISPATCH = Route("urgency-dispatch-alone", "our dispatch, by arrival", "auto", "nothing")
WHOLE = Route("urgency", "our dispatch, by urgency", "auto", "fields")


@dataclass(frozen=True, slots=True)
class Routed:
    """A router and the servers behind it."""

    url: str
    servers: Sequence[Server]
    served_name: str = "model"

    def check(self) -> None:
        """Does nothing while all servers live.

        Raises:
            ServerFailed: one has ended.
        """
        for server in self.servers:
            server.check()


@contextmanager
def pool(
    routes: Sequence[Route], model: Path, folder: Path, progress: Progress
) -> Iterator[list[Routed]]:
    """Starts the servers and, before all of them, a router for each way to spread calls.

    Args:
        routes: what is compared.
        model: the model that all servers serve.
        folder: for the servers' logs and the routers' files.
        progress: told while they start.

    Raises:
        ServerFailed: a server ended, or was not ready in time.
    """
    say = partial(progress, f"starting servers of {', '.join(map(str, SEATS))} seats")
    servers = [
        Server(
            model,
            folder / f"{seats}-seats.log",
            [*SMALL_CPU_ENGINE, "--max-num-seqs", str(seats)],
            small_cpu_environment(),
        )
        for seats in SEATS
    ]
    with running(servers, say), ExitStack() as stack:
        yield [
            Routed(stack.enter_context(_router(route, servers, folder)), servers)
            for route in routes
        ]


@contextmanager
def _router(route: Route, servers: Sequence[Server], folder: Path) -> Iterator[str]:
    backends = [
        {"url": server.url, "name": f"{seats}-seats", "seats": seats}
        for server, seats in zip(servers, SEATS, strict=True)
    ]
    file = folder / f"{route.name}.json"
    file.write_text(json.dumps({"backends": backends, "dispatch": {"rule": route.rule}}))
    with listening("trimtab.cli", "route", "--config", str(file), "--port", "0") as url:
        yield url
