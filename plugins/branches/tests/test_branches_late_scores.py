"""Scores that come after a branch's end: in the engine, in the notes, and in the response."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import threading
from collections import deque
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.branches import prm_client
from trimtab.branches.bars import History, LikeWithLike, PaperBars
from trimtab.branches.config import BranchesConfig
from trimtab.branches.group import Bars, BranchGroup, Rules
from trimtab.branches.middleware import Middleware
from trimtab.branches.note import Fate, Note
from trimtab.branches.policy import BranchesPolicy
from trimtab.branches.settling import Ended, awaited, last_scores, notes_of
from trimtab.core.branch_scoring import BranchScorer
from trimtab.core.policy import Call, Outcome

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
PROMPT = "Q "


class Later(BranchScorer):
    """A signal that answers when the test lets it."""

    def __init__(self) -> None:
        self.owners: dict[int, Call] = {}
        self.asked: set[Call] = set()
        self.values: dict[Call, float] = {}
        self.news: deque[tuple[Call, int]] = deque()

    def start(self, slot: int, call: Call) -> None:
        assert slot not in self.owners, "two branches in one slot"
        self.owners[slot] = call

    def ask(self, slot: int, call: Call) -> None:
        assert self.owners[slot] is call
        self.values.pop(call, None)
        self.asked.add(call)

    def answer(self, call: Call, value: float) -> None:
        assert call in self.owners.values(), "an answer about a branch that was withdrawn"
        self.values[call] = value
        self.asked.discard(call)
        self.news.append((call, call.output_tokens))

    def score(self, slot: int, call: Call) -> float | None:
        assert self.owners[slot] is call
        return self.values.get(call)

    def awaits(self, slot: int, call: Call) -> bool:
        assert self.owners[slot] is call
        return call in self.asked

    def arrived(self) -> list[tuple[Call, int]]:
        return [self.news.popleft() for _ in range(len(self.news))]

    def finish(self, slot: int, call: Call, outcome: Outcome) -> None:
        assert self.owners.pop(slot) is call
        self.asked.discard(call)


class Now(BranchScorer):
    """A signal that always says the same."""

    def __init__(self, value: float) -> None:
        self.value = value

    def score(self, slot: int, call: Call) -> float | None:
        return self.value


class Request:
    """A request under a policy, driven by hand."""

    def __init__(self, branches: int = 4, *, now: float | None = None, **options: Any) -> None:
        self.later = Later()
        signals: dict[str, tuple[BranchScorer, float]] = {"later": (self.later, 3.0)}
        if now is not None:
            signals["now"] = (Now(now), 1.0)
        options = {"pruning": "paper", "score_every": 10, "bend": False, **options}
        self.policy = BranchesPolicy(BranchesConfig(**options), signals)
        fields = {"branches": branches}
        self.calls = [
            Call(f"{n}_r", 0.0, 4, 100, fields, request_id="r", branch=n) for n in range(branches)
        ]
        for call in self.calls:
            self.policy.on_arrival(call, 0.0)

    def step(self, *calls: Call) -> list[Call]:
        ended = list(self.policy.on_step(calls, 0.0))
        for call in ended:
            self.policy.on_finish(call, Outcome.ENDED_BY_POLICY, 0.0)
        return ended

    def finish(self, branch: int, tokens: int, outcome: Outcome = Outcome.COMPLETED) -> Note | None:
        call = self.calls[branch]
        call.output_tokens = tokens
        self.policy.on_finish(call, outcome, 0.0)
        return Note.read(call.note)


def test_the_score_that_comes_after_the_first_end_is_the_bar_for_the_others() -> None:
    request = Request(m=3)
    first, other, better = request.calls[:3]
    note = request.finish(0, 7)
    assert note is not None
    assert (note.fate, note.score, note.awaited) == (Fate.FINISHED, None, (0.0, 0.0))
    assert request.step() == []
    request.later.answer(first, 0.8)
    assert request.step() == []
    assert first not in request.later.owners.values(), "its slot is free"
    other.output_tokens = better.output_tokens = 10
    request.step(other, better)
    request.later.answer(other, 0.7)
    request.later.answer(better, 0.9)
    assert request.step() == [other]
    pruned = Note.read(other.note)
    assert pruned is not None
    assert (pruned.fate, pruned.phase, pruned.others) == (Fate.PRUNED, 2, {0: 0.8})


def test_a_note_says_what_is_known_and_a_later_one_has_the_rest() -> None:
    request = Request(now=0.4, m=3)
    note = request.finish(0, 12)
    assert note is not None
    assert (note.score, note.awaited) == (0.4, (0.4, 1.0))
    request.step()
    request.later.answer(request.calls[0], 0.8)
    request.step()
    later = request.finish(1, 20)
    assert later is not None
    assert later.others == {0: pytest.approx(0.7)}


def test_what_is_awaited_of_a_request_that_is_answered_is_withdrawn() -> None:
    request = Request(m=1)
    request.finish(0, 12)
    assert set(request.step()) == set(request.calls[1:])
    assert request.later.owners == {}


def test_a_branch_that_the_server_stopped_is_scored_too() -> None:
    request = Request(m=3)
    request.finish(0, 12, Outcome.ABORTED)
    request.step()
    request.later.answer(request.calls[0], 0.6)
    request.step()
    note = request.finish(1, 20)
    assert note is not None
    assert note.others == {0: 0.6}


def test_of_a_client_that_goes_nothing_is_awaited() -> None:
    request = Request()
    for branch in range(4):
        request.finish(branch, 12, Outcome.ABORTED)
    request.step()
    assert request.later.owners == {}


def test_a_branch_that_repeats_itself_has_its_score() -> None:
    request = Request()
    request.calls[0].output_tokens = 10
    request.step(request.calls[0])
    note = request.finish(0, 12, Outcome.REPEATED)
    assert note is not None
    assert (note.fate, note.score, note.awaited) == (Fate.REPEATED, 0.0, None)
    assert request.calls[0] not in request.later.owners.values()


def test_a_weighted_vote_counts_the_score_that_came_late() -> None:
    request = Request(3, now=0.0, m=3, answer="weighted", extract="final", pruning="off")

    class Engine:
        by_priority = False

        def output_ids(self, call: Call) -> list[int]:
            return [call.branch]

        def decode(self, ids: Any) -> str:
            return "final answer: 7"

        def stop_reason(self, call: Call) -> None:
            return None

    request.policy.attach(Engine())  # type: ignore[arg-type]
    request.finish(0, 12)
    request.step()
    request.later.answer(request.calls[0], 0.9)
    request.step()
    (asked,) = request.policy._asked.values()
    assert [score for _, score in asked.votes] == [pytest.approx(0.675)]


@st.composite
def happenings(draw: st.DrawFn) -> list[tuple[str, int]]:
    kinds = st.sampled_from(["arrive", "run", "finish", "abort", "answer", "step"])
    return draw(st.lists(st.tuples(kinds, st.integers(0, 11)), max_size=60))


class Crowd:
    """Four requests of three branches each under one policy."""

    def __init__(self, enough: int) -> None:
        self.later = Later()
        config = BranchesConfig(pruning="paper", score_every=10)
        self.policy = BranchesPolicy(config, {"later": (self.later, 1.0)})
        fields = {"branches": 3, "enough": enough}
        self.new = [
            Call(f"{i}_r{n}", 0.0, 4, 100, fields, request_id=f"r{n}", branch=i)
            for n in range(4)
            for i in range(3)
        ]
        self.live: list[Call] = []

    def arrive(self, n: int) -> None:
        if self.new:
            self.live.append(self.new.pop(0))
            self.policy.on_arrival(self.live[-1], 0.0)

    def run(self, tokens: int) -> None:
        for call in self.live:
            call.output_tokens += tokens
        self.step(0)

    def finish(self, n: int) -> None:
        self._end(n, Outcome.COMPLETED)

    def abort(self, n: int) -> None:
        self._end(n, Outcome.ABORTED)

    def answer(self, n: int) -> None:
        if asked := sorted(self.later.asked, key=lambda call: call.call_id):
            self.later.answer(asked[n % len(asked)], n / 12)

    def step(self, n: int) -> None:
        for call in self.policy.on_step(list(self.live), 0.0):
            if call in self.live:
                self.live.remove(call)
                self.policy.on_finish(call, Outcome.ENDED_BY_POLICY, 0.0)

    def _end(self, n: int, outcome: Outcome) -> None:
        if self.live:
            self.policy.on_finish(self.live.pop(n % len(self.live)), outcome, 0.0)
            self.step(0)


@given(happenings(), st.integers(1, 3))
def test_a_slot_has_one_branch_at_a_time_and_none_in_the_end(
    happens: list[tuple[str, int]], enough: int
) -> None:
    crowd = Crowd(enough)
    for kind, n in happens:
        getattr(crowd, kind)(n)
    while crowd.new:
        crowd.arrive(0)
    crowd.step(0)
    while crowd.live:
        crowd.finish(0)
    assert crowd.later.owners == {}


def bars(paper: bool) -> Bars:
    """The paper's, or those of safe mode that has seen enough."""
    if paper:
        return PaperBars(0.3)
    history = History()
    for n in range(40):
        history.at(10).add(n / 40)
        history.at(20).add(n / 40)
        history.finished.add(n / 40)
    return LikeWithLike(history, None)


