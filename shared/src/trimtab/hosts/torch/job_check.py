"""Where the ranks of a running torch.distributed job are, and which groups a mesh makes of them."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from itertools import count
from typing import Any

from trimtab.core.errors import BadInput, TrimtabError
from trimtab.hosts.host_order import own_host, short

WAIT = timedelta(minutes=10)
"""How long a rank waits for the others; they may be a compilation apart."""

_MESH = "mesh_"
"""What torch puts before a dimension's name in the description of a mesh's group."""

_asked = count()


@dataclass(frozen=True, slots=True)
class LiveRank:
    """Where a rank runs, and with which others.

    Attributes:
        names: what its machine calls itself, and its addresses; a plan may know it by any.
        device: the index of its device.
        groups: the global ranks of its groups, by the name of their dimension in a ``DeviceMesh``.
    """

    names: tuple[str, ...]
    device: int
    groups: Mapping[str, Sequence[int]] = field(default_factory=dict)

    def runs_on(self, host: str) -> bool:
        """Whether a host of a plan is this rank's machine."""
        return host in self.names or short(host) in map(short, self.names)


def judged(judge: Callable[[Sequence[LiveRank]], str]) -> str:
    """What the first rank makes of where all ranks run, told to all; every rank must call it.

    It goes over the job's store and not through a collective, so that it ends when a rank is
    missing, and touches no device.

    Args:
        judge: what the first rank does with the ranks, in their order.

    Raises:
        BadInput: torch.distributed is not initialised.
        TrimtabError: a rank did not come.
    """
    from torch import distributed

    _require_initialised()
    from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

    store = PrefixStore(f"trimtab/check/{next(_asked)}", _get_default_store())
    own = LiveRank(_own_names(), _own_device(), _own_mesh_groups())
    store.set(str(distributed.get_rank()), json.dumps(asdict(own)))
    if distributed.get_rank() == 0:
        keys = [str(rank) for rank in range(distributed.get_world_size())]
        _wait(store, keys)
        told = (json.loads(store.get(key)) for key in keys)
        store.set("judged", judge([LiveRank(tuple(t.pop("names")), **t) for t in told]))
    _wait(store, ["judged"])
    return str(store.get("judged").decode())


def _wait(store: Any, keys: list[str]) -> None:
    try:
        store.wait(keys, WAIT)
    except RuntimeError as error:
        raise TrimtabError(
            f"not every rank came to be checked against the plan within {WAIT}"
        ) from error


def _own_mesh_groups() -> dict[str, list[int]]:
    """The groups of this rank that belong to a mesh whose dimensions have names."""
    from torch.distributed.distributed_c10d import _world

    found: dict[str, list[int]] = {}
    for group, ranks in _world.pg_group_ranks.items():
        # A group that this rank is no member of stands for itself as a number.
        description = getattr(group, "group_desc", "")
        if description.startswith(_MESH):
            found[description.removeprefix(_MESH)] = sorted(ranks)
    return found


def is_first_rank() -> bool:
    """Whether this is rank 0."""
    from torch import distributed

    return bool(distributed.get_rank() == 0)


def mesh_groups(mesh: Any) -> dict[str, list[list[int]]]:
    """The groups of global ranks along each dimension of a ``DeviceMesh``, by its name.

    Dimensions without a name are called by their number.
    """
    ranks = mesh.mesh
    names: Sequence[str] = mesh.mesh_dim_names or [str(at) for at in range(ranks.ndim)]
    return {
        name: ranks.movedim(at, -1).reshape(-1, ranks.shape[at]).tolist()
        for at, name in enumerate(names)
    }


def _require_initialised() -> None:
    from torch import distributed

    if not (distributed.is_available() and distributed.is_initialized()):
        raise BadInput(
            "torch.distributed is not initialised",
            fix="check the job after init_process_group or deepspeed.init_distributed",
        )


def _own_names() -> tuple[str, ...]:
    names = [own_host(), socket.gethostname()]
    with suppress(OSError):
        addresses = socket.getaddrinfo(socket.gethostname(), None, proto=socket.IPPROTO_TCP)
        names += [str(address[0]) for *_, address in addresses]
    return tuple(dict.fromkeys(names))


def _own_device() -> int:
    """The device of this rank: the one it alone sees, else its number on this machine."""
    local = int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or 0)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    if local < len(visible) and visible[local].strip().isdecimal():
        return int(visible[local])
    return local
