"""The tiers of a network from the bandwidth between each two hosts, as it was measured.

Hosts are clustered by average linkage on the logarithm of bandwidth, and the dendrogram is cut
where merging costs a marked share of the bandwidth; each cluster becomes a switch.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from trimtab.core.cluster import MAX_BANDWIDTH_BYTES_PER_S
from trimtab.core.documents import Document, InvalidValue, shown, validate
from trimtab.core.errors import BadInput
from trimtab.core.node_names import NODE_NAME_RULE, is_node_name
from trimtab.core.topology.draft import Cable, Draft, Host
from trimtab.core.units import parse_bytes_per_s

Floats = NDArray[np.float64]

TOLERANCE = 0.25
"""Hosts whose bandwidths differ by less than this share are taken to be equally near."""

MAX_MEASURED_HOSTS = 2048


class Measurement(Document):
    """The bandwidth between each two hosts.

    Attributes:
        hosts: their names.
        bandwidth_bytes_per_s: from each host (row) to each (column); the diagonal is not read.
        latency_s: of a small message, likewise; empty where it was not measured.
        at_once: whether as many disjoint pairs as there are were measured at one time, so that
            they shared what links they have in common.
    """

    hosts: tuple[str, ...] = Field(min_length=1, max_length=MAX_MEASURED_HOSTS)
    bandwidth_bytes_per_s: tuple[tuple[float | None, ...], ...]
    latency_s: tuple[tuple[float | None, ...], ...] = ()
    at_once: bool = False

    @model_validator(mode="after")
    def _square(self) -> Measurement:
        twice = next((name for name in self.hosts if self.hosts.count(name) > 1), None)
        if twice is not None:
            raise InvalidValue(f"the host {shown(twice)} is given twice", at=("hosts",))
        for index, name in enumerate(self.hosts):
            if not is_node_name(name):
                raise InvalidValue(
                    f"{shown(name)} is no host's name", at=("hosts", index), fix=NODE_NAME_RULE
                )
        for key, matrix in (
            ("bandwidth_bytes_per_s", self.bandwidth_bytes_per_s),
            ("latency_s", self.latency_s),
        ):
            if matrix or key != "latency_s":
                self._check(key, matrix)
        return self

    def _check(self, key: str, matrix: Sequence[Sequence[float | None]]) -> None:
        count = len(self.hosts)
        if len(matrix) != count:
            raise InvalidValue(
                f"{key} has {len(matrix)} rows for {count} hosts",
                at=(key,),
                fix="give one for each",
            )
        for i, row in enumerate(matrix):
            if len(row) != count:
                raise InvalidValue(
                    f"it has {len(row)} values for {count} hosts",
                    at=(key, i),
                    fix="give one for each",
                )
            for j, value in enumerate(row):
                if i != j and (value is None or value <= 0):
                    raise InvalidValue(
                        f"from {self.hosts[i]!r} to {self.hosts[j]!r} it is {shown(value)}",
                        at=(key, i),
                        fix="give a positive number",
                    )


@dataclass(frozen=True, slots=True)
class Tier:
    """A partition of the hosts into domains.

    Attributes:
        domain_of: the number of each host's domain.
        bandwidth_bytes_per_s: the median between hosts that this tier is the first to join.
    """

    domain_of: tuple[int, ...]
    bandwidth_bytes_per_s: float


def draft_of_measurement(found: Measurement, source: str) -> Draft:
    """The tree of inferred switches, with what each link was seen to carry."""
    tiers = tiers_of(found)
    draft = Draft(source)
    if not tiers:
        draft.add_host(found.hosts[0], Host(source))
        return draft
    names, rates = _switch_names(found, tiers), _symmetric(found)
    for switch in dict.fromkeys(name for tier in names for name in tier):
        draft.add_switch(switch, source)
    for number, host in enumerate(found.hosts):
        draft.add_host(host, Host(source))
        rate = _reach(rates, number, tiers)
        draft.join(Cable(host, names[0][number], source, rate))
    for level in range(len(tiers) - 1):
        for domain in dict.fromkeys(tiers[level].domain_of):
            members = [i for i, d in enumerate(tiers[level].domain_of) if d == domain]
            rate = tiers[level + 1].bandwidth_bytes_per_s * _crossing(found, len(members))
            lower, upper = names[level][members[0]], names[level + 1][members[0]]
            cable = Cable(lower, upper, source, min(rate, MAX_BANDWIDTH_BYTES_PER_S))
            draft.join(cable)
    return draft


def tiers_of(found: Measurement, tolerance: float = TOLERANCE) -> list[Tier]:
    """The tiers, the closest first; the last joins all hosts. None for a single host.

    Args:
        found: the bandwidth between each two hosts.
        tolerance: hosts whose bandwidths differ by less than this share are equally near.
    """
    if len(found.hosts) < 2:
        return []
    from scipy.cluster.hierarchy import average, fcluster
    from scipy.spatial.distance import squareform

    rates = _symmetric(found)
    # Bandwidths below the highest, so that no distance is negative.
    distances = np.log(rates.max()) - np.log(rates)
    np.fill_diagonal(distances, 0.0)
    tree = average(squareform(distances, checks=False))
    heights = tree[:, 2]
    cuts = _cuts(heights, float(np.log1p(tolerance)))
    partitions = [fcluster(tree, cut, criterion="distance") for cut in cuts]
    partitions.append(np.ones(len(found.hosts), dtype=int))
    return _with_rates(rates, partitions)


def _cuts(heights: Floats, gap: float) -> list[float]:
    """Where the heights of merges leave a gap: between each end of a tier and the next."""
    steps = pairwise(np.sort(heights))
    return [float((lower + higher) / 2) for lower, higher in steps if higher - lower > gap]


def _with_rates(rates: Floats, partitions: Sequence[NDArray[np.int_]]) -> list[Tier]:
    tiers: list[Tier] = []
    joined = np.eye(len(rates), dtype=bool)
    for labels in partitions:
        together = labels[:, None] == labels[None, :]
        new = together & ~joined
        if new.any():
            tiers.append(Tier(tuple(map(int, labels)), float(np.median(rates[new]))))
        joined = together
    return tiers


def _symmetric(found: Measurement) -> Floats:
    rates = np.array(
        [[np.nan if v is None else v for v in row] for row in found.bandwidth_bytes_per_s],
        dtype=np.float64,
    )
    np.fill_diagonal(rates, np.nan)
    both: Floats = (rates + rates.T) / 2
    np.fill_diagonal(both, np.nanmax(both))
    return both


def _switch_names(found: Measurement, tiers: Sequence[Tier]) -> list[list[str]]:
    """The switch of each tier above each host: numbered in the order of the hosts."""
    taken = set(found.hosts)
    names: list[list[str]] = []
    for level, tier in enumerate(tiers, 1):
        numbers = {domain: n for n, domain in enumerate(dict.fromkeys(tier.domain_of))}
        top = level == len(tiers)
        stem = "core" if top else f"tier{level}"
        while any(name == stem or name.startswith(f"{stem}-") for name in taken):
            stem += "_"
        of_host = [stem if top else f"{stem}-{numbers[d]}" for d in tier.domain_of]
        names.append(of_host)
        taken |= set(of_host)
    return names


def _reach(rates: Floats, host: int, tiers: Sequence[Tier]) -> float:
    """What a host's own link carries: the median to the hosts of the closest domain it shares."""
    for tier in tiers:
        near = [i for i, d in enumerate(tier.domain_of) if d == tier.domain_of[host] and i != host]
        if near:
            return min(float(np.median(rates[host, near])), MAX_BANDWIDTH_BYTES_PER_S)
    raise AssertionError("the last tier joins all hosts")


