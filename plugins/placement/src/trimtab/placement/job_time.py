"""How long jobs run: chances and quantiles, learned from jobs that ended.

Arnold (arXiv:2509.15940, section 5.3) predicts a mean with gradient boosting. A mean is overrun by
half of the jobs, so all here are quantiles and the chance of an overrun, on the careful side where
few jobs were seen. A user's limit ends a job: beyond it the chance is 0.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from trimtab.core.errors import BadInput
from trimtab.core.simulate.cluster_jobs import JobRequest

Ended = tuple[JobRequest, float]
"""A job that ended, and how long it ran in seconds."""


class JobTimes(Protocol):
    """Predicts how long jobs run."""

    def exceeds(self, request: JobRequest, time_s: float, ran_s: float = 0.0) -> float:
        """The chance that a job that ran for ``ran_s`` runs longer than ``time_s`` in all."""

    def quantile_s(self, request: JobRequest, share: float) -> float:
        """How long it runs at most with a chance of ``share``; infinity where nothing is known."""


class LimitTimes:
    """Knows nothing but the users' limits: every job runs to its limit, or for ever."""

    def exceeds(self, request: JobRequest, time_s: float, ran_s: float = 0.0) -> float:
        """See `JobTimes`."""
        return float(request.limit_s is None or time_s < request.limit_s)

    def quantile_s(self, request: JobRequest, share: float) -> float:
        """See `JobTimes`."""
        return math.inf if request.limit_s is None else request.limit_s


class KnownTimes:
    """Knows how long each job of a trace takes, as no predictor does.

    Args:
        ended: all jobs, with their times.
    """

    def __init__(self, ended: Iterable[Ended]) -> None:
        self._held_s = {request.job_id: held_s for request, held_s in ended}

    def exceeds(self, request: JobRequest, time_s: float, ran_s: float = 0.0) -> float:
        """See `JobTimes`."""
        return float(self._held_s[request.job_id] > time_s)

    def quantile_s(self, request: JobRequest, share: float) -> float:
        """See `JobTimes`."""
        return self._held_s[request.job_id]


_DRAWN = 10
"""The lognormal counts as so many jobs."""


@dataclass(frozen=True, slots=True)
class _Sample:
    """The times of jobs that were alike, ascending, and a lognormal for what lies beyond them."""

    times_s: tuple[float, ...]
    log_median: float
    log_sigma: float

    @classmethod
    def of(cls, times_s: Sequence[float]) -> _Sample:
        logs = np.log(np.maximum(times_s, 1.0))
        low, median, high = np.quantile(logs, (0.1, 0.5, 0.9))
        # Half as wide again as the quantiles say: tails are heavier than the middle lets expect.
        sigma = 1.5 * max(float(high - low) / 2.563, 0.1)
        return cls(tuple(sorted(times_s)), float(median), sigma)

    def survivors(self, time_s: float) -> float:
        """How many ran longer, with a few further jobs that are drawn from the lognormal."""
        deviations = (math.log(max(time_s, 1.0)) - self.log_median) / self.log_sigma
        beyond = 0.5 * math.erfc(deviations / math.sqrt(2))
        return len(self.times_s) - bisect_right(self.times_s, time_s) + _DRAWN * beyond

    def quantile_s(self, share: float) -> float:
        """The time that a further job stays below with a chance of ``share``."""
        rank = math.ceil(share * (len(self.times_s) + 1))
        return self.times_s[rank - 1] if rank <= len(self.times_s) else math.inf


class GroupTimes:
    """The times of jobs that were alike: of one department, with about these nodes and this limit.

    A job is compared with the finest group that has enough jobs. A department that was never seen
    counts as known to nobody: its jobs are predicted by their limit.

    Args:
        ended: jobs that ended, with their times.
        enough: the fewest jobs of a group that is believed.
    """

    def __init__(self, ended: Iterable[Ended], *, enough: int = 40) -> None:
        groups: dict[Hashable, list[float]] = defaultdict(list)
        for request, ran_s in ended:
            for key in _groups(request):
                groups[key].append(ran_s)
        self._samples = {
            key: _Sample.of(times) for key, times in groups.items() if len(times) >= enough
        }

    def exceeds(self, request: JobRequest, time_s: float, ran_s: float = 0.0) -> float:
        """See `JobTimes`."""
        limited = LimitTimes().exceeds(request, time_s)
        sample = self._like(request)
        if not limited or sample is None:
            return limited
        by_now = sample.survivors(ran_s)
        return sample.survivors(max(time_s, ran_s)) / by_now if by_now else 1.0

    def quantile_s(self, request: JobRequest, share: float) -> float:
        """See `JobTimes`."""
        at_most_s = LimitTimes().quantile_s(request, share)
        sample = self._like(request)
        return at_most_s if sample is None else min(at_most_s, sample.quantile_s(share))

    def _like(self, request: JobRequest) -> _Sample | None:
        for key in _groups(request):
            if key in self._samples:
                return self._samples[key]
        return None


