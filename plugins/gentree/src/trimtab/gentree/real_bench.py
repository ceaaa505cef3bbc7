"""Real AllReduces and training steps, gloo's and ours in turns, on networks of several kinds."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median

from trimtab.core.benchmark import Case, Options, Progress
from trimtab.core.cluster import Cluster, InsideLink, Node
from trimtab.core.collectives import Layout, NetworkTree, Schedule
from trimtab.core.collectives.combine import ring
from trimtab.core.cost import Constants, cut_bound_s_per_byte
from trimtab.core.documents import Document
from trimtab.core.errors import TrimtabError
from trimtab.gentree.backend import (
    ALWAYS_VARIABLE,
    CONSTANTS_VARIABLE,
    TOPOLOGY_VARIABLE,
    GroupPlans,
)
from trimtab.gentree.planner import leaf_order
from trimtab.hosts.job_variables import HOST_VARIABLE
from trimtab.hosts.testbed import (
    TreeNetwork,
    allreduce_job,
    call_cost_job,
    obstacle,
    training_job,
    two_tiers,
)
from trimtab.hosts.testbed.allreduce_job import Race
from trimtab.hosts.testbed.ranked_job import GLOO
from trimtab.hosts.testbed.training_job import Kind, Step

RANKS = 8
HOST_BYTES_PER_S = 12.5e6
SHORT_QUEUE_BYTES, LONG_QUEUE_BYTES = 64 * 1024, 1024 * 1024
PORT = 29500

REPEATS = {2**10: 21, 2**16: 31, 2**20: 11, 2**22: 9, 2**24: 5, 2**26: 3}
"""How often each size is timed on hosts with a network of their own."""

LOOPBACK_REPEATS = {2**10: 25, 2**16: 25, 2**20: 11, 2**24: 7, 2**26: 5}
QUICK_REPEATS = {2**16: 5, 2**22: 3}

CALL_RANKS, CALL_BYTES = 4, 2**10
"""Where the CPU time of one call is told."""

PLANNED, PASSED_ON = "by a plan", "passed on"
_WAYS = {PLANNED: {ALWAYS_VARIABLE: "1"}, PASSED_ON: {TOPOLOGY_VARIABLE: ""}}
"""What each way of a call sets in the environment."""

CONSTANTS = Constants(
    alpha_s=9e-4, message_s=6e-5, processors=2, epsilon_ratio=0.02, incast_threshold=2
)
"""What rounds, messages and incast cost about with eight processes on two cores: what predicts best
which of 26 plans is the fastest, from 1 KiB to 256 KiB on three of the places. AllReduces of 1 KiB
take 3 ms by one rank (2 rounds, 28 ends of messages in all), 7.5 ms by halving and doubling (6
rounds, 96 ends), 8.8 ms by direct exchange (2 rounds, 224 ends) and 15 ms around a ring."""

OURS, RING = "gentree", "ring by the same executor"
INTERLEAVED = (0, 4, 1, 5, 2, 6, 3, 7)

SAME_LOSS = 1e-6
"""How far losses may be apart, relatively: sums in another order round differently."""


@dataclass(frozen=True)
class Place:
    """Where ranks run.

    Attributes:
        name: in the cases.
        network: hosts in namespaces of their own, or this machine alone.
        slots: host and device of each rank.
        repeats: by size of the payload.
        queue_bytes: what each end of a link holds back.
        constants: of the plans.
    """

    name: str
    network: Cluster
    slots: tuple[tuple[str, int], ...]
    repeats: Mapping[int, int]
    queue_bytes: int = 256 * 1024
    constants: Constants = CONSTANTS

    @property
    def is_here(self) -> bool:
        """Whether all ranks are plain processes of this machine."""
        return len(self.network.nodes) == 1

    def plans(self) -> GroupPlans:
        """What the backend plans there."""
        tree = NetworkTree.of_cluster(self.network, self.slots)
        return GroupPlans(tree, leaf_order(tree, self.slots), self.constants, always=False)

    def links_bound_s(self, payload_bytes: float) -> float:
        """The least time in which the links' bandwidths let any AllReduce end."""
        tree = NetworkTree.of_cluster(self.network, self.slots)
        return payload_bytes * cut_bound_s_per_byte(tree)


def interleaved(repeats: Mapping[int, int] = REPEATS) -> Place:
    """Two racks of four behind links of a host's rate, with ranks alternating between them."""
    slots = tuple((f"h{number}", 0) for number in INTERLEAVED)
    return Place("racks-2x4/interleaved", _shaped([4, 4]), slots, repeats)


