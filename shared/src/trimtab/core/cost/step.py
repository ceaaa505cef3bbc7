"""What one step of a serving engine costs, fitted to measured steps, and its profile file."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from statistics import median
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveInt, model_validator

from trimtab.core.documents import InvalidValue, read_json, write_atomic
from trimtab.core.errors import BadInput

_FROZEN = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


@dataclass(frozen=True, slots=True)
class StepBatch:
    """What one engine step works on.

    Attributes:
        decodes: sequences that get one token each from a finished prefill.
        kv_tokens: context tokens that those sequences read, their own new token included.
        prefills: sequences whose prompt, or a chunk of it, is computed.
        prefill_tokens: prompt tokens computed.
        prefill_pairs: query-key pairs of their attention: the sum over chunks of
            ``tokens * (context before + tokens / 2)``.
    """

    decodes: int = 0
    kv_tokens: int = 0
    prefills: int = 0
    prefill_tokens: int = 0
    prefill_pairs: float = 0.0


@dataclass(frozen=True, slots=True)
class MeasuredStep:
    """A step and how long it took."""

    batch: StepBatch
    seconds: float


class StepCost(BaseModel):
    """Seconds of one engine step, linear in what the step works on.

    ``base_s + decode_s * decodes + kv_token_s * kv_tokens + prefill_s * prefills
    + prefill_token_s * prefill_tokens + prefill_pair_s * prefill_pairs``
    """

    model_config = _FROZEN

    base_s: NonNegativeFloat
    decode_s: NonNegativeFloat = 0.0
    kv_token_s: NonNegativeFloat = 0.0
    prefill_s: NonNegativeFloat = 0.0
    prefill_token_s: NonNegativeFloat = 0.0
    prefill_pair_s: NonNegativeFloat = 0.0

    @model_validator(mode="after")
    def _takes_time(self) -> StepCost:
        if self.base_s + self.decode_s <= 0 or self.base_s + self.prefill_token_s <= 0:
            raise InvalidValue("a step would take no time", at=("base_s",), fix="give it seconds")
        return self

    def seconds(self, batch: StepBatch) -> float:
        """How long a step with this batch takes."""
        return (
            self.base_s
            + self.decode_s * batch.decodes
            + self.kv_token_s * batch.kv_tokens
            + self.prefill_s * batch.prefills
            + self.prefill_token_s * batch.prefill_tokens
            + self.prefill_pair_s * batch.prefill_pairs
        )

    def scaled(self, factor: float) -> StepCost:
        """The cost on an engine that takes ``factor`` times as long for everything."""
        return StepCost(**{name: value * factor for name, value in self.model_dump().items()})


class EngineLimits(BaseModel):
    """The limits that vLLM's scheduler works within, under vLLM's names where it has one."""

    model_config = _FROZEN

    max_num_seqs: PositiveInt
    max_num_batched_tokens: PositiveInt
    max_model_len: PositiveInt
    block_size: PositiveInt = 16
    kv_blocks: PositiveInt
    prefix_caching: bool = True

    @model_validator(mode="after")
    def _consistent(self) -> EngineLimits:
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise InvalidValue(
                f"max_num_batched_tokens is {self.max_num_batched_tokens}",
                at=("max_num_batched_tokens",),
                fix=f"every running sequence needs one: give at least {self.max_num_seqs}",
            )
        return self


class FitResiduals(BaseModel):
    """How well a step cost describes the steps it was fitted to, as shares of the measured time."""

    model_config = _FROZEN

    steps: int
    median_error: NonNegativeFloat
    p90_error: NonNegativeFloat


class EngineProfile(BaseModel):
    """A serving engine as the simulator sees it; the content of a profile file.

    Attributes:
        model: the model that was served.
        device: what it ran on.
        engine: the engine and its version.
        limits: the scheduler's limits.
        step: what a step costs.
        request_overhead_s: seconds a request spends outside the engine's steps before it is queued
            (HTTP, tokenising); it delays the request, not the engine.
        residuals: how well ``step`` fits; None for a cost that was not measured.
    """

    model_config = _FROZEN

    kind: Literal["trimtab-engine-profile"] = "trimtab-engine-profile"
    version: Literal[1] = 1
    model: str = Field(min_length=1)
    device: str = Field(min_length=1)
    engine: str = Field(min_length=1)
    limits: EngineLimits
    step: StepCost
    request_overhead_s: NonNegativeFloat = 0.0
    residuals: FitResiduals | None = None

    @classmethod
    def read(cls, path: str | Path) -> EngineProfile:
        """Reads a profile file.

        Raises:
            BadInput: the file cannot be read or is no profile.
        """
        return read_json(path, cls)

    def write(self, path: str | Path) -> None:
        """Writes the profile file, whole or not at all."""
        write_atomic(path, self.model_dump_json(indent=2) + "\n")


_SHORTEST_STEP_S = 1e-9
_HUBER_WIDTH = 0.1
"""Relative errors above this count linearly, not squared: a stalled step does not bend the fit."""


def fit_step_cost(steps: Iterable[MeasuredStep]) -> tuple[StepCost, FitResiduals]:
    """Fits a step cost by robust non-negative least squares on relative errors.

    Steps with the same batch are first reduced to their median; the rest is iteratively re-weighted
    least squares with Huber's weights.

    Raises:
        BadInput: fewer than three different batches, batches too much alike, or a step that took
            no time.
    """
    from scipy.optimize import nnls

    points = _medians(steps)
    seconds = np.array([point.seconds for point in points])
    features = np.array([(1.0, *astuple(point.batch)) for point in points])
    relative = features / seconds[:, None]
    scale = np.maximum(np.abs(relative).max(axis=0), 1e-300)
    weights = np.ones(len(points))
    for _ in range(30):
        root = np.sqrt(weights)
        coefficients = nnls((relative / scale) * root[:, None], root)[0] / scale
        errors = np.abs(relative @ coefficients - 1.0)
        weights = _HUBER_WIDTH / np.maximum(errors, _HUBER_WIDTH)
    found = dict(zip(StepCost.model_fields, map(float, coefficients), strict=True))
    least_s = found["base_s"] + min(found["decode_s"], found["prefill_token_s"])
    if least_s < _SHORTEST_STEP_S:
        raise BadInput(
            "the measured steps are too alike to tell what each part of a step costs",
            fix="measure batches of one sequence and of many, and prompts of different lengths",
        )
    return StepCost(**found), _residuals(errors)


def _medians(steps: Iterable[MeasuredStep]) -> Sequence[MeasuredStep]:
    times: defaultdict[StepBatch, list[float]] = defaultdict(list)
    for step in steps:
        if not step.seconds > 0:
            raise BadInput(f"a measured step took {step.seconds} s", fix="measure again")
        times[step.batch].append(step.seconds)
    if len(times) < 3:
        raise BadInput(f"only {len(times)} different steps were measured", fix="measure at least 3")
    return [MeasuredStep(batch, median(seconds)) for batch, seconds in times.items()]


def _residuals(errors: NDArray[np.float64]) -> FitResiduals:
    return FitResiduals(
        steps=len(errors),
        median_error=float(np.median(errors)),
        p90_error=float(np.quantile(errors, 0.9)),
    )
