"""All that is known of a demand: the placements no other beats, and what none can beat."""

from __future__ import annotations

from dataclasses import dataclass

from trimtab.placement.certificate import Frontier, frontier
from trimtab.placement.grid import Candidate, Demand, pareto
from trimtab.placement.strips import strip_covers


@dataclass(frozen=True, slots=True)
class Front:
    """Placements by their trade-off of pipeline and data spread, and the bound on all others.

    Attributes:
        candidates: by pipeline spread; none beats another in both.
        bound: what no placement goes below.
    """

    candidates: tuple[Candidate, ...]
    bound: Frontier

    def best(self, alpha: float) -> Candidate:
        """The placement with the least weighted spread; of equals, the least sum of spreads."""
        return min(
            self.candidates,
            key=lambda c: (
                round(c.spread.weighted(alpha), 9),
                c.spread.pipeline + c.spread.data,
                c.spread.pipeline,
            ),
        )


def search(demand: Demand) -> Front | None:
    """The front of a demand; None where the pods do not hold it."""
    candidates = pareto(list(strip_covers(demand)))
    return Front(tuple(candidates), frontier(demand)) if candidates else None
