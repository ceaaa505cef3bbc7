"""``trimtab bench placement``: spreads and planning times against what people use.

Arnold does not publish the free nodes of its pods: its three settings are split evenly here, and
the fragmented clusters are drawn as `fragmented` says: its 1.67 can be compared in kind only.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import accumulate, islice, pairwise, repeat
from multiprocessing import get_context
from statistics import mean

from trimtab.core.benchmark import Benchmark, Case, Options, Progress
from trimtab.core.solve import Limits
from trimtab.placement.arnold import arnold, solve_arnold
from trimtab.placement.grid import Candidate, Demand
from trimtab.placement.launch_bench import launch_cases
from trimtab.placement.packing import RANK_ORDERS, packings, random_grids
from trimtab.placement.queue_bench import queue_cases
from trimtab.placement.real_bench import real_cases
from trimtab.placement.search import Front, search
from trimtab.placement.step_bench import step_cases

ALPHAS = tuple(tenth / 10 for tenth in range(11))
_PAPERS_BASELINES: Mapping[str, Sequence[str]] = {
    "best of packers in pp order": ("best-fit", "random-fit", "gpu-packing"),
    "best of the paper's baselines in pp order": (
        "best-fit",
        "random-fit",
        "gpu-packing",
        "topology-aware",
    ),
}
_UNEVEN_DRAWS = 10
_TIMED_ALPHA = 0.3
_MOST_PUBLISHED = 2000
"""Nodes up to which the published programme is worth building."""

_MOST_MODELLED = 1300
"""Nodes up to which the flows of a step are modelled."""


def _even(nodes: int, pods: int) -> tuple[int, ...]:
    base, extra = divmod(nodes, pods)
    return (base + 1,) * extra + (base,) * (pods - extra)


SETTINGS: dict[str, Demand] = {
    "paper-i": Demand(6, 2, _even(18, 3)),
    "paper-ii": Demand(12, 8, _even(438, 5)),
    "paper-iii": Demand(46, 8, _even(1019, 11)),
}
"""Table 1, with the cluster's nodes split evenly over its minipods."""

MADE: dict[str, Demand] = {"made-for-1.67": Demand(8, 4, (17, 17))}
"""The smallest kind of job on which Arnold's best ratio, 1.67 at alpha 0.2, comes out: packers cut
a row in two for nothing."""

SIZES: Mapping[str, Demand] = {
    "96": Demand(12, 8, _even(438, 5)),
    "208": Demand(26, 8, _even(400, 8)),
    "480": Demand(60, 8, _even(700, 15)),
    "1200": Demand(150, 8, (96,) * 13),
    "1200-of-2363": Demand(150, 8, _even(2363, 25)),
    "12496": Demand(1562, 8, _even(14_100, 300)),
}
"""Nodes of the jobs whose planning is timed."""

_QUICK_SIZES: tuple[str, ...] = ("96", "208", "1200", "12496")


