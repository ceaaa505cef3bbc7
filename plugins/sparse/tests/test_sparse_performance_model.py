from __future__ import annotations

from dataclasses import replace
from itertools import product
from statistics import fmean
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.core.errors import BadInput
from trimtab.sparse import traffic
from trimtab.sparse.performance_model import (
    GPUS,
    NEAR_UNTIL,
    SYSTEMS,
    across_groups,
    calibration,
    errors,
    examples,
    held_out,
    is_calibration,
    least_squares,
    model,
    right_winners,
    unseen_blocks,
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
def test_the_model_is_as_near_as_was_asked(gpu: str) -> None:
    assert absolute(calibration(gpu)) <= 0.08
    assert absolute(held_out(gpu)) <= 0.15
    forward = [e for e in examples(gpu) if not e.both]
    assert len(forward) == 16
    assert absolute(errors(model(gpu), forward)) < 0.07


@pytest.mark.parametrize(("gpu", "groups", "blocks"), [("h200", 0.13, 0.22), ("h20", 0.09, 0.16)])
def test_the_model_is_as_far_off_as_its_page_says(gpu: str, groups: float, blocks: float) -> None:
    assert absolute(held_out(gpu)) < absolute(across_groups(gpu)) < groups
    assert groups < absolute(unseen_blocks(gpu)) < blocks


@pytest.mark.parametrize("gpu", GPUS)
def test_the_halves_are_a_chequerboard_and_share_nothing(gpu: str) -> None:
    found = {e.run for e in examples(gpu)}
    seen = {run for run in found if is_calibration(run)}
    assert 2 * len(seen) == len(found)
    assert len(calibration(gpu)) == len(held_out(gpu)) == 48
    assert len(model(gpu).seconds) == 8
    for run in seen:
        for neighbour in (
            run._replace(group=run.group * 2),
            run._replace(tokens=run.tokens * 2),
            run._replace(block=192 - run.block, top=24 - run.top),
        ):
            assert neighbour not in seen


@pytest.mark.parametrize("gpu", GPUS)
def test_the_model_names_the_faster_of_two_systems(gpu: str) -> None:
    right, told = right_winners(gpu)
    assert told > 80
    assert right / told >= 0.95


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


def test_ours_is_predicted_to_take_as_long_as_its_page_says() -> None:
    run = Run("h200", 128 * K, 1, 64, 16)
    of = model("h200")
    assert 0.16 < of.forward_s("ours", run) < 0.18
    assert of.forward_s("fsa", run) > 0.6


@pytest.mark.parametrize(
    ("gpu", "system", "change", "what"),
    [
        ("h100", "ours", {}, "gpu 'h100' is not known"),
        ("h200", "flash", {}, "system 'flash' is not known"),
        ("h200", "fsa", {"gpu": "h20"}, "run.gpu 'h20' is not known"),
        ("h200", "ours", {"block": 32}, "run.block 32 is not known"),
        ("h200", "dense", {"tokens": 0}, "tokens is 0"),
    ],
)
def test_what_the_model_does_not_know_is_named(
    gpu: str, system: str, change: dict[str, Any], what: str
) -> None:
    run = Run("h200", 8 * K, 4, 64, 16)._replace(**change)
    for name in ("forward_s", "both_s"):
        with pytest.raises(BadInput, match=what):
            getattr(model(gpu), name)(system, run)


def test_from_8k_tokens_on_ours_is_predicted_as_fast_as_dense_within_two_percent() -> None:
    for gpu, group, block in product(GPUS, (1, 2, 4, 8, 16, 32, 64), (64, 128)):
        for thousands in (8, 12, 16, 32, 64, 128, 256):
            run = Run(gpu, thousands * K, group, block, K // block)
            ours, dense = (model(gpu).forward_s(s, run) for s in ("ours", "dense"))
            assert ours <= 1.02 * dense, run


def test_what_calls_all_blocks_near_is_dense_attention_and_little_more() -> None:
    for gpu, block in product(GPUS, NEAR_UNTIL):
        short = Run(gpu, NEAR_UNTIL[block], 4, block, K // block)
        selected = model(gpu).our_selected_s(short)["blocks"]
        assert 1 < selected / model(gpu).forward_s("dense", short) < 2
        longer = short._replace(tokens=short.tokens + 64)
        assert model(gpu).our_selected_s(longer)["blocks"] > selected


@given(
    st.integers(1, 12),
    st.sampled_from([(64, 1), (4, 16), (7, 3)]),
    st.sampled_from([(64, 16), (128, 8)]),
    st.integers(18, 30),
)
def test_expected_lists_hold_every_choice_and_a_smaller_workspace_costs_more(
    thousands: int, heads: tuple[int, int], blocks: tuple[int, int], room: int
) -> None:
    of = traffic.Sizes(thousands * K, *heads, 128, 128, *blocks, workspace_bytes=1 << room)
    roomy = replace(of, workspace_bytes=1 << 40)
    found, once = (traffic.lists(x, x.forward_part_bytes, 512) for x in (of, roomy))
    assert once.segments == once.lots == 1
    assert found.segments >= found.lots >= 1
    own = [min(of.top, t // of.block + 1) for t in range(of.tokens)]
    assert found.choices == once.choices == of.kv_heads * sum(own)
    assert (
        found.choices * of.group / 512 <= found.items <= found.rows + found.choices * of.group / 512
    )
    assert traffic.forward_bytes(of, found) >= 0.99 * traffic.forward_bytes(roomy, once)


@given(
    st.integers(1, 12),
    st.sampled_from([(64, 16), (128, 8)]),
    st.integers(0, 96),
)
def test_what_is_near_and_what_is_far_is_all_that_is_chosen(
    thousands: int, blocks: tuple[int, int], early_blocks: int
) -> None:
    of = traffic.Sizes(thousands * K, 2, 4, 128, 128, *blocks)
    split = replace(of, near_until=early_blocks * of.block)
    every, far = (traffic.lists(x, x.forward_part_bytes, 512) for x in (of, split))
    positions = range(min(of.tokens, early_blocks * of.block), of.tokens)
    chosen = [max(0, min(of.top, t // of.block + 1) - 3) for t in positions]
    assert far.choices == of.kv_heads * sum(chosen) <= every.choices
    assert far.items <= every.items
    assert traffic.table_bytes(split, far) <= traffic.table_bytes(of, every)
    assert traffic.near_keys(split) <= max(of.tokens, split.near_until or 0) ** 2


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
