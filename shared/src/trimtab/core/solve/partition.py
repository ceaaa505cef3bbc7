"""Balanced graph partition: the fewest bytes across, no part above its capacity.

Small graphs are solved exactly; larger ones by k-way Fiduccia-Mattheyses passes
with the Donath-Hoffman eigenvalue bound beside the answer.
"""

from __future__ import annotations

import time
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt

from trimtab.core.errors import BadInput, Infeasible
from trimtab.core.solve.certificate import Certificate, Limits, certify

N = TypeVar("N", bound=Hashable)
Matrix = npt.NDArray[np.float64]
Assignment = list[int]


@dataclass(frozen=True, slots=True)
class Partition(Generic[N]):
    """The part of each node, from 0, and what is proven about the weight across parts."""

    parts: dict[N, int]
    certificate: Certificate


def partition(
    node_weights: Mapping[N, float],
    edge_weights: Mapping[tuple[N, N], float],
    capacities: Sequence[float],
    *,
    seed: int = 0,
    restarts: int = 8,
    exact_assignments: int = 200_000,
    limits: Limits = Limits(),
) -> Partition[N]:
    """Splits nodes into parts, minimising the weight of the edges that cross.

    Args:
        node_weights: positive weight of each node.
        edge_weights: weight of each undirected edge, not negative; given both ways it adds up.
        capacities: the most node weight that each part may hold.
        seed: of the heuristic's random starts.
        restarts: how many of them.
        exact_assignments: a graph with at most this many assignments is solved exactly.
        limits: time; the heuristic stops early within the gap of the bound.

    Raises:
        BadInput: an edge names an unknown node, or a weight is negative or not finite.
        Infeasible: the nodes do not fit, or none was found to.
    """
    started = time.perf_counter()
    nodes = list(node_weights)
    weights = np.array([node_weights[n] for n in nodes], dtype=float)
    adjacency = _adjacency(nodes, edge_weights)
    room = np.array(capacities, dtype=float)
    _check(nodes, weights, room)
    if len(room) ** max(len(nodes) - 1, 0) <= exact_assignments:
        best = _enumerate(weights, adjacency, room)
        bound, solver = (_cut(adjacency, best) if best is not None else 0.0), "enumeration"
    else:
        bound, solver = spectral_bound(weights, adjacency, room), "fiduccia-mattheyses"
        deadline = started + limits.time_s
        best = _search(weights, adjacency, room, seed, restarts, deadline, bound)
    if best is None:
        found = "there is" if solver == "enumeration" else "was found"
        raise Infeasible(
            f"no split of {len(nodes)} nodes into {len(room)} parts {found} that fits",
            relaxation=f"raise each capacity by the largest node's weight, {weights.max():g}",
        )
    objective = _cut(adjacency, best)
    wall_s = time.perf_counter() - started
    certificate = certify(objective, bound, limits, wall_s, solver)
    return Partition(dict(zip(nodes, best, strict=True)), certificate)


def _adjacency(nodes: Sequence[N], edges: Mapping[tuple[N, N], float]) -> Matrix:
    index = {node: i for i, node in enumerate(nodes)}
    matrix = np.zeros((len(nodes), len(nodes)))
    for (a, b), weight in edges.items():
        for node in (a, b):
            if node not in index:
                raise BadInput(f"an edge names the unknown node {node!r}", fix="give it a weight")
        if not 0 <= weight < float("inf"):
            raise BadInput(f"the weight of {a!r} - {b!r} is {weight}", fix="give a finite weight")
        if a != b:
            matrix[index[a], index[b]] += weight
            matrix[index[b], index[a]] += weight
    return matrix


def _check(nodes: Sequence[N], weights: Matrix, room: Matrix) -> None:
    if not len(room):
        raise BadInput("there are no parts", fix="give one capacity for each part")
    for node, weight in zip(nodes, weights, strict=True):
        if not 0 < weight < float("inf"):
            raise BadInput(f"the weight of node {node!r} is {weight}", fix="give a positive one")
        if weight > room.max():
            raise Infeasible(
                f"node {node!r} of weight {weight:g} fits no part",
                relaxation=f"raise one capacity from {room.max():g} to {weight:g}",
            )
    if weights.sum() > room.sum():
        raise Infeasible(
            f"the nodes weigh {weights.sum():g} and the parts hold {room.sum():g}",
            relaxation=f"raise the capacities by {weights.sum() - room.sum():g} in all",
        )


def _cut(adjacency: Matrix, assignment: Assignment) -> float:
    parts = np.array(assignment)
    return float(adjacency[parts[:, None] != parts[None, :]].sum() / 2)


def _enumerate(weights: Matrix, adjacency: Matrix, room: Matrix) -> Assignment | None:
    """The best assignment by branch and bound over all of them."""
    count = len(weights)
    best: Assignment | None = None
    best_cut = float("inf")
    loads = [0.0] * len(room)
    chosen: Assignment = []

    def extend(cut: float) -> None:
        nonlocal best, best_cut
        node = len(chosen)
        if cut >= best_cut:
            return
        if node == count:
            best, best_cut = list(chosen), cut
            return
        tried: set[tuple[float, float]] = set()
        for part in range(len(room)):
            twin = (loads[part], float(room[part]))
            # Empty parts of one capacity are interchangeable: try one of them.
            if loads[part] == 0 and twin in tried:
                continue
            tried.add(twin)
            if loads[part] + weights[node] > room[part] * (1 + 1e-12):
                continue
            added = sum(adjacency[node, n] for n in range(node) if chosen[n] != part)
            loads[part] += weights[node]
            chosen.append(part)
            extend(cut + added)
            chosen.pop()
            loads[part] -= weights[node]

    extend(0.0)
    return best


