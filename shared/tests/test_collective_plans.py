"""Plans of collectives: the checker, and what each rank does, against numbers that are added."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from trimtab.core.collectives import (
    UNIT,
    Layout,
    PlanFault,
    Schedule,
    Step,
    Turn,
    check_plan,
    programme,
    waves,
)
from trimtab.core.collectives.combine import (
    SHARES,
    beside,
    concentrated,
    even_sizes,
    exchange,
    folded,
    ring,
    staged,
)
from trimtab.core.collectives.schedule import merged
from trimtab.core.errors import BadInput


def ranks(count: int) -> list[Layout]:
    return [Layout.whole(rank) for rank in range(count)]


def run(schedule: Schedule, values: list[list[float]]) -> list[list[float]]:
    """What each rank holds in the end, position by position, where it began with ``values``."""
    length = len(values[0])
    held = [list(row) for row in values]
    turns = [programme(schedule, rank) for rank in range(schedule.ranks)]

    def cut(position: int) -> int:
        return length * position // UNIT

    todo = sorted(
        {(t.phase, t.step, t.round) for mine in turns for t in mine},
        key=lambda k: (k[0] == "all-gather", -k[1] if k[0] == "all-gather" else k[1], k[2]),
    )
    for key in todo:
        before = [list(row) for row in held]
        for rank, mine in enumerate(turns):
            for turn in (t for t in mine if (t.phase, t.step, t.round) == key):
                if turn.phase == "all-gather" or not turn.sums:
                    for r in turn.receives:
                        span = slice(cut(r.begin), cut(r.end))
                        held[rank][span] = before[r.peer][span]
                for s in turn.sums:
                    for at in range(cut(s.begin), cut(s.end)):
                        held[rank][at] = sum(before[operand][at] for operand in s.operands)
    return held


def check_all(count: int, steps: list[Step], length: int = 37) -> None:
    schedule = Schedule.of(count, steps)
    check_plan(schedule)
    again = Schedule.model_validate_json(schedule.model_dump_json())
    assert again == schedule
    values = [[float((rank + 1) * 100 + at) for at in range(length)] for rank in range(count)]
    totals = [sum(column) for column in zip(*values, strict=True)]
    assert run(again, values) == [totals] * count


@given(st.integers(2, 24), st.lists(st.integers(2, 7), min_size=1, max_size=4))
def test_staged_exchange_of_any_number(count: int, factors: list[int]) -> None:
    steps, layout = staged(ranks(count), factors)
    check_all(count, steps)
    assert set(layout.owners.tolist()) == set(range(count))


@given(st.lists(st.integers(2, 4), min_size=1, max_size=4), st.data())
def test_stages_in_one_shot(factors: list[int], data: st.DataObject) -> None:
    count = prod(factors)
    assume(count <= 36)
    shots = data.draw(st.integers(1, len(factors)))
    order = data.draw(st.permutations(ranks(count)))
    steps, _ = staged(order, factors, shots)
    check_all(count, steps)
    assert len(steps) == len(factors)
    assert [bool(step.one_shot.all()) for step in steps] == [
        place >= len(factors) - shots for place in range(len(factors))
    ]
    gathers = [turn for turn in programme(Schedule.of(count, steps), 0) if _gathers(turn)]
    assert len(gathers) == len(factors) - shots


@given(st.integers(2, 24), st.integers(2, 7), st.integers(1, 6))
def test_the_last_stage_in_one_shot_of_any_number(count: int, factor: int, few: int) -> None:
    """Also behind owners of unequal stretches, and of fewer than there are ranks."""
    check_all(count, staged(ranks(count), (factor, count), 1)[0])
    groups = [ranks(count)[begin : begin + factor] for begin in range(0, count, factor)]
    below = [concentrated_on(group, few) for group in groups]
    steps = merged(plan for plan, _ in below)
    last, _ = staged([layout for _, layout in below], (len(below),), 1)
    check_all(count, [*steps, *last])


def concentrated_on(group: Sequence[Layout], few: int) -> tuple[list[Step], Layout]:
    if len(group) == 1:
        return [], group[0]
    steps, layout = staged(group, (len(group),))
    moved = concentrated(layout, [int(party.owners[0]) for party in group[:few]])
    return (steps, layout) if moved is None else ([*steps, moved[0]], moved[1])


def _gathers(turn: Turn) -> bool:
    return turn.phase == "all-gather"


@given(st.integers(2, 24))
def test_ring(count: int) -> None:
    check_all(count, [ring(ranks(count))[0]])


@given(st.integers(2, 16), st.data())
def test_weighted_exchange(count: int, data: st.DataObject) -> None:
    weights = data.draw(st.lists(st.integers(0, 5), min_size=count, max_size=count).filter(any))
    check_all(count, [exchange(ranks(count), weights)[0]])


@given(st.integers(3, 20), st.data())
def test_folding(count: int, data: st.DataObject) -> None:
    most = count // 2
    extras = data.draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=most, unique=True))
    factors = data.draw(st.sampled_from([(), (2, 2, 2), (4, 2), (20,)]))
    check_all(count, folded(ranks(count), extras, factors)[0])


@given(st.integers(2, 12), st.integers(1, 12))
def test_moving_to_few_owners(count: int, few: int) -> None:
    step, layout = exchange(ranks(count))
    moved = concentrated(layout, list(range(min(few, count))))
    check_all(count, [step] if moved is None else [step, moved[0]])


@given(
    st.permutations(range(12)),
    st.lists(st.sampled_from([(12,), (3, 4), (2, 3, 2), (5, 3), ()]), min_size=2, max_size=2),
    st.integers(1, SHARES - 1),
    st.booleans(),
    st.integers(0, 1),
)
def test_two_plans_side_by_side(order, factors, share: int, late: bool, shots: int) -> None:
    one = ranks(12)
    plans = [
        staged(parties, sizes, shots) if sizes else ([(made := ring(parties))[0]], made[1])
        for parties, sizes in zip((one, [one[rank] for rank in order]), factors, strict=True)
    ]
    steps, layout = beside(*plans, share, late=late)
    check_all(12, steps, length=61)
    assert len(steps) == max(len(plan[0]) for plan in plans)
    assert (layout.bounds[0], layout.bounds[-1]) == (0, UNIT)
    owned = [
        sum((layout.bounds[1:] - layout.bounds[:-1])[layout.bounds[1:] <= UNIT * share // SHARES]),
        UNIT * share // SHARES,
    ]
    assert owned[0] == owned[1]


@given(
    st.integers(2, 12),
    st.lists(st.integers(2, 4), min_size=1, max_size=3),
    st.integers(0, 5),
    st.integers(1, 6),
    st.integers(0, 1),
)
def test_no_rank_waits_for_a_chunk_that_waits_for_it(count, factors, folds, chunks, shots) -> None:
    """Ranks that wait for all messages of a wave, both ways, all come to the end."""
    extras = range(1, 2 * min(folds, (count - 1) // 2), 2)
    whole = ranks(count)
    steps, _ = folded(whole, extras, factors) if extras else staged(whole, factors, shots)
    schedule = Schedule.of(count, steps, chunks)
    turns = [programme(schedule, rank) for rank in range(count)]
    left = [waves(mine, chunks) for mine in turns]
    posted: set[tuple] = set()
    over = [0] * count
    before = None
    while over != before:
        before = list(over)
        for rank, own in enumerate(left):
            now = own[over[rank]] if over[rank] < len(own) else []
            posted |= {(m, rank) for c, index in now for m in _ends(rank, c, turns[rank][index])}
        for rank, own in enumerate(left):
            now = own[over[rank]] if over[rank] < len(own) else None
            ends = [m for c, index in now or () for m in _ends(rank, c, turns[rank][index])]
            both_came = all((m, m[-4]) in posted and (m, m[-3]) in posted for m in ends)
            over[rank] += now is not None and both_came
    assert over == [len(own) for own in left]


def _ends(rank: int, chunk: int, turn: Turn) -> list[tuple]:
    """The messages of a turn, named alike by both sides."""
    at = (chunk, turn.phase, turn.step, turn.round)
    sends = [(*at, rank, s.peer, s.begin, s.end) for s in turn.sends]
    return sends + [(*at, r.peer, rank, r.begin, r.end) for r in turn.receives]


def test_a_rank_alone_does_nothing() -> None:
    check_all(1, [])
    assert programme(Schedule.of(1, []), 0) == []


@given(st.integers(1, 1000), st.integers(1, 50))
def test_even_sizes(count: int, factor: int) -> None:
    sizes = even_sizes(count, factor)
    assert sum(sizes) == count
    assert max(sizes) <= factor
    assert max(sizes) - min(sizes) <= 1


ADDING_RANK_1_TWICE = [
    [
        {"senders": [0, 1], "owners": [0], "cuts": [0, UNIT]},
        {"senders": [2, 1], "owners": [2], "cuts": [0, UNIT]},
    ],
    [{"senders": [0, 2], "owners": [0], "cuts": [0, UNIT]}],
]


def changed(schedule: Schedule, **change: object) -> Schedule:
    """The schedule with a field of its first group changed."""
    data = schedule.model_dump()
    data["steps"][0][0].update(change)
    return Schedule.model_validate(data)


def test_what_is_no_allreduce_is_refused() -> None:
    sound = Schedule.of(4, staged(ranks(4), (2, 2))[0])
    check_plan(sound)
    with pytest.raises(PlanFault, match="the contribution of rank 1 is missing"):
        check_plan(changed(sound, senders=(0,), owners=(0, 0)))
    with pytest.raises(PlanFault, match="added twice"):
        check_plan(Schedule.model_validate({"ranks": 3, "steps": ADDING_RANK_1_TWICE}))
    with pytest.raises(PlanFault, match="it has passed on"):
        check_plan(Schedule.of(4, [*sound.arrays, sound.arrays[0]]))
    with pytest.raises(PlanFault, match="is missing"):
        check_plan(Schedule.of(4, sound.arrays[:1]))
    with pytest.raises(PlanFault, match="is missing"):
        check_plan(Schedule.of(4, staged(ranks(4), (2, 2), 2)[0][:1]))
    with pytest.raises(PlanFault, match="added twice"):
        check_plan(Schedule.of(4, staged(ranks(4), (2, 2), 2)[0][:1] * 2))
    half = changed(sound, cuts=(0, UNIT // 4, UNIT // 3))
    with pytest.raises(PlanFault):
        check_plan(half)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cuts": (0, UNIT)}, "2 parts have 2 cuts"),
        ({"one_shot": True}, "1 parts have 3 cuts"),
        ({"one_shot": True, "ring": True, "cuts": (0, UNIT)}, "a ring is not one-shot"),
        ({"one_shot": True, "owners": (0, 1), "cuts": (0, UNIT)}, "their senders as owners"),
        ({"cuts": (0, UNIT, UNIT // 2)}, "do not rise"),
        ({"senders": (0, 9)}, "names the rank 9 of 4"),
        ({"ring": True, "owners": (0, 1)}, "have their senders as owners"),
    ],
)
def test_a_malformed_group_is_refused(change: dict[str, object], message: str) -> None:
    data = Schedule.of(4, staged(ranks(4), (2, 2))[0]).model_dump()
    data["steps"][0][0].update(change)
    from trimtab.core.documents import validate

    with pytest.raises(BadInput, match=message):
        validate(Schedule, data, where="plan.json")


def test_another_unit_is_refused() -> None:
    from trimtab.core.documents import validate

    with pytest.raises(BadInput, match="the unit is 100"):
        validate(Schedule, {"ranks": 1, "unit": 100, "steps": []}, where="plan.json")
