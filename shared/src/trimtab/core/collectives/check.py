"""Proof that a plan is an AllReduce: each rank ends with each contribution exactly once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

from trimtab.core.collectives.programme import Sum, Turn, programme
from trimtab.core.collectives.schedule import UNIT, Schedule
from trimtab.core.errors import BadInput

Held = list[list[int | None]]
"""The contributions that each rank holds of each stretch, as bits; None once they are passed on."""

_Key = tuple[str, int, int]


class PlanFault(BadInput):
    """A plan does not compute an AllReduce."""


def check_plan(schedule: Schedule) -> None:
    """Runs what each rank would do on sets of contributions instead of numbers.

    Every message must be expected by its receiver and hold a partial sum that its sender still
    owns; no contribution may be added twice; at the end every rank must hold all of them.

    Raises:
        PlanFault: a plan that fails, with the rank, the step and the stretch.
    """
    _Execution(schedule).run()


class _Execution:
    def __init__(self, schedule: Schedule) -> None:
        self._ranks = schedule.ranks
        cuts = {0, UNIT}
        for groups in schedule.steps:
            cuts.update(cut for group in groups for cut in group.cuts)
        self._cuts = sorted(cuts)
        self._place = {cut: index for index, cut in enumerate(self._cuts)}
        stretches = len(self._cuts) - 1
        self._held: Held = [[1 << rank] * stretches for rank in range(self._ranks)]
        self._turns: dict[_Key, dict[int, Turn]] = defaultdict(dict)
        for rank in range(self._ranks):
            for turn in programme(schedule, rank):
                self._turns[turn.phase, turn.step, turn.round][rank] = turn

    def run(self) -> None:
        for key in sorted(self._turns, key=_order):
            self._round(key, self._turns[key])
        everyone = (1 << self._ranks) - 1
        for rank, held in enumerate(self._held):
            for at, contributions in enumerate(held):
                if contributions != everyone:
                    raise self._fault("the plan's end", rank, at, _lack(contributions, everyone))

    def _round(self, key: _Key, turns: dict[int, Turn]) -> None:
        where = f"{key[0]} step {key[1]} round {key[2]}"
        sent = self._sent(where, turns)
        arrived: dict[int, dict[tuple[int, int], int]] = {rank: {} for rank in turns}
        for rank, turn in turns.items():
            for message in turn.receives:
                for at in self._stretches(message.begin, message.end):
                    part = sent.pop((message.peer, rank, at), None)
                    if part is None:
                        raise self._fault(where, rank, at, f"rank {message.peer} sends it nothing")
                    arrived[rank][message.peer, at] = part
        if sent:
            (source, to, at), _ = next(iter(sent.items()))
            raise self._fault(where, to, at, f"it does not expect what rank {source} sends")
        if key[0] == "reduce-scatter":
            self._forget(turns)
        for rank, turn in turns.items():
            self._take(where, rank, turn.sums, arrived[rank])

    def _sent(self, where: str, turns: dict[int, Turn]) -> dict[tuple[int, int, int], int]:
        sent: dict[tuple[int, int, int], int] = {}
        for rank, turn in turns.items():
            for message in turn.sends:
                for at in self._stretches(message.begin, message.end):
                    part = self._held[rank][at]
                    if part is None:
                        raise self._fault(where, rank, at, "it sends what it has passed on")
                    if (rank, message.peer, at) in sent:
                        raise self._fault(where, rank, at, f"it sends rank {message.peer} it twice")
                    sent[rank, message.peer, at] = part
        return sent

    def _forget(self, turns: dict[int, Turn]) -> None:
        for rank, turn in turns.items():
            kept = {(total.begin, total.end) for total in turn.sums if rank in total.operands}
            for message in turn.sends:
                if (message.begin, message.end) not in kept:
                    for at in self._stretches(message.begin, message.end):
                        self._held[rank][at] = None

    def _take(
        self, where: str, rank: int, sums: Sequence[Sum], arrived: dict[tuple[int, int], int]
    ) -> None:
        held = self._held[rank]
        for total in sums:
            for at in self._stretches(total.begin, total.end):
                combined = 0
                for operand in total.operands:
                    part = held[at] if operand == rank else arrived.pop((operand, at), None)
                    if part is None:
                        raise self._fault(where, rank, at, f"rank {operand}'s part is not there")
                    if combined & part:
                        raise self._fault(where, rank, at, "a contribution is added twice")
                    combined |= part
                held[at] = combined
        placed: set[int] = set()
        for (_, at), part in arrived.items():
            if at in placed:
                raise self._fault(where, rank, at, "two messages overwrite one another")
            placed.add(at)
            held[at] = part

    def _stretches(self, begin: int, end: int) -> range:
        return range(self._place[begin], self._place[end])

    def _fault(self, where: str, rank: int, at: int, what: str) -> PlanFault:
        low, high = (self._cuts[i] / UNIT for i in (at, at + 1))
        return PlanFault(f"rank {rank}, {low:.4f} to {high:.4f}: {what}", where=where)


def _order(key: _Key) -> tuple[int, int, int]:
    phase, step, number = key
    gathering = phase == "all-gather"
    return int(gathering), -step if gathering else step, number


def _lack(contributions: int | None, everyone: int) -> str:
    lost = next(_bits(everyone & ~(contributions or 0)), None)
    return f"the contribution of rank {lost} is missing"


def _bits(mask: int) -> Iterator[int]:
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low
