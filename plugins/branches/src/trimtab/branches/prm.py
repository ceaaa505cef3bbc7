"""The signal ``prm``: branches scored by a process-reward model behind an HTTP server.

A thread of the engine's process asks the server; the engine only leaves snapshots of its branches
and picks up scores. Nothing that goes wrong there holds a branch up: it goes on unscored.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import httpx

from trimtab.branches.config import PrmOptions

logger = logging.getLogger(__name__)

Score = tuple[str, int, float]
"""A branch's key, how many output tokens it had, and its score (0 to 1)."""

MOST_WAITING = 256
MOST_UNREAD = 4096

_TRIES = 3
_FIRST_PAUSE_S = 0.1
_FIRST_REST_S = 0.5
_LONGEST_REST_S = 30.0
_CLOSES_WITHIN_S = 5.0
_RESERVED_TOKENS = 32
"""Room for step tags, and for a tokenizer that needs more tokens than the engine's."""


class Refused(Exception):
    """The server's answer holds no score, and asking again would not change that."""


@dataclass(frozen=True, slots=True)
class Counts:
    """What became of the snapshots so far.

    Attributes:
        submitted: snapshots that were left.
        scored: answers that held a score.
        failed: questions without one: too late, refused, or nonsense.
        replaced: snapshots that a newer one of the same branch took the place of.
        dropped: the oldest ones of too many that waited, and those of branches that had ended.
    """

    submitted: int = 0
    scored: int = 0
    failed: int = 0
    replaced: int = 0
    dropped: int = 0


@dataclass(frozen=True, slots=True)
class _Snapshot:
    key: str
    prompt_ids: Sequence[int]
    output_ids: Sequence[int]
    at_tokens: int


