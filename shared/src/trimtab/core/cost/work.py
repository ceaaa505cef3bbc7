"""What a step computes and moves: FLOPs and bytes from a model's shape and the step's batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from trimtab.core.cost.step import StepBatch
from trimtab.core.documents import nearest
from trimtab.core.errors import BadInput
from trimtab.core.model import ModelSpec

WeightType = Literal["fp32", "bf16", "fp16", "fp8", "int8", "nvfp4", "mxfp4", "int4"]
CacheType = Literal["bf16", "fp16", "fp8"]

# Four-bit types with their scales: one fp8 for 16 weights (NVFP4), one byte for 32 (MXFP4),
# one fp16 for 32 (GPTQ-style int4).
BYTES_PER_WEIGHT: dict[str, float] = {
    "fp32": 4.0,
    "bf16": 2.0,
    "fp16": 2.0,
    "fp8": 1.0,
    "int8": 1.0,
    "nvfp4": 0.5625,
    "mxfp4": 0.53125,
    "int4": 0.5625,
}

ACTIVATION_BYTES = 2
ACTIVATIONS_PER_LAYER = 8
"""Reads and writes of the residual stream's width for each token in a layer, kernels fused."""

_ATTENTION_KERNELS = 6
"""Norm, query-key-value, rotary embedding, cache write, attention, output."""
_LATENT_ATTENTION_KERNELS = 10
_DENSE_KERNELS = 4
"""Norm, gate and up, activation, down."""
_SPARSE_KERNELS = 8
"""Norm, router, top-k, token alignment, gate and up, activation, down, combination."""
REFERENCE_KERNELS = 80 * (_ATTENTION_KERNELS + _DENSE_KERNELS)
"""Of the 80-layer dense model whose fixed step time `RooflineConstants.step_s` states."""


@dataclass(frozen=True, slots=True)
class Precision:
    """The types that weights and cache are stored in.

    Attributes:
        weights: of attention and dense feed-forward projections.
        experts: of routed experts.
        cache: of keys and values.
    """

    weights: WeightType = "bf16"
    experts: WeightType = "bf16"
    cache: CacheType = "bf16"

    def __post_init__(self) -> None:
        for name in (self.weights, self.experts, self.cache):
            if name not in BYTES_PER_WEIGHT:
                raise BadInput(f"{name!r} is no weight type", fix=nearest(name, BYTES_PER_WEIGHT))

    @classmethod
    def of(cls, weights: WeightType, cache: CacheType = "bf16") -> Precision:
        """One type for all weights."""
        return cls(weights, weights, cache)


@dataclass(frozen=True, slots=True)
class Work:
    """FLOPs and bytes of a step on the whole replica.

    Attributes:
        weight_flops: of projections and dense feed-forward networks.
        expert_flops: of routed experts.
        attention_flops: of attention scores and the output head, always in 16 bits.
        weight_bytes: weights read.
        cache_bytes: keys and values read and written, each once.
        activation_bytes: activations moved between kernels.
    """

    weight_flops: float
    expert_flops: float
    attention_flops: float
    weight_bytes: float
    cache_bytes: float
    activation_bytes: float

    @property
    def flops(self) -> float:
        """All FLOPs."""
        return self.weight_flops + self.expert_flops + self.attention_flops


