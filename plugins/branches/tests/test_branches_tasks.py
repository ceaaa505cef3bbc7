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
from trimtab.branches.tasks import FEWEST, MOST, WORDS, counts, examples, said

words = st.lists(st.sampled_from(WORDS), min_size=FEWEST, max_size=MOST, unique=True)


@given(words, st.sampled_from([tasks.plainly, tasks.slowly, tasks.twice]))
def test_every_way_to_count_names_each_word_and_comes_to_their_number(given_words, told) -> None:
    counted = told(given_words).replace(",", "").replace(".", "").split()
    assert set(given_words) <= set(counted)
    assert [int(word) for word in counted if word.isdigit()][-1] == len(given_words)


def test_the_examples_are_right_and_of_different_lengths() -> None:
    asked, worked = examples()[::2], examples()[1::2]
    lengths = set()
    for question, answer in zip(asked, worked, strict=True):
        assert said(answer["content"]) == str(question["content"].count(",") + 1)
        lengths.add(len(answer["content"]))
    assert max(lengths) > 3 * min(lengths)


def test_questions_differ_and_every_length_comes_as_often() -> None:
    drawn = counts(200, 7)
    assert len(set(drawn)) == 200
    assert set(Counter(len(question.words) for question in drawn).values()) == {50}
    assert drawn == counts(200, 7) != counts(200, 8)
    assert drawn[0].messages[-1]["content"].startswith("How many words")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("cat 1. sun 2. The answer is 2.", "2"),
        ("The answer is 6. No, the answer is 07.", "7"),
        ("The answer is seven.", None),
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
        right = body["messages"][-1]["content"].count(",") + 1
        told = [right, right, *range(body.get("n", 1))][: body.get("n", 1)]
        choices = [
            {
                "index": index,
                "finish_reason": "stop",
                "message": {"content": f"The answer is {number}."},
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

    crowd = counts(5, 1)
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
