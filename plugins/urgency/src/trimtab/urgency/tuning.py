"""Options found by simulation: a recent trace is replayed under many, and the best one is kept.

The paper replays a window of its trace for each alpha of a grid. Here the windows are bootstrapped,
all candidates meet the same ones (common random numbers), most candidates see only a few
(successive halving), and the winner must beat what is in use on windows that chose nobody.
"""

from __future__ import annotations

import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from statistics import mean

import numpy as np

from trimtab.core.cost.step import EngineProfile, StepBatch
from trimtab.core.documents import parse_json, unreadable, validate
from trimtab.core.simulate import ReplicaSpec, ServingResult, simulate
from trimtab.core.workload import Request, Workload
from trimtab.urgency.config import TunedDispatch, TunedOptions, UrgencyConfig
from trimtab.urgency.dispatch import Backlog, Prediction, RoutedCall, rule
from trimtab.urgency.policy import UrgencyPolicy
from trimtab.urgency.simulated_router import HoldingRouter

ALPHAS = tuple(step / 10 for step in range(11))
"""The paper's grid, to its end."""

_SEARCH_WINDOWS = 8
_TRIAL_WINDOWS = 8
_MOST_WORKFLOWS = 200
_SEARCH_SHARE = 0.6
"""Of the budget; the rest is for the trial."""
_LEAST_GAIN = 0.02
_RESAMPLES = 1000
_TARDINESS_WEIGHT, _LATENCY_WEIGHT = 0.1, 0.01
_MOST_TAIL_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True)
class Tuning:
    """What a search came to.

    Attributes:
        options: those to use from now on.
        changed: whether they are others than before.
        before: mean loss of the options that were in use, over the trial's windows.
        after: that of the search's winner.
        simulations: how many were run.
        in_time: whether the trial ended within the budget; else nothing changes.
    """

    options: TunedOptions
    changed: bool
    before: float
    after: float
    simulations: int
    in_time: bool = True


class OutOfTime(Exception):
    """The budget is spent."""


class Replays:
    """Losses of options on the windows of a trace, each simulated once.

    Args:
        requests: the trace.
        profiles: the engines.
        config: the options that are not tuned.
        seed: of the windows.
        budget_s: seconds until `OutOfTime` is raised.
    """

    def __init__(
        self,
        requests: Sequence[Request],
        profiles: Sequence[EngineProfile],
        config: UrgencyConfig,
        *,
        seed: int = 0,
        budget_s: float = math.inf,
    ) -> None:
        self._windows = windows(requests, _SEARCH_WINDOWS + _TRIAL_WINDOWS, seed)
        self._output_tokens = _mean_outputs(requests)
        self._profiles, self._config = profiles, config
        self._losses: dict[tuple[TunedOptions, int], float] = {}
        self._start_s, self._budget_s = time.monotonic(), budget_s
        self.spendable = 1.0
        """The share of the budget after which `OutOfTime` is raised."""

    @property
    def simulations(self) -> int:
        """How many were run."""
        return len(self._losses)

    def loss(self, options: TunedOptions, window: int) -> float:
        """The loss of options on a window; see `loss`.

        Raises:
            OutOfTime: the budget is spent.
        """
        if (options, window) not in self._losses:
            if time.monotonic() - self._start_s > self.spendable * self._budget_s:
                raise OutOfTime
            self._losses[options, window] = loss(self._replay(options, self._windows[window]))
        return self._losses[options, window]

    def losses(self, options: TunedOptions, chosen: range) -> list[float]:
        """The losses on several windows."""
        return [self.loss(options, window) for window in chosen]

    def _replay(self, options: TunedOptions, requests: Sequence[Request]) -> ServingResult:
        config = options.over(self._config)
        return simulate(
            requests,
            [ReplicaSpec(profile) for profile in self._profiles],
            policies=lambda: (UrgencyPolicy(config),),
            router=self._router(options, config),
        )

    def _router(self, options: TunedOptions, config: UrgencyConfig) -> HoldingRouter | None:
        if options.dispatch is None or len(self._profiles) < 2:
            return None
        alpha = options.dispatch.alpha
        chosen = rule(options.dispatch.rule, **({} if alpha is None else {"alpha": alpha}))
        backlogs = [
            Backlog(number, profile.limits.max_num_seqs, _predictor(profile))
            for number, profile in enumerate(self._profiles)
        ]
        return HoldingRouter(chosen, backlogs, self._foretell, UrgencyPolicy(config))

    def _foretell(self, request: Request) -> RoutedCall:
        """A request as a router sees it: by its stage's mean output, not by its own."""
        stage = request.stage or ""
        return RoutedCall(
            request.prompt_tokens,
            self._output_tokens[stage],
            stage=stage,
            workflow=request.workflow,
        )


