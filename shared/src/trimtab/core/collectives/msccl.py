"""A plan in the XML of MSCCL, which runs it on GPUs inside NCCL.

Each rank has one thread block for what it sends to each peer and one for what it receives. Sums are
made message by message (``rrc``), in the order of the plan. A step waits for the steps of other
blocks that wrote what it touches, or still had to send it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from xml.sax.saxutils import quoteattr

import numpy as np

from trimtab.core.collectives.programme import Turn, programme
from trimtab.core.collectives.schedule import UNIT, Schedule
from trimtab.core.errors import Unsupported

MOST_STEPS, MOST_BLOCKS, MOST_COUNT = 256, 216, 72
"""Limits of MSCCL's interpreter: steps of a block, blocks of a rank, and chunks of a message."""

MOST_CHUNKS = 4096
_HAIR = 1e-6

_FIX = "plan a smaller job, or one plan for the whole payload (--method single)"

Place = tuple[int, int]
"""A thread block and one of its steps."""


@dataclass
class MscclStep:
    """A step of a thread block.

    Attributes:
        kind: ``s`` sends, ``r`` receives, ``rrc`` receives and adds, ``nop`` only waits.
        offset, count: the chunks.
        waits: the step of another block that must be done before; None for none.
        awaited: whether a step of another block waits for this one.
    """

    kind: str
    offset: int
    count: int
    waits: Place | None = None
    awaited: bool = False


@dataclass
class MscclBlock:
    """A thread block: the peer that it sends to or receives from, -1 for none, and its steps."""

    send: int
    receive: int
    steps: list[MscclStep] = field(default_factory=list)


@dataclass
class MscclProgramme:
    """What each rank's thread blocks do.

    Attributes:
        chunks: into which the payload is cut.
        ranks: the blocks of each.
    """

    chunks: int
    ranks: list[list[MscclBlock]]


def msccl_programme(schedule: Schedule) -> MscclProgramme:
    """The thread blocks of a plan.

    Raises:
        Unsupported: the plan is beyond a limit of MSCCL, or ends in one shot: sums in place would
            add up in another order on each rank, and wait for what they still have to send.
    """
    if any(group.one_shot for groups in schedule.steps for group in groups):
        raise Unsupported("the plan ends in one shot, which MSCCL cannot do in place", fix=_FIX)
    chunks = _chunks(schedule)
    ranks = [_Rank(programme(schedule, r), r, chunks).blocks for r in range(schedule.ranks)]
    for number, blocks in enumerate(ranks):
        longest = max((len(block.steps) for block in blocks), default=0)
        if len(blocks) > MOST_BLOCKS or longest > MOST_STEPS:
            raise Unsupported(
                f"rank {number} needs {len(blocks)} thread blocks of up to {longest} steps, and "
                f"MSCCL has {MOST_BLOCKS} of {MOST_STEPS}",
                fix=_FIX,
            )
    return MscclProgramme(chunks, ranks)


def _chunks(schedule: Schedule) -> int:
    """Into how many equal chunks the payload is cut so that each cut of the plan lies between two.

    The plan's own positions are whole, so that some of its cuts are a hair beside their fraction.
    """
    cuts = np.unique([c for groups in schedule.steps for g in groups for c in g.cuts] or [0])
    for count in range(1, MOST_CHUNKS + 1):
        places = cuts * (count / UNIT)
        if np.abs(places - np.rint(places)).max() < _HAIR:
            return count
    raise Unsupported(f"the plan's parts are no multiples of 1/{MOST_CHUNKS:,}", fix=_FIX)


