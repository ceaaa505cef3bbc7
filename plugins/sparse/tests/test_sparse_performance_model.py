from __future__ import annotations

from itertools import product
from statistics import fmean

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.sparse.performance_model import (
    GPUS,
    SYSTEMS,
    across_groups,
    calibration,
    errors,
    examples,
    held_out,
    least_squares,
    model,
    right_winners,
)
from trimtab.sparse.published_figures import RATIOS, TIMES, Run

K = 1024


def absolute(wrong: list[float]) -> float:
    return fmean(abs(x) for x in wrong)


def test_the_published_figures_are_whole() -> None:
    for gpu, group in product(GPUS, (1, 2, 4, 8)):
        for thousands, system in product((128, 256), ("fsa", "nsa", "dense")):
            times = TIMES[Run(gpu, thousands * K, group, 64, 16), system]
            assert 0 < times.forward < times.both
        for thousands, block in product((8, 16, 32, 64), (64, 128)):
            assert min(RATIOS[Run(gpu, thousands * K, group, block, K // block)]) > 0
    assert (len(TIMES), len(RATIOS)) == (48, 64)


@pytest.mark.parametrize("gpu", GPUS)
def test_the_model_is_as_near_to_forward_times_as_was_asked(gpu: str) -> None:
    forward = [e for e in examples(gpu, 64) if not e.both]
    assert len(forward) == 16
    assert absolute(errors(model(gpu), forward)) < 0.08


@pytest.mark.parametrize(
    ("gpu", "calibrated", "unseen_blocks"), [("h200", 0.12, 0.24), ("h20", 0.08, 0.14)]
)
def test_the_model_is_as_far_off_as_its_page_says(
    gpu: str, calibrated: float, unseen_blocks: float
) -> None:
    assert absolute(calibration(gpu)) < calibrated
    assert calibrated < absolute(held_out(gpu)) < unseen_blocks
    assert absolute(across_groups(gpu)) < 0.09


@pytest.mark.parametrize("gpu", GPUS)
def test_the_model_names_the_faster_of_two_systems(gpu: str) -> None:
    right, told = right_winners(gpu)
    assert told > 80
    assert right / told >= 0.95


def test_nothing_of_blocks_of_128_is_in_the_fit() -> None:
    assert all(e.run.block == 64 for gpu in GPUS for e in examples(gpu, 64))
    assert all(e.run.block == 128 for gpu in GPUS for e in examples(gpu, 128))


@given(
    st.sampled_from(sorted(GPUS)),
    st.sampled_from(SYSTEMS),
    st.integers(4, 256),
    st.sampled_from([1, 2, 4, 8, 16]),
    st.sampled_from([64, 128]),
)
def test_more_tokens_take_longer_and_both_passes_longer_than_one(
    gpu: str, system: str, thousands: int, group: int, block: int
) -> None:
    run = Run(gpu, thousands * K, group, block, K // block)
    longer = run._replace(tokens=run.tokens + 4 * K)
    of = model(gpu)
    assert 0 < of.forward_s(system, run) < of.forward_s(system, longer)
    assert of.forward_s(system, run) < of.both_s(system, run) < of.both_s(system, longer)


def test_from_groups_of_eight_on_published_fsa_runs_vanilla_nsas_forward() -> None:
    for gpu in GPUS:
        run = Run(gpu, 64 * K, 8, 64, 16)
        assert model(gpu).forward_s("fsa", run) == model(gpu).forward_s("nsa", run)
        smaller = run._replace(group=4)
        assert model(gpu).forward_s("fsa", smaller) != model(gpu).forward_s("nsa", smaller)


def test_ours_takes_a_fifth_of_a_second_for_a_long_prompt_of_single_heads() -> None:
    run = Run("h200", 128 * K, 1, 64, 16)
    assert model("h200").forward_s("ours", run) <= 0.2
    assert model("h200").forward_s("fsa", run) > 0.6


@given(st.lists(st.integers(0, 5), min_size=3, max_size=3), st.integers(0, 99))
def test_coefficients_are_found_again_and_never_below_zero(wanted: list[int], seed: int) -> None:
    generator = np.random.default_rng(seed)
    names = ("a", "b", "c")
    rows = [dict(zip(names, map(float, generator.random(3)), strict=True)) for _ in range(12)]
    targets = [sum(row[n] * w for n, w in zip(names, wanted, strict=True)) for row in rows]
    found = least_squares(rows, targets)
    assert [found[n] for n in names] == pytest.approx(wanted, abs=1e-6)
    refused = least_squares(rows, [-t for t in targets])
    assert all(value == 0 for value in refused.values())
