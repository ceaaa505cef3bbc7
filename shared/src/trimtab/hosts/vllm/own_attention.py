"""Attention layers in vLLM that are a plugin's own, with whatever they keep in vLLM's paged cache.

vLLM allots, shares and frees pages as for full attention. What lies in a page, and how it is
attended to, is the plugin's: a torch module that it offers by an entry point of the group
``trimtab.vllm_attention``, under the architecture that ``config.json`` names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
)
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.platforms import current_platform
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec
from vllm.v1.kv_cache_layout import KVCacheLayout

from trimtab.core.errors import BadInput

GROUP = "trimtab.vllm_attention"

Rotate = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Cosines and sines ``[tokens, r]`` of positions ``[tokens]``."""


@dataclass(frozen=True, slots=True)
class LayerSizes:
    """A layer's sizes on this rank."""

    hidden: int
    heads: int
    kv_heads: int
    head_size: int


@dataclass(frozen=True, slots=True)
class Step:
    """The batch of one step of the engine, packed."""

    pages: Tensor
    """The pages of each request ``[requests, most]``."""
    cu_queries: Tensor
    """Ends of the requests' new tokens ``[requests + 1]`` int32, from 0."""
    keys: Tensor
    """Tokens of each request so far, new ones included, ``[requests]``."""
    page_tokens: int
    rotate: Rotate


class OwnAttention(Protocol):
    """What a plugin offers: a ``torch.nn.Module`` with the parameters beside projections."""

    sharded: Mapping[str, int]
    """The dimension by which each parameter is split over tensor-parallel ranks; others are
    whole on every rank."""

    def page_numbers(self, page_tokens: int) -> int:
        """Numbers of the model's type that a page takes for each KV head.

        Raises:
            BadInput: pages of so many tokens will not do.
        """

    def plan(self, step: Step) -> Any:
        """What all layers need to know of a step; it is asked for once."""

    def attend(
        self, hidden: Tensor, q: Tensor, k: Tensor, v: Tensor, cache: Tensor, plan: Any
    ) -> Tensor:
        """Takes the new tokens into the cache and attends.

        Args:
            hidden: ``[tokens, hidden]``.
            q: ``[tokens, heads, d]``, without positions.
            k: ``[tokens, kv_heads, d]``, likewise.
            v: ``[tokens, kv_heads, d]``.
            cache: ``[pages, kv_heads, page_numbers]``.
            plan: of this step.

        Returns:
            ``[tokens, heads, d]``.
        """


def architectures() -> dict[str, str]:
    """The architectures that plugins have attention for, and the factory of each by its path."""
    return {entry.name: entry.value for entry in entry_points(group=GROUP)}


def made(config: Any, sizes: LayerSizes) -> Any:
    """The attention of the plugin that knows a model's architecture: module and `OwnAttention`.

    Raises:
        BadInput: no plugin knows it, or the plugin does not serve this model.
    """
    for name in config.architectures or ():
        for entry in entry_points(group=GROUP, name=name):
            return entry.load()(config, sizes)
    raise BadInput(
        f"no plugin has attention for {', '.join(config.architectures or ('no architecture',))}",
        where="config.json: architectures",
        fix=f"install the plugin; there is {', '.join(sorted(architectures())) or 'none'}",
    )


