"""Two scalars of the roofline, fitted to a few measured servers and held near their defaults.

The scalars are a multiplier of both efficiencies (prior 1 ± 0.15) and the fixed milliseconds of a
step (prior 2 ± 1). Fitting all six constants to so few points makes predictions worse than no fit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trimtab.core.cost.batching import Shape, steady_state
from trimtab.core.cost.roofline import (
    DEFAULTS,
    Replica,
    Roofline,
    RooflineConstants,
    compute_rate,
)
from trimtab.core.cost.step import StepBatch
from trimtab.core.errors import BadInput

MAX_MFU = 0.6
"""A server that claims more of its peak than this was measured otherwise than it says."""
MAX_TTFT_S = 3.0
"""A longer mean TTFT means that requests waited for room in the cache: the batch is unknown."""
ERROR = 0.1
"""Relative error that the model is granted on a measured TPOT."""
ROWS_EACH = 6.0
"""The weight, in rows, of each model's measurements together."""


@dataclass(frozen=True, slots=True)
class Prior:
    """Mean and standard deviation of the two scalars before any measurement."""

    efficiency: tuple[float, float] = (1.0, 0.15)
    step_ms: tuple[float, float] = (2.0, 1.0)


@dataclass(frozen=True, slots=True)
class Measurement:
    """A server measured with a constant number of requests.

    Attributes:
        replica: what was measured.
        shape: mean lengths of the requests.
        concurrency: requests at any time.
        tpot_s: mean time between tokens.
        ttft_s: mean time to the first token.
    """

    replica: Replica
    shape: Shape
    concurrency: int
    tpot_s: float
    ttft_s: float


@dataclass(frozen=True, slots=True)
class Calibration:
    """The two scalars, and the constants that they make."""

    efficiency: float
    step_ms: float
    constants: RooflineConstants


def predicted_tpot_s(measurement: Measurement, constants: RooflineConstants) -> float:
    """The TPOT that the roofline expects where one was measured."""
    engine = Roofline(measurement.replica, constants)
    return steady_state(engine, measurement.shape, measurement.concurrency).tpot_s


def implied_mfu(measurement: Measurement) -> float:
    """The share of the replica's peak FLOP/s that the measured rate of requests takes."""
    shape, replica = measurement.shape, measurement.replica
    request_s = measurement.ttft_s + (shape.output_tokens - 1) * measurement.tpot_s
    prompt, context = shape.prompt_tokens, shape.prompt_tokens + shape.output_tokens / 2
    prefill = StepBatch(prefills=1, prefill_tokens=round(prompt), prefill_pairs=prompt * prompt / 2)
    decode = StepBatch(decodes=1, kv_tokens=round(context))
    at_peak_s = _compute_s(replica, prefill) + shape.output_tokens * _compute_s(replica, decode)
    return measurement.concurrency / request_s * at_peak_s / replica.devices


def _compute_s(replica: Replica, batch: StepBatch) -> float:
    """Time of one device at its peak, with nothing but FLOPs."""
    work, device, precision = replica.model_work.work(batch), replica.device, replica.precision
    return (
        work.weight_flops / compute_rate(device, precision.weights)
        + work.expert_flops / compute_rate(device, precision.experts)
        + work.attention_flops / compute_rate(device, "bf16")
    )


def calibrate(
    measurements: Sequence[Measurement],
    prior: Prior = Prior(),
    constants: RooflineConstants = DEFAULTS,
) -> Calibration:
    """The two scalars that explain measured TPOTs best, given the prior.

    Minimises squared relative errors, each model's rows weighing as much as `ROWS_EACH`, plus the
    squared distance from the prior.

    Raises:
        BadInput: a measured TPOT is not positive.
    """
    from scipy.optimize import least_squares

    for measurement in measurements:
        if not measurement.tpot_s > 0:
            raise BadInput(f"a measured TPOT is {measurement.tpot_s} s", fix="measure again")
    rows = Counter(m.replica.model.name for m in measurements)
    weights = np.array([(ROWS_EACH / rows[m.replica.model.name]) ** 0.5 for m in measurements])
    log_measured = np.log([m.tpot_s for m in measurements])

    def residuals(scalars: np.ndarray[tuple[int], np.dtype[np.float64]]) -> object:
        tuned = constants.calibrated(scalars[0], scalars[1] / 1e3)
        log_predicted = np.log([predicted_tpot_s(m, tuned) for m in measurements])
        from_prior = [
            (value - mean) / deviation
            for value, (mean, deviation) in zip(
                scalars, (prior.efficiency, prior.step_ms), strict=True
            )
        ]
        return np.concatenate([weights * (log_predicted - log_measured) / ERROR, from_prior])

    start = (prior.efficiency[0], prior.step_ms[0])
    fitted = least_squares(
        residuals, start, bounds=((0.2, 0.0), (1.3, 50.0)), diff_step=1e-3, xtol=1e-6
    ).x
    efficiency, step_ms = float(fitted[0]), float(fitted[1])
    return Calibration(efficiency, step_ms, constants.calibrated(efficiency, step_ms / 1e3))