class PrmScorer:
    """Asks a reward model for the scores of branches, in a thread of its own.

    `submit`, `forget` and `take` never wait. Of a branch only the newest snapshot is asked about.
    Scores may come late and in any order; their ``at_tokens`` tells.

    Args:
        options: where the model is served.
        decode: the text of the engine's tokens; called in the scorer's thread.
    """

    def __init__(self, options: PrmOptions, decode: Callable[[Sequence[int]], str]) -> None:
        self._options = options
        self._decode = decode
        self._lock = threading.Lock()
        self._waiting: dict[str, _Snapshot] = {}
        self._scores: deque[Score] = deque(maxlen=MOST_UNREAD)
        self._counts = Counts()
        self._warned = False
        self._rest_s = 0.0
        self._rested_at_s = -math.inf
        self._loop = asyncio.new_event_loop()
        self._news = asyncio.Event()
        self._closing = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="trimtab-prm", daemon=True)
        self._thread.start()

    @property
    def counts(self) -> Counts:
        """What became of the snapshots so far."""
        return self._counts

    def submit(self, key: str, prompt_ids: Sequence[int], output_ids: Sequence[int]) -> None:
        """Leaves a snapshot of a branch to be scored.

        Args:
            key: names the branch.
            prompt_ids: its prompt.
            output_ids: what it has generated so far.
        """
        room = self._options.context_tokens - _RESERVED_TOKENS
        prompt = tuple(prompt_ids[-(room // 2) :])
        output = tuple(output_ids[-(room - len(prompt)) :])
        snapshot = _Snapshot(key, prompt, output, len(output_ids))
        with self._lock:
            idle = not self._waiting
            replaced = key in self._waiting
            self._waiting[key] = snapshot
            dropped = len(self._waiting) > MOST_WAITING
            if dropped:
                del self._waiting[next(iter(self._waiting))]
        self._count(submitted=1, replaced=int(replaced), dropped=int(dropped))
        if idle:
            self._wake(self._news)

    def forget(self, keys: Collection[str]) -> None:
        """Withdraws the snapshots of branches that have ended."""
        with self._lock:
            gone = [self._waiting.pop(key, None) for key in keys]
        self._count(dropped=sum(snapshot is not None for snapshot in gone))

    def take(self) -> list[Score]:
        """The scores that have come since the last time."""
        return [self._scores.popleft() for _ in range(len(self._scores))]

    def close(self) -> None:
        """Ends the thread, whatever it waits for; what was submitted stays unscored."""
        self._wake(self._closing)
        self._thread.join(_CLOSES_WITHIN_S)

    def _wake(self, event: asyncio.Event) -> None:
        with suppress(RuntimeError):  # closed meanwhile
            self._loop.call_soon_threadsafe(event.set)

    def _count(self, **more: int) -> None:
        with self._lock:
            now = {name: getattr(self._counts, name) + value for name, value in more.items()}
            self._counts = replace(self._counts, **now)

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        options = self._options
        async with httpx.AsyncClient(timeout=options.timeout_s, trust_env=False) as client:
            asking = [asyncio.create_task(self._ask_on(client)) for _ in range(options.in_flight)]
            await self._closing.wait()
            for task in asking:
                task.cancel()
            await asyncio.gather(*asking, return_exceptions=True)

    async def _ask_on(self, client: httpx.AsyncClient) -> None:
        """Asks about one snapshot after the other."""
        while True:
            await asyncio.sleep(max(0.0, self._rested_at_s - time.monotonic()))
            snapshot = self._next()
            if snapshot is None:
                self._news.clear()
                await self._news.wait()
                continue
            try:
                async with asyncio.timeout(self._options.timeout_s):
                    value = await self._score(client, snapshot)
            except TimeoutError:
                self._failed(TimeoutError(f"no answer within {self._options.timeout_s:g} s"))
            except Exception as error:
                self._failed(error)
            else:
                self._rest_s = 0.0
                self._scores.append((snapshot.key, snapshot.at_tokens, value))
                self._count(scored=1)

    def _next(self) -> _Snapshot | None:
        with self._lock:
            key = next(iter(self._waiting), None)
            return None if key is None else self._waiting.pop(key)

    def _failed(self, error: Exception) -> None:
        """Counts a question without a score, and lets a server that seems to be down rest."""
        self._count(failed=1)
        if not self._warned:
            self._warned = True
            reason = str(error) or type(error).__name__
            logger.warning(
                "The reward model at %s gave no score (%s); its branches go on unscored. "
                "This is said once.",
                self._options.url,
                reason,
            )
        now_s = time.monotonic()
        is_down = isinstance(error, httpx.HTTPError | TimeoutError)
        if is_down and now_s >= self._rested_at_s:
            self._rest_s = min(max(2 * self._rest_s, _FIRST_REST_S), _LONGEST_REST_S)
            self._rested_at_s = now_s + self._rest_s

    async def _score(self, client: httpx.AsyncClient, snapshot: _Snapshot) -> float:
        """The server's score of a snapshot.

        Raises:
            Refused: the answer holds none.
            httpx.HTTPError: no answer in several tries.
        """
        asked = self._question(snapshot)
        for again in range(_TRIES):
            try:
                return last_score(await self._answer(client, asked))
            except httpx.HTTPError:
                if again == _TRIES - 1 or snapshot.key in self._waiting:
                    raise
                await asyncio.sleep(_FIRST_PAUSE_S * 2**again)
        raise AssertionError("unreachable")

    def _question(self, snapshot: _Snapshot) -> dict[str, object]:
        options = self._options
        text = self._decode(snapshot.output_ids)
        steps = tagged(text, end=options.step_end, tag=options.step_tag)
        return {
            "model": options.model,
            "task": "token_classify",
            "input": self._decode(snapshot.prompt_ids) + steps,
            "add_special_tokens": False,
            "truncate_prompt_tokens": options.context_tokens,
            "truncation_side": "left",
        }

    async def _answer(self, client: httpx.AsyncClient, asked: dict[str, object]) -> object:
        answer = await client.post(f"{self._options.url.rstrip('/')}/pooling", json=asked)
        if answer.status_code >= 500 or answer.status_code == 429:
            answer.raise_for_status()
        if answer.status_code != 200:
            raise Refused(f"status {answer.status_code}: {answer.text[:200]}")
        try:
            return answer.json()
        except ValueError:
            raise Refused("its answer is no JSON") from None


def tagged(text: str, *, end: str, tag: str) -> str:
    """A text with a tag after each of its steps; what comes after the last ``end`` is a step too.

    A tag that the text itself holds is left out.
    """
    steps = [step for step in text.replace(tag, "").split(end) if step.strip()]
    return "".join(f"{step}{tag}" for step in steps) or tag


def last_score(answer: object) -> float:
    """How good the last step is (0 to 1) by the answer of ``POST /pooling``.

    Each row is a step tag's, with two columns: bad and good. Rows that are no probabilities are
    taken as logits.

    Raises:
        Refused: the answer has another shape, or a value that is not finite.
    """
    try:
        bad, good = answer["data"][0]["data"][-1]  # type: ignore[index]
        bad, good = float(bad), float(good)
    except (KeyError, IndexError, TypeError, ValueError):
        raise Refused("its answer holds no rows of two numbers, one for each step tag") from None
    if not (math.isfinite(bad) and math.isfinite(good)):
        raise Refused("its answer is not finite")
    if min(bad, good) >= 0 and math.isclose(bad + good, 1.0, abs_tol=1e-3):
        return min(good, 1.0)
    apart = min(max(bad - good, -700.0), 700.0)
    return 1.0 / (1.0 + math.exp(apart))
