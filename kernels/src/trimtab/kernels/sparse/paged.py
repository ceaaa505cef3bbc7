"""The branches of native sparse attention over keys, values and entries that lie in pages.

Each is the operator of the same name over packed sequences. A query that is its sequence's only new
one, as in decoding, has what it sees read for itself, and all such queries are done at once; of
other sequences, what their queries see is read once and packed. For inference: nothing here has
gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from trimtab.kernels.sparse import branches, checks, naive, operators, tables, tiles
from trimtab.kernels.sparse.operators import WORKSPACE_BYTES
from trimtab.kernels.sparse.paging import Paging, ends, gathered
from trimtab.kernels.sparse.shape import SparseShape
from trimtab.kernels.sparse.tiles import wide


class _Part(NamedTuple):
    """Some sequences of a batch and the rows of their queries."""

    paging: Paging
    rows: Tensor | slice


_Way = Callable[[_Part], tuple[Tensor, ...]]
"""Results of a part, each ``[queries, …]``."""


def _either(paging: Paging, alone: Tensor, by_query: _Way, packed: _Way) -> tuple[Tensor, ...]:
    """The results of all queries, some sequences' in one way and some in the other.

    Args:
        paging: the sequences.
        alone: whether a sequence's queries each read for themselves, ``[sequences]``.
        by_query: for these.
        packed: for the others.
    """
    if not bool(alone.any()):
        return packed(_Part(paging, slice(None)))
    if bool(alone.all()):
        return by_query(_Part(paging, slice(None)))
    rows = torch.repeat_interleave(alone, paging.queries)
    parts = []
    for way, sequences, own in ((by_query, alone, rows), (packed, ~alone, ~rows)):
        part = _Part(paging.of(sequences.nonzero()[:, 0]), own.nonzero()[:, 0])
        parts.append((part.rows, way(part)))
    whole = tuple(x.new_empty(rows.numel(), *x.shape[1:]) for x in parts[0][1])
    for own_rows, results in parts:
        for out, result in zip(whole, results, strict=True):
            out[own_rows] = result
    return whole


def _by_length(part: _Part, lengths: Tensor, most_bytes: int, way: _Way) -> tuple[Tensor, ...]:
    """The results of single queries, of some sequences at a time.

    These are padded to the longest of them, which is at most about twice the shortest.

    Args:
        part: sequences of one query each.
        lengths: what each reads, in bytes.
        most_bytes: what those done at once may take, but for a single one.
        way: for some of them.
    """
    order = lengths.argsort(stable=True)
    sizes = lengths[order].tolist()
    groups, begin = [], 0
    for at, size in enumerate(sizes):
        if at > begin and (size > 2 * sizes[begin] or size * (at + 1 - begin) > most_bytes):
            groups.append(order[begin:at])
            begin = at
    groups.append(order[begin:])
    if len(groups) == 1:
        return way(part)
    results = []
    for some in groups:
        rows = some if isinstance(part.rows, slice) else part.rows[some]
        results.append(way(_Part(part.paging.of(some), rows)))
    back = torch.cat(groups).argsort()
    return tuple(torch.cat(found)[back] for found in zip(*results, strict=True))


class _Places(NamedTuple):
    """Where queries that read for themselves stand."""

    sequence: Tensor
    position: Tensor

    @classmethod
    def of(cls, paging: Paging, queries: int) -> _Places:
        place = tables.place_queries(paging.cu_queries, paging.cu_keys, queries, 1)
        return cls(place.sequence, place.own)


class _Read(NamedTuple):
    """The slots that each query reads, the same for all KV heads or each its own."""

    slot: Tensor
    """``[kv_heads or 1, queries, most]``, 0 where nothing is to be read."""
    hidden: Tensor
    """Where that is, likewise."""


def _grouped(q: Tensor, kv_heads: int) -> Tensor:
    """``[kv_heads, queries, group, d]`` of ``[queries, heads, d]``, in the type of sums."""
    queries, heads, d = q.shape
    return wide(q).view(queries, kv_heads, heads // kv_heads, d).transpose(0, 1)


def _read(cache: Tensor, paging: Paging, sequence: Tensor, slot: Tensor) -> Tensor:
    """``[kv_heads, queries, most, d]`` out of a cache, in the type of sums."""
    kv_heads, slots = cache.shape[1:3]
    head = torch.arange(kv_heads, device=cache.device)[:, None, None]
    page = paging.page(sequence[:, None].expand_as(slot), slot, slots)
    return wide(cache[page, head, slot % slots])


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    paging: Paging,
    read: _Read,
    scale: float,
    workspace_bytes: int,
) -> tuple[Tensor, Tensor]:
    """Attention of each query to its own slots: output and natural logarithm."""
    queries, heads, _ = q.shape
    kv_heads = k.shape[1]
    sequence = _Places.of(paging, queries).sequence
    out = q.new_empty(queries, heads, v.shape[-1])
    lse = wide(q[:0]).new_empty(queries, heads)
    # Keys and values as they are, widened, and their places; logits, weights and masks.
    item, sizes = lse.element_size(), k.shape[-1] + v.shape[-1]
    taken = kv_heads * (sizes * (k.element_size() + 2 * item) + 48) + heads * (2 * item + 2)
    step = max(1, workspace_bytes // max(1, taken * read.slot.shape[-1]))
    for begin in range(0, queries, step):
        rows = slice(begin, begin + step)
        slot = read.slot[:, rows]
        own_k, own_v = (_read(x, paging, sequence[rows], slot).flatten(0, 1) for x in (k, v))
        visible = ~read.hidden[:, rows].expand(kv_heads, -1, -1).flatten(0, 1)[:, None]
        grouped = _grouped(q[rows], kv_heads)
        part, logarithm = tiles.attend(grouped.flatten(0, 1), own_k, own_v, visible, scale)
        out[rows] = part.view(*grouped.shape[:3], -1).transpose(0, 1).flatten(1, 2).to(out.dtype)
        lse[rows] = logarithm.view(grouped.shape[:3]).transpose(0, 1).flatten(1, 2)
    return out, lse


def _check(q: Tensor, k: Tensor, v: Tensor, paging: Paging) -> None:
    if k.dim() != 4 or v.dim() != 4 or k.shape[:3] != v.shape[:3]:
        raise ValueError(
            f"k {tuple(k.shape)} and v {tuple(v.shape)} must be [pages, kv_heads, slots, size]"
        )
    checks.check_sizes(q, k[:, :, 0], v[:, :, 0])
    if paging.cu_queries.shape != paging.cu_keys.shape:
        raise ValueError("cu_queries and cu_keys name different numbers of sequences")
    if paging.pages.shape[0] != paging.cu_keys.numel() - 1:
        raise ValueError(
            f"{paging.pages.shape[0]} sequences have pages, {paging.cu_keys.numel() - 1} have ends"
        )


def _counts(paging: Paging, shape: SparseShape) -> Tensor:
    """The entries of each sequence, ``[sequences]``."""
    return ((paging.keys - shape.window) // shape.stride + 1).clamp(min=0)


def _entries(cache: Tensor, paging: Paging, shape: SparseShape) -> tuple[Tensor, Tensor]:
    """The entries of each sequence, packed, and their ends."""
    counts = _counts(paging, shape)
    return gathered(cache, paging, torch.full_like(counts, shape.reach), counts), ends(counts)


def _entries_bytes(paging: Paging, shape: SparseShape, cache: Tensor, heads: int) -> Tensor:
    """What the entries that each sequence's last query reads may take, keys alone."""
    _, kv_heads, _, d = cache.shape
    item = wide(cache[:0]).element_size()
    each = kv_heads * (d * (cache.element_size() + item) + 48 + 4 * item) + 5 * item * heads
    return (_counts(paging, shape) + 1) * each