def scored(group: BranchGroup, first: int, scores: list[float]) -> list[int]:
    """The branches that are pruned when the living ones are scored twice."""
    pruned: list[int] = []
    for tokens in (10, 20):
        for index, score in enumerate(scores, first):
            group.score(index, score, tokens)
        pruned += [branch.index for branch in group.decide()]
    return pruned


@given(
    st.lists(st.tuples(st.floats(0, 1), st.none() | st.floats(0, 1)), min_size=1, max_size=6),
    st.lists(st.floats(0, 1), min_size=7, max_size=7),
    st.permutations(range(6)),
    st.booleans(),
)
def test_a_late_score_counts_as_if_it_had_been_there_in_time(
    finished: list[tuple[float, float | None]], running: list[float], order: list[int], paper: bool
) -> None:
    early, late = (BranchGroup(Rules(20, 20, 10, 20), bars(paper)) for _ in range(2))
    for group in (early, late):
        for index in range(len(finished) + len(running)):
            group.add(index)
    for index, (score, older) in enumerate(finished):
        early.score(index, score, 12)
        late.score(index, older, 10)
        for group in (early, late):
            group.progress(index, 12)
            group.finish(index, Fate.FINISHED)
    for index in order:
        if index < len(finished):
            late.score_late(index, finished[index][0])
    first = len(finished)
    assert scored(late, first, running) == scored(early, first, running)


