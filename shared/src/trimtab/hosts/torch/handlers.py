"""How torchrun finds our rendezvous: its entry point group ``torchrun.handlers``.

torch loads this module in the middle of importing its own, so nothing of torch is imported here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousParameters


def creator() -> Callable[[RendezvousParameters], RendezvousHandler]:
    """The function that makes the rendezvous, as torch wants it."""
    return create


def create(parameters: RendezvousParameters) -> RendezvousHandler:
    """Makes the rendezvous of one agent.

    Raises:
        BadInput: there is no plan, or it cannot be read.
    """
    from trimtab.hosts.torch.rendezvous import PlannedRendezvous

    return PlannedRendezvous.of(parameters)
