"""The order in which hosts get their ranks, and which of them this machine is."""

from __future__ import annotations

import os
import socket
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from trimtab.core.documents import read_text
from trimtab.core.errors import BadInput, Unsupported
from trimtab.hosts.deepspeed.launching import read_hostfile
from trimtab.hosts.job_variables import HOST_VARIABLE

if TYPE_CHECKING:
    from trimtab.core.plan import Plan


def hosts_of(plan: Plan) -> dict[str, int]:
    """How many ranks a training plan gives each machine, in rank order.

    Raises:
        BadInput: the plan is not about training.
        Unsupported: it numbers ranks in a way that needs more than an order of machines.
    """
    if not plan.ranks:
        raise BadInput(
            f"a {plan.planner} plan has no ranks to launch",
            fix="give a plan of a training job, as trimtab plan placement makes it",
        )
    hosts = Counter(slot.node for slot in plan.ranks)
    in_order = [(host, device) for host, count in hosts.items() for device in range(count)]
    if in_order != [(slot.node, slot.device) for slot in plan.ranks]:
        raise Unsupported(
            "the plan numbers ranks across machines in turn, or leaves devices of one out",
            fix="write it for Slurm with trimtab emit --to slurm",
        )
    return dict(hosts)


def read_order(path: str | Path) -> dict[str, int]:
    """How many ranks each machine gets, in rank order, from a plan or a hostfile.

    Raises:
        BadInput: it is neither, or the plan is not about training.
    """
    if not read_text(path).lstrip().startswith("{"):
        return read_hostfile(Path(path))
    from trimtab.core.plan import Plan

    try:
        return hosts_of(Plan.read(path))
    except BadInput as error:
        if error.where:
            raise
        raise type(error)(error.what, where=str(path), fix=error.fix) from None


def own_host(environment: Mapping[str, str] = os.environ) -> str:
    """This machine's name, as plans know it."""
    return environment.get(HOST_VARIABLE) or socket.gethostname()


def lookup(order: Sequence[str]) -> Callable[[str], int | None]:
    """A function that finds the index of a host in an order.

    A host name matches with or without its domain. It gives None where no host of the order, or
    more than one, is meant.
    """
    whole, shortened = _indices(order), _indices([short(host) for host in order])

    def place_of(host: str) -> int | None:
        found = whole.get(host)
        return shortened.get(short(host)) if found is None else found

    return place_of


def _indices(names: Sequence[str]) -> dict[str, int]:
    """The index of each name that comes once."""
    times = Counter(names)
    return {name: at for at, name in enumerate(names) if times[name] == 1}


def own_place(order: Sequence[str], environment: Mapping[str, str]) -> int:
    """The index of this machine in an order; a lone ``localhost`` is any machine.

    Raises:
        BadInput: it is not one host of the order.
    """
    if list(order) == ["localhost"]:
        return 0
    own = own_host(environment)
    place = lookup(order)(own)
    if place is None:
        more = ", …" if len(order) > 20 else ""
        raise BadInput(
            f"this machine, {own!r}, is not one host of the plan",
            fix=f"set {HOST_VARIABLE} to one of {', '.join(order[:20])}{more}",
        )
    return place


def new_ranks(order: Sequence[str], hosts: Sequence[str]) -> list[int]:
    """The rank that an order gives each of the hosts that are there.

    Hosts that the order does not name come after the others; hosts of one name keep their order.

    Args:
        order: hosts in the order in which they shall get their ranks; not all need be there.
        hosts: the hosts that are there, by their present rank.
    """
    places = [*map(lookup(order), hosts)]
    keys = [(len(order) if place is None else place, at) for at, place in enumerate(places)]
    rank_of = {key: rank for rank, key in enumerate(sorted(keys))}
    return [rank_of[key] for key in keys]


def difference(order: Sequence[str], hosts: Sequence[str]) -> str:
    """What differs between planned hosts and those that are there; empty if nothing does."""
    places = [*map(lookup(order), hosts)]
    present = set(places)
    missing = [host for at, host in enumerate(order) if at not in present]
    unknown = [host for host, place in zip(hosts, places, strict=True) if place is None]
    parts = [f"{listed(missing)} missing"] if missing else []
    parts += [f"{listed(unknown)} not planned"] if unknown else []
    return " and ".join(parts)


def listed(names: Sequence[str]) -> str:
    """The first names and how many more there are, with the verb: ``a, b and 3 more are``."""
    shown = ", ".join(dict.fromkeys(names[:3]))
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{shown}{more} {'is' if len(names) == 1 else 'are'}"


def short(host: str) -> str:
    """A host name without its domain; an address stays whole."""
    return host if host.replace(".", "").isdigit() else host.partition(".")[0]
