"""Branches in vLLM's real scheduler, with its real pool of blocks and no model."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.request import RequestStatus

from trimtab.branches.note import Fate, Note
from trimtab.hosts.vllm.dry_engine import DryEngine
from trimtab.hosts.vllm.scheduler import Scheduler

pytestmark = pytest.mark.integration


def engine(scheduler=Scheduler, *, branches=None, plugins=None, **settings_):
    options = {"signals": {"replay": 1.0}, **(branches or {})}
    config = {"trimtab": {**(plugins or {}), "branches": options}}
    return DryEngine(
        scheduler,
        additional_config=config if scheduler is Scheduler else None,
        **{"blocks": 200, "max_num_seqs": 16, **settings_},
    )


def free_blocks(dry):
    return dry.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()


def ask(dry, name, lengths, *, scores=None, prompt=40, max_tokens=200, first=0, **fields):
    """Hands in a request with a branch of each length, as vLLM's front end does."""
    said = {f"trimtab.{key}": value for key, value in fields.items()}
    said.setdefault("trimtab.branches", len(lengths))
    if scores is not None:
        said["trimtab.replay"] = json.dumps(scores)
    tokens = [3 + sum(name.encode()) % 500] * prompt
    for index, length in enumerate(lengths, first):
        dry.add(f"{index}_{name}", tokens, max_tokens, xargs=said, ends_after=length)


@dataclass
class Seen:
    """What came out of an engine."""

    ends: dict[str, list[Note | None]] = field(default_factory=lambda: defaultdict(list))
    tokens: Counter = field(default_factory=Counter)
    steps: int = 0
    ended_at: dict[str, int] = field(default_factory=dict)

    def take(self, outputs):
        for client in outputs.values():
            for output in client.outputs:
                assert output.new_logprobs is None
                self.tokens[output.request_id] += len(output.new_token_ids)
                if output.finish_reason is not None:
                    self.ends[output.request_id].append(Note.read(output.stop_reason))
                    self.ended_at[output.request_id] = self.steps

    def fates(self, name):
        found = {i: n for i, n in self.ends.items() if i.endswith(f"_{name}")}
        return {int(i.split("_")[0]): n[0].fate for i, n in found.items() if n[0] is not None}


def run(dry, each_step=None, limit=5_000):
    seen = Seen()
    for seen.steps in range(limit):
        if each_step is not None:
            each_step(seen.steps)
        _, outputs = dry.step()
        seen.take(outputs)
        if not dry.scheduler.get_num_unfinished_requests():
            dry.drain()
            return seen
    raise AssertionError("the engine does not come to an end")


def test_the_first_to_finish_answer_and_the_rest_end_in_that_step():
    dry = engine()
    before = free_blocks(dry)
    ask(dry, "a", [30, 50, 90, 120], enough=2, pruning="off")
    seen = run(dry)
    assert seen.fates("a") == {
        0: Fate.FINISHED,
        1: Fate.FINISHED,
        2: Fate.STOPPED,
        3: Fate.STOPPED,
    }
    assert seen.ended_at["2_a"] == seen.ended_at["3_a"] == seen.ended_at["1_a"]
    assert {i: seen.tokens[i] for i in ("0_a", "1_a", "2_a")} == {"0_a": 30, "1_a": 50, "2_a": 50}
    assert free_blocks(dry) == before


def test_two_phases():
    dry = engine()
    scores = [[0.9, 0.9], [0.1, 0.1], [0.6, 0.6], [0.95, 0.95]]
    ask(
        dry,
        "a",
        [24, 90, 90, 40],
        scores=scores,
        enough=2,
        pruning="paper",
        score_every=10,
        max_pruned=1,
    )
    seen = run(dry)
    ends = {i: seen.ends[f"{i}_a"][0] for i in range(4)}
    assert [ends[i].fate for i in range(4)] == [
        Fate.FINISHED,
        Fate.PRUNED,
        Fate.PRUNED,
        Fate.FINISHED,
    ]
    assert (ends[1].phase, ends[1].tokens) == (1, 10)
    # The first has finished with .9 after 24 tokens; the third is under it at its next scoring.
    assert (ends[2].phase, ends[2].tokens) == (2, 30)
    assert ends[3].others == {0: 0.9, 1: 0.1, 2: 0.6}


