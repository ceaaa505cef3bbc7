"""The backend ``--attention-backend CUSTOM`` on GPUs: plugins may take prefills.

Everything else is done by one of vLLM's own backends, from which this one descends:
FlashAttention's on NVIDIA's GPUs, Triton's on AMD's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionType,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend
from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend
from vllm.v1.kv_cache_interface import KVCacheSpec

from trimtab.hosts.vllm.prefills import (
    LayerShape,
    PagedTensors,
    Prefill,
    Prefiller,
    Span,
    Split,
    dense_rows,
    kind_of,
    prefiller,
    set_apart,
    split_of,
    wanted,
)

logger = init_logger("vllm.trimtab.attention")


def over(parent: type[AttentionBackend], name: str) -> Any:
    """A backend that hands prefills to a plugin, and all else to ``parent``.

    Args:
        parent: whose cache is ``[pages, kv_heads, page_tokens, keys and values]``, and whose
            forward pass does not write it.
        name: what the class is called in this module, by which vLLM finds it again.
    """
    impl, builder = _impl_over(parent.get_impl_cls()), _builder_over(parent)

    class Backend(parent):  # type: ignore[misc, valid-type]
        @staticmethod
        def get_name() -> str:
            return "CUSTOM"

        @staticmethod
        def get_impl_cls() -> Any:
            return impl

        @staticmethod
        def get_builder_cls() -> Any:
            return builder

        @classmethod
        def supports_device_cpu_query_lens_mismatch(cls) -> bool:
            return False  # spans are found by what the CPU knows

    Backend.__name__ = Backend.__qualname__ = name
    return Backend


def _builder_over(parent: type[AttentionBackend]) -> Any:
    class Builder(parent.get_builder_cls()):  # type: ignore[misc]
        """Sets apart the prefills that a plugin wants."""

        # vLLM would put other pages into metadata that was already split.
        supports_update_block_table = False

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._taker = Taker(self, parent.get_name())

        @classmethod
        def get_cudagraph_support(
            cls, vllm_config: VllmConfig, kv_cache_spec: KVCacheSpec
        ) -> AttentionCGSupport:
            """At most that of decoding: no graph may hold a batch with prefills of a plugin."""
            known: AttentionCGSupport = super().get_cudagraph_support(vllm_config, kv_cache_spec)
            if prefiller(vllm_config.additional_config) is None:
                return known
            return min(known, AttentionCGSupport.UNIFORM_BATCH, key=lambda one: one.value)

        def build(
            self,
            common_prefix_len: int,
            common_attn_metadata: CommonAttentionMetadata,
            fast_build: bool = False,
        ) -> Any:
            whole = super().build(common_prefix_len, common_attn_metadata, fast_build)
            spans = self._taker.spans(common_attn_metadata)
            if spans:
                build = super().build
                set_apart(
                    whole, common_attn_metadata, spans, lambda part: build(0, part, fast_build)
                )
            return whole

    return Builder


def _impl_over(parent: Any) -> Any:
    class Impl(parent):  # type: ignore[misc]
        """Hands spans to the plugin and the rest to vLLM."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._prefiller = prefiller(get_current_vllm_config().additional_config)

        def fused_output_quant_supported(self, quant_key: Any) -> bool:
            """Plugins write what the model computes in."""
            return self._prefiller is None and super().fused_output_quant_supported(quant_key)

        def forward(
            self,
            layer: Any,
            query: Tensor,
            key: Tensor,
            value: Tensor,
            kv_cache: Tensor,
            attn_metadata: Any,
            output: Tensor,
            output_scale: Tensor | None = None,
            output_block_scale: Tensor | None = None,
        ) -> Tensor:
            split = split_of(attn_metadata)
            scales = (output_scale, output_block_scale)
            parent_forward = super().forward
            if split is None or self._prefiller is None:
                whole: Tensor = parent_forward(
                    layer, query, key, value, kv_cache, attn_metadata, output, *scales
                )
                return whole
            out = output.view(-1, self.num_heads, self.head_size)
            dense_rows(
                split,
                (query, key, value),
                out,
                lambda q, k, v, rest, dense: parent_forward(
                    layer, q, k, v, kv_cache, rest, dense, *scales
                ),
            )
            for work in _works(split, layer.layer_name, query, key, kv_cache, out, self.scale):
                self._prefiller.prefill(work)
            return output

    return Impl


