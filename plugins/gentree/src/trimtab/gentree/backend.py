"""The torch.distributed backend ``gentree``: plans for the group's ranks on the network they share.

``init_process_group("gentree")`` needs no import; the network comes from the environment, which
``trimtab launch`` sets.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trimtab.core.cluster import Cluster
from trimtab.core.collectives import NetworkTree, Schedule, Step
from trimtab.core.collectives.combine import ring
from trimtab.core.collectives.schedule import Layout
from trimtab.core.cost import Constants, PlanCost, PlanEvaluator
from trimtab.core.cost.plan_cost import total
from trimtab.core.documents import digest
from trimtab.core.errors import BadInput
from trimtab.core.topology import read_topology
from trimtab.gentree.constants_file import read_constants
from trimtab.gentree.gentree import Search
from trimtab.gentree.members import Place, hear, slots, stay, tell
from trimtab.gentree.planner import choose, leaf_order

TOPOLOGY_VARIABLE = "TRIMTAB_GENTREE_TOPOLOGY"
CONSTANTS_VARIABLE = "TRIMTAB_GENTREE_CONSTANTS"
ALWAYS_VARIABLE = "TRIMTAB_GENTREE_ALWAYS"
CUDA_VARIABLE = "TRIMTAB_GENTREE_CUDA"

MARGIN = 0.1
"""By how much a plan must be faster by the model than gloo's ring, for which our executor takes a
tenth longer, and than a ring, whose connections are never idle for long."""

BASE_SEGMENTS = 2
"""Gloo's ring sends each rank's share in two segments, so that one hides the other's rounds."""

_SEARCH = Search(beside=False)
"""Two plans side by side send twice the messages, and GenModel charges nothing for a message; their
ranks own two stretches each, which no reduce-scatter wants."""

_EQUAL = Search(chunks=False, beside=False, equal=True)
"""For a reduce-scatter or all-gather alone, which runs in one piece."""

log = logging.getLogger("trimtab")


@dataclass(frozen=True)
class Network:
    """What the plans of a job are made for.

    Attributes:
        cluster: the network.
        constants: of GenModel.
        always: whether plans are run even where the model finds the base backend faster.
        cuda: whether plans are run on CUDA tensors too.
    """

    cluster: Cluster
    constants: Constants
    always: bool = False
    cuda: bool = False

    @classmethod
    def of_environment(cls, environment: Mapping[str, str] = os.environ) -> Network | None:
        """The network that the environment names, if any.

        Raises:
            BadInput: a file cannot be read, or says what is no network.
        """
        path = environment.get(TOPOLOGY_VARIABLE)
        if not path:
            return None
        constants = environment.get(CONSTANTS_VARIABLE)
        return cls(
            read_topology(path),
            read_constants(constants) if constants else Constants(),
            *(environment.get(v, "0") not in ("", "0") for v in (ALWAYS_VARIABLE, CUDA_VARIABLE)),
        )


