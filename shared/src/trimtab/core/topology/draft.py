"""A network while it is read: each point and cable with the place that spoke of it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import networkx as nx

from trimtab.core.cluster import MAX_BANDWIDTH_BYTES_PER_S, Cluster, InsideLink
from trimtab.core.documents import shown, validate
from trimtab.core.errors import BadInput
from trimtab.core.node_names import NODE_NAME_RULE, is_node_name
from trimtab.core.topology.assumptions import MAX_HOSTS, Assumed

ROOT = "network"
"""The name of the switch that joins domains of which no file says how they are joined."""


@dataclass(frozen=True, slots=True)
class Host:
    """A node, and what is known of it."""

    where: str
    device: str | None = None
    count: int | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    inside: InsideLink | None = None


@dataclass(frozen=True, slots=True)
class Cable:
    """What joins a point with a switch; no bandwidth where none is known."""

    lower: str
    upper: str
    where: str
    bandwidth_bytes_per_s: float | None = None


@dataclass(slots=True)
class Draft:
    """Points and cables in the order in which they were read.

    Args:
        source: the file, for messages about the whole of it.
        hosts: what is known of each node.
        switches: the place that spoke of each switch.
        cables: by the two points that they join.
        above: the cables that lead up from each point that has some.
    """

    source: str
    hosts: dict[str, Host] = field(default_factory=dict)
    switches: dict[str, str] = field(default_factory=dict)
    cables: dict[frozenset[str], Cable] = field(default_factory=dict)
    above: defaultdict[str, list[Cable]] = field(default_factory=lambda: defaultdict(list))

    def add_host(self, name: str, host: Host) -> None:
        """Adds a node.

        Raises:
            BadInput: there is a node or switch of this name, it is no name, or there are too many.
        """
        if not is_node_name(name):
            raise BadInput(f"{shown(name)} is no host's name", where=host.where, fix=NODE_NAME_RULE)
        if name in self.switches:
            raise _both(name, host.where, f"the switch at {self.switches[name]}")
        if name in self.hosts:
            raise BadInput(
                f"the host {name!r} is given twice, first at {self.hosts[name].where}",
                where=host.where,
                fix="give each host once",
            )
        if len(self.hosts) >= MAX_HOSTS:
            raise BadInput(f"there are more than {MAX_HOSTS:,} hosts", where=host.where)
        self.hosts[name] = host

    def add_switch(self, name: str, where: str) -> None:
        """Adds a switch.

        Raises:
            BadInput: there is a switch or node of this name, or there are too many.
        """
        if name in self.hosts:
            raise _both(name, where, f"the host at {self.hosts[name].where}")
        if name in self.switches:
            raise BadInput(
                f"the switch {name!r} is given twice, first at {self.switches[name]}",
                where=where,
                fix="give each switch once",
            )
        if len(self.switches) >= MAX_HOSTS:
            raise BadInput(f"there are more than {MAX_HOSTS:,} switches", where=where)
        self.switches[name] = where

    def join(self, cable: Cable) -> None:
        """Lays a cable.

        Raises:
            BadInput: the two are joined already, or are one.
        """
        ends = frozenset((cable.lower, cable.upper))
        if len(ends) == 1:
            raise BadInput(f"{cable.lower!r} is below itself", where=cable.where)
        if ends in self.cables:
            raise BadInput(
                f"{cable.lower!r} and {cable.upper!r} are joined twice, first at"
                f" {self.cables[ends].where}",
                where=cable.where,
                fix="join them once",
            )
        self.cables[ends] = cable
        self.above[cable.lower].append(cable)

    def join_roots(self) -> None:
        """Puts one switch above all points that have none above them, if they are several."""
        roots = [name for name in (*self.hosts, *self.switches) if name not in self.above]
        if len(roots) < 2:
            return
        name = ROOT
        while name in self.hosts or name in self.switches:
            name += "-"
        self.add_switch(name, self.source)
        for root in roots:
            self.join(Cable(root, name, self.source))

    def cluster(self, name: str, assumed: Assumed) -> Cluster:
        """The cluster, with assumed figures where none are known.

        Raises:
            BadInput: there is no host, or switches lead in circles.
        """
        if not self.hosts:
            raise BadInput("there is no host", where=self.source, fix="give at least one")
        carried = self._bandwidths(assumed)
        data = {
            "name": name,
            "nodes": tuple(self._node(host, about, assumed) for host, about in self.hosts.items()),
            "switches": tuple(self.switches),
            "links": tuple(
                {
                    "a": cable.lower,
                    "b": cable.upper,
                    "bandwidth_bytes_per_s": carried[ends],
                    "latency_s": assumed.latency_s,
                }
                for ends, cable in self.cables.items()
            ),
        }
        return validate(Cluster, data, where=self.source)

    def _node(self, name: str, host: Host, assumed: Assumed) -> dict[str, object]:
        node: dict[str, object] = {
            "name": name,
            "device": host.device or assumed.device,
            "count": assumed.devices_per_node if host.count is None else host.count,
            "labels": dict(host.labels),
        }
        return node | ({"inside": host.inside} if host.inside is not None else {})

    def _bandwidths(self, assumed: Assumed) -> dict[frozenset[str], float]:
        """The bandwidth of each cable, the lowest first: a switch's uplinks carry what is below."""
        carried: dict[frozenset[str], float] = {}
        below: defaultdict[str, float] = defaultdict(float)
        for name in self._from_below():
            cables = self.above.get(name, [])
            wanted = below[name] / (assumed.oversubscription * max(1, len(cables)))
            for cable in cables:
                found = cable.bandwidth_bytes_per_s or min(
                    wanted or assumed.bandwidth_bytes_per_s, MAX_BANDWIDTH_BYTES_PER_S
                )
                carried[frozenset((cable.lower, cable.upper))] = found
                below[cable.upper] += found
        return carried

    def _from_below(self) -> list[str]:
        graph: nx.DiGraph[str] = nx.DiGraph()
        graph.add_nodes_from((*self.hosts, *self.switches))
        graph.add_edges_from((cable.lower, cable.upper) for cable in self.cables.values())
        try:
            return list(nx.topological_sort(graph))
        except nx.NetworkXUnfeasible:
            circle = [str(edge[0]) for edge in nx.find_cycle(graph)]
            where = self.switches.get(circle[0], self.source)
            raise BadInput(
                f"switches lead in a circle: {' > '.join(reversed(circle[:6]))}",
                where=where,
                fix="put each below another that is nearer the core",
            ) from None


