"""Packed sequences whose tokens lie in pages, as a server's cache has them.

A cache is ``[pages, kv_heads, slots, d]`` with any strides. Raw tokens have a slot each. A
compressed entry has its slot in the page of its window's last token, ``page_tokens // stride`` in a
page: so what a page holds depends on the tokens up to its end alone, and pages can be shared, freed
and filled again without a word about entries.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from trimtab.kernels.sparse.checks import check_numbers
from trimtab.kernels.sparse.shape import SparseShape


@dataclass(frozen=True, slots=True)
class Paging:
    """Where the tokens of packed sequences lie."""

    pages: Tensor
    """Ids of each sequence's pages ``[sequences, most]`` int32 or int64; those beyond its last
    token are not looked at."""
    cu_queries: Tensor
    """Ends of the sequences' new tokens ``[sequences + 1]`` int32, from 0."""
    cu_keys: Tensor
    """The same of all their tokens; the new ones come last."""

    @property
    def keys(self) -> Tensor:
        """Tokens of each sequence, ``[sequences]`` int64."""
        return self.cu_keys.long().diff()

    @property
    def queries(self) -> Tensor:
        """New tokens of each sequence, ``[sequences]`` int64."""
        return self.cu_queries.long().diff()

    def of(self, sequences: Tensor) -> Paging:
        """Some of the sequences, in this order, ``[some]`` int64."""
        parts = (self.queries[sequences], self.keys[sequences])
        return Paging(self.pages[sequences], *(ends(part) for part in parts))

    def page(self, sequence: Tensor, slot: Tensor, slots: int) -> Tensor:
        """The page that holds a sequence's slot, counted from its beginning."""
        return self.pages[sequence, slot // slots].long()


def ends(counts: Tensor) -> Tensor:
    """Ends of packed sequences from their lengths: ``[sequences + 1]`` int32, from 0."""
    return pad(counts.cumsum(0), (1, 0)).int()


def laid_out(begins: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """The sequence and the place of each of ``counts`` places from ``begins`` on."""
    sequence = torch.repeat_interleave(torch.arange(counts.numel(), device=counts.device), counts)
    first = begins - (counts.cumsum(0) - counts)
    return sequence, torch.arange(sequence.numel(), device=counts.device) + first[sequence]


def gathered(cache: Tensor, paging: Paging, begins: Tensor, counts: Tensor) -> Tensor:
    """Slots of each sequence out of its pages, packed: ``[slots, kv_heads, d]``.

    Args:
        cache: ``[pages, kv_heads, slots, d]``.
        paging: the sequences.
        begins: the first slot of each, ``[sequences]`` int64.
        counts: how many, ``[sequences]`` int64.
    """
    slots = cache.shape[2]
    sequence, slot = laid_out(begins, counts)
    return cache[paging.page(sequence, slot, slots), :, slot % slots]


@dataclass(frozen=True, slots=True)
class NewTokens:
    """The new tokens of a step and the windows that they complete; the same for all layers."""

    paging: Paging
    page_tokens: int
    shape: SparseShape
    position: Tensor
    """Of each new token in its sequence, ``[tokens]`` int64."""
    page: Tensor
    """Of each new token, ``[tokens]`` int64."""
    later: Tensor
    """New tokens that follow each in its page, ``[tokens]`` int64."""
    sequence: Tensor
    """Of each window that is complete now, ``[windows]`` int64."""
    first: Tensor
    """The position of its first token, ``[windows]`` int64."""
    begin: Tensor
    """The position of its sequence's first new token, ``[windows]`` int64."""

    @classmethod
    def of(cls, paging: Paging, page_tokens: int, shape: SparseShape) -> NewTokens:
        """Finds where new tokens go, and which windows end in them.

        Raises:
            ValueError: the stride does not divide a page.
        """
        check_numbers(1, page_tokens=page_tokens)
        if page_tokens % shape.stride:
            raise ValueError(f"pages of {page_tokens} tokens end within a stride of {shape.stride}")
        keys, queries = paging.keys, paging.queries
        sequence, position = laid_out(keys - queries, queries)
        end = torch.minimum(keys[sequence], (position // page_tokens + 1) * page_tokens)
        complete = (position + 1 - shape.window) % shape.stride == 0
        (last,) = (complete & (position + 1 >= shape.window)).nonzero(as_tuple=True)
        own = sequence[last]
        return cls(
            paging,
            page_tokens,
            shape,
            position,
            paging.page(sequence, position, page_tokens),
            end - 1 - position,
            own,
            position[last] + 1 - shape.window,
            (keys - queries)[own],
        )

    def windows(self, x: Tensor, kept: Tensor) -> Tensor:
        """Writes new tokens into the cache, and reads the windows that are complete with them.

        Args:
            x: the new tokens ``[tokens, kv_heads, d]``.
            kept: a cache ``[pages, kv_heads, slots, d]`` of as many slots as a page has tokens; or
                of fewer, at least ``min(window, page_tokens)``, for the latest tokens of each page.

        Returns:
            ``[windows, window, kv_heads, d]``.

        Raises:
            ValueError: there are too few slots.
        """
        slots = kept.shape[2]
        if slots < min(self.shape.window, self.page_tokens):
            raise ValueError(f"{slots} slots do not hold a window of {self.shape.window} tokens")
        (rows,) = (self.later < slots).nonzero(as_tuple=True)
        at = self.page[rows], self.position[rows] % self.page_tokens % slots
        if not self.first.numel():
            kept[at[0], :, at[1]] = x[rows]
            return x.new_empty(0, self.shape.window, *x.shape[1:])
        position = self.first[:, None] + torch.arange(self.shape.window, device=x.device)
        old = self.paging.page(self.sequence[:, None], position, self.page_tokens)
        slot = position % self.page_tokens % slots
        # New tokens may take the slots of old ones in the page that they share; other old pages
        # may be another sequence's, which writes them in this very step.
        before = kept[old, :, slot]
        kept[at[0], :, at[1]] = x[rows]
        after = kept[old, :, slot]
        begin = self.begin[:, None]
        shared = position // self.page_tokens == begin // self.page_tokens
        known = torch.where(shared[..., None, None], before, after)
        row = position - begin + self.paging.cu_queries.long()[self.sequence][:, None]
        new = (position >= begin)[..., None, None]
        return torch.where(new, x[row.clamp(min=0)], known)

    def write(self, x: Tensor, cache: Tensor) -> None:
        """Writes new tokens ``[tokens, kv_heads, d]`` into a cache of all tokens."""
        cache[self.page, :, self.position % self.page_tokens] = x

    def write_entries(self, entries: Tensor, cache: Tensor) -> None:
        """Writes the entries of the windows, ``[windows, kv_heads, d]``, into their cache."""
        slots = cache.shape[2]
        slot = self.first // self.shape.stride + self.shape.reach
        cache[self.paging.page(self.sequence, slot, slots), :, slot % slots] = entries
