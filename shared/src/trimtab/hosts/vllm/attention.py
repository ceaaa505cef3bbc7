"""One attention backend for vLLM on CPUs: plugins may take prefills, the rest stays vLLM's.

vLLM has one backend a kind of layer, so plugins share this one. It is registered in place of
``CPU_ATTN``, which ``--attention-backend CUSTOM`` also leads to on a CPU. A plugin offers its
prefill by an entry point of the group ``trimtab.vllm_prefill``: a function from the plugin's block
of options to a `Prefiller`. Where no plugin is switched on, layers get vLLM's own class.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache
from importlib.metadata import entry_points
from typing import Any, Protocol

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.logger import init_logger
from vllm.v1.attention.backend import AttentionType, CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)

from trimtab.core.errors import TrimtabError
from trimtab.hosts.vllm import cache_layout, options
from trimtab.hosts.vllm.cache_layout import PagedKeys

GROUP = "trimtab.vllm_prefill"

logger = init_logger("vllm.trimtab.attention")


@dataclass(frozen=True, slots=True)
class Prefill:
    """The new tokens of one request in one layer."""

    layer: str
    query: Tensor
    """``[queries, heads, d]``."""
    new_keys: Tensor
    """The keys of these tokens, ``[queries, kv_heads, d]``; the cache holds them too."""
    out: Tensor
    """Where the attention goes, ``[queries, heads, d]``."""
    cache: PagedKeys
    pages: Tensor
    """The request's pages of the cache, ``[pages]`` int64."""
    keys: int
    """Tokens of the request so far, new ones included."""
    scale: float


class Prefiller(Protocol):
    """What a plugin does with prefills."""

    def wants(self, queries: int, keys: int, group: int, page: int) -> bool:
        """Whether to take a request's new tokens.

        Args:
            queries: how many they are.
            keys: the request's tokens, new ones included.
            group: query heads of a KV head.
            page: tokens of a page of the cache.
        """

    def prefill(self, work: Prefill) -> None:
        """Writes the attention of the new tokens into ``work.out``."""


def prefiller(additional_config: object) -> Prefiller | None:
    """The prefill of the first plugin that is switched on and has one; all layers share it.

    Raises:
        BadInput: the plugin's options are wrong.
    """
    for name, block in options.enabled(additional_config).items():
        if name in entry_points(group=GROUP).names:
            return _made(name, json.dumps(block, sort_keys=True))
    return None


@cache
def _made(name: str, block: str) -> Prefiller:
    (entry,) = entry_points(group=GROUP, name=name)
    made: Prefiller = entry.load()(json.loads(block))
    return made


@dataclass(frozen=True, slots=True)
class Span:
    """A request whose prefill a plugin takes: its rows in the batch, its pages and its tokens."""

    rows: slice
    pages: Tensor
    keys: int


@dataclass
class SplitMetadata(CPUAttentionMetadata):
    """vLLM's metadata of the whole batch, and the same of what is left to vLLM."""

    spans: Sequence[Span] = ()
    rest: CPUAttentionMetadata | None = None
    rest_rows: Tensor | None = field(default=None)