def _all_entries(paging: Paging, shape: SparseShape) -> _Read:
    """What the last query of each sequence reads of the entries."""
    counts = _counts(paging, shape)
    entry = torch.arange(int(counts.max()) if counts.numel() else 0, device=counts.device)
    hidden = (entry >= counts[:, None])[None]
    return _Read((entry + shape.reach).masked_fill(hidden, 0), hidden)


def paged_compressed_attention(
    q: Tensor,
    entries_k: Tensor,
    entries_v: Tensor,
    paging: Paging,
    shape: SparseShape,
    *,
    scale: float | None = None,
    workspace_bytes: int = WORKSPACE_BYTES,
) -> tuple[Tensor, Tensor]:
    """`compressed_attention` to entries in pages.

    Args:
        q: new queries ``[queries, heads, d]``.
        entries_k: ``[pages, kv_heads, page_tokens // stride, d]``.
        entries_v: ``[pages, kv_heads, page_tokens // stride, d_v]``.
        paging: the sequences.
        shape: sizes.
        scale: of the logits; ``d ** -0.5`` by default.
        workspace_bytes: what entries that were read may take.

    Returns:
        Output ``[queries, heads, d_v]`` and natural logarithm ``[queries, heads]``; 0 and minus
        infinity for queries before the end of the first window.

    Raises:
        ValueError: the sizes do not fit together.
    """
    _check(q, entries_k, entries_v, paging)
    scale = q.shape[-1] ** -0.5 if scale is None else scale

    def alike(part: _Part) -> tuple[Tensor, ...]:
        read = _all_entries(part.paging, shape)
        if not read.slot.shape[-1]:
            return packed(part)
        known = (entries_k, entries_v, part.paging, read)
        return _attend(q[part.rows], *known, scale, workspace_bytes)

    def by_query(part: _Part) -> tuple[Tensor, ...]:
        lengths = _entries_bytes(part.paging, shape, entries_k, q.shape[1])
        return _by_length(part, lengths, workspace_bytes, alike)

    def packed(part: _Part) -> tuple[Tensor, Tensor]:
        k, cu_entries = _entries(entries_k, part.paging, shape)
        v, _ = _entries(entries_v, part.paging, shape)
        every = (part.paging.cu_queries, part.paging.cu_keys, cu_entries)
        return branches.compressed_attention(q[part.rows], k, v, *every, shape, scale=scale)

    out, lse = _either(paging, paging.queries == 1, by_query, packed)
    return out, lse


