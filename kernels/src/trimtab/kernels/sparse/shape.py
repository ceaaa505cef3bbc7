"""The sizes of native sparse attention, and how scores of entries become those of blocks."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SparseShape:
    """Sizes in tokens, but for the counts of blocks (NSA, arXiv 2502.11089, section 4).

    Raises:
        ValueError: the sizes do not fit together.
    """

    window: int = 32
    """Raw tokens behind one compressed entry."""
    stride: int = 16
    """Raw tokens between the beginnings of neighbouring entries."""
    block: int = 64
    top: int = 16
    """Blocks of each query, forced ones included."""
    first: int = 1
    """Forced blocks at the beginning of the sequence."""
    recent: int = 2
    """Forced blocks up to the query's own."""
    sliding: int = 512

    def __post_init__(self) -> None:
        if min(self.window, self.stride, self.block, self.top, self.sliding) < 1:
            raise ValueError(f"{self}: every size must be at least 1")
        if min(self.first, self.recent) < 0 or self.first + self.recent > self.top:
            raise ValueError(f"{self}: the {self.top} blocks of a query must hold the forced ones")
        if self.window % self.stride or self.block % self.stride or self.window > self.block:
            raise ValueError(f"{self}: the stride must divide window and block, window <= block")

    @property
    def entries_per_block(self) -> int:
        """Compressed entries that begin in one block."""
        return self.block // self.stride

    @property
    def reach(self) -> int:
        """Entries before a block's first one that still overlap it."""
        return self.window // self.stride - 1

    @property
    def weights(self) -> tuple[int, ...]:
        """How often each entry counts for a block, from the first that overlaps it (equation 9)."""
        inner, outer = self.entries_per_block, self.window // self.stride
        counts = [0] * (inner + outer - 1)
        for m in range(inner):
            for n in range(outer):
                counts[m + n] += 1
        return tuple(counts)

    def entries(self, tokens: int) -> int:
        """Compressed entries of a sequence."""
        return max(0, (tokens - self.window) // self.stride + 1)
