"""The bytes that a step moves between domains of the network, from the ranks' volumes.

Collectives are rings in the order of ranks: what a rank sends goes to the next of its group, and
the last one's to the first. Tokens go from each rank to every other of its expert group in equal
parts. Between two stages half of the volume goes each way; interleaved stages also send from the
last rank to the first, but for the last chunk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from trimtab.placement.affinity import weight_of
from trimtab.placement.fabric import Fabric
from trimtab.placement.job import Ranks, TrainingJob
from trimtab.placement.overlap import exposures
from trimtab.placement.volumes import Volumes


@dataclass(frozen=True, slots=True, eq=False)
class Flow:
    """Bytes that each of some ranks sends to another one in a step.

    Attributes:
        kind: of the groups, a field of `Volumes`.
        source, target: ranks; shape (pairs,).
        size_bytes: from each source to its target.
    """

    kind: str
    source: Ranks
    target: Ranks
    size_bytes: float


@dataclass(frozen=True, slots=True, eq=False)
class Traffic:
    """A step's bytes between the domains of a tier.

    Attributes:
        domains: those that hold ranks, in the fabric's order.
        between: bytes from each domain (first axis) to each; shape (domains, domains). The diagonal
            is what stays inside.
        crossing: bytes that leave a domain, by kind of group.
    """

    domains: tuple[str, ...]
    between: npt.NDArray[np.float64]
    crossing: dict[str, float]


def flows(job: TrainingJob, volumes: Volumes) -> Iterator[Flow]:
    """Who sends how much to whom in a step; flows of one kind may come in parts."""
    for kind, lines in (
        ("tensor", job.lines("tensor")),
        ("context", job.lines("context")),
        ("data", job.lines("context", "data")),
        ("expert_data", job.expert_replica_lines),
    ):
        if lines.shape[1] > 1:
            yield _shifted(kind, lines, 1, getattr(volumes, kind))
    experts = job.expert_lines
    others = experts.shape[1] - 1
    for shift in range(1, others + 1):
        yield _shifted("expert", experts, shift, volumes.expert / others)
    yield from _stages(job, volumes.pipeline / 2)


def _shifted(kind: str, lines: Ranks, shift: int, size_bytes: float) -> Flow:
    return Flow(kind, lines.ravel(), np.roll(lines, -shift, axis=1).ravel(), size_bytes)


def _stages(job: TrainingJob, each_way: float) -> Iterator[Flow]:
    lines = job.lines("pipeline")
    if lines.shape[1] == 1:
        return
    up, down = lines[:, :-1].ravel(), lines[:, 1:].ravel()
    yield Flow("pipeline", up, down, each_way)
    yield Flow("pipeline", down, up, each_way)
    again = each_way * (job.virtual_stages - 1) / job.virtual_stages
    if again:
        yield Flow("pipeline", lines[:, -1], lines[:, 0], again)
        yield Flow("pipeline", lines[:, 0], lines[:, -1], again)


def traffic(
    fabric: Fabric, job: TrainingJob, order: Sequence[str], tier: int, volumes: Volumes
) -> Traffic:
    """What a step moves between the domains of a tier.

    Args:
        fabric: the network; its nodes are one domain, ``network``, where it has no such tier.
        job: the job.
        order: its nodes by node rank.
        tier: which domains.
        volumes: bytes that each rank sends in a step.
    """
    taken = set(order)
    domain = {
        place.name: place.path[tier] if tier < len(place.path) else "network"
        for place in fabric.places
        if place.name in taken
    }
    names = tuple(dict.fromkeys(domain.values()))
    index = {name: number for number, name in enumerate(names)}
    at = np.repeat([index[domain[node]] for node in order], job.ranks_per_node)
    between = np.zeros(len(names) ** 2)
    crossing: dict[str, float] = {}
    for flow in flows(job, volumes):
        if not flow.size_bytes:
            continue
        pairs = np.bincount(at[flow.source] * len(names) + at[flow.target], minlength=between.size)
        between += pairs * flow.size_bytes
        out = int(pairs.sum() - pairs[:: len(names) + 1].sum())
        crossing[flow.kind] = crossing.get(flow.kind, 0.0) + out * flow.size_bytes
    return Traffic(names, between.reshape(len(names), -1), crossing)


def communication(
    fabric: Fabric, job: TrainingJob, order: Sequence[str], alpha: float, tier: int
) -> dict[str, Any]:
    """The job's communication, for a plan's details.

    Args:
        fabric: the network.
        job: the job.
        order: its nodes by node rank, as planned.
        alpha: the weight of data parallel groups that the plan was made with.
        tier: the domains that the plan is about.

    Returns:
        ``alpha_from``: where the weight comes from. ``volumes``: bytes a step of a rank by kind of
        group, None without a model. ``exposure``: seconds a step of data parallel groups and
        pipelines. ``crossing``: by tier and kind of group, bytes a step of all ranks that leave a
        domain, ``before`` (nodes in the order of their names) and ``after``. ``between``: the same
        two as bytes from each domain of the plan's tier to the others that it sends to.
    """
    found = weight_of(job)
    volumes = job.step_volumes()
    facts: dict[str, Any] = {
        "alpha_from": found.source if found.alpha == alpha else "given",
        "volumes": None if volumes is None else volumes.model_dump(),
        "exposure": {kind: asdict(one) for kind, one in (exposures(job) or {}).items()},
        "crossing": {},
        "between": {},
    }
    if volumes is None:
        return facts
    orders = {"before": sorted(order), "after": list(order)}
    for index, name in enumerate(fabric.tiers):
        seen = {when: traffic(fabric, job, nodes, index, volumes) for when, nodes in orders.items()}
        facts["crossing"][name] = {
            kind: {when: one.crossing[kind] for when, one in seen.items()}
            for kind in seen["after"].crossing
        }
        if index == tier:
            facts["between"] = {when: _named(one) for when, one in seen.items()}
    return facts


def _named(found: Traffic) -> dict[str, dict[str, float]]:
    """The bytes between domains by their names, without what is nothing or stays inside."""
    return {
        name: {
            found.domains[other]: float(row[other]) for other in np.flatnonzero(row) if other != at
        }
        for at, (name, row) in enumerate(zip(found.domains, found.between, strict=True))
    }
