"""How vLLM lays keys and values into the pages of its CPU cache, found by writing numbers there.

The layout depends on the machine's instructions and is not said anywhere; a probe needs no list.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trimtab.core.errors import Unsupported

_DIGIT = 100
"""Whole numbers up to it are exact in every floating type of a cache."""


@dataclass(frozen=True, slots=True)
class PagedKeys:
    """A layer's cache, pages of tokens for each KV head.

    Element ``(token i, dimension c)`` of a page's head is at ``page * page_stride + head *
    head_stride + token_at[i] + dim_at[c]`` of the flat storage.
    """

    storage: Tensor
    page_tokens: int
    kv_heads: int
    page_stride: int
    head_stride: int
    k_token_at: Tensor
    v_token_at: Tensor
    k_dim_at: Tensor
    v_dim_at: Tensor


def probe(impl: Any, layer: Any, kv_cache: Tensor) -> PagedKeys:
    """Finds the layout of a cache ``[pages, kv_heads, page_tokens, 2 * d]``.

    Args:
        impl: vLLM's attention of the layer, whose ``do_kv_cache_update`` writes the cache.
        layer: the layer.
        kv_cache: its cache, which is not touched.

    Raises:
        Unsupported: tokens and dimensions are not laid out independently of each other.
    """
    _, kv_heads, tokens, both = kv_cache.shape
    d = both // 2
    token, dim = torch.arange(tokens)[:, None], torch.arange(d)
    numbers = (token % _DIGIT, token // _DIGIT, dim % _DIGIT, dim // _DIGIT)
    found = []
    for which in range(2):
        pages = [_written(impl, layer, kv_cache, which, (n + 1).expand(tokens, d)) for n in numbers]
        found.append(_places(pages, tokens, d))
    if kv_cache.stride(2) != both or kv_cache.stride(3) != 1:
        raise Unsupported("the pages of vLLM's cache are not dense")
    (k_token_at, k_dim_at), (v_token_at, v_dim_at) = found
    return PagedKeys(
        storage=kv_cache,
        page_tokens=tokens,
        kv_heads=kv_heads,
        page_stride=kv_cache.stride(0),
        head_stride=kv_cache.stride(1),
        k_token_at=k_token_at,
        v_token_at=v_token_at,
        k_dim_at=k_dim_at,
        v_dim_at=v_dim_at,
    )


def _written(impl: Any, layer: Any, kv_cache: Tensor, which: int, numbers: Tensor) -> Tensor:
    """The first head of a page of zeros, after the numbers were written as keys or as values."""
    page = torch.zeros((1, *kv_cache.shape[1:]), dtype=kv_cache.dtype)
    rows = numbers[:, None].expand(-1, kv_cache.shape[1], -1).to(kv_cache.dtype).contiguous()
    pair = [torch.zeros_like(rows), torch.zeros_like(rows)]
    pair[which] = rows
    slots = torch.arange(kv_cache.shape[2], dtype=torch.int64)
    impl.do_kv_cache_update(layer, *pair, page, slots)
    return page[0, 0].flatten().float()


def _places(pages: Sequence[Tensor], tokens: int, d: int) -> tuple[Tensor, Tensor]:
    """Offsets of tokens and of dimensions within a page's head."""
    at = pages[0].nonzero()[:, 0]
    low, high, dim_low, dim_high = (page[at].round().long() - 1 for page in pages)
    token, dim = low + _DIGIT * high, dim_low + _DIGIT * dim_high
    if len(at) != tokens * d:
        raise Unsupported("vLLM's cache does not hold a token's numbers one by one")
    table = torch.full((tokens, d), -1)
    table[token, dim] = at
    token_at, dim_at = table[:, 0], table[0] - table[0, 0]
    if not torch.equal(table, token_at[:, None] + dim_at):
        raise Unsupported("vLLM's cache mixes tokens and dimensions in a way that is not known")
    return token_at, dim_at
