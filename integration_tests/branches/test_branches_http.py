"""A real server with branches, asked by the openai client as anybody would."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections import Counter
from http.client import HTTPConnection
from pathlib import Path

import httpx
import pytest
from openai import BadRequestError, OpenAI

from trimtab.hosts.vllm.server import SMALL_CPU_ENGINE, Server, small_cpu_environment
from trimtab.hosts.vllm.small_model import small_model

pytestmark = pytest.mark.integration

MESSAGES = [
    {"role": "user", "content": "What is 1 + 4 + 2?"},
    {"role": "assistant", "content": "1 + 4 = 5. 5 + 2 = 7. Final answer: 7"},
    {"role": "user", "content": "What is 3 + 1 + 5?"},
]
LONG_TOKENS = 400


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    options = {"branches": {"score_every": 8, "max_branches": 8}}
    arguments = [
        *SMALL_CPU_ENGINE,
        *("--max-num-seqs", "8"),
        *("--scheduler-cls", "trimtab.hosts.vllm.Scheduler"),
        *("--middleware", "trimtab.branches.Middleware"),
        *("--additional-config", json.dumps({"trimtab": options})),
    ]
    log = tmp_path_factory.mktemp("log") / "server.log"
    with Server(small_model(), log, arguments, small_cpu_environment()) as running:
        yield running.wait_ready()


@pytest.fixture(scope="module")
def client(server):
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def fields(**said):
    return {"vllm_xargs": {f"trimtab.{name}": value for name, value in said.items()}}


def chat(client, tokens=48, **more):
    asked = {"model": "model", "messages": MESSAGES, "max_tokens": tokens, "temperature": 0.8}
    return client.chat.completions.create(**asked, **more)


def metric(server, pattern: str) -> float:
    """The sum of the server's metrics whose names match."""
    text = httpx.get(f"{server.url}/metrics").text
    found = re.findall(rf"^vllm:{pattern}\{{[^}}]*\}} (\S+)$", text, re.MULTILINE)
    assert found, pattern
    return sum(map(float, found))


def unfinished(server) -> float:
    """How many branches run or wait in the engine."""
    return metric(server, "num_requests_(?:running|waiting)")


def generated(server) -> float:
    """How many tokens it has generated."""
    return metric(server, "generation_tokens_total")


def test_one_answer_comes_back_and_usage_counts_every_token(client):
    asked = fields(branches=6, enough=3, answer="majority", extract="final", show="all")
    shown = chat(client, extra_body=asked)
    told = [choice.model_extra["trimtab"] for choice in shown.choices]
    assert [choice.index for choice in shown.choices] == list(range(6))
    assert sorted(one["branch"] for one in told) == list(range(6))
    assert sum(one["tokens"] for one in told) == shown.usage.completion_tokens
    assert Counter(one["fate"] for one in told) == shown.model_extra["trimtab"]["fates"]
    assert not any("trimtab" in str(choice.model_extra["stop_reason"]) for choice in shown.choices)

    asked["vllm_xargs"]["trimtab.show"] = "one"
    answer = chat(client, extra_body=asked)
    (choice,) = answer.choices
    assert choice.message.content
    own = choice.model_extra["trimtab"]
    assert own["tokens"] == answer.model_extra["trimtab"]["answer_tokens"]
    assert own["tokens"] < answer.usage.completion_tokens


def test_enough_finished_branches_end_the_others(client):
    told = chat(client, 400, extra_body=fields(branches=6, enough=1, show="all", pruning="off"))
    fates = told.model_extra["trimtab"]["fates"]
    assert fates["finished"] >= 1
    assert fates["finished"] + fates.get("stopped", 0) == 6
    assert told.choices[0].model_extra["trimtab"]["fate"] == "finished"


def test_a_stream_brings_progress_and_then_the_winner(client):
    asked = fields(branches=4, enough=2, progress=1)
    options = {"include_usage": True}
    said = list(chat(client, stream=True, stream_options=options, extra_body=asked))
    progress = [
        c.model_extra["trimtab"]["progress"]
        for c in said
        if "progress" in (c.model_extra.get("trimtab") or {})
    ]
    assert progress[-1]["running"] == 0
    assert len(progress[-1]["branches"]) == 4
    text = "".join(c.choices[0].delta.content or "" for c in said if c.choices)
    last = next(c for c in reversed(said) if c.choices)
    assert text.strip()
    assert last.choices[0].finish_reason in ("stop", "length")
    assert sum(last.model_extra["trimtab"]["fates"].values()) == 4
    assert said[-1].usage.completion_tokens == progress[-1]["tokens"]


def test_the_clients_own_helper_for_streams_takes_it(client):
    asked = {"model": "model", "messages": MESSAGES, "max_tokens": 24, "temperature": 0.8}
    more = fields(branches=4, progress=1)
    with client.chat.completions.stream(**asked, extra_body=more) as stream:
        deltas = "".join(event.delta for event in stream if event.type == "content.delta")
        whole = stream.current_completion_snapshot
    assert whole.choices[0].message.content == deltas


