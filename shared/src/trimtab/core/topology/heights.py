"""How high each switch stands, where nothing but its cables is known."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Collection, Iterable, Mapping

import networkx as nx


def heights(links: Iterable[tuple[str, str]], hosts: Collection[str]) -> dict[str, int]:
    """The height of each point: hosts have 0, the switches that they hang on 1, and so on.

    A host may hang on any switch, such as a login node on the core. So heights are distances from
    the switches that have as many hosts as neighbouring switches, or more. Another switch with a
    host is one of these too if it would be among the highest without joining what is below them.

    Args:
        links: the two ends of each cable.
        hosts: the points that are no switches.

    Returns:
        The heights of hosts and of the switches that a cable leads to from them.
    """
    near: defaultdict[str, list[str]] = defaultdict(list)
    on: defaultdict[str, int] = defaultdict(int)
    for a, b in links:
        for one, other in ((a, b), (b, a)):
            if one not in hosts:
                near[one] += [] if other in hosts else [other]
                on[one] += other in hosts
    with_hosts = [switch for switch, count in on.items() if count]
    full = [switch for switch in with_hosts if on[switch] >= len(near[switch])]
    found = _distances(near, full)
    found |= _distances(near, [switch for switch in with_hosts if switch not in found])
    top = max(found.values(), default=0)
    piece = _pieces(near, {switch for switch, height in found.items() if height < top})
    for switch in with_hosts:
        if found[switch] == top and len({piece[o] for o in near[switch] if o in piece}) < 2:
            found[switch] = 1
    return dict.fromkeys(hosts, 0) | found


def _distances(near: Mapping[str, Iterable[str]], lowest: Iterable[str]) -> dict[str, int]:
    found = dict.fromkeys(lowest, 1)
    waiting = deque(found)
    while waiting:
        switch = waiting.popleft()
        for other in near[switch]:
            if other not in found:
                found[other] = found[switch] + 1
                waiting.append(other)
    return found


def _pieces(near: Mapping[str, Iterable[str]], switches: Collection[str]) -> dict[str, int]:
    graph: nx.Graph[str] = nx.Graph()
    graph.add_nodes_from(switches)
    graph.add_edges_from((s, other) for s in switches for other in near[s] if other in switches)
    pieces = enumerate(nx.connected_components(graph))
    return {switch: number for number, members in pieces for switch in members}
