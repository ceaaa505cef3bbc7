"""Branches of a small model on real servers: sums of two to five addends.

Every crowd of questions visits all sides in turn with the same arrivals, so that a slow moment of
the machine is shared. Answers are extracted and counted as right or wrong.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from trimtab.branches import sides
from trimtab.branches.answers import Candidate, choose
from trimtab.branches.figures import METRICS, Served, cases_of
from trimtab.branches.settling import BLOCK
from trimtab.branches.sides import (
    BEST_OF_N,
    EARLY_STOP,
    PAPER,
    PRUNING,
    SELF_CONSISTENCY,
    VANILLA,
    WARM_UP_SHARE,
    Side,
    deepconf,
)
from trimtab.branches.tasks import Sum, said, sums
from trimtab.branches.watching import watched
from trimtab.core.benchmark import Case, Options, Progress
from trimtab.core.policy import FIELD_PREFIX
from trimtab.hosts.vllm.server import SMALL_CPU_ENGINE, Server, running, small_cpu_environment
from trimtab.hosts.vllm.small_model import small_model

QUESTIONS, CROWDS = 50, 4
QUICK_QUESTIONS, QUICK_CROWDS = 2, 1
WARM_UP, QUICK_WARM_UP = 12, 1
LOAD = 3.0
"""Questions arrive so many times as fast as self-consistency can answer them."""

SEATS = 32
MOST_TOKENS = 200
SCORE_EVERY = 16
OURS = replace(sides.OURS, answer="weighted")
"""As self-consistency does, ours lets the answers vote."""

BASELINES = (VANILLA, SELF_CONSISTENCY)
OTHERS = (BEST_OF_N, EARLY_STOP, PRUNING, PAPER)
"""These meet the first crowd alone, as DeepConf's rule does, whose threshold comes of a warm-up.

Memory is never short here, so that a rule for that alone would be best-of-N.
"""

QUICK_BASELINES = (SELF_CONSISTENCY,)

_PLAIN = frozenset({VANILLA.name, SELF_CONSISTENCY.name})
"""These ask vLLM for its own ``n``, and vote at the client."""

_FATES = {"stop": "finished", "length": "length"}
_TIMEOUT_S = 1200.0


@dataclass(frozen=True, slots=True)
class Contender:
    """A side, and the address of the server that it asks."""

    side: Side
    url: str


def cases(options: Options, progress: Progress) -> list[Case]:
    """Ours against every baseline on real engines."""
    quick = options.quick
    rivals = [*(QUICK_BASELINES if quick else BASELINES), *(() if quick else OTHERS)]
    number, size = (QUICK_CROWDS, QUICK_QUESTIONS) if quick else (CROWDS, QUESTIONS)
    questions = sums(number * size, options.seed)
    crowds = [questions[at : at + size] for at in range(0, len(questions), size)]
    with tempfile.TemporaryDirectory(prefix="trimtab-bench-") as logs:
        servers = _servers(Path(logs), (*rivals, OURS))
        started = list(servers.values())
        with running(started, lambda: progress("starting vLLM servers")):
            contenders = [Contender(s, servers[_key(s)].url) for s in (*rivals, OURS)]
            warm_up = sums(QUICK_WARM_UP if quick else WARM_UP, options.seed + 1_000_003)
            pace_per_s = _pace(contenders[:1] if quick else contenders, warm_up, progress)
            if not quick:
                url = servers[_key(BEST_OF_N)].url
                progress("scoring whole branches for DeepConf's threshold")
                rivals.append(asyncio.run(_deepconf(url, warm_up)))
                contenders.insert(-1, Contender(rivals[-1], url))
            runs = _rounds(contenders, crowds, LOAD * pace_per_s, options.seed, progress)
    return [
        case
        for rival in rivals
        for case in cases_of(
            f"real/sums/{OURS.name}",
            METRICS,
            rival.name,
            runs[rival.name],
            runs[OURS.name][: len(runs[rival.name])],
        )
    ]


def _servers(logs: Path, sides: Sequence[Side]) -> dict[str, Server]:
    """A server for each configuration that sides need; those of vLLM's own ``n`` need none."""
    keys = {_key(side): side for side in sides if side.name not in _PLAIN}
    return {
        key: Server(
            small_model(),
            logs / f"{side.name}.log",
            [
                *SMALL_CPU_ENGINE,
                *("--max-num-seqs", str(SEATS)),
                *("--block-size", "32"),
                *("--scheduler-cls", "trimtab.hosts.vllm.Scheduler"),
                *("--middleware", "trimtab.branches.Middleware"),
                *("--additional-config", key),
            ],
            small_cpu_environment(),
        )
        for key, side in keys.items()
    }


def _key(side: Side) -> str:
    """What a server that a side asks is configured with."""
    own = OURS if side.name in _PLAIN else side
    options = {**own.options, "score_every": SCORE_EVERY, "extract": "final"}
    return json.dumps({"trimtab": {"branches": options}})


