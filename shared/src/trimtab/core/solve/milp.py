"""Mixed-integer linear programmes: built with PuLP, solved by HiGHS, or by CBC without it."""

from __future__ import annotations

import math
import time
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

import pulp

from trimtab.core.errors import Infeasible, TrimtabError
from trimtab.core.solve.certificate import Certificate, Limits, certify

SolverName = Literal["highs", "cbc"]


@dataclass(frozen=True, slots=True)
class MilpSolution:
    """The value of every variable, by its name, and what is proven about them."""

    values: dict[str, float]
    certificate: Certificate


def solve_milp(
    problem: pulp.LpProblem,
    *,
    limits: Limits = Limits(),
    solver: SolverName | None = None,
    relaxable: Collection[str] | None = None,
) -> MilpSolution:
    """Solves a problem within limits; integer variables come back as whole numbers.

    Args:
        problem: a PuLP problem whose constraints are named as a reader should see them.
        limits: time, relative gap and threads.
        solver: HiGHS when it is installed, unless said otherwise.
        relaxable: the constraints that an infeasible problem's message may propose to relax;
            all of them when None.

    Raises:
        Infeasible: it names the constraints to relax, and by how much, to become feasible.
        TrimtabError: the problem is unbounded, or the time ran out before any answer was found.
    """
    name = solver or ("highs" if pulp.HiGHS().available() else "cbc")
    started = time.perf_counter()
    problem.solve(_solver(name, limits))
    wall_s = time.perf_counter() - started
    if problem.sol_status not in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible):
        _explain(problem, name, limits, relaxable, wall_s)
    objective = float(pulp.value(problem.objective) or 0.0)
    bound = _bound(problem, name, limits, objective)
    return MilpSolution(
        values={v.name: _rounded(v) for v in problem.variables()},
        certificate=certify(objective, bound, limits, wall_s, name),
    )


def _solver(name: SolverName, limits: Limits) -> pulp.LpSolver:
    if name == "highs":
        return _Highs(msg=False, timeLimit=limits.time_s, gapRel=limits.gap, threads=limits.threads)
    return pulp.PULP_CBC_CMD(
        msg=False, timeLimit=limits.time_s, gapRel=limits.gap, threads=limits.threads
    )


class _Highs(pulp.HiGHS):  # type: ignore[misc]
    """PuLP's, which prints HiGHS's name and version whatever it is told."""

    def createAndConfigureSolver(self, lp: pulp.LpProblem) -> None:  # noqa: N802
        from trimtab.core.solve.quiet_highs import QuietHighs

        lp.solverModel = QuietHighs()
        lp.solverModel.setOptionValue("mip_rel_gap", self.gapRel)
        lp.solverModel.setOptionValue("threads", self.threads)
        lp.solverModel.setOptionValue("time_limit", float(self.timeLimit))


def _rounded(variable: pulp.LpVariable) -> float:
    value = float(variable.varValue or 0.0)
    return float(round(value)) if variable.cat == pulp.LpInteger else value


def _bound(problem: pulp.LpProblem, name: SolverName, limits: Limits, objective: float) -> float:
    """The dual bound; with CBC, which keeps its own, the claimed gap or the LP relaxation's."""
    if not problem.isMIP():
        return objective
    minimise = problem.sense == pulp.LpMinimize
    if name == "highs":
        bound = float(problem.solverModel.getInfo().mip_dual_bound)
        # HiGHS is not told about the objective's constant term.
        bound += float(problem.objective.constant)
    elif problem.sol_status == pulp.LpSolutionOptimal:
        slack = limits.gap * abs(objective)
        bound = objective - slack if minimise else objective + slack
    else:
        bound = _relaxation_bound(problem, limits)
    return min(bound, objective) if minimise else max(bound, objective)


def _relaxation_bound(problem: pulp.LpProblem, limits: Limits) -> float:
    relaxed = problem.deepcopy()
    relaxed.solve(pulp.PULP_CBC_CMD(msg=False, mip=False, timeLimit=limits.time_s))
    if relaxed.sol_status == pulp.LpSolutionOptimal:
        return float(pulp.value(relaxed.objective))
    return -math.inf if problem.sense == pulp.LpMinimize else math.inf


def _explain(
    problem: pulp.LpProblem,
    name: SolverName,
    limits: Limits,
    relaxable: Collection[str] | None,
    wall_s: float,
) -> None:
    """Raises what stands between the problem and an answer."""
    if problem.status == pulp.LpStatusNotSolved or wall_s >= limits.time_s:
        raise TrimtabError(
            f"{name} found no answer to {problem.name!r} in {limits.time_s:g} s; allow more time"
        )
    relaxations = _nearest_relaxation(problem, name, limits, relaxable)
    if relaxations is None:
        if problem.status == pulp.LpStatusUnbounded:
            raise TrimtabError(f"the objective of {problem.name!r} is unbounded")
        raise Infeasible(
            f"the bounds of {problem.name!r} contradict one another",
            relaxation="relaxing its named constraints does not help",
        )
    if not relaxations:
        raise TrimtabError(f"the objective of {problem.name!r} is unbounded")
    constraints = " and ".join(relaxations)
    changes = " and ".join(f"{c} by {amount:.6g}" for c, amount in relaxations.items())
    raise Infeasible(f"{constraints} cannot hold", relaxation=f"it becomes feasible with {changes}")


def _nearest_relaxation(
    problem: pulp.LpProblem, name: SolverName, limits: Limits, relaxable: Collection[str] | None
) -> dict[str, float] | None:
    """The least change of right-hand sides, relative to their size, that makes it feasible.

    Returns:
        The signed change of each constraint; None when no change of them helps.
    """
    elastic = pulp.LpProblem("elastic", pulp.LpMinimize)
    changes: dict[str, pulp.LpAffineExpression] = {}
    cost: list[pulp.LpAffineExpression] = []
    for constraint_name, constraint in problem.constraints.items():
        expression = pulp.LpAffineExpression(constraint)
        if relaxable is None or constraint_name in relaxable:
            up = pulp.LpVariable(f"raise[{constraint_name}]", lowBound=0)
            down = pulp.LpVariable(f"lower[{constraint_name}]", lowBound=0)
            changes[constraint_name] = up - down
            scale = max(1.0, abs(constraint.constant))
            cost.append((up + down) * (1.0 / scale))
            expression = expression - up + down
        elastic += pulp.LpConstraint(expression, constraint.sense, constraint_name)
    elastic += pulp.lpSum(cost)
    elastic.solve(_solver(name, limits))
    if elastic.sol_status not in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible):
        return None
    amounts = {c: float(pulp.value(change)) for c, change in changes.items()}
    return {c: amount for c, amount in amounts.items() if abs(amount) > 1e-7}
