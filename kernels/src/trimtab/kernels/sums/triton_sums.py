"""The sum of rows on a GPU: each number is read once, and the result written once."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# mypy: disallow-untyped-decorators=False, disallow-untyped-calls=False, check-untyped-defs=False
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def add_rows(
    own,
    rows,
    length,
    stride,
    count,
    UNROLLED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Adds rows to a stretch of ``own``; of so many rows all loads are under way at once."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = at < length
    total = tl.load(own + at, mask=there, other=0)
    narrow = total.dtype
    if narrow == tl.float16 or narrow == tl.bfloat16:
        total = total.to(tl.float32)
    wide = total.dtype
    # A pointer that goes on: a row's number times the stride may need 64 bits.
    come = rows + at
    for _ in tl.static_range(UNROLLED):
        total += tl.load(come, mask=there, other=0).to(wide)
        come += stride
    for _ in range(UNROLLED, count):
        total += tl.load(come, mask=there, other=0).to(wide)
        come += stride
    tl.store(own + at, total.to(narrow), mask=there)
