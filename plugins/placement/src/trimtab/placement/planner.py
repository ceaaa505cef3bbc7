"""From a cluster and a job to a plan: which node has which rank."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, cast

import numpy as np

from trimtab.core.cluster import Cluster
from trimtab.core.documents import digest, validate
from trimtab.core.errors import BadInput, Infeasible
from trimtab.core.plan import Figure, Objective, Plan, Slot
from trimtab.placement.affinity import alpha_of
from trimtab.placement.config import Effort
from trimtab.placement.fabric import Fabric, Place, State, domains
from trimtab.placement.grid import Candidate, Demand, PodGrid, pareto
from trimtab.placement.job import JobGrid, TrainingJob
from trimtab.placement.layout import HostGrid, lay_out
from trimtab.placement.moves import FewMoves, Room
from trimtab.placement.search import Front
from trimtab.placement.split_blocks import BlockFront, search_blocks
from trimtab.placement.summary import group_spreads
from trimtab.placement.traffic import communication

Mode = Literal["allocate", "reorder"]
_SAME = 1e-9
_FEWER = 64
"""Replicas by which a job is made smaller to find one that fits."""


@dataclass(frozen=True, slots=True)
class _Pods:
    """The pods a job may use.

    Attributes:
        names: of the pods.
        places: the nodes that may be taken of each, those that may be without a move first.
        stays: how many of each may be taken without a move.
        spares: nodes of each that are kept free when the job touches it.
    """

    names: tuple[str, ...]
    places: tuple[tuple[Place, ...], ...]
    stays: tuple[int, ...]
    spares: int

    @property
    def room(self) -> Room:
        """The nodes that pods can give, with moves and without."""
        most = (max(0, len(places) - self.spares) for places in self.places)
        return Room(tuple(stays - self.spares for stays in self.stays), tuple(most))

    @property
    def may_move(self) -> bool:
        """Whether there are nodes that need a move."""
        return any(len(p) > stays for p, stays in zip(self.places, self.stays, strict=True))

    def given(self, cells: PodGrid) -> list[tuple[Place, ...]]:
        """The nodes of each pod among which its cells choose: none moves that need not."""
        used = np.bincount(cells.ravel(), minlength=len(self.names)).tolist()
        return [
            places[: max(stays, taken)]
            for places, stays, taken in zip(self.places, self.stays, used, strict=True)
        ]


@dataclass(frozen=True, slots=True)
class _Solved:
    """The placement that was chosen, among which others, and how many blocks it splits."""

    pods: _Pods
    front: Front
    chosen: Candidate
    split: int


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
        hosts: an allocation that a scheduler has fixed; where nodes are chosen, those among which.
        states: of nodes that are not free.
        tier: the domains whose crossing costs; the widest by default.
        effort: how long is looked for better placements and proofs.

    Raises:
        BadInput: the cluster, the job or an option is wrong, or two of them do not fit together.
        Infeasible: the free nodes do not hold the job.
    """
    started = time.perf_counter()
    fabric = Fabric.of(cluster, states)
    if mode == "reorder" and not hosts:
        raise BadInput("reordering needs the hosts of the allocation", fix="give a hostfile")
    if hosts is not None:
        fabric = fabric.only(_checked_hosts(hosts))
    if mode == "reorder":
        job = job.sized(len(fabric.places))
    if job.data_parallel is None:
        raise BadInput("the job has no data_parallel", fix="give it, or order a fixed allocation")
    weight = _checked(alpha_of(job) if alpha is None else alpha)
    pods = _pods(fabric, job, fabric.tier(tier), mode)
    solved = _solve(_Request(job, pods, weight, effort))
    if solved is None:
        _refuse(fabric, job, pods, mode)
    warnings = _told(job, solved)
    cells = solved.chosen.grid
    hosts_at = lay_out(pods.given(cells), fabric.tier(tier), job.grid.block, cells, weight)
    if mode == "reorder":
        warnings += _left_out(fabric, hosts_at)
    if not fabric.tiers:
        warnings.append("There is no network that tells the nodes apart: any order is as good.")
    return _plan(cluster, job, fabric, solved, hosts_at, weight, tier, mode, warnings, started)


