"""The level without private surface: a stock server with its priority policy and our middleware."""

from __future__ import annotations

import re
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from openai import BadRequestError, OpenAI

from trimtab.hosts.vllm.server import SMALL_CPU_ENGINE, Server, small_cpu_environment
from trimtab.hosts.vllm.small_model import small_model

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    log = tmp_path_factory.mktemp("log") / "server.log"
    arguments = [
        *SMALL_CPU_ENGINE,
        *("--max-num-seqs", "1"),
        *("--scheduling-policy", "priority"),
        *("--middleware", "trimtab.urgency.PriorityMiddleware"),
    ]
    with Server(small_model(), log, arguments, small_cpu_environment()) as server:
        server.wait_ready()
        yield OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def ask(client: OpenAI, tokens: int, deadline_ms: int | None = None) -> float:
    """Completes something, and says when it was done."""
    headers = {} if deadline_ms is None else {"X-Workflow-Deadline-Ms": str(deadline_ms)}
    client.completions.create(
        model="model",
        prompt="The colours of the rainbow are",
        max_tokens=tokens,
        temperature=0,
        extra_body={"ignore_eos": True},
        extra_headers=headers,
    )
    return time.monotonic()


def waiting(client: OpenAI) -> float:
    """How many calls wait in the engine."""
    text = httpx.get(str(client.base_url.join("/metrics"))).text
    found = re.findall(r"^vllm:num_requests_waiting\{[^}]*\} (\S+)$", text, re.MULTILINE)
    return sum(map(float, found))


def test_calls_are_served_by_deadline(client):
    deadlines_ms = [90_000, None, 20_000, 40_000]
    blocker = client.completions.create(
        model="model",
        prompt="The colours of the rainbow are",
        max_tokens=900,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    next(iter(blocker))
    with ThreadPoolExecutor(8) as pool:
        asked = []
        for deadline_ms in deadlines_ms:
            asked.append(pool.submit(ask, client, 16, deadline_ms))
            while waiting(client) < len(asked):
                assert not asked[0].done(), "nothing waited, so the order shows nothing"
                time.sleep(0.02)
        blocker.close()
        done_s = [call.result() for call in asked]
    order = sorted(range(4), key=lambda i: done_s[i])
    assert [deadlines_ms[i] for i in order] == [20_000, 40_000, None, 90_000]


def test_streams_arrive_whole(client):
    stream = client.chat.completions.create(
        model="model",
        messages=[{"role": "user", "content": "Say hello."}],
        max_tokens=6,
        stream=True,
        stream_options={"include_usage": True},
        extra_headers={"X-Workflow-ID": "w", "X-Workflow-Stage": "greet"},
    )
    chunks = list(stream)
    assert chunks[-1].usage.completion_tokens <= 6
    assert any(chunk.choices and chunk.choices[0].delta.content for chunk in chunks)


def test_a_bad_deadline_is_refused_by_the_headers_name(client):
    with pytest.raises(BadRequestError, match="X-Workflow-Deadline-Ms"):
        client.completions.create(
            model="model",
            prompt="x",
            extra_headers={"X-Workflow-Deadline-Ms": "soon"},
        )


def test_a_body_that_is_no_json_gets_the_servers_own_answer(client):
    answer = httpx.post(
        f"{client.base_url}completions",
        content=b"{",
        headers={"X-Workflow-ID": "w", "Content-Type": "application/json"},
    )
    assert answer.status_code in (400, 422)
