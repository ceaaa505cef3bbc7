"""GenModel's terms from collectives that were timed: non-negative least squares.

Each run is a row of a linear model once the incast threshold is fixed, weighted by the inverse of
its time so that relative errors count. Runs of sums alone tell apart what an AllReduce shows only
together (γ and δ from β). The threshold is the one that best predicts the runs of a number of ranks
that were left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import median
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from trimtab.core.cost.collectives import Collective, GenModel, hierarchical_ps, ring
from trimtab.core.documents import Document, InvalidValue
from trimtab.core.errors import BadInput

Floats = NDArray[np.float64]

CONFIDENCE = 0.95
RESAMPLES = 200
LEAST_RUNS = 8
"""Fewer runs do not tell the constants apart."""

TERMS = (
    "alpha_s",
    "beta_s_per_byte",
    "gamma_s_per_byte",
    "delta_s_per_byte",
    "epsilon_s_per_byte",
    "message_s",
)


class Run(Document):
    """A collective among ranks below one switch, timed several times.

    Attributes:
        algorithm: ``staged``: direct exchange in groups; ``ring``; ``sum``: what one rank adds up,
            without a network.
        groups: sizes of the groups, stage by stage; for a ring all ranks, for a sum its operands.
        payload_bytes: on each rank; of each operand of a sum.
        seconds: of each time, the slowest rank's.
    """

    algorithm: Literal["staged", "ring", "sum"]
    groups: tuple[PositiveInt, ...] = Field(min_length=1)
    payload_bytes: PositiveInt
    seconds: tuple[PositiveFloat, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _one_group(self) -> Run:
        if self.algorithm in ("ring", "sum") and len(self.groups) > 1:
            raise InvalidValue(
                f"a {self.algorithm} has {len(self.groups)} groups", at=("groups",), fix="give one"
            )
        return self

    @property
    def ranks(self) -> int:
        """How many take part."""
        return 1 if self.algorithm == "sum" else int(np.prod(self.groups))

    @property
    def median_s(self) -> float:
        """The time in the middle."""
        return median(self.seconds)

    @property
    def collective(self) -> Collective:
        """What it costs in GenModel's quantities."""
        if self.algorithm == "ring":
            return ring(self.groups[0])
        if self.algorithm == "sum":
            operands = self.groups[0]
            return Collective(0, (), operands - 1.0, (operands + 1.0) * (operands > 1))
        return hierarchical_ps(self.groups)


class Interval(Document):
    """A fitted constant and what it lies between with a confidence of `CONFIDENCE`."""

    value: float
    low: float
    high: float


class ModelFit(Document):
    """The constants of GenModel for the links below one switch.

    Attributes:
        alpha_s, beta_s_per_byte, gamma_s_per_byte, delta_s_per_byte, epsilon_s_per_byte: the five
            terms, with intervals from resampling the runs.
        message_s: likewise what a message costs its sender and its receiver.
        incast_threshold: the largest width that costs nothing extra.
        error: mean relative error on runs whose number of ranks was left out of the fit.
        plain_error: that of the model of latency and bandwidth alone.
        runs: how many were fitted.
    """

    alpha_s: Interval
    beta_s_per_byte: Interval
    gamma_s_per_byte: Interval
    delta_s_per_byte: Interval
    epsilon_s_per_byte: Interval
    message_s: Interval
    incast_threshold: int
    error: float
    plain_error: float
    runs: int

    @property
    def model(self) -> GenModel:
        """The model with the fitted values."""
        return _model([getattr(self, term).value for term in TERMS], self.incast_threshold)


def fit_model(runs: Sequence[Run], *, seed: int = 0) -> ModelFit:
    """Fits all terms and the threshold.

    Args:
        runs: at least `LEAST_RUNS`, of several sizes and numbers of ranks.
        seed: of the resampling.

    Raises:
        BadInput: there are too few runs, or all are of one size or number of ranks.
    """
    _check(runs)
    rows = _Rows(runs)
    threshold = min(rows.thresholds, key=lambda t: (rows.left_out_error(t), -t))
    values = rows.solve(threshold, np.arange(len(runs)))
    drawn = np.random.default_rng(seed).integers(0, len(runs), (RESAMPLES, len(runs)))
    samples = np.array([rows.solve(threshold, indices) for indices in drawn])
    low, high = np.quantile(samples, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], axis=0)
    intervals = {
        term: Interval(value=value, low=min(least, value), high=max(most, value))
        for term, value, least, most in zip(
            TERMS, values.tolist(), low.tolist(), high.tolist(), strict=True
        )
    }
    return ModelFit(
        **intervals,
        incast_threshold=threshold,
        error=rows.left_out_error(threshold),
        plain_error=rows.left_out_error(None),
        runs=len(runs),
    )


