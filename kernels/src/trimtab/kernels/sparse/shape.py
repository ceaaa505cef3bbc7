"""The sizes of native sparse attention, and how scores of entries become those of blocks."""

from __future__ import annotations

from dataclasses import dataclass

from trimtab.kernels.sparse.checks import check_numbers, check_total


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
        check_numbers(1, window=self.window, stride=self.stride, block=self.block, top=self.top)
        check_numbers(1, sliding=self.sliding)
        check_numbers(0, first=self.first, recent=self.recent)
        check_total(self.top, self.first, self.recent)
        if self.window % self.stride or self.block % self.stride:
            raise ValueError(
                f"the stride {self.stride} must divide window {self.window} and block {self.block}"
            )
        if self.window > self.block:
            raise ValueError(f"the window {self.window} is longer than the block {self.block}")

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
