"""The reservation queue: other jobs run around a large one that was announced.

Algorithm 1 of Arnold (arXiv:2509.15940). When the large job is announced its placement is solved
over what will be free by then, and each pod gets a quota of reserved nodes. Others start outside
the reserved zone, or inside it where they will have ended in time. It differs from the published
algorithm where that needs it:

- A time is compared with a time: now + the time's quantile + a margin <= the arrival. The paper
  compares a duration with a time, and its mean is overrun by half of the jobs.
- Many small chances make a large one, so those of all jobs let into the zone are bounded together.
- The quotas are fixed, the nodes are not: within a pod the zone moves to the nodes that are surest
  to be free, which leaves the spread as it is.
- Waiting jobs age, and one that waited too long is overtaken no more.
"""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from trimtab.core.documents import Document
from trimtab.core.simulate.cluster_jobs import (
    ClusterState,
    Flags,
    JobRequest,
    Nodes,
    Preempt,
    Running,
    Start,
    best_fit,
)
from trimtab.placement.grid import Candidate, Demand, PodGrid, Spread, pareto
from trimtab.placement.job_time import Ended, JobTimes, learned
from trimtab.placement.strips import strip_covers

_SURE = (0.0, 0.005, 0.02, 0.1, 0.3, 1.0)
"""Chances of being held on arrival up to which a node is counted as free: the first that does."""

_SOON_S = 1800.0
"""A job that found its nodes held looks for those that are likely free within this time."""


class ReservationOptions(Document):
    """How the reservation queue decides.

    Attributes:
        backfill: whether jobs that will have ended may start in the reserved zone.
        quantile: of a job's time that must end before the arrival.
        margin_s: time for a job's end to be noticed and its nodes to be cleaned.
        risk: chance that any of the jobs let into the zone is late, all together.
        ageing_s: a waiting job gains one step of priority in this time.
        patience_s: a job that waited so long is overtaken no more; infinity for never.
        alpha: weight of the large job's data-parallel spread.
        interval_s: the zone moves to surer nodes this often at most.
        replan_s: while a node of the zone may be held, its quotas are solved this often at most.
        preempt: whether preemptible jobs in the zone are ended on arrival.
    """

    backfill: bool = True
    quantile: float = Field(0.9, gt=0, lt=1)
    margin_s: float = Field(300.0, ge=0)
    risk: float = Field(0.02, ge=0, le=1)
    ageing_s: float = Field(86400.0, gt=0)
    patience_s: float = Field(21600.0, gt=0)
    alpha: float = Field(0.3, ge=0, le=1)
    interval_s: float = Field(60.0, ge=0)
    replan_s: float = Field(300.0, ge=0)
    preempt: bool = False


@dataclass(frozen=True, slots=True)
class Arrival:
    """What a large job met when it arrived.

    Attributes:
        reserved: nodes that were kept for it.
        retained: those of them that others still held.
        overdue: the jobs that held them.
    """

    reserved: int
    retained: int
    overdue: tuple[str, ...]


@dataclass
class _Zone:
    """The nodes kept for one large job."""

    request: JobRequest
    quotas: Nodes
    nodes: Flags
    admitted: set[str] = field(default_factory=set)
    planned_s: float = -math.inf
    unsure: bool = True
    settled_s: float = -math.inf

    def due_s(self, now_s: float, horizon_s: float) -> float:
        """When its nodes should be free: on arrival, or soon where that has passed."""
        arrival_s = self.request.arrival_s
        return arrival_s if now_s < arrival_s else now_s + horizon_s

    @property
    def turn(self) -> tuple[float, str]:
        """The order in which announced jobs start; one that arrived waits for none behind it."""
        return self.request.arrival_s, self.request.job_id


Chances = NDArray[np.float64]
"""The chance that each node is still held; shape (nodes,)."""
Learner = Callable[[Sequence[Ended]], JobTimes]