def _works(
    split: Split,
    layer: str,
    query: Tensor,
    key: Tensor,
    kv_cache: Tensor,
    out: Tensor,
    scale: float,
) -> Iterator[Prefill]:
    cache = PagedTensors(*torch.split(kv_cache, out.shape[-1], dim=-1))
    for span in split.spans:
        rows = span.rows
        yield Prefill(layer, query[rows], key[rows], out[rows], cache, span.pages, span.keys, scale)


@dataclass(slots=True)
class Taker:
    """Finds the prefills that a plugin takes in the layers of one builder."""

    builder: Any
    dense: str
    """The name of vLLM's backend beneath."""
    _prefiller: Prefiller | None = field(init=False)
    _refusal: str | None = None

    def __post_init__(self) -> None:
        # Once: it goes through what is installed, and spans are looked for in every step.
        self._prefiller = prefiller(self.builder.vllm_config.additional_config)

    def spans(self, batch: CommonAttentionMetadata) -> dict[int, Span]:
        """By the request's number in the batch; nothing waits for the GPU."""
        lengths = batch.seq_lens_cpu_upper_bound  # exact for requests that still fill in
        plain = batch.causal is True and not batch.mm_req_doc_ranges
        if self._prefiller is None or lengths is None or not plain or self._refused():
            return {}
        starts, tokens = batch.query_start_loc_cpu.tolist(), lengths.tolist()
        return {
            number: Span(
                slice(starts[number], starts[number + 1]),
                batch.block_table_tensor[number],
                tokens[number],
            )
            for number in wanted(self._prefiller, starts, tokens[: batch.num_reqs], self._layers())
        }

    def _impls(self) -> list[Any]:
        context = self.builder.vllm_config.compilation_config.static_forward_context
        return [context[name].impl for name in self.builder.layer_names]

    def _layers(self) -> LayerShape:
        first = self._impls()[0]
        capability = current_platform.get_device_capability()
        known = capability.major if capability is not None and current_platform.is_cuda() else 0
        return LayerShape(
            first.num_heads,
            first.num_kv_heads,
            first.head_size,
            self.builder.kv_cache_spec.block_size,
            known,
            self.dense,
        )

    def _refused(self) -> bool:
        """Whether a layer has what plugins do not know; said once."""
        if self._refusal is None:
            config: VllmConfig = self.builder.vllm_config
            found = [unsupported(impl, config) for impl in self._impls()]
            self._refusal = next((one for one in found if one), "")
            if self._refusal:
                logger.warning_once("trimtab leaves prefills to vLLM: %s", self._refusal)
        return bool(self._refusal)


def unsupported(impl: Any, config: VllmConfig) -> str:
    """What vLLM's attention of a layer has that plugins do not know; empty if nothing."""
    parallel = config.parallel_config
    own = str(config.model_config.dtype).removeprefix("torch.")
    features = {
        "sliding windows": tuple(impl.sliding_window) != (-1, -1),
        "ALiBi": impl.alibi_slopes is not None,
        "soft-capped logits": bool(impl.logits_soft_cap),
        "attention sinks": impl.sinks is not None,
        f"a cache in {impl.kv_cache_dtype}": impl.kv_cache_dtype not in ("auto", own),
        kind_of(impl.attn_type): impl.attn_type != AttentionType.DECODER,
        "a cache of another layer": impl.kv_sharing_target_layer_name is not None,
        "windows beside a prefix": config.model_config.rswa_window is not None,
        "chunked lookback": getattr(impl, "chunk_lookback", -1) > -1,
        "a cache shared between ranks": max(
            parallel.decode_context_parallel_size, parallel.prefill_context_parallel_size
        )
        > 1,
    }
    return ", ".join(name for name, present in features.items() if present)


TrimtabFlashAttention = over(FlashAttentionBackend, "TrimtabFlashAttention")
TrimtabTritonAttention = over(TritonAttentionBackend, "TrimtabTritonAttention")
