"""Sparse prefill of one sequence of a dense model on a CPU, and when it pays."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import log

import torch
from torch import Tensor

from trimtab.kernels.sparse.block_sparse import (
    TILE,
    Choice,
    KeyStore,
    TiledAttention,
    Tiles,
    is_compiled_for,
    library,
    tiled_attention_in_torch,
)
from trimtab.kernels.sparse.checks import check_numbers
from trimtab.kernels.sparse.selectors import COUNTED, By, Selection, sampled_positions

ESTIMATE_BYTES = 16 * 2**20
"""What one estimate may take; its steps hold some nine of them at a time."""

LEAST_GAIN = 1.1
"""Predicted speed-up below which dense attention is kept."""

_SPEED: Mapping[str, float] = {"dense": 1.0, "compiled": 1.3, "torch": 0.08}
"""Work done in a time in which dense attention does 1."""

_SELECTION: Mapping[str, float] = {
    "mass": 0.06,
    "pooled": 0.06,
    "top": 0.06,
    "minmax": 0.1,
    "antidiagonal": 0.1,
    "fixed": 0.0,
    "oracle": 0.5,
}
"""Work of each selector for a query and key that it may see, where attention is 1."""

_BY_QUERY = 0.4
"""The same of any selector where each query chooses."""
_UNION = 1.35
"""Blocks that the four queries of a step read, to those that one of them has chosen."""

_PACKING = 24.0
"""Work of packing one key for one KV head, as queries that attend to it."""

_GROWTH = 0.57
_LEAST_KEPT, _KEPT = 0.3, 0.45
"""A tile with ``n`` blocks before it keeps ``(0.3 - 0.45 log(1 - mass)) n ** 0.57`` of them: for
masses of 0.9 to 0.97 and 32 and 64 blocks in texts under SmolLM2-135M. XAttention's densities for
4K to 128K tokens (arXiv 2503.16428) fall as the same power."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a prefill would take on each path, in units of one query and key of dense attention."""

    path: str
    work: Mapping[str, float]
    density: float = 1.0
    """Share of the blocks that is expected to be kept."""
    what: str = "all"
    """Which blocks these are."""

    def explain(self) -> str:
        """One sentence: the path, the figures behind it, and whether compiled code is missing."""
        figures = ", ".join(
            f"{name} {self.work['dense'] / work:.2f}x" for name, work in self.work.items()
        )
        missing = "; no compiled code was loaded" if "torch" in self.work else ""
        return (
            f"{self.path}: predicted speed against dense attention: {figures};"
            f" {self.what}, {self.density:.0%} of the blocks{missing}"
        )


def expected_blocks(visible: int, selection: Selection) -> float:
    """How many blocks a tile keeps of those that it sees.

    For selectors that keep a number, that number; for others what texts have shown.
    """
    forced = selection.first + selection.recent
    kept: float = forced
    if selection.selector in COUNTED:
        kept = selection.top
    elif selection.selector == "fixed":
        end = visible - selection.recent
        if selection.stride and end > selection.first:
            kept += (end - 1) // selection.stride - (selection.first - 1) // selection.stride
    elif selection.mass < 1:
        some = _LEAST_KEPT - _KEPT * log(1 - selection.mass)
        kept = max(forced, some * visible**_GROWTH)
    else:
        kept = visible
    return min(visible, kept)


def plan(
    queries: int, keys: int, group: int, selection: Selection, least_gain: float = LEAST_GAIN
) -> Plan:
    """Chooses between dense attention and the paths that this machine has.

    Args:
        queries: new tokens, the last of ``keys``.
        keys: tokens of the sequence.
        group: query heads of a KV head.
        selection: which blocks are kept.
        least_gain: predicted speed-up below which dense attention is kept, as it is where all
            blocks are; 0 for neither.

    Raises:
        ValueError: the numbers cannot be, or there are more queries than keys.
    """
    check_numbers(1, group=group)
    visible, kept, read = _expected(queries, keys, selection)
    pairs = queries * (keys - queries / 2)
    blocks_path = "compiled" if library() is not None else "torch"
    sparse = read * TILE / _SPEED[blocks_path]
    sparse += _selection_work(selection) * pairs + _PACKING * keys / group
    work = {"dense": pairs / _SPEED["dense"], blocks_path: sparse}
    pays = work["dense"] >= least_gain * sparse and (kept < visible or not least_gain)
    path = blocks_path if pays else "dense"
    return Plan(path, work, kept / max(1.0, visible), selection.describe())