def best_grid(request: JobRequest, capacities: Sequence[int], alpha: float) -> Candidate | None:
    """The least spread placement of a job's grid on pods with so many free nodes, if any."""
    columns = request.pipeline_stages
    demand = Demand(request.nodes // columns, columns, tuple(int(c) for c in capacities))
    if sum(demand.capacities) < demand.cells:
        return None
    front = pareto(list(strip_covers(demand)))
    if front:
        return min(front, key=lambda candidate: candidate.spread.weighted(alpha))
    # Pods too small for a strip: filled one after another.
    pods = np.argsort(-np.array(demand.capacities), kind="stable")
    filled = np.repeat(pods, np.array(demand.capacities)[pods])[: demand.cells]
    return Candidate.built(demand, filled.reshape(demand.rows, demand.columns), "filled")


def spread_on(request: JobRequest, pod_of_nodes: Sequence[int], alpha: float) -> Spread:
    """The least spread that a job can have on the nodes it got, by their pods."""
    found = best_grid(request, np.bincount(pod_of_nodes).tolist(), alpha)
    assert found is not None
    return found.spread


class ReservationQueue:
    """A cluster policy that keeps nodes for announced jobs.

    Args:
        options: how it decides.
        history: jobs that ended before the simulation began, to learn times from.
        learner: makes the predictor from jobs that ended, whenever a job is announced.

    Attributes:
        arrivals: what each announced job met, by id.
    """

    def __init__(
        self,
        options: ReservationOptions | None = None,
        *,
        history: Sequence[Ended] = (),
        learner: Learner = learned,
    ) -> None:
        self.options = options or ReservationOptions()
        self.arrivals: dict[str, Arrival] = {}
        self._ended = list(history)
        self._learner = learner
        self._times: JobTimes | None = None
        self._zones: dict[str, _Zone] = {}
        self._queue: list[JobRequest] = []

    def on_end(self, request: JobRequest, held_s: float, completed: bool) -> None:
        """See `ClusterPolicy`; a job ended at its limit says only that it would run longer."""
        self._ended.append((request, held_s))

    def on_wait(self, request: JobRequest) -> None:
        """See `ClusterPolicy`: by priority with age, then arrival.

        All waiting jobs age alike, so their order does not change while they wait.
        """
        ageing_s = self.options.ageing_s
        insort(
            self._queue,
            request,
            key=lambda r: (r.arrival_s - r.priority * ageing_s, r.arrival_s),
        )

    def decide(self, state: ClusterState) -> list[Start | Preempt]:
        """See `ClusterPolicy`; algorithm 1 of the paper, asked at each event."""
        self._reserve(state)
        turn = _Turn(self.options, self._times, self._zones, state)
        actions = self._start_announced(state, turn)
        left: list[JobRequest] = []
        for place_in_queue, request in enumerate(self._queue):
            if request.job_id in self._zones:
                left.append(request)
                continue
            nodes = turn.place(request)
            if nodes is not None:
                turn.take(nodes)
                actions.append(Start(request.job_id, nodes))
                continue
            left.append(request)
            if state.now_s - request.arrival_s >= self.options.patience_s or not turn.free_nodes:
                left += self._queue[place_in_queue + 1 :]
                break
        self._queue = left
        return actions

    def _reserve(self, state: ClusterState) -> None:
        """Opens zones for newly announced jobs, and moves the open ones to the surest nodes."""
        for request in state.announced.values():
            if request.job_id not in self._zones:
                self._times = self._learner(self._ended)
                nothing = np.zeros(len(state.free), dtype=bool)
                quotas = np.zeros(int(state.pod_of[-1]) + 1, dtype=np.int64)
                self._zones[request.job_id] = _Zone(request, quotas, nothing)
                self._settle(state, self._zones[request.job_id])
        for zone in self._zones.values():
            arrived = zone.request.arrival_s <= state.now_s
            if arrived and zone.request.job_id not in self.arrivals:
                self._note_arrival(state, zone)
            # While a node of the zone is unsure, each one that gets free may take its place.
            due = zone.unsure or state.now_s - zone.settled_s >= self.options.interval_s
            if (arrived or self.options.backfill) and due:
                self._settle(state, zone)

    def _settle(self, state: ClusterState, zone: _Zone) -> None:
        """Chooses a zone's nodes by how sure they are to be free, and its quotas where need be."""
        zone.settled_s = state.now_s
        held = self._chances(state, zone)
        for other in self._zones.values():
            if other is not zone:
                held[other.nodes] = 1.0
        self._renew_quotas(state, zone, held)
        order = np.lexsort((_preference(held, state.free, self.options.risk), state.pod_of))
        pods = state.pod_of[order]
        first = np.searchsorted(pods, np.arange(len(zone.quotas)))
        within = np.arange(len(order)) - first[pods]
        zone.nodes = np.zeros(len(order), dtype=bool)
        zone.nodes[order[within < zone.quotas[pods]]] = True
        zone.unsure = bool((held[zone.nodes] > self.options.risk / 500).any())

    def _renew_quotas(self, state: ClusterState, zone: _Zone, chances: Chances) -> None:
        expected = _expected_held(zone.quotas, chances, state.pod_of)
        planned = bool(zone.quotas.any())
        if planned and expected <= self.options.risk:
            return
        if state.now_s - zone.planned_s < self.options.replan_s:
            return
        zone.planned_s = state.now_s
        for chance in _SURE:
            free = np.bincount(state.pod_of[chances <= chance], minlength=len(zone.quotas))
            found = best_grid(zone.request, free.tolist(), self.options.alpha)
            if found is None:
                continue
            quotas = np.bincount(found.grid.ravel(), minlength=len(zone.quotas))
            then = _expected_held(quotas, chances, state.pod_of)
            if not planned or then < expected:
                zone.quotas = quotas
            return

    def _chances(self, state: ClusterState, zone: _Zone) -> Chances:
        """The chance that each node is still held when the large job arrives; shape (nodes,)."""
        chances = np.zeros(len(state.free))
        due_s = zone.due_s(state.now_s, _SOON_S)
        for running in state.running.values():
            chances[running.nodes] = late(self._times, running, due_s, state.now_s)
        return chances

    def _note_arrival(self, state: ClusterState, zone: _Zone) -> None:
        late_nodes = zone.nodes & ~state.free
        overdue = tuple(
            job_id for job_id, running in state.running.items() if late_nodes[running.nodes].any()
        )
        self.arrivals[zone.request.job_id] = Arrival(
            int(zone.nodes.sum()), int(late_nodes.sum()), overdue
        )

    def _start_announced(self, state: ClusterState, turn: _Turn) -> list[Start | Preempt]:
        """Starts the large jobs that arrived and whose nodes, or others as good, are free."""
        actions: list[Start | Preempt] = []
        arrived = [zone for job_id, zone in self._zones.items() if job_id in state.waiting]
        for zone in sorted(arrived, key=lambda zone: zone.turn):
            request = zone.request
            if self.options.preempt:
                actions += turn.clear(zone)
            nodes = turn.grid_nodes(zone)
            if nodes is not None:
                turn.take(nodes)
                del self._zones[request.job_id]
                self._queue.remove(request)
                turn.forget(zone)
                actions.append(Start(request.job_id, nodes))
        return actions


def late(times: JobTimes | None, running: Running, arrival_s: float, now_s: float) -> float:
    """The chance that a running job still holds its nodes at an arrival."""
    ran_s = now_s - running.started_s
    if times is None:
        return 1.0
    return times.exceeds(running.request, arrival_s - running.started_s, ran_s)


def _expected_held(quotas: Nodes, chances: Chances, pod_of: Nodes) -> float:
    """How many nodes of a zone with such quotas are held on arrival, if it takes the surest."""
    order = np.lexsort((chances, pod_of))
    pods = pod_of[order]
    within = np.arange(len(order)) - np.searchsorted(pods, np.arange(len(quotas)))[pods]
    return float(chances[order][within < quotas[pods]].sum())


def _preference(chances: Chances, free: Flags, risk: float) -> Chances:
    """Which nodes a zone takes first: held ones that surely end, free ones, the rest."""
    safe = ~free & (chances <= risk / 500)
    preference: Chances = np.where(free, 1.0, np.where(safe, chances, 2.0 + chances))
    return preference


class _Turn:
    """One decision: what is still free, and what may still be risked."""

    def __init__(
        self,
        options: ReservationOptions,
        times: JobTimes | None,
        zones: dict[str, _Zone],
        state: ClusterState,
    ) -> None:
        self._options = options
        self._times = times
        self._state = state
        self._free = state.free.copy()
        self._zones = dict(zones)
        self._outside = self._free.copy()
        for zone in zones.values():
            self._outside &= ~zone.nodes
        self._count()
        self._too_long: set[tuple[object, ...]] = set()
        self._risked: dict[str, float] = {}
        self._preempted: set[str] = set()

    def take(self, nodes: Nodes) -> None:
        """Nodes were given out."""
        self._free[nodes] = False
        self._outside[nodes] = False
        self._count()

    def forget(self, zone: _Zone) -> None:
        """A zone's job started."""
        del self._zones[zone.request.job_id]
        self._outside = self._free.copy()
        for other in self._zones.values():
            self._outside &= ~other.nodes
        self._count()

    def _count(self) -> None:
        self.free_nodes, self._outside_nodes = int(self._free.sum()), int(self._outside.sum())

    def clear(self, zone: _Zone) -> list[Start | Preempt]:
        """Ends the preemptible jobs that hold nodes of a zone, if that frees all of them."""
        holders = {
            job_id: running
            for job_id, running in self._state.running.items()
            if zone.nodes[running.nodes].any() and job_id not in self._preempted
        }
        cleared = self._free.copy()
        for running in holders.values():
            cleared[running.nodes] |= running.request.preemptible
        if not cleared[zone.nodes].all():
            return []
        for job_id, running in holders.items():
            self._free[running.nodes] = True
            self._preempted.add(job_id)
        self._count()
        return [Preempt(job_id) for job_id in holders]

    def place(self, request: JobRequest) -> Nodes | None:
        """Nodes for a job: outside all zones, else inside those that it will have left in time."""
        if request.nodes <= self._outside_nodes:
            return best_fit(self._outside, self._state.pod_of, request.nodes)
        if request.nodes > self.free_nodes or not self._zones:
            return None
        if request.preemptible and self._options.preempt:
            return best_fit(self._free, self._state.pod_of, request.nodes)
        if not self._options.backfill:
            return None
        return self._inside(request)

    def _inside(self, request: JobRequest) -> Nodes | None:
        """Nodes in the zones that a job may use, in the pods that lose least by it."""
        open_zones = [zone for zone in self._zones.values() if self._in_time(request, zone)]
        if not open_zones:
            return None
        outside = self._outside
        usable, slack = outside.copy(), np.zeros(len(outside))
        for zone in open_zones:
            usable |= self._free & zone.nodes
            slack += zone.quotas[self._state.pod_of]
        for zone in self._zones.values():
            if zone not in open_zones:
                usable &= ~zone.nodes
        if usable.sum() < request.nodes:
            return None
        # Nodes outside first, then pods with the fewest of the plan's cells, critical ones last.
        order = np.lexsort((self._state.pod_of, np.where(outside, -1.0, slack)))
        nodes: Nodes = order[usable[order]][: request.nodes]
        for zone in open_zones:
            if zone.nodes[nodes].any():
                zone.admitted.add(request.job_id)
                self._risked[zone.request.job_id] += self._chance(request, zone)
        return nodes

    def _in_time(self, request: JobRequest, zone: _Zone) -> bool:
        kind = (zone.request.job_id, request.department, request.limit_s, request.nodes)
        if kind in self._too_long:  # what is risked only grows within a turn
            return False
        if not self._ends(request, zone):
            self._too_long.add(kind)
            return False
        return True

    def _ends(self, request: JobRequest, zone: _Zone) -> bool:
        left_s = zone.request.arrival_s - self._options.margin_s - self._state.now_s
        if self._times is None or left_s <= 0:
            return False
        if self._times.quantile_s(request, self._options.quantile) > left_s:
            return False
        return self._risk(zone) + self._chance(request, zone) <= self._options.risk

    def _risk(self, zone: _Zone) -> float:
        """The chance that any of the jobs let into a zone is late: at most the sum of theirs."""
        job_id = zone.request.job_id
        if job_id not in self._risked:
            let_in = (
                self._state.running[key] for key in zone.admitted & self._state.running.keys()
            )
            self._risked[job_id] = sum(
                late(self._times, running, zone.request.arrival_s, self._state.now_s)
                for running in sorted(let_in, key=lambda running: running.started_s)
                if zone.nodes[running.nodes].any()
            )
        return self._risked[job_id]

    def _chance(self, request: JobRequest, zone: _Zone) -> float:
        assert self._times is not None
        left_s = zone.request.arrival_s - self._options.margin_s - self._state.now_s
        return self._times.exceeds(request, left_s)

    def grid_nodes(self, zone: _Zone) -> Nodes | None:
        """The large job's nodes in its grid's order: of its zone if that is free, else of all."""
        free = self._free.copy()
        for other in self._zones.values():
            if other.turn < zone.turn:
                free &= ~other.nodes
            elif other.request.arrival_s > self._state.now_s:
                free &= zone.nodes | ~other.nodes
        pod_of, alpha = self._state.pod_of, self._options.alpha
        own = free & zone.nodes
        usable = own if own.sum() == zone.request.nodes else free
        capacities = np.bincount(pod_of[usable], minlength=int(pod_of[-1]) + 1)
        found = best_grid(zone.request, capacities.tolist(), alpha)
        return None if found is None else _nodes_of(found.grid, usable, pod_of)


def _nodes_of(grid: PodGrid, usable: Flags, pod_of: Nodes) -> Nodes:
    """A node of its pod for each cell, in the order of the rows."""
    nodes = np.empty(grid.size, dtype=np.int64)
    cells = grid.ravel()
    for pod in np.unique(cells):
        at = np.flatnonzero(cells == pod)
        nodes[at] = np.flatnonzero(usable & (pod_of == pod))[: len(at)]
    return nodes
