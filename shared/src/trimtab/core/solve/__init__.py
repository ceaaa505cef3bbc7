"""Thin, typed solvers: MILP, max-flow, graph partition, tabu search and Tchebycheff scalarisation.

Each takes a time limit and returns its answer with a `Certificate` of how good that answer is.
"""

from trimtab.core.solve.certificate import Certificate, Limits
from trimtab.core.solve.max_flow import Flow, max_flow
from trimtab.core.solve.milp import MilpSolution, solve_milp
from trimtab.core.solve.partition import Partition, partition
from trimtab.core.solve.tabu import TabuResult, tabu_search
from trimtab.core.solve.tchebycheff import (
    minimise_tchebycheff,
    pareto_front,
    tchebycheff,
    weight_grid,
)

__all__ = [
    "Certificate",
    "Flow",
    "Limits",
    "MilpSolution",
    "Partition",
    "TabuResult",
    "max_flow",
    "minimise_tchebycheff",
    "pareto_front",
    "partition",
    "solve_milp",
    "tabu_search",
    "tchebycheff",
    "weight_grid",
]
