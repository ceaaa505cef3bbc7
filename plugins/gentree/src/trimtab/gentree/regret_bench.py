"""How far the chosen plan is from the best that was measured, on networks of several kinds."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from statistics import fmean, median

import numpy as np

from trimtab.core.benchmark import Case, Options, Progress
from trimtab.core.cluster import Cluster
from trimtab.core.collectives import Layout, NetworkTree, Schedule, Step
from trimtab.core.collectives.combine import ring, staged
from trimtab.gentree.baselines import baselines
from trimtab.gentree.gentree import PAPER
from trimtab.gentree.planner import choose, leaf_order
from trimtab.gentree.real_bench import (
    HOST_BYTES_PER_S,
    LONG_QUEUE_BYTES,
    OURS,
    SHORT_QUEUE_BYTES,
    Place,
    address,
    run,
)
from trimtab.gentree.schemes import factorisations
from trimtab.hosts.testbed import allreduce_job, obstacle, two_tiers
from trimtab.hosts.testbed.allreduce_job import Race
from trimtab.hosts.testbed.ranked_job import GLOO

REPEATS = {2**18: 7, 2**21: 5}
"""How often each plan of each size is timed."""

Seconds = Mapping[str, Sequence[float]]


def networks(repeats: Mapping[int, int] = REPEATS) -> list[Place]:
    """Twelve networks: one switch or several racks, slow and fast uplinks, ranks in any order."""

    def racks(
        name: str,
        hosts: Sequence[int],
        order: Sequence[int] | None = None,
        *,
        uplink: float = 1,
        queue_bytes: int = 256 * 1024,
    ) -> Place:
        network: Cluster = two_tiers(
            hosts,
            host_bytes_per_s=HOST_BYTES_PER_S,
            uplink_bytes_per_s=uplink * HOST_BYTES_PER_S,
        )
        slots = tuple((f"h{number}", 0) for number in order or range(sum(hosts)))
        return Place(name, network, slots, repeats, queue_bytes)

    pairs, alternating = (0, 4, 1, 5, 2, 6, 3, 7), (0, 3, 6, 1, 4, 7, 2, 5)
    return [
        racks("star-8/short-queue", [8], queue_bytes=SHORT_QUEUE_BYTES),
        racks("star-8/long-queue", [8], queue_bytes=LONG_QUEUE_BYTES),
        racks("star-5/short-queue", [5], queue_bytes=SHORT_QUEUE_BYTES),
        racks("star-6/long-queue", [6], queue_bytes=LONG_QUEUE_BYTES),
        racks("racks-4-4/in-order", [4, 4]),
        racks("racks-4-4/interleaved", [4, 4], pairs),
        racks("racks-4-4/fast-uplinks/interleaved", [4, 4], pairs, uplink=2),
        racks("racks-4-4/slow-uplinks/in-order", [4, 4], uplink=0.5),
        racks("racks-5-3/in-order", [5, 3]),
        racks("racks-3-3-2/in-order", [3, 3, 2]),
        racks("racks-3-3-2/interleaved", [3, 3, 2], alternating),
        racks("racks-2-2-2-2/interleaved", [2, 2, 2, 2], (0, 2, 4, 6, 1, 3, 5, 7)),
    ]


def rivals(place: Place, payload_bytes: int) -> dict[str, Schedule]:
    """Plans to be measured beside the chosen one, none of them twice.

    Those of libraries, a ring and every staged exchange on the hosts in the network's order, and
    GenTree's as published.
    """
    tree = NetworkTree.of_cluster(place.network, place.slots)
    order = leaf_order(tree, place.slots)
    parties = [Layout.whole(leaf) for leaf in range(tree.size)]
    steps: dict[str, Sequence[Step]] = dict(baselines(tree, order))
    steps["ring by places"] = [ring(parties)[0]]
    for factors in factorisations(tree.size):
        steps[f"{'x'.join(map(str, factors))} by places"] = staged(parties, factors)[0]
    rank_of = np.empty(tree.size, dtype=np.int64)
    rank_of[order] = np.arange(tree.size)
    found = {
        name: Schedule.of(tree.size, [step.renumbered(rank_of) for step in plan])
        for name, plan in steps.items()
    }
    published = choose(tree, payload_bytes, place.constants, order=order, search=PAPER)
    found["as published"] = published.schedule
    names: dict[str, str] = {}
    for name, schedule in found.items():
        names.setdefault(schedule.model_dump_json(), name)
    return {name: found[name] for name in names.values()}


def regret_cases(options: Options, progress: Progress) -> list[Case]:
    """How many times as long as the best plan the backend's own choice and gloo take.

    Raises:
        TrimtabError: a job failed.
    """
    if options.quick or obstacle() or find_spec("torch") is None:
        return []
    cases = []
    for place in networks():
        progress(f"the chosen plan beside others: {place.name}")
        cases += measured(place)
    return [*cases, on_average(cases)]


def measured(place: Place) -> list[Case]:
    """A case for each size on one network.

    Raises:
        TrimtabError: the job failed.
    """
    plans = place.plans()
    chosen = {size: plans.schedule(size) for size in place.repeats}
    races = tuple(
        Race(
            payload_bytes=size,
            schedules={n: s for n, s in rivals(place, size).items() if s != chosen[size]},
            repeats=repeats,
        )
        for size, repeats in place.repeats.items()
    )
    task = allreduce_job.Task(
        ranks=len(place.slots), address=address(place), backends=(OURS,), races=races
    )
    seconds: dict[int, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for timing in allreduce_job.timings(run(place, allreduce_job.__name__, task)):
        seconds[timing.payload_bytes][timing.algorithm].append(timing.seconds)
    return [compared(place, size, chosen[size], found) for size, found in seconds.items()]


def compared(place: Place, size: int, chosen: Schedule | None, seconds: Seconds) -> Case:
    """The backend's choice beside gloo, both as multiples of the plan with the best median."""
    # Where gloo was chosen, it is no rival: its times differ from ours by chance alone.
    others = [name for name in seconds if chosen is not None or name != GLOO]
    best = min(others, key=lambda name: median(seconds[name]))
    turns = zip(seconds[GLOO], seconds[OURS], seconds[best], strict=True)
    what = "gloo" if chosen is None else f"a plan of {len(chosen.steps)} steps"
    return Case.compare(
        f"real/regret/{place.name}/{size}-bytes",
        "times_best",
        "1",
        "lower",
        GLOO,
        [(gloo / least, ours / least) for gloo, ours, least in turns],
        lower_bound=1,
        notes=f"chosen was {what}, the best of {len(others)} was"
        f" {'the chosen one' if best == OURS else best}",
    )


def on_average(cases: Sequence[Case]) -> Case:
    """The mean over networks and sizes, and the worst of them."""
    worst = max(cases, key=lambda case: case.value)
    return Case.compare(
        "real/regret/mean",
        "times_best",
        "1",
        "lower",
        GLOO,
        [(fmean(case.baseline_value for case in cases), fmean(case.value for case in cases))],
        lower_bound=1,
        notes=f"over {len(cases)} networks and sizes; the worst is {worst.value:.2f} on"
        f" {worst.case.removeprefix('real/regret/')}",
    )
