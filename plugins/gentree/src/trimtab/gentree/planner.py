"""From a cluster and sizes of the payload to a plan of AllReduce."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from pydantic import JsonValue

from trimtab.core.cluster import Cluster
from trimtab.core.collectives import NetworkTree, Schedule
from trimtab.core.cost import Constants, PlanCost, PlanEvaluator, allreduce_bound_s
from trimtab.core.documents import Document, digest
from trimtab.core.errors import BadInput
from trimtab.core.plan import Figure, Objective, Plan, Slot
from trimtab.gentree.baselines import baselines
from trimtab.gentree.gentree import GenTree, Search
from trimtab.gentree.overtaking import Reign, reigns

MIN_BYTES, MAX_BYTES = 1, 2**40

_MOST_COMPARED = 4096
"""Plans of more ranks are not compared with the algorithms of libraries."""


@dataclass(frozen=True)
class Choice:
    """The plan that was chosen for a size of the payload.

    Attributes:
        payload_bytes: on each rank.
        schedule: what the ranks do.
        cost: of it.
        seconds: how long it takes, with the schedule's chunks.
        bound_s: what no AllReduce on this network can beat.
        switches: what each kind of switch does, by the name of one, from the lowest.
        baselines_s: how long the algorithms of libraries take, by name.
    """

    payload_bytes: float
    schedule: Schedule
    cost: PlanCost
    seconds: float
    bound_s: float
    switches: tuple[tuple[str, str], ...]
    baselines_s: Mapping[str, float]


class PlannedSize(Document):
    """A size of the payload in a plan's details."""

    payload_bytes: float
    seconds: float
    bound_s: float
    switches: tuple[tuple[str, str], ...]
    baselines_s: Mapping[str, float]
    rounds: int
    width: int
    schedule: Schedule


def choose(
    tree: NetworkTree,
    payload_bytes: float,
    constants: Constants,
    *,
    order: Sequence[int] | None = None,
    search: Search | None = None,
) -> Choice:
    """The best plan found for one size of the payload.

    Args:
        tree: the network.
        payload_bytes: on each rank.
        constants: of GenModel.
        order: the leaf of each rank; the tree's own order by default.
        search: how far the search goes.

    Raises:
        BadInput: the order does not name each leaf once.
    """
    leaves = list(range(tree.size)) if order is None else list(order)
    if sorted(leaves) != list(range(tree.size)):
        raise BadInput(
            f"the order of {len(leaves)} ranks does not name each of {tree.size} leaves once",
            fix="give each rank a leaf of its own",
        )
    search = search or Search()
    grown = GenTree(tree, constants, payload_bytes, search).best()
    evaluator, cost = PlanEvaluator(tree, constants), grown.cost
    chunks = cost.best_chunks(payload_bytes) if search.chunks else 1
    rank_of = np.empty(tree.size, dtype=np.int64)
    rank_of[leaves] = np.arange(tree.size)
    schedule = Schedule.of(tree.size, [s.renumbered(rank_of) for s in grown.steps], chunks)
    compared = baselines(tree, leaves) if tree.size <= _MOST_COMPARED else {}
    return Choice(
        payload_bytes,
        schedule,
        cost,
        cost.seconds(payload_bytes, chunks),
        allreduce_bound_s(tree, constants, payload_bytes),
        grown.choices,
        {name: evaluator.cost(steps).seconds(payload_bytes) for name, steps in compared.items()},
    )


