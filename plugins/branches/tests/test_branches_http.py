"""The middleware before a server that speaks as vLLM does, notes and all."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from trimtab.branches import streaming
from trimtab.branches.asked import what_is_asked
from trimtab.branches.config import BranchesConfig
from trimtab.branches.middleware import Middleware
from trimtab.branches.note import Fate, Note
from trimtab.branches.streaming import StreamedResponse, merge
from trimtab.hosts.vllm.middleware import BODY_LIMIT_BYTES

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
PROMPT = [ord("Q"), ord(" ")]


class Branch:
    """What the stand-in server says of a branch."""

    def __init__(
        self,
        text: str,
        fate: Fate | None = Fate.FINISHED,
        score: float | None = None,
        stop: int | str | None = None,
        finish: str = "stop",
        others: dict[int, float] | None = None,
        awaited: tuple[float, float] | None = None,
    ) -> None:
        self.words = text.split(" ") if text else []
        self.text = text
        self.finish = finish
        self.tokens = len(self.words)
        self.ids = [ord(word[0]) for word in self.words]
        note = fate and Note(fate, 2, score, self.tokens, stop, others or {}, awaited).to_text()
        self.stop_reason = note or stop


FOUR = [
    Branch("the sum is 7", Fate.FINISHED, 0.4),
    Branch("the sum is 8", Fate.FINISHED, 0.9, stop="###"),
    Branch("the sum is 7.0", Fate.FINISHED, 0.3),
    Branch("well", Fate.PRUNED, 0.1),
]
SUM = r"regex:sum is ([\d.]+)"


class Server:
    """An ASGI server in the shape of vLLM's."""

    def __init__(self, branches: list[Branch]) -> None:
        self.branches = branches
        self.bodies: list[bytes] = []
        self.asked: dict[str, Any] = {}
        self.status = 200
        self.fails_after: int | None = None
        self.disconnected = asyncio.Event()
        self.waits_for_disconnect = False
        self.raw: bytes | None = None

    async def __call__(self, scope, receive, send):
        body, more = b"", True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        self.bodies.append(body)
        length = dict(scope["headers"]).get(b"content-length")
        assert length is None or int(length) == len(body)
        if self.waits_for_disconnect:
            assert (await receive())["type"] == "http.disconnect"
            self.disconnected.set()
            return
        self.asked = json.loads(body) if body.startswith(b"{") else {}
        chat = scope["path"] == CHAT
        if self.raw is not None:
            await self._whole(send, self.raw)
        elif self.status != 200:
            await self._whole(send, b'{"error": {"message": "no", "code": 4}}')
        elif self.asked.get("stream"):
            await self._stream(send, chat)
        else:
            await self._whole(send, json.dumps(self._response(chat)).encode())

    async def _whole(self, send, body: bytes) -> None:
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"x-request-id", b"r1"),
        ]
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        await send({"type": "http.response.body", "body": body[:9], "more_body": True})
        await send({"type": "http.response.body", "body": body[9:]})

    def _frame(self, chat: bool, chunk: bool) -> dict[str, Any]:
        kind = "chat.completion" + ".chunk" * chunk if chat else "text_completion"
        return {"id": "cmpl-1", "object": kind, "created": 5, "model": "m"}

    def _response(self, chat: bool) -> dict[str, Any]:
        choices = []
        for i, one in enumerate(self.branches):
            said = (
                {"message": {"role": "assistant", "content": one.text}}
                if chat
                else {"text": one.text}
            )
            ids = one.ids if self.asked.get("return_token_ids") else None
            prompt = {} if chat else {"prompt_token_ids": ids and PROMPT}
            choices.append(
                {
                    "index": i,
                    **said,
                    "logprobs": {"content": [{"token": w} for w in one.words]},
                    "finish_reason": one.finish,
                    "stop_reason": one.stop_reason,
                    "token_ids": ids,
                    **prompt,
                }
            )
        asked = chat and self.asked.get("return_token_ids")
        prompt = {"prompt_token_ids": PROMPT if asked else None}
        return {**self._frame(chat, False), **prompt, "choices": choices, "usage": self._usage()}

    def _usage(self) -> dict[str, int]:
        spent = sum(one.tokens for one in self.branches)
        return {"prompt_tokens": 3, "completion_tokens": spent, "total_tokens": spent + 3}

    async def _stream(self, send, chat: bool) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        chunks = list(self._chunks(chat))
        if self.fails_after is not None:
            chunks = [*chunks[: self.fails_after], {"error": {"message": "broken", "code": 500}}]
        events = [b"data: " + json.dumps(chunk).encode() for chunk in chunks]
        whole = b"\n\n".join([b": keep-alive", *events, b"data: [DONE]", b""])
        # Events are cut anywhere on their way.
        for at in range(0, len(whole), 37):
            await send(
                {"type": "http.response.body", "body": whole[at : at + 37], "more_body": True}
            )
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _chunks(self, chat: bool):
        options = self.asked.get("stream_options") or {}
        frame = self._frame(chat, True)

        def chunk(i: int, said: str | None, done: int, **more: Any) -> dict[str, Any]:
            delta = {"role": "assistant", "content": ""} if said is None else {"content": said}
            choice = {"index": i, **({"delta": delta} if chat else {"text": said}), **more}
            usage = {"prompt_tokens": 3, "completion_tokens": done, "total_tokens": 3 + done}
            counted = {"usage": usage} if options.get("continuous_usage_stats") else {}
            return {**frame, "choices": [choice], **counted}

        with_ids = bool(self.asked.get("return_token_ids"))
        if chat:
            for i in range(len(self.branches)):
                prompt = {"prompt_token_ids": PROMPT if with_ids else None}
                yield chunk(i, None, 0, logprobs=None, finish_reason=None) | prompt
        for at in range(max(one.tokens for one in self.branches)):
            for i, one in enumerate(self.branches):
                if at < one.tokens:
                    said = " " * (at > 0) + one.words[at]
                    more = {
                        "logprobs": {"content": [{"token": one.words[at]}]},
                        "finish_reason": None,
                    }
                    if with_ids:
                        more["token_ids"] = one.ids[at : at + 1]
                        more |= {"prompt_token_ids": PROMPT} if at == 0 and not chat else {}
                    if at == one.tokens - 1:
                        more |= {"finish_reason": one.finish, "stop_reason": one.stop_reason}
                    yield chunk(i, said, at + 1, **more)
        if options.get("include_usage"):
            yield {**frame, "choices": [], "usage": self._usage(), "system_fingerprint": "fp"}