def test_the_blocks_of_a_pruned_branch_serve_the_next_request_in_the_next_step():
    # 24 blocks of 16: two branches of 10 blocks each leave no room for a prompt of 12 blocks.
    dry = engine(blocks=25, prefix_caching=False)
    ask(
        dry,
        "a",
        [200, 200],
        prompt=32,
        scores=[[0.9], [0.1]],
        enough=1,
        pruning="paper",
        score_every=96,
        max_tokens=300,
    )
    admitted = {}

    def note(step):
        if step == 90:
            dry.add("waiter", [9] * 190, 4)
        if "waiter" in {r.request_id for r in dry.scheduler.running}:
            admitted.setdefault("waiter", step)

    seen = run(dry, note)
    assert seen.fates("a")[1] is Fate.PRUNED
    assert seen.tokens["1_a"] == 96
    # `note` looks before each step: it runs in the step after the one that pruned.
    assert admitted["waiter"] == seen.ended_at["1_a"] + 2


def test_a_client_that_leaves_ends_all_branches_and_frees_their_blocks_at_once():
    dry = engine()
    before = free_blocks(dry)
    ask(dry, "a", [150] * 8, enough=4)
    for _ in range(20):
        dry.step()
    assert free_blocks(dry) < before
    gone = [f"{i}_a" for i in range(8)]
    dry.scheduler.finish_requests(gone, RequestStatus.FINISHED_ABORTED)
    assert free_blocks(dry) == before
    assert not dry.scheduler.has_unfinished_requests()
    ask(dry, "b", [10, 20], enough=1)
    assert run(dry).fates("b") == {0: Fate.FINISHED, 1: Fate.STOPPED}


@pytest.mark.parametrize("answer", ["best", "majority"])
def test_a_stop_string_found_by_the_server_counts_as_an_answer(answer):
    dry = engine()
    ask(dry, "a", [150] * 4, enough=2, pruning="off", answer=answer)
    ask(dry, "b", [150] * 2, enough=2, pruning="off")

    def stop(step):
        if step in (20, 30):
            name = f"{step // 10}_a"
            dry.scheduler.finish_requests([name], RequestStatus.FINISHED_ABORTED)

    seen = run(dry, stop)
    assert seen.fates("a") == {0: Fate.STOPPED, 1: Fate.STOPPED}
    assert seen.ended_at["0_a"] == 30
    assert seen.fates("b") == {0: Fate.FINISHED, 1: Fate.FINISHED}


def test_a_late_sibling_of_an_answered_request_ends_in_its_first_step():
    dry = engine()
    ask(dry, "a", [5, 80], enough=1, branches=4)
    for _ in range(10):
        dry.step()
    ask(dry, "a", [80, 80], first=2, enough=1, branches=4)
    _, outputs = dry.step()
    seen = Seen()
    seen.take(outputs)
    assert set(seen.ends) == {"2_a", "3_a"}


def test_siblings_that_come_one_by_one_are_counted_together():
    dry = engine()
    ask(dry, "a", [3], enough=2, branches=3)
    for _ in range(6):
        dry.step()
    ask(dry, "a", [3], first=1, enough=2, branches=3)
    ask(dry, "a", [90], first=2, enough=2, branches=3)
    assert run(dry).fates("a") == {1: Fate.FINISHED, 2: Fate.STOPPED}


