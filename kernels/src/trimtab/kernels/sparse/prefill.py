"""Sparse prefill of one sequence of a dense model on a CPU, and when it pays."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

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
from trimtab.kernels.sparse.selectors import SAMPLE_STEPS, Selection

LEAST_GAIN = 1.1
"""Predicted speed-up below which dense attention is kept."""

_SPEED: Mapping[str, float] = {"dense": 1.0, "compiled": 1.3, "torch": 0.08}
"""Work done in a time in which dense attention does 1."""

_SELECTION: Mapping[str, float] = {
    "mass": 0.03,
    "pooled": 0.03,
    "top": 0.03,
    "antidiagonal": 0.05,
    "oracle": 0.25,
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
        """One sentence: the path, the figures behind it, and whether compiled code is missing."""
        figures = ", ".join(
            f"{name} {self.work['dense'] / work:.2f}x" for name, work in self.work.items()
        )
        missing = "; no compiled code was loaded" if "torch" in self.work else ""
        return f"{self.path}: predicted speed against dense attention: {figures}{missing}"


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
    """
    cu_queries = torch.tensor([0, q.shape[0]], dtype=torch.int32)
    cu_keys = torch.tensor([0, position + q.shape[0]], dtype=torch.int32)
    tiles = Tiles.of(cu_queries, cu_keys, q.shape[0])
    compiled = TiledAttention(q, store, tiles, scale) if is_compiled_for(q) else None
    step = SAMPLE_STEPS.get(selection.selector)
    if compiled is None or step is None:
        shares = selection.estimate(q, keys(), position, scale)
    else:
        shares = compiled.shares(step)
    mask = selection.keep(shares, position, q.shape[0])
    if compiled is None:
        tiled_attention_in_torch(q, store, tiles, Choice.of_mask(mask), out, scale)
    else:
        compiled.attend(Choice.of_mask(mask), out)
    causal = int((tiles.last_block + 1).sum()) * q.shape[1]
    return int(mask.sum()) / max(1, causal)
