"""The communication of a training step, modelled as flows that share a two-tier network.

Nodes hang on pods, pods on a core that cannot carry all they could send. In a step neighbouring
stages exchange activations and gradients, and each data parallel group reduces over a ring in the
order of its ranks. Flows of a phase begin together and share links max-min fairly; a phase ends
with its last flow. A model for comparing placements: nothing is hidden behind compute.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from trimtab.placement.grid import PodGrid

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Links:
    """What nodes and pods can carry, each way.

    Attributes:
        node_bytes_per_s: of each node.
        pod_bytes_per_s: of each pod, to and from the core; shape (pods,).
    """

    node_bytes_per_s: float
    pod_bytes_per_s: Floats


def communication_s(grid: PodGrid, links: Links, *, pipeline: float, data: float) -> float:
    """The time of all communication of a step.

    Args:
        grid: the pod of each node.
        links: of the network.
        pipeline: bytes between two neighbouring stages of a row, each way.
        data: bytes that each node sends on the ring of its column.
    """
    return sum(_phase_s(grid, links, *phase) for phase in _phases(grid, pipeline, data))


def _phases(grid: PodGrid, pipeline: float, data: float) -> Iterator[tuple[Ints, Ints, float]]:
    """Senders, receivers (numbers of cells), and the bytes of each flow."""
    cells = np.arange(grid.size).reshape(grid.shape)
    left, right = cells[:, :-1].ravel(), cells[:, 1:].ravel()
    if pipeline and left.size:
        yield np.concatenate([left, right]), np.concatenate([right, left]), pipeline
    if data and len(grid) > 1:
        yield cells.ravel(), np.roll(cells, -1, axis=0).ravel(), data


def _phase_s(grid: PodGrid, links: Links, source: Ints, target: Ints, size_bytes: float) -> float:
    ways, capacity = _ways(grid, links, source, target)
    left, time_s = np.full(len(source), size_bytes), 0.0
    while len(left):
        rates = fair_rates(ways, capacity)
        step_s = float((left / rates).min())
        left = left - rates * step_s
        time_s += step_s
        on = left > size_bytes * 1e-9
        ways, left = ways[on], left[on]
    return time_s


def _ways(grid: PodGrid, links: Links, source: Ints, target: Ints) -> tuple[Ints, Floats]:
    """The links of each flow, shape (flows, 4), and the capacity of each link.

    A flow that stays in its pod has no link of pods: it has one that never fills instead.
    """
    pod, cells, pods = grid.ravel(), grid.size, len(links.pod_bytes_per_s)
    crosses = pod[source] != pod[target]
    idle = 2 * cells + 2 * pods
    out = np.where(crosses, 2 * cells + pod[source], idle)
    into = np.where(crosses, 2 * cells + pods + pod[target], idle)
    nodes = np.full(2 * cells, links.node_bytes_per_s)
    capacity = np.concatenate([nodes, links.pod_bytes_per_s, links.pod_bytes_per_s, [np.inf]])
    return np.stack([source, cells + target, out, into], axis=1), capacity


def fair_rates(ways: Ints, capacity: Floats) -> Floats:
    """The max-min fair rate of each flow, by filling links one after another.

    Args:
        ways: the links of each flow; shape (flows, links of a way). No link twice, but for those
            that never fill.
        capacity: of each link; infinite where it never fills.
    """
    rates, open_ = np.zeros(len(ways)), np.ones(len(ways), dtype=bool)
    left = capacity.copy()
    while open_.any():
        flows = np.bincount(ways[open_].ravel(), minlength=len(capacity))
        used = flows > 0
        share = np.full(len(capacity), np.inf)
        share[used] = left[used] / flows[used]
        least = share.min()
        full = share <= least * (1 + 1e-9)
        now = open_ & full[ways].any(axis=1)
        rates[now] = least
        taken = np.bincount(ways[now].ravel(), minlength=len(capacity)) * least
        left = np.maximum(left - taken, 0.0)
        open_ &= ~now
    return rates
