"""The fit of step costs, and the profile file."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.core.cost.step import (
    EngineLimits,
    EngineProfile,
    MeasuredStep,
    StepBatch,
    StepCost,
    fit_step_cost,
)
from trimtab.core.errors import BadInput

coefficient = st.floats(1e-6, 1e-2)
COST = StepCost(base_s=0.03, decode_s=1e-3, kv_token_s=2e-6, prefill_s=5e-3, prefill_token_s=1e-3)


def batches(seed: int = 0) -> list[StepBatch]:
    rng = random.Random(seed)
    decodes = [StepBatch(n, n * rng.randrange(10, 2000)) for n in range(1, 17)]
    prefills = []
    for _ in range(30):
        tokens, before = rng.randrange(1, 512), rng.randrange(0, 1500)
        n = rng.randrange(0, 8)
        prefills.append(
            StepBatch(n, n * 300, rng.randrange(1, 4), tokens, tokens * (before + tokens / 2))
        )
    return decodes + prefills


@given(st.tuples(*[coefficient] * 6))
def test_exact_measurements_give_the_cost_back(coefficients: tuple[float, ...]) -> None:
    cost = StepCost(**dict(zip(StepCost.model_fields, coefficients, strict=True)))
    fitted, residuals = fit_step_cost(MeasuredStep(b, cost.seconds(b)) for b in batches())
    for batch in batches(1):
        assert fitted.seconds(batch) == pytest.approx(cost.seconds(batch), rel=1e-4)
    assert residuals.p90_error < 1e-6


def test_stalled_steps_do_not_bend_the_fit() -> None:
    rng = random.Random(3)
    steps = [MeasuredStep(b, COST.seconds(b) * rng.uniform(0.98, 1.02)) for b in batches()]
    stalled = [
        MeasuredStep(s.batch, s.seconds * 8) if n % 8 == 0 else s for n, s in enumerate(steps)
    ]
    fitted, residuals = fit_step_cost(stalled)
    for batch in batches(1):
        assert fitted.seconds(batch) == pytest.approx(COST.seconds(batch), rel=0.12)
    assert residuals.median_error < 0.05


def test_no_coefficient_is_negative() -> None:
    steps = [MeasuredStep(b, 0.05 - 1e-6 * b.kv_tokens) for b in batches() if b.kv_tokens < 9000]
    fitted, _ = fit_step_cost(steps)
    assert min(fitted.model_dump().values()) >= 0


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan")])
def test_a_step_that_took_no_time_is_refused(seconds: float) -> None:
    with pytest.raises(BadInput, match="measured step"):
        fit_step_cost([MeasuredStep(StepBatch(1, 1), seconds)])


def test_too_few_steps_are_refused() -> None:
    with pytest.raises(BadInput, match="only 1 different"):
        fit_step_cost([MeasuredStep(StepBatch(1, 1), 1.0)] * 9)


def test_steps_that_are_all_alike_are_refused() -> None:
    alike = [StepBatch(prefills=n, prefill_tokens=100 * n) for n in range(1, 6)]
    with pytest.raises(BadInput, match="too alike"):
        fit_step_cost([MeasuredStep(batch, float(batch.prefills)) for batch in alike])


LIMITS = {
    "max_num_seqs": 16,
    "max_num_batched_tokens": 512,
    "max_model_len": 2048,
    "kv_blocks": 100,
}


def test_a_profile_survives_its_file(tmp_path: Path) -> None:
    profile = EngineProfile(
        model="m", device="d", engine="vllm 0", limits=EngineLimits(**LIMITS), step=COST
    )
    profile.write(tmp_path / "profile.json")
    assert EngineProfile.read(tmp_path / "profile.json") == profile


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ('"base_s": 0.03', '"base_s": -1', r"step.base_s is -1"),
        ('"base_s": 0.03', '"bass_s": 0.03', r"unknown key .*'base_s'"),
        ('"max_num_batched_tokens": 512', '"max_num_batched_tokens": 8', r"at least 16"),
        ('"kv_blocks": 100', '"kv_blocks": 0', r"kv_blocks is 0"),
    ],
)
def test_a_broken_profile_is_refused_with_its_line(
    tmp_path: Path, old: str, new: str, fault: str
) -> None:
    path = tmp_path / "profile.json"
    EngineProfile(
        model="m", device="d", engine="vllm 0", limits=EngineLimits(**LIMITS), step=COST
    ).write(path)
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(BadInput, match=fault) as caught:
        EngineProfile.read(path)
    assert str(path) in str(caught.value)
