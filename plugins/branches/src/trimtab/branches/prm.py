"""The signal ``prm``: branches scored by a process-reward model behind an HTTP server.

A thread of the engine's process asks the server; the engine only leaves snapshots of its branches
and picks up scores. Nothing that goes wrong there holds a branch up: it goes on unscored.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import httpx

from trimtab.branches.config import PrmOptions
from trimtab.branches.prm_client import PrmClient

Score = tuple[str, int, float]
"""A branch's key, how many output tokens it had, and its score (0 to 1)."""

MOST_WAITING = 256
MOST_UNREAD = 4096

_CLOSES_WITHIN_S = 5.0


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
        self._client = PrmClient(options, "its branches go on unscored")
        self._decode = decode
        self._lock = threading.Lock()
        self._waiting: dict[str, _Snapshot] = {}
        self._scores: deque[Score] = deque(maxlen=MOST_UNREAD)
        self._counts = Counts()
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
        prompt, output = self._client.excerpt(prompt_ids, output_ids)
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
        options = self._client.options
        async with httpx.AsyncClient(timeout=options.timeout_s, trust_env=False) as client:
            asking = [asyncio.create_task(self._ask_on(client)) for _ in range(options.in_flight)]
            await self._closing.wait()
            for task in asking:
                task.cancel()
            await asyncio.gather(*asking, return_exceptions=True)

    async def _ask_on(self, client: httpx.AsyncClient) -> None:
        """Asks about one snapshot after the other."""
        while True:
            await asyncio.sleep(self._client.resting_s)
            snapshot = self._next()
            if snapshot is None:
                self._news.clear()
                await self._news.wait()
                continue
            value = await self._score(client, snapshot)
            if value is None:
                self._count(failed=1)
            else:
                self._scores.append((snapshot.key, snapshot.at_tokens, value))
                self._count(scored=1)

    async def _score(self, http: httpx.AsyncClient, snapshot: _Snapshot) -> float | None:
        try:
            prompt, output = self._decode(snapshot.prompt_ids), self._decode(snapshot.output_ids)
        except Exception as error:
            self._client.failed(error)
            return None
        return await self._client.score(
            http, prompt, output, outdated=lambda: snapshot.key in self._waiting
        )

    def _next(self) -> _Snapshot | None:
        with self._lock:
            key = next(iter(self._waiting), None)
            return None if key is None else self._waiting.pop(key)