class Door:
    """The middleware before a server, with a client."""

    def __init__(self, branches: list[Branch], **options: Any) -> None:
        self.server = Server(branches)
        self.middleware = Middleware(self.server, BranchesConfig(**options))

    def post(self, body: Any, path: str = CHAT) -> httpx.Response:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()

        async def send() -> httpx.Response:
            transport = httpx.ASGITransport(self.middleware)
            async with httpx.AsyncClient(transport=transport, base_url="http://t") as client:
                return await client.post(path, content=content)

        return asyncio.run(send())

    def ask(self, path: str = CHAT, body: Any = None, **fields: Any) -> httpx.Response:
        """A request for as many branches as the server has."""
        fields = {"branches": len(self.server.branches), **fields}
        xargs = {f"trimtab.{name}": value for name, value in fields.items()}
        return self.post({"model": "m", "vllm_xargs": xargs, **(body or {})}, path)


def directly(body: bytes) -> httpx.Response:
    """What the server alone answers."""

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(Server(FOUR))
        async with httpx.AsyncClient(transport=transport, base_url="http://t") as client:
            return await client.post(CHAT, content=body)

    return asyncio.run(ask())


def chunks(answer: httpx.Response) -> list[dict[str, Any]]:
    events = [event for event in answer.text.split("\n\n") if event.startswith("data: {")]
    return [json.loads(event[len("data: ") :]) for event in events]


