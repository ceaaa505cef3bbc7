"""``trimtab up`` with two real servers of unequal speed: routed answers are the servers' own."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from trimtab.hosts.vllm.server import SMALL_CPU_ENGINE, free_port, small_cpu_environment
from trimtab.hosts.vllm.small_model import small_model
from trimtab.urgency.text_to_sql.sides import URGENCY

pytestmark = [pytest.mark.integration, pytest.mark.slow]

SEATS = 2
CHAT = "/v1/chat/completions"


@dataclass
class Routed:
    """The router of a running ``trimtab up``, and the addresses of its servers."""

    process: subprocess.Popen[str]
    url: str
    servers: list[str]
    folder: Path


def options(ports: list[int]) -> dict[str, Any]:
    arguments = [*SMALL_CPU_ENGINE, "--max-num-seqs", SEATS, *URGENCY.arguments]
    threads = {"one": "1", "two": str(os.cpu_count() or 2)}
    return {
        "port": 0,
        "servers": [
            {
                "name": name,
                "model": str(small_model()),
                "port": port,
                "arguments": arguments,
                "environment": {**small_cpu_environment(), "OMP_NUM_THREADS": threads[name]},
            }
            for name, port in zip(threads, ports, strict=True)
        ],
    }


@pytest.fixture(scope="module")
def routed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Routed]:
    folder = tmp_path_factory.mktemp("up")
    ports = [free_port(), free_port()]
    (folder / "urgency.yaml").write_text(json.dumps(options(ports)))
    process = subprocess.Popen(
        [sys.executable, "-m", "trimtab.cli", "up", "urgency.yaml", "--logs", "."],
        cwd=folder,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        url = address(process)
        yield Routed(process, url, [f"http://127.0.0.1:{port}" for port in ports], folder)
    finally:
        process.terminate()
        process.communicate(timeout=200)


def address(process: subprocess.Popen[str]) -> str:
    assert process.stderr is not None
    said = ""
    while not (found := re.search(r"http://[\d.]+:\d+(?=;)", said)):
        line = process.stderr.readline()
        assert line, said
        said += line
    return found[0]


def content(question: str, **more: Any) -> dict[str, Any]:
    message = {"role": "user", "content": question}
    return {"model": "model", "messages": [message], "temperature": 0, "max_tokens": 16, **more}


def text_of(answer: httpx.Response) -> str:
    answer.raise_for_status()
    text: str = answer.json()["choices"][0]["message"]["content"]
    return text


def events_of(answer: httpx.Response) -> list[Any]:
    """A stream's events without what differs from call to call."""
    events = [e.removeprefix("data: ") for e in answer.text.split("\n\n") if e]
    assert events.pop() == "[DONE]"
    parsed = [json.loads(event) for event in events]
    return [{k: v for k, v in e.items() if k not in ("id", "created")} for e in parsed]


def test_routed_answers_are_the_servers_own(routed: Routed) -> None:
    with httpx.Client(timeout=120) as client:
        asked = content("Name three colours.")
        direct = text_of(client.post(routed.servers[0] + CHAT, json=asked))
        assert text_of(client.post(routed.url + CHAT, json=asked)) == direct
        streamed = {**asked, "stream": True, "stream_options": {"include_usage": True}}
        whole = events_of(client.post(routed.servers[0] + CHAT, json=streamed))
        assert events_of(client.post(routed.url + CHAT, json=streamed)) == whole
        models = client.get(routed.url + "/v1/models").json()
        assert [model["id"] for model in models["data"]] == ["model"]