def test_a_late_score_of_the_first_raises_the_bar_and_one_of_the_second_does_not() -> None:
    for late, pruned in ((0, [2]), (1, [])):
        group = BranchGroup(Rules(4, 4, 10, 4), PaperBars(0.5))
        for index in range(4):
            group.add(index)
        for index in (0, 1):
            group.score(index, 0.6, 5)
            group.progress(index, 9)
            group.finish(index, Fate.FINISHED)
        group.score_late(late, 0.9)
        assert scored(group, 2, [0.8, 0.95]) == pruned


def test_in_safe_mode_a_late_score_holds_the_others_to_it_at_once() -> None:
    group = BranchGroup(Rules(3, 3, 10, 3), bars(paper=False))
    for index, score in enumerate((0.5, 0.55, 0.45)):
        group.add(index)
        group.score(index, score, 10)
    group.finish(0, Fate.FINISHED)
    assert group.decide() == []
    group.score_late(0, 0.99)
    assert {branch.index for branch in group.decide()} == {1, 2}


def ended(*notes: Note | None) -> list[Ended]:
    return [
        Ended({"finish_reason": "stop", "stop_reason": note.to_text() if note else None})
        for note in notes
    ]


def test_the_whole_score_wins_over_the_branchs_own_older_one() -> None:
    own = Note(Fate.FINISHED, 1, 0.3, 9, awaited=(0.3, 1.0))
    before = Note(Fate.PRUNED, 2, 0.1, 9, others={0: 0.3})
    after = Note(Fate.STOPPED, 2, 0.2, 9, others={0: 0.9, 1: 0.1})
    assert last_scores(notes_of(ended(own, before, after))) == {0: 0.9, 1: 0.1, 2: 0.2}
    assert last_scores(notes_of(ended(own, after, before)))[0] == 0.9
    assert awaited(notes_of(ended(own, before, after))) == {}
    assert awaited(notes_of(ended(own, before))) == {0: (0.3, 1.0)}


def test_a_branchs_own_score_stays_where_nothing_was_awaited() -> None:
    own = Note(Fate.FINISHED, 1, 0.3, 9)
    other = Note(Fate.STOPPED, 2, 0.2, 9, others={0: 0.9})
    assert last_scores(notes_of(ended(own, other)))[0] == 0.3


@pytest.mark.parametrize("said", ["7", "[1]", "[1, null]", '["a", 1]', "[1, 2, 3]", "[NaN, 1]"])
def test_what_is_no_sum_and_weights_is_not_awaited(said: str) -> None:
    text = Note(Fate.FINISHED, 1, 0.3, 9, awaited=(0.25, 1.0)).to_text()
    note = Note.read(text.replace("[0.25,1.0]", said))
    assert note is not None
    assert note.awaited is None


