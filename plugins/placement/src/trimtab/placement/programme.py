"""A linear or mixed-integer programme put together term by term, and solved by HiGHS."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

Terms = Iterable[tuple[int, float]]
"""Variables with their coefficients."""

_INFEASIBLE = 2


@dataclass(frozen=True, slots=True)
class Answer:
    """What the solver says.

    Attributes:
        feasible: False where it is proven that there is no solution; else True.
        values: of the variables; None where none were found.
        bound: no solution has a lower cost.
    """

    feasible: bool
    values: npt.NDArray[np.float64] | None
    bound: float


@dataclass(slots=True)
class Programme:
    """A minimisation under construction; variables are numbered from 0 and not negative."""

    costs: list[float] = field(default_factory=list)
    upper: list[float] = field(default_factory=list)
    whole: list[bool] = field(default_factory=list)
    entries: list[tuple[int, int, float]] = field(default_factory=list)
    low: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)

    def variable(self, cost: float = 0.0, *, upper: float = np.inf, whole: bool = False) -> int:
        """A new variable's number."""
        self.costs.append(cost)
        self.upper.append(upper)
        self.whole.append(whole)
        return len(self.costs) - 1

    def constrain(self, terms: Terms, *, low: float = -np.inf, high: float = np.inf) -> None:
        """Holds a sum of terms within limits."""
        row = len(self.low)
        self.entries += [(row, variable, weight) for variable, weight in terms]
        self.low.append(low)
        self.high.append(high)

    def solve(self, *, nodes: int = 0, fixed: npt.NDArray[np.float64] | None = None) -> Answer:
        """Solves it.

        Args:
            nodes: of the search tree at most, so that the same answer comes on every machine; with
                0 the whole variables may be broken.
            fixed: a value for each variable that is not NaN.
        """
        rows, columns, weights = zip(*self.entries, strict=True)
        matrix = coo_array((weights, (rows, columns)), shape=(len(self.low), len(self.costs)))
        lower, upper = np.zeros(len(self.costs)), np.array(self.upper)
        if fixed is not None:
            known = ~np.isnan(fixed)
            lower[known] = upper[known] = fixed[known]
        solved = milp(
            np.array(self.costs),
            constraints=LinearConstraint(matrix.tocsr(), self.low, self.high),
            bounds=Bounds(lower, upper),
            integrality=np.array(self.whole) if nodes else None,
            options={"node_limit": nodes} if nodes else {},
        )
        if solved.status == _INFEASIBLE:
            return Answer(feasible=False, values=None, bound=np.inf)
        bound = solved.mip_dual_bound if nodes else solved.fun
        return Answer(
            feasible=True, values=solved.x, bound=-np.inf if bound is None else float(bound)
        )