class GroupPlans:
    """The plans of one process group, made when a payload of their size first comes.

    Payloads between two powers of two have one plan; all ranks come to the same one, as they have
    the same network, constants and code. What leaves each rank one equal part, as torch's
    reduce_scatter does and all_gather expects it, has plans of its own.

    Args:
        tree: the network.
        order: the leaf of each rank.
        constants: of GenModel.
        always: whether the base backend is never preferred.
    """

    def __init__(
        self, tree: NetworkTree, order: Sequence[int], constants: Constants, *, always: bool
    ) -> None:
        self._tree, self._order = tree, list(order)
        self._constants, self._always = constants, always
        self._evaluator = PlanEvaluator(tree, constants)
        self._schedules: dict[tuple[int, bool], Schedule | None] = {}

    def schedule(self, payload_bytes: int, *, blocks: bool = False) -> Schedule | None:
        """The plan for a payload; None where the base backend's ring is as fast.

        Args:
            payload_bytes: on each rank, all parts together.
            blocks: whether the reduce-scatter or the all-gather is run alone, for which each rank
                owns one equal part; else both are, one behind the other.
        """
        if payload_bytes <= 0 or self._tree.size < 2:
            return None
        bucket = (payload_bytes - 1).bit_length()
        if (bucket, blocks) not in self._schedules:
            self._schedules[bucket, blocks] = self._choose(1 << bucket, blocks=blocks)
        return self._schedules[bucket, blocks]

    def _choose(self, payload_bytes: int, *, blocks: bool) -> Schedule | None:
        search = _EQUAL if blocks else _SEARCH
        choice = choose(
            self._tree, payload_bytes, self._constants, order=self._order, search=search
        )
        schedule, name, plan_s = choice.schedule, choice.switches[-1][1], choice.seconds
        if blocks:
            leaves = np.array(self._order)
            steps = [step.renumbered(leaves) for step in schedule.arrays]
            plan_s = self._cost(steps, blocks=True).seconds(payload_bytes)
        ring = self._cost(_ring(range(self._tree.size)), blocks=blocks)
        base = self._cost(_ring(self._order), blocks=blocks)
        ring_s, base_s = ring.seconds(payload_bytes), _base_s(base, payload_bytes)
        if plan_s > (1 - MARGIN) * ring_s:
            schedule, name, plan_s = self._ring_schedule(), "a ring in the network's order", ring_s
        chosen = self._always or plan_s < (1 - MARGIN) * base_s
        log.info(
            "trimtab: %s%d bytes go by %s (%.3g s by the model, the base backend %.3g s)",
            "reduce-scatters and all-gathers of " if blocks else "",
            payload_bytes,
            name if chosen else "the base backend",
            plan_s,
            base_s,
        )
        return schedule if chosen else None

    def _ring_schedule(self) -> Schedule:
        """A ring in which neighbours are near one another."""
        rank_of = np.empty(self._tree.size, dtype=np.int64)
        rank_of[self._order] = np.arange(self._tree.size)
        steps = [step.renumbered(rank_of) for step in _ring(range(self._tree.size))]
        return Schedule.of(self._tree.size, steps)

    def _cost(self, steps: Sequence[Step], *, blocks: bool) -> PlanCost:
        """What steps cost: alone with blocks, else with their mirror."""
        if not blocks:
            return self._evaluator.cost(steps)
        return total([self._evaluator.step(step) for step in steps], self._constants)


def _base_s(cost: PlanCost, payload_bytes: int) -> float:
    """What the base backend's ring takes: rounds and bytes of its segments overlap."""
    parts = cost.latency_s, cost.seconds(payload_bytes) - cost.latency_s
    return (sum(parts) + (BASE_SEGMENTS - 1) * max(parts)) / BASE_SEGMENTS


def _ring(leaves: Iterable[int]) -> list[Step]:
    parties = [Layout.whole(leaf) for leaf in leaves]
    return [ring(parties)[0]] if len(parties) > 1 else []


class BasePlans:
    """No plans: everything is the base backend's."""

    def schedule(self, payload_bytes: int, *, blocks: bool = False) -> Schedule | None:
        """No plan."""
        del payload_bytes, blocks
        return None


def create(options: Any, backend_options: Any) -> Any:
    """Makes the process group of one rank, as torch's ``register_backend`` wants it.

    Raises:
        BadInput: here or at another rank the network is malformed, does not hold the job, or is not
            the one that the others plan for; all ranks raise, and name the rank.
    """
    del backend_options
    from trimtab.hosts.torch.planned_group import PlannedGroup

    member, size = options.group_rank, options.group_size
    ranks = list(options.global_ranks_in_group) or list(range(size))
    try:
        network = _own_network(options.store, member, ranks[member])
        places = hear(options.store, ranks)
        plans = _plans(network, places)
    except BadInput:
        stay(options.store, member, size, options.timeout)
        raise
    names = [place.called for place in places]
    cuda = network is not None and network.cuda
    return PlannedGroup(options.store, member, size, options.timeout, plans, names, cuda=cuda)


def _own_network(store: Any, member: int, rank: int) -> Network | None:
    """The network that this rank plans for, after the others were told of it."""
    try:
        network = Network.of_environment()
        place = Place.own(rank, "" if network is None else digest(network))
    except BadInput as refusal:
        tell(store, member, refusal)
        raise
    tell(store, member, place)
    return network


def _plans(network: Network | None, places: Sequence[Place]) -> GroupPlans | BasePlans:
    if network is None:
        log.warning(
            "trimtab: no network is known, so the base backend does all; name a cluster file in %s",
            TOPOLOGY_VARIABLE,
        )
    if network is None or len(places) < 2:
        return BasePlans()
    devices = slots(network.cluster, places)
    tree = NetworkTree.of_cluster(network.cluster, devices)
    return GroupPlans(tree, leaf_order(tree, devices), network.constants, always=network.always)
