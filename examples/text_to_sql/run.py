"""Questions over real databases, answered through the router by two servers of unequal speed.

python examples/text_to_sql/run.py --workflows 16 --concurrency 8
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import openai
from chain import Chain, Workflow

from trimtab.core.cache import cache_directory
from trimtab.hosts.vllm.small_model import small_model
from trimtab.urgency.text_to_sql.crowd import questions
from trimtab.urgency.text_to_sql.databases import Database, load
from trimtab.urgency.text_to_sql.figures import percentile

POOL = Path(__file__).with_name("pool.yaml")
_ADDRESS = re.compile(r"http://[\w.]+:\d+")


@contextmanager
def pool() -> Iterator[str]:
    """The address of the router before the servers of ``pool.yaml``, with the small model."""
    text = POOL.read_text(encoding="utf-8").replace(": MODEL", f": {small_model()}")
    with tempfile.TemporaryDirectory(prefix="text-to-sql-") as folder:
        file = Path(folder) / "pool.yaml"
        file.write_text(text, encoding="utf-8")
        command = [sys.executable, "-m", "trimtab.cli", "up", str(file), "--logs", folder]
        process = subprocess.Popen(
            [*command, "--port", "0"], stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        try:
            yield _address(process)
        finally:
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=60)


def _address(process: subprocess.Popen[str]) -> str:
    assert process.stderr is not None
    said = []
    for line in process.stderr:
        said.append(line)
        found = _ADDRESS.search(line)
        if found:
            return found[0]
    raise SystemExit("".join(said))


def workflows(databases: tuple[Database, ...], number: int, deadline_s: float) -> list[Workflow]:
    """Questions in turn over all databases."""
    return [
        Workflow(f"w{i}", asked[i // len(databases) % len(asked)], database, deadline_s)
        for i in range(number)
        for database in (databases[i % len(databases)],)
        for asked in (questions()[database.name],)
    ]


async def serve(url: str, asked: list[Workflow], concurrency: int) -> dict[str, float]:
    """Answers all questions, so many at once; returns the figures."""
    seats = asyncio.Semaphore(concurrency)
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", timeout=600) as client:
        chain = Chain(client, "model")
        latencies_s: list[float] = []
        run = in_time = 0

        async def one(workflow: Workflow) -> None:
            nonlocal run, in_time
            async with seats:
                begin_s = time.monotonic()
                found = await chain.answer(workflow)
                latencies_s.append(time.monotonic() - begin_s)
            run += found.error is None
            in_time += latencies_s[-1] <= workflow.deadline_s
            print(f"{workflow.database.name}: {workflow.question}\n  {found.sql}", file=sys.stderr)

        begin_s = time.monotonic()
        await asyncio.gather(*(one(workflow) for workflow in asked))
    return {
        "workflows": len(asked),
        "calls": chain.calls,
        "queries_that_run": run,
        "in_time": in_time,
        "mean_latency_s": sum(latencies_s) / len(latencies_s),
        "p95_latency_s": percentile(latencies_s, 0.95),
        "workflows_per_s": len(asked) / (time.monotonic() - begin_s),
    }


def main() -> None:
    """Starts the pool unless the address of a router or server is given, and asks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", help="of a router or server that runs already, model name: model")
    parser.add_argument("--workflows", type=int, default=16)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--deadline-s", type=float, default=60.0)
    options = parser.parse_args()
    asked = workflows(
        load(cache_directory() / "text-to-sql"), options.workflows, options.deadline_s
    )
    if options.url:
        figures = asyncio.run(serve(options.url, asked, options.concurrency))
    else:
        with pool() as url:
            figures = asyncio.run(serve(url, asked, options.concurrency))
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
