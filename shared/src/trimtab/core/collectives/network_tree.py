"""A cluster whose links form a tree, rooted, with the devices as leaves in depth-first order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import networkx as nx
import numpy as np
from numpy.typing import NDArray

from trimtab.core.cluster import Cluster, Node
from trimtab.core.errors import BadInput

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_BETWEEN = "(cable)"


@dataclass(frozen=True)
class NetworkTree:
    """Leaves are the ranks of a job; every point but the root has a link to its parent.

    Attributes:
        names: of the points; the root is the first.
        parents: of each point; -1 for the root. A parent comes before its children.
        up_s_per_byte, down_s_per_byte: of the link to the parent; 0 for the root.
        latency_s: of that link.
        leaves: the points that are ranks, depth first, so that those below a point lie together.
        memory_bytes_per_s: bandwidth of each leaf's memory; 0 where none is known.
        nodes: the points above the devices of a node that has several.
    """

    names: tuple[str, ...]
    parents: tuple[int, ...]
    up_s_per_byte: Floats
    down_s_per_byte: Floats
    latency_s: Floats
    leaves: tuple[int, ...]
    memory_bytes_per_s: tuple[float, ...] = ()
    nodes: tuple[int, ...] = ()

    @classmethod
    def of_cluster(
        cls, cluster: Cluster, slots: Sequence[tuple[str, int]] | None = None
    ) -> NetworkTree:
        """The tree of a cluster; a node with several devices is a point above them.

        Args:
            cluster: its links form a tree.
            slots: node and device of those that take part; all by default.

        Raises:
            BadInput: the links form no tree, a node also forwards, or a slot does not exist.
        """
        return _Builder(cluster, slots).build()

    @property
    def size(self) -> int:
        """How many leaves there are."""
        return len(self.leaves)

    @property
    def hosts(self) -> tuple[int, ...]:
        """The points that send by links of their own: ranks, and nodes with several."""
        return (*self.leaves, *self.nodes)

    @cached_property
    def children(self) -> tuple[tuple[int, ...], ...]:
        """The points below each point."""
        below: list[list[int]] = [[] for _ in self.names]
        for point, parent in enumerate(self.parents):
            if parent >= 0:
                below[parent].append(point)
        return tuple(map(tuple, below))

    @cached_property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """The leaves below each point: the first, and the one behind the last."""
        place = {point: index for index, point in enumerate(self.leaves)}
        low, high = [len(self.leaves)] * len(self.names), [0] * len(self.names)
        for point in range(len(self.names) - 1, -1, -1):
            if point in place:
                low[point], high[point] = place[point], place[point] + 1
            parent = self.parents[point]
            if parent >= 0:
                low[parent] = min(low[parent], low[point])
                high[parent] = max(high[parent], high[point])
        return tuple(zip(low, high, strict=True))

    @cached_property
    def paths(self) -> Ints:
        """The point of each leaf (columns) at each depth (rows); leaves stay below their depth."""
        chains = []
        for leaf in self.leaves:
            chain = [leaf]
            while self.parents[chain[-1]] >= 0:
                chain.append(self.parents[chain[-1]])
            chains.append(chain[::-1])
        deepest = max(map(len, chains))
        rows = [chain + [chain[-1]] * (deepest - len(chain)) for chain in chains]
        return np.array(rows, dtype=np.int64).T.copy()

    @cached_property
    def leaf_names(self) -> tuple[str, ...]:
        """The names of the leaves in their order."""
        return tuple(self.names[point] for point in self.leaves)


def _why_no_tree(graph: nx.Graph) -> str:
    """Which points are on a loop, or between which two there is no way."""
    loop = next(iter(nx.cycle_basis(graph)), None)
    if loop is not None:
        return f"{', '.join(sorted(loop))} are on a loop"
    one, other, *_ = (min(part) for part in nx.connected_components(graph))
    return f"no way leads from {one} to {other}"


class _Builder:
    def __init__(self, cluster: Cluster, slots: Sequence[tuple[str, int]] | None) -> None:
        self._cluster, self._graph = cluster, cluster.graph
        self._devices = _devices(cluster, slots)
        self._names: list[str] = []
        self._parents: list[int] = []
        self._beta: list[float] = []
        self._latency: list[float] = []
        self._leaves: list[int] = []
        self._nodes: list[int] = []
        self._memory: list[float] = []

    def build(self) -> NetworkTree:
        cluster = self._cluster
        if len(cluster.nodes) > 1 and not nx.is_tree(self._graph):
            raise BadInput(
                f"the links of {cluster.name} form no tree: {_why_no_tree(self._graph)}",
                fix="give links that lead from each node to each other in one way; switches that "
                "share the load of one tier count as one",
            )
        forwarding = next((n.name for n in cluster.nodes if self._graph.degree(n.name) > 1), None)
        if forwarding is not None and len(cluster.nodes) > 2:
            raise BadInput(f"the node {forwarding!r} has several links", fix="give it a switch")
        root = _middle(self._graph) if len(cluster.nodes) > 1 else cluster.nodes[0].name
        if root in self._devices and len(self._devices) > 1:
            # Two nodes on one cable: a point between them, or one would be above the other.
            self._graph = nx.Graph(self._graph)
            self._graph.add_edge(root, _BETWEEN, bandwidth_bytes_per_s=np.inf, latency_s=0.0)
            for other in [o for o in self._graph[root] if o != _BETWEEN]:
                self._graph.add_edge(other, _BETWEEN, **self._graph.edges[root, other])
                self._graph.remove_edge(root, other)
            root = _BETWEEN
        self._walk(root)
        beta = np.array(self._beta)
        return NetworkTree(
            tuple(self._names),
            tuple(self._parents),
            beta,
            beta,
            np.array(self._latency),
            tuple(self._leaves),
            tuple(self._memory),
            tuple(self._nodes),
        )

    def _walk(self, root: str) -> None:
        keep = self._used(root)
        todo: list[tuple[str, str | None, int]] = [(root, None, -1)]
        while todo:
            name, above, parent = todo.pop()
            edge = self._graph.edges[name, above] if above is not None else {}
            point = self._add(name, parent, edge)
            if name in self._devices:
                self._add_devices(self._cluster.node(name), point)
            below = [other for other in self._graph[name] if other != above and other in keep]
            todo += [(other, name, point) for other in reversed(below)]

    def _used(self, root: str) -> set[str]:
        """The points that have a device at or below them."""
        order = list(nx.dfs_postorder_nodes(self._graph, root))
        above = dict(nx.dfs_predecessors(self._graph, root))
        used = {name for name in order if name in self._devices}
        for name in order:
            if name in used and name in above:
                used.add(above[name])
        return used

    def _add(self, name: str, parent: int, edge: Mapping[str, float]) -> int:
        self._names.append(name)
        self._parents.append(parent)
        self._beta.append(1 / edge["bandwidth_bytes_per_s"] if edge else 0.0)
        self._latency.append(edge["latency_s"] if edge else 0.0)
        return len(self._names) - 1

    def _add_devices(self, node: Node, point: int) -> None:
        memory = self._cluster.profile(node.name).memory_bandwidth_bytes_per_s
        indices = self._devices[node.name]
        if len(indices) == 1:
            self._leaves.append(point)
            self._memory.append(memory)
            return
        self._nodes.append(point)
        inside = {
            "bandwidth_bytes_per_s": self._cluster.bandwidth_bytes_per_s(node.name, node.name),
            "latency_s": node.inside.latency_s / 2,
        }
        for index in indices:
            self._leaves.append(self._add(f"{node.name}/{index}", point, inside))
            self._memory.append(memory)


def _devices(cluster: Cluster, slots: Sequence[tuple[str, int]] | None) -> dict[str, list[int]]:
    if slots is None:
        return {node.name: list(range(node.count)) for node in cluster.nodes}
    found: dict[str, list[int]] = {}
    for name, index in slots:
        node = cluster.node(name)
        if index >= node.count:
            raise BadInput(
                f"the job uses device {index} of {name!r}, which has {node.count}",
                fix="raise its count, or start fewer ranks there",
            )
        found.setdefault(name, []).append(index)
    return {name: sorted(indices) for name, indices in found.items()}


def _middle(graph: nx.Graph) -> str:
    """The switch in the middle of the longest path, so that the tree is as flat as it can be."""
    start = next(iter(graph))
    for _ in range(2):
        before = dict(nx.bfs_predecessors(graph, start))
        start = next(reversed(before))  # the last one found is the farthest
    longest = [start]
    while longest[-1] in before:
        longest.append(before[longest[-1]])
    candidates = [longest[len(longest) // 2], longest[(len(longest) - 1) // 2]]
    switches = [name for name in candidates if graph.nodes[name]["kind"] == "switch"]
    return str((switches or candidates)[0])