def spectral_bound(weights: Matrix, adjacency: Matrix, room: Matrix) -> float:
    """Donath and Hoffman's lower bound on the cut, from the Laplacian's smallest eigenvalues.

    The bound holds for the parts' node counts; the counts used here are the most unequal that the
    capacities allow, which can only lower it.
    """
    laplacian = np.diag(adjacency.sum(axis=1)) - adjacency
    eigenvalues = np.maximum(np.linalg.eigvalsh(laplacian)[: len(room)], 0.0)
    lightest = np.cumsum(np.sort(weights))
    most = sorted(int(np.searchsorted(lightest, c * (1 + 1e-12), "right")) for c in room)[::-1]
    bound, left = 0.0, len(weights)
    for eigenvalue, limit in zip(eigenvalues, most, strict=False):
        size = min(limit, left)
        bound += float(eigenvalue) * size / 2
        left -= size
    return bound * (1 - 1e-9)


def _search(
    weights: Matrix,
    adjacency: Matrix,
    room: Matrix,
    seed: int,
    restarts: int,
    deadline: float,
    bound: float,
) -> Assignment | None:
    random = np.random.default_rng(seed)
    best: Assignment | None = None
    for _ in range(restarts):
        start = _pack(weights, adjacency, room, random)
        if start is None:
            continue
        refined = _refine(weights, adjacency, room, start, deadline)
        if best is None or _cut(adjacency, refined) < _cut(adjacency, best):
            best = refined
        if _cut(adjacency, best) <= bound or time.perf_counter() > deadline:
            break
    return best


def _pack(
    weights: Matrix, adjacency: Matrix, room: Matrix, random: np.random.Generator
) -> Assignment | None:
    """Places heavy nodes first, each where it has the most neighbours among the parts with room."""
    noise = random.uniform(0.8, 1.25, len(weights))
    assignment = np.full(len(weights), -1)
    left = room.astype(float).copy()
    for node in np.argsort(-weights * noise):
        fits = left + 1e-12 * room >= weights[node]
        if not fits.any():
            return None
        attraction = np.array(
            [adjacency[node, assignment == part].sum() for part in range(len(room))]
        )
        scores = np.where(fits, attraction + 1e-9 * left / room.max(), -np.inf)
        part = int(np.argmax(scores))
        assignment[node] = part
        left[part] -= weights[node]
    return [int(part) for part in assignment]


def _refine(
    weights: Matrix, adjacency: Matrix, room: Matrix, start: Assignment, deadline: float
) -> Assignment:
    """Fiduccia-Mattheyses passes: each node moves or swaps once; the best prefix is kept."""
    best = list(start)
    best_cut = _cut(adjacency, best)
    improved = True
    while improved and time.perf_counter() < deadline:
        improved = False
        current, cut = np.array(best), best_cut
        free = np.ones(len(weights), dtype=bool)
        while free.any():
            step = _best_step(weights, adjacency, room, current, free)
            if step is None:
                break
            gain, changes = step
            for node, part in changes:
                current[node] = part
                free[node] = False
            cut -= gain
            if cut < best_cut - 1e-9 * max(1.0, abs(best_cut)):
                best, best_cut, improved = [int(p) for p in current], cut, True
    return best


def _best_step(
    weights: Matrix,
    adjacency: Matrix,
    room: Matrix,
    current: npt.NDArray[np.int_],
    free: npt.NDArray[np.bool_],
) -> tuple[float, list[tuple[int, int]]] | None:
    """The move or swap of free nodes with the largest gain that keeps every capacity."""
    parts = len(room)
    membership = np.eye(parts)[current]
    attraction = adjacency @ membership
    own = attraction[np.arange(len(current)), current]
    gains = attraction - own[:, None]
    loads = membership.T @ weights
    fits = loads[None, :] + weights[:, None] <= room[None, :] * (1 + 1e-12)
    allowed = fits & free[:, None] & (membership == 0)
    best: tuple[float, list[tuple[int, int]]] | None = None
    if allowed.any():
        node, part = np.unravel_index(np.argmax(np.where(allowed, gains, -np.inf)), gains.shape)
        best = float(gains[node, part]), [(int(node), int(part))]
    to_other = gains[:, current]
    swap_gain = to_other + to_other.T - 2 * adjacency
    change = weights[None, :] - weights[:, None]
    slack = (room - loads)[current] + 1e-12 * room[current]
    legal = (change <= slack[:, None]) & (-change <= slack[None, :])
    legal &= free[:, None] & free[None, :] & (current[:, None] != current[None, :])
    if legal.any():
        a, b = np.unravel_index(np.argmax(np.where(legal, swap_gain, -np.inf)), legal.shape)
        if best is None or swap_gain[a, b] > best[0]:
            pair = [(int(a), int(current[b])), (int(b), int(current[a]))]
            best = float(swap_gain[a, b]), pair
    return best
