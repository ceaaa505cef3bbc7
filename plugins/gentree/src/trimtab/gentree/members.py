"""Where the members of a group run, as each tells the others through the group's store."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from itertools import count
from typing import Any

from trimtab.core.cluster import Cluster
from trimtab.core.errors import BadInput
from trimtab.hosts.host_order import lookup, own_host
from trimtab.hosts.job_variables import HOST_VARIABLE

LOCAL_VARIABLES = "LOCAL_RANK", "SLURM_LOCALID"
"""Who launches a rank says there which of its host's ranks it is; the first that is set counts."""

CODE = "trimtab-core", "trimtab-gentree"
"""The distributions whose versions decide what is planned."""

_PLACE, _READ = "trimtab/place", "trimtab/read"

_STAY = timedelta(seconds=10)
"""How long a rank that must fail waits for the others to know why: the store may end with it."""


@dataclass(frozen=True)
class Place:
    """Where a rank runs, and what it plans with.

    Attributes:
        rank: its number in the job.
        names: of its host, the one that plans know first.
        device: its number there; None where its launcher gives it none of its own.
        network: digest of what it plans for; empty without a network.
        code: versions of what plans.
    """

    rank: int
    names: tuple[str, ...]
    device: int | None
    network: str
    code: str

    @classmethod
    def own(cls, rank: int, network: str, environment: Mapping[str, str] = os.environ) -> Place:
        """That of this process.

        Raises:
            BadInput: its number on its host is none.
        """
        names = dict.fromkeys([own_host(environment), socket.gethostname()])
        return cls(rank, tuple(names), _device(environment), network, _code())

    @property
    def called(self) -> str:
        """What to call the rank in messages."""
        return f"rank {self.rank} on {self.names[0]}"


def _device(environment: Mapping[str, str]) -> int | None:
    variable = next((name for name in LOCAL_VARIABLES if environment.get(name)), None)
    if variable is None:
        return None
    said = environment[variable]
    if not (said.isascii() and said.isdigit()):
        raise BadInput(
            f"{variable} is {said!r}", fix="set it to the rank's number on its host, from 0"
        )
    # Who shows each rank one device alone, as `trimtab emit` does, calls each the first.
    alone = "," not in (environment.get("CUDA_VISIBLE_DEVICES") or ",")
    return None if alone and int(said) == 0 else int(said)


def _code() -> str:
    return ", ".join(f"{name} {_version(name)}" for name in CODE)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "uninstalled"


def tell(store: Any, member: int, said: Place | BadInput) -> None:
    """Puts into the store where this rank runs, or why it cannot take part.

    Args:
        store: the group's.
        member: this rank's number in the group.
        said: what to tell.
    """
    told = {"refused": str(said)} if isinstance(said, BadInput) else asdict(said)
    told["called"] = f"on {own_host()}"
    store.set(f"{_PLACE}/{member}", json.dumps(told))


def hear(store: Any, ranks: Sequence[int]) -> list[Place]:
    """Where each rank of the group runs, in the group's order.

    Args:
        store: the group's.
        ranks: the members' numbers in the job.

    Raises:
        BadInput: one of them cannot take part, plans for another network or with other code.
    """
    found = []
    for member, rank in enumerate(ranks):
        said = json.loads(store.get(f"{_PLACE}/{member}"))
        called = said.pop("called")
        if "refused" in said:
            raise BadInput(f"rank {rank} {called} cannot take part: {said['refused'].rstrip('.')}")
        found.append(Place(**{**said, "names": tuple(said["names"])}))
    first = found[0]
    for place in found:
        if place.code != first.code:
            raise BadInput(
                f"{place.called} plans with {place.code}, and {first.called} with {first.code}",
                fix="install the same versions on every host",
            )
        if place.network != first.network:
            raise BadInput(
                f"{place.called} plans for another network than {first.called}",
                fix="give every host the same cluster file, constants, always and cuda",
            )
    return found


def stay(store: Any, member: int, members: int, timeout: timedelta) -> None:
    """Waits until the others have read what was told, or long enough.

    Args:
        store: the group's.
        member: this rank's number in the group.
        members: how many there are.
        timeout: of the group.
    """
    with suppress(RuntimeError):  # the store ended first, or one never came
        store.set(f"{_READ}/{member}", "1")
        store.wait([f"{_READ}/{other}" for other in range(members)], min(timeout, _STAY))


def slots(cluster: Cluster, places: Sequence[Place]) -> list[tuple[str, int]]:
    """Node and device of each rank.

    Ranks without a number of their own get those that are free on their node, in the group's order.
    Devices of a node are alike to the model, so that a subgroup may number them otherwise than the
    job does.

    Raises:
        BadInput: a host is no node, or two ranks say that they run on the same device.
    """
    node_of = lookup([node.name for node in cluster.nodes])
    nodes = [_node(cluster, node_of, place) for place in places]
    held: dict[tuple[str, int], Place] = {}
    for node, place in zip(nodes, places, strict=True):
        if place.device is None:
            continue
        other = held.setdefault((node, place.device), place)
        if other is not place:
            raise BadInput(
                f"ranks {other.rank} and {place.rank} both say that they run on device"
                f" {place.device} of {node!r}",
                fix=f"set {LOCAL_VARIABLES[0]} to each rank's number on its host, or "
                f"{HOST_VARIABLE} to each host's own node",
            )
    found = []
    for node, place in zip(nodes, places, strict=True):
        device = place.device
        if device is None:
            device = next(number for number in count() if (node, number) not in held)
            held[node, device] = place
        found.append((node, device))
    return found


def _node(cluster: Cluster, node_of: Callable[[str], int | None], place: Place) -> str:
    found = next((at for name in place.names if (at := node_of(name)) is not None), None)
    if found is None:
        raise BadInput(
            f"rank {place.rank} runs on {place.names[0]!r}, which is no node of {cluster.name}",
            fix=f"name the nodes as the hosts are called, or set {HOST_VARIABLE} on each",
        )
    return cluster.nodes[found].name
