"""The hosts that Slurm gave this job."""

from __future__ import annotations

from collections.abc import Mapping

from trimtab.core.errors import BadInput
from trimtab.hosts.host_order import lookup

NODELIST_VARIABLE = "SLURM_JOB_NODELIST"


def allocated(environment: Mapping[str, str]) -> list[str]:
    """The hosts of the allocation that this process runs in; empty outside of one.

    Raises:
        BadInput: the variable that lists them is no hostlist.
    """
    nodelist = environment.get(NODELIST_VARIABLE)
    if not nodelist:
        return []
    from trimtab.core.topology.hostlist import expand

    return expand(nodelist, where=NODELIST_VARIABLE)


def check_allocation(ranks: Mapping[str, int], environment: Mapping[str, str]) -> None:
    """Goes on only if every host of an order is in the allocation, where there is one.

    Raises:
        BadInput: one is not.
    """
    own = allocated(environment)
    place_of = lookup(own)
    lost = [host for host in ranks if place_of(host) is None] if own else []
    if lost:
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        raise BadInput(
            f"the planned host {lost[0]!r}{more} is not in this allocation",
            where=f"{NODELIST_VARIABLE}={environment[NODELIST_VARIABLE][:80]}",
            fix="plan again for the hosts of this allocation",
        )