def test_logprobs_of_the_winner_survive(client):
    answer = chat(client, 24, logprobs=True, top_logprobs=2, extra_body=fields(branches=3))
    (choice,) = answer.choices
    assert len(choice.logprobs.content) == choice.model_extra["trimtab"]["tokens"]
    assert len(choice.logprobs.content[0].top_logprobs) == 2


def test_a_grammar_holds_in_every_branch(client):
    asked = fields(branches=4, enough=2, show="all")
    asked["structured_outputs"] = {"regex": r"The sum is [0-9]{1,2}"}
    told = chat(client, extra_body=asked)
    ended = [c for c in told.choices if c.model_extra["trimtab"]["fate"] == "finished"]
    assert len(ended) >= 2
    assert all(re.fullmatch(r"The sum is [0-9]{1,2}", c.message.content) for c in ended)


def test_a_stop_string_ends_a_branch_as_it_ends_any_text(client):
    answer = client.completions.create(
        model="model",
        prompt="One, two, three, four,",
        max_tokens=40,
        temperature=0.8,
        stop=[","],
        extra_body=fields(branches=4, enough=1, show="all"),
    )
    winner = answer.choices[0]
    assert winner.model_extra["stop_reason"] == ","
    assert winner.model_extra["trimtab"]["fate"] == "finished"
    assert winner.model_extra["trimtab"]["tokens"] > 0
    assert "," not in winner.text


@pytest.mark.parametrize(
    ("wrong", "name"),
    [
        ({"branches": 0}, "trimtab.branches"),
        ({"branches": 9}, "trimtab.branches"),
        ({"branches": 10_000}, "trimtab.branches"),
        ({"branches": 4, "enough": 5}, "trimtab.enough"),
        ({"branches": 4, "prune_below": 2}, "trimtab.prune_below"),
        ({"branches": 4, "extract": "sometimes"}, "trimtab.extract"),
        ({"branches": 4, "pruning": "hard"}, "trimtab.pruning"),
    ],
)
def test_a_wrong_field_is_400_with_its_name(client, wrong, name):
    with pytest.raises(BadRequestError, match=re.escape(name)):
        chat(client, extra_body=fields(**wrong))


def test_n_that_differs_is_400(client):
    with pytest.raises(BadRequestError, match="leave n out"):
        chat(client, n=2, extra_body=fields(branches=4))


def test_without_the_fields_n_is_vllms_own(client):
    answer = chat(client, 16, n=3)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert "trimtab" not in answer.model_extra
    assert all(choice.model_extra["stop_reason"] is None for choice in answer.choices)


def test_with_all_awaited_and_nothing_pruned_the_texts_are_vllms_own(client):
    # The prompt is computed in one piece; the seeds of a request's branches are seed, seed + 1, ...
    asked = {"n": 4, "seed": 11, "messages": [{"role": "user", "content": "Name a colour."}]}
    asked |= {"model": "model", "max_tokens": 24, "temperature": 0.9}
    plain = client.chat.completions.create(**asked)
    more = fields(branches=4, enough=4, pruning="off", show="all")
    ours = client.chat.completions.create(**asked, extra_body=more)
    texts = {choice.index: choice.message.content for choice in plain.choices}
    assert len(set(texts.values())) > 1
    told = {c.model_extra["trimtab"]["branch"]: c.message.content for c in ours.choices}
    assert told == texts
    reasons = {c.model_extra["trimtab"]["branch"]: c.finish_reason for c in ours.choices}
    assert reasons == {choice.index: choice.finish_reason for choice in plain.choices}
    assert ours.usage.completion_tokens == plain.usage.completion_tokens


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_takes_all_its_branches_with_it(server, stream):
    before = generated(server)
    body = {
        "model": "model",
        "messages": MESSAGES,
        "max_tokens": LONG_TOKENS,
        "stream": stream,
        "ignore_eos": True,
        **fields(branches=8, enough=8, pruning="off"),
    }
    connection = HTTPConnection(httpx.URL(server.url).netloc.decode())
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
    while unfinished(server) < 8:
        time.sleep(0.02)
    connection.close()
    while unfinished(server):
        time.sleep(0.02)
    assert generated(server) - before < 8 * LONG_TOKENS


def test_the_example_shows_every_branch(server):
    run = Path(__file__).parents[2] / "examples" / "branches" / "run.py"
    asked = ["--questions", "2", "--branches", "6", "--enough", "3", "--url", server.url]
    done = subprocess.run(
        [sys.executable, run, *asked], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["questions"] == 2
    assert sum(figures["fates"].values()) == 12
    assert figures["answer_tokens"] < figures["tokens"]
    assert done.stderr.count("* branch") == 2
    assert done.stderr.count("branch") == 12