def _pace(contenders: Sequence[Contender], warm_up: Sequence[Sum], progress: Progress) -> float:
    """How many questions self-consistency answers a second; all sides get warm."""
    pace_per_s = 0.0
    for contender in contenders:
        progress(f"measuring how fast this machine is: {contender.side.name}")
        measured = contender.side is SELF_CONSISTENCY
        asked = warm_up if measured else warm_up[:1]
        served = asyncio.run(visit(contender, asked, [0.0] * len(asked)))
        if measured:
            pace_per_s = served.requests_per_s
    return pace_per_s


def _rounds(
    contenders: Sequence[Contender],
    crowds: Sequence[Sequence[Sum]],
    rate_per_s: float,
    seed: int,
    progress: Progress,
) -> dict[str, list[Served]]:
    """What came of each crowd under each side; every crowd begins with another side."""
    runs: dict[str, list[Served]] = {contender.side.name: [] for contender in contenders}
    lasting = [one for one in contenders if one.side in (*BASELINES, OURS)]
    for number, crowd in enumerate(crowds):
        if number:
            contenders = lasting
        gaps = np.random.default_rng((seed, number)).exponential(1 / rate_per_s, len(crowd))
        arrivals_s = np.cumsum(gaps).tolist()
        turn = number % len(contenders)
        for place, contender in enumerate([*contenders[turn:], *contenders[:turn]]):
            done = (number + place / len(contenders)) / len(crowds)
            progress(f"{len(crowd)} questions under {contender.side.name}", done)
            runs[contender.side.name].append(asyncio.run(visit(contender, crowd, arrivals_s)))
    return runs


async def visit(contender: Contender, crowd: Sequence[Sum], arrivals_s: Sequence[float]) -> Served:
    """Asks one side all questions of a crowd as they arrive."""
    served = Served(last_arrival_s=arrivals_s[-1])

    async def ask(client: httpx.AsyncClient, question: Sum, arrival_s: float) -> tuple[float, bool]:
        await asyncio.sleep(max(0.0, began_s + arrival_s - time.monotonic()))
        answer, tokens = await _answer(client, contender, question)
        now_s = time.monotonic() - began_s
        served.tokens += tokens
        served.until_s = max(served.until_s, now_s)
        return now_s - arrival_s, answer == question.answer

    async with _client() as client, watched(client, contender.url, served):
        began_s = time.monotonic()
        asked = (ask(client, *pair) for pair in zip(crowd, arrivals_s, strict=True))
        for latency_s, right in await asyncio.gather(*asked):
            served.latencies_s.append(latency_s)
            served.right.append(right)
    return served


def _client() -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=None)
    return httpx.AsyncClient(timeout=_TIMEOUT_S, limits=limits, trust_env=False)


async def _deepconf(url: str, warm_up: Sequence[Sum]) -> Side:
    """DeepConf's rule with the threshold that whole branches of a warm-up give."""
    shown = replace(BEST_OF_N, fields={**BEST_OF_N.fields, "show": "all"})
    contender = Contender(shown, url)
    async with _client() as client:
        answers = await asyncio.gather(*(_response(client, contender, one) for one in warm_up))
    scores = [
        choice[BLOCK]["score"]
        for answer in answers
        for choice in answer["choices"]
        if choice[BLOCK]["score"] is not None
    ]
    return deepconf(float(np.quantile(scores, WARM_UP_SHARE)))


async def _answer(
    client: httpx.AsyncClient, contender: Contender, question: Sum
) -> tuple[str | None, int]:
    """A side's answer to a question, and how many tokens it cost."""
    content = await _response(client, contender, question)
    candidates = [
        Candidate(
            choice["index"],
            _FATES.get(choice["finish_reason"], ""),
            answer=said(choice["message"]["content"] or ""),
        )
        for choice in content["choices"]
    ]
    winner = choose(candidates, "majority").winner
    return winner.answer, int(content["usage"]["completion_tokens"])


async def _response(
    client: httpx.AsyncClient, contender: Contender, question: Sum
) -> dict[str, Any]:
    """What comes back of a question."""
    side = contender.side
    body: dict[str, Any] = {
        "model": "model",
        "messages": question.messages,
        "temperature": 0.8,
        "top_p": 0.95,
        "max_tokens": MOST_TOKENS,
    }
    if side.name in _PLAIN:
        body["n"] = side.branches
    else:
        fields = {**side.fields, "branches": side.branches, "answer": side.answer}
        body["vllm_xargs"] = {FIELD_PREFIX + name: value for name, value in fields.items()}
    response = await client.post(f"{contender.url}/v1/chat/completions", json=body)
    response.raise_for_status()
    content: dict[str, Any] = response.json()
    return content