def _checked(alpha: float) -> float:
    if not 0 <= alpha <= 1:  # NaN too
        raise BadInput(
            f"alpha is {alpha:g}", fix="give a weight from 0 (only pipelines count) to 1"
        )
    return alpha


def _checked_hosts(hosts: Sequence[str]) -> Sequence[str]:
    if not hosts:
        raise BadInput("there are no hosts to choose among", fix="give the names of nodes")
    twice = next((host for host, times in Counter(hosts).items() if times > 1), None)
    if twice is not None:
        raise BadInput(f"the host {twice!r} is given twice", fix="give each host once")
    return hosts


@dataclass(frozen=True, slots=True)
class _Request:
    """A job on the pods of a fabric, with what is asked of its placement."""

    job: TrainingJob
    pods: _Pods
    alpha: float
    effort: Effort

    def attempt(self, capacities: Sequence[int], effort: Effort | None = None) -> BlockFront | None:
        """The front on pods of so many nodes; None where they do not hold the job."""
        grid = self.job.grid
        demand = Demand(grid.rows, grid.columns, tuple(capacities))
        return search_blocks(demand, grid.block, self.alpha, effort or self.effort)

    def rank(self, found: BlockFront) -> tuple[int, float]:
        """Placements that split fewer blocks are better, then those of less weighted spread."""
        return found.split, round(found.front.best(self.alpha).spread.weighted(self.alpha), 9)


def _solve(request: _Request) -> _Solved | None:
    """The placement without moves, or with moves where these make it better; None without room."""
    pods, room = request.pods, request.pods.room
    stays = request.attempt(room.with_moves((0,) * len(room.stays)))
    if not pods.may_move:
        if stays is None:
            return None
        return _Solved(pods, stays.front, stays.front.best(request.alpha), stays.split)
    moves = request.attempt(room.most)
    if moves is None:
        return None
    # No placement without moves is better than all with them, so that the bound holds for both.
    bound = moves.front.bound
    if stays is not None and request.rank(stays) <= request.rank(moves):
        chosen = stays.front.best(request.alpha)
        return _Solved(pods, Front(stays.front.candidates, bound), chosen, stays.split)
    chosen = _fewest_moves(request, moves)
    others = (c for c in moves.front.candidates if not c.spread.dominates(chosen.spread))
    front = Front(tuple(pareto([chosen, *(c for c in others if c.spread != chosen.spread)])), bound)
    return _Solved(pods, front, chosen, moves.split)


def _fewest_moves(request: _Request, best: BlockFront) -> Candidate:
    """A placement as good as the best one, with as few moves as are found."""

    def solve(capacities: Sequence[int], effort: Effort) -> Front | None:
        found = request.attempt(capacities, effort)
        return found.front if found is not None and found.split <= best.split else None

    alpha = request.alpha
    search = FewMoves(
        request.pods.room,
        request.job.grid.nodes,
        alpha,
        best.front.best(alpha).spread.weighted(alpha),
        solve,
        request.effort,
    )
    return search.fewest(best.front.candidates)


def _pods(fabric: Fabric, job: TrainingJob, tier: int, mode: Mode) -> _Pods:
    """The pods with the nodes that a job may have: all that are not drained of an allocation."""
    usable = {"free", "movable", "busy"} if mode == "reorder" else {"free", "movable"}
    may = [p for p in fabric.places if p.state in usable and p.gpus >= job.ranks_per_node]
    moves = {p.name for p in may if mode == "allocate" and p.state == "movable"}
    # The sort is stable, so that each kind is in the fabric's order.
    found = {
        name: tuple(sorted(places, key=lambda place: place.name in moves))
        for name, places in domains(may, tier).items()
    }
    stays = (sum(p.name not in moves for p in places) for places in found.values())
    return _Pods(tuple(found), tuple(found.values()), tuple(stays), job.spares_per_pod)


