"""Native sparse attention over a server's pages: what vLLM calls in each layer of such a model.

A page holds, for each KV head: rotated keys and values of its tokens; those of the sliding branch,
if they are its own; the latest keys before rotation, to make entries of; and the entries whose
windows end in the page. So a page says all about its tokens, whoever shares or frees it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from trimtab.core.errors import BadInput
from trimtab.kernels.sparse import NewTokens, Paging, Windows, paged_native_sparse_attention
from trimtab.kernels.sparse.paging import ends
from trimtab.sparse.config import NativeConfig
from trimtab.sparse.native import shape_of
from trimtab.sparse.nsa import Compression, Rotation, rotated
from trimtab.sparse.saving import native_config

if TYPE_CHECKING:
    from trimtab.hosts.vllm.own_attention import LayerSizes, Step


@dataclass(frozen=True, slots=True)
class Plan:
    """What all layers need to know of a step."""

    new: NewTokens
    rotation: Rotation
    """Of the new tokens."""
    first: Rotation
    """Of the first token of each window that is complete now."""

    @property
    def tokens(self) -> int:
        """How many are new."""
        return self.new.position.numel()


class _Page(NamedTuple):
    """What pages hold, each ``[pages, kv_heads, slots, d]``."""

    k: Tensor
    v: Tensor
    entries_k: Tensor
    entries_v: Tensor
    kept_k: Tensor
    near_k: Tensor | None = None
    near_v: Tensor | None = None
    kept_v: Tensor | None = None


class PagedNative(nn.Module):
    """A layer's gates, maps of windows and further projections, as `NSAAttention` names them.

    Args:
        config: sizes and choices.
        sizes: of the layer on this rank.
        bias: whether projections of keys and values have one.
    """

    def __init__(self, config: NativeConfig, sizes: LayerSizes, *, bias: bool = False) -> None:
        super().__init__()
        self.shape = shape_of(config)
        self._sizes, self._per_branch = sizes, config.kv_per_branch
        self._gates = sizes.heads if config.gate == "head" else 1
        self.gate_proj = nn.Linear(sizes.hidden, 3 * self._gates)
        made = (sizes.kv_heads, sizes.head_size, self.shape.window, config.compress)
        self.compress_k = Compression(*made, positions=True)
        self.compress_v = Compression(*made, positions=False)
        self.other_kv = nn.ModuleDict()
        if config.kv_per_branch:
            for branch in ("compressed", "sliding"):
                for name in ("k", "v"):
                    self.other_kv[f"{branch}_{name}_proj"] = nn.Linear(
                        sizes.hidden, sizes.kv_heads * sizes.head_size, bias=bias
                    )

    @property
    def sharded(self) -> Mapping[str, int]:
        """The dimension by which each parameter is split over tensor-parallel ranks."""
        by_head = ("compress_k.weight", "compress_v.weight", "other_kv.")
        gates = ("gate_proj.",) if self._gates > 1 else ()
        names = [name for name, _ in self.named_parameters()]
        return {name: 0 for name in names if name.startswith((*by_head, *gates))}

    def page_numbers(self, page_tokens: int) -> int:
        """Numbers that a page takes for each KV head.

        Raises:
            BadInput: the stride does not divide a page.
        """
        if page_tokens % self.shape.stride:
            raise BadInput(
                f"pages of {page_tokens} tokens end within a stride of {self.shape.stride}",
                where="vLLM's block_size",
                fix=f"give a multiple of {self.shape.stride}",
            )
        return sum(slots * size for slots, size in self._sections(page_tokens))

    def _sections(self, page_tokens: int) -> Iterator[tuple[int, int]]:
        """Slots and size of what `_Page` names, in its order."""
        size = self._sizes.head_size
        kept = min(self.shape.window, page_tokens)
        entries = page_tokens // self.shape.stride
        slots = [page_tokens, page_tokens, entries, entries, kept]
        if self._per_branch:
            slots += [page_tokens, page_tokens, kept]
        return ((count, size) for count in slots)

    def _page(self, cache: Tensor, page_tokens: int) -> _Page:
        parts, at = [], 0
        for slots, size in self._sections(page_tokens):
            part = cache[..., at : at + slots * size]
            parts.append(part.view(*cache.shape[:2], slots, size))
            at += slots * size
        return _Page(*parts)

    def plan(self, step: Step) -> Plan:
        """Places a step's tokens and finds the windows that they complete."""
        keys = step.keys.long()
        paging = Paging(step.pages, step.cu_queries, ends(keys))
        new = NewTokens.of(paging, step.page_tokens, self.shape)
        return Plan(new, step.rotate(new.position), step.rotate(new.first))

    def attend(
        self, hidden: Tensor, q: Tensor, k: Tensor, v: Tensor, cache: Tensor, plan: Plan
    ) -> Tensor:
        """Takes new tokens into the cache and attends; see the host's ``OwnAttention``."""
        new, page = plan.new, self._page(cache, plan.new.page_tokens)
        gates = self.gate_proj(hidden).sigmoid().view(-1, self._gates, 3)
        new.write(rotated(k, plan.rotation), page.k)
        if page.near_k is None or page.near_v is None or page.kept_v is None:
            windows_k, windows_v = new.windows(k, page.kept_k), new.windows(v, page.v)
        else:
            coarse_k, coarse_v, near_k, near_v = (
                project(hidden).view(v.shape) for project in self.other_kv.values()
            )
            new.write(v, page.v)
            new.write(rotated(near_k, plan.rotation), page.near_k)
            new.write(near_v, page.near_v)
            windows_k = new.windows(coarse_k, page.kept_k)
            windows_v = new.windows(coarse_v, page.kept_v)
        if windows_k.shape[0]:
            new.write_entries(
                rotated(_entries(self.compress_k, windows_k), plan.first), page.entries_k
            )
            new.write_entries(_entries(self.compress_v, windows_v), page.entries_v)
        return paged_native_sparse_attention(
            *(rotated(q, plan.rotation), page.k, page.v, page.entries_k, page.entries_v),
            *(gates, new.paging, self.shape),
            sliding_k=page.near_k,
            sliding_v=page.near_v,
        )


def _entries(compression: Compression, windows: Tensor) -> Tensor:
    """Entries ``[windows, kv_heads, size]`` of windows ``[windows, window, kv_heads, size]``."""
    count, window = windows.shape[:2]
    token = torch.arange(count, device=windows.device) * window
    laid = Windows(token, torch.tensor([0, count], dtype=torch.int32), window)
    made: Tensor = compression(windows.flatten(0, 1), laid)
    return made


def make(config: Any, sizes: LayerSizes) -> PagedNative:
    """The attention of a model that `trimtab.sparse.saving.save_native_model` has saved.

    Raises:
        BadInput: its configuration says nothing of native sparse attention, or something wrong.
    """
    bias = getattr(config, "qkv_bias", getattr(config, "attention_bias", False))
    return PagedNative(native_config(config), sizes, bias=bias)
