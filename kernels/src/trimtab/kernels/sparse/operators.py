"""The torch operators ``trimtab_sparse::select`` and ``::selected``, with gradients.

On a GPU they run Triton kernels; on a CPU plain torch, or the kernels too where Triton interprets.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trimtab.kernels.sparse import (
    block_lists,
    blockwise,
    launch,
    launch_published,
    naive,
    published,
    tables,
)
from trimtab.kernels.sparse.checks import (
    check_ends,
    check_entries,
    check_numbers,
    check_shapes,
    check_sizes,
)
from trimtab.kernels.sparse.chosen import Chosen
from trimtab.kernels.sparse.shape import SparseShape
from trimtab.kernels.sparse.tiles import wide

WORKSPACE_BYTES = 384 * 2**20
"""What partial results may take at most; longer inputs are done in segments."""


def on_triton(x: Tensor) -> bool:
    """Whether a tensor is one for the Triton kernels."""
    return x.dtype != torch.float64 and (x.is_cuda or launch.interpreted())


def exactly(x: Tensor) -> torch.autocast:
    """No autocast: it would reach the products inside an operator, whose types are chosen there."""
    return torch.autocast(x.device.type, enabled=False)


class _Ways(NamedTuple):
    """The forward pass on a GPU, and in plain torch."""

    on_gpu: Callable[[Chosen], tuple[Tensor, Tensor]]
    in_torch: Callable[[Chosen], tuple[Tensor, Tensor]]


_OWN = _Ways(launch.selected_forward, blockwise.forward)
_PUBLISHED = _Ways(launch_published.forward, published.forward)


def _chosen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    block: int,
    scale: float,
    workspace_bytes: int,
) -> Chosen:
    queries = tables.place_queries(cu_q, cu_k, q.shape[0], block)
    blocks = tables.cut(cu_k, k.shape[0], block)
    ids = tables.number_through(indices, queries, blocks)
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    return Chosen(q, k, v, ids, block, scale, queries, blocks, workspace_bytes)


def like_output(q: Tensor, k: Tensor, v: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    """What any attention returns, by shape and type alone."""
    return q.new_empty(*q.shape[:2], v.shape[-1]), wide(q.new_empty(q.shape[:2]))


def like_gradients(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: object
) -> tuple[Tensor, Tensor, Tensor]:
    """What the backward pass of any attention returns, by shape and type alone."""
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


@torch.library.custom_op("trimtab_sparse::selected", mutates_args=())
def _selected(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    block: int,
    scale: float,
    workspace_bytes: int,
    as_published: bool,
) -> tuple[Tensor, Tensor]:
    ways = _PUBLISHED if as_published else _OWN
    forward = ways.on_gpu if on_triton(q) else ways.in_torch
    with exactly(q):
        return forward(_chosen(q, k, v, indices, cu_q, cu_k, block, scale, workspace_bytes))


_selected.register_fake(like_output)


@torch.library.custom_op("trimtab_sparse::selected_backward", mutates_args=())
def _selected_backward(
    gradient: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    indices: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    block: int,
    scale: float,
    workspace_bytes: int,
) -> tuple[Tensor, Tensor, Tensor]:
    chosen = _chosen(q, k, v, indices, cu_q, cu_k, block, scale, workspace_bytes)
    backward = launch.selected_backward if on_triton(q) else blockwise.backward
    with exactly(q):
        return backward(gradient.contiguous(), out, lse, chosen)


_selected_backward.register_fake(like_gradients)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, indices, cu_q, cu_k, ctx.block, ctx.scale, ctx.workspace_bytes, _ = inputs
    ctx.save_for_backward(q, k, v, *output, indices, cu_q, cu_k)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, gradient: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, indices, cu_q, cu_k = ctx.saved_tensors
    gradients = _selected_backward(
        *(gradient, q, k, v, out, lse, indices, cu_q, cu_k),
        *(ctx.block, ctx.scale, ctx.workspace_bytes),
    )
    return *gradients, *(None,) * 7


_selected.register_autograd(_differentiate, setup_context=_keep)


def selected_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    cu_queries: Tensor,
    cu_keys: Tensor,
    *,
    block: int = 64,
    scale: float | None = None,
    workspace_bytes: int = WORKSPACE_BYTES,
    as_published: bool = False,
) -> tuple[Tensor, Tensor]:
    """Causal attention of packed queries to the blocks that each has chosen (NSA, section 3.3.2).

    Args:
        q: ``[queries, heads, d]``; head ``h`` reads KV head ``h // (heads / kv_heads)``.
        k: ``[keys, kv_heads, d]``.
        v: ``[keys, kv_heads, d_v]``; ``d_v`` may differ from ``d``.
        indices: ids of blocks within their sequence ``[kv_heads, queries, top]`` int32, in any
            order; negative, future and repeated ones do not count.
        cu_queries: ends of the packed sequences ``[sequences + 1]`` int32, from 0.
        cu_keys: the same of the keys; the last query of a sequence belongs to its last key.
        block: tokens of a block, a power of two.
        scale: of the logits; ``d ** -0.5`` by default.
        workspace_bytes: what partial results may take.
        as_published: whether the forward takes FSA's passes as published (arXiv 2508.18224): a pass
            for running maxima comes first. The results are the same.

    Returns:
        Output ``[queries, heads, d_v]`` as ``q``, and the natural logarithm of the sum of
        exponentials ``[queries, heads]``; 0 and minus infinity where nothing is seen.

    Raises:
        ValueError: the sizes or the ends do not fit together. Numbers in ``indices`` are not
            looked at; ends are on a CPU only, and not under ``torch.compile``.
    """
    _check(q, k, v, indices, cu_queries, cu_keys, block, workspace_bytes)
    if q.shape[0] == 0 or k.shape[0] == 0 or indices.shape[-1] == 0:
        out, lse = q.new_zeros(*q.shape[:2], v.shape[-1]), q.new_zeros(q.shape[:2])
        return out, lse.float().fill_(float("-inf"))
    result: tuple[Tensor, Tensor] = _selected(
        *(q, k, v, indices, cu_queries, cu_keys, block),
        *(q.shape[-1] ** -0.5 if scale is None else scale, workspace_bytes, as_published),
    )
    return result


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    block: int,
    workspace_bytes: int,
) -> None:
    check_sizes(q, k, v)
    if indices.dim() != 3:
        raise ValueError(f"indices has {indices.dim()} dimensions; it needs 3")
    if indices.is_floating_point() or indices.dtype == torch.bool:
        raise ValueError(f"indices is {indices.dtype}; it must be whole numbers")
    if indices.shape[:2] != (k.shape[1], q.shape[0]):
        raise ValueError(
            f"indices is {tuple(indices.shape)}; it must be [{k.shape[1]}, {q.shape[0]}, top]"
        )
    if block < 16 or block & (block - 1):
        raise ValueError(f"a block of {block} tokens is no power of two from 16 on")
    check_numbers(0, workspace_bytes=workspace_bytes)
    check_ends(cu_q, cu_k, q.shape[0], k.shape[0])


@torch.library.custom_op("trimtab_sparse::select", mutates_args=())
def _select(
    q: Tensor,
    entries: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    cu_entries: Tensor,
    sizes: list[int],
    scale: float,
    lse: Tensor | None,
) -> Tensor:
    shape = SparseShape(*sizes)
    q, entries = q.contiguous(), entries.to(q.dtype).contiguous()
    if on_triton(q):
        queries = tables.place_queries(cu_q, cu_k, q.shape[0], shape.block)
        low, high = tables.sees_entries(
            cu_q, cu_k, cu_entries, q.shape[0], shape.window, shape.stride
        )
        return launch.select(q, entries, low, high, queries, shape, scale, lse)
    with exactly(q):
        every = (q, entries, cu_q, cu_k, cu_entries, shape, scale)
        chosen = block_lists.select(*every)
        return _select_by_sequence(*every) if chosen is None else chosen


def _select_by_sequence(
    q: Tensor,
    entries: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    cu_entries: Tensor,
    shape: SparseShape,
    scale: float,
) -> Tensor:
    """Plain torch, some queries at a time so that scores take little memory."""
    kv_heads = entries.shape[1]
    out = torch.full((kv_heads, q.shape[0], shape.top), -1, dtype=torch.int32, device=q.device)
    bounds = (cu_q.tolist(), cu_k.diff().tolist(), cu_entries.tolist())
    for number, keys in enumerate(bounds[1]):
        begin, end = bounds[0][number : number + 2]
        own = entries[bounds[2][number] : bounds[2][number + 1]]
        step = max(1, (1 << 22) // max(1, q.shape[1] * max(1, own.shape[0])))
        for at in range(begin, end, step):
            stop = min(end, at + step)
            until = keys - (end - stop)
            known = own[: shape.entries(until)]
            out[:, at:stop] = naive.select(wide(q[at:stop]), wide(known), until, shape, scale)
    return out


@_select.register_fake
def _(
    q: Tensor,
    entries: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    cu_entries: Tensor,
    sizes: list[int],
    scale: float,
    lse: Tensor | None,
) -> Tensor:
    return q.new_empty(entries.shape[1], q.shape[0], sizes[3], dtype=torch.int32)


def select_blocks(
    q: Tensor,
    entries: Tensor,
    cu_queries: Tensor,
    cu_keys: Tensor,
    cu_entries: Tensor,
    shape: SparseShape,
    *,
    scale: float | None = None,
    lse: Tensor | None = None,
) -> Tensor:
    """The blocks that packed queries choose by their attention to compressed keys (NSA, 3.3.2).

    Scores are summed over all heads of a group; among equal ones the lower block wins. The result
    has no gradient, and is the same at every run.

    Args:
        q: ``[queries, heads, d]``.
        entries: compressed keys ``[entries, kv_heads, d]``, packed like the sequences.
        cu_queries: ends of the packed sequences ``[sequences + 1]`` int32, from 0.
        cu_keys: the same of the raw keys.
        cu_entries: the same of the compressed keys.
        shape: sizes.
        scale: of the logits; ``d ** -0.5`` by default.
        lse: what `compressed_attention` gave for the same, ``[queries, heads]``: it saves a GPU a
            pass over the entries.

    Returns:
        Ids within their sequence, ascending, -1 behind them: ``[kv_heads, queries, top]`` int32.

    Raises:
        ValueError: the sizes or the ends do not fit together.
    """
    check_shapes(q, entries, entries, "entries", "entries")
    check_ends(cu_queries, cu_keys, q.shape[0])
    check_entries(cu_entries, cu_keys, entries.shape[0], shape.window, shape.stride)
    if lse is not None and lse.shape != q.shape[:2]:
        raise ValueError(
            f"lse is {tuple(lse.shape)}; it must be [queries, heads], {tuple(q.shape[:2])}"
        )
    sizes = [shape.window, shape.stride, shape.block, shape.top, shape.first, shape.recent]
    chosen: Tensor = _select(
        *(q.detach(), entries.detach(), cu_queries, cu_keys, cu_entries, sizes),
        q.shape[-1] ** -0.5 if scale is None else scale,
        None if lse is None else lse.detach(),
    )
    return chosen