def streamed_text(answer: httpx.Response, index: int = 0) -> str:
    said = [c for chunk in chunks(answer) for c in chunk.get("choices", ()) if c["index"] == index]
    return "".join(c.get("text") or c.get("delta", {}).get("content") or "" for c in said)


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_one_choice_comes_back_and_it_is_the_best(path):
    door = Door(FOUR)
    answer = door.ask(path).json()
    assert door.server.asked["n"] == 4
    (choice,) = answer["choices"]
    assert "the sum is 8" in (choice.get("text"), choice.get("message", {}).get("content"))
    assert choice["index"] == 0
    assert choice["stop_reason"] == "###"
    assert choice["logprobs"]["content"][-1] == {"token": "8"}
    assert choice["trimtab"] == {
        "branch": 1,
        "fate": "finished",
        "phase": 2,
        "score": 0.9,
        "tokens": 4,
    }
    assert answer["trimtab"] == {
        "branches": 4,
        "enough": 2,
        "answer": "best",
        "extract": "none",
        "fates": {"finished": 3, "pruned": 1},
        "answer_tokens": 4,
    }
    assert answer["usage"]["completion_tokens"] == 13


def test_headers_stay_and_the_length_is_right():
    answer = Door(FOUR).ask()
    assert answer.headers["x-request-id"] == "r1"
    assert int(answer.headers["content-length"]) == len(answer.content)


def test_the_vote_counts_answers_as_numbers():
    choice = Door(FOUR).ask(answer="majority", extract=SUM).json()["choices"][0]
    assert choice["message"]["content"] == "the sum is 7"
    assert (choice["trimtab"]["votes"], choice["trimtab"]["voters"]) == (2, 3)
    assert choice["trimtab"]["answer"] == "7"


