"""GenModel's two optimalities as checks on a plan, and how far they exclude one another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trimtab.core.collectives.schedule import UNIT, Step
from trimtab.core.cost.collectives import least_accessed


@dataclass(frozen=True, slots=True)
class Optimality:
    """How a plan stands to the least memory access and to the least incast.

    Attributes:
        ranks: of the plan.
        accessed: bytes that a rank reads and writes for its sums, on average, for each byte.
        width: how many meet in the widest sum, the receiver included.
    """

    ranks: int
    accessed: float
    width: int

    @property
    def accesses_least(self) -> bool:
        """Whether no plan accesses less: each element is summed once, by N ranks at a time."""
        return self.accessed <= least_accessed(self.ranks, max(self.ranks, 2)) + 1e-9

    def is_free_of_incast(self, threshold: int) -> bool:
        """Whether no more than the threshold meet anywhere."""
        return self.width <= threshold

    @property
    def accesses_least_at_its_width(self) -> bool:
        """Whether no plan whose sums are no wider accesses less."""
        return self.accessed <= least_accessed(self.ranks, max(self.width, 2)) + 1e-9


def optimality(ranks: int, steps: Sequence[Step]) -> Optimality:
    """The optimality of the plan with these steps.

    No plan of more ranks than the threshold is both: a sum of ``w`` operands leaves ``w - 1`` fewer
    partial sums of an element, so that with ``w`` below ``N`` it is written and read again.
    """
    accessed, width = 0.0, 1
    for step in steps:
        operands = step.senders_in[step.owner_group]
        size = (step.end - step.begin) / UNIT
        ring = step.ring[step.owner_group]
        direct = np.where(operands > 1, operands + 1, 0)
        accessed += float((size * np.where(ring, 3 * (operands - 1), direct)).sum())
        widest = np.where(ring, np.minimum(operands, 2), operands)
        width = max(width, int(widest.max(initial=1)))
    return Optimality(ranks, accessed / ranks, width)
