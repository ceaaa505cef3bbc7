"""The text of ``ibnetdiscover``: an InfiniBand fabric as its subnet manager sees it.

Several cables between the same two are one link with their bandwidths summed; a link is as fast as
the slower of what its two ends say. Which end is the upper one, `heights` tells.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from trimtab.core.documents import shown
from trimtab.core.errors import BadInput
from trimtab.core.topology.draft import Cable, Draft, Host
from trimtab.core.topology.heights import heights

_HEAD = re.compile(r'(Switch|Ca|Rt)\s+\d+\s+"([^"]+)"\s*#\s*"([^"]*)"')
_PORT = re.compile(
    r'\[(\d{1,9})\](?:\[ext \d+\])?(?:\([0-9a-fA-F]+\))?\s+"([^"]+)"\[(\d{1,9})\](?:\[ext \d+\])?'
)
_SPEED = re.compile(r"\b(\d{1,2})x([A-Z]+\d*)\s*$")
_ADAPTER = re.compile(
    r"(\S+)(?:\s+(?:HCA-\d+|mlx\d_\S+|hfi\d_\S+|qib\d+|ib\S*))?\s*", re.IGNORECASE
)
_SYSTEM = re.compile(r"MF\d+;([^:;]+)[:;]")
_ENDS = ("vendid=", "devid=", "sysimgguid=", "switchguid=", "caguid=", "rtguid=")

_LANE_BITS_PER_S = {
    "SDR": 2e9,
    "DDR": 4e9,
    "QDR": 8e9,
    "FDR10": 10e9,
    "FDR": 13.64e9,
    "EDR": 25e9,
    "HDR": 50e9,
    "NDR": 100e9,
    "XDR": 200e9,
}
"""The data rate of one lane, after encoding."""


_Pair = tuple[str, str]
_Cable = tuple[tuple[str, int], tuple[str, int]]
"""The point and port at each end."""


@dataclass(frozen=True, slots=True)
class _Port:
    """What one end of a cable says of it."""

    other: str
    other_number: int
    bytes_per_s: float | None
    where: str


@dataclass(slots=True)
class _Point:
    """A switch, router or channel adapter."""

    kind: str
    identity: str
    description: str
    where: str
    ports: dict[int, _Port] = field(default_factory=dict)


def draft_of_fabric(text: str, source: str) -> Draft:
    """The hosts, switches and links of a fabric.

    Raises:
        BadInput: it names the line, and what would be right.
    """
    points = _points(text, source)
    names = _names(points)
    bandwidth, where = _summed(_cables(points), names)
    height = heights(bandwidth, {n for k, n in names.items() if points[k].kind == "Ca"})
    draft = Draft(source)
    for identity, point in points.items():
        name = names[identity]
        if point.kind == "Ca":
            if name not in draft.hosts:
                draft.add_host(name, Host(point.where))
        else:
            draft.add_switch(name, point.where)
    for (a, b), rate in bandwidth.items():
        lower, upper = sorted((a, b), key=lambda name: height.get(name, 0))
        draft.join(Cable(lower, upper, where[a, b], rate))
    return draft


def _points(text: str, source: str) -> dict[str, _Point]:
    points: dict[str, _Point] = {}
    current: _Point | None = None
    for number, line in enumerate(text.split("\n"), 1):
        where, content = f"{source}:{number}", line.strip()
        if head := _HEAD.match(content):
            current = _Point(head[1], head[2], head[3], where)
            if current.identity in points:
                raise BadInput(
                    f"{head[2]!r} is given twice, first at {points[head[2]].where}", where=where
                )
            points[current.identity] = current
        elif content.startswith("["):
            _add_port(current, content, where)
        elif content and not content.startswith(("#", *_ENDS)):
            raise BadInput(
                f"{shown(content)} is no line of ibnetdiscover",
                where=where,
                fix="give its whole output, without options that change it",
            )
    return _without_aggregation(points)


def _without_aggregation(points: Mapping[str, _Point]) -> dict[str, _Point]:
    """The points without the adapters by which switches themselves reduce: they are no hosts."""
    dropped = {k for k, point in points.items() if "Aggregation Node" in point.description}
    for point in points.values():
        point.ports = {n: port for n, port in point.ports.items() if port.other not in dropped}
    return {k: point for k, point in points.items() if k not in dropped}


def _add_port(current: _Point | None, content: str, where: str) -> None:
    port = _PORT.match(content)
    if port is None:
        raise BadInput(
            f"{shown(content)} is no port", where=where, fix='write [1] "S-0002c9..."[2]'
        )
    if current is None:
        raise BadInput("a port comes before any switch or adapter", where=where)
    if int(port[1]) in current.ports:
        raise BadInput(f"port {port[1]} of {current.identity!r} is given twice", where=where)
    speed = _SPEED.search(content)
    rate = None
    if speed and speed[2] in _LANE_BITS_PER_S:
        rate = int(speed[1]) * _LANE_BITS_PER_S[speed[2]] / 8
    elif speed:
        raise BadInput(
            f"{speed[0]} is no known speed",
            where=where,
            fix=f"known are {', '.join(_LANE_BITS_PER_S)}",
        )
    current.ports[int(port[1])] = _Port(port[2], int(port[3]), rate, where)


def _names(points: Mapping[str, _Point]) -> dict[str, str]:
    """What each point is called: hosts by their description, switches by it where it is unique."""
    called = {identity: _called(point) for identity, point in points.items()}
    switches = Counter(called[k] for k, point in points.items() if point.kind != "Ca")
    hosts = {called[k] for k, point in points.items() if point.kind == "Ca"}
    return {
        k: called[k]
        if points[k].kind == "Ca" or (switches[called[k]] == 1 and called[k] not in hosts)
        else f"{called[k]}-{k}"
        for k in points
    }


def _called(point: _Point) -> str:
    pattern = _ADAPTER.fullmatch if point.kind == "Ca" else _SYSTEM.match
    match = pattern(point.description)
    # A maker's own description, as of a node without a driver, says nothing of the host.
    return match[1] if match else point.identity


def _cables(points: Mapping[str, _Point]) -> dict[_Cable, list[_Port]]:
    """What the ends of each cable say of it."""
    cables: dict[_Cable, list[_Port]] = {}
    for identity, point in points.items():
        for number, port in point.ports.items():
            if port.other not in points:
                raise BadInput(
                    f"{port.other!r} is described nowhere",
                    where=port.where,
                    fix="give the whole output of ibnetdiscover; it may have been cut off",
                )
            a, b = sorted(((identity, number), (port.other, port.other_number)))
            cables.setdefault((a, b), []).append(port)
    return cables


def _summed(
    cables: Mapping[_Cable, Sequence[_Port]], names: Mapping[str, str]
) -> tuple[dict[_Pair, float | None], dict[_Pair, str]]:
    """The bandwidth between each two points, and the place that first spoke of it."""
    total: dict[_Pair, float | None] = {}
    where: dict[_Pair, str] = {}
    for ((a, _), (b, _)), ends in cables.items():
        first, second = sorted((names[a], names[b]))
        rate = min((e.bytes_per_s for e in ends if e.bytes_per_s is not None), default=None)
        before = total.get((first, second), 0.0)
        total[first, second] = None if rate is None or before is None else before + rate
        where.setdefault((first, second), ends[0].where)
    return total, where
