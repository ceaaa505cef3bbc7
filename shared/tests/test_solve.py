"""The solvers against brute force, and what they say when there is no answer."""

from __future__ import annotations

import itertools
import math

import pulp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.core.errors import BadInput, Infeasible, TrimtabError
from trimtab.core.solve import (
    Certificate,
    Limits,
    max_flow,
    minimise_tchebycheff,
    pareto_front,
    partition,
    solve_milp,
    tabu_search,
    tchebycheff,
    weight_grid,
)
from trimtab.core.solve.milp import SolverName

FEW = settings(max_examples=25, deadline=None)


def knapsack(values: list[int], weights: list[int], room: int) -> pulp.LpProblem:
    problem = pulp.LpProblem("knapsack", pulp.LpMaximize)
    take = [pulp.LpVariable(f"take_{i}", cat=pulp.LpBinary) for i in range(len(values))]
    problem += pulp.lpSum(v * t for v, t in zip(values, take, strict=True)) + 1
    problem += pulp.lpSum(w * t for w, t in zip(weights, take, strict=True)) <= room, "room"
    return problem


items = st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), min_size=1, max_size=7)


@pytest.mark.parametrize("solver", ["highs", "cbc"])
@FEW
@given(items=items, room=st.integers(0, 60))
def test_milp_equals_brute_force(
    solver: SolverName, items: list[tuple[int, int]], room: int
) -> None:
    values, weights = [list(column) for column in zip(*items, strict=True)]
    solution = solve_milp(knapsack(values, weights, room), solver=solver)
    best = max(
        sum(values[i] for i in chosen)
        for size in range(len(items) + 1)
        for chosen in itertools.combinations(range(len(items)), size)
        if sum(weights[i] for i in chosen) <= room
    )
    certificate = solution.certificate
    assert certificate.objective == pytest.approx(best + 1)
    assert certificate.status == "optimal"
    assert certificate.bound >= certificate.objective - 1e-9
    assert certificate.gap <= 1.001e-4
    assert all(value in (0.0, 1.0) for value in solution.values.values())


@pytest.mark.parametrize("solver", ["highs", "cbc"])
def test_solvers_print_nothing(solver: SolverName, capfd: pytest.CaptureFixture[str]) -> None:
    solve_milp(knapsack([3, 4], [2, 3], 4), solver=solver)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("solver", ["highs", "cbc"])
def test_infeasible_milp_names_constraint_and_relaxation(solver: SolverName) -> None:
    problem = pulp.LpProblem("fleet", pulp.LpMinimize)
    gpus = pulp.LpVariable("gpus", lowBound=0, cat=pulp.LpInteger)
    problem += gpus
    problem += 2.0 * gpus <= 9, "budget_usd_per_hour"
    problem += gpus >= 6, "least_gpus"
    with pytest.raises(Infeasible) as caught:
        solve_milp(problem, solver=solver, relaxable=["budget_usd_per_hour"])
    assert caught.value.constraint == "budget_usd_per_hour cannot hold"
    assert caught.value.relaxation.endswith("budget_usd_per_hour by 3")
    assert caught.value.exit_status == 3


def test_relaxation_says_which_way_to_change() -> None:
    problem = pulp.LpProblem("p", pulp.LpMinimize)
    x = pulp.LpVariable("x", lowBound=0, upBound=4)
    problem += x
    problem += x >= 10, "demand"
    with pytest.raises(Infeasible, match=r"demand by -6"):
        solve_milp(problem)


def test_contradicting_bounds_are_reported_as_such() -> None:
    problem = pulp.LpProblem("p", pulp.LpMinimize)
    x = pulp.LpVariable("x", lowBound=0, upBound=4)
    problem += x
    problem += x >= 10, "demand"
    with pytest.raises(Infeasible, match="contradict"):
        solve_milp(problem, relaxable=[])


def test_unbounded_milp_is_a_fault() -> None:
    problem = pulp.LpProblem("p", pulp.LpMaximize)
    x = pulp.LpVariable("x", lowBound=0)
    problem += x
    problem += x >= 1, "least"
    with pytest.raises(TrimtabError, match="unbounded"):
        solve_milp(problem)


def test_lp_is_its_own_bound() -> None:
    problem = pulp.LpProblem("p", pulp.LpMinimize)
    x = pulp.LpVariable("x", lowBound=2.5)
    problem += x + 1
    assert solve_milp(problem).certificate.bound == pytest.approx(3.5)


