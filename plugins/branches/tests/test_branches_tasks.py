"""The questions of the real benchmark, and how its sides ask a server and read its answers."""

from __future__ import annotations

import asyncio
import json
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.branches import tasks
from trimtab.branches.tasks import FEWEST, LARGEST, MOST, said, sums

addends = st.lists(st.integers(1, LARGEST), min_size=FEWEST, max_size=MOST)


@given(addends)
def test_every_step_of_a_worked_sum_is_right_and_the_last_is_the_sum(given_addends) -> None:
    once, both_ends = tasks.plainly(given_addends), tasks.checked(given_addends)
    for worked in (once, both_ends):
        steps = [line.split() for line in worked.splitlines() if "=" in line]
        assert all(int(a) + int(b) == int(c) for a, _, b, _, c in steps)
        assert int(steps[-1][-1]) == sum(given_addends)
    assert len(both_ends) > 2 * len(once)


@pytest.mark.parametrize("length", range(FEWEST, MOST + 1))
def test_the_examples_are_right_and_as_long_as_the_question(length) -> None:
    shown = tasks.examples(length)
    for question, answer in zip(shown[::2], shown[1::2], strict=True):
        numbers = [int(w) for w in question["content"].strip("?").split() if w.isdigit()]
        assert len(numbers) == length
        assert said(answer["content"]) == str(sum(numbers))


def test_every_number_of_addends_comes_as_often() -> None:
    drawn = sums(200, 7)
    assert set(Counter(len(question.addends) for question in drawn).values()) == {50}
    assert drawn == sums(200, 7) != sums(200, 8)
    assert drawn[0].messages[-1]["content"] == drawn[0].question


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("3 + 4 = 7\nFinal answer: 7", "7"),
        ("Final answer: 6\nNo, the answer: 07", "7"),
        ("Final answer: seven", None),
        ("", None),
    ],
)
def test_the_last_answer_counts(text, answer) -> None:
    assert said(text) == answer


class Handler(BaseHTTPRequestHandler):
    """Answers right: one choice for branches, and for a plain request most of its choices."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append(body)  # type: ignore[attr-defined]
        asked = body["messages"][-1]["content"]
        right = sum(int(word) for word in asked.strip("?").split() if word.isdigit())
        told = [right, right, right, *range(body.get("n", 1))][: body.get("n", 1)]
        choices = [
            {
                "index": index,
                "finish_reason": "stop",
                "message": {"content": f"Final answer: {number}"},
            }
            for index, number in enumerate(told)
        ]
        content = json.dumps({"choices": choices, "usage": {"completion_tokens": 5}}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Any]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.bodies = []  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_each_side_asks_in_its_own_way_and_answers_are_counted(server) -> None:
    pytest.importorskip("httpx")
    from trimtab.branches import real_bench
    from trimtab.branches.sides import OURS, SELF_CONSISTENCY

    crowd = sums(5, 1)
    url = f"http://127.0.0.1:{server.server_address[1]}"
    for side in (SELF_CONSISTENCY, OURS):
        contender = real_bench.Contender(side, url)
        served = asyncio.run(real_bench.visit(contender, crowd, [0.0, 0.0, 0.01, 0.02, 0.03]))
        assert served.right == [True] * 5
        assert served.tokens == 25
        assert len(served.latencies_s) == 5
        assert served.requests_per_s > 0
    plain, ours = server.bodies[0], server.bodies[-1]
    assert plain["n"] == 8
    assert "vllm_xargs" not in plain
    assert ours["vllm_xargs"]["trimtab.branches"] == 8
    assert "n" not in ours
