"""Bytes that our kernels of the selected branch read and write, for the model of times.

Counted as the kernels are written, load by load; a test counts the same in Triton's interpreter.
What a cache may spare them is not taken off. How long lists are is expected, not known: queries
choose the forced blocks, and among the rest each as likely as any other.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_FORCED = 3
"""The first block, the own and the one before."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of one sequence that begins at its first token, and of what is launched for it."""

    tokens: int
    kv_heads: int
    group: int
    d: int
    d_v: int
    block: int
    top: int
    item_bytes: int = 2
    workspace_bytes: int = 384 * 2**20
    near_until: int | None = None
    """Token from which on queries have far blocks (`trimtab.kernels.sparse.triton_near`); None
    where no block is near."""

    @property
    def panel(self) -> int:
        """Numbers of a block's keys and values."""
        return self.block * (self.d + self.d_v)

    @property
    def forward_part_bytes(self) -> int:
        """What is kept of a query, head and block in the forward."""
        return self.d_v * self.item_bytes + 8

    def backward_part_bytes(self, chunk: int) -> int:
        """The same in the backward, and its share of further chunks' dK and dV."""
        return 4 * (self.d + -(-self.panel // chunk))


@dataclass(frozen=True, slots=True)
class Lists:
    """What a call's tables hold, over all its segments."""

    choices: float
    """Blocks that are chosen and not near, by KV head and query."""
    launched: float
    """Work items, absent ones too."""
    items: float
    further: float
    """Items behind the first of their list."""
    cut: float
    """Lists of more than one item."""
    rows: float
    """Lists, empty ones too."""
    lots: int
    """Tables."""
    segments: int
    slices: int
    """Of KV heads; each goes over all tiles of queries."""


def forward_bytes(of: Sizes, lists: Lists) -> float:
    """Of the main kernel, and of what joins its parts but for near keys and values."""
    rows = lists.choices * of.group
    items = 16 * lists.launched + (32 + of.panel * of.item_bytes) * lists.items
    read = rows * (4 + 8 + of.d * of.item_bytes)
    parts = 2 * rows * of.forward_part_bytes
    heads = of.tokens * of.kv_heads * of.group
    return items + read + parts + heads * ((of.d + of.d_v) * of.item_bytes + 4)


def near_index_bytes(of: Sizes, programs: float) -> float:
    """What joins parts reads of indices, for each head again.

    Args:
        of: the sizes; ``near_until`` is a multiple of a program's rows.
        programs: tiles times heads.
    """
    early = min(of.tokens, of.near_until or 0)
    heads = of.kv_heads * of.group
    late = (of.tokens - early) * heads * 4 * of.top
    return of.tokens * heads * (8 + 4 * of.top) + late + 48 * programs


def far_bytes(of: Sizes) -> float:
    """Of the copy of what is chosen without what is near, and of what it reads beside."""
    return of.tokens * of.kv_heads * (8 * of.top + 32)


def table_bytes(of: Sizes, lists: Lists) -> float:
    """Of the index tables of a call: ids checked and numbered, counted, and put into lists."""
    queries = of.tokens * of.kv_heads
    blocks = -(-of.tokens // of.block)
    counts = queries / count_tile(of.top, blocks) * (blocks + 1)
    numbered = queries * (8 * of.top + 24)
    listed = queries * of.top * 32 + lists.choices * 16 + counts * 12 + lists.rows * 8
    return numbered + listed + lists.rows * 24 + lists.launched * 8


def count_tile(top: int, blocks: int) -> int:
    """Queries whose choices are counted together, as `trimtab.kernels.sparse` has it."""
    return max(32, 1 << (-(-4 * blocks // top) - 1).bit_length())


def near_keys(of: Sizes) -> float:
    """Keys that queries of one head attend to by tiles, in a sequence that is no shorter.

    Early ones share all before them, whoever chose it; of later ones all near blocks count whole.
    """
    early = min(of.tokens, of.near_until or 0)
    return early**2 / 2 + (of.tokens - early) * _FORCED * of.block


def by_query_panel_bytes(of: Sizes, lists: Lists) -> float:
    """Keys and values that the forward by queries reads; of a query's own block all are counted."""
    return lists.choices * of.panel * of.item_bytes


def by_query_bytes(of: Sizes) -> float:
    """All else that the forward by queries moves."""
    programs = of.tokens * of.kv_heads
    heads = programs * of.group * ((of.d + of.d_v) * of.item_bytes + 4)
    return heads + programs * (8 + of.top * (4 + 16))


def backward_bytes(of: Sizes, lists: Lists) -> float:
    """Of the main kernel, what adds chunks, and what sums dQ; then of torch beside them."""
    rows = lists.choices * of.group
    items = 16 * lists.launched + (32 + of.panel * of.item_bytes) * lists.items
    first = 8 * of.panel * (lists.items - lists.further)
    read = rows * (4 + 8 + 8 + (of.d + of.d_v) * of.item_bytes)
    parts = 2 * rows * 4 * of.d
    added = (8 + 8 * of.panel) * lists.further + 16 * lists.rows + (16 + 8 * of.panel) * lists.cut
    summed = of.tokens * of.kv_heads * (8 + 4 * of.top)
    out = of.tokens * of.kv_heads * of.group * of.d * of.item_bytes
    return items + first + read + parts + added + summed + out


def torch_bytes(of: Sizes) -> float:
    """Of torch in the backward: the sums of gradients times outputs; dK and dV zeroed and cast."""
    widened = 2 * (of.item_bytes + 4) + 12 + 4
    keys = of.tokens * of.kv_heads * (of.d + of.d_v) * (4 + 4 + of.item_bytes)
    return of.tokens * of.kv_heads * of.group * of.d_v * widened + keys


_TABLE_BYTES = 24


def lists(of: Sizes, part_bytes: int, chunk: int) -> Lists:
    """What is expected of a call whose parts take so much, in programs of so many rows.

    Segments are those of `trimtab.kernels.sparse.chosen.Chosen.lots`.
    """
    busy = max(0, of.tokens - (of.near_until or 0))
    fit = max(1, of.workspace_bytes // (of.group * of.top * part_bytes))
    listed = max(1, of.workspace_bytes // (of.top * _TABLE_BYTES))
    pieces = -(-of.tokens // min(fit if busy > fit else of.tokens, listed))
    step = -(-of.tokens // pieces)
    pieces = -(-of.tokens // step)
    listed //= step
    heads = max(1, min(of.kv_heads, fit // max(1, busy), listed))
    together = listed // heads
    lines = heads * max(1, together // pieces)
    whole = of.kv_heads // heads * heads
    lots = (-(-whole // lines) + (whole < of.kv_heads)) * -(
        -pieces // max(1, min(pieces, together))
    )
    lengths = _lengths(of, step, pieces) * of.group
    chunks = np.ceil(lengths / chunk)
    some = -np.expm1(-lengths / of.group)
    rows = lengths.size
    return Lists(
        choices=of.kv_heads * _choices(of),
        launched=of.kv_heads * (pieces * (of.group * min(step, busy) * of.top // chunk) + rows),
        items=of.kv_heads * float((some + np.maximum(chunks - 1, 0)).sum()),
        further=of.kv_heads * float(np.maximum(chunks - 1, 0).sum()),
        cut=of.kv_heads * float((chunks > 1).sum()),
        rows=of.kv_heads * rows,
        lots=lots,
        segments=-(-of.kv_heads // heads) * pieces,
        slices=-(-of.kv_heads // heads),
    )


def _choices(of: Sizes) -> float:
    """Of one KV head."""
    chosen = np.minimum(np.arange(of.tokens) // of.block + 1, of.top)
    if of.near_until is not None:
        chosen = np.maximum(chosen[of.near_until :] - _FORCED, 0)
    return float(chosen.sum())


def _lengths(of: Sizes, step: int, pieces: int) -> NDArray[np.float64]:
    """Expected queries of each block's list in each segment, ``[pieces, blocks]``."""
    blocks = -(-of.tokens // of.block)
    own = np.arange(blocks)
    bounds = np.minimum(np.arange(pieces + 1) * step, of.tokens)
    bounds = np.maximum(bounds, of.near_until or 0)[:, None]
    before = np.clip(bounds - own * of.block, 0, of.block)
    queries = np.diff(before, axis=0).astype(float)
    seen = own + 1
    forced = np.minimum(_FORCED, seen)
    chance = (np.minimum(of.top, seen) - forced) / np.maximum(seen - forced, 1)
    behind = np.cumsum((queries * chance)[:, ::-1], axis=1)[:, ::-1]
    found = np.zeros_like(queries)
    found[:, :-2] = behind[:, 2:]
    if of.near_until is None:
        found += queries
        found[:, :-1] += queries[:, 1:]
        found[:, 0] = queries.sum(1)
    else:
        found[:, 0] = 0.0
    return found
