"""Runs the plan of a collective on a flat tensor, with the sends and receives of a base group."""

from __future__ import annotations

import itertools
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from typing import Any

import torch

from trimtab.core.collectives import UNIT, Schedule, Turn, programme, waves
from trimtab.core.errors import TrimtabError

Combine = Callable[[torch.Tensor, torch.Tensor], None]
"""Adds further operands (K, L) to the first one (L) in place."""

FUSED_FROM = 6
"""From so many operands on, one fused sum is faster than a chain of additions."""

_TAG_BASE, _TAG_SLOTS = 1 << 30, 1 << 18

_KEPT_BYTES = 1 << 26
"""The most room for incoming operands that is kept from one call to the next."""

_KEPT_CUTS = 256

_SMALL_BYTES = 64 * 1024
"""Up to so large payloads fit into the queues of switches."""

_ROUNDED = 64
"""By how many parts of `UNIT` cuts of stages may be off: far less than half an element."""


class PeerLost(TrimtabError):
    """A rank did not send or take what the plan says.

    Args:
        rank: its number in the group.
        reason: what the base group said.
    """

    def __init__(self, rank: int, reason: str) -> None:
        self.rank, self.reason = rank, reason
        super().__init__(f"rank {rank} does not answer: {reason}")


@dataclass(frozen=True)
class PlannedRank:
    """What one rank does in a plan.

    Attributes:
        schedule: the plan.
        rank: in the group.
    """

    schedule: Schedule
    rank: int

    @cached_property
    def turns(self) -> list[Turn]:
        """All its turns."""
        return programme(self.schedule, self.rank)

    @cached_property
    def reducing(self) -> list[Turn]:
        """Those of the reduce-scatter."""
        return [turn for turn in self.turns if turn.phase == "reduce-scatter"]

    @cached_property
    def gathering(self) -> list[Turn]:
        """Those of the all-gather."""
        return [turn for turn in self.turns if turn.phase == "all-gather"]

    @cached_property
    def places(self) -> tuple[int, ...] | None:
        """Which N-th of the payload each rank owns between the phases; None where none is exact."""
        count = self.schedule.ranks
        if any(group.one_shot for groups in self.schedule.steps for group in groups):
            return None
        places: list[int | None] = [None] * count
        for (begin, end), rank in _owners(self.schedule).items():
            first, last = round(begin * count / UNIT), round(end * count / UNIT)
            off = max(abs(begin * count - first * UNIT), abs(end * count - last * UNIT))
            if last - first != 1 or off > _ROUNDED * count or places[rank] is not None:
                return None
            places[rank] = first
        return None if None in places else tuple(place for place in places if place is not None)


def _owners(schedule: Schedule) -> dict[tuple[int, int], int]:
    """The owner of each stretch after the reduce-scatter: that of the last exchange it was in."""
    cuts = sorted({0, UNIT, *(cut for groups in schedule.steps for g in groups for cut in g.cuts)})
    place = {cut: index for index, cut in enumerate(cuts)}
    last = [0] * (len(cuts) - 1)
    for groups in schedule.steps:
        for group in groups:
            for owner, begin, end in group.parts:
                last[place[begin] : place[end]] = [owner] * (place[end] - place[begin])
    found: dict[tuple[int, int], int] = {}
    begin = 0
    for index, owner in enumerate(last):
        if index + 1 == len(last) or last[index + 1] != owner:
            found[cuts[begin], cuts[index + 1]] = owner
            begin = index + 1
    return found


@dataclass(frozen=True, slots=True)
class _Message:
    """A message of a turn, in elements of a piece of the payload.

    Attributes:
        peer: the other rank.
        begin, end: in the piece; in the room for operands where ``summed``.
        slot: its number among the messages between the two ranks in this direction.
        summed: whether it comes into the room.
    """

    peer: int
    begin: int
    end: int
    slot: int
    summed: bool = False


@dataclass(frozen=True, slots=True)
class _Total:
    """A stretch of the piece, and the rows of the room (K, L) that are added to it.

    Attributes:
        begin, end: in the piece.
        room: where the rows begin.
        rows: how many there are.
        own: the row into which the piece's own operand goes first, where the same sum is made at
            several ranks and must be rounded alike.
    """

    begin: int
    end: int
    room: int
    rows: int
    own: int | None = None


@dataclass(frozen=True, slots=True)
class _CutTurn:
    """A turn in elements of a piece, without what is empty.

    Attributes:
        receives, sends, sums: what is done.
        room: elements of incoming operands.
        keeps: whether what it sends is what it adds to, so that the sums wait for the sends.
    """

    receives: tuple[_Message, ...]
    sends: tuple[_Message, ...]
    sums: tuple[_Total, ...]
    room: int
    keeps: bool

    def add_up(self, piece: torch.Tensor, room: torch.Tensor, combine: Combine) -> None:
        """Adds what has come into the room to what the piece holds of it."""
        for total in self.sums:
            own = piece[total.begin : total.end]
            come = room[total.room : total.room + total.rows * own.numel()].view(total.rows, -1)
            if total.own is None:
                combine(own, come)
            else:
                come[total.own].copy_(own)
                combine(come[0], come[1:])
                own.copy_(come[0])


