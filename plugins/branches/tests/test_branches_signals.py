"""The reward signals, each against a plain reckoning of what it says."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.branches.config import BranchesConfig
from trimtab.branches.scoring import Score
from trimtab.branches.signals import tokens
from trimtab.branches.signals.replay import Replay
from trimtab.branches.signals.shortness import Shortness
from trimtab.core.documents import validate
from trimtab.core.errors import BadInput
from trimtab.core.policy import Call, Outcome

WINDOW = 4


def call(branch: int = 0, **fields: str) -> Call:
    return Call(f"{branch}_r", 0.0, 10, 100, fields, request_id="r", branch=branch)


def table(values: list[list[float]]) -> np.ndarray:
    return np.asarray(values, dtype=np.float32)


def feed(signal: tokens.TokenSignal, series: list[list[float]]) -> None:
    """Gives slot n the n-th series, a token a step, side by side."""
    for slot in range(len(series)):
        signal.start(slot, call(slot))
    for step in range(max(map(len, series), default=0)):
        slots = [n for n, own in enumerate(series) if step < len(own)]
        rows = [[series[n][step], *([-1.0] * 20)] for n in slots]
        signal.observe(np.asarray(slots, dtype=np.intp), table(rows))


series = st.lists(st.lists(st.floats(-20, 0, width=32), max_size=12), min_size=1, max_size=80)


@given(series)
def test_the_last_window_of_every_branch(values: list[list[float]]) -> None:
    signal = tokens.LastWindow(tokens.PROBABILITY, WINDOW)
    feed(signal, values)
    for slot, own in enumerate(values):
        score = signal.score(slot, call(slot))
        # Branches take their tokens side by side; one that stands still is forgotten in time.
        kept = own[max(0, max(map(len, values)) - 2 * WINDOW) :][-WINDOW:]
        assert (score is None) == (not kept)
        if kept:
            assert score == pytest.approx(np.exp(np.mean(kept)), rel=1e-4, abs=1e-9)


def test_a_branch_that_gets_fewer_tokens_a_step_than_others_keeps_its_window() -> None:
    signal = tokens.LastWindow(tokens.PROBABILITY, WINDOW)
    slow, fast = call(0), call(1)
    for slot in (0, 1):
        signal.start(slot, fast)
    own = [-n / 7 for n in range(40 * WINDOW)]
    for step, value in enumerate(own):
        signal.observe(np.array([0, 1]), table([[value, *([-1.0] * 20)]] * 2))
        for _ in range(4):
            signal.observe(np.array([1]), table([[-0.5, *([-1.0] * 20)]]))
        slow.output_tokens = step + 1
        score = signal.score(0, slow)
        if step > 8 * WINDOW:
            assert score == pytest.approx(np.exp(np.mean(own[: step + 1][-WINDOW:])), rel=1e-4)


def test_top_logprobs_beyond_those_that_are_read_change_nothing() -> None:
    row = [-0.1, -0.1, *([-2.0] * 19)]
    with np.errstate(all="raise"):
        assert tokens.confidence(table([[*row, -np.inf]])) == tokens.confidence(table([row]))


@given(series)
def test_the_worst_window_of_every_branch(values: list[list[float]]) -> None:
    signal = tokens.LowestWindow(tokens.PROBABILITY, WINDOW)
    feed(signal, values)
    for slot, own in enumerate(values):
        whole = [np.mean(own[n : n + WINDOW]) for n in range(len(own) - WINDOW + 1)]
        score = signal.score(slot, call(slot))
        assert (score is None) == (not own)
        if own:
            worst = min(whole) if whole else np.mean(own)
            assert score == pytest.approx(np.exp(worst), rel=1e-4, abs=1e-9)


def test_a_slot_that_is_used_again_starts_anew() -> None:
    signal = tokens.LowestWindow(tokens.PROBABILITY, WINDOW)
    feed(signal, [[-9.0] * 8])
    signal.start(0, call())
    assert signal.score(0, call()) is None
    signal.observe(np.array([0]), table([[0.0] * 21]))
    assert signal.score(0, call()) == 1.0


def test_confidence_is_larger_for_a_peaked_distribution() -> None:
    peaked = table([[-0.01, -0.01, *([-12.0] * 19)]])
    flat = table([[-3.0] * 21])
    assert tokens.confidence(peaked)[0] == pytest.approx((0.01 + 12 * 19) / 20)
    assert tokens.share_of(tokens.confidence(peaked)[0]) > tokens.share_of(3.0) > 0
    assert tokens.certainty(peaked)[0] > 0.9
    assert tokens.certainty(flat)[0] == pytest.approx(0.0, abs=1e-6)


def test_more_columns_than_asked_for_change_nothing() -> None:
    row = [-1.0, *np.linspace(-1, -9, 20)]
    assert tokens.confidence(table([[*row, -50.0]])) == tokens.confidence(table([row]))


@pytest.mark.parametrize(
    "signal",
    [
        tokens.LowestWindow(tokens.CONFIDENCE, WINDOW),
        tokens.LastWindow(tokens.CONFIDENCE, WINDOW),
        tokens.LastWindow(tokens.ENTROPY, WINDOW),
    ],
    ids=["lowest_confidence", "confidence", "entropy"],
)
def test_tokens_that_a_grammar_forces_say_nothing(signal: tokens.TokenSignal) -> None:
    free = [-1.0, *np.linspace(-1, -9, 20)]
    forced = [0.0, 0.0, *([-np.inf] * 19)]
    seen = []
    for rows in ([free] * 6, [free, forced, free, forced, forced, free, free, free, free]):
        signal.start(0, call())
        for row in rows:
            signal.observe(np.array([0]), table([row]))
        seen.append(signal.score(0, call()))
    assert seen[0] == seen[1]
    assert seen[0] is not None
    signal.start(0, call())
    signal.observe(np.array([0]), table([forced]))
    assert signal.score(0, call()) is None


def test_the_shorter_branch_scores_higher() -> None:
    signal = Shortness()
    assert signal.score(0, call()) is None
    for length in (10, 20, 30, 40):
        done = call()
        done.output_tokens = length
        signal.finish(0, done, Outcome.COMPLETED)
    ended = call()
    ended.output_tokens = 1
    signal.finish(0, ended, Outcome.ENDED_BY_POLICY)
    now = call()
    scores = []
    for now.output_tokens in (5, 25, 50):
        scores.append(signal.score(0, now))
    assert scores == [1.0, 0.5, 0.0]


def test_replayed_scores_come_one_by_one_and_the_last_one_stays() -> None:
    signal = Replay()
    branch = call(1, replay=json.dumps([[0.9], [0.1, 0.2]]))
    signal.start(0, branch)
    assert signal.score(0, branch) is None
    seen = []
    for _ in range(3):
        signal.ask(0, branch)
        seen.append(signal.score(0, branch))
    assert seen == [0.1, 0.2, 0.2]


@pytest.mark.parametrize(
    "said",
    [
        *("", "[", "[]", "{}", "7", '[["x"], ["y"]]', "[[1], [NaN]]"),
        pytest.param("[" * 60_000, id="deep"),
        pytest.param(f"[[1], [{'9' * 400}]]", id="large"),
    ],
)
def test_what_cannot_be_replayed_is_no_score(said: str) -> None:
    signal = Replay()
    branch = call(1, replay=said)
    signal.start(0, branch)
    signal.ask(0, branch)
    assert signal.score(0, branch) is None


def test_signals_are_combined_by_their_weights() -> None:
    score = Score.of(BranchesConfig(signals={"replay": 3.0, "shortness": 1.0}))
    assert score.top_logprobs is None
    branch = call(0, replay="[[0.8]]")
    score.start(0, branch)
    score.ask(0, branch)
    assert score.score(0, branch) == pytest.approx(0.8)  # nothing is known of lengths yet
    done = call(1)
    done.output_tokens = 10
    score.start(1, done)
    score.finish(1, done, Outcome.COMPLETED)
    branch.output_tokens = 20
    assert score.score(0, branch) == pytest.approx(0.75 * 0.8)


def test_the_most_logprobs_that_a_signal_needs_are_asked_for() -> None:
    config = BranchesConfig(signals={"probability": 1.0, "entropy": 1.0})
    assert Score.of(config).top_logprobs == tokens.TOP_LOGPROBS


@pytest.mark.parametrize(
    ("said", "place"),
    [
        ({"m": 5, "n": 4}, "m is 5; give at most n, 4"),
        ({"n": 100}, "n is 100; give at most max_branches, 64"),
        ({"n": 9, "max_branches": 8}, "n is 9; give at most max_branches, 8"),
        ({"extract": "sometimes"}, "there is no rule 'sometimes'"),
        ({"extract": "regex:("}, "extract is 'regex:('"),
        ({"extractor": "nosuch:fn"}, "'nosuch:fn' cannot be imported"),
        ({"extractor": "json:__name__"}, "'json:__name__' is no function"),
    ],
)
def test_options_that_could_only_fail_later_are_refused(
    said: dict[str, object], place: str
) -> None:
    with pytest.raises(BadInput, match=r"trimtab\.branches: ") as refused:
        validate(BranchesConfig, said, where="--additional-config, trimtab.branches")
    assert place in str(refused.value)


@pytest.mark.parametrize(
    ("signals", "where", "said"),
    [
        ({"magic": 1.0}, "trimtab.branches.signals", "no plugin offers a signal 'magic'"),
        ({"prm": 1.0}, "trimtab.branches.prm", "the signal 'prm' has no reward model"),
    ],
)
def test_a_signal_that_cannot_be_is_refused(
    signals: dict[str, float], where: str, said: str
) -> None:
    with pytest.raises(BadInput) as refused:
        Score.of(BranchesConfig(signals=signals))
    assert refused.value.where == where
    assert said in str(refused.value)
