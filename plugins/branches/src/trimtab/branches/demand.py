"""What a plan of branches is for: the objective, the load, and questions like the recorded ones."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean

import numpy as np
from scipy.stats import beta

from trimtab.branches.drawn import RIGHT, Kind, Question
from trimtab.branches.lengths import LengthTrace
from trimtab.branches.order_statistics import Floats, LengthDistribution
from trimtab.branches.simulated_serving import H100_LIKE
from trimtab.core.cost.step import EngineProfile
from trimtab.core.errors import BadInput

_POINTS = 512
_NODES = 32
_QUESTIONS = 150
_AUROC_RANGE = (0.01, 0.99)


@dataclass(frozen=True, slots=True)
class Slo:
    """What must hold of the service; None where nothing is asked.

    Attributes:
        accuracy: the least share of right answers.
        latency_s: the longest mean latency.
        p97_s: the longest latency of 97 in 100 requests.
    """

    accuracy: float | None = None
    latency_s: float | None = None
    p97_s: float | None = None

    @property
    def text(self) -> str:
        """The objective as users write it."""
        parts = (("accuracy>=", self.accuracy, ""), ("latency<=", self.latency_s, "s"))
        return ", ".join(
            f"{name}{value:g}{unit}"
            for name, value, unit in (*parts, ("p97<=", self.p97_s, "s"))
            if value is not None
        )

    @classmethod
    def parse(cls, text: str) -> Slo:
        """The objective of a text such as ``accuracy>=0.8, latency<=30s, p97<=90s``.

        Raises:
            BadInput: a part is no such condition, or stands twice.
        """
        found: dict[str, float] = {}
        for part in text.split(","):
            name, value = _condition(part)
            if name in found:
                raise BadInput(f"{part.strip()!r} is the second of its kind", where="--slo")
            found[name] = value
        return cls(**found)


def _condition(part: str) -> tuple[str, float]:
    match = re.fullmatch(r"\s*(accuracy\s*>=|latency\s*<=|p97\s*<=)\s*(\d*\.?\d+)\s*(s?)\s*", part)
    if match is None or (match[1].startswith("accuracy") and match[3]):
        raise BadInput(
            f"{part.strip()!r} is no condition",
            where="--slo",
            fix="give some of accuracy>=0.8, latency<=30s and p97<=90s, with commas between",
        )
    name, value = match[1].rstrip("<=> "), float(match[2])
    if name == "accuracy" and not 0 < value < 1:
        raise BadInput(f"the accuracy is {value:g}", where="--slo", fix="give one between 0 and 1")
    if value <= 0:
        raise BadInput(f"{part.strip()!r} is out of reach", where="--slo", fix="give more than 0")
    return {"accuracy": "accuracy", "latency": "latency_s", "p97": "p97_s"}[name], value


@dataclass(frozen=True)
class Demand:
    """What is to be served, on which engine.

    Attributes:
        trace: recorded branches.
        rate_per_s: requests a second that one engine gets.
        profile: the engine.
        prompt_tokens: the length of a prompt.
        accuracy: the share of right branches; by default the trace's own, question by question.
        auroc: how well final scores tell right branches from wrong ones; by default the trace's.

    Raises:
        BadInput: a number is out of range, or neither given nor in the trace.
    """

    trace: LengthTrace
    rate_per_s: float
    profile: EngineProfile = H100_LIKE
    prompt_tokens: int = 200
    accuracy: float | None = None
    auroc: float | None = None

    def __post_init__(self) -> None:
        for name, value in (("rate", self.rate_per_s), ("prompt", self.prompt_tokens)):
            if not (math.isfinite(value) and value > 0):
                raise BadInput(f"--{name} is {value:g}", fix="give a number above 0")
        for name, share in (("accuracy", self.accuracy), ("auroc", self.auroc)):
            if share is not None and not 0 < share < 1:
                raise BadInput(f"--{name} is {share:g}", fix="give a number between 0 and 1")
        if self.accuracy is None and not any(p is not None for p in self.trace.accuracies):
            raise BadInput(
                "no branch says whether it was correct",
                where=self.trace.name,
                fix='add "correct" to its lines, or give --accuracy',
            )
        if self.auroc is None and self.trace.auroc is None:
            raise BadInput(
                "no question has both right and wrong branches with scores",
                where=self.trace.name,
                fix='add "correct" and "score" to its lines, or give --auroc',
            )

    @cached_property
    def within(self) -> LengthDistribution:
        """Lengths of one question's branches as multiples of its scale, on few points."""
        lengths = self.trace.within_question
        if len(lengths.tokens) <= _POINTS:
            return lengths
        places = np.searchsorted(lengths.cumulative, (np.arange(_POINTS) + 0.5) / _POINTS)
        kept = lengths.tokens[np.minimum(places, len(lengths.tokens) - 1)]
        return LengthDistribution.of_samples(kept)

    @cached_property
    def scales(self) -> Floats:
        """The scales of the questions."""
        return np.array(self.trace.scales)

    @cached_property
    def selection(self) -> float:
        """The AUROC that is planned with."""
        found = self.trace.auroc if self.auroc is None else self.auroc
        assert found is not None
        return float(np.clip(found, *_AUROC_RANGE))

    @cached_property
    def chances(self) -> tuple[float, ...]:
        """Equally likely chances of a question's branches to be right: a beta distribution.

        A share of few branches is noisy, so the spread over questions is that of a beta-binomial
        with the trace's moments.
        """
        groups = [
            [b.correct for b in group if b.correct is not None] for group in self.trace.questions
        ]
        groups = [group for group in groups if group]
        shares = np.array([fmean(group) for group in groups]) if groups else np.array([0.5])
        mean = float(np.clip(self.accuracy or shares.mean(), 0.01, 0.99))
        size = fmean(len(group) for group in groups) if groups else 1.0
        limit = mean * (1 - mean)
        # Var(share) = limit ((1 - r) / size + r), with r = 1 / (a + b + 1).
        together = (shares.var() / limit * size - 1) / (size - 1) if size > 1 else 1 / 3
        together = float(np.clip(together, 0.02, 0.95))
        total = 1 / together - 1
        nodes = (np.arange(_NODES) + 0.5) / _NODES
        return tuple(beta.ppf(nodes, mean * total, (1 - mean) * total).tolist())

    def crowd(
        self, branches: int, score_every: int, seed: int, count: int = _QUESTIONS
    ) -> list[Question]:
        """Questions like the recorded ones, with branches drawn from the estimated lengths."""
        rng = np.random.default_rng(seed)
        arrivals = np.cumsum(rng.exponential(1 / self.rate_per_s, count))
        scales = rng.choice(self.scales, count)
        draws = np.searchsorted(self.within.cumulative, rng.random((count, branches)))
        lengths = np.maximum(2, np.round(scales[:, None] * self.within.tokens[draws])).astype(int)
        right = rng.random((count, branches)) < rng.choice(self.chances, count)[:, None]
        rewards = Kind(
            accuracy=float(np.mean(self.chances)), auroc=self.selection, score_every=score_every
        )
        return [
            Question(
                float(arrivals[q]),
                self.prompt_tokens,
                tuple(lengths[q].tolist()),
                tuple(RIGHT if good else 1 for good in right[q]),
                tuple(
                    rewards.rewards(int(length), bool(good), rng)
                    for length, good in zip(lengths[q], right[q], strict=True)
                ),
            )
            for q in range(count)
        ]
