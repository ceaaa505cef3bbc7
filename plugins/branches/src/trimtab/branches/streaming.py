"""The response of a request that streams: branches are gathered, then the winner's chunks sent."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from trimtab.branches.answers import FINISHED
from trimtab.branches.asked import Asked
from trimtab.branches.late_scores import LateScores
from trimtab.branches.note import Note
from trimtab.branches.settling import BLOCK, Ended, Settled, fate, settle, summary
from trimtab.hosts.vllm.middleware import Message, Send

PIECE_CHUNKS = 64
"""Chunks of a branch that are kept and sent as one: a chunk's frame is longer than its token."""

PROGRESS_EVERY_S = 0.5
KEEP_ALIVE_S = 10.0

_END = b"\n\n"
_DATA = b"data:"
_DONE = b"[DONE]"
_FRAME = ("id", "object", "created", "model")
_NO_EXTRAS = frozenset({*_FRAME, "choices", "usage", "system_fingerprint"})
_IDS = ("token_ids", "prompt_token_ids")
_BESIDE_TEXT = frozenset({"logprobs", *_IDS})
_WHOLE_STRINGS = frozenset({"id", "type", "role", "name", "finish_reason"})

Json = dict[str, Any]


@dataclass(slots=True)
class _Branch:
    """What has come of a branch."""

    pieces: list[Json] = field(default_factory=list)
    """Chunks without their frame, each with one choice, neighbours merged."""
    merged: int = 0
    tokens: int = 0
    fate: str | None = None
    score: float | None = None
    ids: list[int] = field(default_factory=list)
    """Its tokens, where a score may still be asked for."""

    def take(self, extras: Json, choice: Json) -> None:
        """Adds a chunk's choice, and what the chunk says beside its frame."""
        piece = {**extras, "choice": choice}
        if self.pieces and self.merged < PIECE_CHUNKS:
            merge(self.pieces[-1], piece)
            self.merged += 1
        else:
            self.pieces.append(piece)
            self.merged = 1

    def whole(self) -> Json:
        """The choice with all of its text, and without what an answer does not depend on."""
        choice: Json = {}
        for piece in self.pieces:
            said = {k: v for k, v in piece["choice"].items() if k not in _BESIDE_TEXT}
            merge(choice, deepcopy(said))
        return choice