def test_where_memory_is_short_the_weakest_branch_goes_before_anything_is_preempted():
    scores = [[0.9], [0.8], [0.2], [0.7]]
    seen, preempted = {}, {}
    for pressed in (True, False):
        dry = engine(blocks=41, prefix_caching=False)
        ask(
            dry,
            "a",
            [150] * 4,
            prompt=32,
            scores=scores,
            enough=4,
            pruning="pressure" if pressed else "off",
            score_every=16,
        )
        preempted[pressed] = 0
        outcome = Seen()
        while dry.scheduler.has_unfinished_requests():
            scheduled, outputs = dry.step()
            preempted[pressed] += len(scheduled.preempted_req_ids or ())
            outcome.take(outputs)
        seen[pressed] = outcome
    assert preempted == {True: 0, False: pytest.approx(1, abs=3)}
    assert preempted[False]
    assert seen[True].fates("a")[2] is Fate.EVICTED
    assert list(seen[True].fates("a").values()).count(Fate.FINISHED) == 3


def test_under_load_no_second_branch_is_admitted_before_another_requests_first():
    dry = engine(max_num_seqs=6)
    for name in "abcdef":
        ask(dry, name, [20, 30, 40, 50], enough=2, pruning="off")
    dry.step()
    assert {r.request_id for r in dry.scheduler.running} == {f"0_{name}" for name in "abcdef"}
    seen = run(dry)
    for name in "abcdef":
        assert Fate.FINISHED in seen.fates(name).values()


def test_beside_urgency_a_due_call_passes_branches_that_wait_and_they_still_end_early():
    dry = engine(plugins={"urgency": {}}, max_num_seqs=4)
    for name in "ab":
        ask(dry, name, [30, 40, 50, 60], enough=2, pruning="off")
    dry.step()
    due = {"trimtab.workflow": "w", "trimtab.deadline_s": 5.0}
    dry.add("due", [9] * 20, 8, xargs=due, ends_after=5)
    admitted = []

    def note(step):
        admitted.extend(r.request_id for r in dry.scheduler.running)

    seen = run(dry, note)
    order = list(dict.fromkeys(admitted))
    assert order.index("due") == 4  # the first to get a seat once the four running give one up
    for name in "ab":
        fates = Counter(seen.fates(name).values())
        assert fates[Fate.FINISHED] >= 1
        assert fates[Fate.STOPPED] + fates[Fate.WITHHELD] >= 1


def test_a_certain_vote_ends_the_rest():
    # Without a tokenizer the text is the tokens' numbers; every branch ends with the same one.
    dry = engine(max_num_seqs=20)
    ask(dry, "a", [10, 20, 30, 40, 90, 95], enough=6, answer="majority", extract="none")
    ask(dry, "b", [10, 10, 10, 10, 90, 95], enough=6, answer="majority", extract="none")
    ask(dry, "c", [10, 10, 10, 10, 90, 95], enough=6, answer="best", extract="none")
    seen = run(dry)
    assert Fate.STOPPED not in list(seen.fates("a").values())[:4]
    assert list(seen.fates("b").values()).count(Fate.STOPPED) == 2
    assert Fate.STOPPED not in seen.fates("c").values()


def test_requests_that_do_not_ask_are_none_of_the_plugins():
    dry = engine()
    for index in range(3):
        dry.add(f"{index}_plain", [5] * 20, 30, ends_after=10 + index)
    dry.add("1_lonely", [5] * 20, 30, xargs={"trimtab.branches": 1}, ends_after=12)
    seen = run(dry)
    assert all(notes == [None] for notes in seen.ends.values())
    assert seen.tokens == {"0_plain": 10, "1_plain": 11, "2_plain": 12, "1_lonely": 12}


def test_logprobs_reach_the_signal_and_not_the_client():
    def rows(names):
        own = [-0.1 if name.startswith("0") else -2.0 for name in names]
        return np.array([[value] + [-1.0] * 20 for value in own], dtype=np.float32)

    dry = engine(branches={"signals": {"probability": 1.0}, "window": 4}, logprobs=rows)
    ask(dry, "a", [30, 40], enough=2, pruning="off", score_every=8)
    seen = run(dry)
    assert seen.ends["0_a"][0].score == pytest.approx(0.905, abs=0.001)
    assert seen.ends["1_a"][0].score == pytest.approx(0.135, abs=0.001)


@dataclass
class Asked:
    name: str
    at: int
    prompt: int
    lengths: list[int]
    scores: list[list[float]]
    fields: dict[str, object]
    leaves: tuple[int, int] | None
    """After so many steps, so many of its branches are aborted."""