def plan_allreduce(
    cluster: Cluster,
    sizes_bytes: Sequence[float],
    *,
    constants: Constants | None = None,
    slots: Sequence[tuple[str, int]] | None = None,
    search: Search | None = None,
    breakpoints: bool = False,
) -> Plan:
    """Plans the AllReduce of a job on a cluster.

    Args:
        cluster: its links form a tree.
        sizes_bytes: of the payload on each rank; the plan has steps for each.
        constants: of GenModel.
        slots: node and device of each rank, in rank order; all devices by default.
        search: how far the search goes.
        breakpoints: whether the plan says from which size on which steps are best.

    Raises:
        BadInput: the links form no tree, there is no such slot, or a size is out of range.
    """
    for size in sizes_bytes:
        if not MIN_BYTES <= size <= MAX_BYTES:
            raise BadInput(f"the size is {size:g} bytes", fix="give from 1 byte to 1 TiB")
    started = time.perf_counter()
    constants = constants or Constants()
    ranks = _ranks(cluster, slots)
    tree = NetworkTree.of_cluster(cluster, ranks)
    order = leaf_order(tree, ranks)
    choices = [
        choose(tree, size, constants, order=order, search=search) for size in sorted(sizes_bytes)
    ]
    largest = choices[-1]
    reigning = reigns(tree, constants, search) if breakpoints else []
    return Plan(
        planner="allreduce",
        inputs={"cluster": digest(cluster), "constants": digest(constants)},
        objective=Objective(
            metric="allreduce_s",
            unit="s",
            better="lower",
            value=largest.seconds,
            bound=largest.bound_s,
            solver="gentree",
            wall_s=time.perf_counter() - started,
        ),
        expected=_expected(choices),
        ranks=tuple(Slot(node=node, device=device) for node, device in ranks),
        details={
            "constants": constants.model_dump(mode="json"),
            "sizes": [_planned(choice) for choice in choices],
            "breakpoints": [reign.model_dump(mode="json") for reign in reigning],
        },
    )


def planned_sizes(plan: Plan) -> list[PlannedSize]:
    """The sizes of a plan of AllReduce, in rising order.

    Raises:
        BadInput: the plan is another planner's, or was changed by hand.
    """
    from trimtab.core.documents import validate

    if plan.planner != "allreduce":
        raise BadInput(
            f"the plan is one of the planner {plan.planner!r}",
            fix="give a plan of trimtab plan allreduce",
        )
    return validate(list[PlannedSize], plan.details.get("sizes"), where="details.sizes")


def planned_breakpoints(plan: Plan) -> list[Reign]:
    """Which steps are best from which size on; empty where the plan was not asked for it.

    Raises:
        BadInput: the plan was changed by hand.
    """
    from trimtab.core.documents import validate

    return validate(list[Reign], plan.details.get("breakpoints", []), where="details.breakpoints")


def leaf_order(tree: NetworkTree, slots: Sequence[tuple[str, int]]) -> list[int]:
    """The leaf of each rank."""
    leaf_of = {name: leaf for leaf, name in enumerate(tree.leaf_names)}
    # A node of which one device takes part has no point for it.
    return [leaf_of.get(f"{node}/{device}", leaf_of.get(node, -1)) for node, device in slots]


def _ranks(cluster: Cluster, slots: Sequence[tuple[str, int]] | None) -> list[tuple[str, int]]:
    if slots is None:
        return [(node.name, index) for node in cluster.nodes for index in range(node.count)]
    twice = next((slot for slot, count in Counter(slots).items() if count > 1), None)
    if twice is not None:
        raise BadInput(f"device {twice[1]} of {twice[0]!r} is given two ranks", fix="give it one")
    if not slots:
        raise BadInput("the job has no rank", fix="name at least one host")
    return list(slots)


def _expected(choices: Sequence[Choice]) -> dict[str, Figure]:
    found: dict[str, Figure] = {}
    for choice in choices:
        size = f"{choice.payload_bytes:.0f}"
        found[f"allreduce_s.{size}"] = Figure(value=choice.seconds, unit="s")
    return found


def _planned(choice: Choice) -> dict[str, JsonValue]:
    planned = PlannedSize(
        payload_bytes=choice.payload_bytes,
        seconds=choice.seconds,
        bound_s=choice.bound_s,
        switches=choice.switches,
        baselines_s=choice.baselines_s,
        rounds=choice.cost.rounds,
        width=choice.cost.width,
        schedule=choice.schedule,
    )
    dumped: dict[str, JsonValue] = planned.model_dump(mode="json")
    return dumped
