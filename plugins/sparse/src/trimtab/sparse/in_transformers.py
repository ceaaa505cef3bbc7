"""Sparse prefill in transformers: ``attn_implementation="trimtab_sparse"``, for models on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from trimtab.kernels.sparse.block_sparse import TILE, KeyStore
from trimtab.kernels.sparse.prefill import sparse_prefill
from trimtab.sparse.config import SparseConfig
from trimtab.sparse.selection import keeps_everything, selection

NAME = "trimtab_sparse"


def register(config: SparseConfig, kept: Callable[[float], None] | None = None) -> str:
    """Registers the attention in transformers; a second call replaces the first.

    Long prompts of one sequence without padding are filled in sparsely, whatever cache they begin.
    Decoding, short or padded prompts, parts of a prompt after its first, training and models with
    dropout, windows or soft caps get transformers' own SDPA.

    Args:
        config: which prompts, and which blocks they keep.
        kept: called with the share of causal blocks that was kept, once a layer and prompt.

    Returns:
        The name for ``attn_implementation`` or ``model.set_attn_implementation``.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def attend(
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        if not _sparse(module, query, key, attention_mask, config, options):
            out: tuple[Tensor, None] = sdpa_attention_forward(
                module, query, key, value, attention_mask, **options
            )
            return out
        scale = options.get("scaling") or query.shape[-1] ** -0.5
        return _filled_in(query, key, value, scale, config, kept), None

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return NAME


def _sparse(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    config: SparseConfig,
    options: dict[str, Any],
) -> bool:
    causal = options.get("is_causal")
    plain = (
        mask is None
        and (getattr(module, "is_causal", True) if causal is None else causal)
        and not any(options.get(name) for name in ("dropout", "sliding_window", "softcap", "s_aux"))
    )
    tokens = query.shape[2]
    long = tokens >= max(TILE, config.min_prompt) and key.shape[2] >= tokens and query.shape[0] == 1
    trained = torch.is_grad_enabled() and query.requires_grad
    here = query.device.type == "cpu" and not trained
    return plain and long and here and not keeps_everything(config)


def _filled_in(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    config: SparseConfig,
    kept: Callable[[float], None] | None,
) -> Tensor:
    # Without a mask, sdpa_mask and SDPA have the first query at the first key: a prompt begins its
    # cache, and keys past the queries are empty slots of a static one.
    q, k, v = (x[0, :, : query.shape[2]].transpose(0, 1) for x in (query, key, value))
    out = q.new_empty(*q.shape[:2], v.shape[-1])
    store = KeyStore.packed(k, v, torch.tensor([0, k.shape[0]], dtype=torch.int32))
    share = sparse_prefill(q, lambda: k, store, 0, out, scale, selection(config))
    if kept is not None:
        kept(share)
    return out[None]
