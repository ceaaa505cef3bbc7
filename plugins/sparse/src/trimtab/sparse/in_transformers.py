"""Sparse prefill in transformers: ``attn_implementation="trimtab_sparse"``, for models on a CPU."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from trimtab.core.errors import BadInput
from trimtab.kernels.sparse.block_sparse import TILE, KeyStore
from trimtab.kernels.sparse.prefill import sparse_prefill
from trimtab.sparse.config import SparseConfig
from trimtab.sparse.selection import keeps_everything, selection

NAME = "trimtab_sparse"

log = logging.getLogger("trimtab")
_said: set[str] = set()


def register(config: SparseConfig, kept: Callable[[float], None] | None = None) -> str:
    """Registers the attention in transformers; a second call replaces the first.

    Long prompts of one sequence without padding are filled in sparsely, whatever cache they begin.
    Decoding and short prompts get transformers' own SDPA. So do several, padded or packed ones,
    parts of a prompt after its first, training, models on another device, and those with dropout,
    windows, soft caps or biases: the logger ``trimtab`` warns of it, once a reason and process.

    Args:
        config: which prompts, and which blocks they keep.
        kept: called with the share of causal blocks that was kept, once a layer and prompt.

    Returns:
        The name for ``attn_implementation`` or ``model.set_attn_implementation``.

    Raises:
        BadInput: by the model's first call, where it has attention sinks: SDPA has none.
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
    if options.get("s_aux") is not None:
        raise BadInput(
            f"{type(module).__name__} has attention sinks, which SDPA and sparse prefill have not",
            where=f"attn_implementation={NAME!r}",
            fix='set attn_implementation="eager"',
        )
    tokens = query.shape[2]
    if tokens < max(TILE, config.min_prompt) or keeps_everything(config):
        return False
    causal = options.get("is_causal")
    reasons = {
        "a mask (of padding, packed prompts or a later part of one)": mask is not None,
        "several prompts in a batch": query.shape[0] > 1,
        "training": torch.is_grad_enabled() and query.requires_grad,
        "dropout": bool(options.get("dropout")),
        "a sliding window": bool(options.get("sliding_window")),
        "a soft cap, which SDPA leaves out": bool(options.get("softcap")),
        "a bias of positions": options.get("position_bias") is not None,
        "a paged cache": options.get("cache") is not None,
        "attention that is not causal": not (
            getattr(module, "is_causal", True) if causal is None else causal
        ),
        "fewer keys than queries": key.shape[2] < tokens,
        f"a model on the device {query.device.type}": query.device.type != "cpu",
    }
    found = [reason for reason, there in reasons.items() if there]
    for reason in found:
        _say_dense(reason)
    return not found


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _say_dense(reason: str) -> None:
    """Warns once a process; compiled code does so while it is compiled, and is not broken up."""
    if reason not in _said:
        _said.add(reason)
        log.warning("trimtab: attention is dense here, by transformers' SDPA: %s.", reason)


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