capacities = st.dictionaries(
    st.tuples(st.integers(0, 5), st.integers(0, 5)).filter(lambda e: e[0] != e[1]),
    st.floats(0, 10, allow_subnormal=False),
    max_size=14,
)


@FEW
@given(capacities)
def test_max_flow_equals_the_smallest_cut_of_all(edges: dict[tuple[int, int], float]) -> None:
    flow = max_flow(edges, 0, 5)
    cuts = (
        sum(c for (a, b), c in edges.items() if a in side and b not in side)
        for size in range(5)
        for extra in itertools.combinations(range(1, 5), size)
        for side in [{0, *extra}]
    )
    assert flow.value == pytest.approx(min(cuts), abs=1e-9)
    assert sum(edges[e] for e in flow.cut) == pytest.approx(flow.value, abs=1e-9)
    assert flow.certificate.bound == pytest.approx(flow.value, abs=1e-9)
    for node in range(1, 5):
        into = sum(f for (_, head), f in flow.flows.items() if head == node)
        out = sum(f for (tail, _), f in flow.flows.items() if tail == node)
        assert into == pytest.approx(out, abs=1e-9)
    assert all(f <= edges[e] + 1e-9 for e, f in flow.flows.items())


def test_max_flow_refuses_bad_capacities() -> None:
    with pytest.raises(BadInput, match="-1"):
        max_flow({("a", "b"): -1.0}, "a", "b")
    with pytest.raises(BadInput, match="both"):
        max_flow({}, "a", "a")


graphs = st.integers(2, 7).flatmap(
    lambda n: st.tuples(
        st.lists(st.integers(1, 4), min_size=n, max_size=n),
        st.dictionaries(
            st.tuples(st.integers(0, n - 1), st.integers(0, n - 1)), st.integers(0, 9), max_size=18
        ),
        st.lists(st.integers(3, 12), min_size=2, max_size=3),
    )
)


def all_partitions(
    weights: list[int], edges: dict[tuple[int, int], int], room: list[int]
) -> list[float]:
    """The cut of every split that fits."""
    cuts = []
    for parts in itertools.product(range(len(room)), repeat=len(weights)):
        loads = [0] * len(room)
        for node, part in enumerate(parts):
            loads[part] += weights[node]
        if all(load <= most for load, most in zip(loads, room, strict=True)):
            cuts.append(float(sum(w for (a, b), w in edges.items() if parts[a] != parts[b])))
    return cuts


@FEW
@given(graphs)
def test_partition_equals_brute_force_and_its_heuristic_is_certified(
    graph: tuple[list[int], dict[tuple[int, int], int], list[int]],
) -> None:
    weights, edges, room = graph
    cuts = all_partitions(weights, edges, room)
    nodes = dict(enumerate(map(float, weights)))
    floats = {e: float(w) for e, w in edges.items()}
    if not cuts:
        with pytest.raises(Infeasible):
            partition(nodes, floats, room)
        return
    exact = partition(nodes, floats, room)
    assert exact.certificate.objective == pytest.approx(min(cuts))
    assert exact.certificate.status == "optimal"
    try:
        near = partition(nodes, floats, room, exact_assignments=0)
    except Infeasible:
        return  # the packing heuristic may miss a tight fit
    assert near.certificate.bound <= min(cuts) + 1e-6
    assert near.certificate.objective >= min(cuts) - 1e-9
    loads = [sum(weights[n] for n, p in near.parts.items() if p == q) for q in range(len(room))]
    assert all(load <= most for load, most in zip(loads, room, strict=True))
    cut = sum(w for (a, b), w in edges.items() if near.parts[a] != near.parts[b])
    assert near.certificate.objective == pytest.approx(cut)


