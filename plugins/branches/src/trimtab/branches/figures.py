"""What benchmarks of branches measure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Literal

import numpy as np

from trimtab.branches.answers import Candidate, choose
from trimtab.branches.drawn import RIGHT, Question, wilson
from trimtab.branches.note import Fate, Note
from trimtab.branches.sides import Side
from trimtab.core.benchmark import Case


@dataclass
class Served:
    """What came of a crowd that was served one way.

    Attributes:
        latencies_s: of each question, from its arrival to the end of its last branch.
        right: of each question, whether its answer was.
        chances: of each question, how likely the branch that answered is right by all its rewards.
        tokens: output tokens of all branches.
        kv_block_s: KV blocks in use, summed over time.
        preemptions: how often vLLM threw a branch out of its KV cache.
        busy_s, until_s: how long the engine worked, and when it was done.
        last_arrival_s: when the last question was asked.
        ends: branches by how they ended.
    """

    latencies_s: list[float] = field(default_factory=list)
    right: list[bool] = field(default_factory=list)
    chances: list[float] = field(default_factory=list)
    tokens: int = 0
    kv_block_s: float = 0.0
    preemptions: int = 0
    busy_s: float = 0.0
    until_s: float = 0.0
    last_arrival_s: float = 0.0
    ends: dict[Fate, int] = field(default_factory=dict)

    def answer(
        self, question: Question, side: Side, notes: Mapping[int, Note | None], now_s: float
    ) -> None:
        """A question's last branch has ended; a branch without a note finished by itself."""
        self.latencies_s.append(now_s - question.arrival_s)
        self.last_arrival_s = max(self.last_arrival_s, question.arrival_s)
        candidates = []
        for branch, note in notes.items():
            fate = note.fate if note else Fate.FINISHED
            self.ends[fate] = self.ends.get(fate, 0) + 1
            tokens = note.tokens if note else question.lengths[branch]
            score = note.score if note else None
            answer = str(question.answers[branch]) if fate is Fate.FINISHED else None
            candidates.append(Candidate(branch, fate.value, score, tokens, answer))
        winner = choose(candidates, side.answer).winner
        self.right.append(question.answers[winner.branch] == RIGHT)
        if question.chances:
            self.chances.append(question.chances[winner.branch])

    @property
    def accuracy(self) -> float:
        """The share of questions that were answered right."""
        return fmean(self.right)

    @property
    def requests_per_s(self) -> float:
        """Questions answered per second."""
        return len(self.latencies_s) / self.until_s

    @property
    def utilisation(self) -> float:
        """The share of the time in which the engine worked."""
        return self.busy_s / self.until_s

    @property
    def stable(self) -> bool:
        """Whether the engine kept up: the later half waited at most twice as long as the first."""
        half = len(self.latencies_s) // 2
        return fmean(self.latencies_s[half:]) <= 2 * fmean(self.latencies_s[:half])


@dataclass(frozen=True, slots=True)
class Metric:
    """A figure of a served crowd; where it can be 0, values under ``floor`` count as that."""

    name: str
    unit: str
    better: Literal["lower", "higher"]
    of: Callable[[Served], float]
    floor: float = 1e-9


def _percentile(share: float) -> Callable[[Served], float]:
    return lambda served: float(np.quantile(served.latencies_s, share))


METRICS = (
    Metric("latency_mean", "s", "lower", lambda served: fmean(served.latencies_s)),
    Metric("latency_p50", "s", "lower", _percentile(0.5)),
    Metric("latency_p97", "s", "lower", _percentile(0.97)),
    Metric("throughput", "requests/s", "higher", lambda served: served.requests_per_s),
    Metric("tokens", "1", "lower", lambda served: float(served.tokens)),
    Metric("kv_block_seconds", "s", "lower", lambda served: served.kv_block_s),
    Metric("preemptions", "1", "lower", lambda served: float(served.preemptions), 1.0),
    Metric("accuracy", "1", "higher", lambda served: served.accuracy, 0.01),
)
EXPECTED_ACCURACY = Metric(
    "expected_accuracy", "1", "higher", lambda served: fmean(served.chances), 0.01
)
"""The mean chance that the chosen branch is right, for sides that choose by rewards alone.

Its mean is that of `accuracy`, and without the coins that made single branches right or wrong a
difference of two sides has a fraction of the spread (Rao and Blackwell).
"""


def cases_of(
    name: str,
    metrics: Sequence[Metric],
    baseline: str,
    theirs: Sequence[Served],
    ours: Sequence[Served],
) -> list[Case]:
    """A case for each metric; the repeats of both sides correspond."""
    notes = f"baseline: {summary(theirs)}; ours: {summary(ours)}"
    if EXPECTED_ACCURACY in metrics:
        notes += f"; {_expected_lead(theirs, ours)}"
    return [
        Case.compare(
            name,
            metric.name,
            metric.unit,
            metric.better,
            baseline,
            [
                (max(metric.of(a), metric.floor), max(metric.of(b), metric.floor))
                for a, b in zip(theirs, ours, strict=True)
            ],
            notes=notes,
        )
        for metric in metrics
    ]


def summary(runs: Sequence[Served]) -> str:
    """Accuracy with its interval, utilisation, whether the engine kept up, and branches' ends."""
    right, of = sum(sum(run.right) for run in runs), sum(len(run.right) for run in runs)
    low, high = wilson(right, of)
    use = fmean(run.utilisation for run in runs)
    stable = sum(run.stable for run in runs)
    said = (
        f"right {right / of:.3f} ({low:.3f} to {high:.3f}), engine busy {use:.0%} of the time, "
        f"stable in {stable} of {len(runs)}"
    )
    return said + _ends(runs)


def _expected_lead(theirs: Sequence[Served], ours: Sequence[Served]) -> str:
    """By how many points one side is right more often than the other, with its standard error."""
    leads = [100 * (fmean(b.chances) - fmean(a.chances)) for a, b in zip(theirs, ours, strict=True)]
    error = stdev(leads) / math.sqrt(len(leads)) if len(leads) > 1 else math.nan
    return f"expected accuracy {fmean(leads):+.2f} points (standard error {error:.2f})"


def _ends(runs: Sequence[Served]) -> str:
    """How branches ended, where it is known of each."""
    ends: Counter[Fate] = Counter()
    for run in runs:
        ends.update(run.ends)
    all_of_them = ends.total()
    return "".join(
        f", {count / all_of_them:.0%} {fate.value}" for fate, count in ends.most_common()
    )
