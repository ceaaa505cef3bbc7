"""Branches in vLLM's real scheduler under the scores of a stand-in reward model, and of none."""

from __future__ import annotations

import json
import logging
import math
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from trimtab.branches.note import Fate, Note
from trimtab.hosts.vllm.dry_engine import DryEngine
from trimtab.hosts.vllm.scheduler import Scheduler

pytestmark = pytest.mark.integration

BRANCHES = 4
LENGTH = 2500


class Handler(BaseHTTPRequestHandler):
    """Finds every text bad but those that begin with the good prompt."""

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        content = json.dumps({"data": [{"data": [self.row(asked["input"])]}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def row(self, text: str) -> list[float]:
        return [0.1, 0.9] if text.startswith("5") else [0.9, 0.1]

    def log_message(self, *args: object) -> None:
        pass


class NoNumbers(Handler):
    """Answers at once, and with nothing."""

    asked = 0

    def row(self, text: str) -> list[float]:
        type(self).asked += 1
        return [math.nan, math.nan]


class TooLate(Handler):
    """Answers when nobody waits any more, and would have all pruned."""

    asked = 0
    over = threading.Event()

    def row(self, text: str) -> list[float]:
        type(self).asked += 1
        self.over.wait()
        return [0.9, 0.1]

    def do_POST(self) -> None:
        with suppress(ConnectionError):
            super().do_POST()


@contextmanager
def served(handler: type[Handler]) -> Iterator[str]:
    TooLate.over.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            TooLate.over.set()
            server.shutdown()
            thread.join()


@pytest.fixture
def model() -> Iterator[str]:
    with served(Handler) as url:
        yield url


@pytest.fixture
def nobody() -> Iterator[str]:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"


def fates(
    url: str, prompts: dict[str, int], length: int = LENGTH, timeout_s: float = 60.0
) -> dict[str, Counter[Fate]]:
    """How the branches of requests end; each prompt is one token over and over."""
    options: dict[str, Any] = {
        "signals": {"prm": 1.0},
        "prm": {"url": url, "model": "prm", "timeout_s": timeout_s},
        "pruning": "paper",
        "score_every": 20,
        "m": BRANCHES,
    }
    dry = DryEngine(Scheduler, additional_config={"trimtab": {"branches": options}}, blocks=2000)
    pool = dry.scheduler.kv_cache_manager.block_pool
    free = pool.get_num_free_blocks()
    for name, token in prompts.items():
        for index in range(BRANCHES):
            dry.add(
                f"{index}_{name}",
                [token] * 40,
                length + 100,
                xargs={"trimtab.branches": BRANCHES},
                ends_after=length,
            )
    ended: dict[str, Counter[Fate]] = {name: Counter() for name in prompts}
    while dry.scheduler.get_num_unfinished_requests():
        time.sleep(0.0005)  # a step of a model, in which the answers come
        for client in dry.step()[1].values():
            for output in client.outputs:
                if output.finish_reason is not None:
                    note = Note.read(output.stop_reason)
                    name = output.request_id.split("_")[1]
                    ended[name][note.fate if note else Fate.FINISHED] += 1
    dry.drain()
    assert pool.get_num_free_blocks() == free
    return ended


def test_branches_are_pruned_by_what_the_model_says(model) -> None:
    ended = fates(model, {"good": 5, "bad": 6})
    assert ended["good"] == {Fate.FINISHED: BRANCHES}
    assert ended["bad"][Fate.PRUNED] >= 1
    assert ended["bad"][Fate.FINISHED] >= 1


def test_where_nobody_answers_all_branches_go_on_and_it_is_said_once(nobody, caplog) -> None:
    with caplog.at_level(logging.WARNING, "trimtab"):
        ended = fates(nobody, {"some": 5, "others": 6})
    assert ended == {name: {Fate.FINISHED: BRANCHES} for name in ("some", "others")}
    told = [r for r in caplog.records if "go on unscored" in r.getMessage()]
    assert len(told) == 1


@pytest.mark.parametrize(
    ("handler", "why", "timeout_s"),
    [(NoNumbers, "not finite", 60.0), (TooLate, "no answer", 0.1)],
)
def test_a_model_that_is_slow_or_says_nothing_leaves_the_branches_unscored(
    handler: type[NoNumbers | TooLate],
    why: str,
    timeout_s: float,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING, "trimtab"), served(handler) as url:
        ended = fates(url, {"some": 5, "others": 6}, timeout_s=timeout_s)
    assert handler.asked
    assert ended == {name: {Fate.FINISHED: BRANCHES} for name in ("some", "others")}
    told = [r.getMessage() for r in caplog.records if "go on unscored" in r.getMessage()]
    assert len(told) == 1
    assert why in told[0]
