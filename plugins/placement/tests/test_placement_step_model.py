"""Flows that share links: the definition of max-min fairness, and steps counted by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.placement.step_model import Links, communication_s, fair_rates

LINKS = 6


@given(
    st.lists(st.frozensets(st.integers(0, LINKS - 1), min_size=2, max_size=2), min_size=1),
    st.lists(st.floats(0.5, 20.0), min_size=LINKS, max_size=LINKS),
)
def test_no_flow_can_get_more_but_from_one_that_has_no_more(
    flows: list[frozenset[int]], room: list[float]
) -> None:
    ways = np.array([sorted(flow) for flow in flows])
    rates = fair_rates(ways, np.array(room))
    load = np.bincount(ways.ravel(), weights=np.repeat(rates, 2), minlength=LINKS)
    assert (load <= np.array(room) * (1 + 1e-6)).all()
    for way, rate in zip(ways, rates, strict=True):
        # Some link of its way is full, and nobody there has more.
        assert any(
            load[link] >= room[link] * (1 - 1e-6)
            and rate >= rates[(ways == link).any(axis=1)].max() * (1 - 1e-6)
            for link in way
        )


def test_a_step_counted_by_hand() -> None:
    links = Links(10.0, np.array([5.0, 5.0]))
    inside, across = np.array([[0, 0], [1, 1]]), np.array([[0, 1], [0, 1]])
    # Stages: a node sends 20 at 10 a second; across pods two flows share 5 each way.
    assert communication_s(inside, links, pipeline=20, data=0) == pytest.approx(2)
    assert communication_s(across, links, pipeline=20, data=0) == pytest.approx(8)
    # Rings of two: the same the other way round.
    assert communication_s(inside, links, pipeline=0, data=20) == pytest.approx(8)
    assert communication_s(across, links, pipeline=0, data=20) == pytest.approx(2)
    assert communication_s(across, links, pipeline=20, data=20) == pytest.approx(10)


def test_what_one_flow_leaves_others_take() -> None:
    """Of three rows one crosses: its flows end later than those that stay."""
    links = Links(10.0, np.array([1.0, 1.0]))
    grid = np.array([[0, 0], [0, 1], [1, 1]])
    assert communication_s(grid, links, pipeline=10, data=0) == pytest.approx(10)


def test_nothing_to_send_takes_no_time() -> None:
    links = Links(1.0, np.array([1.0]))
    assert communication_s(np.zeros((1, 4), dtype=np.int64), links, pipeline=0, data=9) == 0
    assert communication_s(np.zeros((4, 1), dtype=np.int64), links, pipeline=9, data=0) == 0