def test_partition_heuristic_finds_the_planted_clusters() -> None:
    clusters, size = 4, 8
    nodes = dict.fromkeys(range(clusters * size), 1.0)
    edges = {
        (a, b): 10.0 if a // size == b // size else 0.1
        for a in nodes
        for b in nodes
        if a < b and (a // size == b // size or (a + b) % 7 == 0)
    }
    answer = partition(nodes, edges, [float(size)] * clusters)
    assert all(len({answer.parts[n] for n in range(c, c + size)}) == 1 for c in range(0, 32, size))
    assert answer.certificate.solver == "fiduccia-mattheyses"
    assert 0 < answer.certificate.bound <= answer.certificate.objective


def test_partition_that_cannot_fit_says_how_much_is_missing() -> None:
    with pytest.raises(Infeasible, match="by 2 in all"):
        partition({"a": 3.0, "b": 3.0}, {}, [3.0, 1.0])
    with pytest.raises(Infeasible, match="from 3 to 5"):
        partition({"a": 5.0}, {}, [3.0, 3.0])
    with pytest.raises(BadInput, match="unknown node 'z'"):
        partition({"a": 1.0}, {("a", "z"): 1.0}, [3.0])


def test_tabu_leaves_local_minima_and_stops_at_the_bound() -> None:
    landscape = [5, 3, 4, 4, 2, 6, 1, 7, 0, 9]

    def neighbours(x: int) -> list[tuple[int, int]]:
        return [(min(x, y), y) for y in (x - 1, x + 1) if 0 <= y < len(landscape)]

    found = tabu_search(1, neighbours=neighbours, cost=lambda x: landscape[x], lower_bound=0)
    assert found.best == 8
    assert found.certificate.status == "optimal"
    descent_only = tabu_search(
        1, neighbours=neighbours, cost=lambda x: landscape[x], max_steps=1, lower_bound=0
    )
    assert descent_only.certificate.status == "feasible"


@FEW
@given(st.permutations(range(6)))
def test_tabu_sorts_by_swaps(start: list[int]) -> None:
    def neighbours(p: tuple[int, ...]) -> list[tuple[tuple[int, int], tuple[int, ...]]]:
        out = []
        for i, j in itertools.combinations(range(len(p)), 2):
            q = list(p)
            q[i], q[j] = q[j], q[i]
            out.append(((i, j), tuple(q)))
        return out

    def cost(p: tuple[int, ...]) -> float:
        return float(sum(abs(i - v) for i, v in enumerate(p)))

    found = tabu_search(tuple(start), neighbours=neighbours, cost=cost, lower_bound=0.0)
    assert found.best == tuple(range(6))


points = st.lists(st.tuples(*[st.integers(0, 6)] * 2), min_size=1, max_size=12)


@FEW
@given(points)
def test_pareto_front_is_what_nothing_dominates(points: list[tuple[int, int]]) -> None:
    front = {points[i] for i in pareto_front(points)}
    undominated = {
        p for p in points if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points)
    }
    assert front == undominated
    assert len(pareto_front(points)) == len(front)


def test_tchebycheff_reaches_a_point_in_a_dent_that_no_weighted_sum_does() -> None:
    front = [(0.0, 1.0), (0.6, 0.6), (1.0, 0.0)]
    ideal = (0.0, 0.0)
    by_sum = {min(front, key=lambda p: w[0] * p[0] + w[1] * p[1]) for w in weight_grid(2, 20)}
    by_distance = {min(front, key=lambda p: tchebycheff(p, w, ideal)) for w in weight_grid(2, 20)}
    assert (0.6, 0.6) not in by_sum
    assert by_distance == set(front)


def test_tchebycheff_in_a_milp_equals_enumeration() -> None:
    points = [(0.0, 1.0), (0.6, 0.6), (1.0, 0.0), (0.9, 0.9)]
    for weights in weight_grid(2, 10):
        problem = pulp.LpProblem("front", pulp.LpMinimize)
        pick = [pulp.LpVariable(f"pick_{i}", cat=pulp.LpBinary) for i in range(len(points))]
        problem += pulp.lpSum(pick) == 1, "one"
        objectives = [
            pulp.lpSum(p[k] * x for p, x in zip(points, pick, strict=True)) for k in range(2)
        ]
        minimise_tchebycheff(problem, objectives, weights, (0.0, 0.0))
        best = min(tchebycheff(p, weights, (0.0, 0.0)) for p in points)
        assert solve_milp(problem).certificate.objective == pytest.approx(best, abs=1e-6)


def test_weight_grid_is_complete() -> None:
    grid = list(weight_grid(3, 4))
    assert len(grid) == len(set(grid)) == math.comb(6, 2)
    assert all(sum(w) == pytest.approx(1) for w in grid)


def test_gap_is_relative_and_infinite_without_a_bound() -> None:
    assert Certificate("feasible", 10, 9, 0, "x").gap == pytest.approx(0.1)
    assert Certificate("feasible", 10, -math.inf, 0, "x").gap == math.inf
    assert Certificate("optimal", 0, 0, 0, "x").gap == 0
    assert Limits().gap < 1e-3
