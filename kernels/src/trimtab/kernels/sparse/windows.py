"""Windows of packed tokens, and how one compressed entry is made of each.

The number of windows is bounded beforehand, so that nothing waits for a device; entries beyond the
last sequence's are there, and are never seen.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from trimtab.kernels.sparse.checks import check_form, check_numbers, check_packed
from trimtab.kernels.sparse.shape import SparseShape


@dataclass(frozen=True, slots=True)
class Windows:
    """The windows of packed sequences."""

    token: Tensor
    """The first token of each, ``[tokens // stride]`` int64; those beyond the last are 0."""
    ends: Tensor
    """Ends of the sequences' entries ``[sequences + 1]`` int32, from 0."""
    window: int

    def __post_init__(self) -> None:
        check_numbers(1, window=self.window)

    @classmethod
    def of(cls, cu_keys: Tensor, tokens: int, shape: SparseShape) -> Windows:
        """Lays windows over sequences; none crosses the end of one.

        Args:
            cu_keys: ends of the packed sequences ``[sequences + 1]`` int32, from 0.
            tokens: how many they have together.
            shape: sizes.

        Raises:
            ValueError: the ends are no whole numbers of one dimension.
        """
        check_form("cu_keys", cu_keys)
        check_numbers(0, tokens=tokens)
        starts = cu_keys.long()
        counts = ((starts.diff() - shape.window) // shape.stride + 1).clamp(min=0)
        ends = pad(counts.cumsum(0), (1, 0))
        at = torch.arange(tokens // shape.stride, device=starts.device)
        sequence = torch.searchsorted(ends[1:], at, right=True)
        inside = sequence.clamp(max=counts.numel() - 1)
        token = starts[inside] + (at - ends[inside]) * shape.stride
        return cls(
            token.masked_fill(sequence == counts.numel(), 0).clamp(
                max=max(0, tokens - shape.window)
            ),
            ends.int(),
            shape.window,
        )

    def gather(self, x: Tensor) -> Tensor:
        """The tokens of each window, ``[windows, window, kv_heads, d]``."""
        offset = torch.arange(self.window, device=x.device)
        return x[(self.token[:, None] + offset).clamp(max=x.shape[0] - 1)]

    def mean(self, x: Tensor) -> Tensor:
        """One entry a window: the mean of its tokens ``x [tokens, kv_heads, d]``.

        Raises:
            ValueError: ``x`` has other dimensions.
        """
        check_packed("x", x, "kv_heads, d")
        return self.gather(x).mean(1)

    def linear(self, x: Tensor, weight: Tensor, position: Tensor | None = None) -> Tensor:
        """One entry a window: a learned map of its tokens, each KV head its own.

        Args:
            x: ``[tokens, kv_heads, d]``.
            weight: ``[kv_heads, window * d, out]``.
            position: added to a window's tokens ``[window, d]``.

        Returns:
            ``[windows, kv_heads, out]``.

        Raises:
            ValueError: weight or position are not of these sizes.
        """
        check_packed("x", x, "kv_heads, d")
        heads, size = x.shape[1:]
        if weight.dim() != 3 or weight.shape[:2] != (heads, self.window * size):
            raise ValueError(
                f"weight is {tuple(weight.shape)}; it must be [kv_heads, window * d, out],"
                f" [{heads}, {self.window} * {size}, out]"
            )
        if position is not None and position.shape != (self.window, size):
            raise ValueError(
                f"position is {tuple(position.shape)}; it must be [window, d],"
                f" [{self.window}, {size}]"
            )
        tokens = self.gather(x)
        if position is not None:
            tokens = tokens + position[:, None]
        flat = tokens.permute(2, 0, 1, 3).flatten(2)
        return torch.bmm(flat, weight).transpose(0, 1)
