"""How many finished branches answer a request that did not get all of its seats."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.branches.bending import Bend


def learnt(lengths: np.ndarray) -> Bend:
    bend = Bend()
    for length in lengths:
        bend.learn(int(length), whole=True)
    return bend


@given(st.integers(1, 16), st.integers(1, 16), st.integers(1, 16))
def test_without_knowledge_the_share_of_seats_is_the_share_of_answers(
    seats: int, branches: int, enough: int
) -> None:
    enough = min(enough, branches)
    needed = Bend().enough(seats, branches, enough)
    if seats >= branches:
        assert needed == enough
    else:
        assert needed == max(1, enough * seats // branches)


def test_exponential_lengths_bend_in_proportion() -> None:
    bend = learnt(np.random.default_rng(0).exponential(1000, 512) + 1)
    assert [bend.enough(seats, 8, 4) for seats in (8, 6, 4, 2, 1)] == [
        4,
        pytest.approx(3, abs=1),
        pytest.approx(2, abs=1),
        1,
        1,
    ]


def test_nearly_constant_lengths_cost_by_the_branch_and_not_by_the_answer() -> None:
    bend = learnt(np.random.default_rng(0).normal(1000, 30, 512))
    assert bend.enough(7, 8, 4) >= 3
    assert bend.enough(2, 8, 4) >= 1


@given(st.lists(st.integers(1, 5000), min_size=40, max_size=80))
def test_fewer_seats_never_ask_for_more_answers(lengths: list[int]) -> None:
    bend = learnt(np.array(lengths))
    needed = [bend.enough(seats, 8, 4) for seats in range(1, 9)]
    assert all(1 <= few <= seats for seats, few in enumerate(needed, 1))
    assert max(needed) == needed[-1] == 4