def expected_share(queries: int, keys: int, selection: Selection) -> float:
    """Which share of the causal blocks tiles are expected to read, of all that they see.

    Args:
        queries: new tokens, the last of ``keys``.
        keys: tokens of the sequence.
        selection: which blocks are kept.

    Raises:
        ValueError: the numbers cannot be, or there are more queries than keys.
    """
    visible, _, read = _expected(queries, keys, selection)
    return read / visible


def _expected(queries: int, keys: int, selection: Selection) -> tuple[float, float, float]:
    """Blocks that queries see, that they keep, and that are read for them."""
    check_numbers(1, queries=queries, keys=keys)
    if queries > keys:
        raise ValueError(
            f"{queries} queries are more than {keys} keys, of which they are the last; give keys"
            f" from {queries} on"
        )
    position = keys - queries
    visible = kept = read = 0.0
    union = _UNION if selection.by == "query" else 1
    for tile in range(position // TILE, (keys - 1) // TILE + 1):
        rows = min(keys, (tile + 1) * TILE) - max(position, tile * TILE)
        blocks = expected_blocks(tile + 1, selection)
        visible += rows * (tile + 1)
        kept += rows * blocks
        read += rows * min(tile + 1, blocks * union)
    return visible, kept, read


def _selection_work(selection: Selection) -> float:
    if selection.by == "tile" or selection.selector == "fixed":
        return _SELECTION[selection.selector]
    return _BY_QUERY


def sparse_prefill(
    q: Tensor,
    keys: Callable[[], Tensor],
    store: KeyStore,
    position: int,
    out: Tensor,
    scale: float,
    selection: Selection,
) -> float:
    """Attention of one sequence's new tokens, written into ``out``.

    Args:
        q: ``[queries, heads, d]``.
        keys: makes the sequence's keys ``[keys, kv_heads, d]``, for estimates in plain torch.
        store: keys and values of this one sequence.
        position: the first query's place among the keys.
        out: ``[queries, heads, d_v]``.
        scale: of the logits.
        selection: which blocks are kept.

    Returns:
        The share of the causal blocks that was kept.

    Raises:
        ValueError: the position does not fit queries and keys.
    """
    queries = q.shape[0]
    known_keys = int(store.block_length.sum())
    if position < 0 or known_keys != position + queries:
        raise ValueError(
            f"{queries} queries from position {position} on have {known_keys} keys; the position"
            f" must be {known_keys - queries}, and at least 0"
        )
    cu_queries = torch.tensor([0, queries], dtype=torch.int32)
    cu_keys = torch.tensor([0, position + queries], dtype=torch.int32)
    tiles = Tiles.of(cu_queries, cu_keys, queries)
    compiled = TiledAttention(q, store, tiles, scale) if is_compiled_for(q) else None
    step = selection.sample_step
    known = keys() if compiled is None or step is None else None
    kept = visible = at = 0
    for part in selection.segments(queries, q.shape[1], position, ESTIMATE_BYTES):
        begin, count = position + part.start, part.stop - part.start
        some = slice(at, at + (begin + count - 1) // TILE - begin // TILE + 1)
        if known is not None:
            shares = selection.estimate(q[part], known[: begin + count], begin, scale)
        elif compiled is not None and step is not None:
            shares = compiled.shares(step, some=some, by=selection.by)
        mask = selection.keep(shares, begin, count)
        choice = Choice.of_queries(mask, begin) if selection.by == "query" else Choice.of_mask(mask)
        if compiled is None:
            tiled_attention_in_torch(q, store, tiles.part(some), choice, out, scale)
        else:
            compiled.attend(choice, out, some=some)
        kept += int(mask.sum())
        visible += q.shape[1] * visible_blocks(begin, count, selection.by)
        at = some.stop
    return kept / max(1, visible)


def visible_blocks(position: int, queries: int, by: By) -> int:
    """Blocks that the tiles, or each of the queries, could see."""
    step = TILE if by == "tile" else 1
    own = sampled_positions(queries, position, step, torch.device("cpu")) // TILE
    return int((own + 1).sum())
