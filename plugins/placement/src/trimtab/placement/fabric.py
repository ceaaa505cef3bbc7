"""The network as a tree of domains: which nodes share a leaf, which leaves a pod.

A switch's level is its distance from the nearest node. The domains of a tier are what stays joined
when the switches above it are taken away, so several rails or spines of one domain are one domain.
"""

from __future__ import annotations

import re
from collections import Counter, deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import networkx as nx

from trimtab.core.cluster import Cluster
from trimtab.core.documents import nearest
from trimtab.core.errors import BadInput

State = Literal["free", "busy", "drained", "movable"]
"""``movable`` nodes run a job that may be moved: they are taken only where it helps."""

STATE_LABEL = "state"
"""The label of a cluster's node that says its state."""

_NAMES = {1: ("leaf",), 2: ("leaf", "pod"), 3: ("leaf", "pod", "zone")}


@dataclass(frozen=True, slots=True)
class Place:
    """A node in the network.

    Attributes:
        name: of the node.
        path: the domains around it, the widest first; one for each tier.
        gpus: its devices.
        state: whether a job may have it.
    """

    name: str
    path: tuple[str, ...]
    gpus: int
    state: State = "free"


@dataclass(frozen=True, slots=True)
class Fabric:
    """All nodes with their domains.

    Attributes:
        tiers: what the tiers are called, the widest domains first; empty where all nodes hang on
            one switch.
        places: in the order of their paths and names, numbers in names by value.
    """

    tiers: tuple[str, ...]
    places: tuple[Place, ...]

    @classmethod
    def of(cls, cluster: Cluster, states: Mapping[str, State] | None = None) -> Fabric:
        """The fabric of a cluster.

        Args:
            cluster: its links say which nodes are close.
            states: of the nodes that are not free; they go before the nodes' own labels.

        Raises:
            BadInput: a node cannot be reached, a state is unknown, or is that of an unknown node.
        """
        _check_reachable(cluster)
        given = dict(states or {})
        names = {node.name for node in cluster.nodes}
        for name in given:
            if name not in names:
                raise BadInput(f"there is no node {name!r}", fix=nearest(name, names))
        partitions = _partitions(cluster)
        places = [
            Place(
                node.name,
                tuple(domain[node.name] for domain in partitions),
                node.count,
                given.get(node.name) or _labelled_state(node.name, node.labels),
            )
            for node in cluster.nodes
        ]
        places.sort(key=lambda place: (*map(natural, place.path), natural(place.name)))
        return cls(_tier_names(len(partitions)), tuple(places))

    def tier(self, name: str | None) -> int:
        """The index of a tier by its name; the widest by default.

        Raises:
            BadInput: there is no such tier.
        """
        if name is None:
            return 0
        if name not in self.tiers:
            raise BadInput(f"the cluster has no tier {name!r}", fix=nearest(name, self.tiers))
        return self.tiers.index(name)

    def only(self, hosts: Collection[str]) -> Fabric:
        """The fabric of some of its nodes, in the same order.

        Raises:
            BadInput: a host is no node of it.
        """
        names = {place.name for place in self.places}
        for host in hosts:
            if host not in names:
                raise BadInput(
                    f"the host {host!r} is no node of the cluster", fix=nearest(host, names)
                )
        kept = set(hosts)
        return Fabric(self.tiers, tuple(place for place in self.places if place.name in kept))


def domains(places: Iterable[Place], tier: int) -> dict[str, list[Place]]:
    """Nodes by their domain of a tier, both in the order of the nodes.

    All are one domain, ``network``, where there is no such tier.
    """
    found: dict[str, list[Place]] = {}
    for place in places:
        name = place.path[tier] if tier < len(place.path) else "network"
        found.setdefault(name, []).append(place)
    return found


def natural(name: str) -> tuple[tuple[int, int, str], ...]:
    """A sort key that puts ``node2`` before ``node10``."""
    parts = re.findall(r"\d+|\D+", name)
    return tuple((0, int(p), p) if p.isdecimal() else (1, 0, p) for p in parts)


def _tier_names(count: int) -> tuple[str, ...]:
    names = _NAMES.get(count) or tuple(f"tier{number}" for number in range(1, count + 1))
    return tuple(reversed(names[:count]))


def _labelled_state(name: str, labels: Mapping[str, str]) -> State:
    label = labels.get(STATE_LABEL, "free")
    for state in get_args(State):
        if label == state:
            found: State = state
            return found
    raise BadInput(
        f"the node {name!r} has the state {label!r}", fix=f"known are {', '.join(get_args(State))}"
    )


def _check_reachable(cluster: Cluster) -> None:
    if cluster.unreachable:
        raise BadInput(
            f"no links lead from {cluster.nodes[0].name!r} to {cluster.unreachable[0]!r}"
            f" (cut off: {len(cluster.unreachable)} of {len(cluster.nodes)} nodes)",
            where=cluster.name,
            fix="add links so that every node reaches every other, or leave these nodes out",
        )


def _partitions(cluster: Cluster) -> list[dict[str, str]]:
    """The domain of each node in each tier, the widest first; tiers that tell nothing left out."""
    levels = _levels(cluster)
    found: list[dict[str, str]] = []
    sizes = {len(cluster.nodes), 1}
    for top in range(1, max(levels.values()) + 1):
        domain = _components(cluster, levels, top)
        count = len(set(domain.values()))
        if count not in sizes:
            sizes.add(count)
            found.insert(0, domain)
    return found


def _levels(cluster: Cluster) -> dict[str, int]:
    """The distance of each switch and node from the nearest node."""
    levels = {node.name: 0 for node in cluster.nodes}
    waiting = deque(levels)
    while waiting:
        near = waiting.popleft()
        for far in cluster.graph.neighbors(near):
            if far not in levels:
                levels[far] = levels[near] + 1
                waiting.append(far)
    return levels


def _components(cluster: Cluster, levels: Mapping[str, int], top: int) -> dict[str, str]:
    """The component of each node without what lies above a level.

    A cable between two equals counts as a switch above them.
    """
    graph: nx.Graph[str] = nx.Graph()
    graph.add_nodes_from(name for name, level in levels.items() if level <= top)
    for a, b in cluster.graph.edges:
        if a in levels and b in levels:
            height = max(levels[a], levels[b]) + (levels[a] == levels[b])
            if height <= top:
                graph.add_edge(a, b)
    domain: dict[str, str] = {}
    for component in nx.connected_components(graph):
        name = _component_name(component, levels)
        domain.update((member, name) for member in component if levels[member] == 0)
    return domain


def _component_name(component: Collection[str], levels: Mapping[str, int]) -> str:
    """The first of its highest switches."""
    highest = max(levels[member] for member in component)
    return min((m for m in component if levels[m] == highest), key=natural)


def states_of(
    busy: Sequence[str] = (), drained: Sequence[str] = (), movable: Sequence[str] = ()
) -> dict[str, State]:
    """The states of nodes given as lists.

    Raises:
        BadInput: a node has two states.
    """
    listed: tuple[tuple[State, Sequence[str]], ...] = (
        ("busy", busy),
        ("drained", drained),
        ("movable", movable),
    )
    counts = Counter(name for _, names in listed for name in dict.fromkeys(names))
    twice = next((name for name, count in counts.items() if count > 1), None)
    if twice is not None:
        raise BadInput(f"the node {twice!r} is given two states", fix="give each node one")
    return {name: state for state, names in listed for name in names}
