"""The branches of a request: what pruning and early stop may and may not do."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.special import ndtri

from trimtab.branches.bars import (
    WORTH_WAITING,
    FixedBar,
    History,
    LikeWithLike,
    Outlook,
    PaperBars,
    Recent,
    gain,
)
from trimtab.branches.group import Bars, Branch, BranchGroup, Rules, length_class
from trimtab.branches.note import Fate

NORMAL = NormalDist()
NORMAL_SAMPLE = ndtri((np.arange(20_000) + 0.5) / 20_000)


@dataclass
class Life:
    """What a branch would do if it were left alone."""

    length: int
    scores: list[float]
    arrives: int = 0


@dataclass
class Told:
    """What a run of a group showed."""

    ended: dict[int, Fate] = field(default_factory=dict)
    answers: list[int] = field(default_factory=list)
    tokens: dict[int, int] = field(default_factory=dict)


def run(rules: Rules, bars: Bars, lives: list[Life], steps: list[int]) -> tuple[BranchGroup, Told]:
    """Decodes all branches side by side, with so many tokens a step in turn."""
    group, told = BranchGroup(rules, bars), Told()
    live: dict[int, int] = {}
    waiting = dict(enumerate(lives))
    for step in range(10_000):
        for index in [i for i, life in waiting.items() if life.arrives <= step]:
            del waiting[index]
            if group.closed:
                told.ended[index] = Fate.WITHHELD
                continue
            group.add(index)
            live[index] = 0
        for index in list(live):
            live[index] = min(live[index] + steps[step % len(steps)], lives[index].length)
            due = group.progress(index, live[index])
            whole = live[index] == lives[index].length
            if due or whole:
                scores = lives[index].scores
                moment = min(live[index] // rules.score_every, len(scores) - 1)
                group.score(index, scores[moment], live[index])
            if whole:
                group.finish(index, Fate.FINISHED)
                assert index not in told.ended
                told.ended[index], told.tokens[index] = Fate.FINISHED, live.pop(index)
                told.answers.append(index)
        for branch in group.decide():
            assert branch.index not in told.ended
            assert branch.fate is not None
            told.ended[branch.index] = branch.fate
            told.tokens[branch.index] = live.pop(branch.index)
        if not live and not waiting:
            return group, told
    raise AssertionError("the group never ends")


@st.composite
def cases(draw: st.DrawFn, *, prunes: bool = True) -> tuple[Rules, list[Life], list[int]]:
    branches = draw(st.integers(2, 9))
    rules = Rules(
        branches=branches,
        enough=draw(st.integers(1, branches)),
        score_every=draw(st.integers(1, 12)),
        max_pruned=draw(st.integers(0, branches)),
        prunes=prunes,
    )
    lives = [
        Life(
            draw(st.integers(1, 60)),
            draw(st.lists(st.floats(0, 1), min_size=1, max_size=6)),
            draw(st.integers(0, 3)),
        )
        for _ in range(branches)
    ]
    return rules, lives, draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))


@given(cases(), st.floats(0, 1))
def test_every_branch_ends_once_and_one_answers(
    case: tuple[Rules, list[Life], list[int]], alpha: float
) -> None:
    rules, lives, steps = case
    group, told = run(rules, PaperBars(alpha), lives, steps)
    assert sorted(told.ended) == list(range(rules.branches))
    assert told.answers
    assert group.pruned <= rules.max_pruned
    pruned = sum(fate is Fate.PRUNED for fate in told.ended.values())
    assert len(told.ended) - pruned >= 1
    if pruned == 0:
        assert len(told.answers) >= rules.enough
    assert all(told.tokens[i] <= lives[i].length for i in told.tokens)
    assert run(rules, PaperBars(alpha), lives, steps)[1] == told


@given(cases(prunes=False))
def test_without_pruning_the_first_to_finish_answer(
    case: tuple[Rules, list[Life], list[int]],
) -> None:
    rules, lives, steps = case
    _, told = run(rules, PaperBars(1.0), lives, steps)
    assert Fate.PRUNED not in told.ended.values()
    assert len(told.answers) >= rules.enough
    stopped = [i for i, fate in told.ended.items() if fate is not Fate.FINISHED]
    assert rules.enough < rules.branches or not stopped


@given(st.lists(st.integers(1, 9), min_size=1, max_size=200), st.integers(1, 40))
def test_a_branch_is_due_once_for_each_multiple_that_a_step_reaches(
    steps: list[int], every: int
) -> None:
    group = BranchGroup(Rules(2, 2, every, 0), PaperBars(0.0))
    group.add(0)
    tokens, due = 0, []
    for step in steps:
        tokens += step
        if group.progress(0, tokens):
            due.append(tokens // every)
            group.score(0, 1.0, tokens)
    reached = {sum(steps[: n + 1]) // every for n in range(len(steps))} - {0}
    assert due == sorted(reached)


def opened(**rules: int) -> BranchGroup:
    defaults = {"branches": 4, "enough": 2, "score_every": 10, "max_pruned": 2}
    group = BranchGroup(Rules(**{**defaults, **rules}), PaperBars(0.5))
    for index in range(4):
        group.add(index)
    return group


def score_all(group: BranchGroup, *scores: float) -> list[Branch]:
    for index, score in enumerate(scores):
        if group.branches[index].fate is None:
            group.progress(index, group.branches[index].tokens + 10)
            group.score(index, score, group.branches[index].tokens)
    return group.decide()


def test_exploration_prunes_the_worst_up_to_its_cap() -> None:
    group = opened()
    assert [b.index for b in score_all(group, 0.4, 0.1, 0.2, 0.3)] == [1, 2]
    assert score_all(group, 0.4, 0.1, 0.2, 0.3) == []


def test_the_first_to_finish_raises_the_bar_and_takes_the_cap_away() -> None:
    group = opened(enough=3)
    group.score(0, 0.8, 12)
    group.finish(0, Fate.FINISHED)
    assert group.phase == 2
    assert [b.index for b in score_all(group, 0.0, 0.7, 0.9, 0.6)] == [3, 1]


def test_a_bad_first_finisher_never_lowers_the_bar() -> None:
    group = opened(enough=3)
    group.score(0, 0.1, 12)
    group.finish(0, Fate.FINISHED)
    assert [b.index for b in score_all(group, 0.0, 0.4, 0.6, 0.6)] == [1]


def test_a_branch_that_was_cut_by_its_length_answers_for_none() -> None:
    group = opened(enough=1)
    group.finish(0, Fate.LENGTH)
    assert group.done == 0
    assert group.phase == 1
    assert group.decide() == []


def test_a_late_score_that_is_older_changes_nothing() -> None:
    group = opened()
    group.score(0, 0.9, 20)
    group.score(0, 0.0, 10)
    assert group.decide() == []
    assert group.branches[0].score == 0.9


@pytest.mark.parametrize("value", [None, math.nan, math.inf])
def test_what_is_no_score_leaves_the_branch_unscored(value: float | None) -> None:
    group = opened()
    group.progress(0, 10)
    group.score(0, value, 10)
    assert group.decide() == []
    assert not group.progress(0, 19)


def test_a_score_for_a_branch_that_is_unknown_or_over_is_passed_over() -> None:
    group = opened()
    group.score(17, 0.1, 10)
    group.finish(0, Fate.FINISHED)
    group.score(0, 0.1, 30)
    assert group.decide() == []


def test_all_that_finish_in_one_step_count() -> None:
    group = opened(enough=1)
    for index in (0, 1, 2):
        group.finish(index, Fate.FINISHED)
    assert [b.index for b in group.decide()] == [3]
    assert group.done == 3


def test_fewer_suffice_under_load_but_never_more() -> None:
    group = opened(enough=2)
    group.progress(2, 5)
    group.finish(0, Fate.FINISHED)
    assert group.decide(enough=9) == []
    ended = group.decide(enough=1)
    assert [(b.index, b.fate) for b in ended] == [
        (1, Fate.WITHHELD),
        (2, Fate.STOPPED),
        (3, Fate.WITHHELD),
    ]


def test_a_certain_vote_needs_a_vote() -> None:
    group = opened()
    assert group.decide(certain=True) == []
    group.finish(0, Fate.FINISHED)
    assert len(group.decide(certain=True)) == 3


def test_memory_takes_the_weakest_and_leaves_one() -> None:
    group = opened()
    score_all(group, 0.9, 0.6, 0.7, 0.8)
    order = []
    while (weakest := group.weakest()) is not None:
        group.evict(weakest)
        order.append(weakest.index)
    assert order == [1, 2, 3]
    assert {b.index for b in group.living()} == {0}


def test_memory_takes_nothing_where_pruning_is_off() -> None:
    group = BranchGroup(Rules(4, 4, 10, 0, prunes=False), PaperBars(0.5))
    group.add(0)
    group.add(1)
    group.score(0, 0.1, 10)
    assert group.weakest() is None


@given(st.lists(st.floats(0, 1), max_size=600), st.floats(0, 1))
def test_recent_scores_know_ranks(scores: list[float], score: float) -> None:
    recent = Recent()
    for one in scores:
        recent.add(one)
    kept = sorted(scores[-256:])
    assert len(recent) == len(kept)
    assert recent.rank(2.0) == (1.0 if kept else 0.0)
    if len(kept) < 16:
        assert recent.deviate(score) is None
        return
    place = sum((one < score) + 0.5 * (one == score) for one in kept)
    assert recent.deviate(score) == pytest.approx(NORMAL.inv_cdf((place + 0.5) / (len(kept) + 1)))


def remembered(correlation: float, seed: int = 7) -> History:
    """A history of finished branches whose scores halfway tell so much of the final ones."""
    draw = np.random.default_rng(seed)
    history = History()
    for _ in range(256):
        early = draw.standard_normal()
        late = correlation * early + math.sqrt(1 - correlation**2) * draw.standard_normal()
        history.at(100).add(NORMAL.cdf(early))
        history.finish({length_class(100): NORMAL.cdf(early)}, NORMAL.cdf(late))
    return history


REMEMBERED = {correlation: remembered(correlation) for correlation in (0.0, 0.5, 0.95)}


@pytest.mark.parametrize("correlation", [0.3, 0.6, 0.9])
def test_how_much_scores_tell_of_final_ones_is_learnt(correlation: float) -> None:
    found = remembered(correlation).correlation(100)
    assert found == pytest.approx(correlation, abs=0.1)
    assert History().correlation(100) == 0.6


def test_scores_that_are_all_alike_tell_nothing() -> None:
    history = History()
    for _ in range(40):
        history.at(100).add(0.5)
        history.finish({length_class(100): 0.5}, 0.5)
    assert history.correlation(100) == 0.2
    group = lived(history, [0.5, 0.5, 0.5], finished=[0.5])
    assert group.decide() == []


@given(
    st.tuples(st.floats(-3, 3), st.floats(0, 1)),
    st.tuples(st.floats(-3, 3), st.floats(0, 1)),
)
def test_a_gain_is_the_mean_of_what_one_lies_above_another(
    of: tuple[float, float], over: tuple[float, float]
) -> None:
    found = gain(Outlook(*of), Outlook(*over))
    spread = math.sqrt(of[1] + over[1])
    drawn = of[0] - over[0] + spread * NORMAL_SAMPLE
    assert found == pytest.approx(float(np.maximum(drawn, 0).mean()), abs=0.01)


def lived(history: History, scores: list[float], finished: list[float]) -> BranchGroup:
    """A request whose live branches have these scores at 100 tokens, and others have finished."""
    count = len(scores) + len(finished)
    group = BranchGroup(Rules(count, count, 50, count), LikeWithLike(history, None))
    for index in range(count):
        group.add(index)
    for index, score in enumerate(scores):
        group.score(index, score, 100)
    for index, score in enumerate(finished, len(scores)):
        group.score(index, score, 200)
        group.finish(index, Fate.FINISHED)
    return group


@pytest.mark.parametrize("correlation", [0.4, 0.8, 0.95])
@pytest.mark.parametrize("best", [None, 0.3, 0.8, 0.95])
@pytest.mark.parametrize("sibling", [0.2, 0.6, 0.97])
def test_a_branch_goes_on_as_long_as_it_may_raise_the_best(
    correlation: float, best: float | None, sibling: float
) -> None:
    history = remembered(correlation)
    told = history.correlation(100)
    lasting, other = (np.random.default_rng(n).standard_normal(40_000) for n in (1, 2))

    def final(score: float, noise: NDArray[np.float64]) -> NDArray[np.float64]:
        """Drawn: the final deviates of a branch with this score halfway."""
        early = NORMAL.inv_cdf((history.at(100).rank(score) * 256 + 0.5) / 257)
        return told * early + math.sqrt(1 - told**2) * noise

    for score in np.linspace(0.02, 0.98, 25).tolist():
        gains = [np.maximum(final(score, lasting) - final(sibling, other), 0).mean()]
        if best is not None:
            goal = NORMAL.inv_cdf((history.finished.rank(best) * 256 + 0.5) / 257)
            gains.append(np.maximum(final(score, lasting) - goal, 0).mean())
        group = lived(history, [score, sibling, sibling], [] if best is None else [best])
        pruned = 0 in {branch.index for branch in group.decide()}
        enough = WORTH_WAITING * (1 - told**2)
        if abs(min(gains) - enough) > 0.015:
            assert pruned == (min(gains) < enough)


@given(
    st.lists(st.floats(0, 1), min_size=2, max_size=9, unique=True),
    st.sampled_from([0.0, 0.5, 0.95]),
)
def test_the_most_promising_branch_lives_until_one_has_finished(
    scores: list[float], correlation: float
) -> None:
    group = lived(REMEMBERED[correlation], scores, [])
    pruned = {branch.index for branch in group.decide()}
    assert scores.index(max(scores)) not in pruned


@given(st.lists(st.floats(0, 1), min_size=2, max_size=9), st.floats(0, 1), st.floats(0, 1))
def test_a_better_finished_branch_asks_more_of_the_others(
    scores: list[float], one: float, other: float
) -> None:
    lower, higher = (
        {b.index for b in lived(REMEMBERED[0.5], scores, [best]).decide()}
        for best in sorted((one, other))
    )
    assert lower <= higher


def test_of_one_branch_the_first_score_at_each_length_counts() -> None:
    group = BranchGroup(Rules(2, 2, 10, 2), LikeWithLike(History(), None))
    group.add(0)
    told = [(100, 0.1), (120, 0.2), (130, 0.3), (125, 0.4), (140, math.nan), (255, 0.5), (256, 0.6)]
    firsts = [group.score(0, score, tokens) for tokens, score in told]
    assert firsts == [True, False, True, False, False, False, True]
    assert group.branches[0].trail == {length_class(100): 0.1, length_class(130): 0.3}


def test_a_branch_is_compared_with_those_that_were_as_far() -> None:
    history = remembered(0.9)
    for n in range(256):
        history.at(1000).add(0.9 + n / 2560)
        history.finish({length_class(1000): n / 256}, n / 256)
    group = BranchGroup(Rules(2, 2, 50, 2), LikeWithLike(history, None))
    for index, tokens in enumerate((1000, 100)):
        group.add(index)
        group.score(index, 0.905, tokens)
    group.add(2)
    # The same score is a good one at 100 tokens, and a bad one at 1,000.
    assert [branch.index for branch in group.decide()] == [0]


def test_safe_mode_leaves_two_until_one_has_finished() -> None:
    bars = LikeWithLike(History(), None)
    assert [bars.survivors(score) for score in (None, 0.2)] == [2, 1]
    group = BranchGroup(Rules(3, 3, 10, 3), LikeWithLike(History(), 0.5))
    for index in range(3):
        group.add(index)
    for index in range(3):
        group.score(index, 0.3 - 0.1 * index, 10)
    assert [b.index for b in group.decide()] == [2]


def test_safe_mode_prunes_none_of_a_hard_question_for_being_hard() -> None:
    history = History()
    for bars, pruned in ((LikeWithLike(history, 0.2), [3, 1]), (FixedBar(0.2), [3, 1, 2, 0])):
        group = BranchGroup(Rules(5, 5, 10, 5), bars)
        for index, score in enumerate((0.13, 0.11, 0.12, 0.1, 0.9)):
            group.add(index)
            group.score(index, score, 10)
        assert [b.index for b in group.decide()] == pruned


def test_a_branch_that_ends_without_an_answer_is_lost() -> None:
    group = opened()
    group.finish(0, Fate.FINISHED)
    assert group.lost == 0
    group.finish(1, Fate.LENGTH)
    score_all(group, 0.0, 0.0, 0.1, 0.9)
    assert group.lost == 2
    assert group.live == 1


@pytest.mark.parametrize(("enough", "prunes"), [(4, True), (3, False), (4, False)])
def test_all_run_to_their_ends_only_where_all_must_finish_and_none_is_pruned(
    enough: int, prunes: bool
) -> None:
    assert Rules(4, enough, 10, 2, prunes).exhaustive == (enough == 4 and not prunes)


def test_safe_mode_prunes_nothing_before_it_has_seen_enough() -> None:
    assert lived(History(), [0.0, 0.1, 1.0], [1.0]).decide() == []


@pytest.mark.parametrize("at_once", [True, False])
def test_in_safe_mode_a_branch_that_finishes_has_all_others_judged(at_once: bool) -> None:
    history = remembered(0.7)
    bars: Bars = LikeWithLike(history, None) if at_once else PaperBars(0.0)
    group = BranchGroup(Rules(3, 3, 100, 1), bars)
    for index in range(3):
        group.add(index)
    for index, score in enumerate((0.6, 0.5, 0.7)):
        group.score(index, score, 100)
    assert group.decide() == []
    group.score(0, 0.97, 120)
    group.finish(0, Fate.FINISHED)
    assert [b.index for b in group.decide()] == ([1, 2] if at_once else [])
    group.score(1, 0.3, 200)
    assert [b.index for b in group.decide()] == ([] if at_once else [1])
