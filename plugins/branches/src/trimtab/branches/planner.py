"""How many branches: N, M and T for a load, from recorded lengths, so that an objective holds.

Every pair of N and M is estimated in closed form, the few best are simulated, and the best of those
is the plan.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any, Literal

import numpy as np

from trimtab.branches.demand import Demand, Slo
from trimtab.branches.drawn import wilson
from trimtab.branches.estimate import Estimate, estimate
from trimtab.branches.figures import Served
from trimtab.branches.sides import Side
from trimtab.branches.simulated_serving import serve
from trimtab.core.documents import digest
from trimtab.core.errors import Infeasible
from trimtab.core.plan import Figure, Objective, Plan

_SIMULATED = 5
_NEAR = 1.25
"""Pairs are simulated that are estimated within this factor of the best."""
_SCORINGS = (20, 10, 5)
"""T is a typical branch's length over one of these."""
_SCORING_STEP = 16
_CROWDED = 0.85
_WORTH = 0.02
"""Pruning may cost at most so much accuracy."""
UNSCORED = 1_000_000
"""A T that no branch reaches."""


@dataclass(frozen=True, slots=True)
class Simulated:
    """A pair on the simulator."""

    estimate: Estimate
    served: Served

    @property
    def latency_s(self) -> float:
        """Mean latency."""
        return fmean(self.served.latencies_s)

    @property
    def p97_s(self) -> float:
        """The latency of 97 in 100 requests."""
        return float(np.quantile(self.served.latencies_s, 0.97))

    def keeps(self, slo: Slo) -> bool:
        """Whether the latencies that were asked for hold."""
        return self.latency_s <= (slo.latency_s or math.inf) and self.p97_s <= (
            slo.p97_s or math.inf
        )


Pruning = Literal["off", "safe"]


def side_of(n: int, m: int, pruning: Pruning) -> Side:
    """N branches of which M finished ones answer, at any load."""
    return Side(
        f"{n}/{m}",
        n,
        {"enough": m, "pruning": pruning} if n > 1 else {},
        {"bend": False, "certainty": None},
    )


def plan_branches(demand: Demand, slo: Slo, *, most: int = 16, seed: int = 0) -> Plan:
    """The plan for a load: the fastest pair that is accurate enough, else the most accurate one.

    Args:
        demand: what is served.
        slo: with an accuracy, the mean latency is made as short as possible; without, the accuracy
            as high as possible within the latencies.
        most: the largest N.
        seed: of the simulated questions.

    Raises:
        Infeasible: no pair meets the objective.
    """
    started_s = time.monotonic()
    estimates = [estimate(demand, n, m) for n in range(1, most + 1) for m in range(1, n + 1)]
    crowd = demand.crowd(most, UNSCORED, seed)
    tried: list[Simulated] = []
    for candidate in _shortlist(estimates, slo):
        side = side_of(candidate.n, candidate.m, "off")
        tried.append(Simulated(candidate, serve(crowd, side, UNSCORED, demand.profile)))
        if slo.accuracy is None and tried[-1].keeps(slo):
            break
    kept = [one for one in tried if one.keeps(slo)]
    if not kept:
        nearest = min(tried, key=lambda one: one.latency_s)
        raise Infeasible(
            f"no N up to {most} and M keep {slo.text} on the simulator",
            relaxation=f"N={nearest.estimate.n} and M={nearest.estimate.m} take "
            f"{nearest.latency_s:.3g} s on average and {nearest.p97_s:.3g} s at p97",
        )
    best = min(kept, key=lambda one: one.latency_s) if slo.accuracy is not None else kept[-1]
    way = _fastest(_ways(demand, best, most, seed))
    return _plan(demand, slo, estimates, best, way, time.monotonic() - started_s)


def _scored_every(demand: Demand, scorings: int) -> int:
    """Tokens between two scorings where a typical branch is scored so often."""
    typical = float(np.median(demand.scales))
    return max(_SCORING_STEP, round(typical / scorings / _SCORING_STEP) * _SCORING_STEP)


def _shortlist(estimates: Sequence[Estimate], slo: Slo) -> list[Estimate]:
    """The pairs worth simulating, the best estimated first.

    Raises:
        Infeasible: none meets the objective by its estimate.
    """
    steady = [e for e in estimates if math.isfinite(e.latency_s)]
    if not steady:
        least = min(estimates, key=lambda e: e.tokens)
        raise Infeasible(
            "one engine does not keep up even with the cheapest pair",
            relaxation=f"with N={least.n} and M={least.m} a request takes {least.tokens:.0f} "
            "tokens: give each engine fewer requests a second",
        )
    if slo.accuracy is None:
        bound_s = min(slo.latency_s or math.inf, slo.p97_s or math.inf)
        inside = [e for e in steady if e.latency_s <= bound_s]
        if not inside:
            fastest = min(steady, key=lambda e: e.latency_s)
            raise Infeasible(
                f"no pair is estimated to keep {slo.text}",
                relaxation=f"the fastest, N={fastest.n} and M={fastest.m}, takes "
                f"{fastest.latency_s:.3g} s on average",
            )
        return sorted(inside, key=lambda e: (-round(e.accuracy, 4), e.latency_s))[:_SIMULATED]
    accurate = [e for e in steady if e.accuracy >= slo.accuracy]
    if not accurate:
        top = max(steady, key=lambda e: e.accuracy)
        raise Infeasible(
            f"no pair that the engine keeps up with reaches an accuracy of {slo.accuracy:g}",
            relaxation=f"the most accurate, N={top.n} and M={top.m}, reaches {top.accuracy:.3f}",
        )
    fastest_s = min(e.latency_s for e in accurate)
    near = [e for e in accurate if e.latency_s <= _NEAR * fastest_s]
    return sorted(near, key=lambda e: e.latency_s)[:_SIMULATED]