def uneven(demand: Demand, seed: int, count: int) -> list[Demand]:
    """A setting's job on as many nodes, of which each pod has some half to 1.5 times its share."""
    draw, nodes, found = random.Random(seed), sum(demand.capacities), list[Demand]()
    while len(found) < count:
        weights = [draw.uniform(0.5, 1.5) for _ in demand.capacities]
        ends = [round(nodes * share / sum(weights)) for share in accumulate(weights, initial=0.0)]
        room = tuple(after - before for before, after in pairwise(ends))
        if sum(free // demand.columns for free in room) >= demand.rows:
            found.append(replace(demand, capacities=room))
    return found


def fragmented(seed: int, count: int) -> list[Demand]:
    """Seeded clusters in which other jobs have left each pod a different number of free nodes.

    4, 8 or 16 stages, 8 to 160 rows, 4 to 30 pods with half a row to 2.2 times their even share;
    kept where at least 2 % of nodes are spare and rows fit whole.
    """
    draw, found = random.Random(seed), list[Demand]()
    while len(found) < count:
        columns, rows = draw.choice((4, 8, 16)), draw.randint(8, 160)
        pods = draw.randint(4, 30)
        most = max(columns // 2 + 1, int(2.2 * rows * columns / pods))
        room = tuple(draw.randint(max(1, columns // 2), most) for _ in range(pods))
        whole = sum(free // columns for free in room)
        if sum(room) >= 1.02 * rows * columns and whole >= rows:
            found.append(Demand(rows, columns, room))
    return found


@dataclass(frozen=True, slots=True)
class _Instance:
    """A demand with our front and the spreads of all baselines by name and weight."""

    front: Front
    baselines: dict[str, tuple[float, ...]]


def _solved(demand: Demand, seed: int) -> _Instance:
    front = search(demand, ALPHAS)
    assert front is not None, "the suite keeps only clusters that hold their job"
    return _Instance(front, _baselines(demand, seed))


def _baselines(demand: Demand, seed: int) -> dict[str, tuple[float, ...]]:
    found = {c.method: _weighted(c) for c in packings(demand)}
    for order in RANK_ORDERS:
        grids = random_grids(demand, seed, order)
        built = (Candidate.built(demand, grid, "random-fit") for grid in grids)
        draws = [_weighted(candidate) for candidate in built if candidate is not None]
        found[f"random-fit {order}"] = tuple(mean(values) for values in zip(*draws, strict=True))
    published = [arnold(demand, alpha) for alpha in ALPHAS]
    turned = [arnold(demand.transposed, 1 - alpha) for alpha in ALPHAS]
    for name, answers in (
        ("arnold-mip", published),
        ("arnold-mip dp", [c and c.transposed for c in turned]),
    ):
        if all(answers):
            found[name] = tuple(
                answer.spread.weighted(alpha)
                for answer, alpha in zip(answers, ALPHAS, strict=True)
                if answer
            )
    return found


def _weighted(candidate: Candidate) -> tuple[float, ...]:
    return tuple(candidate.spread.weighted(alpha) for alpha in ALPHAS)


def _spread_cases(name: str, instances: Sequence[_Instance]) -> Iterator[Case]:
    """One case for each weight and baseline, with the ratio's mean and extremes."""
    for at, alpha in enumerate(ALPHAS):
        ours = [i.front.best(alpha).spread.weighted(alpha) for i in instances]
        bound = mean(i.front.bound.least(alpha) for i in instances)
        names = dict.fromkeys(name for i in instances for name in i.baselines)
        rivals = {n: [i.baselines.get(n) for i in instances] for n in names}
        best = [min(values[at] for values in i.baselines.values()) for i in instances]
        for baseline, values in rivals.items():
            pairs = [(value[at], own) for value, own in zip(values, ours, strict=True) if value]
            yield _mean_case(f"model/{name}/alpha-{alpha:g}", baseline, pairs, bound)
        yield _mean_case(
            f"model/{name}/alpha-{alpha:g}",
            "best of all baselines",
            list(zip(best, ours, strict=True)),
            bound,
        )
        for label, kinds in _PAPERS_BASELINES.items():
            yield _mean_case(
                f"model/{name}/arnold-against-its-own-baselines/alpha-{alpha:g}",
                label,
                [_papers_pair(i.baselines, kinds, at) for i in instances],
                bound,
                notes="arnold-mip stands for ours, as in the paper, whose best ratio is 1.67",
            )


def _papers_pair(
    baselines: Mapping[str, Sequence[float]], kinds: Sequence[str], at: int
) -> tuple[float, float]:
    """The best of some baselines in pipeline order, and Arnold."""
    return min(baselines[f"{kind} pp"][at] for kind in kinds), baselines["arnold-mip"][at]


def _mean_case(
    case: str,
    baseline: str,
    pairs: Sequence[tuple[float, float]],
    bound: float,
    notes: str | None = None,
) -> Case:
    ratios = [theirs / ours for theirs, ours in pairs]
    return Case(
        case=case,
        metric="weighted_spread",
        unit="pods",
        better="lower",
        baseline=baseline,
        baseline_value=mean(theirs for theirs, _ in pairs),
        value=mean(ours for _, ours in pairs),
        ratio=mean(ratios),
        ratio_low=min(ratios),
        ratio_high=max(ratios),
        lower_bound=bound,
        notes=notes,
    )


def _certified_cases(name: str, instances: Sequence[_Instance]) -> Iterator[Case]:
    """The share of instances whose best placement is proven, for each weight."""
    for alpha in ALPHAS:
        share = mean(instance.front.gap(alpha) == 0 for instance in instances)
        gap = mean(
            i.front.best(alpha).spread.weighted(alpha) / i.front.bound.least(alpha) - 1
            for i in instances
        )
        yield Case(
            case=f"model/{name}/certified/alpha-{alpha:g}",
            metric="certified_share",
            unit="1",
            better="higher",
            baseline="every instance",
            baseline_value=1.0,
            value=share,
            ratio=share,
            ratio_low=share,
            ratio_high=share,
            notes=f"mean distance to the bound {gap:.2%}",
        )


def _cpu_s(work: Callable[[Demand, float], object], demand: Demand, repeats: int = 1) -> float:
    times = []
    for _ in range(repeats):
        started = time.process_time()
        work(demand, _TIMED_ALPHA)
        times.append(time.process_time() - started)
    return min(times)


def _proven(demand: Demand, alpha: float) -> Front | None:
    return search(demand, (alpha,))


def _time_cases(names: Sequence[str], cap_s: float, progress: Progress) -> Iterator[Case]:
    """CPU time to plan and prove, against the published programme in HiGHS."""
    for name in names:
        progress(f"timing {name} nodes")
        demand = SIZES[name]
        ours_s, closed_s = _cpu_s(_proven, demand, 3), _cpu_s(arnold, demand, 3)
        if demand.cells > _MOST_PUBLISHED:
            yield _time_case(name, "budget of 20 s", 20.0, ours_s, "too large for the programme")
            continue
        started = time.process_time()
        answer = solve_arnold(demand, _TIMED_ALPHA, Limits(time_s=cap_s)).certificate
        theirs_s = time.process_time() - started
        front = search(demand, (_TIMED_ALPHA,))
        assert front is not None
        own = front.best(_TIMED_ALPHA).spread.weighted(_TIMED_ALPHA)
        notes = f"objective {own:g} against {answer.objective:g}, {answer.status} in {cap_s:g} s"
        yield _time_case(name, "arnold-mip in HiGHS", theirs_s, ours_s, notes)
        yield _time_case(f"{name}/closed-form", "arnold-mip in HiGHS", theirs_s, closed_s, notes)


def _time_case(name: str, baseline: str, theirs_s: float, ours_s: float, notes: str) -> Case:
    return Case.compare(
        f"model/planning-time/{name}",
        "planning_cpu_time",
        "s",
        "lower",
        baseline,
        [(theirs_s, max(ours_s, 1e-6))],
        notes=notes,
    )


def run(options: Options, progress: Progress) -> list[Case]:
    """All cases; with ``quick`` 5 fragmented clusters in place of 150."""
    cases: list[Case] = []
    for name, demand in (SETTINGS | MADE).items():
        cases += _spread_cases(name, [_solved(demand, options.seed)])
    for name, demand in SETTINGS.items():
        progress(f"{name} on uneven pods")
        draws = uneven(demand, options.seed, 2 if options.quick else _UNEVEN_DRAWS)
        cases += _spread_cases(f"{name}-uneven", [_solved(draw, options.seed) for draw in draws])
    count = 5 if options.quick else 150
    solved: list[_Instance] = []
    # Forked from a process of its own, since this one may have the progress bar's thread.
    with ProcessPoolExecutor(mp_context=get_context("forkserver")) as pool:
        for instance in pool.map(_solved, fragmented(options.seed, count), repeat(options.seed)):
            solved.append(instance)
            progress("fragmented clusters", len(solved) / count)
    cases += _spread_cases("fragmented", solved)
    cases += _certified_cases("fragmented", solved)
    names = _QUICK_SIZES if options.quick else tuple(SIZES)
    cases += _time_cases(names, 5.0 if options.quick else 60.0, progress)
    return cases + more_cases(options, progress)


def more_cases(options: Options, progress: Progress) -> list[Case]:
    """The cases of modelled steps, launches, the queue and real jobs."""
    small = (demand for demand in fragmented(options.seed, 40) if demand.cells <= _MOST_MODELLED)
    demands = islice(small, 2 if options.quick else 10)
    return [
        *step_cases(list(demands), options.seed),
        *launch_cases(options, progress),
        *queue_cases(options, progress),
        *real_cases(options, progress),
    ]


BENCHMARK = Benchmark(
    name="placement",
    summary="spread of training groups over pods, planning time, and a real job's step time",
    run=run,
)