class StreamedResponse:
    """Takes the server's stream and sends the client's; errors pass as they are.

    What is kept is the branches' text (and the logprobs that the client asked for), and of branches
    that cannot win any more nothing.

    Args:
        send: to the client.
        asked: what the request asks.
        options: the client's own ``stream_options``.
        clock: seconds that never go back.
        hide_ids: whether the client did not ask for the token ids that the chunks have.
        late: asks for scores that the engine still waited for.
    """

    def __init__(
        self,
        send: Send,
        asked: Asked,
        options: Mapping[str, Any],
        clock: Callable[[], float] = time.monotonic,
        *,
        hide_ids: bool = False,
        late: LateScores | None = None,
    ) -> None:
        self._send = send
        self._asked = asked
        self._usage_wanted = bool(options.get("include_usage"))
        self._running_usage = self._usage_wanted and bool(options.get("continuous_usage_stats"))
        self._clock = clock
        self._hide_ids = hide_ids
        self._late = late
        self._prompt_ids: dict[int, list[int]] = {}
        """By the number of the prompt."""
        self._turn = asyncio.Lock()
        """Whose turn it is to write: what the server says, or a sign of life."""
        self._talk: asyncio.Task[None] | None = None
        self._streams = False
        self._failed = False
        self._unread = b""
        self._frame: Json = {}
        self._branches: dict[int, _Branch] = {}
        self._usage: Json | None = None
        self._sent_s = clock()

    async def __call__(self, message: Message) -> None:
        """Takes a message of the server, as ASGI has it."""
        if message["type"] == "http.response.start":
            self._streams = _is_stream(message)
            await self._send(message)
            if self._streams:
                self._talk = asyncio.create_task(self._talk_on())
        elif message["type"] != "http.response.body" or not self._streams:
            await self._send(message)
        else:
            *events, self._unread = (self._unread + message.get("body", b"")).split(_END)
            for event in events:
                await self._event(event)
            if not message.get("more_body"):
                await self.close()
                await self._send({**message, "body": self._unread})

    async def close(self) -> None:
        """No more signs of life: the answer comes, or the client has gone."""
        talk, self._talk = self._talk, None
        if talk is not None:
            talk.cancel()
            await asyncio.gather(talk, return_exceptions=True)

    async def _talk_on(self) -> None:
        """Says now and then that somebody is still here, also while the server is silent."""
        every_s = PROGRESS_EVERY_S if self._asked.progress else KEEP_ALIVE_S
        wait_s = every_s
        while True:
            await asyncio.sleep(wait_s)
            wait_s = every_s - (self._clock() - self._sent_s)
            if wait_s <= 0:
                await self._tell()
                wait_s = every_s

    async def _write(self, event: bytes) -> None:
        body = {"type": "http.response.body", "body": event + _END, "more_body": True}
        async with self._turn:
            self._sent_s = self._clock()
            await self._send(body)

    async def _write_chunk(self, chunk: Json) -> None:
        text = json.dumps(chunk, ensure_ascii=False, separators=(",", ":"))
        await self._write(_DATA + b" " + text.encode())

    async def _event(self, event: bytes) -> None:
        data = event[len(_DATA) :].strip() if event.startswith(_DATA) else b""
        if data == _DONE and not self._failed and self._branches:
            await self._answer()
        if data == _DONE:
            await self.close()
        chunk = _chunk(data)
        if chunk is None:
            self._failed |= data not in (b"", _DONE)
            await self._write(event)
        elif chunk["choices"]:
            await self._gather(chunk)
        else:
            self._usage = chunk

    async def _gather(self, chunk: Json) -> None:
        self._frame = self._frame or {key: chunk[key] for key in _FRAME if key in chunk}
        extras = {key: value for key, value in chunk.items() if key not in _NO_EXTRAS}
        if self._late is not None:
            self._keep_ids(chunk)
        if self._hide_ids:
            for part in (extras, *chunk["choices"]):
                for name in _IDS:
                    part.pop(name, None)
        usage = chunk.get("usage") or {}
        if self._running_usage:
            extras["usage"] = usage
        ended = False
        for choice in chunk["choices"]:
            branch = self._branches.setdefault(choice["index"], _Branch())
            branch.take(extras, choice)
            branch.tokens = usage.get("completion_tokens", branch.tokens)
            if choice.get("finish_reason") is not None:
                ended = True
                self._end(choice["index"], choice)
        if ended and self._asked.progress:
            await self._write_chunk(self._progress())

    def _keep_ids(self, chunk: Json) -> None:
        """Remembers the tokens that a score may be asked for."""
        for choice in chunk["choices"]:
            index = choice["index"]
            prompt = choice.get("prompt_token_ids") or chunk.get("prompt_token_ids")
            if prompt:
                self._prompt_ids.setdefault(index // self._asked.branches, list(prompt))
            branch = self._branches.setdefault(index, _Branch())
            branch.ids.extend(choice.get("token_ids") or ())

    def _end(self, index: int, choice: Json) -> None:
        note = Note.read(choice.get("stop_reason"))
        branch, number = self._branches[index], self._asked.branches
        branch.fate = fate(choice["finish_reason"], note)
        first = index // number * number
        if note is not None:
            branch.score = note.score
            for i, score in note.others.items():
                if first + i in self._branches:
                    self._branches[first + i].score = score
        if branch.fate != FINISHED:
            branch.ids.clear()
        if self._asked.show_all:
            return
        siblings = [one for i, one in self._branches.items() if first <= i < first + number]
        if any(one.fate == FINISHED for one in siblings):
            for one in siblings:
                if one.fate not in (None, FINISHED):
                    del one.pieces[:-1]

    async def _tell(self) -> None:
        """Says how the branches are getting on, or at least that somebody is still here."""
        if self._failed:
            return
        if self._asked.progress and self._frame:
            await self._write_chunk(self._progress())
        elif self._clock() - self._sent_s >= KEEP_ALIVE_S:
            await self._write(b": branches are running")

    def _progress(self) -> Json:
        told = [
            {"branch": i, "fate": one.fate, "score": one.score, "tokens": one.tokens}
            for i, one in sorted(self._branches.items())
        ]
        running = sum(one.fate is None for one in self._branches.values())
        tokens = sum(one.tokens for one in self._branches.values())
        progress = {"running": running, "tokens": tokens, "branches": told}
        return {**self._frame, "choices": [self._silent()], BLOCK: {"progress": progress}}

    def _silent(self) -> Json:
        """A choice that says nothing: clients that look at the first choice find one."""
        said: Json = {"text": ""} if self._completes() else {"delta": {}}
        return {"index": 0, **said, "logprobs": None, "finish_reason": None}

    def _completes(self) -> bool:
        return self._frame.get("object") == "text_completion"

    async def _answer(self) -> None:
        """Chooses, and sends what the client gets."""
        number = self._asked.branches
        prompts = max(self._branches) // number + 1
        groups = [
            [self._branches.setdefault(prompt * number + i, _Branch()) for i in range(number)]
            for prompt in range(prompts)
        ]
        await self._end_silent_ones()
        ended = [
            [_ended(one, self._prompt_ids.get(prompt)) for one in group]
            for prompt, group in enumerate(groups)
        ]
        if self._late is not None:
            ended = await self._late.added(ended)
        # The extractors may take a while: they must not hold up the server's other requests.
        settled = await asyncio.to_thread(lambda: [settle(group, self._asked) for group in ended])
        await self.close()
        told = summary(settled, self._asked)
        index = 0
        for group, one in zip(groups, settled, strict=True):
            for i in one.shown:
                await self._send_branch(group[i], i, one, index, told)
                index += 1
        if self._usage is not None and self._usage_wanted:
            await self._write_chunk(self._usage)

    async def _end_silent_ones(self) -> None:
        """Of a branch without tokens the server sends no last chunk: it is over all the same."""
        silent = [one for one in self._branches.values() if one.fate is None]
        for one in silent:
            one.fate = fate(None, None, one.tokens)
        if silent and self._asked.progress:
            await self._write_chunk(self._progress())

    async def _send_branch(
        self, branch: _Branch, i: int, settled: Settled, index: int, told: Json
    ) -> None:
        pieces = branch.pieces or [{"choice": self._silent()}]
        for piece in pieces:
            extras = {key: value for key, value in piece.items() if key != "choice"}
            choice = {**piece["choice"], "index": index}
            if piece is pieces[-1]:
                choice["finish_reason"] = choice.get("finish_reason") or "stop"
                choice["stop_reason"] = settled.stops[i]
                choice[BLOCK] = settled.told[i]
                extras |= {BLOCK: told, **self._fingerprint()}
            await self._write_chunk({**self._frame, **extras, "choices": [choice]})

    def _fingerprint(self) -> Json:
        """The server's own name, which stands in a chunk of usage where there is one."""
        name = (self._usage or {}).get("system_fingerprint")
        return {} if name is None or self._usage_wanted else {"system_fingerprint": name}


def _is_stream(start: Message) -> bool:
    kind = dict(start.get("headers", ())).get(b"content-type", b"")
    return bool(start["status"] == 200 and kind.startswith(b"text/event-stream"))


def _chunk(data: bytes) -> Json | None:
    """A chunk of a completion; None for comments, errors and whatever else there is."""
    try:
        chunk = json.loads(data) if data.startswith(b"{") else None
    except ValueError:
        return None
    return chunk if isinstance(chunk, dict) and isinstance(chunk.get("choices"), list) else None


def _ended(branch: _Branch, prompt_ids: list[int] | None) -> Ended:
    known = prompt_ids is not None and branch.ids
    return Ended(
        branch.whole(), branch.tokens, ids=(prompt_ids or (), branch.ids) if known else None
    )


def merge(into: Json, later: Mapping[str, Any]) -> None:
    """Adds what a later chunk says to an earlier one: texts and lists grow, the rest gives way."""
    for key, value in later.items():
        known = into.get(key)
        if known is None or value is None:
            into[key] = known if value is None else value
        elif isinstance(value, dict):
            merge(known, value)
        elif key == "tool_calls":
            into[key] = _merged_calls(known, value)
        elif isinstance(value, list):
            known.extend(value)
        elif isinstance(value, str) and key not in _WHOLE_STRINGS:
            into[key] = known + value
        else:
            into[key] = value


def _merged_calls(known: list[Json], later: list[Json]) -> list[Json]:
    calls = {call.get("index"): call for call in known}
    for call in later:
        if call.get("index") in calls:
            merge(calls[call.get("index")], call)
        else:
            calls[call.get("index")] = call
    return list(calls.values())