def tune(
    replays: Replays, current: TunedOptions, candidates: Sequence[Sequence[TunedOptions]]
) -> Tuning:
    """The best of the candidates, if it is better than what is in use beyond doubt and by 2 %.

    Args:
        replays: the trace's windows.
        current: what is in use.
        candidates: fields of options that are searched one after another: each candidate says what
            it changes of the winner so far.
    """
    winner = _search(replays, current, candidates)
    trial = range(_SEARCH_WINDOWS, _SEARCH_WINDOWS + _TRIAL_WINDOWS)
    try:
        before, after = replays.losses(current, trial), replays.losses(winner, trial)
    except OutOfTime:
        return Tuning(current, False, math.nan, math.nan, replays.simulations, in_time=False)
    adopted = winner != current and surely_better(before, after)
    options = winner if adopted else current
    return Tuning(options, adopted, mean(before), mean(after), replays.simulations)


def _search(
    replays: Replays, current: TunedOptions, candidates: Sequence[Sequence[TunedOptions]]
) -> TunedOptions:
    """The winner of all fields, or of those for which there was time."""
    winner = current
    replays.spendable = _SEARCH_SHARE
    with suppress(OutOfTime):
        for field in candidates:
            changed = [winner.model_copy(update=_said(candidate)) for candidate in field]
            winner = halve([winner, *changed], replays.loss, _SEARCH_WINDOWS)
    replays.spendable = 1.0
    return winner


