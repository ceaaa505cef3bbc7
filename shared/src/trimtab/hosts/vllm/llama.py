"""vLLM's Llama with a plugin's attention in place of its own; the projections stay vLLM's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import CacheConfig, VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.quantization import QuantizationConfig
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.models.llama import LlamaDecoderLayer, LlamaForCausalLM

from trimtab.core.errors import BadInput
from trimtab.hosts.vllm.own_attention import LayerSizes, OwnAttentionLayer

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj")
_ROTATIONS = ("default", "linear", "llama3", "yarn")


class OwnLlamaAttention(nn.Module):
    """What stands in a decoder layer under ``self_attn``; its arguments are those of vLLM's."""

    def __init__(
        self,
        config: Any,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        max_position_embeddings: int = 8192,
        quant_config: QuantizationConfig | None = None,
        *,
        bias: bool = False,
        bias_o_proj: bool = False,
        cache_config: CacheConfig | None = None,
        prefix: str = "",
        attn_type: str = "decoder",
    ) -> None:
        super().__init__()
        if attn_type != "decoder":
            raise BadInput(f"{prefix} is to be no causal attention", fix="serve it as a decoder")
        ranks = get_tensor_model_parallel_world_size()
        size = getattr(config, "head_dim", None) or hidden_size // num_heads
        sizes = LayerSizes(hidden_size, num_heads // ranks, num_kv_heads // ranks, size)
        rotate = _Rotation(config, size, max_position_embeddings)
        # Checks come first: they say more than vLLM's projections would.
        self.attn = OwnAttentionLayer(config, sizes, rotate, f"{prefix}.attn")
        self.qkv_proj = QKVParallelLinear(
            hidden_size,
            size,
            num_heads,
            num_kv_heads,
            bias=bias,
            quant_config=quant_config,
            prefix=f"{prefix}.qkv_proj",
        )
        self.o_proj = RowParallelLinear(
            num_heads * size,
            hidden_size,
            bias=bias_o_proj,
            quant_config=quant_config,
            prefix=f"{prefix}.o_proj",
        )
        self._split = [sizes.heads * size, *[sizes.kv_heads * size] * 2]

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        """``[tokens, hidden]``; positions are taken from the engine's step."""
        projected, _ = self.qkv_proj(hidden_states)
        q, k, v = projected.split(self._split, dim=-1)
        out: Tensor = self.o_proj(self.attn(hidden_states, q, k, v))[0]
        return out


class _Rotation:
    """Rotary positions by vLLM's table.

    Raises:
        BadInput: the model's depend on more than the position.
    """

    def __init__(self, config: Any, size: int, max_positions: int) -> None:
        parameters = getattr(config, "rope_parameters", None) or {}
        kind = parameters.get("rope_type", "default")
        if kind not in _ROTATIONS:
            raise BadInput(
                f"rotary positions of the type {kind} depend on more than the position",
                where="config.json: rope_parameters",
                fix=f"serve a model that has {', '.join(_ROTATIONS)}",
            )
        self._rotary = get_rope(size, max_position=max_positions, rope_parameters=parameters)

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = self._rotary.cos_sin_cache[positions].chunk(2, -1)
        return torch.cat([cos, cos], -1), torch.cat([sin, sin], -1)


class LlamaWithOwnAttention(LlamaForCausalLM):
    """The model that vLLM makes for every architecture in the group ``trimtab.vllm_attention``."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        layer: Any = partial(LlamaDecoderLayer, attn_layer_type=OwnLlamaAttention)
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=layer)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Loads a checkpoint; the names of a plugin's parameters never meet vLLM's renaming."""
        parameters: dict[str, Any] = dict(self.named_parameters())
        own: set[str] = set()

        def others() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in weights:
                layer, attention, rest = name.partition(".self_attn.")
                if not attention or rest.split(".")[0] in _PROJECTIONS:
                    yield name, tensor
                    continue
                known = f"{layer}.self_attn.attn.own.{rest}"
                if known in parameters:
                    parameters[known].weight_loader(parameters[known], tensor)
                    own.add(known)

        loaded: set[str] = super().load_weights(others())
        return loaded | own
