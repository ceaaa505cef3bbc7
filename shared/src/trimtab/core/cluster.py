"""Clusters: nodes with devices, joined by links and switches; YAML outside, a graph inside."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import networkx as nx
from pydantic import Field, PositiveInt, field_validator, model_validator

from trimtab.core.devices import DeviceProfile, device, read_devices
from trimtab.core.documents import (
    Document,
    InvalidValue,
    KeyPath,
    nearest,
    parse_yaml,
    place,
    read_lines,
    read_text,
    shown,
    validate,
)
from trimtab.core.errors import BadInput
from trimtab.core.node_names import NODE_NAME_RULE, is_node_name
from trimtab.core.units import Bytes, BytesPerSecond, Seconds

MIN_BANDWIDTH_BYTES_PER_S = 1.0
"""Below what any link does; with much less, the time of a plan is no number any more."""

MAX_BANDWIDTH_BYTES_PER_S = 10e12
"""Above what any link does; a larger figure is bits taken for bytes, or a wrong prefix."""

MAX_CLUSTER_VALUES = 1_000_000
"""Keys and values of the largest cluster file: some sixty thousand nodes with a link each."""


def _plausible(bandwidth_bytes_per_s: float | None) -> float | None:
    if bandwidth_bytes_per_s is not None and 0 < bandwidth_bytes_per_s < MIN_BANDWIDTH_BYTES_PER_S:
        raise InvalidValue(
            f"{bandwidth_bytes_per_s:g} bytes per second are less than any link carries",
            fix="give at least 1 B/s, or leave the link out",
        )
    if bandwidth_bytes_per_s is not None and bandwidth_bytes_per_s > MAX_BANDWIDTH_BYTES_PER_S:
        raise InvalidValue(
            f"{bandwidth_bytes_per_s:g} bytes per second are more than any link carries",
            fix="give at most 10 TB/s, and write Gb/s for bits",
        )
    return bandwidth_bytes_per_s


class InsideLink(Document):
    """What joins the devices of one node.

    Attributes:
        bandwidth_bytes_per_s: from one device to its peers; None for what its profile says.
        latency_s: of one message between two devices, its software included.
    """

    bandwidth_bytes_per_s: BytesPerSecond | None = Field(None, gt=0)
    latency_s: Seconds = Field(10e-6, ge=0)

    _check_bandwidth = field_validator("bandwidth_bytes_per_s")(_plausible)


class Node(Document):
    """A machine with ``count`` devices of one kind.

    Attributes:
        name: unique in the cluster, and a name that launchers and schedulers take.
        device: the name of a device profile.
        count: how many devices it has.
        usd_per_hour: rent of the whole node; None for the sum of its devices' rents.
        memory_bytes: memory of each device, where it differs from the profile's.
        inside: what joins its devices.
        labels: whatever the user wants to select nodes by, such as a zone.
    """

    name: str
    device: str
    count: PositiveInt = 1
    usd_per_hour: float | None = Field(None, ge=0)
    memory_bytes: Bytes | None = Field(None, gt=0)
    inside: InsideLink = InsideLink()
    labels: Mapping[str, str] = Field(default_factory=dict)

    @field_validator("name")
    @classmethod
    def _known_everywhere(cls, name: str) -> str:
        if not is_node_name(name):
            raise InvalidValue(f"{shown(name)} is no host's name", fix=NODE_NAME_RULE)
        return name


class Link(Document):
    """A cable between two nodes or switches, full duplex.

    Attributes:
        a, b: names of its ends.
        bandwidth_bytes_per_s: in each direction.
        latency_s: of one message over it.
    """

    a: str
    b: str
    bandwidth_bytes_per_s: BytesPerSecond = Field(gt=0)
    latency_s: Seconds = Field(5e-6, ge=0)

    _check_bandwidth = field_validator("bandwidth_bytes_per_s")(_plausible)


@dataclass(frozen=True, slots=True)
class Device:
    """One device of a cluster."""

    node: str
    index: int
    profile: DeviceProfile

    @property
    def name(self) -> str:
        """Unique in the cluster, e.g. ``n0/3``."""
        return f"{self.node}/{self.index}"


class Cluster(Document):
    """Machines joined by a network.

    Attributes:
        name: what people call it.
        nodes: the machines.
        switches: names of the points that only forward.
        links: the cables; parallel ones are given as one with their summed bandwidth.
        own_devices: device profiles that go before the shipped ones.
    """

    name: str = "cluster"
    nodes: tuple[Node, ...] = Field(min_length=1)
    switches: tuple[str, ...] = ()
    links: tuple[Link, ...] = ()
    own_devices: tuple[DeviceProfile, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> Cluster:
        self._check_names()
        self._check_devices()
        self._check_links()
        return self

    def _check_names(self) -> None:
        named: list[tuple[str, KeyPath]]
        named = [(node.name, ("nodes", i, "name")) for i, node in enumerate(self.nodes)]
        named += [(switch, ("switches", i)) for i, switch in enumerate(self.switches)]
        seen: set[str] = set()
        for name, at in named:
            if name in seen:
                raise InvalidValue(
                    f"the name {name!r} is given twice",
                    at=at,
                    fix="give each node and switch a name of its own",
                )
            seen.add(name)

    def _check_devices(self) -> None:
        for i, node in enumerate(self.nodes):
            try:
                device(node.device, self.own_devices)
            except BadInput as error:
                raise InvalidValue(error.what, at=("nodes", i, "device"), fix=error.fix) from None

    def _check_links(self) -> None:
        names = {node.name for node in self.nodes} | set(self.switches)
        seen: set[frozenset[str]] = set()
        for i, link in enumerate(self.links):
            for key, end in (("a", link.a), ("b", link.b)):
                if end not in names:
                    raise InvalidValue(
                        f"{end!r} is no node or switch",
                        at=("links", i, key),
                        fix=nearest(end, names),
                    )
            if link.a == link.b:
                raise InvalidValue(
                    f"it joins {link.a!r} with itself",
                    at=("links", i, "b"),
                    fix="give two different ends; `inside` of a node joins its devices",
                )
            if frozenset((link.a, link.b)) in seen:
                raise InvalidValue(
                    f"it joins {link.a!r} and {link.b!r} again",
                    at=("links", i),
                    fix="give one link with the bandwidths summed",
                )
            seen.add(frozenset((link.a, link.b)))

    @classmethod
    def read(
        cls, path: str | Path, *, own_devices: str | Path | None = None, connected: bool = False
    ) -> Cluster:
        """Reads a cluster file.

        Args:
            path: the YAML file.
            own_devices: a file of device profiles that go before the shipped ones.
            connected: whether every node must reach every other.

        Raises:
            BadInput: it names the file, the line, the key, the value and what would be right.
        """
        where = str(path)
        data, lines = parse_yaml(read_text(path), where=where, max_nodes=MAX_CLUSTER_VALUES)
        if own_devices is not None and isinstance(data, dict):
            given = data.get("own_devices") or []
            data["own_devices"] = [*given, *read_devices(own_devices)]
        cluster = validate(cls, data, where=where, lines=lines)
        if connected and cluster.unreachable:
            lost = cluster.unreachable[0]
            index = [node.name for node in cluster.nodes].index(lost)
            raise BadInput(
                f"no links lead from {cluster.nodes[0].name!r} to {lost!r}",
                where=place(where, ("nodes", index), lines),
                fix="add links so that every node reaches every other",
            )
        return cluster

    @classmethod
    def from_hostfile(
        cls,
        path: str | Path,
        *,
        device: str = "cpu",
        bandwidth_bytes_per_s: float = 1.25e9,
        latency_s: float = 50e-6,
    ) -> Cluster:
        """Reads a DeepSpeed hostfile, whose lines are ``HOST slots=COUNT``.

        A hostfile knows nothing of the network: all hosts are joined by one switch.

        Args:
            path: the hostfile.
            device: what each slot is.
            bandwidth_bytes_per_s: of each host's cable; by default 10 Gb/s Ethernet.
            latency_s: between two hosts.

        Raises:
            BadInput: it names the file, the line and what would be right.
        """
        nodes: dict[str, Node] = {}
        for number, line in read_lines(path):
            content = line.split("#", 1)[0].strip()
            if content:
                node = _hostfile_node(content, device, f"{path}:{number}")
                if node.name in nodes:
                    raise BadInput(
                        f"the host {node.name!r} is given twice",
                        where=f"{path}:{number}",
                        fix="sum its slots on one line",
                    )
                nodes[node.name] = node
        if not nodes:
            raise BadInput("there is no host", where=str(path), fix="add HOST slots=COUNT")
        switch = "network"
        while switch in nodes:
            switch += "-"
        cable = {"bandwidth_bytes_per_s": bandwidth_bytes_per_s, "latency_s": latency_s / 2}
        data = {
            "name": Path(path).name,
            "nodes": tuple(nodes.values()),
            "switches": (switch,),
            "links": [{"a": name, "b": switch} | cable for name in nodes],
        }
        return validate(cls, data, where=str(path))

    @cached_property
    def graph(self) -> nx.Graph:
        """The network.

        Nodes have ``kind``, which is ``"node"`` or ``"switch"``; edges have
        ``bandwidth_bytes_per_s`` and ``latency_s``.
        """
        graph = nx.Graph(name=self.name)
        graph.add_nodes_from((node.name for node in self.nodes), kind="node")
        graph.add_nodes_from(self.switches, kind="switch")
        for link in self.links:
            graph.add_edge(
                link.a,
                link.b,
                bandwidth_bytes_per_s=link.bandwidth_bytes_per_s,
                latency_s=link.latency_s,
            )
        return graph

    @cached_property
    def unreachable(self) -> tuple[str, ...]:
        """The nodes that the first node cannot reach."""
        reached = nx.node_connected_component(self.graph, self.nodes[0].name)
        return tuple(node.name for node in self.nodes if node.name not in reached)

    def node(self, name: str) -> Node:
        """The node of a name.

        Raises:
            BadInput: there is none.
        """
        found = self._nodes_by_name.get(name)
        if found is None:
            raise BadInput(
                f"there is no node {name!r} in {self.name}",
                fix=nearest(name, self._nodes_by_name),
            )
        return found

    @cached_property
    def _nodes_by_name(self) -> Mapping[str, Node]:
        return {node.name: node for node in self.nodes}

    def profile(self, node: str) -> DeviceProfile:
        """The profile of a node's devices, with the node's own memory if it states one."""
        found = self.node(node)
        profile = device(found.device, self.own_devices)
        if found.memory_bytes is None:
            return profile
        return profile.model_copy(update={"memory_bytes": found.memory_bytes})

    def devices(self) -> tuple[Device, ...]:
        """Every device, in the order of the nodes."""
        return tuple(
            Device(node.name, index, profile)
            for node in self.nodes
            for profile in (self.profile(node.name),)
            for index in range(node.count)
        )

    @property
    def usd_per_hour(self) -> float:
        """Rent of the whole cluster."""
        return sum(self.node_usd_per_hour(node.name) for node in self.nodes)

    def node_usd_per_hour(self, node: str) -> float:
        """Rent of a node: its own price, or the sum of its devices'."""
        found = self.node(node)
        if found.usd_per_hour is not None:
            return found.usd_per_hour
        return found.count * self.profile(node).usd_per_hour

    def bandwidth_bytes_per_s(self, a: str, b: str) -> float:
        """Bandwidth of the widest path between two nodes: the narrowest link on it.

        Within one node (``a == b``) it is that of the link between its devices.

        Raises:
            BadInput: a node does not exist, or no links lead from one to the other.
        """
        if a == b:
            inside = self.node(a).inside.bandwidth_bytes_per_s
            return self.profile(a).link_bandwidth_bytes_per_s if inside is None else inside
        widths = self._widths_from(self.node(a).name)
        if self.node(b).name not in widths:
            raise BadInput(f"no links lead from {a!r} to {b!r} in {self.name}", fix="add a link")
        return widths[b]

    def latency_s(self, a: str, b: str) -> float:
        """Latency of the quickest among the widest paths between two nodes.

        Raises:
            BadInput: as `bandwidth_bytes_per_s`.
        """
        if a == b:
            return self.node(a).inside.latency_s
        width = self.bandwidth_bytes_per_s(a, b)

        def weight(_: str, __: str, edge: Mapping[str, float]) -> float | None:
            return edge["latency_s"] if edge["bandwidth_bytes_per_s"] >= width else None

        return float(nx.dijkstra_path_length(self.graph, a, b, weight))

    @cached_property
    def _widest_tree(self) -> nx.Graph:
        # A maximum spanning tree holds a widest path between any two of its points.
        return nx.maximum_spanning_tree(self.graph, weight="bandwidth_bytes_per_s")

    @cached_property
    def _widths(self) -> dict[str, dict[str, float]]:
        return {}

    def _widths_from(self, start: str) -> Mapping[str, float]:
        """The bottleneck of the widest path from ``start`` to each point that it reaches."""
        if start not in self._widths:
            widths = {start: float("inf")}
            for near, far in nx.bfs_edges(self._widest_tree, start):
                edge = self._widest_tree.edges[near, far]
                widths[far] = min(widths[near], edge["bandwidth_bytes_per_s"])
            self._widths[start] = widths
        return self._widths[start]


def _hostfile_node(content: str, device_name: str, where: str) -> Node:
    fix = "write HOST slots=COUNT"
    name, *rest = content.split()
    if len(rest) != 1 or not rest[0].startswith("slots="):
        raise BadInput(f"{shown(content)} is no host", where=where, fix=fix)
    if not is_node_name(name):
        raise BadInput(f"{shown(name)} is no host's name", where=where, fix=NODE_NAME_RULE)
    slots = rest[0].removeprefix("slots=")
    if not re.fullmatch(r"0*[1-9]\d{0,8}", slots, re.ASCII):
        raise BadInput(f"slots is {shown(slots)}", where=where, fix="give a number from 1")
    return Node(name=name, device=device_name, count=int(slots))