def halve(
    candidates: Sequence[TunedOptions],
    loss_of: Callable[[TunedOptions, int], float],
    windows: int,
) -> TunedOptions:
    """Successive halving (arXiv:1502.07943): the better half goes on to twice the windows.

    When the time is over, the best of the last whole round is taken.

    Raises:
        OutOfTime: not even one round was.
    """
    left, used = list(dict.fromkeys(candidates)), 1
    while len(left) > 1:
        used = min(used, windows)
        try:
            left = sorted(left, key=lambda one: mean(loss_of(one, w) for w in range(used)))
        except OutOfTime:
            if used == 1:
                raise
            break
        if used == windows:
            break
        left = left[: (len(left) + 1) // 2]
        used *= 2
    return left[0]


def surely_better(before: Sequence[float], after: Sequence[float]) -> bool:
    """Whether the mean gain's paired-bootstrap 90 % interval is above 0, and the gain above 2 %."""
    gains = np.array(before) - np.array(after)
    rng = np.random.default_rng(0)
    means = rng.choice(gains, (_RESAMPLES, len(gains))).mean(axis=1)
    return bool(np.quantile(means, 0.05) > 0 and gains.mean() > _LEAST_GAIN * mean(before))


def queue_candidates() -> list[TunedOptions]:
    """The orders, and the shapes of the default one."""
    shapes = product((1.1, 1.5, 2.0), (0.7, 0.9, 1.1), (0.5, 0.8))
    return [
        TunedOptions(order="urgency"),
        TunedOptions(order="llf"),
        TunedOptions(order="srpt"),
        TunedOptions(order="fcfs"),
        *(
            TunedOptions(order="edd", age_cap=cap, best_case=best, work_quantile=quantile)
            for cap, best, quantile in shapes
        ),
    ]


def alpha_candidates() -> list[TunedOptions]:
    """The paper's sweep over alpha, for its rule and for its released programme's."""
    return [
        TunedOptions(dispatch=TunedDispatch(rule=name, alpha=alpha))
        for name in ("paper", "ratio")
        for alpha in ALPHAS
    ]


def dispatch_candidates() -> list[TunedOptions]:
    """The other dispatch rules."""
    names = ("auto", "pft", "product", "least-work", "least-requests")
    return [TunedOptions(dispatch=TunedDispatch(rule=name)) for name in names]


def loss(result: ServingResult) -> float:
    """What is minimised: missed deadlines, then late tails, then latency.

    The share of the workflows that missed theirs, and with small weights the 95 % quantile of the
    lateness in deadlines and the mean latency in makespans, each squeezed into ``[0, 1)``.
    """
    bound = [w for w in result.workflows if w.deadline_s is not None]
    late = [max(0.0, w.latency_s / (w.deadline_s or 1.0) - 1) for w in bound]
    missed = sum(not w.met for w in bound) / max(1, len(bound))
    tail = float(np.quantile(late, 0.95)) if late else 0.0
    latency_s = mean(w.latency_s for w in result.workflows) if result.workflows else 0.0
    return (
        missed
        + _TARDINESS_WEIGHT * tail / (1 + tail)
        + _LATENCY_WEIGHT * latency_s / (latency_s + max(result.makespan_s, 1e-9))
    )


def windows(requests: Sequence[Request], count: int, seed: int) -> list[tuple[Request, ...]]:
    """Bootstrapped windows: the trace's arrivals, each with the calls of a workflow drawn anew."""
    groups = _groups(requests)[-_MOST_WORKFLOWS:]
    arrivals_s = [min(request.arrival_s for request in group) for group in groups]
    rng = np.random.default_rng(seed)
    drawn = []
    for _ in range(count):
        picks = rng.integers(len(groups), size=len(groups)).tolist()
        drawn.append(
            tuple(
                request
                for slot, pick in enumerate(picks)
                for request in _moved(groups[pick], arrivals_s[slot] - arrivals_s[0], slot)
            )
        )
    return drawn


def _groups(requests: Sequence[Request]) -> list[list[Request]]:
    """The requests by workflow, in the order of their arrival."""
    groups: defaultdict[str, list[Request]] = defaultdict(list)
    for request in sorted(requests, key=lambda request: request.arrival_s):
        groups[f"w{request.workflow}" if request.workflow else f"r{request.request_id}"].append(
            request
        )
    return list(groups.values())


def _moved(group: Sequence[Request], arrival_s: float, slot: int) -> list[Request]:
    """A workflow as the one of a slot: its own ids, and its calls as long after its arrival."""
    shift_s = arrival_s - min(request.arrival_s for request in group)
    own = {request.request_id for request in group}
    return [
        replace(
            request,
            request_id=f"{slot}/{request.request_id}",
            workflow=f"{slot}/{request.workflow}" if request.workflow else None,
            arrival_s=max(0.0, request.arrival_s + shift_s),
            depends_on=tuple(f"{slot}/{name}" for name in request.depends_on if name in own),
        )
        for request in group
    ]


def recent(path: Path, last_s: float = math.inf) -> list[Request]:
    """The workflows of a trace that arrived in its last seconds; it may be growing meanwhile.

    A last line without its end is left for the next time, and so is a workflow that depends on a
    call which is not there.

    Raises:
        BadInput: the file cannot be read, or a line of it is no request.
    """
    try:
        with path.open("rb") as file:
            size_bytes = file.seek(0, 2)
            start = file.seek(max(0, size_bytes - _MOST_TAIL_BYTES))
            lines = file.read().split(b"\n")[1 if start else 0 : -1]
    except OSError as error:
        raise unreadable(path, error) from None
    requests = [_request(line, f"{path}:{n}") for n, line in enumerate(lines, 1) if line.strip()]
    known = {request.request_id for request in requests}
    since_s = max((request.arrival_s for request in requests), default=0.0) - last_s
    kept = [
        request
        for group in _groups(requests)
        if group[0].arrival_s >= since_s
        and all(name in known for member in group for name in member.depends_on)
        for request in group
    ]
    return list(Workload(tuple(kept)))


def _request(line: bytes, where: str) -> Request:
    text = line.decode("utf-8", errors="replace")
    return validate(Request, parse_json(text, where=where), where=where)


def _mean_outputs(requests: Sequence[Request]) -> dict[str, float]:
    lengths: defaultdict[str, list[int]] = defaultdict(list)
    for request in requests:
        lengths[request.stage or ""].append(request.output_tokens)
    return {stage: mean(tokens) for stage, tokens in lengths.items()}


def _predictor(profile: EngineProfile) -> Callable[[RoutedCall], Prediction]:
    decode_s = profile.step.seconds(StepBatch(decodes=1))

    def predict(call: RoutedCall) -> Prediction:
        prefill = StepBatch(prefills=1, prefill_tokens=call.prompt_tokens)
        return Prediction(profile.step.seconds(prefill), decode_s * call.output_tokens)

    return predict


def _said(options: TunedOptions) -> dict[str, object]:
    return {name: getattr(options, name) for name in options.model_fields_set}


def summary(tuning: Tuning) -> str:
    """A tuning in one line of JSON, without what is unknown."""
    found = {
        "changed": tuning.changed,
        "in_time": tuning.in_time,
        "loss_before": tuning.before,
        "loss_after": tuning.after,
        "simulations": tuning.simulations,
        "options": tuning.options.model_dump(exclude_none=True, exclude={"kind", "version"}),
    }
    return json.dumps({key: value for key, value in found.items() if value == value})