def test_a_crowd_is_answered_whole_by_both_and_waits_at_the_router(routed: Routed) -> None:
    async def ask(client: httpx.AsyncClient, number: int) -> None:
        headers = {
            "x-workflow-id": f"w{number % 6}",
            "x-workflow-stage": "draft",
            "x-workflow-deadline-ms": str(30_000 + 1000 * number),
        }
        asked = content(f"Count to {number}.", stream=True)
        answer = await client.post(routed.url + CHAT, json=asked, headers=headers)
        assert answer.status_code == 200
        assert answer.text.endswith("data: [DONE]\n\n")

    async def crowd() -> list[dict[str, Any]]:
        seen = []
        async with httpx.AsyncClient(timeout=170) as client:
            asking = [asyncio.create_task(ask(client, number)) for number in range(24)]
            while not all(task.done() for task in asking):
                seen.append((await client.get(routed.url + "/trimtab/state")).json())
                await asyncio.sleep(0.2)
            await asyncio.gather(*asking)
        return seen

    seen = asyncio.run(crowd())
    assert max(state["waiting_total"] for state in seen) >= 24 - 2 * SEATS - 4
    for number, name in enumerate(("one", "two")):
        servers = [state["servers"][number] for state in seen]
        assert servers[0]["name"] == name
        assert 1 <= max(server["in_flight"] for server in servers) <= SEATS
        assert max(server["running"] or 0 for server in servers) <= SEATS
        (stage,) = [s for s in servers[-1]["stages"] if s["stage"] == "draft"]
        assert stage["ms_per_token"] > 0


def test_a_client_that_goes_frees_the_engine(routed: Routed) -> None:
    with httpx.Client(timeout=120) as client:
        asked = content("Tell a long story.", stream=True, max_tokens=900, ignore_eos=True)
        before = generated(client, routed)
        with client.stream("POST", routed.url + CHAT, json=asked) as answer:
            next(answer.iter_raw())
        idle = False
        while not idle:
            time.sleep(0.2)
            state = client.get(routed.url + "/trimtab/state").json()["servers"]
            idle = all(server["running"] == 0 and server["in_flight"] == 0 for server in state)
        assert 0 < generated(client, routed) - before < 900, "it went on for nobody"


def generated(client: httpx.Client, routed: Routed) -> float:
    """How many tokens both servers have generated."""
    texts = [client.get(f"{server}/metrics").text for server in routed.servers]
    pattern = r"^vllm:generation_tokens_total\{[^}]*\} (\S+)$"
    return sum(float(found) for text in texts for found in re.findall(pattern, text, re.MULTILINE))


def test_a_wrong_field_is_refused_by_its_name(routed: Routed) -> None:
    headers = {"x-workflow-deadline-ms": "1e15"}
    answer = httpx.post(routed.url + CHAT, json=content("hi"), headers=headers)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "X-Workflow-Deadline-Ms"


def test_a_dead_servers_calls_go_to_the_other_and_a_signal_ends_all(routed: Routed) -> None:
    """The last test: it ends the servers."""
    slow = process_of(routed.servers[0])
    os.kill(slow, signal.SIGKILL)
    with httpx.Client(timeout=120) as client:
        for _ in range(4):
            assert text_of(client.post(routed.url + CHAT, json=content("hi")))
        states = [""]
        while states != ["down", "up"]:
            time.sleep(0.2)
            servers = client.get(routed.url + "/trimtab/state").json()["servers"]
            states = [server["state"] for server in servers]
            assert states[1] == "up"
    routed.process.send_signal(signal.SIGTERM)
    routed.process.communicate(timeout=200)
    assert routed.process.returncode in (143, -signal.SIGTERM)
    until_s = time.monotonic() + 120
    while working_in(routed.folder):
        assert time.monotonic() < until_s
        time.sleep(0.2)


def working_in(folder: Path) -> list[int]:
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "cwd").readlink() == folder:
                found.append(int(process.name))
        except OSError:
            continue
    return found


def process_of(url: str) -> int:
    """The API server that listens on a port, by its command line."""
    port = str(httpx.URL(url).port)
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_text().split("\0")
        except OSError:
            continue
        if "vllm.entrypoints.openai.api_server" in words and port in words:
            return int(process.name)
    raise AssertionError(f"no server listens on port {port}")
