"""The simulated half of the plugin's benchmark: every rival in every cell of the paper's settings.

Dispatch and queue order are shown together and each alone. What a rule's constant is best at is
found in hindsight for the rivals, cell by cell and seed by seed; ours has one setting for all.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from statistics import geometric_mean, mean
from typing import Literal

from trimtab.core.benchmark import Case, Options, Progress
from trimtab.urgency.paper.hardware import CLUSTERS
from trimtab.urgency.paper.measures import Cell, Scene, in_time, sustained_load, tardiness_s
from trimtab.urgency.paper.serving import Side
from trimtab.urgency.paper.traces import MIXED, TRACES
from trimtab.urgency.text_to_sql.figures import percentile

OURS = Side("urgency", "auto", held="llf")
OUR_DISPATCH = Side("urgency-dispatch-alone", "auto")
OUR_ORDER = Side("urgency-order-alone", "least-requests", order="llf")
VLLM = Side("vllm-fcfs+round-robin", "round-robin")
LEAST_REQUESTS = Side("vllm-fcfs+least-requests", "least-requests")

_ALPHAS = (0.0, 0.3, 0.5, 0.7, 1.0)
_RIVALS = (
    VLLM,
    LEAST_REQUESTS,
    Side("random", "random"),
    Side("p2c", "p2c"),
    Side("session", "session"),
    Side("least-work", "least-work"),
    Side("product", "product"),
    Side("shortest-job-first", "least-requests", order="sjf"),
    Side("edf", "least-requests", order="edf"),
    Side("plas", "least-requests", order="plas"),
)
_PUBLISHED = tuple(
    Side(f"{rule}-{alpha:g}", rule, options={"alpha": alpha})
    for rule in ("paper", "ratio")
    for alpha in _ALPHAS
)
_HINDSIGHT = "paper-or-ratio-best-alpha"
_WHOLE_PAPER = "paper-best-alpha+urgency"
_BEST = "best-of-all-baselines"
_ORDERS = ("fcfs", "priority", "sjf", "edf", "plas", "urgency", "edd")

_FIRST_SEED = 1000
"""Seeds below were used to choose the defaults."""
_RATE_SCALE = 4.0
_FEW_SEATS = 4
"""With these calls wait in the queue, where an order matters, rather than in the batch."""
_IN_TIME = 0.8

Better = Literal["lower", "higher"]


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is simulated."""

    cells: Sequence[Cell]
    mixed: Sequence[Cell]
    seeds: int
    workflows: int
    rates: Sequence[tuple[str, str]]

    @classmethod
    def of(cls, options: Options) -> Plan:
        """A few small cells for a quick run; else all of them."""
        if options.quick:
            place = ("a100x2-a6000-l40s", "trace-1")
            return cls([Cell(*place, 0.85)], [Cell(*place, 1.1, _FEW_SEATS)], 5, 25, ())
        loads = (0.5, 0.7, 0.85, 0.95, 1.1)
        cells = [Cell(*place) for place in product(CLUSTERS, TRACES, loads)]
        heavy = [Cell(*place, _FEW_SEATS) for place in product(CLUSTERS, TRACES, (0.95, 1.1))]
        return cls(cells, heavy, 5, 100, list(product(CLUSTERS, TRACES)))


Values = dict[tuple[str, str], list[float]]
"""By metric and side, the value of each seed."""


def simulated_cases(options: Options, progress: Progress) -> list[Case]:
    """All cases of the paper's settings; deterministic for a seed."""
    plan = Plan.of(options)
    seeds = [_FIRST_SEED + 100 * options.seed + number for number in range(plan.seeds)]
    parts = len(plan.cells) + len(plan.mixed) + len(plan.rates)
    cells: list[Values] = []
    cases: list[Case] = []
    for done, cell in enumerate(plan.cells):
        progress(f"simulating {cell.name}", done / parts)
        values = _collect(_whole(cell, plan.workflows, seed) for seed in seeds)
        cells.append(values)
        cases += _against_rivals(f"paper/{cell.name}", values)
    mixed: list[Values] = []
    for done, cell in enumerate(plan.mixed, len(plan.cells)):
        progress(f"simulating mixed deadlines at {cell.name}", done / parts)
        values = _collect(_orders(cell, plan.workflows, seed) for seed in seeds)
        mixed.append(values)
        cases += _against_orders(f"paper/order-alone/{cell.name}", values)
    rates: list[Values] = []
    for done, (cluster, trace) in enumerate(plan.rates, len(plan.cells) + len(plan.mixed)):
        progress(f"simulating the rates that {cluster} sustains on {trace}", done / parts)
        values = _collect(_rates(cluster, trace, plan.workflows, seed) for seed in seeds)
        rates.append(values)
        cases += _against_rivals(f"paper/{cluster}/{trace}", values)
    means = _mean_over(cells)
    cases += _against_rivals("paper/mean-over-cells", means)
    cases += _dispatch_against_rivals("paper/mean-over-cells", means)
    cases += _against_orders("paper/order-alone/mean-over-cells", _mean_over(mixed))
    if rates:
        means = _mean_over(rates)
        cases += _against_rivals("paper/mean-over-clusters-and-traces", means)
        cases += _dispatch_against_rivals("paper/mean-over-clusters-and-traces", means)
    return cases


