"""How good an answer is, and what a solver may spend on it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Limits:
    """What a solver may spend.

    Attributes:
        time_s: it stops after this many seconds with the best answer so far.
        gap: it stops once its answer is proven within this relative distance of the optimum.
        threads: how many it may use.
    """

    time_s: float = 60.0
    gap: float = 1e-4
    threads: int = 1


@dataclass(frozen=True, slots=True)
class Certificate:
    """What is proven about an answer.

    Attributes:
        status: ``optimal`` when the answer is within the limits' gap, else ``feasible``.
        objective: the answer's value.
        bound: a value that no answer can beat; infinite when none is known.
        wall_s: how long the solver took.
        solver: its name.
    """

    status: Literal["optimal", "feasible"]
    objective: float
    bound: float
    wall_s: float
    solver: str

    @property
    def gap(self) -> float:
        """Relative distance between objective and bound; infinite when there is no bound."""
        return relative_gap(self.objective, self.bound)


def certify(
    objective: float, bound: float, limits: Limits, wall_s: float, solver: str
) -> Certificate:
    """The certificate of an objective and a bound: ``optimal`` within the limits' gap."""
    close = abs(objective - bound) <= 1e-9
    proven = close or relative_gap(objective, bound) <= limits.gap * (1 + 1e-6)
    return Certificate("optimal" if proven else "feasible", objective, bound, wall_s, solver)


def relative_gap(objective: float, bound: float) -> float:
    """``|objective - bound|`` relative to the objective; 0 when they are equal."""
    if objective == bound:
        return 0.0
    if not math.isfinite(bound) or objective == 0:
        return math.inf
    return abs(objective - bound) / abs(objective)
