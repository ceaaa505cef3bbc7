"""Crowds of requests with branches: no block leaks, every branch ends once, one always answers."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.request import RequestStatus

from trimtab.branches.note import Fate

pytestmark = pytest.mark.integration


@dataclass
class Asked:
    name: str
    at: int
    prompt: int
    lengths: list[int]
    scores: list[list[float]]
    fields: dict[str, object] = field(default_factory=dict)
    priority: int = 0
    most: int = 200
    late: tuple[int, int] | None = None
    """From this branch on they arrive so many steps later."""
    leaves: tuple[int, int] | None = None
    """After so many steps, so many of its branches are aborted."""

    @property
    def ids(self):
        return [f"{i}_{self.name}" for i in range(len(self.lengths))]

    @property
    def parts(self):
        """The steps at which branches arrive: the first of them and the one after the last."""
        if self.late is None:
            return {self.at: (0, len(self.lengths))}
        first, delay = self.late
        return {self.at: (0, first), self.at + delay: (first, len(self.lengths))}

    def is_late(self, branch_id):
        return self.late is not None and int(branch_id.split("_")[0]) >= self.late[0]


@st.composite
def crowds(draw):
    score = st.floats(0, 1) | st.just(math.nan)
    asked = []
    for number in range(draw(st.integers(1, 5))):
        branches = draw(st.integers(2, 6))
        fields = {
            "enough": draw(st.integers(1, branches)),
            "score_every": draw(st.sampled_from([4, 10, 16])),
            "pruning": draw(st.sampled_from(["safe", "paper", "pressure", "off"])),
            "prune_below": draw(st.sampled_from([0.2, 0.5, 0.8])),
            "answer": draw(st.sampled_from(["best", "majority", "weighted"])),
        }
        late = st.tuples(st.integers(1, branches - 1), st.integers(1, 60))
        leaves = st.tuples(st.integers(1, 60), st.integers(1, branches))
        asked.append(
            Asked(
                f"r{number}",
                draw(st.integers(0, 30)),
                draw(st.integers(1, 120)),
                draw(st.lists(st.integers(1, 70), min_size=branches, max_size=branches)),
                [draw(st.lists(score, max_size=4)) for _ in range(branches)],
                fields,
                draw(st.integers(0, 2)),
                draw(st.sampled_from([15, 40, 200])),
                draw(st.none() | late),
                draw(st.none() | leaves),
            )
        )
    return asked


def drive(dry, asked):
    """Runs a crowd; returns who was aborted."""
    aborted = set()

    def each_step(step):
        for request in asked:
            if step in request.parts:
                begin, end = request.parts[step]
                dry.ask(
                    request.name,
                    request.lengths[begin:end],
                    first=begin,
                    branches=len(request.lengths),
                    scores=request.scores,
                    prompt=request.prompt,
                    max_tokens=request.most,
                    priority=request.priority,
                    **request.fields,
                )
            if request.leaves and request.at + request.leaves[0] == step:
                ids = request.ids[: request.leaves[1]]
                over = dry.scheduler.finish_requests(ids, RequestStatus.FINISHED_ABORTED)
                aborted.update(r.request_id for r in over)

    last = max(max(*r.parts, r.at + (r.leaves[0] if r.leaves else 0)) for r in asked)
    while dry.steps <= last or dry.scheduler.get_num_unfinished_requests():
        each_step(dry.steps)
        dry.step()
        assert dry.steps < 5_000
    dry.drain()
    return aborted


def check(dry, request, aborted):
    """What holds of every request."""
    ids = set(request.ids)
    assert all(len(dry.ends[i]) == (i not in aborted) for i in ids)
    # A policy that failed would be left out, and leave no notes. Only a text of one token that
    # came after its request was answered is whole before anybody could end it.
    silent = {i for i in ids - aborted if dry.ends[i][0] is None}
    assert all(request.is_late(i) and dry.tokens[i] == 1 for i in silent)
    fates = {i: dry.ends[i][0].fate for i in ids - aborted - silent}
    assert ids & aborted or {Fate.FINISHED, Fate.LENGTH} & set(fates.values())
    for i, fate in fates.items():
        length = request.lengths[int(i.split("_")[0])]
        assert dry.ends[i][0].tokens == dry.tokens[i] <= min(length, request.most)
        if fate in (Fate.FINISHED, Fate.LENGTH):
            whole = length <= request.most
            assert fate is (Fate.FINISHED if whole else Fate.LENGTH)
            assert dry.tokens[i] == min(length, request.most)


ENGINES = st.fixed_dictionaries(
    {
        "blocks": st.sampled_from([16, 24, 200]),
        "prefix_caching": st.booleans(),
        "async_scheduling": st.booleans(),
        "max_num_seqs": st.integers(2, 12),
        "policy": st.sampled_from(["fcfs", "priority"]),
    }
)


@given(crowds(), ENGINES, st.booleans(), st.booleans())
@settings(max_examples=60, deadline=None)
def test_nothing_leaks_and_every_branch_ends_once(bed, asked, shape, bend, relieve):
    dry = bed(branches={"bend": bend, "relieve": relieve}, **shape)
    before = dry.free_blocks
    aborted = drive(dry, asked)
    assert dry.free_blocks == before
    for request in asked:
        check(dry, request, aborted)
    if dry.preempted:
        event("a branch was preempted")
    for fate in {note.fate for notes in dry.ends.values() for note in notes if note}:
        event(f"a branch was {fate.value}")


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
@pytest.mark.parametrize("ahead", [True, False])
@pytest.mark.parametrize("relieve", [True, False])
def test_so_it_is_where_branches_are_preempted_evicted_and_pruned(bed, relieve, ahead, policy):
    dry = bed(
        branches={"relieve": relieve},
        blocks=30,
        prefix_caching=False,
        async_scheduling=ahead,
        policy=policy,
    )
    before = dry.free_blocks
    asked = [
        Asked(
            f"r{number}",
            at=3 * number,
            prompt=16,
            lengths=[60, 62, 64, 66],
            scores=[[0.9], [0.8, 0.8, 0.8, 0.1], [math.nan, 0.7], [0.6]],
            fields={"enough": 2, "pruning": "paper", "score_every": 12},
            priority=3 - number,
            late=(2, 20),
        )
        for number in range(3)
    ]
    aborted = drive(dry, asked)
    assert not aborted
    for request in asked:
        check(dry, request, aborted)
    fates = {note.fate for notes in dry.ends.values() for note in notes}
    assert {Fate.FINISHED, Fate.PRUNED} <= fates
    assert (Fate.EVICTED in fates) == relieve
    assert relieve or dry.preempted
    assert dry.free_blocks == before


@given(crowds(), ENGINES)
@settings(max_examples=30, deadline=None)
def test_with_all_awaited_and_nothing_pruned_it_is_vllm(bed, asked, shape):
    for request in asked:
        request.fields.update(enough=len(request.lengths), pruning="off", answer="best")
    runs = []
    for dry in (bed(branches={"bend": False}, **shape), bed(AsyncScheduler, **shape)):
        aborted = drive(dry, asked)
        runs.append((dict(dry.tokens), dry.ended_at, dry.steps, dry.preempted, aborted))
    assert runs[0] == runs[1]