def test_all_are_shown_on_request_the_winner_first():
    choices = Door(FOUR).ask(show="all", extract=SUM).json()["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2, 3]
    assert [choice["trimtab"]["branch"] for choice in choices] == [1, 0, 2, 3]
    assert [choice["trimtab"]["fate"] for choice in choices] == ["finished"] * 3 + ["pruned"]
    assert [choice["trimtab"].get("answer") for choice in choices] == ["8", "7", "7.0", None]
    assert [choice["stop_reason"] for choice in choices] == ["###", None, None, None]


def test_each_prompt_gets_its_own_answer():
    door = Door([*FOUR, *FOUR[::-1]])
    choices = door.ask(TEXT, branches=4).json()["choices"]
    assert [choice["index"] for choice in choices] == [0, 1]
    assert [choice["trimtab"]["branch"] for choice in choices] == [1, 2]


@pytest.mark.parametrize("show", ["one", "all"])
@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_a_stream_of_two_prompts_says_what_the_whole_response_says(path, show):
    long = " ".join(f"w{i}" for i in range(200))
    first = [Branch("done at once", score=0.6), Branch("worse", Fate.PRUNED, 0.1)]
    cut = [Branch(long, Fate.LENGTH, 0.7, finish="length"), Branch("no", Fate.PRUNED, 0.2)]
    stopped = [Branch("short", None, stop="x"), Branch("a b", score=0.2, others={0: 0.8})]
    door = Door([*first, *cut, *stopped])
    body = {"stop": ["x"]}
    whole = door.ask(path, body, branches=2, show=show).json()
    stream = door.ask(path, {**body, "stream": True}, branches=2, show=show)
    told = [c for chunk in chunks(stream) for c in chunk["choices"] if "trimtab" in c]
    assert [c["trimtab"] for c in told] == [c["trimtab"] for c in whole["choices"]]
    for choice in whole["choices"]:
        said = choice.get("text") or choice.get("message", {}).get("content")
        assert streamed_text(stream, choice["index"]) == said
    assert chunks(stream)[-1]["trimtab"] == whole["trimtab"]


def test_progress_gives_the_scores_of_siblings_to_the_right_prompts_branches():
    first = [Branch("one two", score=0.6), Branch("one two", score=0.5)]
    second = [Branch("short", None, stop="x"), Branch("a b", score=0.2, others={0: 0.8})]
    door = Door([*first, *second])
    said = chunks(door.ask(TEXT, {"stream": True}, branches=2, progress=1))
    told = [c["trimtab"]["progress"] for c in said if "progress" in c.get("trimtab", {})]
    assert [one["score"] for one in told[-1]["branches"]] == [0.6, 0.5, 0.8, 0.2]


def test_a_branch_that_a_stop_string_ended_has_its_score_from_a_later_note():
    stopped = Branch("short", None, stop="x")
    later = Branch("a longer one", Fate.FINISHED, 0.2, others={0: 0.8})
    door = Door([stopped, later])
    choice = door.ask(show="one", body={"stop": ["x"]}).json()["choices"][0]
    assert door.server.asked["return_token_ids"]
    assert choice["trimtab"] | {"phase": 0} == {
        "branch": 0,
        "fate": "finished",
        "phase": 0,
        "score": 0.8,
        "tokens": 1,
    }
    assert (choice["stop_reason"], choice["token_ids"]) == ("x", None)


def test_tokens_that_no_note_tells_are_the_rest():
    choice = Door([Branch("a b c", None), Branch("d", Fate.FINISHED)]).ask(show="all").json()
    assert {c["trimtab"]["branch"]: c["trimtab"]["tokens"] for c in choice["choices"]} == {
        0: 3,
        1: 1,
    }


def test_tool_calls_are_voted_on_where_nothing_is_said():
    door = Door(FOUR)
    call = {"function": {"name": "add", "arguments": "{}"}}
    told = [None, "x", None, None]
    choices = [
        {
            "index": i,
            "message": {"content": said, "tool_calls": [] if said else [call]},
            "finish_reason": "stop",
            "stop_reason": None,
        }
        for i, said in enumerate(told)
    ]
    door.server.raw = json.dumps({"choices": choices}).encode()
    answer = door.ask(answer="majority").json()
    assert answer["choices"][0]["trimtab"]["votes"] == 3
    assert answer["choices"][0]["trimtab"]["answer"] == "add {}"


@pytest.mark.parametrize(
    ("fields", "body", "param"),
    [
        ({"branches": 0}, {}, "trimtab.branches"),
        ({"branches": 10_000}, {}, "trimtab.branches"),
        ({"branches": 65}, {}, "trimtab.branches"),
        ({"branches": "4"}, {}, "trimtab.branches"),
        ({"branches": True}, {}, "trimtab.branches"),
        ({"enough": 5}, {}, "trimtab.enough"),
        ({"enough": 0}, {}, "trimtab.enough"),
        ({"prune_below": 1.5}, {}, "trimtab.prune_below"),
        ({"prune_below": -0.1}, {}, "trimtab.prune_below"),
        ({"max_pruned": -1}, {}, "trimtab.max_pruned"),
        ({"score_every": 0}, {}, "trimtab.score_every"),
        ({"pruning": "hard"}, {}, "trimtab.pruning"),
        ({"answer": "worst"}, {}, "trimtab.answer"),
        ({"extract": "box"}, {}, "trimtab.extract"),
        ({"extract": "regex:("}, {}, "trimtab.extract"),
        ({"extract": "json:"}, {}, "trimtab.extract"),
        ({"show": "some"}, {}, "trimtab.show"),
        ({"progress": 2}, {}, "trimtab.progress"),
        ({}, {"n": 3}, "n"),
        ({}, {"use_beam_search": True}, "use_beam_search"),
    ],
)
def test_what_is_wrong_is_400_with_the_fields_name(fields, body, param):
    door = Door(FOUR)
    answer = door.ask(body=body, **fields)
    error = answer.json()["error"]
    assert answer.status_code == error["code"] == 400
    assert error["type"] == "BadRequestError"
    assert error["param"] == param
    assert door.server.bodies == []


def test_n_may_repeat_the_number_of_branches():
    assert len(Door(FOUR).ask(body={"n": 4}).json()["choices"]) == 1


@pytest.mark.parametrize(
    "body",
    [
        b'{"n": 4,  "vllm_xargs": {"trimtab.deadline_s": 3}}',
        b'{"n": 4, "stream": true}',
        b'{"vllm_xargs": {"trimtab.enough": 3}}',
        b'{"vllm_xargs": "trimtab.branches"}',
        b'{"vllm_xargs": {"trimtab.branches": 4}, "stream_options": 3}',
        b"trimtab.",
        b"[" * 100_000 + b"trimtab.",
        b"",
        b'{"a": "' + b"trimtab." * (BODY_LIMIT_BYTES // 8) + b'"}',
    ],
    ids=[
        "others",
        "plain stream",
        "no branches",
        "text",
        "options",
        "no json",
        "deep",
        "empty",
        "long",
    ],
)
def test_what_asks_for_no_branches_passes_byte_for_byte(body):
    door = Door(FOUR)
    answer = door.post(body)
    assert door.server.bodies == [body]
    assert answer.content == directly(body).content


def test_other_routes_pass():
    door = Door(FOUR)
    door.ask("/v1/embeddings")
    assert "n" not in door.server.asked


@pytest.mark.parametrize("stream", [True, False])
def test_an_error_of_the_server_passes_as_it_is(stream):
    door = Door(FOUR)
    door.server.status = 404
    answer = door.ask(body={"stream": stream})
    assert answer.status_code == 404
    assert answer.content == b'{"error": {"message": "no", "code": 4}}'


@pytest.mark.parametrize("body", [b"", b"no json", b"[1]", b'{"choices": 3}', b'{"choices": [{}]}'])
def test_a_response_that_is_no_completion_passes(body):
    door = Door(FOUR)
    door.server.raw = body
    assert door.ask().content == body


class TestServersOwnNumber:
    """Where the server's options have n."""

    @pytest.mark.parametrize("body", [{}, {"n": 1}, {"n": None}, {"temperature": 0.7}])
    def test_it_goes_for_requests_that_say_nothing(self, body):
        door = Door(FOUR, n=4, m=3)
        answer = door.post(body).json()
        assert door.server.asked["n"] == door.server.asked["vllm_xargs"]["trimtab.branches"] == 4
        assert len(answer["choices"]) == 1
        assert answer["trimtab"]["enough"] == 3

    @pytest.mark.parametrize("body", [{"n": 2}, {"temperature": 0}, {"use_beam_search": True}])
    def test_others_are_left_alone(self, body):
        door = Door(FOUR, n=4)
        assert "trimtab" not in door.post(body).json()
        assert json.loads(door.server.bodies[0]) == body

    @pytest.mark.parametrize("stream", [True, False])
    def test_one_branch_is_none_and_opts_out(self, stream):
        body = json.dumps({"stream": stream, "vllm_xargs": {"trimtab.branches": 1}}).encode()
        door = Door(FOUR, n=4)
        answer = door.post(body)
        assert door.server.bodies == [body]
        assert answer.content == directly(body).content
        assert "trimtab" not in answer.text.replace("trimtab.branches", "")

    def test_one_branch_of_the_servers_own_is_none_too(self):
        door = Door(FOUR, n=1)
        assert door.post(b"{}").content == directly(b"{}").content
        assert door.server.bodies == [b"{}"]

    def test_a_request_may_ask_for_another(self):
        door = Door(FOUR[:2], n=4)
        assert door.ask().json()["trimtab"]["branches"] == 2

    def test_the_options_are_those_of_the_servers_application(self):
        server = Server(FOUR)
        config = {"trimtab": {"branches": {"n": 4, "show": "all", "answer": "shortest"}}}
        state = SimpleNamespace(vllm_config=SimpleNamespace(additional_config=config))

        async def outer(scope, receive, send):
            await Middleware(server)({**scope, "app": SimpleNamespace(state=state)}, receive, send)

        async def ask() -> httpx.Response:
            transport = httpx.ASGITransport(outer)
            async with httpx.AsyncClient(transport=transport, base_url="http://t") as client:
                return await client.post(CHAT, json={})

        answer = asyncio.run(ask()).json()
        assert len(answer["choices"]) == 4
        assert answer["trimtab"]["answer"] == "shortest"


def test_the_owners_function_finds_the_answers():
    door = Door(FOUR, extractor="posixpath:basename", answer="majority")
    assert door.ask().json()["trimtab"]["extract"] == "the server's"


def test_twice_in_a_row_it_answers_once():
    door = Door(FOUR)
    door.middleware = Middleware(door.middleware, BranchesConfig())
    assert door.ask().json()["choices"][0]["trimtab"]["branch"] == 1


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_a_stream_brings_the_winner_alone(path):
    door = Door(FOUR)
    answer = door.ask(path, {"stream": True})
    said = chunks(answer)
    assert streamed_text(answer) == "the sum is 8"
    assert {choice["index"] for chunk in said for choice in chunk["choices"]} == {0}
    last = said[-1]
    assert last["choices"][0]["finish_reason"] == "stop"
    assert last["choices"][0]["stop_reason"] == "###"
    assert last["choices"][0]["trimtab"]["branch"] == 1
    assert last["trimtab"]["fates"] == {"finished": 3, "pruned": 1}
    assert last["system_fingerprint"] == "fp"
    assert not any("usage" in chunk for chunk in said)
    assert answer.text.startswith(": keep-alive\n\n")
    assert answer.text.endswith("data: [DONE]\n\n")
    tokens = [
        t["token"] for c in said for t in (c["choices"][0]["logprobs"] or {}).get("content", ())
    ]
    assert tokens == ["the", "sum", "is", "8"]


def test_a_stream_ends_with_usage_where_it_is_asked_for():
    options = {"include_usage": True}
    said = chunks(Door(FOUR).ask(body={"stream": True, "stream_options": options}))
    assert said[-1]["usage"]["completion_tokens"] == 13
    assert said[-1]["choices"] == []
    assert not any("usage" in chunk for chunk in said[:-1])
    options["continuous_usage_stats"] = True
    said = chunks(Door(FOUR).ask(body={"stream": True, "stream_options": options}))
    assert said[-2]["usage"]["completion_tokens"] == 4


def test_a_stream_shows_all_on_request():
    answer = Door(FOUR).ask(show="all", body={"stream": True})
    assert [streamed_text(answer, i) for i in range(4)] == [FOUR[i].text for i in (1, 0, 2, 3)]


def test_a_stream_votes():
    answer = Door(FOUR).ask(answer="majority", extract=SUM, body={"stream": True})
    assert streamed_text(answer) == "the sum is 7"


def test_long_streams_come_in_fewer_pieces_and_whole():
    text = " ".join(f"w{i}" for i in range(300))
    answer = Door([Branch(text, score=0.5), Branch("no", score=0.1)]).ask(body={"stream": True})
    assert streamed_text(answer) == text
    assert len(chunks(answer)) == 5


def test_progress_is_told_to_those_who_ask():
    said = chunks(Door(FOUR).ask(progress=1, body={"stream": True}))
    told = [
        chunk["trimtab"]["progress"] for chunk in said if "progress" in chunk.get("trimtab", {})
    ]
    assert [one["running"] for one in told] == [3, 2, 1, 0]
    assert told[0]["branches"][3] == {"branch": 3, "fate": "pruned", "score": 0.1, "tokens": 1}
    assert told[-1]["tokens"] == 13
    silent = said[0]["choices"][0]
    assert (silent["index"], silent["delta"], silent["finish_reason"]) == (0, {}, None)


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_at_the_last_progress_before_the_answer_no_branch_runs(path):
    door = Door([Branch("the answer", score=0.5), Branch("", Fate.WITHHELD)])
    said = chunks(door.ask(path, progress=1, body={"stream": True}))
    told = [n for n, chunk in enumerate(said) if "progress" in chunk.get("trimtab", {})]
    last = said[told[-1]]["trimtab"]["progress"]
    assert last["running"] == 0
    assert [one["fate"] for one in last["branches"]] == ["finished", "withheld"]
    assert len(said) > told[-1] + 1, "the answer comes after it"


def test_a_branch_that_never_started_is_withheld():
    door = Door([Branch("yes", score=0.5), Branch("", Fate.WITHHELD)])
    for path in (CHAT, TEXT):
        said = chunks(door.ask(path, show="all", body={"stream": True}))
        withheld = said[-1]["choices"][0]
        assert withheld["trimtab"] | {"phase": None} == {
            "branch": 1,
            "fate": "withheld",
            "phase": None,
            "score": None,
            "tokens": 0,
        }
        assert withheld["finish_reason"] == "stop"


@pytest.mark.parametrize("after", [0, 3, 9])
def test_an_error_in_mid_stream_passes_and_no_answer_follows(after):
    door = Door(FOUR)
    door.server.fails_after = after
    answer = door.ask(body={"stream": True})
    assert chunks(answer) == [{"error": {"message": "broken", "code": 500}}]
    assert answer.text.endswith("data: [DONE]\n\n")


class Silent:
    """A server that says a first word, then nothing until it is told to end."""

    def __init__(self, leaves: bool) -> None:
        self.ends = asyncio.Event()
        self.leaves = leaves

    async def __call__(self, scope, receive, send):
        await receive()
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        choice = {"index": 0, "delta": {"content": "hm"}, "finish_reason": None}
        chunk = {"id": "c", "object": "chat.completion.chunk", "choices": [choice]}
        said = b"data: " + json.dumps(chunk).encode() + b"\n\n"
        await send({"type": "http.response.body", "body": said, "more_body": True})
        await self.ends.wait()
        if not self.leaves:
            await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})


