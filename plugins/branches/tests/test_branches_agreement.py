"""When a vote is over."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import betainc

from trimtab.branches.agreement import certainty, decided

votes = st.lists(st.sampled_from("abc"), max_size=9)


@given(votes)
def test_certainty_is_the_mass_of_the_beta_posterior(cast: list[str]) -> None:
    counts = [count for _, count in Counter(cast).most_common(2)] + [0, 0]
    expected = 1 - betainc(counts[0] + 1, counts[1] + 1, 0.5) if cast else 0.0
    assert certainty(cast) == pytest.approx(expected)


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=6), st.integers(0, 3))
def test_a_decided_vote_is_one_that_no_later_vote_can_level(cast: list[str], to_come: int) -> None:
    leader = Counter(cast).most_common(1)[0][0]

    def still_leads(rest: tuple[str, ...]) -> bool:
        counts = Counter([*cast, *rest])
        own = counts.pop(leader)
        return own > max(counts.values(), default=0)

    # A fourth answer stands for all that nobody has given yet.
    futures = itertools.product("abcd", repeat=to_come)
    assert decided(cast, to_come) == all(still_leads(rest) for rest in futures)


def test_no_vote_decides_nothing() -> None:
    assert not decided([], 0)
    assert certainty([]) == 0.0
