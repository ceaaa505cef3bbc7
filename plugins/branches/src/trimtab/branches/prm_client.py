"""What is said to a process-reward model behind an HTTP server, and how its answers are read."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Sequence

import httpx

from trimtab.branches.config import PrmOptions

logger = logging.getLogger(__name__)

_TRIES = 3
_FIRST_PAUSE_S = 0.1
_FIRST_REST_S = 0.5
_LONGEST_REST_S = 30.0
_RESERVED_TOKENS = 32
"""Room for step tags, and for a tokenizer that needs more tokens than the engine's."""


class Refused(Exception):
    """The server's answer holds no score, and asking again would not change that."""


class PrmClient:
    """Asks a reward model about texts, and lets a server that seems to be down rest.

    Args:
        options: where the model is served.
        unscored: what goes without a score when there is none, for the one warning in the log.
    """

    def __init__(self, options: PrmOptions, unscored: str) -> None:
        self.options = options
        self._unscored = unscored
        self._url = f"{options.url.rstrip('/')}/pooling"
        self._warned = False
        self._rest_s = 0.0
        self._rested_at_s = -math.inf

    @property
    def resting_s(self) -> float:
        """Seconds for which the server is not to be asked."""
        return max(0.0, self._rested_at_s - time.monotonic())

    def excerpt(
        self, prompt_ids: Sequence[int], output_ids: Sequence[int]
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The ends of a prompt and of an output that the model's context holds together."""
        room = self.options.context_tokens - _RESERVED_TOKENS
        prompt = tuple(prompt_ids[-(room // 2) :])
        return prompt, tuple(output_ids[-(room - len(prompt)) :])

    async def score(
        self,
        http: httpx.AsyncClient,
        prompt: str,
        output: str,
        outdated: Callable[[], bool] = lambda: False,
    ) -> float | None:
        """How good the last step of an output is (0 to 1); None where no answer says so in time.

        A server that fails is asked again, unless the question is ``outdated`` by then.
        """
        try:
            async with asyncio.timeout(self.options.timeout_s):
                value = await self._score(http, self._question(prompt, output), outdated)
        except TimeoutError:
            self.failed(TimeoutError(f"no answer within {self.options.timeout_s:g} s"))
        except Exception as error:
            self.failed(error)
        else:
            self._rest_s = 0.0
            return value
        return None

    def failed(self, error: Exception) -> None:
        """Takes note of a question without a score; of the first one the log tells."""
        if not self._warned:
            self._warned = True
            logger.warning(
                "The reward model at %s gave no score (%s); %s. This is said once.",
                self.options.url,
                str(error) or type(error).__name__,
                self._unscored,
            )
        now_s = time.monotonic()
        is_down = isinstance(error, httpx.HTTPError | TimeoutError)
        if is_down and now_s >= self._rested_at_s:
            self._rest_s = min(max(2 * self._rest_s, _FIRST_REST_S), _LONGEST_REST_S)
            self._rested_at_s = now_s + self._rest_s

    async def _score(
        self, http: httpx.AsyncClient, asked: dict[str, object], outdated: Callable[[], bool]
    ) -> float:
        """The server's score.

        Raises:
            Refused: the answer holds none.
            httpx.HTTPError: no answer in several tries.
        """
        for again in range(_TRIES):
            try:
                return last_score(await self._answer(http, asked))
            except httpx.HTTPError:
                if again == _TRIES - 1 or outdated():
                    raise
                await asyncio.sleep(_FIRST_PAUSE_S * 2**again)
        raise AssertionError("unreachable")

    def _question(self, prompt: str, output: str) -> dict[str, object]:
        options = self.options
        return {
            "model": options.model,
            "task": "token_classify",
            "input": prompt + tagged(output, end=options.step_end, tag=options.step_tag),
            "add_special_tokens": False,
            "truncate_prompt_tokens": options.context_tokens,
            "truncation_side": "left",
        }

    async def _answer(self, http: httpx.AsyncClient, asked: dict[str, object]) -> object:
        answer = await http.post(self._url, json=asked)
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