def _both(name: str, where: str, other: str) -> BadInput:
    return BadInput(
        f"{name!r} is a switch and a host ({other})", where=where, fix="rename one of them"
    )


def draft_of_paths(
    source: str, paths: Mapping[str, Sequence[str]], hosts: Mapping[str, Host], *, qualified: bool
) -> Draft:
    """The tree that the domains around each host form.

    Args:
        source: the file.
        paths: the domains of each host, the closest first.
        hosts: what is known of each host.
        qualified: whether one name may stand for different domains in different wider ones.

    Raises:
        BadInput: a domain lies in two.
    """
    draft = Draft(source)
    for name, path in paths.items():
        draft.add_host(name, hosts[name])
        where = hosts[name].where
        above = _qualified(path) if qualified else list(path)
        for lower, upper in zip([name, *above], above, strict=False):
            _lay(draft, lower, upper, where)
    draft.join_roots()
    return draft


def _qualified(path: Sequence[str]) -> list[str]:
    """Each domain's name with those of the wider ones before it."""
    return ["/".join(reversed(path[index:])) for index in range(len(path))]


def _lay(draft: Draft, lower: str, upper: str, where: str) -> None:
    if upper not in draft.switches:
        draft.add_switch(upper, where)
    if frozenset((lower, upper)) in draft.cables:
        return
    if lower in draft.above:
        other = draft.above[lower][0]
        raise BadInput(
            f"{lower!r} lies in {other.upper!r} (at {other.where}) and in {upper!r}",
            where=where,
            fix="put it into one",
        )
    draft.join(Cable(lower, upper, where))


def known_device(names: Iterable[str]) -> str | None:
    """The first of several spellings that a device profile goes by."""
    from trimtab.core.devices import device

    for name in names:
        try:
            return device(name).name
        except BadInput:
            continue
    return None