@dataclass(frozen=True, slots=True)
class Way:
    """A pair with or without pruning."""

    pruning: Pruning
    score_every: int
    served: Served


def _ways(demand: Demand, best: Simulated, most: int, seed: int) -> list[Way]:
    """The pair without pruning, and with it at different T."""
    n, m = best.estimate.n, best.estimate.m
    found = [Way("off", _scored_every(demand, 10), best.served)]
    if n == 1:
        return found
    for every in sorted({_scored_every(demand, scorings) for scorings in _SCORINGS}):
        crowd = demand.crowd(most, every, seed)
        served = serve(crowd, side_of(n, m, "safe"), every, demand.profile)
        found.append(Way("safe", every, served))
    return found


def _fastest(ways: Sequence[Way]) -> Way:
    """The fastest of the ways that are as accurate as without pruning.

    Pruning is not always faster: of fewer branches the M-th ends later.
    """
    needed = ways[0].served.accuracy - _WORTH
    accurate = [way for way in ways if way.served.accuracy >= needed]
    return min(accurate, key=lambda way: fmean(way.served.latencies_s))


def _plan(
    demand: Demand,
    slo: Slo,
    estimates: Sequence[Estimate],
    best: Simulated,
    way: Way,
    wall_s: float,
) -> Plan:
    chosen, served = best.estimate, way.served
    latency_s = fmean(served.latencies_s)
    low, high = wilson(sum(served.right), len(served.right))
    count = len(served.right)
    expected = {
        "mean latency": Figure(value=latency_s, unit="s"),
        "p97 latency": Figure(value=float(np.quantile(served.latencies_s, 0.97)), unit="s"),
        "mean latency without pruning": Figure(value=best.latency_s, unit="s"),
        "mean latency by the formulas": Figure(value=chosen.latency_s, unit="s"),
        "tokens of a request": Figure(value=served.tokens / count, unit="tokens"),
        "tokens without pruning": Figure(value=chosen.tokens, unit="tokens"),
        "KV held without pruning": Figure(value=chosen.kv_tokens, unit="tokens"),
        "utilisation": Figure(value=chosen.utilisation, unit="1"),
        "accuracy": Figure(value=chosen.accuracy, unit="1"),
        "accuracy in simulation, at least": Figure(value=low, unit="1"),
        "accuracy in simulation, at most": Figure(value=high, unit="1"),
    }
    limits = demand.profile.limits
    details: Mapping[str, Any] = {
        "config": {
            "n": chosen.n,
            "m": chosen.m,
            "score_every": way.score_every,
            "pruning": way.pruning,
        },
        "kv_capacity_tokens": limits.kv_blocks * limits.block_size,
        "slo": slo.text,
        "rate_per_s": demand.rate_per_s,
        "prompt_tokens": demand.prompt_tokens,
        "auroc": demand.selection,
        "engine": f"{demand.profile.model} on {demand.profile.device}",
        "curves": [
            {k: v if math.isfinite(v) else None for k, v in asdict(e).items()} for e in estimates
        ],
    }
    return Plan(
        planner="branches",
        inputs={"lengths": digest([asdict(b) for b in demand.trace.branches])},
        objective=Objective(
            metric="mean latency" if slo.accuracy is not None else "accuracy",
            unit="s" if slo.accuracy is not None else "1",
            better="lower" if slo.accuracy is not None else "higher",
            value=latency_s if slo.accuracy is not None else chosen.accuracy,
            solver="closed form of all pairs, the best few simulated",
            wall_s=wall_s,
        ),
        expected=expected,
        details=details,
        warnings=tuple(_warnings(demand, estimates, chosen)),
    )


def _warnings(demand: Demand, estimates: Sequence[Estimate], chosen: Estimate) -> list[str]:
    found = []
    trace = demand.trace
    if trace.censored_share > 0.3:
        found.append(
            f"{trace.censored_share:.0%} of the recorded branches were ended early, so the longest"
            " lengths are not known: record some requests whose branches nobody ends"
        )
    if len(trace.questions) < 30:
        found.append(f"{len(trace.questions)} questions are few: figures are rough below 30")
    if demand.selection < 0.55:
        found.append(
            f"the scores' AUROC is {demand.selection:.2f}: choosing by them is hardly better than"
            " by a coin, so more finished branches add little; a vote may"
        )
    if chosen.utilisation > _CROWDED:
        found.append(
            f"the engine is used to {chosen.utilisation:.0%}: the simulated latencies are those of"
            " a burst, and grow with a longer one"
        )
    if chosen.n == max(e.n for e in estimates) > 1:
        found.append(f"N is the largest that was tried, {chosen.n}: give a larger --most")
    return found
