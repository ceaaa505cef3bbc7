from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.placement.affinity import (
    DEFAULT_ALPHA,
    PUBLISHED,
    Measured,
    alpha_of,
    weight_of,
)
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


SHAPE = {"layers": 40, "hidden": 5120, "vocab": 50257}
MIXTURE = SHAPE | {"expert_parameters": 2e8, "experts": 8, "active_experts": 2}


def test_volumes_that_are_given_decide() -> None:
    """Whatever the model is like, and although it is one that was measured."""
    for shape in (None, SHAPE):
        much_data = job(shape=shape, volumes={"data": 1e15, "pipeline": 1.0})
        much_pipeline = job(shape=shape, volumes={"data": 1.0, "pipeline": 1e15})
        assert alpha_of(much_data) > 0.999
        assert alpha_of(much_pipeline) < 0.001
        known = "predicted overlap" if shape else "no overlap, since no model is given"
        assert weight_of(much_data).source == f"volumes and {known}"


def test_equal_volumes_weigh_by_what_leaving_a_pod_costs() -> None:
    """Nothing is known of compute, so all is exposed: 17 % against 70 % of the bandwidth lost."""
    data, pipeline = 1 / (1 - 0.17) - 1, 1 / (1 - 0.70) - 1
    found = alpha_of(job(volumes={"data": 1e9, "pipeline": 1e9}))
    assert found == pytest.approx(data / (data + pipeline))


def test_measured_overlap_decides() -> None:
    volumes = {"data": 10e9, "pipeline": 1e9}
    data, pipeline = (1 / 0.83 - 1) * 10 * 0.2, (1 / 0.3 - 1) * 1 * 0.9
    measured = job(volumes=volumes, overlap={"data": 0.8, "pipeline": 0.1})
    assert alpha_of(measured) == pytest.approx(data / (data + pipeline))
    assert weight_of(measured).source == "volumes and measured overlap"
    assert alpha_of(job(shape=SHAPE, overlap={"data": 1.0})) == 0.0
    assert alpha_of(job(shape=SHAPE, overlap={"pipeline": 1.0})) == 1.0
    # Where all is hidden, the bytes are what is left to go by.
    hidden = {"data": 1.0, "pipeline": 1.0}
    assert alpha_of(job(volumes=volumes, overlap=hidden)) == alpha_of(job(volumes=volumes))


def test_measured_step_times_decide_as_the_paper_says() -> None:
    times = {"unaligned": 2.0, "data_aligned": 1.9, "pipeline_aligned": 1.7}
    assert alpha_of(job(step_times=times)) == pytest.approx(0.1 / 0.4)
    assert alpha_of(job(shape=SHAPE, step_times=times)) == pytest.approx(0.1 / 0.4)
    assert alpha_of(job(step_times=times | {"data_aligned": "2100 ms"})) == 0.0
    assert alpha_of(job(step_times=times | {"pipeline_aligned": 2.1})) == 1.0
    assert alpha_of(job(step_times=dict.fromkeys(times, 1.0))) == 0.5


@pytest.mark.parametrize(
    ("key", "value", "up"),
    [
        ("micro_batch", 2, False),  # a longer window for gradients, more bytes between stages
        ("global_batch", 2048, False),  # gradients are reduced once, stages send as often again
        ("sequence_length", 8192, False),
        ("zero_stage", 3, True),
        ("virtual_stages", 2, True),  # more sends, and most of them hidden
        ("parameter_bytes", 4.0, True),
        ("gradient_bytes", 4.0, True),
        ("activation_bytes", 1.0, True),
        ("sequence_parallel", False, False),
        ("flop_per_s", 1e14, False),  # more time to hide gradients behind
        ("bandwidth_bytes_per_s", 400e9, False),  # gradients hide, sends between stages do not
        ("expert_parallel", 8, False),  # fewer replicas of each expert
    ],
)
def test_each_key_has_its_effect(key: str, value: object, up: bool) -> None:
    """On the prediction alone, and on what is made of it and the measured jobs."""
    shape = MIXTURE if key == "expert_parallel" else SHAPE
    base: dict[str, object] = {"shape": shape, "global_batch": 1024}
    usual, changed = job(**base), job(**base | {key: value})
    assert alpha_of(changed) != pytest.approx(alpha_of(usual), abs=1e-4)
    gained = alpha_of(changed, ()) - alpha_of(usual, ())
    assert gained > 1e-4 if up else gained < -1e-4


def test_zero_one_hides_more_than_a_plain_all_reduce() -> None:
    """As many bytes, but gathers also hide behind the next forward pass."""
    light = {"shape": SHAPE, "micro_batch": 2, "flop_per_s": 6e14}
    assert alpha_of(job(**light, zero_stage=0), ()) > alpha_of(job(**light, zero_stage=1), ())


def test_a_job_between_two_ways_is_between_their_weights() -> None:
    """The farther from the measured job, the nearer to the prediction."""
    jobs = [job(shape=SHAPE, gradient_bytes=b) for b in (2.0, 4.0, 8.0, 64.0)]
    measured, predicted = 0.0, [alpha_of(one, ()) for one in jobs]
    shares = [
        (alpha_of(one) - measured) / (model - measured)
        for one, model in zip(jobs, predicted, strict=True)
    ]
    assert shares[0] == 0.0
    assert shares[-1] == 1.0
    assert shares == sorted(shares)
    assert "L20 14B dense" in weight_of(jobs[1]).source


def test_one_kind_of_group_alone_has_all_the_weight() -> None:
    assert alpha_of(job(shape=SHAPE, pipeline_parallel=1)) == 1.0
    assert alpha_of(job(shape=SHAPE, data_parallel=1)) == 0.0
    assert alpha_of(job(shape=SHAPE, pipeline_parallel=1, data_parallel=1)) == DEFAULT_ALPHA


@given(
    data=st.floats(0, 1e24),
    pipeline=st.floats(0, 1e24),
    hidden=st.tuples(*[st.one_of(st.none(), st.floats(0, 1))] * 2),
    grow=st.floats(1, 1e3),
    shape=st.sampled_from([None, SHAPE]),
)
def test_more_data_bytes_never_lower_the_weight(
    data: float,
    pipeline: float,
    hidden: tuple[float | None, float | None],
    grow: float,
    shape: dict[str, int] | None,
) -> None:
    def alpha(data_bytes: float) -> float:
        return alpha_of(
            job(
                shape=shape,
                volumes={"data": data_bytes, "pipeline": pipeline},
                overlap={"data": hidden[0], "pipeline": hidden[1]},
            )
        )

    low, high = alpha(data), alpha(min(data * grow, 1e24))
    assert 0 <= low <= 1
    assert 0 <= high <= 1
    if data and pipeline and all(share is not None and share < 1 for share in hidden):
        assert high >= low - 1e-9


def test_losses_count_as_nothing() -> None:
    assert Measured("x", 1, 1, -1.0, 2.0).alpha == 0.0
    assert Measured("x", 1, 1, -1.0, -2.0).alpha == 0.5
    assert all(0 <= measured.alpha <= 1 for measured in PUBLISHED)
