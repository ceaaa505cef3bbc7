"""What a plan achieves, counted from its ranks alone."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import get_args

from trimtab.placement.fabric import Fabric
from trimtab.placement.job import GroupKind, TrainingJob


def group_spreads(
    fabric: Fabric, job: TrainingJob, order: Sequence[str]
) -> dict[str, dict[str, dict[str, float]]]:
    """How many domains the groups of each kind touch, for each tier.

    Args:
        fabric: the network.
        job: the job.
        order: its nodes by node rank.

    Returns:
        By tier and kind of group: the ``widest`` and the ``mean`` count; of pipelines also the most
        ``crossings``, steps from one stage to the next that leave a domain. With virtual stages
        the last stage hands on to the first.
    """
    path = {place.name: place.path for place in fabric.places}
    spreads: dict[str, dict[str, dict[str, float]]] = {}
    for index, tier in enumerate(fabric.tiers):
        domain = [path[node][index] for node in order]
        spreads[tier] = {}
        for kind in get_args(GroupKind):
            counts = [
                len({domain[rank // job.ranks_per_node] for rank in group})
                for group in job.groups(kind)
            ]
            spreads[tier][kind] = {"widest": max(counts), "mean": sum(counts) / len(counts)}
        spreads[tier]["pipeline"]["crossings"] = max(
            _crossings([domain[rank // job.ranks_per_node] for rank in group], job)
            for group in job.groups("pipeline")
        )
    return spreads


def _crossings(domains: Sequence[str], job: TrainingJob) -> int:
    """How often a pipeline through these domains, by stage, goes from one into another."""
    around = [*domains, domains[0]] if job.virtual_stages > 1 else domains
    return sum(a != b for a, b in pairwise(around))
