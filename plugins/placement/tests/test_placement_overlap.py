"""What compute leaves exposed, against walks over passes and sends, and against the paper."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.placement.job import TrainingJob
from trimtab.placement.overlap import COLLECTIVE_LOSS, SEND_LOSS, exposures
from trimtab.placement.volumes import Volumes, micro_batch_flop

DENSE_24B = {"layers": 48, "hidden": 6144, "vocab": 50257}
MIXTURE = {
    "layers": 24,
    "hidden": 4096,
    "vocab": 50257,
    "layer_parameters": 1e9,
    "expert_parameters": 0.93e9,
}


def job(**values: Any) -> TrainingJob:
    return TrainingJob.model_validate(
        {"tensor_parallel": 8, "pipeline_parallel": 8, "data_parallel": 8} | values
    )


def compute_s(training: TrainingJob) -> float:
    assert training.shape is not None
    return micro_batch_flop(training.shape, training.training_step) / training.flop_per_s


def naive_data_s(training: TrainingJob, time_s: float) -> float:
    """Pass after pass of a step: each hides what is sent during it."""
    step, left = training.training_step, time_s
    for micro_batch in range(step.micro_batches):
        last, first = micro_batch == step.micro_batches - 1, micro_batch == 0
        gathers = step.zero_stage == 3 or (step.zero_stage in (1, 2) and first)
        reduces = step.zero_stage >= 2 or last
        for hides, part in ((gathers, 1 / 3), (reduces, 2 / 3)):
            left -= min(left, part * compute_s(training)) if hides else 0.0
    return left


def naive_pipeline_s(training: TrainingJob, time_s: float) -> float:
    """Send after send, there and back: a stage waits, or goes on with another micro-batch."""
    step = training.training_step
    turns = step.micro_batches * step.virtual_stages
    filling = step.pipeline_parallel * step.virtual_stages - 1
    exposed = 0.0
    for turn in range(turns):
        waits = step.virtual_stages == 1 or turn < filling
        hidden = 0.0 if waits else compute_s(training) / step.virtual_stages
        exposed += max(0.0, time_s / turns - hidden)
    return exposed


@given(
    zero_stage=st.integers(0, 3),
    virtual_stages=st.integers(1, 6),
    micro_batches=st.integers(1, 12),
    data=st.floats(0, 1e12),
    pipeline=st.floats(0, 1e12),
)
def test_exposed_time_is_that_of_a_walk_over_the_step(
    zero_stage: int, virtual_stages: int, micro_batches: int, data: float, pipeline: float
) -> None:
    training = job(
        shape=DENSE_24B,
        zero_stage=zero_stage,
        virtual_stages=virtual_stages,
        global_batch=8 * micro_batches,
        volumes={"data": data, "pipeline": pipeline},
    )
    found = exposures(training)
    assert found is not None
    walks = {"data": (naive_data_s, COLLECTIVE_LOSS), "pipeline": (naive_pipeline_s, SEND_LOSS)}
    for kind, (walk, loss) in walks.items():
        one = found[kind]  # type: ignore[index]
        inside_s, outside_s = walk(training, one.time_s), walk(training, one.time_s / (1 - loss))
        assert one.exposed_s == pytest.approx(inside_s, abs=1e-9)
        assert one.added_s == pytest.approx(outside_s - inside_s, abs=1e-9)
        assert 0 <= one.exposed_s <= one.time_s * (1 + 1e-9)
        assert -1e-9 <= one.added_s <= one.unhidden_s * (1 + 1e-9)


def test_shares_that_were_measured_are_taken() -> None:
    volumes = Volumes(data=100e9, pipeline=50e9)
    found = exposures(job(volumes=volumes, overlap={"data": 0.75}))
    assert found is not None
    assert found["data"].time_s == 2.0
    assert found["data"].exposed_s == 0.5
    assert found["data"].added_s == pytest.approx(0.5 / 0.83 - 0.5)
    assert found["pipeline"].exposed_s == found["pipeline"].time_s == 1.0


def test_gains_are_predicted_in_kind_as_they_were_published() -> None:
    """Dense 24B: 2.3 % for pipelines, nothing for data; mixture: both, pipelines more."""
    for shape, pipeline, data in ((DENSE_24B, (1.5, 3.0), (0, 1)), (MIXTURE, (1, 3), (0.3, 1.5))):
        training = job(shape=shape)
        found = exposures(training)
        assert found is not None
        step_s = (training.training_step.micro_batches + 7) * compute_s(training)
        step_s += sum(one.exposed_s for one in found.values())
        assert pipeline[0] < 100 * found["pipeline"].added_s / step_s < pipeline[1]
        assert data[0] <= 100 * found["data"].added_s / step_s < data[1]


def test_a_job_without_a_model_has_no_exposure() -> None:
    assert exposures(job()) is None
