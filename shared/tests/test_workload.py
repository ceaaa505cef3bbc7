"""Workloads: what they cannot hold, the trace formats, and the generators."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.core.errors import BadInput
from trimtab.core.synthetic import (
    FINANCIAL,
    FORMULA1,
    Fixed,
    Lognormal,
    agent_workflows,
    gamma_bursts,
    poisson,
    with_arrivals,
)
from trimtab.core.traces import read_workload
from trimtab.core.workload import Request, Workload


def request(request_id: str = "r", arrival_s: float = 0.0, **more) -> Request:
    return Request(request_id, arrival_s, **({"prompt_tokens": 10, "output_tokens": 5} | more))


def test_requests_are_sorted_by_arrival_and_ties_stay_as_given():
    workload = Workload((request("b", 2.0), request("c", 1.0), request("a", 1.0)))
    assert [r.request_id for r in workload] == ["c", "a", "b"]
    assert (len(workload), workload.duration_s) == (3, 2.0)
    assert Workload(()).duration_s == 0


@pytest.mark.parametrize(
    ("requests", "expected"),
    [
        ([request(arrival_s=-1.0)], "'r': arrival_s is -1.0; give at least 0."),
        ([request(arrival_s=float("nan"))], "'r': arrival_s is nan; give at least 0."),
        ([request(prompt_tokens=0)], "'r': prompt_tokens is 0; give at least 1."),
        ([request(output_tokens=-3)], "'r': output_tokens is -3; give at least 1."),
        ([request(gap_s=float("inf"))], "'r': gap_s is inf; give at least 0."),
        ([request(deadline_s=0.0)], "'r': deadline_s is 0.0; give a number above 0."),
        ([request(prefix_tokens=11)], "'r': prefix_tokens is 11; the whole prompt has 10."),
        ([request(branch_tokens=(0, 5))], "'r': a branch has 0 tokens; give each at least 1."),
        (
            [request(branch_tokens=(3, 9))],
            "'r': output_tokens is 5; its longest branch has 9.",
        ),
        (
            [request(branch_tokens=(5,), prefix="p", prefix_tokens=2)],
            "'r': it has branches and the prefix 'p'; leave the prefix out: branches share their"
            " whole prompt.",
        ),
        (
            [request("a"), request("a", 1.0)],
            "'a': request_id 'a' is given twice; give each request an id of its own.",
        ),
        (
            [request("a", depends_on=("z",))],
            "'a': depends_on names 'z', which is no request; name a request_id of this workload.",
        ),
        (
            [request("a", depends_on=("a",))],
            "'a': depends_on goes in a circle: a -> a; remove one of these dependencies.",
        ),
        (
            [
                request("d", depends_on=("a",)),
                request("a", depends_on=("b", "e")),
                request("b", depends_on=("c",)),
                request("c", depends_on=("a",)),
                request("e"),
            ],
            "'a': depends_on goes in a circle: a -> b -> c -> a; remove one of these dependencies.",
        ),
    ],
)
def test_a_workload_cannot_hold_what_cannot_be_run(requests, expected):
    with pytest.raises(BadInput) as caught:
        Workload(tuple(requests))
    assert str(caught.value) == f"request {expected}"


@st.composite
def acyclic(draw) -> Workload:
    """Random workloads whose requests depend on earlier ones only."""
    ids = draw(st.lists(st.text(min_size=1, max_size=4), unique=True, max_size=8))
    requests = []
    for index, request_id in enumerate(ids):
        prompt = draw(st.integers(1, 10_000))
        branches = tuple(draw(st.lists(st.integers(1, 1000), max_size=3)))
        requests.append(
            Request(
                request_id,
                draw(st.floats(0, 1e6)),
                prompt,
                max(branches, default=0) or draw(st.integers(1, 1000)),
                model=draw(st.none() | st.text()),
                workflow=draw(st.none() | st.sampled_from("xy")),
                stage=draw(st.none() | st.text()),
                deadline_s=draw(st.none() | st.floats(1e-3, 1e6)),
                depends_on=tuple(draw(st.sets(st.sampled_from(ids[:index])))) if index else (),
                gap_s=draw(st.floats(0, 10)),
                prefix=None if branches else draw(st.none() | st.text()),
                prefix_tokens=draw(st.integers(0, prompt)),
                branch_tokens=branches,
                fields=draw(st.dictionaries(st.text(), st.text() | st.integers(), max_size=2)),
            )
        )
    return Workload(tuple(draw(st.permutations(requests))))


@given(workload=acyclic())
def test_a_written_workload_reads_back_the_same(tmp_path_factory, workload):
    path = tmp_path_factory.mktemp("w") / "w.jsonl"
    workload.to_jsonl(path)
    if workload.requests:
        again = read_workload(path)
        assert again.requests == workload.requests
        assert (again.digest, again.name) == (workload.digest, "w")


@given(acyclic(), st.data())
def test_a_dependency_back_on_oneself_is_always_found(workload, data):
    links = [(r.request_id, d) for r in workload for d in r.depends_on]
    if not links:
        return
    later, earlier = data.draw(st.sampled_from(links))
    closed = tuple(
        dataclasses.replace(r, depends_on=(*r.depends_on, later)) if r.request_id == earlier else r
        for r in workload
    )
    with pytest.raises(BadInput, match="goes in a circle") as caught:
        Workload(closed)
    if all(" " not in r.request_id and "-" not in r.request_id for r in workload):
        circle = caught.value.what.removeprefix("depends_on goes in a circle: ").split(" -> ")
        waits_for = {r.request_id: r.depends_on for r in closed}
        assert circle[0] == circle[-1]
        assert all(b in waits_for[a] for a, b in pairwise(circle))


def test_the_digest_follows_the_requests_and_not_the_name():
    one, other = Workload((request(),), "a"), Workload((request(),), "b")
    assert one.digest == other.digest
    assert one.digest != Workload((request(output_tokens=6),)).digest


def read_text(tmp_path, text: str, **options) -> Workload:
    path = tmp_path / "trace"
    path.write_text(text)
    return read_workload(path, **options)


AZURE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    "2023-11-16 18:15:46.6805900,374,44\n"
    "2023-11-16 18:15:50.9951690,396,109\n"
)
MOONCAKE = (
    '{"timestamp": 0, "input_length": 6000, "output_length": 52, "hash_ids": [1, 2, 3]}\n'
    '{"timestamp": 1500, "input_length": 900, "output_length": 7, "hash_ids": [1, 2]}\n'
    '{"timestamp": 1500, "input_length": 90, "output_length": 7, "hash_ids": [9]}\n'
)
SHAREGPT = [
    {
        "id": "x",
        "conversations": [
            {"from": "human", "value": "a" * 40},
            {"from": "gpt", "value": "b" * 80},
            {"from": "human", "value": "c" * 4},
            {"from": "gpt", "value": ""},
        ],
    },
    {"conversations": [{"from": "gpt", "value": "no question before it"}]},
]
OWN = '{"request_id": "a", "arrival_s": 0, "prompt_tokens": 3, "output_tokens": 4}\n'


def test_the_azure_csv(tmp_path):
    first, second = read_text(tmp_path, AZURE)
    assert (first.arrival_s, first.prompt_tokens, first.output_tokens) == (0.0, 374, 44)
    assert second.arrival_s == pytest.approx(4.314579)
    later = AZURE.replace(".6805900", ".680590+00:00").replace(".9951690", ".995169+00:00")
    assert read_text(tmp_path, later).digest == read_text(tmp_path, AZURE).digest


def test_the_mooncake_trace_shares_the_prefix_that_saves_most(tmp_path):
    long, short, other = read_text(tmp_path, MOONCAKE)
    assert (long.arrival_s, short.arrival_s) == (0.0, 1.5)
    assert (long.prefix, long.prefix_tokens) == ("block-2", 1024)
    assert (short.prefix, short.prefix_tokens) == ("block-2", 900)
    assert (other.prefix, other.prefix_tokens) == (None, 0)


@pytest.mark.parametrize("lines", [True, False])
def test_sharegpt_conversations_are_workflows_of_turns(tmp_path, lines):
    dumped = "\n".join(map(json.dumps, SHAREGPT)) if lines else json.dumps(SHAREGPT)
    first, second = read_text(tmp_path, dumped)
    assert (first.prompt_tokens, first.output_tokens, first.depends_on) == (10, 20, ())
    assert (second.prompt_tokens, second.output_tokens) == (31, 1)
    assert second.depends_on == (first.request_id,)
    assert first.workflow == second.workflow
    counted, _ = read_text(tmp_path, dumped, count_tokens=len)
    assert (counted.prompt_tokens, counted.output_tokens) == (40, 80)


def test_no_more_than_the_limit_is_read(tmp_path):
    text = AZURE + "nonsense behind the limit\n"
    assert len(read_text(tmp_path, text, limit=2)) == 2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (AZURE[:-6], ":3: the line has 2 of 3 columns; the file seems cut: give it whole."),
        (AZURE[:-20], ":3: the line has 1 of 3 columns; the file seems cut: give it whole."),
        (OWN + OWN[:30], ":2: this is no JSON: Unterminated string starting at in column 21."),
        (MOONCAKE[:-20], ":3: this is no JSON: Expecting value in column 58."),
        (json.dumps(SHAREGPT)[:-30], ": this is no JSON: Unterminated string starting at in c"),
        (AZURE.replace("374", "-374"), ":2: ContextTokens is '-374'; give a whole number."),
        (AZURE.replace("2023-11-16 18:15:50", "later"), ":3: TIMESTAMP is 'later.9951690'; write "),
        (AZURE.replace(".9951690", "+01:00"), ":3: TIMESTAMP has a time zone in some lines only"),
        (AZURE.replace("18:15:50", "18:15:40"), ":3: arrival_s is -5.685421; give at least 0."),
        (AZURE.replace("GeneratedTokens", "Tokens"), ":1: the header lacks GeneratedTokens; give"),
        (MOONCAKE.replace("900", "-900"), ":2: input_length is -900; it should be greater than"),
        (OWN + OWN, ":2: request_id 'a' is given twice; give each request an id of its own."),
        (OWN + OWN.replace('"a"', '"b", "depends_on": ["c"]'), ":2: depends_on names 'c', which"),
        (OWN.replace("prompt_tokens", "prompt"), ":1: prompt is an unknown key (and 1 more); the"),
        (OWN.replace("3,", '"x",'), ":1: prompt_tokens is 'x'; it should be a valid integer, una"),
        ('[{"conversations": 3}]', ", item 0: conversations is 3; it should be a valid list."),
        ("hello\n", ":1: 'hello' begins no known format; known are trimtab, azure, mooncake, sha"),
        ("{}\n", ":1: '{}' begins no known format; known are trimtab, azure, mooncake, sharegpt."),
        ("", ": the file is empty."),
    ],
)
def test_a_fault_in_a_trace_is_one_sentence_with_its_line(tmp_path, text, expected):
    with pytest.raises(BadInput) as caught:
        read_text(tmp_path, text)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'trace'}{expected}")
    assert "\n" not in message


def test_a_format_is_believed_when_it_is_given(tmp_path):
    with pytest.raises(BadInput, match=":1: the header lacks"):
        read_text(tmp_path, OWN, trace_format="azure")
    with pytest.raises(BadInput, match="there is no format 'csv'; known are trimtab, azure"):
        read_text(tmp_path, OWN, trace_format="csv")
    with pytest.raises(BadInput, match="a JSON array is no azure file; give JSON lines"):
        read_text(tmp_path, "[]", trace_format="azure")
    with pytest.raises(BadInput, match="there is no such file"):
        read_workload(tmp_path / "gone")


def test_50_mb_of_nonsense_are_refused_after_the_first_line(tmp_path):
    path = tmp_path / "nonsense"
    with path.open("wb") as file:
        file.truncate(50_000_000)
    with pytest.raises(BadInput, match=":1: the line is longer than 1,048,576 bytes"):
        read_workload(path)


def test_poisson_arrivals_have_the_rate_and_the_spread_they_should():
    workload = poisson(4.0, 20_000, prompt=Fixed(100), output=Lognormal(200, 0.5), seed=1)
    gaps = np.diff([r.arrival_s for r in workload])
    # Four standard errors of 20,000 exponential gaps.
    assert gaps.mean() == pytest.approx(0.25, rel=0.03)
    assert gaps.std() / gaps.mean() == pytest.approx(1.0, abs=0.05)
    assert np.median([r.output_tokens for r in workload]) == pytest.approx(200, rel=0.03)
    assert {r.prompt_tokens for r in workload} == {100}


def test_gamma_gaps_come_in_bursts():
    workload = gamma_bursts(4.0, 40_000, cv=2.0, prompt=Fixed(1), output=Fixed(1), seed=1)
    gaps = np.diff([r.arrival_s for r in workload])
    assert gaps.mean() == pytest.approx(0.25, rel=0.05)
    assert gaps.std() / gaps.mean() == pytest.approx(2.0, rel=0.05)


def test_a_seed_names_a_workload():
    def one(seed: int) -> str:
        return agent_workflows(5, 1.0, seed=seed).digest

    assert one(3) == one(3)
    assert one(3) != one(4)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: poisson(0.0, 5, prompt=Fixed(1), output=Fixed(1)), "rate_per_s is 0.0; give a"),
        (lambda: poisson(1.0, 0, prompt=Fixed(1), output=Fixed(1)), "size is 0; give a number"),
        (lambda: agent_workflows(1, float("nan")), "rate_per_s is nan; give a number above 0"),
        (lambda: agent_workflows(1, 1.0, candidates=0), "candidates is 0; give at least 1"),
        (lambda: agent_workflows(1, 1.0, deadline_s=(9.0, 1.0)), r"deadline_s is \(9.0, 1.0\)"),
    ],
)
def test_generators_refuse_numbers_that_are_not_positive(make, expected):
    with pytest.raises(BadInput, match=expected):
        make()


@given(st.integers(0, 2**32 - 1), st.integers(1, 4))
def test_each_agent_workflow_is_the_chain_of_chess(seed, candidates):
    workload = agent_workflows(2, 1.0, seed=seed, candidates=candidates, tool_gap_s=0.5)
    for requests in workload.workflows.values():
        stages: list[list[Request]] = []
        for r in requests:
            if stages and stages[-1][0].depends_on == r.depends_on:
                stages[-1].append(r)
            else:
                stages.append([r])
        names = [stage[0].stage for stage in stages]
        revisions = names.count("revise")
        assert revisions <= 10
        assert names == [
            "retrieve", "keywords", "retrieve", "retrieve", "retrieve", "generate",
            *["revise"] * revisions,
            "unit_tester", "generate_unit_test", "unit_tester", "evaluate", "unit_tester",
        ]  # fmt: skip
        calls = {stage[0].stage: len(stage) for stage in stages}
        assert calls["generate"] == candidates
        assert calls["evaluate"] in (4, 5, 6)
        for before, after in pairwise(stages):
            assert after[0].depends_on == tuple(r.request_id for r in before)
            assert {r.gap_s for r in after} == {0.5}
        assert len({(r.arrival_s, r.deadline_s) for r in requests}) == 1
        assert 165 <= requests[0].deadline_s <= 815


def test_agent_workflows_have_the_size_of_the_published_traces():
    # arXiv:2505.05286's mixed trace: 20.9 calls, 65.6k prompt and 2505 output tokens a workflow.
    workload = agent_workflows(400, 1.0, seed=0)
    assert len(workload) / 400 == pytest.approx(20.9, rel=0.05)
    assert sum(r.prompt_tokens for r in workload) / 400 == pytest.approx(65_600, rel=0.1)
    assert sum(r.output_tokens for r in workload) / 400 == pytest.approx(2505, rel=0.15)
    raw = agent_workflows(400, 1.0, revisions="geometric", classes=[(FINANCIAL, 1.0)])
    assert Counter(r.stage for r in raw)["revise"] / 400 == pytest.approx(0.73, abs=0.25)
    assert {r.prefix for r in raw if r.stage == "generate"} == {"financial/generate"}
    assert FORMULA1.stages.keys() == FINANCIAL.stages.keys()


def test_new_arrivals_move_whole_workflows():
    workload = agent_workflows(20, 1.0, seed=0)
    moved = with_arrivals(workload, 100.0, seed=1)
    assert moved.duration_s < workload.duration_s
    assert list(moved.workflows) == list(workload.workflows)
    for name, requests in moved.workflows.items():
        gaps = [r.arrival_s - requests[0].arrival_s for r in requests]
        first = workload.workflows[name][0].arrival_s
        assert gaps == [r.arrival_s - first for r in workload.workflows[name]]
    assert with_arrivals(Workload(()), 1.0) == Workload(())


@given(st.floats(1, 1e4), st.floats(1, 3), st.floats(1, 3), st.integers(0, 99))
def test_lognormal_lengths_stay_between_their_limits(p5, up, further, seed):
    lengths = Lognormal.between(p5, p5 * up, p5 * up * further)
    drawn = lengths.sample(np.random.default_rng(seed), 100)
    assert drawn.min() >= max(1, round(p5 * 0.8))
    assert drawn.max() <= round(p5 * up * further * 1.25)