def paged_select_blocks(
    q: Tensor,
    entries_k: Tensor,
    paging: Paging,
    shape: SparseShape,
    *,
    scale: float | None = None,
    workspace_bytes: int = WORKSPACE_BYTES,
) -> Tensor:
    """`select_blocks` by entries in pages; see `paged_compressed_attention`.

    Returns:
        Ids of blocks within their sequence, ascending, -1 behind them: ``[kv_heads, queries, top]``
        int32.

    Raises:
        ValueError: the sizes do not fit together.
    """
    _check(q, entries_k, entries_k, paging)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    kv_heads = entries_k.shape[1]

    def alike(part: _Part) -> tuple[Tensor]:
        place = _Places.of(part.paging, q[part.rows].shape[0])
        read = _all_entries(part.paging, shape)
        known = _read(entries_k, part.paging, place.sequence, read.slot)
        hidden = read.hidden[:, :, None]
        logits = (_grouped(q[part.rows], kv_heads) @ known.mT * scale).masked_fill(
            hidden, float("-inf")
        )
        p = torch.exp(logits - logits.logsumexp(-1, keepdim=True)).masked_fill(hidden, 0.0)
        p = p.transpose(1, 2).flatten(0, 1)
        keys = int(part.paging.keys.max())
        scores = naive.importance(p, keys, kv_heads, shape)
        return (naive.top_blocks_at(scores, place.position, shape).transpose(0, 1),)

    def by_query(part: _Part) -> tuple[Tensor, ...]:
        lengths = _entries_bytes(part.paging, shape, entries_k, q.shape[1])
        return _by_length(part, lengths, workspace_bytes, alike)

    def packed(part: _Part) -> tuple[Tensor]:
        k, cu_entries = _entries(entries_k, part.paging, shape)
        every = (part.paging.cu_queries, part.paging.cu_keys, cu_entries)
        chosen = operators.select_blocks(q[part.rows], k, *every, shape, scale=scale)
        return (chosen.transpose(0, 1),)

    (chosen,) = _either(paging, paging.queries == 1, by_query, packed)
    return chosen.transpose(0, 1)


