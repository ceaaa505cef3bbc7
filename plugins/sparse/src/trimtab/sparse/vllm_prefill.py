"""The prefills that the vLLM host hands over: blocks are chosen, then attended to in the cache."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trimtab.core.documents import validate
from trimtab.kernels.sparse.block_sparse import TILE, KeyStore
from trimtab.kernels.sparse.prefill import plan, sparse_prefill
from trimtab.sparse.config import SparseConfig
from trimtab.sparse.selection import keeps_everything, selection

if TYPE_CHECKING:
    from trimtab.hosts.vllm.attention import Prefill
    from trimtab.hosts.vllm.cache_layout import PagedKeys

EXPECTED_DENSITY = 0.4
"""Share of the causal blocks that a prompt is expected to keep, to tell whether it pays."""

logger = logging.getLogger("vllm.trimtab.sparse")


@dataclass(slots=True)
class SparsePrefill:
    """Sparse prefill in one worker; its decisions are the same in every layer."""

    config: SparseConfig
    _told: bool = field(default=False, init=False)

    def wants(self, queries: int, keys: int, group: int, page: int) -> bool:
        """Whether it pays; never where all would be kept, so that vLLM's own bits come out."""
        if keeps_everything(self.config) or queries < TILE or keys < self.config.min_prompt:
            return False
        if page % TILE:
            self._tell("no prefill is sparse: pages of %d tokens hold no whole blocks", page)
            return False
        return plan(queries, keys, group, EXPECTED_DENSITY, selection(self.config)).path != "dense"

    def prefill(self, work: Prefill) -> None:
        """Writes the attention of a request's new tokens."""
        queries, heads, _ = work.query.shape
        position = work.keys - queries

        def keys() -> Tensor:
            return torch.cat([cached_keys(work.cache, work.pages, position), work.new_keys])

        kept = sparse_prefill(
            q=work.query,
            keys=keys,
            store=paged_store(work.cache, work.pages, work.keys),
            position=position,
            out=work.out,
            scale=work.scale,
            selection=selection(self.config),
        )
        group = heads // work.cache.kv_heads
        chosen = plan(queries, work.keys, group, EXPECTED_DENSITY, selection(self.config))
        self._tell(
            "sparse prefill of %d tokens keeps %.0f %% of the blocks in %s (%s)",
            *(work.keys, 100 * kept, work.layer, chosen.explain()),
        )

    def _tell(self, message: str, *facts: object) -> None:
        """Says something in the server's log, the first time only."""
        if not self._told:
            self._told = True
            logger.info(message, *facts)


def make(options: object) -> SparsePrefill:
    """The prefill for a block of options.

    Raises:
        BadInput: an option is unknown or out of range.
    """
    return SparsePrefill(validate(SparseConfig, options, where="trimtab.sparse"))


def paged_store(cache: PagedKeys, pages: Tensor, keys: int) -> KeyStore:
    """One request's blocks in the pages of a cache whose pages hold whole blocks."""
    first = torch.arange(0, keys, TILE)
    base = pages[first // cache.page_tokens] * cache.page_stride
    return KeyStore(
        k=cache.storage,
        v=cache.storage,
        k_base=base,
        v_base=base,
        block_token=(first % cache.page_tokens).int(),
        block_length=(keys - first).clamp(max=TILE).int(),
        k_token_at=cache.k_token_at,
        v_token_at=cache.v_token_at,
        k_dim_at=cache.k_dim_at,
        v_dim_at=cache.v_dim_at,
        k_head=cache.head_stride,
        v_head=cache.head_stride,
        kv_heads=cache.kv_heads,
        before=torch.tensor([0, first.numel()]),
    )


def cached_keys(cache: PagedKeys, pages: Tensor, keys: int) -> Tensor:
    """The first keys of a request out of the cache, ``[keys, kv_heads, d]``."""
    at = torch.arange(keys)
    token = pages[at // cache.page_tokens] * cache.page_stride
    token += cache.k_token_at[at % cache.page_tokens]
    head = torch.arange(cache.kv_heads) * cache.head_stride
    flat = token[:, None, None] + head[:, None] + cache.k_dim_at
    storage = cache.storage
    size = sum((n - 1) * s for n, s in zip(storage.shape, storage.stride(), strict=True)) + 1
    return storage.as_strided((size,), (1,))[flat]