@dataclass(frozen=True, slots=True)
class ModelWork:
    """What any step of a model costs, as a function of its batch; sums over layers made once."""

    model: ModelSpec
    precision: Precision
    dense_parameters: float
    expert_parameters: float
    sparse_layers: int
    sliding_layers: int
    kernels: int

    @classmethod
    def of(cls, model: ModelSpec, precision: Precision) -> ModelWork:
        """Sums a model's layers."""
        moe = model.experts
        sparse = [layer for layer in range(model.layers) if model.is_sparse(layer)]
        norms = model.layers * model.norms_per_layer * model.hidden
        feed_forward = sum(model.feed_forward_parameters(n, 0) for n in range(model.layers))
        one_expert = 0.0
        if moe and sparse:
            layer = sparse[0]
            one_expert = model.feed_forward_parameters(layer, 1) - model.feed_forward_parameters(
                layer, 0
            )
        slides = model.sliding_window is not None
        return cls(
            model=model,
            precision=precision,
            dense_parameters=model.layers * model.attention_parameters + norms + feed_forward,
            expert_parameters=one_expert,
            sparse_layers=len(sparse),
            sliding_layers=len(model.sliding_layers) if slides else 0,
            kernels=_kernels(model, len(sparse)),
        )

    @property
    def weight_bytes(self) -> float:
        """All weights as they lie in memory, embeddings and head in 16 bits."""
        experts = self.model.experts.count if self.model.experts else 0
        tables = self.model.embedding_parameters + self.model.head_parameters
        return self._weights_read(experts) + ACTIVATION_BYTES * (
            tables - self.model.vocab * self.model.hidden
        )

    @property
    def cache_bytes_per_token(self) -> float:
        """Keys and values of one token in all layers."""
        return self.model.kv_bytes_per_token(BYTES_PER_WEIGHT[self.precision.cache])

    def work(self, batch: StepBatch) -> Work:
        """FLOPs and bytes of one step."""
        model = self.model
        tokens = batch.decodes + batch.prefill_tokens
        sampled = batch.decodes + batch.prefills
        moe = model.experts
        active = moe.active if moe else 0
        cached = self._attended(batch.kv_tokens, batch.decodes)
        pairs = self._attended(batch.prefill_pairs, batch.prefill_tokens)
        context_read = self._attended(batch.kv_tokens + _context(batch), tokens)
        layer_cache = model.layer_kv_bytes_per_token(BYTES_PER_WEIGHT[self.precision.cache])
        return Work(
            weight_flops=2.0 * tokens * self.dense_parameters,
            expert_flops=2.0 * tokens * active * self.sparse_layers * self.expert_parameters,
            attention_flops=_flops_per_pair(model, absorbed=True) * cached
            + _flops_per_pair(model, absorbed=False) * pairs
            + 2.0 * sampled * model.vocab * model.hidden,
            weight_bytes=self._weights_read(self._experts_touched(tokens)),
            cache_bytes=(context_read + tokens * model.layers) * layer_cache,
            activation_bytes=float(
                tokens * model.layers * model.hidden * ACTIVATIONS_PER_LAYER * ACTIVATION_BYTES
            ),
        )

    def _weights_read(self, experts: float) -> float:
        head = ACTIVATION_BYTES * self.model.vocab * self.model.hidden
        dense = self.dense_parameters * BYTES_PER_WEIGHT[self.precision.weights]
        routed = experts * self.sparse_layers * self.expert_parameters
        return dense + routed * BYTES_PER_WEIGHT[self.precision.experts] + head

    def _experts_touched(self, tokens: int) -> float:
        """Expected distinct experts of a layer that independent, even choices touch."""
        moe = self.model.experts
        if moe is None:
            return 0.0
        return moe.count * (1 - (1 - moe.active / moe.count) ** tokens)

    def _attended(self, tokens: float, queries: int) -> float:
        """Tokens attended to, summed over layers; sliding layers see a window for each query."""
        full = (self.model.layers - self.sliding_layers) * tokens
        window = self.model.sliding_window or 0
        return full + self.sliding_layers * min(tokens, queries * window)


def _context(batch: StepBatch) -> float:
    """Cached tokens before this step's prompt chunks: pairs beyond those within the chunks."""
    if not batch.prefills:
        return 0.0
    chunk = batch.prefill_tokens / batch.prefills
    return max(batch.prefill_pairs - batch.prefills * chunk**2 / 2, 0.0) / max(chunk, 1.0)


def _flops_per_pair(model: ModelSpec, *, absorbed: bool) -> float:
    """One query token against one key token in one layer.

    Latent attention attends to the latent itself in decode and to expanded heads in prefill.
    """
    latent = model.latent
    if latent is None:
        return 4.0 * model.heads * model.head_dim
    if absorbed:
        return 2.0 * model.heads * (2 * latent.kv_rank + latent.rope_dim)
    return 2.0 * model.heads * (latent.nope_dim + latent.rope_dim + latent.value_dim)


def _kernels(model: ModelSpec, sparse_layers: int) -> int:
    """Kernels that one step launches one after another, counted by the parts of a layer."""
    attention = _LATENT_ATTENTION_KERNELS if model.latent else _ATTENTION_KERNELS + model.qk_norm
    dense_layers = model.layers - sparse_layers
    feed_forward = sparse_layers * _SPARSE_KERNELS + dense_layers * _DENSE_KERNELS
    return model.layers * attention + feed_forward
