"""Reads MSCCL's XML of an AllReduce, and proves it by running it on sets of contributions."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence

from trimtab.core.collectives.check import PlanFault
from trimtab.core.collectives.msccl import MscclBlock, MscclProgramme, MscclStep
from trimtab.core.errors import BadInput


def read_msccl(text: str, *, where: str = "the file") -> MscclProgramme:
    """What the thread blocks of an in-place AllReduce do.

    Raises:
        BadInput: it is no such XML.
    """
    from trimtab.core.topology.safe_xml import parse_xml

    root = parse_xml(text, where=where)
    if root.tag != "algo" or root.attributes.get("coll") != "allreduce":
        raise BadInput("this is no MSCCL AllReduce", where=where, fix="give an <algo>")

    ranks = [
        [
            MscclBlock(
                _number(where, block.attributes, "send"),
                _number(where, block.attributes, "recv"),
                [_read_step(where, each.attributes) for each in block.children],
            )
            for block in gpu.children
        ]
        for gpu in root.children
    ]
    return MscclProgramme(_number(where, root.attributes, "nchunksperloop"), ranks)


def _read_step(where: str, values: Mapping[str, str]) -> MscclStep:
    waits = _number(where, values, "depid"), _number(where, values, "deps")
    kind = values.get("type", "")
    if kind not in ("s", "r", "rrc", "nop"):
        raise BadInput(f"a step is {kind!r}", where=where, fix="give s, r, rrc or nop")
    offset = _number(where, values, "srcoff" if kind == "s" else "dstoff")
    awaited = bool(_number(where, values, "hasdep"))
    count = _number(where, values, "cnt")
    return MscclStep(kind, offset, count, waits if waits[0] >= 0 else None, awaited)


def _number(where: str, values: Mapping[str, str], key: str) -> int:
    try:
        return int(values[key])
    except (KeyError, ValueError):
        raise BadInput(
            f"{key} is {values.get(key)!r}", where=where, fix="give a whole number"
        ) from None


def check_msccl(
    made: MscclProgramme, *, slots: int = 1, choose: Callable[[Sequence[int]], int] = min
) -> None:
    """Runs the thread blocks on sets of contributions, in any order that their waits allow.

    Args:
        made: what is run.
        slots: messages that a connection holds before its sender waits.
        choose: which of the ranks that can go on does.

    Raises:
        PlanFault: a contribution is added twice or missing, or no block can go on.
    """
    _Machine(made, slots).run(choose)


class _Machine:
    def __init__(self, made: MscclProgramme, slots: int) -> None:
        self._made, self._slots = made, slots
        self._held = [[1 << rank] * made.chunks for rank in range(len(made.ranks))]
        self._done = [[0] * len(blocks) for blocks in made.ranks]
        self._wires: dict[tuple[int, int], deque[list[int]]] = defaultdict(deque)

    def run(self, choose: Callable[[Sequence[int]], int]) -> None:
        able = set(range(len(self._made.ranks)))
        while able:
            rank = choose(sorted(able))
            moved = [self._advance(rank, block) for block in range(len(self._made.ranks[rank]))]
            if any(moved):
                able |= self._peers(rank)
            else:
                able.discard(rank)
        self._check_end()

    def _peers(self, rank: int) -> set[int]:
        blocks = self._made.ranks[rank]
        return {peer for block in blocks for peer in (block.send, block.receive) if peer >= 0}

    def _advance(self, rank: int, number: int) -> bool:
        """Runs the next step of a block if it can run."""
        block, done = self._made.ranks[rank][number], self._done[rank][number]
        if done == len(block.steps):
            return False
        step = block.steps[done]
        if step.waits is not None and self._done[rank][step.waits[0]] <= step.waits[1]:
            return False
        where, span = f"rank {rank} block {number}", slice(step.offset, step.offset + step.count)
        if step.kind == "s":
            wire = self._wires[rank, block.send]
            if len(wire) >= self._slots:
                return False
            wire.append(self._held[rank][span])
        elif step.kind in ("r", "rrc"):
            wire = self._wires[block.receive, rank]
            if not wire:
                return False
            self._take(where, self._held[rank], span, wire.popleft(), step.kind)
        self._done[rank][number] += 1
        return True

    def _take(self, where: str, held: list[int], span: slice, parts: list[int], kind: str) -> None:
        before = held[span]
        if len(parts) != len(before):
            raise PlanFault(f"{len(parts)} chunks come for {len(before)}", where=where)
        if kind == "r":
            held[span] = parts
            return
        for part, own in zip(parts, before, strict=True):
            if part & own:
                raise PlanFault("a contribution is added twice", where=where)
        held[span] = [part | own for part, own in zip(parts, before, strict=True)]

    def _check_end(self) -> None:
        everyone = (1 << len(self._made.ranks)) - 1
        for rank, blocks in enumerate(self._made.ranks):
            for number, block in enumerate(blocks):
                if self._done[rank][number] < len(block.steps):
                    step = block.steps[self._done[rank][number]]
                    raise PlanFault(
                        f"step {self._done[rank][number]} ({step.kind}) is never run",
                        where=f"rank {rank} block {number}",
                    )
            lack = next((c for c, held in enumerate(self._held[rank]) if held != everyone), None)
            if lack is not None:
                raise PlanFault(f"chunk {lack} lacks contributions", where=f"rank {rank}")