@st.composite
def crowds(draw):
    asked = []
    for number in range(draw(st.integers(1, 5))):
        branches = draw(st.integers(2, 6))
        fields = {
            "enough": draw(st.integers(1, branches)),
            "score_every": draw(st.sampled_from([4, 10, 16])),
            "pruning": draw(st.sampled_from(["safe", "paper", "off"])),
            "prune_below": draw(st.sampled_from([0.2, 0.5, 0.8])),
            "answer": draw(st.sampled_from(["best", "majority"])),
        }
        leaves = st.tuples(st.integers(1, 60), st.integers(1, branches))
        asked.append(
            Asked(
                f"r{number}",
                draw(st.integers(0, 30)),
                draw(st.integers(1, 120)),
                draw(st.lists(st.integers(1, 70), min_size=branches, max_size=branches)),
                [draw(st.lists(st.floats(0, 1), max_size=4)) for _ in range(branches)],
                fields,
                draw(st.none() | leaves),
            )
        )
    return asked


def drive(dry, asked):
    """Runs a crowd; notes who was aborted."""
    aborted = set()

    def each_step(step):
        for request in asked:
            if request.at == step:
                ask(
                    dry,
                    request.name,
                    request.lengths,
                    scores=request.scores,
                    prompt=request.prompt,
                    **request.fields,
                )
            if request.leaves and request.at + request.leaves[0] == step:
                ids = [f"{i}_{request.name}" for i in range(request.leaves[1])]
                over = dry.scheduler.finish_requests(ids, RequestStatus.FINISHED_ABORTED)
                aborted.update(r.request_id for r in over)

    last = max(r.at for r in asked) + max(r.leaves[0] if r.leaves else 0 for r in asked)
    seen = Seen()
    while seen.steps <= last or dry.scheduler.get_num_unfinished_requests():
        each_step(seen.steps)
        seen.take(dry.step()[1])
        seen.steps += 1
        assert seen.steps < 5_000
    dry.drain()
    return seen, aborted


@given(
    crowds(),
    st.sampled_from([30, 45, 200]),
    st.booleans(),
    st.booleans(),
    st.integers(2, 12),
    st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_nothing_leaks_and_every_branch_ends_once(asked, blocks, caching, ahead, seats, bend):
    dry = engine(
        branches={"bend": bend},
        blocks=blocks,
        prefix_caching=caching,
        async_scheduling=ahead,
        max_num_seqs=seats,
    )
    before = free_blocks(dry)
    seen, aborted = drive(dry, asked)
    assert free_blocks(dry) == before
    for request in asked:
        ids = {f"{i}_{request.name}" for i in range(len(request.lengths))}
        assert all(len(seen.ends[i]) == (i not in aborted) for i in ids)
        answered = [i for i in ids - aborted if seen.ends[i][0].fate is Fate.FINISHED]
        assert answered or ids & aborted
        # A policy that failed would be left out, and leave no notes.
        assert all(seen.ends[i][0] is not None for i in ids - aborted)
        for i in ids - aborted:
            assert seen.tokens[i] <= request.lengths[int(i.split("_")[0])]
            assert seen.ends[i][0].tokens == seen.tokens[i]


@given(crowds(), st.sampled_from([45, 200]), st.booleans(), st.integers(2, 12))
@settings(max_examples=30, deadline=None)
def test_with_all_awaited_and_nothing_pruned_it_is_vllm(asked, blocks, ahead, seats):
    for request in asked:
        request.fields.update(enough=len(request.lengths), pruning="off", answer="best")
    shape = {"blocks": blocks, "async_scheduling": ahead, "max_num_seqs": seats}
    runs = []
    for dry in (engine(branches={"bend": False}, **shape), engine(AsyncScheduler, **shape)):
        seen, aborted = drive(dry, asked)
        runs.append((dict(seen.tokens), seen.ended_at, seen.steps, aborted))
    assert runs[0] == runs[1]
