"""Real AllReduces on hosts with a network of their own, gloo's and ours in turns."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from statistics import median

from trimtab.core.benchmark import Case, Options, Progress
from trimtab.core.cluster import Cluster
from trimtab.core.collectives import Layout, NetworkTree, Schedule
from trimtab.core.collectives.combine import ring
from trimtab.core.cost import Constants
from trimtab.core.errors import TrimtabError
from trimtab.gentree.backend import GroupPlans
from trimtab.gentree.planner import leaf_order
from trimtab.hosts.testbed import TreeNetwork, obstacle, two_tiers
from trimtab.hosts.testbed.allreduce_job import GLOO, Race, Task, Timing, timings

HOST_BYTES_PER_S = 12.5e6
HOSTS = 8
SIZES_BYTES = (1024, 65_536, 2**20, 2**22)
QUICK_BYTES = (65_536, 2**22)

CONSTANTS = Constants(alpha_s=1e-3, incast_threshold=9)
"""A round costs about a millisecond with eight processes on two cores."""

OURS, RING = "gentree", "ring by the same executor"
INTERLEAVED = (0, 4, 1, 5, 2, 6, 3, 7)


def real_cases(options: Options, progress: Progress) -> list[Case]:
    """Times of an AllReduce among eight hosts, in namespaces with shaped links.

    Two racks of four, with ranks dealt out in the order of the racks and alternating between them,
    and one switch. Where this machine has no such namespaces, or no torch, there are no cases.

    Raises:
        TrimtabError: the job failed.
    """
    reason = obstacle() or (None if find_spec("torch") else "torch is not installed")
    if reason:
        progress(f"real hosts are left out: {reason}")
        return []
    sizes, repeats = (QUICK_BYTES, 3) if options.quick else (SIZES_BYTES, 7)
    racks = _network([4, 4])
    cases = _raced("racks-2x4/interleaved", racks, INTERLEAVED, sizes, repeats, progress)
    if not options.quick:
        cases += _raced("racks-2x4/in-order", racks, range(HOSTS), sizes, repeats, progress)
        cases += _raced("star-8", _network([HOSTS]), range(HOSTS), sizes, repeats, progress)
    return cases


def _network(hosts: Sequence[int]) -> Cluster:
    return two_tiers(hosts, host_bytes_per_s=HOST_BYTES_PER_S, uplink_bytes_per_s=HOST_BYTES_PER_S)


def _raced(
    name: str,
    network: Cluster,
    order: Sequence[int],
    sizes: Sequence[int],
    repeats: int,
    progress: Progress,
) -> list[Case]:
    hosts = tuple(f"h{number}" for number in order)
    slots = [(host, 0) for host in hosts]
    tree = NetworkTree.of_cluster(network, slots)
    plans = GroupPlans(tree, leaf_order(tree, slots), CONSTANTS, always=False)
    around = Schedule.of(HOSTS, [ring([Layout.whole(rank) for rank in range(HOSTS)])[0]])
    races, chosen = [], {}
    for size in sizes:
        plan = plans.schedule(size)
        chosen[size] = plan
        schedules = {RING: around} | ({OURS: plan} if plan is not None else {})
        races.append(Race(payload_bytes=size, schedules=schedules))
    task = Task(hosts=hosts, races=tuple(races), repeats=repeats)
    progress(f"real hosts: {name}")
    measured = run(network, task)
    return [case for size in sizes for case in _cases(name, size, chosen[size], measured[size])]


def run(network: Cluster, task: Task) -> dict[int, dict[str, list[float]]]:
    """Runs a task on a network of its own: seconds by size and algorithm.

    Raises:
        TrimtabError: the job failed.
    """
    with TreeNetwork(network) as up, tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "task.json"
        path.write_text(task.model_dump_json())
        command = [sys.executable, "-m", "trimtab.hosts.testbed.allreduce_job", str(path)]
        env = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "eth0"}
        log = Path(folder) / "log"
        with log.open("w") as errors:
            for host in task.hosts[1:]:
                up.start(host, command, env=env, stdout=subprocess.DEVNULL, stderr=errors)
            first = up.start(task.hosts[0], command, env=env, stderr=errors)
        assert first.stdout is not None
        found = list(timings(first.stdout))
        if first.wait():
            last = (log.read_text().strip() or "no message").splitlines()[-1]
            raise TrimtabError(f"the job on namespaced hosts failed: {last}")
    return _by_size(found)


def _by_size(found: Sequence[Timing]) -> dict[int, dict[str, list[float]]]:
    seconds: dict[int, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for timing in found:
        seconds[timing.payload_bytes][timing.algorithm].append(timing.seconds)
    return seconds


def _cases(
    name: str, size: int, plan: Schedule | None, seconds: Mapping[str, list[float]]
) -> list[Case]:
    """The plugin's own choice against gloo and against a ring by the same executor."""
    ours = seconds[OURS] if plan is not None else seconds[GLOO]
    what = f"{plan.chunks} chunks" if plan is not None else "the base backend was chosen"
    return [
        Case.compare(
            f"real/{name}/{size}-bytes",
            "allreduce_s",
            "s",
            "lower",
            baseline,
            list(zip(seconds[baseline], ours, strict=True)),
            notes=f"{what}; median {median(ours):.4g} s; network namespaces with shaped links",
        )
        for baseline in (GLOO, RING)
    ]
