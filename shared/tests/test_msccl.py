"""Plans as MSCCL files: read back and proven in any order in which blocks may run."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.core.collectives import Layout, PlanFault, Schedule
from trimtab.core.collectives.combine import beside, concentrated, exchange, folded, ring, staged
from trimtab.core.collectives.msccl import msccl_programme, write_msccl
from trimtab.core.collectives.msccl_check import check_msccl, read_msccl
from trimtab.core.emitters import emit
from trimtab.core.errors import BadInput, Unsupported
from trimtab.core.plan import Objective, Plan


def whole(count: int) -> list[Layout]:
    return [Layout.whole(rank) for rank in range(count)]


def gathered_at_two(count: int) -> Schedule:
    """Data that moves to ranks which hold none of it, as between the tiers of a tree."""
    left, layout = exchange(whole(count // 2))
    moved = concentrated(layout, [0])
    assert moved is not None
    right = [Layout.whole(rank) for rank in range(count // 2, count)]
    last, _ = exchange([moved[1], *right])
    return Schedule.of(count, [left, moved[0], last])


PLANS = {
    "direct": Schedule.of(5, [exchange(whole(5))[0]]),
    "staged": Schedule.of(12, staged(whole(12), [3, 4])[0]),
    "uneven groups": Schedule.of(7, staged(whole(7), [2, 4])[0]),
    "ring": Schedule.of(6, [ring(whole(6))[0]]),
    "folded": Schedule.of(6, folded(whole(6), [1, 3], [2, 2])[0]),
    "rooted": Schedule.of(4, [exchange(whole(4), [1, 0, 0, 0])[0]]),
    "concentrated": gathered_at_two(8),
    "side by side": Schedule.of(6, beside(staged(whole(6), [2, 3]), staged(whole(6), [6]), 768)[0]),
    "alone": Schedule.of(1, []),
}


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("seed", range(4))
def test_a_file_is_proven_whoever_runs_first(name: str, seed: int) -> None:
    made = read_msccl(write_msccl(PLANS[name], name))
    assert made == msccl_programme(PLANS[name])
    check_msccl(made, slots=1 + seed % 3, choose=random.Random(seed).choice)


@settings(max_examples=15)
@given(st.lists(st.integers(2, 4), min_size=1, max_size=3), st.integers(0, 99))
def test_all_stages_are_proven(factors: list[int], seed: int) -> None:
    count = 1
    for factor in factors:
        count *= factor
    made = read_msccl(write_msccl(Schedule.of(count, staged(whole(count), factors)[0]), "x"))
    check_msccl(made, choose=random.Random(seed).choice)


def test_what_ends_in_one_shot_is_refused() -> None:
    with pytest.raises(Unsupported, match="in one shot"):
        write_msccl(Schedule.of(4, staged(whole(4), (2, 2), 1)[0]), "x")


def test_blocks_that_do_not_wait_are_found_out() -> None:
    """The proof needs the waits: without them some order breaks the sums."""
    made = msccl_programme(PLANS["staged"])
    for blocks in made.ranks:
        for block in blocks:
            for step in block.steps:
                step.waits = None

    def run_in_many_orders() -> None:
        for seed in range(20):
            check_msccl(made, slots=4, choose=random.Random(seed).choice)

    with pytest.raises(PlanFault):
        run_in_many_orders()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('type="rrc"', 'type="r"', "lacks contributions|twice"),
        ('type="s" srcbuf="i" srcoff="0"', 'type="s" srcbuf="i" srcoff="1"', "twice|lacks"),
        ('recv="3"', 'recv="2"', "never run|twice|lacks"),
    ],
)
def test_a_changed_file_is_found_out(old: str, new: str, message: str) -> None:
    text = write_msccl(PLANS["direct"], "direct")
    assert old in text
    with pytest.raises(PlanFault, match=message):
        check_msccl(read_msccl(text.replace(old, new, 1)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<algo", "no XML"),
        ('<algo coll="alltoall"/>', "no MSCCL AllReduce"),
        ('<algo coll="allreduce"/>', "nchunksperloop is None"),
        (write_msccl(PLANS["ring"], "x").replace('type="s"', 'type="q"', 1), "a step is 'q'"),
        (write_msccl(PLANS["ring"], "x").replace('cnt="1"', 'cnt="x"', 1), "cnt is 'x'"),
    ],
)
def test_other_files_are_refused(text: str, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        read_msccl(text)


def test_what_msccl_cannot_hold_is_refused() -> None:
    with pytest.raises(Unsupported, match="thread blocks"):
        write_msccl(Schedule.of(120, [exchange(whole(120))[0]]), "wide")
    with pytest.raises(Unsupported, match="no multiples of"):
        write_msccl(Schedule.of(2, [exchange(whole(2), [1.0, 1.37])[0]]), "uneven")


def plan(planner: str, sizes: list[tuple[float, Schedule]]) -> Plan:
    details = [
        {"payload_bytes": size, "schedule": schedule.model_dump(mode="json"), "rounds": 2}
        for size, schedule in sizes
    ]
    objective = Objective(metric="allreduce_s", unit="s", better="lower", value=1.0)
    return Plan(planner=planner, objective=objective, details={"sizes": details})


def test_each_size_of_a_plan_becomes_a_file() -> None:
    found = emit(plan("allreduce", [(1024.0, PLANS["direct"]), (2.0**20, PLANS["ring"])]), "msccl")
    assert list(found) == ["allreduce-1024.xml", "allreduce-1048576.xml"]
    assert 'minBytes="0" maxBytes="32768"' in found["allreduce-1024.xml"]
    assert 'minBytes="32768"' in found["allreduce-1048576.xml"]
    for text in found.values():
        check_msccl(read_msccl(text))
    with pytest.raises(BadInput, match="has no collective"):
        emit(plan("placement", []), "msccl")
