"""The prefills that the vLLM host hands over: blocks are chosen, then attended to in the cache."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass, field, replace
from statistics import mean
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trimtab.core.documents import validate
from trimtab.hosts.vllm.cache_layout import PagedKeys
from trimtab.kernels.sparse.block_sparse import TILE, KeyStore
from trimtab.kernels.sparse.paged_prefill import LARGEST_HEAD, PagedCache, paged_prefill
from trimtab.kernels.sparse.prefill import Plan, plan, sparse_prefill
from trimtab.kernels.sparse.selectors import Selection
from trimtab.sparse.config import SparseConfig
from trimtab.sparse.gpu_plan import GpuPlan, plan_on_gpu
from trimtab.sparse.selection import EVERYTHING, keeps_everything, selection

if TYPE_CHECKING:
    from trimtab.hosts.vllm.prefills import LayerShape, PagedTensors, Prefill

logger = logging.getLogger("vllm.trimtab.sparse")


@dataclass(slots=True)
class SparsePrefill:
    """Sparse prefill in one worker; its decisions are the same in every layer."""

    config: SparseConfig
    _told: set[str] = field(default_factory=set, init=False)
    _whys: dict[tuple[int, int], str] = field(default_factory=dict, init=False)
    """Why prefills are sparse, by their queries and keys, until it is told."""
    _of: tuple[int, int] = field(default=(0, 0), init=False)
    """Queries and keys of the first sparse prefill."""
    _shares: dict[str, float | Tensor] = field(default_factory=dict, init=False)
    """What it kept in each layer, until it is told."""

    def wants(self, queries: int, keys: int, layers: LayerShape) -> bool:
        """Whether it pays; never where all would be kept, so that vLLM's own bits come out."""
        if self._shares:
            self._tell_shares()
        if keeps_everything(self.config) or queries < TILE or keys < self.config.min_prompt:
            return False
        if layers.dense != "CPU_ATTN":
            return self._pays_on_gpu(queries, keys, layers)
        page = layers.page_tokens
        if page % TILE:
            self._tell("no prefill is sparse: pages of %d tokens hold no whole blocks", page)
            return False
        group = layers.heads // layers.kv_heads
        found = plan(queries, keys, group, selection(self.config), self.config.least_gain)
        return self._takes(found, queries, keys)

    def _pays_on_gpu(self, queries: int, keys: int, layers: LayerShape) -> bool:
        if layers.head_size > LARGEST_HEAD:
            self._tell("no prefill is sparse: heads of %d are too large", layers.head_size)
            return False
        found = plan_on_gpu(queries, keys, layers, selection(self.config))
        pays = found.dense_s >= self.config.least_gain * found.sparse_s
        found = replace(found, path="sparse" if pays else "dense")
        return self._takes(found, queries, keys)

    def _takes(self, found: Plan | GpuPlan, queries: int, keys: int) -> bool:
        if found.path == "dense":
            self._tell("a prefill of %d tokens is left to vLLM (%s)", keys, found.explain())
        elif _DONE not in self._told:
            self._whys[queries, keys] = found.explain()
        return found.path != "dense"

    def prefill(self, work: Prefill) -> None:
        """Writes the attention of a request's new tokens."""
        queries = work.query.shape[0]
        position = work.keys - queries
        kept_of = self._kept_in(work.layer)
        if isinstance(work.cache, PagedKeys):
            kept: float | Tensor = self._on_cpu(work, work.cache, position, kept_of)
        else:
            kept = self._on_gpu(work, work.cache, position, kept_of)
        if _DONE not in self._told and kept_of is not EVERYTHING:
            if not self._shares:
                self._of = (queries, work.keys)
            if self._of == (queries, work.keys):
                self._shares.setdefault(work.layer, kept)

    def _tell_shares(self) -> None:
        """Tells of the first sparse prefill, once all layers have done it: in the next step.

        Only here does a GPU's share have to be waited for.
        """
        shares = [100 * float(share) for share in self._shares.values()]
        facts = (mean(shares), len(shares), min(shares), max(shares), self._whys.get(self._of, ""))
        self._tell(_DONE, self._of[1], *facts)
        self._shares.clear()
        self._whys.clear()

    def _kept_in(self, layer: str) -> Selection:
        """The first layers may attend to all blocks."""
        number = re.search(r"(?:^|\.)(\d+)(?:\.|$)", layer)
        if number is None and self.config.dense_layers:
            self._tell("no layer is left dense: %s has no number", layer)
        elif number is not None and int(number[1]) < self.config.dense_layers:
            return EVERYTHING
        return selection(self.config)

    def _on_cpu(self, work: Prefill, cache: PagedKeys, position: int, kept: Selection) -> float:
        def keys() -> Tensor:
            return torch.cat([cached_keys(cache, work.pages, position), work.new_keys])

        return sparse_prefill(
            q=work.query,
            keys=keys,
            store=paged_store(cache, work.pages, work.keys),
            position=position,
            out=work.out,
            scale=work.scale,
            selection=kept,
        )

    def _on_gpu(self, work: Prefill, cache: PagedTensors, position: int, kept: Selection) -> Tensor:
        return paged_prefill(
            work.query,
            PagedCache(cache.k, cache.v, work.pages),
            position,
            work.out,
            work.scale,
            kept,
        )

    def _tell(self, message: str, *facts: object) -> None:
        """Says something in the server's log, the first time only."""
        if message not in self._told:
            self._told.add(message)
            logger.info(message, *facts)


_DONE = (
    "sparse prefill of %d tokens kept %.0f %% of the blocks, the mean of %d layers with %.0f to"
    " %.0f %% (%s)"
)


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