def places() -> list[Place]:
    """All places: racks with two orders of ranks, one switch with two queues, this machine."""
    in_order = tuple((f"h{number}", 0) for number in range(RANKS))
    star = partial(Place, network=_shaped([RANKS]), slots=in_order, repeats=REPEATS)
    return [
        interleaved(),
        Place("racks-2x4/in-order", _shaped([4, 4]), in_order, REPEATS),
        star(name="star-8/queue-64KiB", queue_bytes=SHORT_QUEUE_BYTES),
        star(name="star-8/queue-1MiB", queue_bytes=LONG_QUEUE_BYTES),
        loopback(RANKS, LOOPBACK_REPEATS),
    ]


def loopback(ranks: int, repeats: Mapping[int, int]) -> Place:
    """This machine alone."""
    inside = InsideLink(bandwidth_bytes_per_s=0.5e9, latency_s=0)
    here = Node(name="here", device="cpu", count=ranks, inside=inside)
    slots = tuple(("here", device) for device in range(ranks))
    return Place(f"loopback-{ranks}", Cluster(nodes=(here,)), slots, repeats)


def real_cases(options: Options, progress: Progress) -> list[Case]:
    """Times of AllReduces and of training steps among eight ranks, and CPU times of small calls.

    Most of them are hosts in namespaces with shaped links; where this machine has none, those
    cases are left out, and all are without torch.

    Raises:
        TrimtabError: a job failed, or trained otherwise over a plan than over gloo.
    """
    if find_spec("torch") is None:
        progress("real hosts are left out: torch is not installed")
        return []
    reason = obstacle()
    if reason:
        progress(f"hosts with a network of their own are left out: {reason}")
    chosen = [interleaved(QUICK_REPEATS)] if options.quick else places()
    cases = []
    for place in chosen:
        if place.is_here or not reason:
            progress(f"real hosts: {place.name}")
            cases += allreduce_cases(place)
    if not options.quick:
        progress("CPU time of small calls")
        cases += call_cost_cases()
    if not (options.quick or reason):
        progress("real hosts: training")
        cases += training_cases(interleaved())
    return cases


