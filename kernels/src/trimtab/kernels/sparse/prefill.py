"""Sparse prefill of one sequence of a dense model on a CPU, and when it pays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.kernels.sparse.block_sparse import (
    TILE,
    Choice,
    KeyStore,
    Tiles,
    library,
    tiled_attention,
)
from trimtab.kernels.sparse.selectors import Selection

LEAST_GAIN = 1.1
"""Predicted speed-up below which dense attention is kept."""

_SPEED: Mapping[str, float] = {"dense": 1.0, "compiled": 1.3, "torch": 0.08}
"""Work done in a time in which dense attention does 1."""

_SELECTION: Mapping[str, float] = {
    "mass": 0.14,
    "pooled": 0.03,
    "top": 0.03,
    "antidiagonal": 0.05,
    "oracle": 1.0,
}
"""Work of each selector for a query and key, where attention is 1."""

_PACKING = 24.0
"""Work of packing one key for one KV head, as queries that attend to it."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a prefill would take on each path, in units of one query and key of dense attention."""

    path: str
    work: Mapping[str, float]

    def explain(self) -> str:
        """One sentence: the path and the figures behind it."""
        figures = ", ".join(
            f"{name} {self.work['dense'] / work:.2f}x" for name, work in self.work.items()
        )
        return f"{self.path}: predicted speed against dense attention: {figures}"


def plan(queries: int, keys: int, group: int, density: float, selection: Selection) -> Plan:
    """Chooses between dense attention and the paths that this machine has.

    Args:
        queries: new tokens, the last of ``keys``.
        keys: tokens of the sequence.
        group: query heads of a KV head.
        density: share of the causal blocks that is expected to be kept.
        selection: which blocks are kept.
    """
    pairs = queries * (keys - queries / 2)
    blocks_path = "compiled" if library() is not None else "torch"
    select = _SELECTION[selection.selector] * queries * keys
    tiles = min(pairs, density * pairs + queries * TILE * (selection.first + selection.recent))
    sparse = tiles / _SPEED[blocks_path] + select + _PACKING * keys / group
    work = {"dense": pairs / _SPEED["dense"], blocks_path: sparse}
    path = blocks_path if work["dense"] >= LEAST_GAIN * sparse else "dense"
    return Plan(path, work)


def sparse_prefill(
    q: Tensor,
    keys: Tensor,
    store: KeyStore,
    position: int,
    out: Tensor,
    scale: float,
    selection: Selection,
) -> float:
    """Attention of one sequence's new tokens, written into ``out``.

    Args:
        q: ``[queries, heads, d]``.
        keys: the sequence's keys ``[keys, kv_heads, d]``, for the selection.
        store: keys and values of this one sequence, for the attention.
        position: the first query's place among the keys.
        out: ``[queries, heads, d_v]``.
        scale: of the logits.
        selection: which blocks are kept.

    Returns:
        The share of the causal blocks that was kept.
    """
    mask = selection.blocks(q, keys, position, scale)
    cu_queries, cu_keys = (
        torch.tensor([0, n], dtype=torch.int32) for n in (q.shape[0], keys.shape[0])
    )
    tiles = Tiles.of(cu_queries, cu_keys, q.shape[0])
    tiled_attention(q, store, tiles, Choice.of_mask(mask), out, scale)
    causal = int((tiles.last_block + 1).sum()) * q.shape[1]
    return int(mask.sum()) / max(1, causal)
