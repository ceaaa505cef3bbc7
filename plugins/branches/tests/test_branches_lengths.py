"""Length traces: the estimate from censored branches, and files that are wrong."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.branches.lengths import LengthTrace, RecordedBranch, kaplan_meier, read_lengths
from trimtab.branches.recording import recorded, to_lines
from trimtab.core.errors import BadInput


def test_a_worked_example() -> None:
    lengths = kaplan_meier([1, 2, 2, 3, 5], [True, True, False, True, False])
    # 4/5; then 3/4 of it (one of four ends); then 1/2 of it (one of two); the rest at the longest.
    assert lengths.tokens.tolist() == [1, 2, 3, 5]
    assert lengths.cumulative == pytest.approx([0.2, 0.4, 0.7, 1.0])


@given(st.lists(st.integers(1, 30), min_size=1, max_size=40))
def test_without_censoring_it_is_the_empirical_distribution(tokens: list[int]) -> None:
    lengths = kaplan_meier(tokens, [True] * len(tokens))
    for value, below in zip(lengths.tokens, lengths.cumulative, strict=True):
        assert below == pytest.approx(np.mean(np.array(tokens) <= value))


def test_stopped_branches_do_not_make_lengths_look_short() -> None:
    rng = np.random.default_rng(3)
    groups = np.sort(rng.lognormal(7, 0.6, (4000, 8)), axis=1)
    recorded = np.minimum(groups, groups[:, 3:4])
    finished = groups <= groups[:, 3:4]
    within = kaplan_meier(recorded.ravel(), finished.ravel())
    for quantile in (0.1, 0.3, 0.5):
        true = np.quantile(groups, quantile)
        assert within.share_within(true) == pytest.approx(quantile, abs=0.02)
    assert np.median(recorded[finished]) < 0.8 * np.median(groups)


def trace(rng: np.random.Generator, stop_at: int) -> LengthTrace:
    """Questions of very different lengths, each stopped after some branches."""
    branches = []
    for question in range(500):
        tokens = np.sort(rng.lognormal(6 + rng.normal(), 0.5, 8)) + 1
        for length in tokens:
            stopped = length > tokens[stop_at - 1]
            kept = int(min(length, tokens[stop_at - 1]))
            branches.append(RecordedBranch(f"q{question}", kept, not stopped))
    return LengthTrace.of(branches)


def test_the_spread_within_questions_is_not_that_between_them() -> None:
    within = trace(np.random.default_rng(0), stop_at=8).within_question
    logs = np.log(within.tokens)
    shares = np.diff(within.cumulative, prepend=0.0)
    spread = np.sqrt(shares @ (logs - shares @ logs) ** 2)
    assert within.mean == pytest.approx(1.0)
    assert spread == pytest.approx(0.5, abs=0.03)


def test_the_short_half_is_known_where_the_long_half_was_stopped() -> None:
    within = trace(np.random.default_rng(0), stop_at=5).within_question
    low, middle = np.interp([0.1, 0.5], within.cumulative, within.tokens)
    assert np.log(middle / low) == pytest.approx(0.5 * 1.2816, abs=0.08)


def lines(path: Path, *records: object) -> Path:
    file = path / "lengths.jsonl"
    file.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records) + "\n")
    return file


GOOD = {"question": "q1", "tokens": 10, "finished": True, "correct": True, "score": 0.5}


def test_a_file_is_read(tmp_path: Path) -> None:
    other = {"question": "q2", "tokens": 30, "finished": True}
    wrong = {**GOOD, "tokens": 20, "correct": False, "score": 0.7}
    read = read_lengths(lines(tmp_path, GOOD, "", other, wrong, {**other, "finished": False}))
    assert [len(group) for group in read.questions] == [2, 2]
    assert read.name == "lengths"
    assert read.censored_share == 0.25
    assert read.accuracies == (0.5, None)
    assert read.auroc == 0.0
    assert read.scales == (15.0, 60.0)


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ("{", r"lengths.jsonl:2: this is no JSON"),
        ([1], r"lengths.jsonl:2: .*mapping"),
        ({**GOOD, "tokens": 0}, r"lengths.jsonl:2.*tokens is 0; give a number from 1"),
        ({**GOOD, "tokens": 1.5}, r"lengths.jsonl:2.*tokens is 1.5"),
        ({**GOOD, "score": 1.5}, r"lengths.jsonl:2.*score is 1.5; give a number from 0 to 1"),
        ('{"question": "q", "tokens": 3, "finished": true, "score": NaN}', r":2: NaN is no JSON"),
        ({**GOOD, "finished": "maybe"}, r"lengths.jsonl:2.*finished is 'maybe'"),
        ({**GOOD, "lenght": 3}, r"lengths.jsonl:2.*lenght is an unknown key"),
        ({"question": "q1", "tokens": 3}, r"lengths.jsonl:2.*finished is missing; add it"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, record: object, words: str) -> None:
    with pytest.raises(BadInput, match=words):
        read_lengths(lines(tmp_path, GOOD, record))


def test_files_without_lengths_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no such file"):
        read_lengths(tmp_path / "none.jsonl")
    with pytest.raises(BadInput, match="the file is empty"):
        read_lengths(lines(tmp_path, ""))
    with pytest.raises(BadInput, match="fewer than two branches ended by themselves"):
        read_lengths(lines(tmp_path, GOOD, {**GOOD, "finished": False}))


def told(fate: str, tokens: int, score: float | None, content: str) -> dict[str, object]:
    block = {"branch": 0, "fate": fate, "phase": 1, "score": score, "tokens": tokens}
    return {"message": {"content": content}, "trimtab": block}


def test_responses_become_a_file(tmp_path: Path) -> None:
    response = {
        "choices": [
            told("finished", 30, 0.9, "answer 4"),
            told("finished", 40, None, "answer 5"),
            told("pruned", 20, 0.1, "answer 4 pe"),
            told("withheld", 0, None, ""),
        ]
    }
    branches = recorded("q", response, lambda text: text.endswith("4"))
    assert [branch.correct for branch in branches] == [True, False, None]
    file = tmp_path / "lengths.jsonl"
    file.write_text(to_lines(branches))
    assert read_lengths(file).branches == tuple(branches)
    assert [branch.finished for branch in branches] == [True, True, False]


def test_a_response_that_hides_its_branches_is_refused() -> None:
    with pytest.raises(BadInput, match=r"question 'q': .*trimtab.show"):
        recorded("q", {"choices": [{"message": {"content": "4"}}]})