def paged_sliding_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    paging: Paging,
    *,
    window: int,
    scale: float | None = None,
    workspace_bytes: int = WORKSPACE_BYTES,
) -> tuple[Tensor, Tensor]:
    """`sliding_attention` to keys in pages; what no window reaches is not read.

    Args:
        q: new queries ``[queries, heads, d]``.
        k: ``[pages, kv_heads, page_tokens, d]``.
        v: ``[pages, kv_heads, page_tokens, d_v]``.
        paging: the sequences.
        window: tokens.
        scale: of the logits; ``d ** -0.5`` by default.
        workspace_bytes: what keys and values that were read may take.

    Returns:
        Output ``[queries, heads, d_v]`` and natural logarithm ``[queries, heads]``.

    Raises:
        ValueError: the sizes do not fit together.
    """
    _check(q, k, v, paging)
    scale = q.shape[-1] ** -0.5 if scale is None else scale

    def by_query(part: _Part) -> tuple[Tensor, Tensor]:
        last = part.paging.keys - 1
        most = min(window, int(last.max()) + 1)
        token = last[:, None] - torch.arange(most - 1, -1, -1, device=last.device)
        read = _Read(token.clamp(min=0)[None], (token < 0)[None])
        return _attend(q[part.rows], k, v, part.paging, read, scale, workspace_bytes)

    def packed(part: _Part) -> tuple[Tensor, Tensor]:
        keys = part.paging.keys
        counts = torch.minimum(keys, part.paging.queries + window - 1)
        near_k, near_v = (gathered(x, part.paging, keys - counts, counts) for x in (k, v))
        every = (part.paging.cu_queries, ends(counts))
        return branches.sliding_attention(
            q[part.rows], near_k, near_v, *every, window=window, scale=scale
        )

    out, lse = _either(paging, paging.queries == 1, by_query, packed)
    return out, lse


def paged_selected_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    paging: Paging,
    *,
    block: int = 64,
    scale: float | None = None,
    workspace_bytes: int = WORKSPACE_BYTES,
) -> tuple[Tensor, Tensor]:
    """`selected_attention` to blocks of keys in pages.

    Of a sequence whose queries together choose fewer tokens than there are, or that has one, each
    query reads its blocks alone.

    Args:
        q: new queries ``[queries, heads, d]``.
        k: ``[pages, kv_heads, page_tokens, d]``; blocks and pages need not begin together.
        v: ``[pages, kv_heads, page_tokens, d_v]``.
        indices: ids of blocks within their sequence ``[kv_heads, queries, top]`` int32, in any
            order; negative, future and repeated ones do not count.
        paging: the sequences.
        block: tokens of a block, a power of two.
        scale: of the logits; ``d ** -0.5`` by default.
        workspace_bytes: what partial results, or keys and values that were read, may take.

    Returns:
        Output ``[queries, heads, d_v]`` and natural logarithm ``[queries, heads]``.

    Raises:
        ValueError: the sizes do not fit together.
    """
    _check(q, k, v, paging)
    scale = q.shape[-1] ** -0.5 if scale is None else scale

    def by_query(part: _Part) -> tuple[Tensor, Tensor]:
        rows = q[part.rows]
        place = _Places.of(part.paging, rows.shape[0])
        read = _blocks_read(indices[:, part.rows], place.position, block)
        return _attend(rows, k, v, part.paging, read, scale, workspace_bytes)

    def packed(part: _Part) -> tuple[Tensor, Tensor]:
        keys = part.paging.keys
        all_k, all_v = (gathered(x, part.paging, torch.zeros_like(keys), keys) for x in (k, v))
        every = (indices[:, part.rows], part.paging.cu_queries, part.paging.cu_keys)
        return operators.selected_attention(
            *(q[part.rows], all_k, all_v, *every),
            block=block,
            scale=scale,
            workspace_bytes=workspace_bytes,
        )

    queries = paging.queries
    alone = (queries == 1) | (queries * indices.shape[-1] * block < paging.keys)
    out, lse = _either(paging, alone, by_query, packed)
    return out, lse