def _groups(request: JobRequest) -> tuple[Hashable, ...]:
    """The groups that a job belongs to, the finest first."""
    department, limit_s = request.department, request.limit_s
    return (
        (department, limit_s, request.nodes.bit_length()),
        (department, limit_s),
        (department,),
    )


class BoostedTimes:
    """Quantiles by gradient boosting over department, nodes and limit; needs scikit-learn.

    Several models of each quantile are fitted to samples with replacement, and the longest of their
    answers counts: where they disagree, little is known.

    Args:
        ended: jobs that ended, with their times; at least 100.
        seed: of the samples.
        bags: models of each quantile.

    Raises:
        BadInput: scikit-learn is missing, or there are too few jobs.
    """

    SHARES = (0.25, 0.5, 0.75, 0.9, 0.98)

    def __init__(self, ended: Sequence[Ended], *, seed: int = 0, bags: int = 2) -> None:
        try:
            from sklearn.ensemble import (  # type: ignore[import-not-found,unused-ignore]
                HistGradientBoostingRegressor,
            )
        except ModuleNotFoundError:
            raise BadInput(
                "boosted job times need scikit-learn, which is not installed",
                fix="pip install trimtab-placement[predict], or use the groups' times",
            ) from None
        if len(ended) < 100:
            raise BadInput(f"{len(ended)} jobs are too few to learn from", fix="give at least 100")
        self._departments = {
            name: index for index, name in enumerate(sorted({job.department for job, _ in ended}))
        }
        features = np.array([self._features(request) for request, _ in ended])
        target = np.log([max(ran_s, 1.0) for _, ran_s in ended])
        rng = np.random.default_rng(seed)
        samples = [rng.integers(0, len(ended), len(ended)) for _ in range(bags)]
        self._models = [
            [
                HistGradientBoostingRegressor(
                    loss="quantile",
                    quantile=share,
                    max_iter=40,
                    min_samples_leaf=20,
                    categorical_features=[0],
                    random_state=seed,
                ).fit(features[sample], target[sample])
                for sample in samples
            ]
            for share in self.SHARES
        ]
        self._known: dict[tuple[float, ...], tuple[float, ...]] = {}

    def exceeds(self, request: JobRequest, time_s: float, ran_s: float = 0.0) -> float:
        """See `JobTimes`."""
        limited = LimitTimes().exceeds(request, time_s)
        if not limited or request.department not in self._departments:
            return limited
        return min(1.0, self._longer(request, max(time_s, ran_s)) / self._longer(request, ran_s))

    def quantile_s(self, request: JobRequest, share: float) -> float:
        """See `JobTimes`."""
        at_most_s = LimitTimes().quantile_s(request, share)
        if request.department not in self._departments or share > self.SHARES[-1]:
            return at_most_s
        return min(at_most_s, float(np.interp(share, self.SHARES, self._curve(request))))

    def _longer(self, request: JobRequest, time_s: float) -> float:
        curve = (0.0, *self._curve(request), 2 * self._curve(request)[-1])
        # Beyond the last quantile little was seen: the chance never reaches 0 without a limit.
        return float(np.interp(time_s, curve, (1.0, *(1 - s for s in self.SHARES), 0.003)))

    def _curve(self, request: JobRequest) -> tuple[float, ...]:
        """The quantiles of a job's time, ascending."""
        features = self._features(request)
        if features not in self._known:
            row = np.array([features])
            longest = [max(m.predict(row)[0] for m in models) for models in self._models]
            self._known[features] = tuple(np.exp(np.maximum.accumulate(longest)).tolist())
        return self._known[features]

    def _features(self, request: JobRequest) -> tuple[float, ...]:
        limit = math.nan if request.limit_s is None else math.log(request.limit_s)
        department = self._departments.get(request.department, math.nan)
        return department, math.log2(request.nodes), limit


def learned(ended: Sequence[Ended], *, seed: int = 0) -> JobTimes:
    """The best predictor that is installed and that so many jobs allow."""
    if len(ended) >= 1000:
        try:
            return BoostedTimes(ended, seed=seed)
        except BadInput:
            return GroupTimes(ended)
    return GroupTimes(ended)
