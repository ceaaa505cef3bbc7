from __future__ import annotations

import asyncio
import json
import sqlite3
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from statistics import mean

import pytest

pytest.importorskip("openai")

from trimtab.core.errors import TrimtabError
from trimtab.urgency.text_to_sql import simulated
from trimtab.urgency.text_to_sql.agent import Answer
from trimtab.urgency.text_to_sql.crowd import (
    DEADLINE_FACTORS,
    Journey,
    Pace,
    Visit,
    assemble,
    capacity,
    questions,
    tighten,
    visit_all,
)
from trimtab.urgency.text_to_sql.databases import NAMES, Database, Table
from trimtab.urgency.text_to_sql.figures import METRICS, figures, percentile

DATABASES = [
    Database(name, Path("absent.sqlite"), (Table("t", (("a", "TEXT"),)),)) for name in NAMES
]
PACE = Pace({"interactive": 2.0, "report": 5.0}, capacity_per_s=0.5)


class Stub:
    """An OpenAI server that answers each call alike, and keeps what it was asked."""

    served_name = "stub"

    def __init__(self, status: int = 200) -> None:
        asked = self.asked = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                asked.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
                message = {"role": "assistant", "content": "1 FROM nowhere"}
                choice = {"index": 0, "finish_reason": "stop", "message": message}
                usage = {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8}
                body = {"id": "x", "object": "chat.completion", "created": 1, "model": "stub"}
                text = json.dumps({**body, "choices": [choice], "usage": usage}).encode()
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        self.failure: Exception | None = None

    def check(self):
        if self.failure:
            raise self.failure

    def __enter__(self):
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture
def visit(tmp_path):
    """Makes visits to a database that is there."""
    path = tmp_path / "t.sqlite"
    sqlite3.connect(path).close()
    database = replace(DATABASES[0], path=path)

    def make(name: str, kind: str = "interactive", arrival_s: float = 0.0) -> Visit:
        return Visit(name, "Why?", database, kind, arrival_s, 9.0)

    return make


def journey(latency_s: float, deadline_s: float = 10.0) -> Journey:
    asked = Visit("w", "Why?", DATABASES[0], "interactive", 0.0, deadline_s)
    return Journey(asked, latency_s, Answer(stages=["schema"]), 4)


def test_the_same_seed_makes_the_same_crowd_and_another_another():
    crowd = assemble(DATABASES, PACE, workflows=40, seed=3)
    assert crowd == assemble(DATABASES, PACE, workflows=40, seed=3)
    other = assemble(DATABASES, PACE, workflows=40, seed=4)
    assert not {v.workflow for v in crowd} & {v.workflow for v in other}
    assert [v.question for v in crowd] != [v.question for v in other]


def test_a_crowd_has_the_load_classes_and_deadlines_it_should():
    crowd = assemble(DATABASES, PACE, workflows=2000, seed=0, load=3.0)
    rate_per_s = (len(crowd) - 1) / crowd[-1].arrival_s
    assert rate_per_s == pytest.approx(3.0 * PACE.capacity_per_s, rel=0.1)
    assert mean(v.kind == "interactive" for v in crowd) == pytest.approx(0.6, abs=0.05)
    for v in crowd:
        low, high = DEADLINE_FACTORS[v.kind]
        assert low <= v.deadline_s / PACE.alone_s[v.kind] <= high
        assert v.question in questions()[v.database.name]


def test_deadlines_are_tightened_together_until_half_are_in_time():
    crowd = assemble(DATABASES, PACE, workflows=33, seed=5)
    loose = [Journey(v, v.arrival_s + 1.0 + i % 7, Answer(), 0) for i, v in enumerate(crowd)]
    tight = tighten(loose)
    assert sum(journey.tardiness_s == 0 for journey in tight) == 16
    factors = [b.visit.deadline_s / a.visit.deadline_s for a, b in zip(loose, tight, strict=True)]
    assert max(factors) == pytest.approx(min(factors))
    assert [j.latency_s for j in tight] == [j.latency_s for j in loose]


def test_a_crowd_on_a_slower_machine_is_the_same_crowd_stretched():
    slow = Pace({kind: 3 * s for kind, s in PACE.alone_s.items()}, PACE.capacity_per_s / 3)
    for a, b in zip(
        assemble(DATABASES, PACE, workflows=20, seed=1),
        assemble(DATABASES, slow, workflows=20, seed=1),
        strict=True,
    ):
        assert b.arrival_s == pytest.approx(3 * a.arrival_s)
        assert b.deadline_s == pytest.approx(3 * a.deadline_s)
        assert (a.workflow, a.question, a.kind) == (b.workflow, b.question, b.kind)


