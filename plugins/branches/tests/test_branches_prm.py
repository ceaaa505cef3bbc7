"""The reward model's scorer against a server that is well, slow, down, or talks nonsense."""

from __future__ import annotations

import json
import logging
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.branches.config import PrmOptions
from trimtab.branches.prm import MOST_WAITING, PrmScorer
from trimtab.branches.prm_client import Refused, last_score, tagged
from trimtab.branches.signals.reward_model import RewardModel
from trimtab.core.policy import Call, Outcome

WITHIN_S = 60.0


def decode(ids) -> str:
    return "".join(map(chr, ids))


def ids(text: str) -> list[int]:
    return list(map(ord, text))


def until(condition: Callable[[], bool]) -> None:
    give_up_s = time.monotonic() + WITHIN_S
    while not condition():
        assert time.monotonic() < give_up_s
        time.sleep(0.005)


class Model(ThreadingHTTPServer):
    """A stand-in for a pooling server: answers as told, once it is let to."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[dict[str, object]] = []
        self.paths: list[str] = []
        self.status = 200
        self.body: Callable[[str], object] = lambda text: rows([0.0, 1.0])
        self.let = threading.Event()
        self.let.set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Model

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.paths.append(self.path)
        self.server.asked.append(asked)
        self.server.let.wait(WITHIN_S)
        body = self.server.body(asked["input"])
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(self.server.status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        pass


def rows(*shown: object) -> dict[str, object]:
    return {"data": [{"index": 0, "object": "pooling", "data": list(shown)}]}


@pytest.fixture
def model() -> Iterator[Model]:
    with Model() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield server
        server.let.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def scorer_of() -> Iterator[Callable[..., PrmScorer]]:
    made: list[PrmScorer] = []

    def make(url: str, **more: object) -> PrmScorer:
        options = PrmOptions(url=url, model="prm", **more)
        made.append(PrmScorer(options, decode))
        return made[-1]

    yield make
    for scorer in made:
        scorer.close()
    assert not [t for t in threading.enumerate() if t.name == "trimtab-prm"]


def test_the_last_row_is_the_score_of_all_tokens_so_far(model, scorer_of) -> None:
    model.body = lambda text: rows([0.9, 0.1], [0.25, 0.75])
    scorer = scorer_of(f"{model.url}/")
    scorer.submit("0_a", ids("Q: "), ids("first\n\nsecond"))
    until(lambda: scorer.counts.scored == 1)
    assert scorer.take() == [("0_a", 13, 0.75)]
    assert scorer.take() == []
    assert model.paths == ["/pooling"]
    (asked,) = model.asked
    assert asked["input"] == "Q: first<extra_0>second<extra_0>"
    assert (asked["model"], asked["task"]) == ("prm", "token_classify")


def test_a_long_branch_is_scored_by_its_end_and_keeps_its_prompt(model, scorer_of) -> None:
    scorer = scorer_of(model.url, context_tokens=132)
    scorer.submit("a", ids("P" * 20), ids("x" * 1000 + "\n\n" + "y" * 70))
    scorer.submit("b", ids("P" * 500 + "!"), ids("z" * 500))
    until(lambda: scorer.counts.scored == 2)
    assert {(key, at) for key, at, _ in scorer.take()} == {("a", 1072), ("b", 500)}
    texts = {str(asked["input"])[-10]: str(asked["input"]) for asked in model.asked}
    assert texts["y"] == "P" * 20 + "x" * 8 + "<extra_0>" + "y" * 70 + "<extra_0>"
    assert texts["z"] == "P" * 49 + "!" + "z" * 50 + "<extra_0>"
    limits = {(asked["truncate_prompt_tokens"], asked["truncation_side"]) for asked in model.asked}
    assert limits == {(132, "left")}


def test_of_a_branch_only_the_newest_snapshot_is_asked_about(model, scorer_of) -> None:
    model.let.clear()
    scorer = scorer_of(model.url, in_flight=1)
    scorer.submit("busy", [], ids("b"))
    until(lambda: len(model.asked) == 1)
    for length in range(1, 6):
        scorer.submit("a", [], ids("x" * length))
    scorer.submit("ended", [], ids("e"))
    scorer.forget(["ended", "never seen"])
    model.let.set()
    until(lambda: scorer.counts.scored == 2)
    assert [(key, at) for key, at, _ in scorer.take()] == [("busy", 1), ("a", 5)]
    assert len(model.asked) == 2
    assert (scorer.counts.replaced, scorer.counts.dropped) == (4, 1)


def test_too_many_branches_drop_the_oldest(model, scorer_of) -> None:
    model.let.clear()
    scorer = scorer_of(model.url, in_flight=1)
    scorer.submit("busy", [], ids("b"))
    until(lambda: len(model.asked) == 1)
    for number in range(MOST_WAITING + 3):
        scorer.submit(f"b{number}", [], ids("x"))
    assert scorer.counts.dropped == 3
    model.let.set()
    until(lambda: scorer.counts.scored == 1 + MOST_WAITING)
    kept = {key for key, _, _ in scorer.take()}
    assert kept == {"busy", *(f"b{number}" for number in range(3, MOST_WAITING + 3))}


def test_no_more_questions_at_once_than_allowed(model, scorer_of) -> None:
    model.let.clear()
    scorer = scorer_of(model.url, in_flight=3)
    for number in range(9):
        scorer.submit(f"b{number}", [], ids("x"))
    until(lambda: len(model.asked) == 3)
    assert scorer.take() == []
    model.let.set()
    until(lambda: scorer.counts.scored == 9)


@pytest.mark.parametrize(
    ("status", "body", "reason"),
    [
        (200, b'{"data": [{"data": [[NaN, NaN]]}]}', "not finite"),
        (200, b'{"data": [{"data": [[Infinity, 0]]}]}', "not finite"),
        (200, rows([None, None]), "no rows of two numbers"),
        (200, rows([0.1, 0.2, 0.7]), "no rows of two numbers"),
        (200, rows(0.5, 0.5), "no rows of two numbers"),
        (200, rows(), "no rows of two numbers"),
        (200, {"data": []}, "no rows of two numbers"),
        (200, [1, 2], "no rows of two numbers"),
        (200, b"<html>", "no JSON"),
        (400, {"error": "no such model"}, "status 400: .*no such model"),
        (404, b"", "status 404"),
    ],
)
def test_nonsense_is_no_score_and_is_told_once(
    model, scorer_of, caplog, status, body, reason
) -> None:
    model.status, model.body = status, lambda text: body
    scorer = scorer_of(model.url)
    with caplog.at_level(logging.WARNING, "trimtab"):
        for number in range(5):
            scorer.submit(f"b{number}", [], ids("x"))
        until(lambda: scorer.counts.failed == 5)
    assert scorer.take() == []
    (record,) = caplog.records
    assert re.search(reason, record.getMessage())
    assert len(model.asked) == 5, "what was refused was asked again"
    model.status, model.body = 200, lambda text: rows([0.0, 1.0])
    scorer.submit("well again", [], ids("x"))
    until(lambda: scorer.counts.scored == 1)


def test_a_server_that_fails_is_asked_again(model, scorer_of, caplog) -> None:
    fails = iter([503, 429])

    def body(text: str) -> object:
        model.status = next(fails, 200)
        return rows([0.5, 0.5])

    model.body = body
    scorer = scorer_of(model.url)
    scorer.submit("a", [], ids("x"))
    until(lambda: scorer.counts.scored == 1)
    assert len(model.asked) == 3
    assert scorer.take() == [("a", 1, 0.5)]
    assert caplog.records == []


def test_a_server_that_is_down_costs_no_score_but_its_own(scorer_of, model, caplog) -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        scorer = scorer_of(f"http://127.0.0.1:{bound.getsockname()[1]}")
        with caplog.at_level(logging.WARNING, "trimtab"):
            for number in range(12):
                scorer.submit(f"b{number}", [], ids("x"))
            until(lambda: scorer.counts.failed >= 4)
    assert scorer.take() == []
    assert len(caplog.records) == 1
    assert "go on unscored" in caplog.records[0].getMessage()


def test_a_slow_server_is_waited_for_no_longer_than_allowed(model, scorer_of, caplog) -> None:
    model.let.clear()
    scorer = scorer_of(model.url, timeout_s=0.05, in_flight=1)
    with caplog.at_level(logging.WARNING, "trimtab"):
        scorer.submit("a", [], ids("x"))
        until(lambda: scorer.counts.failed == 1)
    assert "no answer within 0.05 s" in caplog.records[0].getMessage()
    assert scorer.take() == []


def test_a_text_that_cannot_be_decoded_harms_no_other(model) -> None:
    def sometimes(given) -> str:
        if given and given[-1] == 0:
            raise ValueError("no such token")
        return "text"

    scorer = PrmScorer(PrmOptions(url=model.url, model="prm"), sometimes)
    scorer.submit("bad", [], [0])
    scorer.submit("good", [], [1])
    until(lambda: scorer.counts.failed + scorer.counts.scored == 2)
    assert scorer.take() == [("good", 1, 1.0)]
    scorer.close()


def test_closing_waits_for_no_answer(model) -> None:
    model.let.clear()
    scorer = PrmScorer(PrmOptions(url=model.url, model="prm", timeout_s=600), decode)
    scorer.submit("a", [], ids("x"))
    until(lambda: len(model.asked) == 1)
    scorer.close()
    assert not [t for t in threading.enumerate() if t.name == "trimtab-prm"]
    scorer.submit("late", [], ids("x"))
    scorer.close()
    assert scorer.take() == []


def test_every_snapshot_is_accounted_for(model, scorer_of) -> None:
    scorer = scorer_of(model.url)
    for number in range(2000):
        scorer.submit(f"b{number % 300}", [1, 2], ids("x" * (number % 7)))
    counts = scorer.counts
    until(lambda: sum(vars_of(scorer.counts)) == scorer.counts.submitted)
    assert counts.submitted == 2000
    assert len(scorer.take()) == scorer.counts.scored == len(model.asked)


def vars_of(counts) -> tuple[int, ...]:
    return counts.scored, counts.failed, counts.replaced, counts.dropped


class Engine:
    """An engine whose calls have the texts that a test gives them."""

    def __init__(self) -> None:
        self.texts: dict[Call, str] = {}

    def prompt_ids(self, call: Call) -> list[int]:
        return ids("Q ")

    def output_ids(self, call: Call) -> list[int]:
        return ids(self.texts[call])

    def decode(self, token_ids) -> str:
        return decode(token_ids)

    def stop_reason(self, call: Call) -> None:
        return None


def test_the_signal_is_the_models_newest_answer_of_a_branch_that_lives(model) -> None:
    model.body = lambda text: rows([0.1, 0.9] if "good" in text else [0.8, 0.2])
    engine = Engine()
    signal = RewardModel(PrmOptions(url=model.url, model="prm"))
    signal.attach(engine)
    branches = [Call(f"{n}_r", 0.0, 2, 100, branch=n) for n in range(3)]
    for slot, call in enumerate(branches):
        engine.texts[call] = "good" if slot else "bad"
        signal.start(slot, call)
        assert signal.score(slot, call) is None
        signal.ask(slot, call)
    late: dict[Call, int] = {}
    until(lambda: late.update(signal.arrived()) or len(late) == 3)
    assert late == {branches[0]: 3, branches[1]: 4, branches[2]: 4}
    assert [signal.score(n, call) for n, call in enumerate(branches)] == [0.2, 0.9, 0.9]
    model.let.clear()
    signal.ask(0, branches[0])
    assert signal.score(0, branches[0]) is None, "the answer to an older text"
    signal.finish(0, branches[0], Outcome.COMPLETED)
    model.let.set()
    engine.texts[branches[1]] = "worse now"
    signal.ask(1, branches[1])
    late.clear()
    until(lambda: late.update(signal.arrived()) or branches[1] in late)
    assert branches[0] not in late
    assert signal.score(1, branches[1]) == 0.2


def test_an_answer_to_an_older_text_is_not_the_one_that_is_awaited(model) -> None:
    model.let.clear()
    engine, call = Engine(), Call("0_r", 0.0, 2, 100)
    signal = RewardModel(PrmOptions(url=model.url, model="prm", in_flight=1))
    signal.attach(engine)
    signal.start(0, call)
    assert not signal.awaits(0, call)
    engine.texts[call] = "abc"
    signal.ask(0, call)
    until(lambda: len(model.asked) == 1)
    engine.texts[call] = "abcd"
    signal.ask(0, call)
    seen: list[tuple[int, bool]] = []

    def taken() -> bool:
        seen.extend((at, signal.awaits(0, call)) for _, at in signal.arrived())
        return len(seen) == 1

    model.body = lambda text: model.let.clear() or rows([0.5, 0.5])
    model.let.set()
    until(taken)
    assert seen == [(3, True)]
    until(lambda: len(model.asked) == 2)
    seen.clear()
    model.let.set()
    until(taken)
    assert seen == [(4, False)]
    signal.ask(0, call)
    assert signal.awaits(0, call)
    signal.finish(0, call, Outcome.COMPLETED)
    assert not signal.awaits(0, call)
    model.let.set()


@given(st.lists(st.text(alphabet="ab \n", max_size=8), max_size=6))
def test_each_step_gets_one_tag_and_keeps_its_words(paragraphs) -> None:
    text = "\n\n".join(paragraphs)
    marked = tagged(text, end="\n\n", tag="<T>")
    assert marked.endswith("<T>")
    steps = marked.split("<T>")[:-1]
    assert all(step.strip() for step in steps) or marked == "<T>"
    assert "".join("".join(steps).split()) == "".join(text.split())
    assert len(steps) == max(1, sum(bool(part.strip()) for part in text.split("\n\n")))


def test_a_tag_in_the_text_is_no_step() -> None:
    assert tagged("a<T>b\n\nc<T>", end="\n\n", tag="<T>") == "ab<T>c<T>"


@given(st.floats(-1e300, 1e300), st.floats(-1e300, 1e300))
def test_any_finite_row_is_a_score(bad, good) -> None:
    assert 0 <= last_score(rows([bad, good])) <= 1


def test_logits_are_made_probabilities() -> None:
    assert last_score(rows([1.0, 1.0])) == 0.5
    assert last_score(rows([2.0, 2.0 + 1.0986122886681098])) == pytest.approx(0.75)
    assert last_score(rows([0.0, 900.0])) == 1.0
    assert last_score(rows([0.3, 0.7])) == 0.7
    with pytest.raises(Refused):
        last_score(None)
