from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.branches.answers import Candidate, choose

WAYS = ("best", "majority", "weighted", "shortest")


def of(*told: tuple[str, float | None, int, str | None]) -> list[Candidate]:
    return [Candidate(i, *one) for i, one in enumerate(told)]


FIVE = of(
    ("finished", 0.9, 50, "1"),
    ("finished", 0.4, 40, "2"),
    ("finished", 0.3, 30, " 2.0"),
    ("pruned", 1.0, 5, "3"),
    ("length", 1.0, 9, "3"),
)


@pytest.mark.parametrize(
    ("how", "winner", "votes"),
    [("best", 0, 1), ("majority", 1, 2), ("weighted", 0, 1), ("shortest", 2, 2)],
)
def test_the_ways_differ(how, winner, votes):
    choice = choose(FIVE, how)
    assert (choice.winner.branch, choice.votes, choice.voters) == (winner, votes, 3)


def test_an_unknown_score_is_the_mean_of_the_known():
    branches = of(("finished", 0.2, 9, "a"), ("finished", None, 9, "b"), ("finished", 0.6, 9, "c"))
    assert choose(branches, "best").winner.branch == 2
    assert choose(branches[:2], "best").winner.branch == 0
    # 0.2 + 0.4 for b against 0.6 for c: as heavy, but its best score is lower.
    votes = [*branches[1:], Candidate(3, "finished", 0.2, 9, "b")]
    assert choose(votes, "weighted").winner.branch == 2
    assert choose(votes, "majority").winner.branch == 1


def test_where_nobody_is_scored_the_shortest_wins():
    branches = of(("finished", None, 9, "a"), ("finished", None, 8, "b"))
    assert choose(branches, "best").winner.branch == 1


@pytest.mark.parametrize("how", WAYS)
def test_only_what_finished_counts_while_there_is_some(how):
    poor = Candidate(0, "finished", 0.0, 10**6, None)
    others = of(
        *(("finished", 0.0, 1, "x"),) * 1, ("length", 1.0, 1, "x"), ("pruned", 1.0, 1, "x")
    )[1:]
    assert choose([poor, *others], how).winner is poor
    assert choose(others, how).winner.fate == "length"
    assert choose(others[1:], how).winner.fate == "pruned"


def test_branches_without_an_answer_do_not_vote():
    branches = of(("finished", 0.9, 9, None), ("finished", 0.8, 9, None), ("finished", 0.1, 9, "a"))
    assert choose(branches, "majority").winner.branch == 2
    assert choose(branches[:2], "majority").winner.branch == 0


candidates = st.lists(
    st.builds(
        Candidate,
        branch=st.just(0),
        fate=st.sampled_from(["finished", "finished", "length", "pruned", "stopped"]),
        score=st.none() | st.sampled_from([0.0, 0.1, 0.2, 0.3, 0.7]),
        tokens=st.integers(0, 3),
        answer=st.none() | st.sampled_from(["1", "1.0", "2", "3"]),
    ),
    min_size=1,
    max_size=6,
).map(lambda found: [replace(one, branch=i) for i, one in enumerate(found)])


@given(candidates, st.sampled_from(WAYS), st.randoms())
def test_the_order_of_arrival_decides_nothing(branches, how, random):
    shuffled = branches[:]
    random.shuffle(shuffled)
    assert choose(branches, how) == choose(shuffled, how)


@given(candidates)
def test_no_answer_has_more_votes_than_the_majority(branches):
    choice = choose(branches, "majority")
    rank = {"finished": 0, "length": 1}
    tier = min(rank.get(one.fate, 2) for one in branches)
    counted = [one for one in branches if rank.get(one.fate, 2) == tier]
    same = {"1": "1", "1.0": "1", "2": "2", "3": "3"}
    answers = [same[one.answer] for one in counted if one.answer is not None]
    assert choice.votes == max(map(answers.count, answers), default=0)
    assert choice.winner in counted


@given(st.permutations(range(4)))
def test_ties_go_to_score_then_tokens_then_number(order):
    told = [(0.5, 9), (0.5, 7), (0.5, 7), (0.4, 1)]
    branches = [Candidate(i, "finished", *told[i], "a") for i in order]
    for how in ("best", "majority", "weighted"):
        assert choose(branches, how).winner.branch == 1
    assert choose(branches, "shortest").winner.branch == 3


def test_one_branch_is_its_own_answer():
    for how, fate in itertools.product(WAYS, ["finished", "withheld"]):
        assert choose(of((fate, None, 0, None)), how).winner.branch == 0
