"""Prefill at a given choice of blocks by torch's compiled flex_attention, as a rival of ours."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from trimtab.kernels.sparse.block_sparse import TILE


def flex_prefill(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Callable[[], Tensor]:
    """What attends to the chosen blocks at each call; compiled for these sizes and types.

    Neither the compilation nor the lists of blocks, which are made here, belong to a call.

    Args:
        q: ``[1, heads, tokens, d]``.
        k: ``[1, kv_heads, tokens, d]``.
        v: as ``k``.
        mask: the blocks of each head's tiles ``[heads, tiles, blocks]``, all causal.
    """
    lists = flex_lists(mask)
    torch.compiler.reset()  # after a few other sizes it would no longer compile, and run unfused
    compiled = torch.compile(flex_attention, dynamic=False)

    @torch.no_grad()
    def attend() -> Tensor:
        out: Tensor = compiled(q, k, v, block_mask=lists, enable_gqa=q.shape[1] > k.shape[1])
        return out

    attend()
    return attend


def flex_lists(mask: Tensor) -> BlockMask:
    """The blocks of a mask as flex_attention takes them: the own ones are causal inside.

    Args:
        mask: ``[heads, tiles, blocks]``, all causal.
    """
    own = torch.eye(mask.shape[-1], dtype=torch.bool)
    return BlockMask.from_kv_blocks(
        *_lists(mask & own),
        *_lists(mask & ~own),
        BLOCK_SIZE=TILE,
        mask_mod=_causal,
        seq_lengths=(mask.shape[1] * TILE, mask.shape[2] * TILE),
    )


def _causal(_: Tensor, __: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return query >= key


def _lists(mask: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks each tile has, and which; those it has not come last."""
    counts = mask.sum(-1, dtype=torch.int32)[None]
    return counts, mask.byte().sort(dim=-1, descending=True, stable=True).indices.int()[None]
