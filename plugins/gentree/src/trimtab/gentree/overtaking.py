"""From which size of the payload on which plan is best."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from trimtab.core.collectives import NetworkTree
from trimtab.core.cost import Constants
from trimtab.core.documents import Document
from trimtab.gentree.gentree import GenTree, Growth, Search

SMALLEST_BYTES, LARGEST_BYTES = 2**10, 2**32
CLOSE = 1.005
"""A size at which plans change is known up to this factor."""

Switches = tuple[tuple[str, str], ...]


class Reign(Document):
    """The sizes for which one plan is best.

    Attributes:
        from_bytes, to_bytes: of the payload.
        switches: what each kind of switch does.
        rounds: of the plan.
        width: its widest incast.
    """

    from_bytes: float
    to_bytes: float
    switches: Switches
    rounds: int
    width: int


def reigns(tree: NetworkTree, constants: Constants, search: Search | None = None) -> list[Reign]:
    """Which plan is best from 1 KiB to 4 GiB, and where one overtakes another.

    Plans are made for each power of four; between two of them all plans that were made are
    compared, each with the chunks that are best for the size.
    """
    search = search or Search()
    powers = range(SMALLEST_BYTES.bit_length() - 1, LARGEST_BYTES.bit_length(), 2)
    sizes = [float(2**power) for power in powers]
    grown = [GenTree(tree, constants, size, search).best() for size in sizes]
    plans = list({growth.choices: growth for growth in grown}.values())
    race = _Race(plans, search.chunks)
    ends = [sizes[0], *race.changes(sizes), sizes[-1]]
    found = []
    for low, high in pairwise(ends):
        best = race.best(math.sqrt(low * high))
        found.append(
            Reign(
                from_bytes=low,
                to_bytes=high,
                switches=best.choices,
                rounds=best.cost.rounds,
                width=best.cost.width,
            )
        )
    return found


class _Race:
    """Plans that are compared at any size."""

    def __init__(self, plans: Sequence[Growth], chunks: bool) -> None:
        self._plans, self._chunks = plans, chunks

    def best(self, payload_bytes: float) -> Growth:
        return min(self._plans, key=lambda growth: growth.seconds(payload_bytes, self._chunks))

    def changes(self, sizes: Sequence[float]) -> list[float]:
        """The sizes at which another plan becomes the best."""
        return [at for low, high in pairwise(sizes) for at in self._between(low, high)]

    def _between(self, low: float, high: float) -> list[float]:
        if self.best(low) is self.best(high):
            return []
        middle = math.sqrt(low * high)
        if high / low < CLOSE:
            return [middle]
        return [*self._between(low, middle), *self._between(middle, high)]
