"""Where the ranks of a running torch.distributed job are, and which groups a mesh makes of them."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from trimtab.core.errors import BadInput
from trimtab.hosts.host_order import own_host, short


@dataclass(frozen=True, slots=True)
class LiveRank:
    """Where a rank runs.

    Attributes:
        names: what its machine calls itself, and its addresses; a plan may know it by any.
        device: the index of its device.
    """

    names: tuple[str, ...]
    device: int

    def runs_on(self, host: str) -> bool:
        """Whether a host of a plan is this rank's machine."""
        return host in self.names or short(host) in map(short, self.names)


def gather() -> list[LiveRank]:
    """Where each rank of the job runs, in rank order; every rank must call it.

    Raises:
        BadInput: torch.distributed is not initialised.
    """
    from torch import distributed

    _require_initialised()
    found: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(found, LiveRank(_own_names(), _own_device()))
    return found


def from_first_rank(text: str | None) -> str:
    """What the first rank has to say, on every rank; every rank must call it.

    Args:
        text: on the first rank; others are not listened to.

    Raises:
        BadInput: torch.distributed is not initialised.
    """
    from torch import distributed

    _require_initialised()
    said = [text]
    distributed.broadcast_object_list(said, src=0)
    return str(said[0])


def is_first_rank() -> bool:
    """Whether this is rank 0.

    Raises:
        BadInput: torch.distributed is not initialised.
    """
    from torch import distributed

    _require_initialised()
    return distributed.get_rank() == 0


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