@pytest.mark.parametrize("progress", [0, 1])
@pytest.mark.parametrize("end", ["done", "leaves", "cancelled"])
def test_a_silent_server_is_spoken_for_until_the_response_is_over(monkeypatch, progress, end):
    monkeypatch.setattr(streaming, "KEEP_ALIVE_S", 0.01)
    monkeypatch.setattr(streaming, "PROGRESS_EVERY_S", 0.01)
    sign = b'"progress"' if progress else b": branches are running\n\n"

    async def run() -> None:
        server, sent, alive = Silent(end == "leaves"), [], asyncio.Event()
        xargs = {"trimtab.branches": 2, "trimtab.progress": progress}
        body = json.dumps({"stream": True, "vllm_xargs": xargs}).encode()

        async def receive():
            return {"type": "http.request", "body": body}

        async def send(message):
            sent.append(message.get("body", b""))
            if sum(sign in part for part in sent) >= 3:
                alive.set()

        scope = {"type": "http", "method": "POST", "path": CHAT, "headers": []}
        serving = asyncio.create_task(Middleware(server, BranchesConfig())(scope, receive, send))
        await alive.wait()
        if end == "cancelled":
            serving.cancel()
        server.ends.set()
        await asyncio.gather(serving, return_exceptions=True)
        assert asyncio.all_tasks() == {asyncio.current_task()}
        if end == "done":
            assert sent[-2:] == [b"data: [DONE]\n\n", b""]

    async def within() -> None:
        async with asyncio.timeout(10):
            await run()

    asyncio.run(within())


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_is_known_to_the_server(stream):
    async def run() -> None:
        server = Server(FOUR)
        server.waits_for_disconnect = True
        body = json.dumps({"stream": stream, "vllm_xargs": {"trimtab.branches": 4}}).encode()
        messages = [{"type": "http.request", "body": body}, {"type": "http.disconnect"}]

        async def receive():
            return messages.pop(0)

        async def send(message):
            raise AssertionError(message)

        scope = {"type": "http", "method": "POST", "path": CHAT, "headers": []}
        await Middleware(server, BranchesConfig())(scope, receive, send)
        assert server.disconnected.is_set()

    asyncio.run(run())