class Model(ThreadingHTTPServer):
    """A reward model that answers as told."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[str] = []
        self.most_at_once = threading.Barrier(1)
        self.status = 200
        self.row: Any = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Model

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["input"]
        self.server.asked.append(asked)
        self.server.most_at_once.wait(20)
        row = self.server.row or ([0.0, 1.0] if "g" in asked else [1.0, 0.0])
        content = json.dumps({"data": [{"data": [row]}]}).encode()
        self.send_response(self.server.status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def model() -> Iterator[Model]:
    with Model() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield server
        server.most_at_once.abort()
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server whose tokens are characters."""

    class Characters:
        def decode(self, ids: list[int], *, skip_special_tokens: bool) -> str:
            return "".join(map(chr, ids))

    of_vllm = SimpleNamespace(cached_tokenizer_from_config=lambda config: Characters())
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(tokenizers=of_vllm))
    monkeypatch.setitem(sys.modules, "vllm.tokenizers", of_vllm)


class Server:
    """An ASGI server whose branches say their texts, with notes."""

    def __init__(self, *branches: tuple[str, Note | None], finish: str = "stop") -> None:
        self.branches = branches
        self.finish = finish
        self.asked: dict[str, Any] = {}

    async def __call__(self, scope, receive, send):
        self.asked = json.loads((await receive())["body"])
        chat, stream = scope["path"] == CHAT, bool(self.asked.get("stream"))
        ids = bool(self.asked.get("return_token_ids"))
        frame = {"id": "c", "object": "chat.completion" if chat else "text_completion"}
        prompt = {"prompt_token_ids": list(map(ord, PROMPT)) if ids else None}
        choices = []
        for i, (text, note) in enumerate(self.branches):
            part = {"role": "assistant", "content": text}
            said = {"delta" if stream else "message": part} if chat else {"text": text}
            choices.append(
                {
                    "index": i,
                    **said,
                    "finish_reason": self.finish,
                    "stop_reason": note.to_text() if note else "x",
                    "token_ids": list(map(ord, text)) if ids else None,
                    **({} if chat else prompt),
                }
            )
        shared = {**frame, **(prompt if chat else {})}
        if stream:
            kind = b"text/event-stream"
            events = [{**shared, "choices": [choice]} for choice in choices]
            body = b"".join(b"data: " + json.dumps(e).encode() + b"\n\n" for e in events)
            body += b"data: [DONE]\n\n"
        else:
            kind, body = b"application/json", json.dumps({**shared, "choices": choices}).encode()
        headers = [(b"content-type", kind)]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})


class Door:
    """The middleware before a server, with clients."""

    def __init__(self, server: Server, url: str, **options: Any) -> None:
        self.server = server
        options = {"signals": {"prm": 1.0}, **options}
        prm = {"url": url, "model": "m", "timeout_s": options.pop("timeout_s", 10)}
        config = BranchesConfig(**options, prm=prm)
        self.middleware = Middleware(server, config)

    def ask(self, path: str = CHAT, **body: Any) -> httpx.Response:
        state = SimpleNamespace(
            vllm_config=SimpleNamespace(model_config=SimpleNamespace(skip_tokenizer_init=False))
        )

        async def inside(scope, receive, send):
            await self.middleware({**scope, "app": SimpleNamespace(state=state)}, receive, send)

        async def post() -> httpx.Response:
            transport = httpx.ASGITransport(inside)
            async with httpx.AsyncClient(transport=transport, base_url="http://t") as client:
                xargs = {"trimtab.branches": len(self.server.branches)}
                return await client.post(path, json={"vllm_xargs": xargs, **body})

        return asyncio.run(post())


def winner(answer: httpx.Response) -> dict[str, Any]:
    """The last choice that the client got."""
    if not answer.text.startswith("data: "):
        return answer.json()["choices"][0]
    events = [e for e in answer.text.split("\n\n") if e.startswith("data: {")]
    return json.loads(events[-1][len("data: ") :])["choices"][0]


def waiting(score: float | None, total: float = 0.0, weights: float = 0.0) -> Note:
    return Note(Fate.FINISHED, 1, score, 3, awaited=(total, weights))


BOTH = pytest.mark.parametrize("stream", [False, True])