class _Builder(CPUAttentionMetadataBuilder):
    """Sets apart the prefills that a plugin wants."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._prefiller = prefiller(self.vllm_config.additional_config)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> CPUAttentionMetadata:
        whole = super().build(common_prefix_len, common_attn_metadata, fast_build)
        spans = self._spans(whole)
        if not spans:
            return whole
        rest = _without(common_attn_metadata, [number for number, _ in spans])
        parts = {f.name: getattr(whole, f.name) for f in fields(CPUAttentionMetadata)}
        split = SplitMetadata(**parts, spans=[span for _, span in spans])
        if rest is not None:
            split.rest = super().build(0, rest[0], fast_build)
            split.rest_rows = rest[1]
        return split

    def _spans(self, whole: CPUAttentionMetadata) -> list[tuple[int, Span]]:
        if self._prefiller is None or whole.causal is not True:
            return []
        starts, lengths = whole.query_start_loc.tolist(), whole.seq_lens.tolist()
        group, page = self.num_heads // self.num_kv_heads, self.block_size
        found = []
        for number, keys in enumerate(lengths):
            rows = slice(starts[number], starts[number + 1])
            if self._prefiller.wants(rows.stop - rows.start, keys, group, page):
                pages = whole.block_table[number, : -(-keys // page)].long()
                found.append((number, Span(rows, pages, keys)))
        return found


def _without(
    whole: CommonAttentionMetadata, taken: Sequence[int]
) -> tuple[CommonAttentionMetadata, Tensor] | None:
    """The batch without some requests, and the rows that its queries have in the whole one."""
    left = [number for number in range(whole.num_reqs) if number not in set(taken)]
    starts = whole.query_start_loc.tolist()
    lengths = [starts[n + 1] - starts[n] for n in left]
    if not sum(lengths):
        return None
    rows = torch.cat([torch.arange(starts[n], starts[n + 1]) for n in left])
    ends = torch.tensor([0, *lengths], dtype=whole.query_start_loc.dtype).cumsum(0)
    ends = ends.to(whole.query_start_loc.dtype)
    part = replace(
        whole,
        query_start_loc=ends,
        query_start_loc_cpu=ends,
        seq_lens=whole.seq_lens[left].contiguous(),
        num_reqs=len(left),
        num_actual_tokens=len(rows),
        max_query_len=max(lengths),
        block_table_tensor=whole.block_table_tensor[left].contiguous(),
        slot_mapping=whole.slot_mapping[rows],
    )
    return part, rows


class _Impl(CPUAttentionBackendImpl):
    """Hands spans to the plugin and the rest to vLLM."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = get_current_vllm_config()
        self._prefiller = prefiller(config.additional_config)
        self._cache: PagedKeys | None = None
        self._refusal = self._unsupported()
        if self._refusal:
            logger.warning_once("trimtab leaves prefills to vLLM: %s", self._refusal)

    def _unsupported(self) -> str:
        """What this layer has that plugins do not know; empty if nothing."""
        features = {
            "sliding windows": self.sliding_window != -1,
            "ALiBi": self.alibi_slopes is not None,
            "soft-capped logits": bool(self.logits_soft_cap),
            "attention sinks": self.sinks is not None,
            "a cache in FP8": self.is_fp8_kv_cache,
            f"{self.attn_type} attention": self.attn_type != AttentionType.DECODER,
        }
        return ", ".join(name for name, present in features.items() if present)

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: CPUAttentionMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        arguments = (layer, query, key, value, kv_cache)
        scales = (output_scale, output_block_scale)
        if not isinstance(attn_metadata, SplitMetadata) or not self._readable(layer, kv_cache):
            return super().forward(*arguments, attn_metadata, output, *scales)
        out = output.view(-1, self.num_heads, self.head_size)
        rows, rest = attn_metadata.rest_rows, attn_metadata.rest
        if rest is not None and rows is not None:
            part = (layer, query[rows], key[rows], value[rows], kv_cache)
            dense = torch.empty_like(part[1])
            super().forward(*part, rest, dense, *scales)
            out[rows] = dense
        for span in attn_metadata.spans:
            self._hand_over(layer, query, key, kv_cache, span, out)
        return output

    def _readable(self, layer: Any, kv_cache: Tensor) -> bool:
        if self._refusal or self._prefiller is None:
            return False
        if self._cache is None:
            try:
                self._cache = cache_layout.probe(self, layer, kv_cache)
            except TrimtabError as error:
                self._refusal = str(error)
                logger.warning_once("trimtab leaves prefills to vLLM: %s", self._refusal)
        return self._cache is not None

    def _hand_over(
        self, layer: Any, query: Tensor, key: Tensor, kv_cache: Tensor, span: Span, out: Tensor
    ) -> None:
        assert self._prefiller is not None
        assert self._cache is not None
        work = Prefill(
            layer=layer.layer_name,
            query=query[span.rows],
            new_keys=key[span.rows],
            out=out[span.rows],
            cache=replace(self._cache, storage=kv_cache),
            pages=span.pages,
            keys=span.keys,
            scale=self.scale,
        )
        self._prefiller.prefill(work)


class TrimtabCpuAttention(CPUAttentionBackend):
    """What stands in place of ``CPU_ATTN``."""

    @staticmethod
    def get_impl_cls() -> type[CPUAttentionBackendImpl]:
        return _Impl if _switched_on() else CPUAttentionBackendImpl

    @staticmethod
    def get_builder_cls() -> type[CPUAttentionMetadataBuilder]:
        return _Builder


def _switched_on() -> bool:
    return prefiller(get_current_vllm_config().additional_config) is not None
