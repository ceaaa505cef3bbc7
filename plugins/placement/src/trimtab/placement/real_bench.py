"""A real job on eight hosts with a network of their own: step times by the order of the hosts."""

from __future__ import annotations

import random
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from statistics import mean

from trimtab.core.benchmark import Case, Options, Progress
from trimtab.core.cluster import Cluster, Link, Node
from trimtab.core.errors import TrimtabError
from trimtab.hosts.testbed import TreeNetwork, obstacle
from trimtab.hosts.testbed.pipeline_job import Task, Timing, timings
from trimtab.placement.job import TrainingJob
from trimtab.placement.planner import plan_placement

HOST_BYTES_PER_S = 12.5e6
UPLINK_BYTES_PER_S = 6.25e6
LEAVES, HOSTS_PER_LEAF = 2, 4
PIPELINE = 2
SAME_LOSS = 1e-4
"""Sums in another order round differently."""

Order = tuple[str, ...]


def real_cases(options: Options, progress: Progress) -> list[Case]:
    """The step time of a DP x PP job over gloo, in the plan's order of hosts against others.

    Eight network namespaces are the hosts, below two leaves; the links between the leaves carry an
    eighth of what their hosts could send. Where this machine has no such namespaces, or no torch,
    there are no cases.

    Raises:
        TrimtabError: the job failed, or computed something else in another order.
    """
    reason = obstacle() or (None if find_spec("torch") else "torch is not installed")
    if reason:
        progress(f"real hosts are left out: {reason}")
        return []
    repeats, randoms = (1, 3) if options.quick else (3, 6)
    network = scattered(options.seed)
    orders = [planned_order(network), by_name(network), *random_orders(network, randoms, options)]
    task = Task(orders=tuple(orders) * repeats, pipeline=PIPELINE, steps=2 if options.quick else 3)
    measured = run(network, task, progress)
    _check_losses(measured)
    step_s = [timing.step_s for timing in measured]
    rounds = [step_s[at : at + len(orders)] for at in range(0, len(step_s), len(orders))]
    return _cases(rounds, f"{len(orders) - 2} random orders")


def scattered(seed: int) -> Cluster:
    """The network, with the hosts' names dealt out to the leaves at random, as racks are filled."""
    names = [f"n{number}" for number in range(LEAVES * HOSTS_PER_LEAF)]
    random.Random(seed).shuffle(names)
    leaf_of = {name: f"leaf{at // HOSTS_PER_LEAF}" for at, name in enumerate(names)}
    leaves = tuple(f"leaf{leaf}" for leaf in range(LEAVES))
    links = [
        *(Link(a=n, b=leaf, bandwidth_bytes_per_s=HOST_BYTES_PER_S) for n, leaf in leaf_of.items()),
        *(Link(a=leaf, b="core", bandwidth_bytes_per_s=UPLINK_BYTES_PER_S) for leaf in leaves),
    ]
    nodes = tuple(Node(name=name, device="cpu") for name in sorted(names))
    return Cluster(name="testbed", nodes=nodes, switches=(*leaves, "core"), links=tuple(links))


def planned_order(network: Cluster) -> Order:
    """The plan's hosts by rank; each kind of group weighs as many bytes as it sends."""
    task = Task(orders=(by_name(network),), pipeline=PIPELINE)
    sent = task.gradient_bytes + task.activation_bytes
    job = TrainingJob(
        pipeline_parallel=PIPELINE,
        data_parallel=task.replicas,
        gpus_per_node=1,
        alpha=task.gradient_bytes / sent,
    )
    return tuple(slot.node for slot in plan_placement(network, job).ranks)


def by_name(network: Cluster) -> Order:
    """The hosts sorted by name, as torchrun's rendezvous does."""
    return tuple(sorted(node.name for node in network.nodes))


def random_orders(network: Cluster, count: int, options: Options) -> list[Order]:
    """Seeded random orders."""
    generator = random.Random(options.seed + 1)
    names = by_name(network)
    return [tuple(generator.sample(names, len(names))) for _ in range(count)]


def run(network: Cluster, task: Task, progress: Progress) -> list[Timing]:
    """Runs a task on a network of its own; one timing for each order.

    Raises:
        TrimtabError: the job failed.
    """
    with TreeNetwork(network) as up, tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "task.json"
        path.write_text(task.model_dump_json())
        command = [sys.executable, "-m", "trimtab.hosts.testbed.pipeline_job", str(path)]
        env = {"OMP_NUM_THREADS": "1"}
        log = Path(folder) / "log"
        with log.open("w") as errors:
            for host in task.orders[0][1:]:
                up.start(host, command, env=env, stdout=subprocess.DEVNULL, stderr=errors)
            first = up.start(task.orders[0][0], command, env=env, stderr=errors)
        found = _collected(first, len(task.orders), progress)
        if first.wait() or len(found) < len(task.orders):
            last = (log.read_text().strip() or "no message").splitlines()[-1]
            raise TrimtabError(f"the job on namespaced hosts failed: {last}")
    return found


def _collected(first: subprocess.Popen[str], count: int, progress: Progress) -> list[Timing]:
    assert first.stdout is not None
    progress("real hosts: starting the job", 0.0)
    found: list[Timing] = []
    for timing in timings(first.stdout):
        found.append(timing)
        progress(f"real hosts: order {len(found)} of {count}", len(found) / count)
    return found


def _check_losses(measured: Sequence[Timing]) -> None:
    first = measured[0].loss
    odd = next((t.loss for t in measured if abs(t.loss - first) > SAME_LOSS * abs(first)), None)
    if odd is not None:
        raise TrimtabError(f"the job's loss is {odd} in one order of hosts and {first} in another")


def _cases(rounds: Sequence[Sequence[float]], randoms: str) -> list[Case]:
    """Cases from rounds of step times, each of the plan, of the order by name, and of others."""
    against = {
        f"mean of {randoms}": [mean(others) for _, _, *others in rounds],
        f"best of {randoms}": [min(others) for _, _, *others in rounds],
        "hostname-order": [by_name for _, by_name, *_ in rounds],
    }
    return [
        Case.compare(
            f"real/namespaces-{LEAVES}x{HOSTS_PER_LEAF}/dp4-pp2",
            "step_time_s",
            "s",
            "lower",
            baseline,
            [(other, ours[0]) for other, ours in zip(seconds, rounds, strict=True)],
            notes="emulated hosts: network namespaces with shaped links on one machine; the same"
            " loss in every order",
        )
        for baseline, seconds in against.items()
    ]
