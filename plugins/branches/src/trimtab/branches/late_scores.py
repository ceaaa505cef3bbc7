"""Scores that the engine still waited for when the response was put together."""

from __future__ import annotations

import asyncio
import ssl
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace

import httpx

from trimtab.branches.answers import FINISHED
from trimtab.branches.config import BranchesConfig, PrmOptions
from trimtab.branches.prm_client import PrmClient
from trimtab.branches.settling import Ended, awaited, fate, notes_of

Decode = Callable[[Sequence[int]], str]
"""The text of tokens; called in a thread, by one caller at a time."""


class LateScores:
    """Asks the reward model about finished branches whose answer came too late for the engine.

    All are asked about at once, for no longer than ``timeout_s``; where there is no answer the
    engine's last score counts.

    Args:
        options: where the model is served.
        weight: of the signal ``prm`` in a score.
        alone: whether it is the only signal.
        decode: the text of the engine's tokens.
    """

    def __init__(self, options: PrmOptions, weight: float, *, alone: bool, decode: Decode) -> None:
        self._client = PrmClient(options, "the engine's last scores count")
        self._weight = weight
        self._alone = alone
        self._decode = decode
        self._decoding = threading.Lock()
        self._encryption: ssl.SSLContext | None = None

    @staticmethod
    def of(config: BranchesConfig, decode: Decode) -> LateScores | None:
        """What the options name; None without a reward model."""
        weight = config.signals.get("prm")
        if config.prm is None or weight is None:
            return None
        return LateScores(config.prm, weight, alone=len(config.signals) == 1, decode=decode)

    async def added(self, groups: Sequence[Sequence[Ended]]) -> list[list[Ended]]:
        """The branches of each prompt, with the scores that are known now."""
        asked = [
            (group, i, known)
            for group, branches in enumerate(groups)
            for i, known in self._awaited(branches).items()
            if branches[i].ids is not None
        ]
        scored = [list(branches) for branches in groups]
        if not asked or self._client.resting_s:
            return scored
        if self._encryption is None:
            self._encryption = await asyncio.to_thread(httpx.create_ssl_context, trust_env=False)
        limit_s = self._client.options.timeout_s
        async with httpx.AsyncClient(
            timeout=limit_s, trust_env=False, verify=self._encryption
        ) as http:
            values = await asyncio.gather(
                *(self._value(http, groups[group][i]) for group, i, _ in asked)
            )
        for (group, i, (total, weights)), value in zip(asked, values, strict=True):
            if value is not None:
                score = (total + self._weight * value) / (weights + self._weight)
                scored[group][i] = replace(groups[group][i], score=score)
        return scored

    def _awaited(self, group: Sequence[Ended]) -> dict[int, tuple[float, float]]:
        notes = notes_of(group)
        known = awaited(notes)
        if self._alone:  # of one that a stop string ended, no note says what else is known of it
            for i, one in enumerate(group):
                ended = fate(one.choice.get("finish_reason"), notes[i], one.tokens)
                if notes[i] is None and ended == FINISHED:
                    known[i] = (0.0, 0.0)
        return known

    async def _value(self, http: httpx.AsyncClient, ended: Ended) -> float | None:
        try:
            prompt, output = await asyncio.to_thread(self._texts, ended)
        except Exception as error:
            self._client.failed(error)
            return None
        return await self._client.score(http, prompt, output)

    def _texts(self, ended: Ended) -> tuple[str, str]:
        assert ended.ids is not None
        prompt, output = self._client.excerpt(*ended.ids)
        with self._decoding:
            return self._decode(prompt), self._decode(output)
