"""From a cluster and a job to a plan: which node has which rank."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NoReturn, cast

import numpy as np

from trimtab.core.cluster import Cluster
from trimtab.core.documents import digest
from trimtab.core.errors import BadInput, Infeasible
from trimtab.core.plan import Figure, Objective, Plan, Slot
from trimtab.placement.affinity import alpha_of
from trimtab.placement.config import Effort
from trimtab.placement.fabric import Fabric, Place, State, domains
from trimtab.placement.grid import Candidate, Demand, PodGrid
from trimtab.placement.job import JobGrid, TrainingJob
from trimtab.placement.layout import HostGrid, lay_out
from trimtab.placement.search import Front, quick_search, search
from trimtab.placement.summary import group_spreads
from trimtab.placement.traffic import communication

Mode = Literal["allocate", "reorder"]
_SAME = 1e-9


@dataclass(frozen=True, slots=True)
class _Pods:
    """The pods a job may use.

    Attributes:
        names: of the pods.
        places: the nodes that may be taken of each, those that stand free first.
        spares: nodes of each that are kept free when the job touches it.
    """

    names: tuple[str, ...]
    places: tuple[tuple[Place, ...], ...]
    spares: int

    def demand(self, grid: JobGrid) -> Demand:
        """The job in units of its blocks."""
        room = (max(0, len(places) - self.spares) // grid.block for places in self.places)
        return Demand(grid.rows // grid.block, grid.columns, tuple(room))

    def cut(self, pod: int, most: int) -> _Pods:
        """With only the first nodes of a pod."""
        places = list(self.places)
        places[pod] = places[pod][:most]
        return replace(self, places=tuple(places))


@dataclass(frozen=True, slots=True)
class _Solved:
    pods: _Pods
    grid: JobGrid
    front: Front


def plan_placement(
    cluster: Cluster,
    job: TrainingJob,
    *,
    alpha: float | None = None,
    mode: Mode = "allocate",
    hosts: Sequence[str] | None = None,
    states: Mapping[str, State] | None = None,
    tier: str | None = None,
    effort: Effort = "full",
) -> Plan:
    """Lays a job's ranks onto a cluster.

    Args:
        cluster: nodes and the network between them.
        job: what is to be trained, and how it is parallel.
        alpha: the weight of data parallel spread; the job's own by default.
        mode: ``allocate`` chooses nodes; ``reorder`` only orders those in ``hosts``.
        hosts: an allocation that a scheduler has fixed.
        states: of nodes that are not free.
        tier: the domains whose crossing costs; the widest by default.
        effort: how long is looked for better placements and proofs.

    Raises:
        BadInput: the cluster, the job or an option is wrong, or two of them do not fit together.
        Infeasible: the free nodes do not hold the job.
    """
    started = time.perf_counter()
    fabric = Fabric.of(cluster, states)
    if mode == "reorder":
        if not hosts:
            raise BadInput("reordering needs the hosts of the allocation", fix="give a hostfile")
        _check_twice(hosts)
        fabric = fabric.only(hosts)
        job = job.sized(len(fabric.places))
    weight = _checked(alpha_of(job) if alpha is None else alpha)
    warnings: list[str] = []
    request = _Request(fabric, job, weight, fabric.tier(tier), effort)
    solved = _solve(request, mode, warnings)
    chosen = solved.front.best(weight)
    hosts_at = lay_out(solved.pods.places, fabric.tier(tier), solved.grid, chosen.grid, weight)
    if mode == "reorder":
        warnings += _left_out(fabric, hosts_at)
    return _plan(
        cluster, job, fabric, solved, chosen, hosts_at, weight, tier, mode, warnings, started
    )


def _checked(alpha: float) -> float:
    if not 0 <= alpha <= 1:  # NaN too
        raise BadInput(
            f"alpha is {alpha:g}", fix="give a weight from 0 (only pipelines count) to 1"
        )
    return alpha


def _check_twice(hosts: Sequence[str]) -> None:
    twice = next((host for host in hosts if list(hosts).count(host) > 1), None)
    if twice is not None:
        raise BadInput(f"the host {twice!r} is given twice", fix="give each host once")


@dataclass(frozen=True, slots=True)
class _Request:
    """A job on a fabric, with what is asked of its placement."""

    fabric: Fabric
    job: TrainingJob
    alpha: float
    tier: int
    effort: Effort

    def attempt(self, usable: Sequence[State]) -> _Solved | None:
        """The front on nodes of some states; None where they do not hold the job."""
        pods, grid = _pods(self.fabric, self.job, self.tier, usable), self.job.grid
        front = search(pods.demand(grid), (self.alpha,), self.effort)
        if front is None and grid.block > 1 and grid.stage_major:
            grid = replace(grid, block=1)
            front = search(pods.demand(grid), (self.alpha,), self.effort)
        return None if front is None else _Solved(pods, grid, front)

    def value(self, front: Front) -> float:
        """The objective of the best placement."""
        return front.best(self.alpha).spread.weighted(self.alpha)


def _solve(request: _Request, mode: Mode, warnings: list[str]) -> _Solved:
    """The front on free nodes, or with movable ones where these make the placement better."""
    fabric, job = request.fabric, request.job
    if job.data_parallel is None:
        raise BadInput("the job has no data_parallel", fix="give it, or order a fixed allocation")
    usable: tuple[State, ...] = ("free", "movable", "busy") if mode == "reorder" else ("free",)
    solved = request.attempt(usable)
    if mode == "allocate" and any(place.state == "movable" for place in fabric.places):
        usable = ("free", "movable")
        solved = _better(request, solved, request.attempt(usable))
    if solved is None:
        _refuse(fabric, job, job.grid, usable)
    if job.tensor_parallel > job.gpus_per_node:
        warnings.append(
            f"tensor_parallel is {job.tensor_parallel} on nodes of {job.gpus_per_node} devices:"
            " tensor groups are placed across nodes."
        )
    if solved.grid.block < job.grid.block:
        warnings.append(
            f"no placement keeps the {job.grid.block} nodes of each tensor, context or expert"
            " group in one domain: some are split."
        )
    return solved


def _better(request: _Request, stays: _Solved | None, moves: _Solved | None) -> _Solved | None:
    """The placement with moved jobs only where it is better; then with as few moves as found."""
    if moves is None:
        return stays
    if stays is not None and request.value(stays.front) <= request.value(moves.front) + _SAME:
        return stays
    return _fewest_moves(request, moves)


def _fewest_moves(request: _Request, solved: _Solved) -> _Solved:
    """Takes movable nodes away, pod after pod, as long as the value stays."""
    target = request.value(solved.front) + _SAME
    for pod, places in enumerate(solved.pods.places):
        low = sum(place.state == "free" for place in places)
        high = len(places)
        while low < high:
            middle = (low + high) // 2
            pods = solved.pods.cut(pod, middle)
            front = quick_search(pods.demand(solved.grid))
            if front is not None and request.value(front) <= target:
                solved, high = _Solved(pods, solved.grid, front), middle
            else:
                low = middle + 1
    return solved


def _pods(fabric: Fabric, job: TrainingJob, tier: int, usable: Sequence[State]) -> _Pods:
    may = [
        place
        for place in fabric.places
        if place.state in usable and place.gpus >= job.ranks_per_node
    ]
    # The sort is stable: nodes that stand free go first, each kind in the fabric's order.
    found = {
        name: tuple(sorted(places, key=lambda place: place.state != "free"))
        for name, places in domains(may, tier).items()
    }
    return _Pods(tuple(found), tuple(found.values()), job.spares_per_pod)


def _refuse(fabric: Fabric, job: TrainingJob, grid: JobGrid, usable: Sequence[State]) -> NoReturn:
    """Raises why the job does not fit, and what would."""
    able = [place for place in fabric.places if place.gpus >= job.ranks_per_node]
    room = sum(place.state in usable for place in able)
    kept = f" with {job.spares_per_pod} spares in each pod" if job.spares_per_pod else ""
    rows = room // grid.columns
    per_row = job.ranks_per_node / (job.tensor_parallel * job.context_parallel)
    replicas = math.floor(rows * per_row) if job.stage_major else 0
    more = f"free {grid.nodes - room} more"
    if len(able) < grid.nodes:
        more = f"take a cluster with {grid.nodes - len(able)} more of them"
    if room >= grid.nodes:
        relaxation = f"keep fewer than {job.spares_per_pod} spares in each pod"
    elif replicas >= 1:
        relaxation = f"data_parallel {replicas} would fit, or {more}"
    else:
        relaxation = more
    drained = [repr(place.name) for place in able if place.state == "drained"]
    # Of a whole cluster these are many, and not what a reader looks for.
    fixed = "busy" in usable and drained
    without = f" ({', '.join(drained)} drained)" if fixed else ""
    raise Infeasible(
        f"the job needs {grid.nodes} nodes of {job.ranks_per_node} devices{kept},"
        f" and {room} of {len(fabric.places)} are free{without}",
        relaxation=relaxation,
    )


def _left_out(fabric: Fabric, hosts_at: HostGrid) -> list[str]:
    left = len(fabric.places) - hosts_at.size
    return [f"{left} of the {len(fabric.places)} hosts have no rank."] if left else []


def _plan(
    cluster: Cluster,
    job: TrainingJob,
    fabric: Fabric,
    solved: _Solved,
    chosen: Candidate,
    hosts_at: HostGrid,
    alpha: float,
    tier: str | None,
    mode: Mode,
    warnings: list[str],
    started: float,
) -> Plan:
    value, bound = chosen.spread.weighted(alpha), solved.front.bound.least(alpha)
    proven = value <= bound + _SAME
    order = node_order(hosts_at, solved.grid)
    tiers = group_spreads(fabric, job, order)
    taken = set(order)
    moved = sorted({p.name for p in fabric.places if p.state == "movable"} & taken)
    if moved:
        warnings.append(f"{len(moved)} nodes must be cleared of jobs that may move.")
    return Plan(
        planner="placement",
        inputs={"cluster": digest(cluster), "job": digest(job)},
        objective=Objective(
            metric="weighted_spread",
            unit="1",
            better="lower",
            value=value,
            bound=bound,
            status="optimal" if proven else "feasible",
            solver=chosen.method,
            wall_s=time.perf_counter() - started,
        ),
        expected={
            "pipeline_spread": Figure(value=chosen.spread.pipeline, unit="pods"),
            "data_spread": Figure(value=chosen.spread.data, unit="pods"),
        },
        ranks=tuple(
            Slot(node=node, device=device) for node in order for device in range(job.ranks_per_node)
        ),
        details=cast(
            dict[str, Any],
            {
                "job": job.model_dump(mode="json"),
                "mode": mode,
                "alpha": alpha,
                "tier": (tier or fabric.tiers[0]) if fabric.tiers else None,
                "grid": _grid_facts(solved.grid),
                "pods": _pod_facts(solved, chosen.grid),
                "cells": chosen.grid.tolist(),
                "front": [
                    {
                        "pipeline": c.spread.pipeline,
                        "data": c.spread.data,
                        "weighted": c.spread.weighted(alpha),
                        "method": c.method,
                    }
                    for c in solved.front.candidates
                ],
                "bound": list(solved.front.bound.least_data),
                "tiers": tiers,
                "communication": communication(fabric, job, order, alpha, fabric.tier(tier)),
                "spares": _spares(solved, chosen.grid, order),
                "moves": moved,
                "paths": {p.name: list(p.path) for p in fabric.places if p.name in taken},
            },
        ),
        warnings=tuple(warnings),
    )


def node_order(hosts_at: HostGrid, grid: JobGrid) -> list[str]:
    """The nodes by node rank."""
    order = [""] * grid.nodes
    for row, column in np.ndindex(grid.rows, grid.columns):
        order[grid.node_rank(row, column)] = str(hosts_at[row, column])
    return order


def _grid_facts(grid: JobGrid) -> dict[str, object]:
    return {"rows": grid.rows, "columns": grid.columns, "block": grid.block}


def _pod_facts(solved: _Solved, cells: PodGrid) -> list[dict[str, object]]:
    used = np.bincount(cells.ravel(), minlength=len(solved.pods.names)) * solved.grid.block
    return [
        {"name": name, "free": len(places), "used": int(taken)}
        for name, places, taken in zip(solved.pods.names, solved.pods.places, used, strict=True)
    ]


def _spares(solved: _Solved, cells: PodGrid, order: Sequence[str]) -> dict[str, list[str]]:
    taken = set(order)
    return {
        solved.pods.names[pod]: [
            place.name for place in solved.pods.places[pod] if place.name not in taken
        ][: solved.pods.spares]
        for pod in np.unique(cells)
        if solved.pods.spares
    }
