"""The branches of native sparse attention over keys, values and entries that lie in pages.

Each is the operator of the same name over packed sequences, and reads no more than it needs: of
sequences with few new tokens the chosen blocks alone. For inference: nothing here has gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trimtab.kernels.sparse import branches, operators, tables, tiles
from trimtab.kernels.sparse.operators import WORKSPACE_BYTES
from trimtab.kernels.sparse.paging import Paging, ends, gathered
from trimtab.kernels.sparse.shape import SparseShape
from trimtab.kernels.sparse.tiles import wide


def _check(q: Tensor, k: Tensor, v: Tensor, paging: Paging) -> None:
    if k.dim() != 4 or v.dim() != 4 or k.shape[:3] != v.shape[:3]:
        raise ValueError(
            f"k {tuple(k.shape)} and v {tuple(v.shape)} must be [pages, kv_heads, slots, size]"
        )
    operators.check_sizes(q, k[:, :, 0], v[:, :, 0])
    if paging.cu_queries.shape != paging.cu_keys.shape:
        raise ValueError("cu_queries and cu_keys name different numbers of sequences")
    if paging.pages.shape[0] != paging.cu_keys.numel() - 1:
        raise ValueError(
            f"{paging.pages.shape[0]} sequences have pages, {paging.cu_keys.numel() - 1} have ends"
        )


def _entries(cache: Tensor, paging: Paging, shape: SparseShape) -> tuple[Tensor, Tensor]:
    """The entries of each sequence, packed, and their ends."""
    counts = ((paging.keys - shape.window) // shape.stride + 1).clamp(min=0)
    return gathered(cache, paging, torch.full_like(counts, shape.reach), counts), ends(counts)


def paged_compressed_attention(
    q: Tensor,
    entries_k: Tensor,
    entries_v: Tensor,
    paging: Paging,
    shape: SparseShape,
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """`compressed_attention` to entries in pages.

    Args:
        q: new queries ``[queries, heads, d]``.
        entries_k: ``[pages, kv_heads, page_tokens // stride, d]``.
        entries_v: ``[pages, kv_heads, page_tokens // stride, d_v]``.
        paging: the sequences.
        shape: sizes.
        scale: of the logits; ``d ** -0.5`` by default.

    Returns:
        Output ``[queries, heads, d_v]`` and natural logarithm ``[queries, heads]``.

    Raises:
        ValueError: the sizes do not fit together.
    """
    _check(q, entries_k, entries_v, paging)
    k, cu_entries = _entries(entries_k, paging, shape)
    v, _ = _entries(entries_v, paging, shape)
    return branches.compressed_attention(
        *(q, k, v, paging.cu_queries, paging.cu_keys, cu_entries, shape), scale=scale
    )


def paged_select_blocks(
    q: Tensor,
    entries_k: Tensor,
    paging: Paging,
    shape: SparseShape,
    *,
    scale: float | None = None,
) -> Tensor:
    """`select_blocks` by entries in pages; see `paged_compressed_attention`.

    Returns:
        Ids of blocks within their sequence, ascending, -1 behind them: ``[kv_heads, queries, top]``
        int32.

    Raises:
        ValueError: the sizes do not fit together.
    """
    _check(q, entries_k, entries_k, paging)
    k, cu_entries = _entries(entries_k, paging, shape)
    return operators.select_blocks(
        *(q, k, paging.cu_queries, paging.cu_keys, cu_entries, shape), scale=scale
    )


def paged_sliding_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    paging: Paging,
    *,
    window: int,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """`sliding_attention` to keys in pages; what no window reaches is not read.

    Args:
        q: new queries ``[queries, heads, d]``.
        k: ``[pages, kv_heads, page_tokens, d]``.
        v: ``[pages, kv_heads, page_tokens, d_v]``.
        paging: the sequences.
        window: tokens.
        scale: of the logits; ``d ** -0.5`` by default.

    Returns:
        Output ``[queries, heads, d_v]`` and natural logarithm ``[queries, heads]``.

    Raises:
        ValueError: the sizes do not fit together.
    """
    _check(q, k, v, paging)
    keys = paging.keys
    counts = torch.minimum(keys, paging.queries + window - 1)
    near_k, near_v = (gathered(x, paging, keys - counts, counts) for x in (k, v))
    return branches.sliding_attention(
        q, near_k, near_v, paging.cu_queries, ends(counts), window=window, scale=scale
    )


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

    Sequences whose queries together choose fewer tokens than there are have the chosen blocks read,
    each query its own; of others all tokens are read once.

    Args:
        q: new queries ``[queries, heads, d]``.
        k: ``[pages, kv_heads, page_tokens, d]``; blocks and pages need not begin together.
        v: ``[pages, kv_heads, page_tokens, d_v]``.
        indices: ids of blocks within their sequence ``[kv_heads, queries, top]`` int32.
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
    queries, keys = paging.queries, paging.keys
    few = queries * indices.shape[-1] * block < keys
    if bool(few.all()):
        return _by_query(q, k, v, indices, paging, block, scale, workspace_bytes)
    if not bool(few.any()):
        return _by_sequence(q, k, v, indices, paging, block, scale, workspace_bytes)
    out = q.new_empty(*q.shape[:2], v.shape[-1])
    lse = wide(q[:0]).new_empty(q.shape[:2])
    taken = torch.repeat_interleave(few, queries)
    for way, sequences, rows in (
        (_by_query, few, taken),
        (_by_sequence, ~few, ~taken),
    ):
        part = paging.of(sequences.nonzero()[:, 0])
        out[rows], lse[rows] = way(
            *(q[rows], k, v, indices[:, rows], part, block, scale, workspace_bytes)
        )
    return out, lse


def _by_sequence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    paging: Paging,
    block: int,
    scale: float,
    workspace_bytes: int,
) -> tuple[Tensor, Tensor]:
    keys = paging.keys
    all_k, all_v = (gathered(x, paging, torch.zeros_like(keys), keys) for x in (k, v))
    return operators.selected_attention(
        *(q, all_k, all_v, indices, paging.cu_queries, paging.cu_keys),
        block=block,
        scale=scale,
        workspace_bytes=workspace_bytes,
    )


def _by_query(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    paging: Paging,
    block: int,
    scale: float,
    workspace_bytes: int,
) -> tuple[Tensor, Tensor]:
    queries, heads, _ = q.shape
    kv_heads, slots = k.shape[1:3]
    place = tables.place_queries(paging.cu_queries, paging.cu_keys, queries, block)
    position = place.last - paging.cu_keys.long()[place.sequence]
    ids = indices.long().sort(-1).values
    absent = (ids < 0) | (ids > place.own[:, None])
    absent[..., 1:] |= ids[..., 1:] == ids[..., :-1]
    inside = torch.arange(block, device=q.device)
    head = torch.arange(kv_heads, device=q.device)[:, None, None]
    out = q.new_empty(queries, heads, v.shape[-1])
    lse = wide(q[:0]).new_empty(queries, heads)
    read = kv_heads * ids.shape[-1] * block * (k.shape[-1] + v.shape[-1]) * 4
    step = max(1, workspace_bytes // max(1, read))
    for begin in range(0, queries, step):
        rows = slice(begin, begin + step)
        token = (ids[:, rows, :, None] * block + inside).flatten(2)
        hidden = absent[:, rows].repeat_interleave(block, -1) | (token > position[rows, None])
        token = token.masked_fill(hidden, 0)
        page = paging.page(place.sequence[rows, None].expand_as(token), token, slots)
        own_k, own_v = (wide(x[page, head, token % slots]).flatten(0, 1) for x in (k, v))
        grouped = wide(q[rows]).view(-1, kv_heads, heads // kv_heads, q.shape[-1])
        part, logarithm = tiles.attend(
            grouped.transpose(0, 1).flatten(0, 1),
            own_k,
            own_v,
            ~hidden.flatten(0, 1)[:, None],
            scale,
        )
        out[rows] = part.unflatten(0, (kv_heads, -1)).transpose(0, 1).flatten(1, 2).to(out.dtype)
        lse[rows] = logarithm.unflatten(0, (kv_heads, -1)).transpose(0, 1).flatten(1, 2)
    return out, lse


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
    _check(q, entries_k, entries_v, paging)
    branches.check_gates(gates, q)
    coarse_k, cu_entries = _entries(entries_k, paging, shape)
    coarse_v, _ = _entries(entries_v, paging, shape)
    coarse_ends = paging.cu_queries, paging.cu_keys, cu_entries
    coarse, _ = branches.compressed_attention(
        q, coarse_k, coarse_v, *coarse_ends, shape, scale=scale
    )
    blocks = operators.select_blocks(q, coarse_k, *coarse_ends, shape, scale=scale)
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
    )
    return branches.mixed(coarse, fine, near, gates)