def _collect(runs: Iterable[dict[tuple[str, str], float]]) -> Values:
    values: Values = defaultdict(list)
    for run in runs:
        for key, value in run.items():
            values[key].append(value)
    return values


def _mean_over(cells: Sequence[Values]) -> Values:
    """The geometric mean over cells, seed by seed."""
    return {
        key: [geometric_mean(values) for values in zip(*(cell[key] for cell in cells), strict=True)]
        for key in cells[0]
    }


def _whole(cell: Cell, count: int, seed: int) -> dict[tuple[str, str], float]:
    """All sides with deadlines of one class."""
    scene = Scene(cell, count, seed)
    scales = {side.name: scene.scale_met(side) for side in (*_RIVALS, *_PUBLISHED)}
    best = min(_PUBLISHED, key=lambda side: scales[side.name])
    whole = Side(_WHOLE_PAPER, best.rule, order="urgency", options=best.options)
    scales[_BEST] = min(scales.values())
    for side in _PUBLISHED:
        if side is not best:
            del scales[side.name]
    scales[_HINDSIGHT] = scales.pop(best.name)
    scales[whole.name] = scene.scale_met(whole, near=scales[_HINDSIGHT])
    scales[_BEST] = min(scales[_BEST], scales[whole.name])
    scales[OUR_DISPATCH.name] = scene.scale_met(OUR_DISPATCH)
    scales[OURS.name] = scene.scale_met(OURS, near=scales[OUR_DISPATCH.name])
    found = {("deadline_scale", name): scale for name, scale in scales.items()}
    tight = scene.scale_met(LEAST_REQUESTS, _IN_TIME)
    for side in (*_RIVALS, OURS, OUR_DISPATCH):
        if side.knows_deadlines:
            records = scene.run(side, scales[side.name])
            latencies_s = [record.latency_s for record in records]
            met = in_time(scene.run(side, tight))
        else:
            latencies_s = scene.latencies_s(side)
            met = mean(latency_s <= tight * cell.base_s for latency_s in latencies_s)
        found["in_time", side.name] = max(met, 1 / count)
        for name, share in (("p50", 0.5), ("p95", 0.95), ("p99", 0.99)):
            found[f"{name}_latency_s", side.name] = percentile(latencies_s, share)
    return found


def _orders(cell: Cell, count: int, seed: int) -> dict[tuple[str, str], float]:
    """All queue orders behind one dispatch rule, with tight and loose deadlines mixed."""
    scene = Scene(cell, count, seed, MIXED)
    scale = scene.scale_met(LEAST_REQUESTS, _IN_TIME)
    sides = [Side(order, "least-requests", order=order) for order in _ORDERS]
    found = {}
    for side in (*sides, OUR_ORDER, OURS):
        records = scene.run(side, scale)
        late_s = percentile(map(tardiness_s, records), 0.95)
        found["p95_tardiness_s", side.name] = max(1.0, late_s)
        found["mean_latency_s", side.name] = mean(record.latency_s for record in records)
        found["in_time", side.name] = max(in_time(records), 1 / count)
    return found


def _rates(cluster: str, trace: str, count: int, seed: int) -> dict[tuple[str, str], float]:
    """The loads that some sides sustain."""
    sides = (VLLM, LEAST_REQUESTS, Side("product", "product"), OURS, OUR_DISPATCH)
    return {
        ("sustained_load", side.name): sustained_load(
            side, cluster, trace, scale=_RATE_SCALE, count=count, seed=seed
        )
        for side in sides
    }


_DISPATCH = OUR_DISPATCH.name
_HIGHER = frozenset({"in_time", "sustained_load"})
_NOTES = {
    "deadline_scale": "smallest multiple of the template's time that 95 % of the workflows meet",
    "in_time": "deadlines such that least-requests with FCFS meets 80 %",
    "p95_tardiness_s": "deadlines of three classes such that least-requests with FCFS meets 80 %; "
    "at least 1 s",
    "sustained_load": f"share of full capacity at which 95 % meet {_RATE_SCALE:g} template times",
}


def _against_rivals(where: str, values: Values) -> list[Case]:
    """Ours against every rival and against its own dispatch alone."""
    return [
        _case(f"{where}/{OURS.name}", metric, rival, theirs, values[metric, OURS.name])
        for (metric, rival), theirs in values.items()
        if rival != OURS.name
    ]


def _dispatch_against_rivals(where: str, values: Values) -> list[Case]:
    """Our dispatch alone against every rival."""
    return [
        _case(f"{where}/{_DISPATCH}", metric, rival, theirs, values[metric, _DISPATCH])
        for (metric, rival), theirs in values.items()
        if rival not in (OURS.name, _DISPATCH) and (metric, _DISPATCH) in values
    ]


def _against_orders(where: str, values: Values) -> list[Case]:
    return [
        _case(f"{where}/{OUR_ORDER.name}", metric, rival, theirs, values[metric, OUR_ORDER.name])
        for (metric, rival), theirs in values.items()
        if rival not in (OUR_ORDER.name, OURS.name)
    ]


def _case(
    where: str, metric: str, rival: str, theirs: Sequence[float], ours: Sequence[float]
) -> Case:
    better: Better = "higher" if metric in _HIGHER else "lower"
    return Case.compare(
        where,
        metric,
        "s" if metric.endswith("_s") else "1",
        better,
        rival,
        list(zip(theirs, ours, strict=True)),
        notes=_NOTES.get(metric),
    )
