"""Sequences spread over ranks, each with a part of the tokens (DeepSpeed-Ulysses, 2309.14509).

For attention, ranks exchange tokens for heads: each then has all tokens of its heads. What a KV
head chooses is its own affair, so the choice needs no more than this.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from trimtab.core.errors import BadInput


class _Exchange(torch.autograd.Function):
    """Gives the i-th part ``x[i]`` to the i-th rank; its gradient comes back the same way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        dist.all_to_all_single(out, x.contiguous(), group=group)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _Exchange.apply(gradients[0], ctx.group), None


class SequenceParallel:
    """The exchange within a group of ranks that share sequences in the order of their ranks.

    Args:
        group: of torch.distributed.
        kv_heads: of the model; every rank gets as many whole ones.

    Raises:
        BadInput: they do not divide.
    """

    def __init__(self, group: Any, kv_heads: int) -> None:
        self._group, self._size = group, dist.get_world_size(group)
        if kv_heads % self._size:
            raise BadInput(
                f"{kv_heads} KV heads do not divide into {self._size} ranks",
                where="sequence_group",
                fix="give a group whose size divides them: the heads of a group choose together",
            )
        each = kv_heads // self._size
        rank = dist.get_rank(group)
        self.kv_heads = slice(rank * each, (rank + 1) * each)
        """The KV heads of this rank."""

    def to_heads(self, x: Tensor) -> Tensor:
        """From ``[batch, own tokens, heads, d]`` to ``[batch, tokens, own heads, d]``."""
        parts = x.unflatten(2, (self._size, -1)).permute(2, 0, 1, 3, 4)
        mine: Tensor = _Exchange.apply(parts, self._group)
        return mine.transpose(0, 1).flatten(1, 2)

    def to_tokens(self, x: Tensor) -> Tensor:
        """From ``[batch, tokens, own heads, d]`` to ``[batch, own tokens, heads, d]``."""
        parts = x.unflatten(1, (self._size, -1)).transpose(0, 1)
        mine: Tensor = _Exchange.apply(parts, self._group)
        return mine.permute(1, 2, 0, 3, 4).flatten(2, 3)

    def gathered(self, x: Tensor) -> Tensor:
        """All tokens of ``[batch, own tokens, d]``, which need no gradient."""
        parts = [x.new_empty(x.shape) for _ in range(self._size)]
        dist.all_gather(parts, x.contiguous(), group=self._group)
        return torch.cat(parts, 1)