class _Rank:
    """Makes the blocks of one rank, turn by turn."""

    def __init__(self, turns: Iterable[Turn], rank: int, chunks: int) -> None:
        self._chunks, self._rank = chunks, rank
        self._numbers: dict[tuple[int, int], int] = {}
        self.blocks: list[MscclBlock] = []
        self._writer: dict[int, Place] = {}
        self._readers: dict[int, set[Place]] = defaultdict(set)
        for turn in turns:
            self._turn(turn)

    def _turn(self, turn: Turn) -> None:
        for send in turn.sends:
            for chunks in self._pieces(send.begin, send.end):
                self._send(send.peer, chunks)
        first = {(s.begin, s.end): s.operands[0] for s in turn.sums if self._rank in s.operands}
        copied: set[tuple[int, int]] = set()
        summed = {(s.begin, s.end) for s in turn.sums}
        for message in turn.receives:
            key = message.begin, message.end
            adds = key in first or (key in summed and key in copied)
            copied.add(key)
            for chunks in self._pieces(*key):
                self._receive(message.peer, chunks, "rrc" if adds else "r")

    def _pieces(self, begin: int, end: int) -> Iterator[range]:
        first, last = (round(place * self._chunks / UNIT) for place in (begin, end))
        for start in range(first, last, MOST_COUNT):
            yield range(start, min(start + MOST_COUNT, last))

    def _send(self, peer: int, chunks: range) -> None:
        before = {self._writer[c] for c in chunks if c in self._writer}
        place = self._add((peer, -1), "s", chunks, before)
        for chunk in chunks:
            self._readers[chunk].add(place)

    def _receive(self, peer: int, chunks: range, kind: str) -> None:
        before = {self._writer[c] for c in chunks if c in self._writer}
        before |= {place for c in chunks for place in self._readers[c]}
        place = self._add((-1, peer), kind, chunks, before)
        for chunk in chunks:
            self._writer[chunk] = place
            self._readers[chunk].clear()

    def _add(self, peers: tuple[int, int], kind: str, chunks: range, before: set[Place]) -> Place:
        """Adds a step behind those that it waits for; a step waits for one, so others go ahead."""
        number = self._block(*peers)
        steps = self.blocks[number].steps
        latest: dict[int, int] = {}
        for block, step in before:
            if block != number:
                latest[block] = max(step, latest.get(block, -1))
        waits = sorted(latest.items())
        for block, step in waits:
            self.blocks[block].steps[step].awaited = True
        steps += [MscclStep("nop", 0, 0, place) for place in waits[:-1]]
        steps.append(MscclStep(kind, chunks.start, len(chunks), waits[-1] if waits else None))
        return number, len(steps) - 1

    def _block(self, send: int, receive: int) -> int:
        if (send, receive) not in self._numbers:
            self._numbers[send, receive] = len(self.blocks)
            self.blocks.append(MscclBlock(send, receive))
        return self._numbers[send, receive]


def write_msccl(
    schedule: Schedule, name: str, *, min_bytes: float = 0, max_bytes: float = 2**63
) -> str:
    """The XML file of a plan.

    Args:
        schedule: the plan. Its pipelined chunks are left out: MSCCL loops over the payload itself.
        name: of the algorithm.
        min_bytes: from which size of the payload on it is to be used.
        max_bytes: up to which.

    Raises:
        Unsupported: the plan is beyond a limit of MSCCL.
    """
    made = msccl_programme(schedule)
    head = {
        "name": name,
        "proto": "Simple",
        "nchannels": 1,
        "nchunksperloop": made.chunks,
        "ngpus": schedule.ranks,
        "coll": "allreduce",
        "inplace": 1,
        "outofplace": 0,
        "minBytes": int(min_bytes),
        "maxBytes": int(max_bytes),
    }
    lines = [f"<algo{_attributes(head)}>"]
    for number, blocks in enumerate(made.ranks):
        sizes = {"id": number, "i_chunks": made.chunks, "o_chunks": 0, "s_chunks": 0}
        lines.append(f"  <gpu{_attributes(sizes)}>")
        for index, block in enumerate(blocks):
            peers = {"id": index, "send": block.send, "recv": block.receive, "chan": 0}
            lines.append(f"    <tb{_attributes(peers)}>")
            lines += [
                f"      <step{_attributes(_step(*each))}/>" for each in enumerate(block.steps)
            ]
            lines.append("    </tb>")
        lines.append("  </gpu>")
    return "\n".join([*lines, "</algo>", ""])


def _step(number: int, step: MscclStep) -> dict[str, object]:
    block, awaited = step.waits or (-1, -1)
    return {
        "s": number,
        "type": step.kind,
        "srcbuf": "i",
        "srcoff": step.offset,
        "dstbuf": "i",
        "dstoff": step.offset,
        "cnt": step.count,
        "depid": block,
        "deps": awaited,
        "hasdep": int(step.awaited),
    }


def _attributes(values: Mapping[str, object]) -> str:
    return "".join(f" {key}={quoteattr(str(value))}" for key, value in values.items())