def test_capacity_is_that_of_the_time_in_which_all_seats_are_taken():
    # Two seats, ten workflows of 2 s: five pairs end at 2, 4, … 10 s.
    ended = [journey(2.0 * (n // 2 + 1)) for n in range(10)]
    assert capacity(ended, seats=2) == pytest.approx((8 + 1) / 8.0)


def test_each_call_says_its_workflow_stage_class_and_deadline(visit):
    with Stub() as server:
        (done,) = asyncio.run(visit_all(server, [visit("w1", "report")]))
    assert done.answer.stages == ["schema", "sql", "fix-1", "fix-2", "check", "report"]
    assert done.output_tokens == 3 * 6
    assert [body["vllm_xargs"]["trimtab.stage"] for body in server.asked] == done.answer.stages
    for body in server.asked:
        assert body["vllm_xargs"]["trimtab.workflow"] == "w1"
        assert body["vllm_xargs"]["trimtab.class"] == "report"
        assert body["vllm_xargs"]["trimtab.deadline_s"] == 9.0
        assert body["temperature"] == 0.0
        assert "priority" not in body
    opened = [body for body in server.asked if body["messages"][-1]["role"] == "assistant"]
    assert len(opened) == 4
    for body in server.asked:
        assert body["continue_final_message"] is (body in opened)
        assert body["add_generation_prompt"] is (body not in opened)


def test_static_priorities_are_by_class(visit):
    with Stub() as server:
        crowd = [visit("w1"), visit("w2", "report")]
        asyncio.run(visit_all(server, crowd, hints="priority"))
    said = {(b["vllm_xargs"]["trimtab.class"], b["priority"]) for b in server.asked}
    assert said == {("interactive", 0), ("report", 1)}


def test_users_come_at_their_time_and_each_answer_is_announced(visit):
    heard = []
    with Stub() as server:
        crowd = [visit("late", arrival_s=0.4), visit("early")]
        done = asyncio.run(visit_all(server, crowd, finished=lambda: heard.append(1)))
    assert [j.visit.workflow for j in done] == ["late", "early"]
    assert done[0].finished_s > 0.4
    assert server.asked[0]["vllm_xargs"]["trimtab.workflow"] == "early"
    assert len(heard) == 2


def test_a_refused_call_is_one_sentence(visit):
    with Stub(status=400) as server, pytest.raises(TrimtabError, match="refused a call"):
        asyncio.run(visit_all(server, [visit("w1"), visit("w2", arrival_s=300.0)]))


def test_a_server_that_dies_ends_the_wait_for_it(visit):
    with Stub() as server:
        server.failure = TrimtabError("the server ended")
        began_s = time.monotonic()
        with pytest.raises(TrimtabError, match="the server ended"):
            asyncio.run(visit_all(server, [visit("w1", arrival_s=300.0)]))
        assert time.monotonic() - began_s < 100


def test_figures_count_what_users_care_about():
    done = [journey(n, deadline_s=18.5) for n in range(1, 21)]
    found = figures(done)
    assert found.workflows_within_deadline == 18
    assert found.mean_latency_s == 10.5
    assert found.p95_latency_s == 19
    assert found.p95_tardiness_s == 0.5
    assert found.throughput_per_s == 1.0
    assert (found.calls, found.output_tokens) == (20, 80)
    assert percentile([1.0], 0.95) == 1.0


def test_a_ratio_above_one_is_better_whichever_way_and_never_divides_by_nothing():
    worse, better = figures([journey(20.0)]), figures([journey(5.0)])
    ratios = {metric.name: metric.ratio(worse, better) for metric in METRICS}
    assert all(ratio >= 1 for ratio in ratios.values())
    assert ratios["mean_latency_s"] == 4
    assert ratios["p95_tardiness_s"] == 10.0
    assert ratios["workflows_within_deadline"] == 1.0


def test_the_simulated_crowd_makes_the_agents_calls_and_ends_them_all():
    pace = simulated.pace(DATABASES)
    crowd = assemble(DATABASES, pace, workflows=30, seed=5)
    requests = simulated.workload(crowd, 5)
    assert requests == simulated.workload(crowd, 5)
    for policy in (None, simulated.static_priority(crowd), simulated.urgency(crowd, "edd")):
        ended_s = simulated.finished_s(crowd, 5, policy)
        assert ended_s.keys() == {v.workflow for v in crowd}
        assert all(ended_s[v.workflow] > v.arrival_s for v in crowd)


def test_a_simulated_interactive_workflow_overtakes_under_static_priority(visit):
    crowd = [visit(f"r{n}", "report") for n in range(8)] + [visit("i", arrival_s=0.1)]
    plain = simulated.finished_s(crowd, 0)
    first = simulated.finished_s(crowd, 0, simulated.static_priority(crowd))
    assert first["i"] < plain["i"]
