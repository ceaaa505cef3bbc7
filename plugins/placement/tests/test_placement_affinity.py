from __future__ import annotations

import pytest

from trimtab.placement.affinity import DEFAULT_ALPHA, PUBLISHED, Measured, alpha_of
from trimtab.placement.job import TrainingJob


def job(**values: object) -> TrainingJob:
    return TrainingJob.model_validate(
        {"tensor_parallel": 8, "pipeline_parallel": 8, "data_parallel": 8} | values
    )


def test_published_jobs_get_their_own_weights() -> None:
    seven = job(shape={"layers": 32, "hidden": 4096, "vocab": 50257})
    dense = job(shape={"layers": 48, "hidden": 6144, "vocab": 50257})
    mixture = {
        "layers": 24,
        "hidden": 4096,
        "vocab": 50257,
        "layer_parameters": 1e9,
        "expert_parameters": 0.93e9,
    }
    assert alpha_of(seven) == 1.0
    assert alpha_of(dense) == 0.0
    assert alpha_of(job(shape=mixture)) == pytest.approx(0.3, abs=0.005)


def test_the_jobs_own_weight_goes_first() -> None:
    assert alpha_of(job(alpha=0.45)) == 0.45
    assert alpha_of(job()) == DEFAULT_ALPHA


def test_sharded_parameters_raise_the_weight() -> None:
    shape = {"layers": 48, "hidden": 6144, "vocab": 50257}
    assert alpha_of(job(shape=shape, zero_stage=3)) > 0.9


def test_losses_count_as_nothing() -> None:
    assert Measured("x", 1, 1, -1.0, 2.0).alpha == 0.0
    assert Measured("x", 1, 1, -1.0, -2.0).alpha == 0.5
    assert all(0 <= measured.alpha <= 1 for measured in PUBLISHED)