class _Builder(AttentionMetadataBuilder[Any]):
    """Has the plugin plan each step, once for all layers."""

    def __init__(
        self,
        kv_cache_spec: KVCacheSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        context = vllm_config.compilation_config.static_forward_context
        self._layer: OwnAttentionLayer = context[layer_names[0]]

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> Any:
        batch = common_attn_metadata
        return self._layer.plan(
            Step(
                batch.block_table_tensor[: batch.num_reqs],
                batch.query_start_loc[: batch.num_reqs + 1],
                batch.seq_lens[: batch.num_reqs],
                self.kv_cache_spec.block_size,
                self._layer.rotate,
            )
        )


class OwnBackend(AttentionBackend):
    """What vLLM asks about such layers."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float32, torch.bfloat16, torch.float16]

    @staticmethod
    def get_name() -> str:
        return "TRIMTAB_OWN"

    @staticmethod
    def get_impl_cls() -> Any:
        raise NotImplementedError("layers with attention of their own have no impl")

    @staticmethod
    def get_builder_cls() -> type[AttentionMetadataBuilder[Any]]:
        return _Builder

    @staticmethod
    def get_supported_kernel_block_sizes(
        kv_cache_spec: KVCacheSpec | None = None,
    ) -> list[int | MultipleOf]:
        return [MultipleOf(1)]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return (KVCacheLayout.LBHNC,)


class OwnAttentionLayer(nn.Module, AttentionLayerBase):
    """One layer's attention without its projections, known to vLLM by its name.

    Args:
        config: of the model, as transformers has it.
        sizes: on this rank.
        rotate: of the model.
        name: of the layer.

    Raises:
        BadInput: vLLM was told to do what such layers do not.
    """

    supports_dcp = False

    def __init__(self, config: Any, sizes: LayerSizes, rotate: Rotate, name: str) -> None:
        super().__init__()
        vllm_config = get_current_vllm_config()
        _check(vllm_config)
        self.own = made(config, sizes)
        self.sizes, self.rotate, self.name = sizes, rotate, name
        self.num_heads = sizes.heads
        self.kv_cache = torch.empty(0)
        self._dtype: Any = vllm_config.model_config.dtype
        for parameter_name, parameter in self.own.named_parameters():
            parameter.requires_grad_(False)
            by = self.own.sharded.get(parameter_name)
            loader = default_weight_loader if by is None else _Shard(by)
            parameter.weight_loader = loader
        layers = vllm_config.compilation_config.static_forward_context
        if name in layers:
            raise ValueError(f"there are two layers named {name}")
        layers[name] = self

    def plan(self, step: Step) -> Any:
        """The plugin's plan of a step."""
        return self.own.plan(step)

    def get_attn_backend(self) -> type[AttentionBackend]:
        return OwnBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        page_tokens = vllm_config.cache_config.block_size
        numbers = -(-self.own.page_numbers(page_tokens) // page_tokens)
        return FullAttentionSpec(
            block_size=page_tokens,
            num_kv_heads=self.sizes.kv_heads,
            head_size=self.sizes.head_size,
            dtype=self._dtype,
            state_content_bytes=numbers * self._dtype.itemsize,
        )

    def forward(self, hidden: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attends: ``[tokens, heads * d]`` of projected tokens ``[tokens, … * d]``."""
        out: Tensor = torch.ops.trimtab.own_attention(hidden, q, k, v, self.name)
        return out

    def attend(self, hidden: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """What `forward` does, where no compiler looks."""
        step: Any = get_forward_context().attn_metadata
        out = torch.zeros_like(q)
        if step is None:  # vLLM tries how much memory a step takes.
            return out
        plan = step[self.name]
        real = plan.tokens
        pages, kv_heads = self.kv_cache.shape[:2]
        out[:real] = self.own.attend(
            hidden[:real],
            *(x[:real].view(real, -1, self.sizes.head_size) for x in (q, k, v)),
            self.kv_cache.view(pages, kv_heads, -1),
            plan,
        ).flatten(1)
        return out


@torch.library.custom_op("trimtab::own_attention", mutates_args=())
def _attend(hidden: Tensor, q: Tensor, k: Tensor, v: Tensor, name: str) -> Tensor:
    layer: OwnAttentionLayer = get_forward_context().no_compile_layers[name]
    return layer.attend(hidden, q, k, v)


@_attend.register_fake
def _(hidden: Tensor, q: Tensor, k: Tensor, v: Tensor, name: str) -> Tensor:
    return torch.empty_like(q)


@dataclass(frozen=True, slots=True)
class _Shard:
    """Loads a tensor-parallel rank's part of a parameter."""

    dim: int

    def __call__(self, parameter: Tensor, loaded: Tensor) -> None:
        size = parameter.shape[self.dim]
        if loaded.shape[self.dim] != size:
            loaded = loaded.narrow(self.dim, get_tensor_model_parallel_rank() * size, size)
        default_weight_loader(parameter, loaded)


def _check(config: VllmConfig) -> None:
    cache = config.cache_config.cache_dtype
    ranks = get_tensor_model_parallel_world_size()
    kv_heads = config.model_config.get_total_num_kv_heads()
    faults = {
        f"the device is {current_platform.device_type}": not current_platform.is_cpu(),
        "tokens are drafted": config.speculative_config is not None,
        f"the cache is in {cache}": cache not in ("auto", "float32", "bfloat16", "float16"),
        "contexts are split over ranks": config.parallel_config.decode_context_parallel_size > 1,
        f"{ranks} ranks share {kv_heads} KV heads": kv_heads % ranks != 0,
    }
    for fault, found in faults.items():
        if found:
            raise BadInput(
                f"{fault}, which attention of a plugin's own does not know",
                where=f"vLLM's options for {', '.join(config.model_config.architectures)}",
                fix="serve it on a CPU, with the model's own cache type, without drafts, and on"
                " ranks that divide the KV heads",
            )
