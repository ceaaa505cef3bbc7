"""The simulated tier: a day of reasoning on a GPU like an H100, past saturation and within it.

Past saturation the slower side's latency is a backlog that grows with the trace, and so does any
ratio to it: the growth stands beside the ratio at a rate that every side keeps up with.
"""

from __future__ import annotations

from collections.abc import Sequence

from trimtab.branches.drawn import Kind, Question
from trimtab.branches.figures import METRICS, Served, cases_of
from trimtab.branches.rebase import searched
from trimtab.branches.sides import (
    BEST_OF_N,
    BRANCHES,
    EARLY_STOP,
    OURS,
    PAPER,
    PRUNING,
    SELF_CONSISTENCY,
    STEP,
    VANILLA,
    Side,
    deepconf,
    lowest_scores,
)
from trimtab.branches.simulated_serving import Run, run, serve
from trimtab.core.benchmark import Case, Options, Progress

KIND = Kind(branches=BRANCHES)
OVERLOAD_PER_S = 0.125
"""One request a second over eight GPUs."""
STABLE_PER_S = 0.03
"""Every side keeps up with it."""
TRACES = (50, 100, 250)
"""Beside the trace of all sides these show how the ratio grows."""
QUICK_TRACES = (30,)
OVERLOAD_QUESTIONS, QUICK_OVERLOAD_QUESTIONS = 200, 40
STABLE_QUESTIONS, QUICK_STABLE_QUESTIONS = 200, 30
SEEDS, QUICK_SEEDS = 3, 1
OURS_WITH_REWARD_MODEL = Side("trimtab-reward-model", BRANCHES, {"pruning": "paper"})
"""What the plugin does by default where the signal is a reward model, as it is here."""
REBASE = Side("rebase", BRANCHES, BEST_OF_N.fields, BEST_OF_N.options, "weighted")

_MINE = (PAPER, OURS_WITH_REWARD_MODEL, OURS)
_GROWTH = (VANILLA, SELF_CONSISTENCY, BEST_OF_N)
_WARM_UP = 16


def cases(options: Options, progress: Progress) -> list[Case]:
    """The growth with the trace's length, all sides past saturation, and all within it."""
    seeds = range(options.seed, options.seed + (QUICK_SEEDS if options.quick else SEEDS))
    traces = QUICK_TRACES if options.quick else TRACES
    overload = QUICK_OVERLOAD_QUESTIONS if options.quick else OVERLOAD_QUESTIONS
    stable = QUICK_STABLE_QUESTIONS if options.quick else STABLE_QUESTIONS
    settings: list[tuple[str, float, int, Sequence[Side] | None]] = [
        *((f"overload-{count}", OVERLOAD_PER_S, count, _GROWTH) for count in traces),
        (f"overload-{overload}", OVERLOAD_PER_S, overload, None),
        ("stable", STABLE_PER_S, stable, None),
    ]
    found: list[Case] = []
    for number, (name, rate_per_s, count, rivals) in enumerate(settings):
        progress(f"simulating {count} questions at {rate_per_s:g}/s", number / len(settings))
        found += _compare(f"simulator/{name}", rate_per_s, count, seeds, rivals)
    return found


def _compare(
    where: str,
    rate_per_s: float,
    count: int,
    seeds: Sequence[int],
    rivals: Sequence[Side] | None,
) -> list[Case]:
    """The cases of the paper's mode and ours against each rival; all of them by default."""
    runs: dict[str, list[Served]] = {}
    for seed in seeds:
        # A longer trace begins with the shorter one.
        crowd = KIND.draw(count, rate_per_s, seed)
        for name, served in _served(crowd, [*(rivals or all_rivals(seed)), *_MINE], seed).items():
            runs.setdefault(name, []).append(served)
    mine = [side.name for side in _MINE]
    return [
        case
        for name in mine
        for rival in runs
        if rival not in mine
        for case in cases_of(f"{where}/{name}", METRICS, rival, runs[rival], runs[name])
    ]


def all_rivals(seed: int) -> list[Side]:
    """The ways that users have today."""
    warm_up = KIND.draw(_WARM_UP, 1.0, seed + 1_000_003)
    return [
        VANILLA,
        SELF_CONSISTENCY,
        BEST_OF_N,
        EARLY_STOP,
        PRUNING,
        REBASE,
        deepconf(lowest_scores(warm_up)),
        STEP,
    ]


def _served(crowd: Sequence[Question], sides: Sequence[Side], seed: int) -> dict[str, Served]:
    """What comes of a crowd by each side; those that choose differently alone share a run."""
    found: dict[str, Served] = {}
    waited_for: Run | None = None
    for side in sides:
        if side is REBASE:
            leaves = [searched(question, KIND.score_every, seed) for question in crowd]
            found[side.name] = serve(leaves, side, KIND.score_every)
        elif side in (SELF_CONSISTENCY, BEST_OF_N):
            waited_for = waited_for or run(crowd, side, KIND.score_every)
            found[side.name] = waited_for.answered(crowd, side)
        else:
            found[side.name] = serve(crowd, side, KIND.score_every)
    return found