def _crossing(found: Measurement, members: int) -> float:
    """How many messages leave a domain at one time, on average.

    Each host has one partner at a time, any of the others, and each pair sends one way at a time.
    """
    count = len(found.hosts)
    pairs = members * (count - members) / (count - 1)
    return max(1.0, pairs / 2) if found.at_once else 1.0


def measurement_of_csv(text: str, source: str) -> Measurement:
    """The matrix of a table: host names in the first row and column; quantities may have units.

    Raises:
        BadInput: it names the line, and what would be right.
    """
    rows = [(n, row) for n, row in enumerate(_rows(text, source), 1) if any(map(str.strip, row))]
    hosts = [cell.strip() for cell in rows[0][1][1:]]
    matrix: list[list[float | None]] = []
    for index, (number, row) in enumerate(rows[1:]):
        where = f"{source}:{number}"
        if index >= len(hosts) or row[0].strip() != hosts[index]:
            raise BadInput(
                f"the row is named {shown(row[0].strip())}",
                where=where,
                fix="name rows as the columns, in the same order",
            )
        if len(row) != len(hosts) + 1:
            raise BadInput(f"the row has {len(row) - 1} values for {len(hosts)} hosts", where=where)
        matrix.append([_cell(cell, where, i == index) for i, cell in enumerate(row[1:])])
    data = {"hosts": hosts, "bandwidth_bytes_per_s": matrix}
    return validate(Measurement, data, where=source, lines={("hosts",): rows[0][0]})


def _rows(text: str, source: str) -> list[list[str]]:
    try:
        return list(csv.reader(text.splitlines(), strict=True))
    except csv.Error as error:
        raise BadInput(f"this is no CSV: {error}", where=source) from None


def _cell(text: str, where: str, diagonal: bool) -> float | None:
    if diagonal:
        return None
    fix = "write 12.5e9 (bytes per second) or 100 Gb/s"
    try:
        value: Any = parse_bytes_per_s(text.strip())
        return float(value)
    except ValueError:
        raise BadInput(f"{shown(text.strip())} is no bandwidth", where=where, fix=fix) from None
