"""The network as a tree of domains: which nodes share a leaf, which leaves a pod.

A cable leads up, from its first end to its second; nodes are below all switches. The core is the
switches that have none above them. The domains of the widest tier are what stays joined when the
core is taken away, so several rails or spines of one pod are one pod; those of the next tier are
what stays joined when the switches right below the core go too, and so on. What counts for a switch
is its longest way up: a further cable, as from a leaf to the core, takes it out of no domain.

Trees need not be even. A node whose switches are all taken away stays with those that hang on the
same ones: a rack right below the core is a domain in each tier, and so is a node, or are several,
on the core itself.

A cable that would close a circle leads the other way. Where cables so read lead up from what has no
node below, or up two ways that never meet, all are read the other way round; where that does not
help either, `heights` tells which end is the upper one.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import networkx as nx
from networkx.utils import UnionFind

from trimtab.core.cluster import Cluster
from trimtab.core.documents import nearest
from trimtab.core.errors import BadInput
from trimtab.core.topology.heights import heights

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


def natural(name: str) -> tuple[tuple[int, int, str, str], ...]:
    """A sort key that puts ``node2`` before ``node10``, whatever the length of the number."""
    parts = re.findall(r"[0-9]+|[^0-9]+", name)
    return tuple(
        (0, len(number := part.lstrip("0")), number, part)
        if "0" <= part[0] <= "9"
        else (1, 0, part, "")
        for part in parts
    )


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
    hierarchy = _Hierarchy.of(cluster)
    found: list[dict[str, str]] = []
    sizes = {len(cluster.nodes), 1}
    for domain in hierarchy.partitions():
        count = len(set(domain.values()))
        if count not in sizes:
            sizes.add(count)
            found.append(domain)
    # Lone nodes beside all others say nothing of these.
    while len(found) > 1 and _shared(found[0]) < 2 <= _shared(found[1]):
        found.pop(0)
    return found


def _shared(domain: Mapping[str, str]) -> int:
    """How many domains have several nodes."""
    return sum(count > 1 for count in Counter(domain.values()).values())


_Up = dict[str, set[str]]
"""The switches right above each switch."""


@dataclass(frozen=True, slots=True)
class _Hierarchy:
    """A network from its core down.

    Attributes:
        nodes: their names.
        ranks: the longest way up from each switch; 0 for those of the core.
        cables: two ends, and how many ranks can be taken away at most while these are joined.
    """

    nodes: tuple[str, ...]
    ranks: Mapping[str, int]
    cables: tuple[tuple[str, str, int], ...]

    @classmethod
    def of(cls, cluster: Cluster) -> _Hierarchy:
        """That of a cluster's links."""
        nodes = {node.name for node in cluster.nodes}
        above: defaultdict[str, set[str]] = defaultdict(set)
        between: list[tuple[str, str]] = []
        cables: list[tuple[str, str, int]] = []
        for link in cluster.links:
            lower, upper = (link.b, link.a) if link.b in nodes else (link.a, link.b)
            if lower not in nodes:
                between.append((lower, upper))
            elif upper not in nodes:
                above[lower].add(upper)
            else:
                cables.append((lower, upper, len(cluster.switches)))
        leaves = set().union(*above.values())
        up = _upward(cluster, between, leaves)
        level = _siblings(up, leaves) | _meshed(cluster, up, leaves)
        ranks = _ranks(up, level)
        for node, switches in above.items():
            last = max(ranks[switch] for switch in switches)
            for switch in switches:
                rank = ranks[switch]
                cables.append((node, switch, rank if rank < last else len(cluster.switches)))
        for lower, uppers in up.items():
            for upper in uppers:
                rank = min(ranks[lower], ranks[upper])
                # Counts as a switch above them, but joins what the core's switches do not.
                equal = (lower, upper) in level and ranks[lower] == ranks[upper] != 1
                cables.append((lower, upper, rank - equal))
        return cls(tuple(node.name for node in cluster.nodes), ranks, tuple(cables))

    def partitions(self) -> list[dict[str, str]]:
        """The domain of each node with 0, 1, ... ranks taken away."""
        depth = max(self.ranks.values(), default=0) + 1
        joining: defaultdict[int, list[tuple[str, str]]] = defaultdict(list)
        for a, b, most in self.cables:
            joining[min(most, depth)].append((a, b))
        joined: UnionFind[str] = UnionFind((*self.nodes, *self.ranks))
        found = []
        for taken in range(depth, -1, -1):
            for a, b in joining[taken]:
                joined.union(a, b)
            found.append(self._named(joined, taken))
        return found[::-1]

    def _named(self, joined: UnionFind[str], taken: int) -> dict[str, str]:
        """Domains by the first of their highest switches that are left; by a lone node on none."""
        members = Counter(joined[node] for node in self.nodes)
        first: dict[str, tuple[bool, int, str]] = {}
        for switch in sorted(self.ranks, key=natural):
            rank, root = self.ranks[switch], joined[switch]
            if root in members and (rank < taken, rank) < first.get(root, (True, math.inf))[:2]:
                first[root] = (rank < taken, rank, switch)
        domain = {}
        for node in self.nodes:
            root = joined[node]
            gone, rank, switch = first.get(root, (True, 0, node))
            domain[node] = node if gone and rank == 0 and members[root] == 1 else switch
        return domain


