"""Maximum flow, with the minimum cut that proves it."""

from __future__ import annotations

import time
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

import networkx as nx
from networkx.algorithms.flow import shortest_augmenting_path

from trimtab.core.errors import BadInput
from trimtab.core.solve.certificate import Certificate

N = TypeVar("N", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Flow(Generic[N]):
    """A maximum flow.

    Attributes:
        value: what leaves the source.
        flows: what each edge carries; edges that carry nothing are left out.
        cut: the edges of a minimum cut, the bottleneck.
        certificate: its bound is the cut's capacity.
    """

    value: float
    flows: dict[tuple[N, N], float]
    cut: frozenset[tuple[N, N]]
    certificate: Certificate


def max_flow(capacities: Mapping[tuple[N, N], float], source: N, sink: N) -> Flow[N]:
    """The most that can flow from source to sink over directed edges of given capacities.

    Integer capacities give integer flows.

    Raises:
        BadInput: a capacity is negative or not finite, or source and sink are the same.
    """
    if source == sink:
        raise BadInput(f"source and sink are both {source!r}", fix="give two nodes")
    graph: nx.DiGraph[N] = nx.DiGraph()
    graph.add_nodes_from((source, sink))
    for (tail, head), capacity in capacities.items():
        if not 0 <= capacity < float("inf"):
            raise BadInput(
                f"the capacity of {tail!r} -> {head!r} is {capacity}",
                fix="give a finite number that is not negative",
            )
        graph.add_edge(tail, head, capacity=capacity)
    started = time.perf_counter()
    # Augmenting paths end exactly on floats; preflow-push can leave rounding residue behind.
    value, flows = nx.maximum_flow(graph, source, sink, flow_func=shortest_augmenting_path)
    bound, (reached, _) = nx.minimum_cut(graph, source, sink, flow_func=shortest_augmenting_path)
    wall_s = time.perf_counter() - started
    return Flow(
        value=value,
        flows={(t, h): f for t, heads in flows.items() for h, f in heads.items() if f > 0},
        cut=frozenset(e for e in capacities if e[0] in reached and e[1] not in reached),
        certificate=Certificate("optimal", value, bound, wall_s, "networkx"),
    )