def allreduce_cases(place: Place) -> list[Case]:
    """The backend's own choice, plan or not, against gloo and a ring by our executor.

    Raises:
        TrimtabError: the job failed.
    """
    around = Schedule.of(RANKS, [ring([Layout.whole(rank) for rank in range(RANKS)])[0]])
    task = allreduce_job.Task(
        ranks=RANKS,
        address=address(place),
        backends=(OURS,),
        races=tuple(
            Race(payload_bytes=size, schedules={RING: around}, repeats=repeats)
            for size, repeats in place.repeats.items()
        ),
    )
    seconds: dict[int, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for timing in allreduce_job.timings(run(place, allreduce_job.__name__, task)):
        seconds[timing.payload_bytes][timing.algorithm].append(timing.seconds)
    plans = place.plans()
    return [
        case
        for size, found in seconds.items()
        for case in _allreduce_cases(place, size, plans.schedule(size), found)
    ]


def _allreduce_cases(
    place: Place, size: int, plan: Schedule | None, seconds: Mapping[str, list[float]]
) -> list[Case]:
    what = f"{plan.chunks} chunks" if plan is not None else "the base backend was chosen"
    where = "one machine" if place.is_here else "network namespaces with shaped links"
    bound_s = None if place.is_here else place.links_bound_s(size)
    if bound_s is not None:
        what += f"; {bound_s / median(seconds[OURS]):.0%} of the links' bound reached"
    return [
        Case.compare(
            f"real/{place.name}/{size}-bytes",
            "allreduce_s",
            "s",
            "lower",
            baseline,
            list(zip(seconds[baseline], seconds[OURS], strict=True)),
            lower_bound=bound_s,
            notes=f"{what}; fastest {min(seconds[baseline]):.4g} s and {min(seconds[OURS]):.4g} s;"
            f" {where}",
        )
        for baseline in (GLOO, RING)
    ]


def call_cost_cases(payload_bytes: int = CALL_BYTES) -> list[Case]:
    """What a small AllReduce costs a rank through the backend, against gloo's own, on this machine.

    Raises:
        TrimtabError: the job failed.
    """
    place = loopback(CALL_RANKS, {})
    task = call_cost_job.Task(
        backend=OURS,
        ways=_WAYS,
        ranks=CALL_RANKS,
        address=address(place),
        payload_bytes=payload_bytes,
    )
    spent_s: dict[str, list[float]] = defaultdict(list)
    for cost in call_cost_job.costs(run(place, call_cost_job.__name__, task)):
        spent_s[cost.way].append(cost.cpu_s)
    return [
        Case.compare(
            f"real/{place.name}/{payload_bytes}-bytes/{way.replace(' ', '-')}",
            "cpu_per_call_s",
            "s",
            "lower",
            GLOO,
            list(zip(spent_s[GLOO], spent_s[way], strict=True)),
            notes=f"all threads of one of {task.ranks} ranks, on average over {task.calls} calls",
        )
        for way in _WAYS
    ]


def training_cases(place: Place, steps: int = 4) -> list[Case]:
    """Step times of data-parallel training over plans and over gloo, with the same losses.

    Raises:
        TrimtabError: the job failed, or the losses differ.
    """
    kinds: tuple[Kind, ...] = ("ddp", "zero1") if find_spec("deepspeed") else ("ddp",)
    task = training_job.Task(
        ranks=RANKS, address=address(place), kinds=kinds, backends=(OURS,), steps=steps
    )
    found: dict[Kind, dict[str, list[Step]]] = defaultdict(lambda: defaultdict(list))
    for step in training_job.steps(run(place, training_job.__name__, task)):
        found[step.kind][step.backend].append(step)
    return [_training_case(place, kind, by[GLOO], by[OURS]) for kind, by in found.items()]


def _training_case(place: Place, kind: Kind, gloo: Sequence[Step], ours: Sequence[Step]) -> Case:
    pairs = list(zip(gloo, ours, strict=True))
    apart = max(abs(a.loss - b.loss) / abs(a.loss) for a, b in pairs)
    if apart > SAME_LOSS:
        raise TrimtabError(f"{kind} trains otherwise over plans: a loss is off by {apart:.1e}")
    return Case.compare(
        f"real/{kind}",
        "step_time_s",
        "s",
        "lower",
        GLOO,
        [(a.seconds, b.seconds) for a, b in pairs],
        notes=f"{place.name}; losses are {apart:.1e} apart at most, from {gloo[0].loss:.6g} to"
        f" {gloo[-1].loss:.6g}",
    )


def run(place: Place, module: str, task: Document) -> list[str]:
    """Runs a job on all ranks: what the first one prints, line by line.

    Raises:
        TrimtabError: the job failed.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for name, content in (
            ("task", task),
            ("network", place.network),
            ("constants", place.constants),
        ):
            (folder / f"{name}.json").write_text(content.model_dump_json())
        log = stack.enter_context((folder / "log").open("w"))
        up = None
        if not place.is_here:
            up = stack.enter_context(TreeNetwork(place.network, queue_bytes=place.queue_bytes))
        command = [sys.executable, "-m", module, str(folder / "task.json")]
        processes = []
        for rank in range(len(place.slots)):
            stdout = subprocess.DEVNULL if rank else subprocess.PIPE
            environment = _environment(place, rank, folder)
            if up is not None:
                host = place.slots[rank][0]
                started = up.start(host, command, env=environment, stdout=stdout, stderr=log)
            else:
                started = _start_here(command, environment, stdout, log.fileno())
                stack.callback(_end, started)
            processes.append(started)
        first = processes[0]
        assert first.stdout is not None
        lines = list(first.stdout)
        if first.wait():
            last = ((folder / "log").read_text().strip() or "no message").splitlines()[-1]
            raise TrimtabError(f"the job on {place.name} failed: {last}")
    return lines


def _environment(place: Place, rank: int, folder: Path) -> dict[str, str]:
    host, device = place.slots[rank]
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(device),
        "WORLD_SIZE": str(len(place.slots)),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "GLOO_SOCKET_IFNAME": "lo" if place.is_here else "eth0",
        HOST_VARIABLE: host,
        TOPOLOGY_VARIABLE: str(folder / "network.json"),
        CONSTANTS_VARIABLE: str(folder / "constants.json"),
        ALWAYS_VARIABLE: "0",
    }


def _start_here(
    command: Sequence[str], environment: Mapping[str, str], stdout: int, stderr: int
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=stderr,
        text=True,
        env={**os.environ, **environment},
        start_new_session=True,
    )


def _end(process: subprocess.Popen[str]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def address(place: Place) -> str:
    """``HOST:PORT`` at which the first rank waits for the others."""
    if not place.is_here:
        return f"{place.slots[0][0]}:{PORT}"
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{bound.getsockname()[1]}"


def _shaped(hosts: Sequence[int]) -> Cluster:
    return two_tiers(hosts, host_bytes_per_s=HOST_BYTES_PER_S, uplink_bytes_per_s=HOST_BYTES_PER_S)