def _upward(cluster: Cluster, between: Sequence[tuple[str, str]], leaves: Collection[str]) -> _Up:
    """Which switches are above which: second ends, or all first ones, or what heights say.

    Ends do not say it where a switch has nothing below, or two ways up that do not meet again.
    """
    used = nx.Graph(between)
    while stubs := [s for s in used if used.degree(s) < 2 and s not in leaves]:
        used.remove_nodes_from(stubs)
    bridges = {frozenset(bridge) for bridge in nx.bridges(used)} if used else set()
    given = _without_circles(between)
    for pairs in (given, [(b, a) for a, b in given]):
        lowest = {lower for lower, _ in pairs} - {upper for _, upper in pairs}
        ways = Counter(lower for lower, upper in pairs if frozenset((lower, upper)) in bridges)
        if (lowest & set(used)) <= set(leaves) and max(ways.values(), default=0) < 2:
            break
    else:
        height = heights(((k.a, k.b) for k in cluster.links), {n.name for n in cluster.nodes})
        order = {s: (height.get(s, 0), i) for i, s in enumerate(cluster.switches)}
        pairs = [(a, b) if order[a] < order[b] else (b, a) for a, b in between]
    up: _Up = {switch: set() for switch in cluster.switches}
    for lower, upper in pairs:
        up[lower].add(upper)
    return up


def _without_circles(between: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """The cables, those turned that would lead back to where earlier ones lead up from."""
    if nx.is_directed_acyclic_graph(nx.DiGraph(between)):
        return list(between)
    graph = nx.DiGraph()
    for lower, upper in between:
        back = upper in graph and lower in graph and nx.has_path(graph, upper, lower)
        graph.add_edge(*((upper, lower) if back else (lower, upper)))
    return list(graph.edges)


def _siblings(up: _Up, leaves: Collection[str]) -> set[tuple[str, str]]:
    """Cables between equals: with one switch above both, and as much below both without them."""
    below: _Up = {switch: set() for switch in up}
    for lower, uppers in up.items():
        for upper in uppers:
            below[upper].add(lower)
    height: dict[str, int] = {}
    level: set[tuple[str, str]] = set()
    for switch in _from_below(up):
        beside = {lower for lower in below[switch] if up[lower] & up[switch]}
        lowers = (height[lower] + 1 for lower in below[switch] - beside)
        own = max((int(switch in leaves), *lowers))
        highest = max((height[lower] for lower in beside), default=0)
        height[switch] = highest + 1 if highest > own else own
        level |= {(lower, switch) for lower in beside if height[lower] == height[switch]}
    return level


def _meshed(cluster: Cluster, up: _Up, leaves: Collection[str]) -> set[tuple[str, str]]:
    """The cables of a mesh that stands for a core: triangles of equally high switches on top.

    All of them have switches below or none has, likewise nodes, and none beside is as high.
    """
    near: _Up = {switch: set(uppers) for switch, uppers in up.items()}
    for lower, uppers in up.items():
        for upper in uppers:
            near[upper].add(lower)
    triangles = [(a, b) for a, uppers in up.items() for b in uppers if near[a] & near[b]]
    if not triangles:
        return set()
    height = heights(((k.a, k.b) for k in cluster.links), {n.name for n in cluster.nodes})
    level = nx.Graph()
    for a, b in triangles:
        if any(height.get(a) == height.get(b) == height.get(c) for c in near[a] & near[b]):
            level.add_edge(a, b)
    found: set[tuple[str, str]] = set()
    for mesh in nx.connected_components(level):
        others = {switch: near[switch] - mesh for switch in mesh}
        alike = len({(bool(others[switch]), switch in leaves) for switch in mesh}) == 1
        apart = all(height.get(s) != height.get(o) for s, beside in others.items() for o in beside)
        if alike and apart and all(up[switch] <= mesh for switch in mesh):
            found |= {(a, b) for a in mesh for b in up[a] if level.has_edge(a, b)}
    return found


def _ranks(up: _Up, level: Collection[tuple[str, str]]) -> dict[str, int]:
    ranks: dict[str, int] = {}
    for switch in reversed(_from_below(up)):
        above = [ranks[upper] for upper in up[switch] if (switch, upper) not in level]
        ranks[switch] = max(above, default=-1) + 1
    return ranks


def _from_below(up: _Up) -> list[str]:
    graph = nx.DiGraph()
    graph.add_nodes_from(up)
    graph.add_edges_from((lower, upper) for lower, uppers in up.items() for upper in uppers)
    return list(nx.topological_sort(graph))


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