def test_the_text_of_branches_that_cannot_win_is_not_kept():
    long = " ".join(["w"] * 500)
    server = Server([Branch("done", score=0.5), Branch(long, Fate.STOPPED, 0.4)])
    server.asked = {"stream": True}
    asked = what_is_asked({"vllm_xargs": {"trimtab.branches": 2}}, BranchesConfig())

    async def send(message):
        pass

    response = StreamedResponse(send, asked, {})
    asyncio.run(server._stream(response, chat=True))
    assert len(response._branches[1].pieces) == 1


def test_pieces_of_tool_calls_are_put_together():
    def calls(*calls: dict[str, Any]) -> dict[str, Any]:
        return {"delta": {"tool_calls": list(calls)}, "index": 0}

    whole: dict[str, Any] = {}
    merge(whole, calls({"index": 0, "id": "c1", "function": {"name": "add", "arguments": ""}}))
    merge(whole, calls({"index": 0, "function": {"arguments": '{"a"'}}))
    merge(whole, calls({"index": 1, "id": "c2", "function": {"name": "sub", "arguments": "{}"}}))
    merge(whole, calls({"index": 0, "function": {"arguments": ": 1}"}}))
    first, second = whole["delta"]["tool_calls"]
    assert first == {"index": 0, "id": "c1", "function": {"name": "add", "arguments": '{"a": 1}'}}
    assert second["function"]["name"] == "sub"
