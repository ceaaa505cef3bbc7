"""When a vote is over."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import beta

from trimtab.branches.agreement import certainty, decided, sums
from trimtab.branches.answers import Candidate, choose

votes = st.lists(st.sampled_from("abc"), max_size=9)


def plain(cast: list[str]) -> list[float]:
    return sums([(answer, None) for answer in cast], weighted=False)


@given(votes)
def test_certainty_is_the_mass_of_the_beta_posterior(cast: list[str]) -> None:
    counts = [count for _, count in Counter(cast).most_common(2)] + [0, 0]
    expected = beta.sf(0.5, counts[0] + 1, counts[1] + 1) if cast else 0.0
    assert certainty(plain(cast)) == pytest.approx(expected)


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=6), st.integers(0, 3))
def test_a_decided_vote_is_one_that_no_later_vote_can_level(cast: list[str], to_come: int) -> None:
    leader = Counter(cast).most_common(1)[0][0]

    def still_leads(rest: tuple[str, ...]) -> bool:
        counts = Counter([*cast, *rest])
        own = counts.pop(leader)
        return own > max(counts.values(), default=0)

    # A fourth answer stands for all that nobody has given yet.
    futures = itertools.product("abcd", repeat=to_come)
    assert decided(plain(cast), to_come) == all(still_leads(rest) for rest in futures)


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.floats(0.01, 1)), min_size=1, max_size=5),
    st.lists(st.tuples(st.sampled_from("abcd"), st.floats(0, 1)), max_size=3),
)
def test_a_decided_weighted_vote_is_never_overturned(
    cast: list[tuple[str, float]], rest: list[tuple[str, float]]
) -> None:
    def winner(given: list[tuple[str, float]]) -> str | None:
        ended = [
            Candidate(number, "finished", score, 10, answer)
            for number, (answer, score) in enumerate(given)
        ]
        return choose(ended, "weighted").winner.answer

    if decided(sums(cast, weighted=True), len(rest)):
        assert winner([*cast, *rest]) == winner(cast)


def test_a_light_majority_does_not_end_a_weighted_vote() -> None:
    cast: list[tuple[str, float | None]] = [("a", 0.1), ("a", 0.1)]
    assert decided(sums(cast, weighted=False), 1)
    assert not decided(sums(cast, weighted=True), 1)
    assert certainty(sums(cast, weighted=True)) < certainty(sums(cast, weighted=False))


def test_an_unknown_score_counts_as_the_mean_of_the_others() -> None:
    assert sums([("a", 0.2), ("b", None), ("b", 0.6)], weighted=True) == pytest.approx([1.0, 0.2])
    assert sums([("a", None), ("a", None)], weighted=True) == [2.0]


def test_no_vote_decides_nothing() -> None:
    assert not decided([], 0)
    assert certainty([]) == 0.0
