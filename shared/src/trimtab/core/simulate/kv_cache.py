"""The KV cache's blocks: counted, shared by prefix, the least recently used reused first."""

from __future__ import annotations

from collections import OrderedDict


class KvCache:
    """Counts blocks as vLLM's block pool does.

    Blocks that nobody holds stay readable until they are needed: they are kept as segments, the
    least recently released first, and a new allocation eats the first segment from its end. A
    segment with a name can be held again as far as it still exists.

    Args:
        blocks: the capacity in blocks.
        keeps: whether released blocks stay readable (prefix caching).

    Attributes:
        free: blocks that nobody holds, readable ones included.
    """

    __slots__ = ("_garbage", "_held", "_idle", "_keeps", "blocks", "free")

    def __init__(self, blocks: int, *, keeps: bool) -> None:
        self.blocks = self.free = blocks
        self._keeps = keeps
        self._held: dict[str, list[int]] = {}  # name -> [blocks, holders]
        self._idle: OrderedDict[str | int, int] = OrderedDict({0: blocks})
        self._garbage = 0

    @property
    def usage(self) -> float:
        """Share of the blocks that are held, 0 to 1."""
        return 1.0 - self.free / self.blocks

    def allocate(self, count: int) -> None:
        """Takes blocks that are free; the caller has checked that they are."""
        self.free -= count
        if not self._keeps:
            return
        idle = self._idle
        while count > 0:
            name, size = next(iter(idle.items()))
            if size > count:
                idle[name] = size - count
                return
            del idle[name]
            count -= size

    def release(self, count: int, name: str | None = None) -> None:
        """Gives blocks back; under a name, which is not in use, they stay readable until eaten."""
        self.free += count
        if not (count and self._keeps):
            return
        if name is None:
            self._garbage += 1
        self._idle[self._garbage if name is None else name] = count

    def release_unfilled(self, count: int) -> None:
        """Gives back blocks that were not full: nobody can read them, so they are eaten first."""
        self.free += count
        if count and self._keeps:
            self._forget(count)

    def readable(self, name: str) -> int:
        """How many blocks of a name can be held now."""
        held = self._held.get(name)
        return held[0] if held is not None else self._idle.get(name, 0)

    def holding_cost(self, name: str, count: int) -> int:
        """How many free blocks holding ``count`` of a name takes: none where somebody holds it."""
        return 0 if name in self._held else count

    def hold(self, name: str, count: int) -> None:
        """Holds ``count`` readable blocks of a name once more.

        Where nobody held it, the blocks beyond ``count`` are forgotten and the next to be eaten.
        """
        held = self._held.get(name)
        if held is None:
            rest = self._idle.pop(name) - count
            if rest:
                self._forget(rest)
            self.free -= count
            held = self._held[name] = [count, 0]
        held[1] += 1

    def take_back(self, name: str) -> None:
        """Takes the readable blocks of a name that nobody holds, for their former owner alone."""
        self.free -= self._idle.pop(name)

    def publish(self, name: str, count: int) -> bool:
        """Makes ``count`` blocks that the caller holds shareable, unless the name is in use."""
        if not self._keeps or name in self._held or name in self._idle:
            return False
        self._held[name] = [count, 1]
        return True

    def let_go(self, name: str) -> None:
        """Ends one holding of a name."""
        held = self._held[name]
        held[1] -= 1
        if not held[1]:
            del self._held[name]
            self.release(held[0], name)

    def _forget(self, count: int) -> None:
        self._garbage += 1
        self._idle[self._garbage] = count
        self._idle.move_to_end(self._garbage, last=False)
