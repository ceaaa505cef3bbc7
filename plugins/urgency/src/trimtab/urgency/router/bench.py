"""What the router adds to a call: a server without a model, asked directly and through it.

Server, router and client are three processes. The client sends at a fixed rate whatever comes back,
so that a router that falls behind shows it; direct and routed rounds take turns, so that a slow
moment of the machine is shared.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

import aiohttp

from trimtab.core.benchmark import Case, Options, Progress
from trimtab.core.errors import TrimtabError
from trimtab.urgency.router.process import listening
from trimtab.urgency.text_to_sql.figures import percentile

RATE_PER_S = 200.0
ROUNDS = 5
ROUND_S = 5.0
QUICK_ROUNDS = 2
QUICK_ROUND_S = 2.0
_WARM_UP_CALLS = 200
_PROMPT = "Which of the tables hold what the question asks for? " * 40


@dataclass(frozen=True, slots=True)
class Round:
    """Seconds from sending to the first byte and to the end, of each call of a round, sorted."""

    first_s: Sequence[float]
    whole_s: Sequence[float]


def router_cases(options: Options, progress: Progress) -> list[Case]:
    """Latency at 200 requests a second, direct and through the router."""
    rounds, round_s = (QUICK_ROUNDS, QUICK_ROUND_S) if options.quick else (ROUNDS, ROUND_S)
    with listening("trimtab.urgency.router.stub") as server:
        arguments = ("trimtab.cli", "route", "--port", "0", "--backend", server)
        with listening(*arguments) as router:
            pairs = asyncio.run(_measure(server, router, rounds, round_s, progress))
    return [
        _case(name, quantity, q, pairs)
        for name, quantity in (("first_byte", "first_s"), ("latency", "whole_s"))
        for q in (0.5, 0.99)
    ]


def _case(name: str, quantity: str, q: float, pairs: Sequence[tuple[Round, Round]]) -> Case:
    found = [
        (percentile(getattr(direct, quantity), q), percentile(getattr(routed, quantity), q))
        for direct, routed in pairs
    ]
    added_ms = sorted(1000 * (routed - direct) for direct, routed in found)
    return Case.compare(
        f"router/rate-{RATE_PER_S:g}",
        f"{name}_p{100 * q:.0f}_s",
        "s",
        "lower",
        "direct",
        found,
        notes=f"the router adds {added_ms[len(added_ms) // 2]:.2f} ms "
        f"({added_ms[0]:.2f} to {added_ms[-1]:.2f} over {len(found)} rounds)",
    )


async def _measure(
    server: str, router: str, rounds: int, round_s: float, progress: Progress
) -> list[tuple[Round, Round]]:
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as session:
        for url in (server, router):
            for _ in range(_WARM_UP_CALLS):
                await _ask(session, url)
        pairs = []
        for number in range(rounds):
            progress(f"{RATE_PER_S:g} requests a second through the router", number / rounds)
            direct = await _round(session, server, round_s)
            pairs.append((direct, await _round(session, router, round_s)))
    return pairs


async def _round(session: aiohttp.ClientSession, url: str, round_s: float) -> Round:
    """One round, at a fixed rate."""
    began_s = time.perf_counter()
    asking = []
    for number in range(int(RATE_PER_S * round_s)):
        await asyncio.sleep(max(0.0, began_s + number / RATE_PER_S - time.perf_counter()))
        asking.append(asyncio.create_task(_ask(session, url)))
    times = await asyncio.gather(*asking)
    return Round(sorted(first_s for first_s, _ in times), sorted(whole_s for _, whole_s in times))


async def _ask(session: aiohttp.ClientSession, url: str) -> tuple[float, float]:
    asked = {"messages": [{"role": "user", "content": _PROMPT}], "stream": True}
    headers = {"X-Workflow-Stage": "bench", "X-Workflow-Deadline-Ms": "60000"}
    sent_s = time.perf_counter()
    async with session.post(f"{url}/v1/chat/completions", json=asked, headers=headers) as answer:
        body = await answer.content.readany()
        first_s = time.perf_counter() - sent_s
        body += await answer.content.read()
    if answer.status != 200 or b"[DONE]" not in body[-32:]:
        raise TrimtabError(f"a call of the benchmark ended with status {answer.status}")
    return first_s, time.perf_counter() - sent_s
