"""``trimtab bench cost``: the roofline against measured vLLM servers it was not fitted to."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from trimtab.core.benchmark import Benchmark, Case, Options, Progress
from trimtab.core.cost.batching import SteadyState, steady_state
from trimtab.core.cost.calibration import Calibration, calibrate
from trimtab.core.cost.measured_servers import MeasuredServer, measured_servers
from trimtab.core.cost.roofline import DEFAULTS, RAW, Roofline, RooflineConstants

RESAMPLES = 20
"""Draws of the rows with replacement, whose extremes are a ratio's low and high."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """A measured server beside what was predicted for it."""

    server: MeasuredServer
    calibrated: SteadyState
    default: SteadyState
    raw: SteadyState

    @property
    def measured_tpot_s(self) -> float:
        """The measured TPOT."""
        return self.server.measurement.tpot_s

    @property
    def measured_rate(self) -> float:
        """Requests per second and device that the measured latencies amount to."""
        m = self.server.measurement
        request_s = m.ttft_s + (m.shape.output_tokens - 1) * m.tpot_s
        return m.concurrency / request_s / m.replica.devices

    def rate(self, state: SteadyState) -> float:
        """Predicted requests per second and device."""
        return state.requests_per_s / self.server.measurement.replica.devices


Group = Sequence[Prediction]
Estimate = Callable[[Prediction], SteadyState]
Score = Callable[[Group, Estimate], float]


def predict(
    servers: Sequence[MeasuredServer],
) -> tuple[list[Prediction], Mapping[tuple[str, str], Calibration]]:
    """Predicts every server with constants fitted to the same device's other models.

    Returns:
        The predictions, and the calibration used for each device and model.
    """
    predictions: list[Prediction] = []
    used: dict[tuple[str, str], Calibration] = {}
    for device, model in sorted({(s.device, s.model) for s in servers}):
        of_device = [s for s in servers if s.device == device]
        used[device, model] = calibrate([s.measurement for s in of_device if s.model != model])
        constants = used[device, model].constants
        predictions += [_predict(s, constants) for s in of_device if s.model == model]
    return predictions, used


def _predict(server: MeasuredServer, constants: RooflineConstants) -> Prediction:
    m = server.measurement
    states = [
        steady_state(Roofline(m.replica, c), m.shape, m.concurrency)
        for c in (constants, DEFAULTS, RAW)
    ]
    return Prediction(server, *states)


def tpot_error(group: Group, estimate: Estimate) -> float:
    """Mean absolute relative error of the TPOT."""
    errors = [abs(estimate(p).tpot_s / p.measured_tpot_s - 1) for p in group]
    return float(np.mean(errors))


def tpot_bias(group: Group, estimate: Estimate) -> float:
    """Mean signed relative error of the TPOT; negative is too optimistic."""
    return float(np.mean([estimate(p).tpot_s / p.measured_tpot_s - 1 for p in group]))


def tpot_rank_correlation(group: Group, estimate: Estimate) -> float:
    """Spearman's correlation of predicted and measured TPOT."""
    return _spearman([estimate(p).tpot_s for p in group], [p.measured_tpot_s for p in group])


def rate_rank_correlation(group: Group, estimate: Estimate) -> float:
    """Spearman's correlation of predicted and measured requests per second and device."""
    return _spearman([p.rate(estimate(p)) for p in group], [p.measured_rate for p in group])


def _spearman(a: Sequence[float], b: Sequence[float]) -> float:
    from scipy.stats import spearmanr

    return float(spearmanr(a, b).statistic)


def run(options: Options, progress: Progress) -> list[Case]:
    """Errors and rank correlations by device and model and overall."""
    rows = measured_servers()
    progress(f"{len(rows.servers)} measured servers", 0.1)
    for reason, count in rows.left_out.items():
        progress(f"left out {count}: {reason}")
    predictions, used = predict(rows.servers)
    progress("comparing", 0.8)
    groups: dict[tuple[str, str], list[Prediction]] = defaultdict(list)
    for p in predictions:
        groups[p.server.device, p.server.model].append(p)
    compare = _Comparison(np.random.default_rng(options.seed))
    cases = []
    for (device, model), group in groups.items():
        cases += compare.errors(f"model/{device}/{model}/tpot", group, _note(group, used))
    for device in sorted({device for device, _ in groups}):
        group = [p for p in predictions if p.server.device == device]
        cases += compare.everything(f"model/{device}/all", group)
    return cases + compare.everything("model/all", predictions)


def _note(group: Group, used: Mapping[tuple[str, str], Calibration]) -> str:
    fit = used[group[0].server.device, group[0].server.model]
    return (
        f"{len(group)} servers, bias {tpot_bias(group, _calibrated):+.1%}; fitted to the device's"
        f" other models: efficiency x{fit.efficiency:.2f}, step {fit.step_ms:.2f} ms"
    )


def _calibrated(prediction: Prediction) -> SteadyState:
    return prediction.calibrated


_BASELINES: Mapping[str, Estimate] = {
    "raw-roofline": lambda p: p.raw,
    "untuned-defaults": lambda p: p.default,
}


@dataclass(frozen=True, slots=True)
class _Comparison:
    """Ours beside each baseline, with the spread over resampled rows."""

    random: np.random.Generator

    def everything(self, name: str, group: Group) -> list[Case]:
        """Errors and both rank correlations."""
        note = f"{len(group)} servers, bias {tpot_bias(group, _calibrated):+.1%}"
        return [
            *self.errors(f"{name}/tpot", group, note),
            *self._cases(f"{name}/tpot", "tpot_rank_correlation", "higher", group,
                         tpot_rank_correlation),
            *self._cases(f"{name}/rate", "rate_rank_correlation", "higher", group,
                         rate_rank_correlation),
        ]  # fmt: skip

    def errors(self, name: str, group: Group, notes: str) -> list[Case]:
        """Mean error of the TPOT."""
        return self._cases(name, "tpot_mape", "lower", group, tpot_error, notes)

    def _cases(
        self,
        name: str,
        metric: str,
        better: Literal["lower", "higher"],
        group: Group,
        score: Score,
        notes: str | None = None,
    ) -> list[Case]:
        draws = [self.random.integers(len(group), size=len(group)) for _ in range(RESAMPLES)]
        samples = [[group[int(i)] for i in draw] for draw in draws]
        cases = []
        for baseline, estimate in _BASELINES.items():
            pair = score(group, estimate), score(group, _calibrated)
            spread = Case.compare(
                name, metric, "1", better, baseline,
                [(score(s, estimate), score(s, _calibrated)) for s in samples],
            )  # fmt: skip
            exact = Case.compare(name, metric, "1", better, baseline, [pair], notes=notes)
            bounds = {
                "ratio_low": min(spread.ratio_low, exact.ratio),
                "ratio_high": max(spread.ratio_high, exact.ratio),
            }
            cases.append(exact.model_copy(update=bounds))
        return cases


BENCHMARK = Benchmark(
    name="cost",
    summary="The GPU cost model against measured vLLM servers of models it was not fitted to",
    run=run,
)
