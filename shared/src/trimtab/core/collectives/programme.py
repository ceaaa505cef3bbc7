"""What one rank does in a plan: its sends, receives and sums, turn by turn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from trimtab.core.collectives.schedule import GroupDocument, Schedule

Phase = Literal["reduce-scatter", "all-gather"]


@dataclass(frozen=True, slots=True)
class Send:
    """A stretch of this rank's data that goes to another rank."""

    peer: int
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Receive:
    """A stretch that comes from another rank."""

    peer: int
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Sum:
    """A stretch that becomes the sum of what ranks hold of it, added in the given order."""

    begin: int
    end: int
    operands: tuple[int, ...]


@dataclass(slots=True)
class Turn:
    """What a rank does in one round: all messages at once, then the sums.

    What it receives without summing takes the place of what it held. The ends of each message are
    the same on both sides, and so is the order of several between the same two ranks.

    Attributes:
        phase, step, round: where in the plan it is.
        place: which round of the plan it is, counted from 0 and with those in which the rank rests.
        sends, receives: the messages.
        sums: what is added up once they are there.
    """

    phase: Phase
    step: int
    round: int
    place: int
    sends: list[Send] = field(default_factory=list)
    receives: list[Receive] = field(default_factory=list)
    sums: list[Sum] = field(default_factory=list)


def programme(schedule: Schedule, rank: int) -> list[Turn]:
    """The turns of a rank, in order: those of the reduce-scatter, then those of the all-gather."""
    mine = [
        [g for g in groups if rank in g.senders or (g.owners is not None and rank in g.owners)]
        for groups in schedule.steps
    ]
    order: list[tuple[Phase, int]] = [("reduce-scatter", step) for step in range(len(mine))]
    order += [("all-gather", step) for step in reversed(range(len(mine)))]
    turns: list[Turn] = []
    place = 0
    for phase, step in order:
        turns += _turns(phase, step, place, mine[step], rank)
        place += _rounds(phase, schedule.steps[step])
    return turns


def waves(turns: Sequence[Turn], chunks: int) -> list[list[tuple[int, int]]]:
    """What a rank does at the same time if chunks of the payload follow one another.

    A chunk is one round behind the chunk before it. Rounds are those of the plan: ranks that rest
    in some would else wait for one another's later chunks for ever.

    Args:
        turns: of the rank.
        chunks: how many there are.

    Returns:
        For each wave the chunks that are under way, and which turn each is in.
    """
    found: dict[int, list[tuple[int, int]]] = {}
    for index, turn in enumerate(turns):
        for chunk in range(chunks):
            found.setdefault(turn.place + chunk, []).append((chunk, index))
    return [sorted(found[wave]) for wave in sorted(found)]


def _rounds(phase: Phase, groups: Sequence[GroupDocument]) -> int:
    taking_part = _taking_part(phase, groups)
    return max((len(g.senders) - 1 if g.ring else 1 for g in taking_part), default=0)


def _taking_part(phase: Phase, groups: Sequence[GroupDocument]) -> list[GroupDocument]:
    return [g for g in groups if phase == "reduce-scatter" or not g.one_shot]


def _turns(
    phase: Phase, step: int, place: int, groups: Sequence[GroupDocument], rank: int
) -> Iterator[Turn]:
    for number in range(_rounds(phase, groups)):
        turn = Turn(phase, step, number, place + number)
        for group in _taking_part(phase, groups):
            if group.ring:
                if number < len(group.senders) - 1:
                    _pass_on(turn, group, rank)
            elif number == 0 and phase == "reduce-scatter":
                _reduce(turn, group, rank)
            elif number == 0:
                _gather(turn, group, rank)
        if turn.sends or turn.receives:
            yield turn


def _parts(group: GroupDocument) -> Iterator[tuple[int, int, int]]:
    """The owner, the beginning and the end of each part that is not empty."""
    return (part for part in group.parts if part[1] < part[2])


def _reduce(turn: Turn, group: GroupDocument, rank: int) -> None:
    for owner, begin, end in _parts(group):
        if owner == rank:
            others = [sender for sender in group.senders if sender != rank]
            turn.receives += [Receive(sender, begin, end) for sender in others]
            if len(group.senders) > 1:
                turn.sums.append(Sum(begin, end, group.senders))
        elif rank in group.senders:
            turn.sends.append(Send(owner, begin, end))


def _gather(turn: Turn, group: GroupDocument, rank: int) -> None:
    for owner, begin, end in _parts(group):
        if owner == rank:
            others = [sender for sender in group.senders if sender != rank]
            turn.sends += [Send(sender, begin, end) for sender in others]
        elif rank in group.senders:
            turn.receives.append(Receive(owner, begin, end))


def _pass_on(turn: Turn, group: GroupDocument, rank: int) -> None:
    count, place = len(group.senders), group.senders.index(rank)
    # Each part sets out from the member behind its owner and comes to its owner in the last round.
    late = int(turn.phase == "reduce-scatter")
    outgoing = (place - late - turn.round) % count
    incoming = (outgoing - 1) % count
    following, before = group.senders[(place + 1) % count], group.senders[place - 1]
    begin, end = group.cuts[outgoing], group.cuts[outgoing + 1]
    if begin < end:
        turn.sends.append(Send(following, begin, end))
    begin, end = group.cuts[incoming], group.cuts[incoming + 1]
    if begin < end:
        turn.receives.append(Receive(before, begin, end))
        if late:
            turn.sums.append(Sum(begin, end, (before, rank)))
