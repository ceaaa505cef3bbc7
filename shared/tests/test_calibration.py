"""The two-scalar fit on made-up servers, and its check on the measured ones."""

from __future__ import annotations

import importlib.util
import math
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.core.benchmark import Options
from trimtab.core.cost import (
    DEFAULTS,
    Measurement,
    Precision,
    Replica,
    RooflineConstants,
    Shape,
    calibrate,
)
from trimtab.core.cost.calibration import Prior, implied_mfu, predicted_tpot_s
from trimtab.core.devices import device
from trimtab.core.errors import BadInput
from trimtab.core.model import ModelSpec

MODEL = ModelSpec(
    name="dense",
    layers=32,
    hidden=4096,
    heads=32,
    kv_heads=8,
    head_dim=128,
    intermediate=14336,
    vocab=128256,
)


def measured(efficiency: float, step_ms: float, concurrency: int, tensor: int) -> Measurement:
    truth = DEFAULTS.calibrated(efficiency, step_ms / 1e3)
    server = Measurement(
        Replica(MODEL, device("H100"), tensor, precision=Precision.of("bf16")),
        Shape(1024, 1024),
        concurrency,
        tpot_s=1.0,
        ttft_s=0.2,
    )
    return replace(server, tpot_s=predicted_tpot_s(server, truth))


@settings(max_examples=6, deadline=None)
@given(efficiency=st.floats(0.75, 1.1), step_ms=st.floats(1.0, 4.0))
def test_fit_lies_between_prior_and_truth(efficiency: float, step_ms: float) -> None:
    servers = [measured(efficiency, step_ms, c, t) for c, t in ((4, 1), (4, 4), (128, 1))]

    def data_error(constants: RooflineConstants) -> float:
        return sum(math.log(predicted_tpot_s(m, constants) / m.tpot_s) ** 2 for m in servers)

    def prior_error(efficiency: float, step_ms: float) -> float:
        return ((efficiency - 1) / 0.15) ** 2 + (step_ms - 2) ** 2

    fit = calibrate(servers)
    # The optimum of their sum is no worse than either on the other's ground.
    assert data_error(fit.constants) <= data_error(DEFAULTS) + 1e-6
    assert prior_error(fit.efficiency, fit.step_ms) <= prior_error(efficiency, step_ms) + 1e-3
    free = calibrate(servers, Prior(efficiency=(1.0, 100.0), step_ms=(2.0, 1000.0)))
    assert free.efficiency == pytest.approx(efficiency, rel=1e-2)
    assert free.step_ms == pytest.approx(step_ms, rel=3e-2)


def test_without_measurements_the_prior_stays() -> None:
    fit = calibrate([])
    assert (fit.efficiency, fit.step_ms) == (pytest.approx(1), pytest.approx(2))
    assert fit.constants == DEFAULTS


def test_one_wild_row_cannot_leave_the_prior_far_behind() -> None:
    wild = replace(measured(1.0, 2.0, 32, 1), tpot_s=10.0)
    assert calibrate([wild]).efficiency >= 0.2
    with pytest.raises(BadInput, match="TPOT is 0"):
        calibrate([replace(wild, tpot_s=0.0)])


def test_implied_mfu_is_the_share_of_the_peak() -> None:
    """By hand: 32 requests, each 2 x 8.03e9 x 2048 FLOPs and their attention, in 10.43 s."""
    server = replace(measured(1.0, 2.0, 32, 1), tpot_s=0.01, ttft_s=0.2)
    attention = 4 * 32 * 4096 * (1024**2 / 2 + 1024 * 1536)
    flops = 32 * (2 * 7.5e9 * 2048 + attention) / 10.43
    assert implied_mfu(server) == pytest.approx(flops / 989e12, rel=0.05)


needs_rows = pytest.mark.skipif(
    importlib.util.find_spec("aiconfigurator_core") is None,
    reason="aiconfigurator-core, which ships the measured rows, is not installed",
)


@needs_rows
def test_no_row_is_fitted_and_tested(monkeypatch: pytest.MonkeyPatch) -> None:
    from trimtab.core.cost import bench
    from trimtab.core.cost.measured_servers import measured_servers

    servers = measured_servers().servers
    seen = []

    def spy(measurements: list[Measurement]) -> object:
        seen.append({m.replica.model.name for m in measurements})
        return calibrate(measurements[:2])

    monkeypatch.setattr(bench, "calibrate", spy)
    predictions, used = bench.predict(servers)
    assert len(predictions) == len(servers)
    assert len(seen) == len(used) == 8
    for (_, model), fitted in zip(used, seen, strict=True):
        assert model not in fitted


@needs_rows
def test_measured_rows_are_clean() -> None:
    from trimtab.core.cost.measured_servers import measured_servers

    rows = measured_servers()
    assert len(rows.servers) > 300
    assert all(s.measurement.ttft_s <= 3 for s in rows.servers)
    assert all(implied_mfu(s.measurement) <= 0.6 for s in rows.servers)
    keys = [
        (s.model, s.device, s.version, s.expert_parallel, m.replica.tensor_parallel, m.shape,
         m.concurrency)
        for s in rows.servers
        for m in [s.measurement]
    ]  # fmt: skip
    assert len(keys) == len(set(keys))


@needs_rows
def test_cost_model_holds_its_promise_on_models_it_was_not_fitted_to() -> None:
    from trimtab.core.cost.bench import BENCHMARK

    cases = BENCHMARK.run(Options(quick=True), lambda message, done=None: None)
    raw = {(c.case, c.metric): c for c in cases if c.baseline == "raw-roofline"}
    assert raw["model/all/tpot", "tpot_mape"].value <= 0.10
    assert raw["model/all/tpot", "tpot_rank_correlation"].value >= 0.98
    assert raw["model/all/rate", "rate_rank_correlation"].value >= 0.98
    assert all(c.ratio > 1 for c in raw.values())
    assert {c.case for c in cases} >= {
        f"model/{d}/{m}/tpot"
        for d in ("H100-SXM", "H200")
        for m in ("Llama-3.1-70B", "gpt-oss-120b", "MiniMax-M2.5")
    }


def test_missing_package_is_said_in_one_sentence() -> None:
    script = (
        "import sys; sys.modules['aiconfigurator_core'] = None\n"
        "from trimtab.core.cost.measured_servers import measured_servers\n"
        "from trimtab.core.errors import BadInput\n"
        "try: measured_servers()\n"
        "except BadInput as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert "'aiconfigurator-core'" in done.stdout
    assert "pip install aiconfigurator-core" in done.stdout
