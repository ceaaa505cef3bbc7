"""Runs the plan of a collective on a flat tensor, with the sends and receives of a base group."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from typing import Any

import torch

from trimtab.core.collectives import UNIT, Schedule, Turn, programme
from trimtab.core.errors import TrimtabError

Combine = Callable[[torch.Tensor, Sequence[torch.Tensor]], None]
"""Adds further operands (each L) to the first one (L) in place."""

FUSED_FROM = 6
"""From so many operands on, one fused sum is faster than a chain of additions."""

_TAG_BASE, _TAG_SLOTS = 1 << 30, 1 << 18


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
        places: list[int | None] = [None] * count
        for (begin, end), rank in _owners(self.schedule).items():
            first, last = round(begin * count / UNIT), round(end * count / UNIT)
            off = abs(begin * count - first * UNIT) + abs(end * count - last * UNIT)
            if last - first != 1 or off > UNIT // 1000 or places[rank] is not None:
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
            owners = group.senders if group.owners is None else group.owners
            for owner, begin, end in zip(owners, group.cuts, group.cuts[1:], strict=False):
                last[place[begin] : place[end]] = [owner] * (place[end] - place[begin])
    found: dict[tuple[int, int], int] = {}
    begin = 0
    for index, owner in enumerate(last):
        if index + 1 == len(last) or last[index + 1] != owner:
            found[cuts[begin], cuts[index + 1]] = owner
            begin = index + 1
    return found


class PlanRunner:
    """Runs plans one after the other.

    Args:
        base: a process group that sends and receives.
        timeout: how long a message may take.
    """

    def __init__(self, base: Any, timeout: timedelta) -> None:
        self._base, self._timeout = base, timeout
        self._staging: dict[torch.dtype, torch.Tensor] = {}

    def run(
        self,
        turns: Sequence[Turn],
        data: torch.Tensor,
        combine: Combine,
        *,
        call: int,
        chunks: int = 1,
    ) -> None:
        """Goes through the turns of this rank.

        Args:
            turns: what it does.
            data: its payload (L), which becomes the result.
            combine: how operands become one.
            call: a number that all ranks give this call, and no other call that is near it.
            chunks: pieces of the payload that follow one another.

        Raises:
            PeerLost: a rank is gone, or does not take part in time.
        """
        count = max(1, min(chunks, data.numel()))
        length = data.numel()
        pieces = [data[length * c // count : length * (c + 1) // count] for c in range(count)]
        # Sizes that differ between ranks must not meet: a longer message than expected ends gloo.
        key = hash((call, length, data.element_size())) & 0xFFF
        slots = [_Slots(_TAG_BASE | key << 18, count, c) for c in range(count)]
        for wave in range(len(turns) + count - 1):
            active = [c for c in range(count) if 0 <= wave - c < len(turns)]
            started = [
                self._start(turns[wave - c], pieces[c], slots[c], row)
                for row, c in enumerate(active)
            ]
            for c, posted in zip(active, started, strict=True):
                posted.finish(turns[wave - c], pieces[c], combine, self._timeout)
            for posted in started:
                posted.release(self._timeout)

    def _start(self, turn: Turn, data: torch.Tensor, slots: _Slots, row: int) -> _Posted:
        """Posts all messages of a turn; what is to be summed comes into rows beside the data."""
        length = data.numel()
        summed = {(s.begin, s.end) for s in turn.sums}
        posted = _Posted()
        for message in turn.receives:
            begin, end = _cut(message.begin, length), _cut(message.end, length)
            tag = slots.next(("from", message.peer))
            if begin == end:
                continue
            key = (message.begin, message.end)
            into = torch.empty(end - begin, dtype=data.dtype) if key in summed else data[begin:end]
            if key in summed:
                posted.rows.setdefault(key, {})[message.peer] = into
            work = self._call("recv", into, message.peer, tag)
            posted.receives.append((message.peer, into, work))
        for outgoing in turn.sends:
            begin, end = _cut(outgoing.begin, length), _cut(outgoing.end, length)
            tag = slots.next(("to", outgoing.peer))
            if begin < end:
                part = data[begin:end]
                work = self._call("send", part, outgoing.peer, tag)
                posted.sends.append((outgoing.peer, part, work))
        return posted

    def _call(self, name: str, part: torch.Tensor, peer: int, tag: int) -> Any:
        try:
            return getattr(self._base, name)([part], peer, tag)
        except RuntimeError as error:
            raise PeerLost(peer, _first_line(error)) from None


class _Slots:
    """Tags of the messages between two ranks, numbered alike on both sides."""

    def __init__(self, base: int, chunks: int, chunk: int) -> None:
        self._base, self._chunks, self._chunk = base, chunks, chunk
        self._count: Counter[tuple[str, int]] = Counter()

    def next(self, way: tuple[str, int]) -> int:
        number = self._count[way] * self._chunks + self._chunk
        self._count[way] += 1
        return self._base | number % _TAG_SLOTS


class _Posted:
    """The messages of a turn under way; tensors are held until gloo is done with them."""

    def __init__(self) -> None:
        self.receives: list[tuple[int, torch.Tensor, Any]] = []
        self.sends: list[tuple[int, torch.Tensor, Any]] = []
        self.rows: dict[tuple[int, int], dict[int, torch.Tensor]] = {}

    def finish(self, turn: Turn, data: torch.Tensor, combine: Combine, timeout: timedelta) -> None:
        """Waits for what comes, and sums."""
        _wait(self.receives, timeout)
        length = data.numel()
        for total in turn.sums:
            begin, end = _cut(total.begin, length), _cut(total.end, length)
            if begin < end:
                rows = self.rows[total.begin, total.end]
                operands = [rows[peer] for peer in total.operands if peer in rows]
                combine(data[begin:end], operands)

    def release(self, timeout: timedelta) -> None:
        """Waits until what was sent may change."""
        _wait(self.sends, timeout)


def _wait(messages: Sequence[tuple[int, torch.Tensor, Any]], timeout: timedelta) -> None:
    for peer, _, work in messages:
        try:
            work.wait(timeout)
        except RuntimeError as error:
            raise PeerLost(peer, _first_line(error)) from None


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

    def combine(first: torch.Tensor, others: Sequence[torch.Tensor]) -> None:
        if fused and first.dtype in (torch.float16, torch.bfloat16):
            # Rounded once, not once for each operand.
            wide = first.float()
            for other in others:
                wide.add_(other)
            first.copy_(wide)
        elif fused and len(others) + 1 >= FUSED_FROM:
            first.copy_(torch.stack([first, *others]).sum(dim=0, dtype=first.dtype))
        else:
            for other in others:
                operands(first, other)

    return combine