def _told(job: TrainingJob, solved: _Solved) -> list[str]:
    """What a reader should know of groups that lie across nodes or pods."""
    told = []
    if job.tensor_parallel > job.gpus_per_node:
        told.append(
            f"tensor_parallel is {job.tensor_parallel} on nodes of {job.gpus_per_node} devices:"
            " tensor groups are placed across nodes."
        )
    if solved.split:
        grid = job.grid
        told.append(
            f"the {grid.block} nodes of a tensor, context or expert group should be in one domain:"
            f" {solved.split} of {grid.nodes // grid.block} such blocks are split between domains,"
            " as few as can be."
        )
    return told


def _refuse(fabric: Fabric, job: TrainingJob, pods: _Pods, mode: Mode) -> NoReturn:
    """Raises why the job does not fit, and what would."""
    grid = job.grid
    able = [place for place in fabric.places if place.gpus >= job.ranks_per_node]
    room = sum(map(len, pods.places))
    kept = f" with {job.spares_per_pod} spares in each pod" if job.spares_per_pod else ""
    rows = room // grid.columns
    per_row = job.ranks_per_node / (job.tensor_parallel * job.context_parallel)
    replicas = _most_replicas(job, math.floor(rows * per_row)) if job.stage_major else 0
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
    fixed = mode == "reorder" and drained
    without = f" ({', '.join(drained)} drained)" if fixed else ""
    raise Infeasible(
        f"the job needs {grid.nodes} nodes of {job.ranks_per_node} devices{kept},"
        f" and {room} of {len(fabric.places)} are free{without}",
        relaxation=relaxation,
    )


def _most_replicas(job: TrainingJob, most: int) -> int:
    """At most so many replicas that the job's other degrees allow; 0 where a few fewer do not."""
    for replicas in range(most, max(0, most - _FEWER), -1):
        with suppress(BadInput):
            validate(TrainingJob, job.model_dump() | {"data_parallel": replicas}, where="job")
            return replicas
    return 0


def _left_out(fabric: Fabric, hosts_at: HostGrid) -> list[str]:
    left = len(fabric.places) - hosts_at.size
    return [f"{left} of the {len(fabric.places)} hosts have no rank."] if left else []


def _plan(
    cluster: Cluster,
    job: TrainingJob,
    fabric: Fabric,
    solved: _Solved,
    hosts_at: HostGrid,
    alpha: float,
    tier: str | None,
    mode: Mode,
    warnings: list[str],
    started: float,
) -> Plan:
    chosen, pods = solved.chosen, solved.pods
    value, bound = chosen.spread.weighted(alpha), solved.front.bound.least(alpha)
    proven = value <= bound + _SAME
    order = node_order(hosts_at, job.grid)
    tiers = group_spreads(fabric, job, order)
    taken = set(order)
    spares = _spares(pods, chosen.grid, order)
    needed = taken.union(*spares.values())
    moved = sorted({p.name for p in fabric.places if p.state == "movable"} & needed)
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
                "grid": _grid_facts(job.grid),
                "split_blocks": solved.split,
                "pods": _pod_facts(pods, chosen.grid),
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
                "spares": spares,
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


def _pod_facts(pods: _Pods, cells: PodGrid) -> list[dict[str, object]]:
    used = np.bincount(cells.ravel(), minlength=len(pods.names)).tolist()
    known = zip(pods.names, pods.places, pods.stays, used, strict=True)
    return [
        {"name": name, "free": stays, "movable": len(places) - stays, "used": taken}
        for name, places, stays, taken in known
    ]


def _spares(pods: _Pods, cells: PodGrid, order: Sequence[str]) -> dict[str, list[str]]:
    taken = set(order)
    return {
        pods.names[pod]: [place.name for place in pods.places[pod] if place.name not in taken][
            : pods.spares
        ]
        for pod in np.unique(cells)
        if pods.spares
    }