_Wave = list[tuple[int, _CutTurn]]
"""What is done at the same time: a turn of each piece that is under way."""


@dataclass(frozen=True, slots=True)
class _Active:
    """A turn of one piece of the payload.

    Attributes:
        turn: in elements of the piece.
        piece: of the payload.
        call: the call's tag.
        count, number: how many pieces there are, and which this is.
    """

    turn: _CutTurn
    piece: torch.Tensor
    call: int
    count: int
    number: int

    def tag(self, message: _Message) -> int:
        """The same on both sides, and no other message's between the two ranks."""
        return self.call | (message.slot * self.count + self.number) % _TAG_SLOTS


_Pending = list[tuple[int, Any]]
"""Messages under way: the other rank, and gloo's work."""


_Coming = list[tuple[torch.Tensor, _Pending]]


def _are_asked_early(
    before: Sequence[_Active], active: Sequence[_Active], payload_bytes: int
) -> bool:
    """Whether the messages of a wave are asked for while those of the one before it come.

    A message whose receiver is ready needs no further trip. None comes too early: what an
    all-gather writes is a sum of what this rank has sent from there, and operands have room of
    their own. But large ones whose senders need not wait for their receivers meet in queues of
    switches: but for those that come one by one from one rank, as around a ring.
    """
    return payload_bytes <= _SMALL_BYTES or (
        len(senders := _senders(active)) == 1 and senders == _senders(before)
    )


def _senders(active: Sequence[_Active]) -> list[int]:
    return [message.peer for one in active for message in one.turn.receives]


