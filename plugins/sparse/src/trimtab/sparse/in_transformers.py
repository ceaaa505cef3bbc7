"""Sparse prefill in transformers: ``attn_implementation="trimtab_sparse"``, for models on a CPU."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from trimtab.core.documents import validate
from trimtab.core.errors import BadInput
from trimtab.kernels.sparse.block_sparse import TILE, KeyStore
from trimtab.kernels.sparse.prefill import sparse_prefill
from trimtab.sparse.config import SparseConfig
from trimtab.sparse.selection import keeps_everything, selection

NAME = "trimtab_sparse"

log = logging.getLogger("trimtab")
_said: set[str] = set()


def register(
    config: SparseConfig | Mapping[str, Any], kept: Callable[[float], None] | None = None
) -> str:
    """Registers the attention in transformers; a second call replaces the first.

    Long prompts of one sequence without padding are filled in sparsely, at once or in parts, into
    whatever cache. Decoding and short prompts get transformers' own SDPA. So do several, padded or
    packed ones, parts of less than 64 tokens, training, models on another device, and those with
    dropout, windows, soft caps or biases: the logger ``trimtab`` warns of it, once a reason and
    process.

    Args:
        config: which prompts, and which blocks they keep; also as a mapping of options.
        kept: called with the share of causal blocks that was kept, once a layer and prompt.

    Returns:
        The name for ``attn_implementation`` or ``model.set_attn_implementation``.

    Raises:
        BadInput: an option is unknown or out of range; by the model's first call, where it has
            attention sinks: SDPA has none.
    """
    chosen = validate(SparseConfig, config, where="trimtab.sparse")
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
        position = _position(module, query, key, attention_mask, chosen, options)
        if position is None:
            out: tuple[Tensor, None] = sdpa_attention_forward(
                module, query, key, value, attention_mask, **options
            )
            return out
        scale = options.get("scaling") or query.shape[-1] ** -0.5
        return _filled_in(query, key, value, position, scale, chosen, kept), None

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return NAME


def _position(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    config: SparseConfig,
    options: dict[str, Any],
) -> int | None:
    """Where a prompt that is filled in sparsely, or a part of one, begins; None for all others."""
    if options.get("s_aux") is not None:
        raise BadInput(
            f"{type(module).__name__} has attention sinks, which SDPA and sparse prefill have not",
            where=f"attn_implementation={NAME!r}",
            fix='set attn_implementation="eager"',
        )
    tokens, keys = query.shape[2], key.shape[2]
    if tokens < TILE or keys < config.min_prompt or keeps_everything(config):
        return None
    layer: Any = getattr(module, "layer_idx", None)
    if layer is not None and layer < config.dense_layers:
        return None
    # Without a mask, sdpa_mask and SDPA have the first query at the first key: a prompt begins its
    # cache, and keys past the queries are empty slots of a static one.
    position = 0 if mask is None else _first_key(mask, tokens)
    if position is not None and position + tokens < config.min_prompt:
        return None
    causal = options.get("is_causal")
    reasons = {
        "a mask (of padding, packed prompts or your own)": position is None,
        "several prompts in a batch": query.shape[0] > 1,
        "gradients (torch.no_grad() goes without)": (
            torch.is_grad_enabled() and query.requires_grad
        ),
        "dropout": bool(options.get("dropout")),
        "a sliding window": bool(options.get("sliding_window")),
        "a soft cap, which SDPA leaves out": bool(options.get("softcap")),
        "a bias of positions": options.get("position_bias") is not None,
        "a paged cache": options.get("cache") is not None,
        "attention that is not causal": not (
            getattr(module, "is_causal", True) if causal is None else causal
        ),
        "fewer keys than queries": keys < (position or 0) + tokens,
        f"a model on the device {query.device.type}": query.device.type != "cpu",
    }
    found = [reason for reason, there in reasons.items() if there]
    for reason in found:
        _say_dense(reason)
    return None if found else position


_seen: tuple[weakref.ref[Tensor], int, int | None] | None = None


def _first_key(mask: Tensor, tokens: int) -> int | None:
    """The place of the first query among the keys, where a mask is causal and nothing else.

    All layers of a model are given one mask, which is read once.
    """
    global _seen
    if torch.compiler.is_compiling() or mask.dtype != torch.bool or mask.device.type != "cpu":
        return None
    version = mask._version  # noqa: SLF001
    if _seen is not None and _seen[0]() is mask and _seen[1] == version:
        return _seen[2]
    first = int(mask[0, 0, 0].sum()) - 1
    causal = torch.arange(mask.shape[-1]) <= first + torch.arange(tokens)[:, None]
    plain = first >= 0 and mask.shape[2:] == causal.shape and bool((mask == causal).all())
    found = first if plain else None
    _seen = (weakref.ref(mask), version, found)
    return found


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
    position: int,
    scale: float,
    config: SparseConfig,
    kept: Callable[[float], None] | None,
) -> Tensor:
    q = query[0].transpose(0, 1)
    k, v = (x[0, :, : position + q.shape[0]].transpose(0, 1) for x in (key, value))
    out = q.new_empty(*q.shape[:2], v.shape[-1])
    store = KeyStore.packed(k, v, torch.tensor([0, k.shape[0]], dtype=torch.int32))
    share = sparse_prefill(q, lambda: k, store, position, out, scale, selection(config))
    if kept is not None:
        kept(share)
    return out[None]
