"""One server, two policies: branches that end early, and a workflow that must not wait for them.

Four questions ask for six branches each, more than the server has seats; then a workflow of two
short calls arrives that is due soon. It is run twice, the second time saying its deadline.

    python examples/branches_and_urgency/run.py [--json]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
from openai import AsyncOpenAI

from trimtab.branches.tasks import sums
from trimtab.hosts.vllm.server import SMALL_CPU_ENGINE, Server, running, small_cpu_environment
from trimtab.hosts.vllm.small_model import small_model

SEATS = 6
QUESTIONS, BRANCHES, ENOUGH = 4, 6, 2
DEADLINE_S = 15.0
PLUGINS = {"urgency": {}, "branches": {"score_every": 24, "window": 16}}


def server(log: Path) -> Server:
    """A server with both policies; urgency is named first, so it decides the order."""
    arguments = (
        *SMALL_CPU_ENGINE,
        *("--max-num-seqs", str(SEATS), "--block-size", "32"),
        *("--scheduler-cls", "trimtab.hosts.vllm.Scheduler"),
        *("--middleware", "trimtab.hosts.vllm.Middleware"),
        *("--middleware", "trimtab.branches.Middleware"),
        *("--additional-config", json.dumps({"trimtab": PLUGINS})),
    )
    return Server(small_model(), log, arguments, small_cpu_environment())


async def crowd(client: AsyncOpenAI, *, says_deadline: bool) -> dict[str, Any]:
    """The questions and the workflow; how both fared."""
    questions = [asyncio.create_task(ask(client, task.messages)) for task in sums(QUESTIONS, 7)]
    while await branches_inside(client) < QUESTIONS * BRANCHES:
        await asyncio.sleep(0.05)
    workflow_s = await workflow(client, says_deadline=says_deadline)
    answered = sum(question.done() for question in questions)
    fates = Counter(fate for answer in await asyncio.gather(*questions) for fate in answer)
    return {
        "workflow_s": round(workflow_s, 2),
        "questions_answered_before": answered,
        "fates": dict(fates),
    }


async def branches_inside(client: AsyncOpenAI) -> float:
    """How many branches run or wait in the server."""
    async with httpx.AsyncClient() as reader:
        metrics = (await reader.get(str(client.base_url.join("/metrics")))).text
    counts = re.findall(r"^vllm:num_requests_(?:running|waiting)\{.*\} (\S+)$", metrics, re.M)
    return sum(map(float, counts))


async def ask(client: AsyncOpenAI, messages: list[dict[str, str]]) -> list[str]:
    """How the branches of a question ended."""
    said = {"trimtab.branches": BRANCHES, "trimtab.enough": ENOUGH, "trimtab.show": "all"}
    answer = await client.chat.completions.create(
        model="model",
        messages=messages,  # type: ignore[arg-type]
        max_tokens=160,
        temperature=0.8,
        extra_body={"vllm_xargs": said},
    )
    return [choice.model_extra["trimtab"]["fate"] for choice in answer.choices]  # type: ignore[index]


async def workflow(client: AsyncOpenAI, *, says_deadline: bool) -> float:
    """Two calls, one after the other; how long they took in seconds."""
    headers = {"X-Workflow-ID": f"w{says_deadline}"}
    if says_deadline:
        headers["X-Workflow-Deadline-Ms"] = str(int(DEADLINE_S * 1000))
    begun_s = time.monotonic()
    for question in ("Name a colour.", "Name a city."):
        await client.chat.completions.create(
            model="model",
            messages=[{"role": "user", "content": question}],
            max_tokens=8,
            extra_headers=headers,
        )
    return time.monotonic() - begun_s


async def both(url: str) -> dict[str, Any]:
    """The same crowd twice, without and with the deadline."""
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        await ask(client, sums(1, 3)[0].messages)  # what a first request costs counts for neither
        silent = await crowd(client, says_deadline=False)
        return {
            "without_deadline": silent,
            "with_deadline": await crowd(client, says_deadline=True),
        }


def main() -> int:
    """Runs the example."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    wanted = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print("starting a server with the small model", file=sys.stderr)
        with running([server(Path(folder) / "server.log")]) as (started,):
            found = asyncio.run(both(started.url))
    if wanted.json:
        print(json.dumps(found))
        return 0
    for name, figures in found.items():
        fates = ", ".join(f"{count} {fate}" for fate, count in sorted(figures["fates"].items()))
        print(
            f"{name.replace('_', ' ')}: the workflow took {figures['workflow_s']} s, and "
            f"{figures['questions_answered_before']} of the {QUESTIONS} questions that came before "
            f"it were answered earlier; of {QUESTIONS * BRANCHES} branches {fates}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