def fit_plain_model(runs: Sequence[Run]) -> GenModel:
    """Latency and bandwidth alone, by the same least squares.

    Raises:
        BadInput: as for `fit_model`.
    """
    _check(runs)
    rows = _Rows(runs)
    return _model(rows.solve(None, np.arange(len(runs))), 2)


def prediction_error(model: GenModel, runs: Iterable[Run]) -> float:
    """The mean relative error of a model on the medians of runs."""
    errors = [
        abs(model.seconds(run.collective, run.payload_bytes) / run.median_s - 1) for run in runs
    ]
    return float(np.mean(errors))


def _check(runs: Sequence[Run]) -> None:
    collective = [run for run in runs if run.algorithm != "sum"]
    if len(collective) < LEAST_RUNS:
        raise BadInput(
            f"{len(collective)} collectives do not tell the model's constants apart",
            fix=f"time at least {LEAST_RUNS}",
        )
    for what, kinds in (
        ("size", {run.payload_bytes for run in collective}),
        ("number of ranks", {run.ranks for run in collective}),
    ):
        if len(kinds) < 2:
            raise BadInput(f"all collectives have one {what}", fix="time at least two")


def _model(values: Sequence[float] | Floats, threshold: int) -> GenModel:
    alpha, beta, gamma, delta, epsilon, message = (float(value) for value in values)
    return GenModel(alpha, beta, gamma, delta, epsilon, threshold, message)


class _Rows:
    """The linear model of some runs, each divided by its time."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self._inverse = np.array([1 / run.median_s for run in runs])
        self._collectives = [run.collective for run in runs]
        self._payload = np.array([float(run.payload_bytes) for run in runs])
        self._ranks = np.array([run.ranks for run in runs])
        self._matrices: dict[int, Floats] = {}

    @property
    def thresholds(self) -> range:
        """All that are told apart: from 2 to the widest incast, which is none."""
        widest = max((w for c in self._collectives for _, w in c.traffic), default=2)
        return range(2, max(widest, 2) + 1)

    def solve(self, threshold: int | None, indices: NDArray[np.int64]) -> Floats:
        """The constants by some of the runs; α and β alone without a threshold."""
        from scipy.optimize import nnls

        rows = self._matrix(threshold)[indices]
        scale = np.maximum(np.linalg.norm(rows, axis=0), 1e-300)
        found: Floats = nnls(rows / scale, np.ones(len(rows)))[0] / scale
        return found

    def left_out_error(self, threshold: int | None) -> float:
        """The mean relative error on the runs of each number of ranks, fitted by the others."""
        rows, errors = self._matrix(threshold), []
        for count in np.unique(self._ranks[self._ranks > 1]):
            out = self._ranks == count
            values = self.solve(threshold, np.flatnonzero(~out))
            errors.append(np.abs(rows[out] @ values - 1))
        return float(np.concatenate(errors).mean())

    def _matrix(self, threshold: int | None) -> Floats:
        key = 0 if threshold is None else threshold
        if key not in self._matrices:
            self._matrices[key] = self._rows(threshold)
        return self._matrices[key]

    def _rows(self, threshold: int | None) -> Floats:
        full = threshold is not None
        columns = [
            [float(c.rounds) for c in self._collectives],
            [sum(share for share, _ in c.traffic) for c in self._collectives],
            [c.reduced * full for c in self._collectives],
            [c.accessed * full for c in self._collectives],
            [
                sum(share * max(width - (threshold or width), 0) for share, width in c.traffic)
                for c in self._collectives
            ],
            [float(c.messages * full) for c in self._collectives],
        ]
        matrix: Floats = np.array(columns, dtype=np.float64).T
        matrix[:, 1:-1] *= self._payload[:, None]
        weighted: Floats = matrix * self._inverse[:, None]
        return weighted
