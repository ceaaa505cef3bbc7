"""What a launch in a plan's order costs: torchrun's rendezvous, and DeepSpeed's hostfile."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from unittest.mock import patch

from trimtab.core.benchmark import Case, Options, Progress
from trimtab.core.errors import TrimtabError
from trimtab.hosts.deepspeed.launching import with_hosts
from trimtab.hosts.launcher_command import LauncherCommand
from trimtab.hosts.testbed import rendezvous_agents
from trimtab.hosts.testbed.rendezvous_agents import Task, Timing

AGENTS, HOSTS = 64, 1200
_BUDGET_S = 0.01
_REPEATS = 5


def launch_cases(options: Options, progress: Progress) -> Iterator[Case]:
    """The rendezvous of 64 agents against torchrun's own, and a hostfile of 1,200 hosts.

    Raises:
        TrimtabError: the agents did not come together, or got other ranks than the plan's.
    """
    progress("agents come together")
    hosts = names(AGENTS, options.seed)
    timings = come_together(hosts, 1 if options.quick else _REPEATS)
    yield Case.compare(
        f"real/rendezvous/{AGENTS}-agents",
        "rendezvous_s",
        "s",
        "lower",
        "torchrun's c10d",
        [(timing.c10d_s, timing.planned_s) for timing in timings],
        notes="all agents in one process, from when all are there until each has its rank",
    )
    yield Case.compare(
        f"real/hostfile/{HOSTS}-hosts",
        "rewrite_s",
        "s",
        "lower",
        "budget of 10 ms",
        [(_BUDGET_S, _rewritten_s(options.seed + draw)) for draw in range(_REPEATS)],
    )


def names(count: int, seed: int) -> list[str]:
    """Hosts in a seeded order."""
    return random.Random(seed).sample([f"node{number:04d}" for number in range(count)], count)


def come_together(hosts: Sequence[str], rounds: int) -> list[Timing]:
    """Agents of these hosts, which come in the order of their names; the plan has the hosts' own.

    Raises:
        TrimtabError: they did not come together, or got other ranks than the plan's.
    """
    with tempfile.TemporaryDirectory() as folder:
        plan, path = Path(folder) / "hostfile", Path(folder) / "task.json"
        plan.write_text("".join(f"{host} slots=8\n" for host in hosts))
        task = Task(plan=str(plan), hosts=tuple(sorted(hosts)), rounds=rounds)
        path.write_text(task.model_dump_json())
        done = subprocess.run(
            [sys.executable, "-m", rendezvous_agents.__name__, str(path)],
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        raise TrimtabError(f"the agents did not come together: {last}")
    found = [Timing.model_validate_json(line) for line in done.stdout.splitlines()]
    planned = tuple(hosts.index(host) for host in task.hosts)
    if any(timing.ranks != planned for timing in found):
        raise TrimtabError("the agents got other ranks than the plan's")
    return found


def _rewritten_s(seed: int) -> float:
    """The time to give a DeepSpeed launch a hostfile in another order."""
    command = LauncherCommand("deepspeed", ("deepspeed",), (), ("train.py",))
    with tempfile.TemporaryDirectory() as folder, patch.dict(os.environ, TRIMTAB_CACHE=folder):
        started = time.perf_counter()
        with_hosts(command, dict.fromkeys(names(HOSTS, seed), 8), {}, None)
        return time.perf_counter() - started
