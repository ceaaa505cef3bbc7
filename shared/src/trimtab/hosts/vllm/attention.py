"""One attention backend for vLLM on CPUs: plugins may take prefills, the rest stays vLLM's.

It is registered in place of ``CPU_ATTN``, which ``--attention-backend CUSTOM`` also leads to on a
CPU. Where no plugin is switched on, layers get vLLM's own class.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.logger import init_logger
from vllm.v1.attention.backend import AttentionType, CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)

from trimtab.core.errors import TrimtabError
from trimtab.hosts.vllm import cache_layout
from trimtab.hosts.vllm.cache_layout import PagedKeys
from trimtab.hosts.vllm.prefills import (
    LayerShape,
    Prefill,
    Span,
    dense_rows,
    kind_of,
    prefiller,
    set_apart,
    split_of,
    wanted,
)

logger = init_logger("vllm.trimtab.attention")


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
        if spans:
            parent = super().build
            set_apart(whole, common_attn_metadata, spans, lambda part: parent(0, part, fast_build))
        return whole

    def _spans(self, whole: CPUAttentionMetadata) -> dict[int, Span]:
        if self._prefiller is None or whole.causal is not True:
            return {}
        starts, lengths = whole.query_start_loc.tolist(), whole.seq_lens.tolist()
        page = self.block_size
        layers = LayerShape(self.num_heads, self.num_kv_heads, self.head_dim, page, 0, "CPU_ATTN")
        found = {}
        for number in wanted(self._prefiller, starts, lengths, layers):
            pages = whole.block_table[number, : -(-lengths[number] // page)].long()
            rows = slice(starts[number], starts[number + 1])
            found[number] = Span(rows, pages, lengths[number])
        return found


class _Impl(CPUAttentionBackendImpl):
    """Hands spans to the plugin and the rest to vLLM."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = get_current_vllm_config()
        self._prefiller = prefiller(config.additional_config)
        self._cache: PagedKeys | None = None
        self._refusal = self._unsupported(config)
        if self._refusal:
            logger.warning_once("trimtab leaves prefills to vLLM: %s", self._refusal)

    def _unsupported(self, config: VllmConfig) -> str:
        """What this layer has that plugins do not know; empty if nothing."""
        own = str(config.model_config.dtype).removeprefix("torch.")
        features = {
            "sliding windows": self.sliding_window != -1,
            "ALiBi": self.alibi_slopes is not None,
            "soft-capped logits": bool(self.logits_soft_cap),
            "attention sinks": self.sinks is not None,
            f"a cache in {self.kv_cache_dtype}": self.kv_cache_dtype not in ("auto", own),
            kind_of(self.attn_type): self.attn_type != AttentionType.DECODER,
            "a cache of another layer": self.kv_sharing_target_layer_name is not None,
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
        scales = (output_scale, output_block_scale)
        split = split_of(attn_metadata)
        if split is None or not self._readable(layer, kv_cache):
            return super().forward(
                layer, query, key, value, kv_cache, attn_metadata, output, *scales
            )
        parent = super().forward
        out = output.view(-1, self.num_heads, self.head_size)
        dense_rows(
            split,
            (query, key, value),
            out,
            lambda q, k, v, rest, dense: parent(layer, q, k, v, kv_cache, rest, dense, *scales),
        )
        for span in split.spans:
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
