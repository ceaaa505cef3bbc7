"""The shape of a decoder-only transformer, and what follows from it: parameters, bytes, FLOPs."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from trimtab.core.documents import Document, InvalidValue


class LatentAttention(Document):
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434).

    The cache keeps ``kv_rank`` compressed values and a shared rotary key of ``rope_dim`` per token.
    """

    q_rank: PositiveInt | None
    kv_rank: PositiveInt
    nope_dim: PositiveInt
    rope_dim: PositiveInt
    value_dim: PositiveInt


class Experts(Document):
    """The mixture of experts of the layers that have one.

    Attributes:
        count: routed experts in a layer.
        active: routed experts that a token visits.
        intermediate: width of each.
        shared_intermediate: total width of the experts that every token visits.
        shared_gate: whether those are gated by a projection of their own.
        router_bias: whether the router has one bias or correction for each expert.
        dense_layers: the layers that have a dense feed-forward network instead.
    """

    count: PositiveInt
    active: PositiveInt
    intermediate: PositiveInt
    shared_intermediate: NonNegativeInt = 0
    shared_gate: bool = False
    router_bias: bool = False
    dense_layers: frozenset[int] = frozenset()


class ModelSpec(Document):
    """A decoder-only transformer's shape.

    Attributes:
        name: what people call it.
        layers: transformer blocks; draft (MTP) layers are not counted.
        hidden: width of the residual stream.
        heads: query heads.
        kv_heads: key and value heads.
        head_dim: width of a head.
        intermediate: width of the dense feed-forward network.
        vocab: rows of the embedding table.
        tied_embeddings: whether the output head is the embedding table.
        dtype_bytes: bytes of one stored weight, 0.5 for four bits.
        max_positions: the longest context it was made for.
        qkv_bias, output_bias, mlp_bias: which projections have biases.
        qk_norm: whether each layer normalises queries and keys per head.
        attention_sinks: whether each head has a learned sink.
        norms_per_layer: normalisations of the residual stream in a layer.
        sliding_window: tokens that a sliding layer attends to.
        sliding_layers: the layers whose attention slides.
        latent: set for multi-head latent attention.
        experts: set for a mixture of experts.
    """

    name: str
    layers: PositiveInt
    hidden: PositiveInt
    heads: PositiveInt
    kv_heads: PositiveInt
    head_dim: PositiveInt
    intermediate: PositiveInt
    vocab: PositiveInt
    tied_embeddings: bool = False
    dtype_bytes: PositiveFloat = 2.0
    max_positions: PositiveInt = 4096
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    attention_sinks: bool = False
    norms_per_layer: PositiveInt = 2
    sliding_window: PositiveInt | None = None
    sliding_layers: frozenset[int] = frozenset()
    latent: LatentAttention | None = None
    experts: Experts | None = None

    @model_validator(mode="after")
    def _consistent(self) -> ModelSpec:
        if self.heads % self.kv_heads:
            raise InvalidValue(
                f"kv_heads is {self.kv_heads}",
                at=("kv_heads",),
                fix=f"it must divide the {self.heads} heads",
            )
        if self.experts and self.experts.active > self.experts.count:
            raise InvalidValue(
                f"experts.active is {self.experts.active}",
                at=("experts", "active"),
                fix=f"there are {self.experts.count} experts",
            )
        return self

    @classmethod
    def from_hf(cls, config: str | Path | Mapping[str, Any], *, name: str = "") -> ModelSpec:
        """Reads a Hugging Face ``config.json``.

        Args:
            config: the file, the folder that holds it, or its content.
            name: what to call the model; by default what the config or its folder says.

        Raises:
            Unsupported: the architecture is not one that this module knows.
            BadInput: the file cannot be read, or a key is missing or wrong.
        """
        from trimtab.core.model_configs import spec_from_hf

        return spec_from_hf(config, name=name)

    def is_sparse(self, layer: int) -> bool:
        """Whether a layer has a mixture of experts."""
        return self.experts is not None and layer not in self.experts.dense_layers

    @cached_property
    def embedding_parameters(self) -> int:
        """The table that turns tokens into vectors."""
        return self.vocab * self.hidden

    @cached_property
    def head_parameters(self) -> int:
        """The output head and the last normalisation; a tied head counts under the embedding."""
        return self.hidden + (0 if self.tied_embeddings else self.vocab * self.hidden)

    @cached_property
    def attention_parameters(self) -> int:
        """The attention of one layer, with its normalisations of queries and keys."""
        if self.latent is not None:
            return self._latent_attention_parameters(self.latent)
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        weights = self.hidden * (queries + 2 * keys) + queries * self.hidden
        biases = (queries + 2 * keys) * self.qkv_bias + self.hidden * self.output_bias
        return (
            weights + biases + 2 * self.head_dim * self.qk_norm + self.heads * self.attention_sinks
        )

    def _latent_attention_parameters(self, latent: LatentAttention) -> int:
        queries = self.heads * (latent.nope_dim + latent.rope_dim)
        if latent.q_rank is None:
            query = self.hidden * queries
        else:
            query = self.hidden * latent.q_rank + latent.q_rank + latent.q_rank * queries
        down = self.hidden * (latent.kv_rank + latent.rope_dim) + latent.kv_rank
        up = latent.kv_rank * self.heads * (latent.nope_dim + latent.value_dim)
        return query + down + up + self.heads * latent.value_dim * self.hidden

    def feed_forward_parameters(self, layer: int, experts: float | None = None) -> float:
        """The feed-forward network of a layer.

        Args:
            layer: which, from 0.
            experts: how many routed experts to count; None for all.
        """
        if self.experts is None or not self.is_sparse(layer):
            return self._gated(self.intermediate)
        moe = self.experts
        counted = moe.count if experts is None else experts
        router = self.hidden * moe.count + moe.count * moe.router_bias
        shared = self._gated(moe.shared_intermediate) if moe.shared_intermediate else 0
        gate = self.hidden * moe.shared_gate
        return counted * self._gated(moe.intermediate) + router + shared + gate

    def _gated(self, intermediate: int) -> int:
        weights = 3 * self.hidden * intermediate
        return weights + (2 * intermediate + self.hidden) * self.mlp_bias

    def layer_parameters(self, layer: int, experts: float | None = None) -> float:
        """The parameters of a layer; ``experts`` as in `feed_forward_parameters`."""
        norms = self.norms_per_layer * self.hidden
        return self.attention_parameters + norms + self.feed_forward_parameters(layer, experts)

    def _parameters(self, experts: float | None) -> float:
        layers = sum(self.layer_parameters(layer, experts) for layer in range(self.layers))
        return self.embedding_parameters + layers + self.head_parameters

    def parameters(self) -> int:
        """All parameters."""
        return int(self._parameters(None))

    def active_parameters(self, *, embedding: bool = True) -> int:
        """The parameters that one token meets.

        Args:
            embedding: whether to count the input table, of which a token reads one row; most
                vendors do, DeepSeek does not. A tied table counts always, as the head.
        """
        active = self._parameters(self.experts.active if self.experts else None)
        counted = embedding or self.tied_embeddings
        return int(active) - (0 if counted else self.embedding_parameters)

    def touched_parameters(self, tokens: int) -> float:
        """Expected parameters that a step over ``tokens`` tokens reads, the input table apart.

        Tokens choose experts independently and evenly: of E experts, E (1 - (1 - k/E)^tokens).
        """
        touched: float | None = None
        if self.experts:
            missed = (1 - self.experts.active / self.experts.count) ** tokens
            touched = self.experts.count * (1 - missed)
        table = 0 if self.tied_embeddings else self.embedding_parameters
        return self._parameters(touched) - table

    def weight_bytes(self, dtype_bytes: float | None = None) -> float:
        """Bytes of all weights, in the model's own type unless another is given."""
        return self.parameters() * (self.dtype_bytes if dtype_bytes is None else dtype_bytes)

    def layer_weight_bytes(self, layer: int, dtype_bytes: float | None = None) -> float:
        """Bytes of one layer's weights."""
        return self.layer_parameters(layer) * (
            self.dtype_bytes if dtype_bytes is None else dtype_bytes
        )

    def layer_kv_bytes_per_token(self, dtype_bytes: float = 2.0) -> float:
        """KV cache of one token in one layer; the compressed latent under latent attention."""
        if self.latent is not None:
            return (self.latent.kv_rank + self.latent.rope_dim) * dtype_bytes
        return 2 * self.kv_heads * self.head_dim * dtype_bytes

    def kv_bytes_per_token(self, dtype_bytes: float = 2.0) -> float:
        """KV cache of one token in all layers, while no window is exceeded."""
        return self.layers * self.layer_kv_bytes_per_token(dtype_bytes)

    def kv_bytes(self, tokens: int, dtype_bytes: float = 2.0) -> float:
        """KV cache of a sequence of ``tokens``; sliding layers keep no more than their window."""
        kept = sum(min(tokens, self._window(layer, tokens)) for layer in range(self.layers))
        return kept * self.layer_kv_bytes_per_token(dtype_bytes)

    def _window(self, layer: int, tokens: int) -> int:
        slides = self.sliding_window is not None and layer in self.sliding_layers
        return self.sliding_window or tokens if slides else tokens

    def prefill_flops(self, tokens: int, context: int = 0) -> float:
        """FLOPs of computing ``tokens`` of a prompt after ``context`` cached tokens.

        Two per parameter and token, causal attention, and the output head for the last token only.
        """
        per_pair = self._flops_per_pair(expanded=True)
        attention = sum(
            per_pair * _causal_pairs(tokens, context, self._window(layer, context + tokens))
            for layer in range(self.layers)
        )
        return 2.0 * tokens * self._body_parameters + attention + self._head_flops

    def decode_flops(self, context: int) -> float:
        """FLOPs of one token that attends to ``context`` tokens, itself included."""
        per_pair = self._flops_per_pair(expanded=False)
        pairs = sum(min(context, self._window(layer, context)) for layer in range(self.layers))
        return 2.0 * self._body_parameters + per_pair * pairs + self._head_flops

    @cached_property
    def _body_parameters(self) -> int:
        table = self.embedding_parameters
        return int(self._parameters(self.experts.active if self.experts else None)) - (
            table + self.head_parameters
        )

    @property
    def _head_flops(self) -> float:
        return 2.0 * self.vocab * self.hidden

    def _flops_per_pair(self, *, expanded: bool) -> float:
        """FLOPs of one query token against one key token in one layer.

        Latent attention expands keys and values to full heads in prefill and attends to the latent
        itself in decode, as engines do.
        """
        latent = self.latent
        if latent is None:
            return 4.0 * self.heads * self.head_dim
        if expanded:
            return 2.0 * self.heads * (latent.nope_dim + latent.rope_dim + latent.value_dim)
        return 2.0 * self.heads * (2 * latent.kv_rank + latent.rope_dim)


def _causal_pairs(tokens: int, context: int, window: int) -> float:
    """Query-key pairs of ``tokens`` new tokens after ``context`` under a sliding ``window``.

    The i-th new token, from 1, sees min(context + i, window) tokens.
    """
    growing = min(max(window - context, 0), tokens)
    return growing * context + growing * (growing + 1) / 2 + (tokens - growing) * window