class PlanRunner:
    """Runs plans one after the other.

    Args:
        base: a process group that sends and receives.
        timeout: how long a message may take; it may be changed between two calls.
    """

    def __init__(self, base: Any, timeout: timedelta) -> None:
        self._base, self.timeout = base, timeout
        self._cuts = Cuts()
        self._rooms = (_Room(), _Room())

    def run(
        self,
        turns: Sequence[Turn],
        data: torch.Tensor,
        combine: Combine,
        *,
        call: int,
        chunks: int = 1,
        what: int = 0,
    ) -> None:
        """Goes through the turns of this rank.

        Args:
            turns: what it does.
            data: its payload (L), which becomes the result.
            combine: how operands become one.
            call: a number that all ranks give this call, and no other call that is near it.
            chunks: pieces of the payload that follow one another.
            what: a digest of all else that ranks must do alike; where it differs, nothing arrives.

        Raises:
            PeerLost: a rank is gone, or does not take part in time.
        """
        length = data.numel()
        count = max(1, min(chunks, length))
        # Sizes that differ between ranks must not meet: a longer message than expected ends gloo.
        tag = _TAG_BASE | (hash((call, length, data.element_size(), what)) & 0xFFF) << 18
        pieces = [data[length * c // count : length * (c + 1) // count] for c in range(count)]
        actives = [
            [_Active(turn, pieces[c], tag, count, c) for c, turn in wave]
            for wave in self._cuts.waves(turns, length, count)
        ]
        ahead: _Coming | None = None
        for number, active in enumerate(actives):
            coming = self._receive(active, number, data.dtype) if ahead is None else ahead
            sends = [self._send(one) for one in active]
            following = actives[number + 1] if number + 1 < len(actives) else []
            early = _are_asked_early(active, following, data.nbytes)
            ahead = self._receive(following, number + 1, data.dtype) if early else None
            for one, (room, receives), pending in zip(active, coming, sends, strict=True):
                self._wait(receives)
                if one.turn.keeps:
                    self._wait(pending)
                one.turn.add_up(one.piece, room, combine)
            for pending in sends:
                self._wait(pending)

    def _receive(self, active: Sequence[_Active], number: int, dtype: torch.dtype) -> _Coming:
        """Asks for the messages of a wave: the room for operands of each turn, and what comes."""
        rooms = self._rooms[number % 2].split([one.turn.room for one in active], dtype)
        return [(room, self._ask(one, room)) for one, room in zip(active, rooms, strict=True)]

    def _ask(self, one: _Active, room: torch.Tensor) -> _Pending:
        receives, peer = [], -1
        try:
            for message in one.turn.receives:
                peer = message.peer
                into = (room if message.summed else one.piece)[message.begin : message.end]
                receives.append((peer, self._base.recv([into], peer, one.tag(message))))
        except RuntimeError as error:
            raise PeerLost(peer, _first_line(error)) from None
        return receives

    def _send(self, one: _Active) -> _Pending:
        sends, peer = [], -1
        try:
            for message in one.turn.sends:
                peer = message.peer
                part = one.piece[message.begin : message.end]
                sends.append((peer, self._base.send([part], peer, one.tag(message))))
        except RuntimeError as error:
            raise PeerLost(peer, _first_line(error)) from None
        return sends

    def _wait(self, messages: _Pending) -> None:
        """Waits for messages and forgets them: gloo's wait for the same one would last for ever."""
        for peer, work in messages:
            try:
                work.wait(self.timeout)
            except RuntimeError as error:
                raise PeerLost(peer, _first_line(error)) from None
        messages.clear()


class Cuts:
    """Turns in elements, kept from one call to the next."""

    def __init__(self) -> None:
        # With the turns themselves, so that no others can have their id.
        self._kept: OrderedDict[tuple[int, int, int], tuple[Sequence[Turn], list[_Wave]]] = (
            OrderedDict()
        )

    def waves(self, turns: Sequence[Turn], length: int, count: int) -> list[_Wave]:
        """What is done at the same time, of so many pieces of a payload of so many elements.

        Both sides of a wave name the messages between two ranks in one direction in one order.
        """
        key = (id(turns), length, count)
        if key not in self._kept:
            lengths = [length * (c + 1) // count - length * c // count for c in range(count)]
            cuts = {each: _cut_turns(turns, each) for each in set(lengths)}
            found = [[(c, cuts[lengths[c]][i]) for c, i in wave] for wave in waves(turns, count)]
            self._kept[key] = (turns, found)
            if len(self._kept) > _KEPT_CUTS:
                self._kept.popitem(last=False)
        return self._kept[key][1]


class _Room:
    """Room for incoming operands, which is kept from one call to the next."""

    def __init__(self) -> None:
        self._kept = torch.empty(0, dtype=torch.uint8)

    def split(self, lengths: Sequence[int], dtype: torch.dtype) -> list[torch.Tensor]:
        """One part of each length, in elements."""
        size_bytes = sum(lengths) * dtype.itemsize
        if size_bytes > _KEPT_BYTES:
            whole = torch.empty(sum(lengths), dtype=dtype)
        else:
            if size_bytes > self._kept.numel():
                self._kept = torch.empty(size_bytes, dtype=torch.uint8)
            whole = self._kept[:size_bytes].view(dtype)
        ends = list(itertools.accumulate(lengths))
        return [whole[end - length : end] for end, length in zip(ends, lengths, strict=True)]


def _cut_turns(turns: Sequence[Turn], length: int) -> list[_CutTurn]:
    slots: Counter[tuple[str, int]] = Counter()
    return [_cut_turn(turn, length, slots) for turn in turns]


def _cut_turn(turn: Turn, length: int, slots: Counter[tuple[str, int]]) -> _CutTurn:
    sums, places, room = [], {}, 0
    come = {(message.peer, message.begin, message.end) for message in turn.receives}
    sent = {(message.begin, message.end) for message in turn.sends}
    for total in turn.sums:
        begin, end = _cut(total.begin, length), _cut(total.end, length)
        peers = [p for p in total.operands if (p, total.begin, total.end) in come]
        ordered = (total.begin, total.end) in sent
        rows = list(total.operands) if ordered else peers
        if begin < end and peers:
            own = next((row for row, rank in enumerate(rows) if rank not in peers), None)
            sums.append(_Total(begin, end, room, len(rows), own))
            for rank in rows:
                places[rank, total.begin, total.end] = room
                room += end - begin
    receives, sends = [], []
    for message in turn.receives:
        begin, end = _cut(message.begin, length), _cut(message.end, length)
        slot = _next(slots, ("from", message.peer))
        at = places.get((message.peer, message.begin, message.end))
        if begin < end:
            first = begin if at is None else at
            last = first + end - begin
            receives.append(_Message(message.peer, first, last, slot, at is not None))
    for outgoing in turn.sends:
        begin, end = _cut(outgoing.begin, length), _cut(outgoing.end, length)
        slot = _next(slots, ("to", outgoing.peer))
        if begin < end:
            sends.append(_Message(outgoing.peer, begin, end, slot))
    keeps = any(total.own is not None for total in sums)
    return _CutTurn(tuple(receives), tuple(sends), tuple(sums), room, keeps)


def _next(slots: Counter[tuple[str, int]], way: tuple[str, int]) -> int:
    """Numbers messages between two ranks alike on both sides, with those that are empty."""
    slots[way] += 1
    return slots[way] - 1


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200]


def _cut(position: int, length: int) -> int:
    """The element at a position of the payload, the nearest one."""
    return (length * position + UNIT // 2) // UNIT


def adding(operands: Callable[[torch.Tensor, torch.Tensor], object], fused: bool) -> Combine:
    """How operands become one.

    Args:
        operands: combines a second operand into a first one in place.
        fused: whether it is a sum, so that many operands may be summed at once.
    """

    def combine(first: torch.Tensor, others: torch.Tensor) -> None:
        if fused and first.dtype in (torch.float16, torch.bfloat16):
            # Rounded once, not once for each operand.
            wide = first.float()
            for other in others:
                wide.add_(other)
            first.copy_(wide)
        elif fused and len(others) + 1 >= FUSED_FROM:
            first.add_(others.sum(dim=0, dtype=first.dtype))
        else:
            for other in others:
                operands(first, other)

    return combine
