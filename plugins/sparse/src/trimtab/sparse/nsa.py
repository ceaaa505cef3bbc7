"""Native sparse attention as a module to train with (NSA, arXiv 2502.11089)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from trimtab.kernels.sparse import SparseShape, Windows, native_sparse_attention
from trimtab.kernels.sparse.checks import check_choice, check_numbers
from trimtab.sparse.ulysses import SequenceParallel

Gate = Literal["token", "head"]
Compress = Literal["mean", "linear", "mlp"]
Rotation = tuple[Tensor, Tensor]
"""Cosines and sines of rotary positions, ``[…, tokens, r]``; the first ``r`` sizes are turned."""

_ALL = slice(None)


class Compression(nn.Module):
    """Makes one entry of each window of tokens, for each KV head by its own map (equation 7).

    It begins as the mean of the window, so that a model whose attention it joins starts sound.

    Args:
        kv_heads: KV heads.
        size: of a token and of an entry.
        window: tokens of an entry.
        kind: ``mean`` has nothing to learn, ``linear`` one map, ``mlp`` adds a perceptron of one
            hidden layer, twice as wide as an entry, to the mean.
        positions: whether tokens get a learned vector by their place in the window.
    """

    def __init__(
        self, kv_heads: int, size: int, window: int, kind: Compress, *, positions: bool
    ) -> None:
        super().__init__()
        self._kind = kind
        learns = kind != "mean"
        self.position = nn.Parameter(torch.zeros(window, size)) if learns and positions else None
        if kind == "linear":
            mean = torch.eye(size).repeat(window, 1) / window
            self.weight = nn.Parameter(mean.repeat(kv_heads, 1, 1))
        elif kind == "mlp":
            bound = 1 / math.sqrt(window * size)
            hidden = torch.empty(kv_heads, window * size, 2 * size).uniform_(-bound, bound)
            self.weight = nn.Parameter(hidden)
            self.weight_out = nn.Parameter(torch.zeros(kv_heads, 2 * size, size))

    def forward(self, x: Tensor, windows: Windows, heads: slice = _ALL) -> Tensor:
        """Entries ``[entries, kv_heads, size]`` of tokens ``[tokens, kv_heads, size]``.

        Of some KV heads only, where ``heads`` says which.
        """
        if self._kind == "mean":
            return windows.mean(x)
        mapped = windows.linear(x, self.weight[heads], self.position)
        if self._kind == "linear":
            return mapped
        hidden = nn.functional.silu(mapped).transpose(0, 1)
        return windows.mean(x) + torch.bmm(hidden, self.weight_out[heads]).transpose(0, 1)


def rotated(x: Tensor, rotation: Rotation | None) -> Tensor:
    """Tokens ``[tokens, heads, d]`` at their rotary positions ``[tokens, r]``."""
    if rotation is None:
        return x
    cos, sin = (part[:, None].to(x.dtype) for part in rotation)
    turned, rest = x.split([cos.shape[-1], x.shape[-1] - cos.shape[-1]], -1)
    left, right = turned.chunk(2, -1)
    turned = turned * cos + torch.cat([-right, left], -1) * sin
    return torch.cat([turned, rest], -1) if rest.shape[-1] else turned


class _Projected(NamedTuple):
    """Tokens by heads ``[…, heads, size]``; branches without keys of their own have the first."""

    q: Tensor
    gates: Tensor
    k: Tensor
    v: Tensor
    coarse_k: Tensor | None = None
    coarse_v: Tensor | None = None
    near_k: Tensor | None = None
    near_v: Tensor | None = None

    def changed(self, change: Callable[[Tensor], Tensor]) -> _Projected:
        """Each of them changed."""
        first = (change(x) for x in self[:4])
        return _Projected(*first, *(None if x is None else change(x) for x in self[4:]))


class NSAAttention(nn.Module):
    """Causal self-attention by a compressed, a selected and a sliding branch, mixed by gates.

    Projections have the names that transformers gives them. Keys are compressed before they are
    rotated; an entry is rotated to the position of its window's first token.

    Args:
        hidden_size: of a token.
        heads: query heads, a multiple of ``kv_heads``; any group is as good.
        kv_heads: KV heads.
        head_size: of queries and keys.
        value_size: of values; ``head_size`` by default.
        shape: sizes of windows and blocks.
        gate: one gate a branch for all heads (``token``), or for each (``head``).
        compress: how entries are made; see `Compression`.
        kv_per_branch: whether each branch has keys and values of its own, as NSA's authors have it.
        bias: whether queries, keys and values have one.
        output_bias: whether the output has one.

    Raises:
        ValueError: a size is none, the heads do not divide, or there is no such gate or map.
    """

    def __init__(
        self,
        hidden_size: int,
        heads: int,
        kv_heads: int,
        head_size: int,
        value_size: int | None = None,
        shape: SparseShape | None = None,
        *,
        gate: Gate = "head",
        compress: Compress = "linear",
        kv_per_branch: bool = False,
        bias: bool = False,
        output_bias: bool = False,
    ) -> None:
        super().__init__()
        value_size = head_size if value_size is None else value_size
        check_numbers(1, hidden_size=hidden_size, heads=heads, kv_heads=kv_heads)
        check_numbers(1, head_size=head_size, value_size=value_size)
        check_choice("gate", gate, Gate)
        check_choice("compress", compress, Compress)
        if heads % kv_heads:
            raise ValueError(f"{heads} heads do not divide into {kv_heads} KV heads")
        self.shape = shape or SparseShape()
        self._kv_heads, self._head_size = kv_heads, head_size
        self._parallel: SequenceParallel | None = None
        keys, values = kv_heads * head_size, kv_heads * value_size
        self.q_proj = nn.Linear(hidden_size, heads * head_size, bias)
        self.k_proj = nn.Linear(hidden_size, keys, bias)
        self.v_proj = nn.Linear(hidden_size, values, bias)
        self.o_proj = nn.Linear(heads * value_size, hidden_size, output_bias)
        self.gate_proj = nn.Linear(hidden_size, 3 * (heads if gate == "head" else 1))
        self.compress_k = Compression(
            kv_heads, head_size, self.shape.window, compress, positions=True
        )
        self.compress_v = Compression(
            kv_heads, value_size, self.shape.window, compress, positions=False
        )
        self.other_kv = (
            nn.ModuleDict(
                {
                    f"{branch}_{name}_proj": nn.Linear(hidden_size, size, bias)
                    for branch in ("compressed", "sliding")
                    for name, size in (("k", keys), ("v", values))
                }
            )
            if kv_per_branch
            else None
        )

    def share_sequences(self, group: Any) -> None:
        """Lets ranks of a group hold parts of each sequence, in the order of their ranks.

        Every rank then gives its own tokens to `forward`, as many as each other, and gets theirs
        back.

        Raises:
            BadInput: the KV heads do not divide into the ranks.
        """
        self._parallel = SequenceParallel(group, self._kv_heads)

    def forward(
        self, hidden: Tensor, rotation: Rotation | None = None, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        """Attends within each sequence.

        Args:
            hidden: ``[batch, tokens, hidden_size]``, or packed ``[tokens, hidden_size]``.
            rotation: of each token; without it there are no positions.
            cu_seqlens: ends of the sequences ``[sequences + 1]`` int32, from 0, for all tokens of
                the batch laid end to end; without it each row, or all, is one sequence. With
                sequences shared by ranks, those of whole rows.

        Returns:
            As large as ``hidden``.
        """
        rows = hidden if hidden.dim() == 3 else hidden[None]
        if rotation is not None:
            cos, sin = (part.expand(*rows.shape[:2], part.shape[-1]) for part in rotation)
            rotation = cos, sin
        projected, heads = self._project(rows), _ALL
        if self._parallel is not None:
            exchange, heads = self._parallel.to_heads, self._parallel.kv_heads
            projected = projected.changed(exchange)
            if rotation is not None:
                rotation = self._parallel.gathered(cos), self._parallel.gathered(sin)
        batch, tokens = projected.q.shape[:2]
        if cu_seqlens is None:
            cu_seqlens = torch.arange(batch + 1, dtype=torch.int32, device=hidden.device) * tokens
        out = self._mixed(
            projected.changed(lambda x: x.flatten(0, 1)),
            None if rotation is None else (rotation[0].flatten(0, 1), rotation[1].flatten(0, 1)),
            cu_seqlens,
            heads,
        ).unflatten(0, (batch, tokens))
        if self._parallel is not None:
            out = self._parallel.to_tokens(out)
        given: Tensor = self.o_proj(out.flatten(2)).view_as(hidden)
        return given

    def _project(self, hidden: Tensor) -> _Projected:
        q = self.q_proj(hidden).unflatten(-1, (-1, self._head_size))
        others = () if self.other_kv is None else self.other_kv.values()
        keys = (
            projection(hidden).unflatten(-1, (self._kv_heads, -1))
            for projection in (self.k_proj, self.v_proj, *others)
        )
        gates = self.gate_proj(hidden).sigmoid().unflatten(-1, (-1, 3))
        return _Projected(q, gates.expand(*q.shape[:-1], 3), *keys)

    def _mixed(
        self, x: _Projected, rotation: Rotation | None, ends: Tensor, heads: slice
    ) -> Tensor:
        """The branches of packed tokens, mixed: ``[tokens, heads, value_size]``."""
        windows = Windows.of(ends, x.q.shape[0], self.shape)
        first = None
        if rotation is not None:
            first = rotation[0][windows.token], rotation[1][windows.token]
        coarse_k = x.k if x.coarse_k is None else x.coarse_k
        coarse_v = x.v if x.coarse_v is None else x.coarse_v
        k = rotated(x.k, rotation)
        return native_sparse_attention(
            *(rotated(x.q, rotation), k, x.v),
            rotated(self.compress_k(coarse_k, windows, heads), first),
            self.compress_v(coarse_v, windows, heads),
            x.gates,
            ends,
            ends,
            windows.ends,
            self.shape,
            sliding_k=k if x.near_k is None else rotated(x.near_k, rotation),
            sliding_v=x.v if x.near_v is None else x.near_v,
        )