def _blocks_read(indices: Tensor, position: Tensor, block: int) -> _Read:
    """The tokens of lists of blocks ``[kv_heads, queries, top]``."""
    own = position[:, None] // block
    ids = indices.long()
    ids = ids.masked_fill(ids > own, -1).clamp(min=-1).sort(-1, descending=True).values
    absent = ids < 0
    absent[..., 1:] |= ids[..., 1:] == ids[..., :-1]
    used = (~absent).flatten(0, 1).any(0).nonzero()
    most = int(used.max()) + 1 if used.numel() else 1
    inside = torch.arange(block, device=ids.device)
    token = (ids[..., :most, None] * block + inside).flatten(2)
    hidden = absent[..., :most].repeat_interleave(block, -1) | (token > position[:, None])
    return _Read(token.masked_fill(hidden, 0), hidden)


def paged_native_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    entries_k: Tensor,
    entries_v: Tensor,
    gates: Tensor,
    paging: Paging,
    shape: SparseShape,
    *,
    sliding_k: Tensor | None = None,
    sliding_v: Tensor | None = None,
    scale: float | None = None,
    workspace_bytes: int = WORKSPACE_BYTES,
) -> Tensor:
    """`native_sparse_attention` over pages, which hold the new tokens and entries too.

    Args:
        q: new queries ``[queries, heads, d]``.
        k: keys of the selected branch ``[pages, kv_heads, page_tokens, d]``.
        v: its values ``[pages, kv_heads, page_tokens, d_v]``.
        entries_k: compressed keys ``[pages, kv_heads, page_tokens // stride, d]``.
        entries_v: compressed values ``[pages, kv_heads, page_tokens // stride, d_v]``.
        gates: of the compressed, selected and sliding branch ``[queries, heads or 1, 3]``.
        paging: the sequences.
        shape: sizes.
        sliding_k: keys of the sliding branch, if it has its own.
        sliding_v: its values, likewise.
        scale: of the logits; ``d ** -0.5`` by default.
        workspace_bytes: what partial results, or keys and values that were read, may take.

    Returns:
        ``[queries, heads, d_v]``.

    Raises:
        ValueError: the sizes do not fit together.
    """
    _check(q, k, v, paging)
    checks.check_gates(gates, q)
    blocks = paged_select_blocks(
        q, entries_k, paging, shape, scale=scale, workspace_bytes=workspace_bytes
    )
    coarse, _ = paged_compressed_attention(
        *(q, entries_k, entries_v, paging, shape), scale=scale, workspace_bytes=workspace_bytes
    )
    fine, _ = paged_selected_attention(
        *(q, k, v, blocks, paging),
        block=shape.block,
        scale=scale,
        workspace_bytes=workspace_bytes,
    )
    near, _ = paged_sliding_attention(
        q,
        k if sliding_k is None else sliding_k,
        v if sliding_v is None else sliding_v,
        paging,
        window=shape.sliding,
        scale=scale,
        workspace_bytes=workspace_bytes,
    )
    return branches.mixed(coarse, fine, near, gates)