@BOTH
@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_what_is_still_awaited_is_asked_for_all_at_once(model, path, stream) -> None:
    model.most_at_once = threading.Barrier(2)  # each question waits for the other one
    pruned = Note(Fate.PRUNED, 2, 0.1, 3, awaited=(0.0, 0.0))
    server = Server(("bad", waiting(0.9)), ("g..", waiting(0.2)), ("cut", pruned))
    answer = Door(server, model.url).ask(path, stream=stream)
    assert winner(answer)["trimtab"]["branch"] == 1
    assert winner(answer)["trimtab"]["score"] == 1.0
    assert sorted(model.asked) == ["Q bad<extra_0>", "Q g..<extra_0>"]
    assert server.asked["return_token_ids"] is True
    assert '_ids":[' not in answer.text, "the client did not ask for them"


@BOTH
def test_the_models_answer_is_combined_with_what_was_known(model, stream) -> None:
    server = Server(("g..", waiting(0.5, 1.0, 2.0)), ("bad", Note(Fate.FINISHED, 2, 0.6, 3)))
    door = Door(server, model.url, signals={"prm": 3.0, "entropy": 2.0})
    assert winner(door.ask(stream=stream))["trimtab"]["score"] == pytest.approx(0.8)
    assert len(model.asked) == 1


@BOTH
def test_a_later_note_saves_the_question(model, stream) -> None:
    later = Note(Fate.FINISHED, 2, 0.1, 3, others={0: 0.8})
    server = Server(("bad", waiting(0.3)), ("bad", later))
    assert winner(Door(server, model.url).ask(stream=stream))["trimtab"]["score"] == 0.8
    assert model.asked == []


@BOTH
def test_a_branch_that_a_stop_string_ended_is_asked_about_where_nothing_else_counts(
    model, stream
) -> None:
    server = Server(("g..", None), ("bad", Note(Fate.FINISHED, 2, 0.6, 3)))
    assert winner(Door(server, model.url).ask(stream=stream))["trimtab"]["score"] == 1.0
    both = Door(server, model.url, signals={"prm": 1.0, "entropy": 1.0})
    assert winner(both.ask(stream=stream))["trimtab"]["score"] is None
    assert len(model.asked) == 1


@BOTH
@pytest.mark.parametrize("fault", ["down", "slow", "nonsense", "refused"])
def test_without_an_answer_the_engines_last_score_counts(
    model, caplog, monkeypatch, stream, fault
) -> None:
    monkeypatch.setattr(prm_client, "_FIRST_REST_S", 1000.0)
    monkeypatch.setattr(prm_client, "_LONGEST_REST_S", 1000.0)
    server = Server(("bad", waiting(0.3)), ("g..", waiting(0.2)))
    url = "http://127.0.0.1:9" if fault == "down" else model.url
    model.status = 404 if fault == "refused" else 200
    model.row = [float("nan"), 1.0] if fault == "nonsense" else None
    if fault == "slow":
        model.most_at_once = threading.Barrier(99)
    door = Door(server, url, timeout_s=0.05 if fault == "slow" else 10)
    with caplog.at_level(logging.WARNING, "trimtab"):
        for _ in range(2):
            choice = winner(door.ask(stream=stream))
            assert (choice["trimtab"]["branch"], choice["trimtab"]["score"]) == (0, 0.3)
    (record,) = caplog.records
    assert "the engine's last scores count" in record.getMessage()
    if fault == "slow":
        assert len(model.asked) <= 2, "a server that is down is left alone for a while"


@BOTH
def test_a_client_that_wants_its_ids_keeps_them(model, stream) -> None:
    server = Server(("g..", waiting(None)), ("bad", waiting(None)))
    choice = winner(Door(server, model.url).ask(stream=stream, return_token_ids=True))
    assert choice["token_ids"] == list(map(ord, "g.."))
    assert choice["trimtab"]["score"] == 1.0


@BOTH
def test_a_server_without_the_signal_asks_for_nothing(model, stream) -> None:
    server = Server(("bad", waiting(0.3)), ("g..", waiting(0.2)))
    door = Door(server, model.url, signals={"confidence": 1.0})
    assert winner(door.ask(stream=stream))["trimtab"]["score"] == 0.3
    assert "return_token_ids" not in server.asked
    assert model.asked == []


def test_an_echo_is_not_scored(model) -> None:
    server = Server(("bad", waiting(0.3)), ("g..", waiting(0.2)))
    choice = winner(Door(server, model.url).ask(TEXT, echo=True))
    assert choice["trimtab"]["score"] == 0.3
    assert "return_token_ids" not in server.asked
    assert model.asked == []
