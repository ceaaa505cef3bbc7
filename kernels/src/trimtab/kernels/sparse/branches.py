"""Native sparse attention, whole and differentiable: the compressed, selected and sliding branch.

The operators ``trimtab_sparse::span`` and ``::span_backward`` serve the compressed and the sliding
branch. On a GPU they run Triton kernels; on a CPU plain torch, or the kernels where Triton
interprets.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from trimtab.kernels.sparse import launch_spans, spans, tables
from trimtab.kernels.sparse.checks import (
    check_ends,
    check_entries,
    check_gates,
    check_numbers,
    check_sizes,
)
from trimtab.kernels.sparse.operators import (
    WORKSPACE_BYTES,
    exactly,
    like_gradients,
    like_output,
    on_triton,
    select_blocks,
    selected_attention,
)
from trimtab.kernels.sparse.shape import SparseShape
from trimtab.kernels.sparse.tiles import wide


@torch.library.custom_op("trimtab_sparse::span", mutates_args=())
def _span(
    q: Tensor, k: Tensor, v: Tensor, low: Tensor, high: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    way = launch_spans if on_triton(q) else spans
    with exactly(q):
        result: tuple[Tensor, Tensor] = way.forward(q, k, v, low, high, scale)
    return result


_span.register_fake(like_output)


@torch.library.custom_op("trimtab_sparse::span_backward", mutates_args=())
def _span_backward(
    gradient: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    low: Tensor,
    high: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    gradient, q, k, v = (x.contiguous() for x in (gradient, q, k, v))
    way = launch_spans if on_triton(q) else spans
    with exactly(q):
        result: tuple[Tensor, Tensor, Tensor] = way.backward(
            gradient, q, k, v, out, lse, low, high, scale
        )
    return result


_span_backward.register_fake(like_gradients)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, low, high, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output, low, high)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, gradient: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    return *_span_backward(gradient, *ctx.saved_tensors, ctx.scale), None, None, None


_span.register_autograd(_differentiate, setup_context=_keep)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, low: Tensor, high: Tensor, scale: float | None
) -> tuple[Tensor, Tensor]:
    if q.shape[0] == 0 or k.shape[0] == 0:
        lse = q.new_full(q.shape[:2], float("-inf"))
        return q.new_zeros(*q.shape[:2], v.shape[-1]), wide(lse)
    result: tuple[Tensor, Tensor] = _span(
        *(q, k, v, low, high, q.shape[-1] ** -0.5 if scale is None else scale)
    )
    return result


def compressed_attention(
    q: Tensor,
    entries_k: Tensor,
    entries_v: Tensor,
    cu_queries: Tensor,
    cu_keys: Tensor,
    cu_entries: Tensor,
    shape: SparseShape,
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of packed queries to the compressed entries that lie behind them (NSA, 3.3.1).

    Args:
        q: ``[queries, heads, d]``.
        entries_k: compressed keys ``[entries, kv_heads, d]``; more than ``cu_entries`` tells of are
            not looked at.
        entries_v: compressed values ``[entries, kv_heads, d_v]``.
        cu_queries: ends of the packed sequences ``[sequences + 1]`` int32, from 0.
        cu_keys: the same of the raw keys.
        cu_entries: the same of the entries.
        shape: sizes.
        scale: of the logits; ``d ** -0.5`` by default.

    Returns:
        Output ``[queries, heads, d_v]`` and natural logarithm ``[queries, heads]``; 0 and minus
        infinity for queries before the end of the first window.

    Raises:
        ValueError: the sizes or the ends do not fit together.
    """
    check_sizes(q, entries_k, entries_v, "entries_k", "entries_v")
    check_ends(cu_queries, cu_keys, q.shape[0])
    check_entries(cu_entries, cu_keys, entries_k.shape[0], shape.window, shape.stride)
    sees = tables.sees_entries(
        cu_queries, cu_keys, cu_entries, q.shape[0], shape.window, shape.stride
    )
    return _attend(q, entries_k, entries_v, *sees, scale)


def sliding_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_queries: Tensor,
    cu_keys: Tensor,
    *,
    window: int,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of packed queries to the ``window`` latest tokens, the own one among them.

    Args:
        q: ``[queries, heads, d]``.
        k: ``[keys, kv_heads, d]``.
        v: ``[keys, kv_heads, d_v]``.
        cu_queries: ends of the packed sequences ``[sequences + 1]`` int32, from 0.
        cu_keys: the same of the keys; the last query of a sequence belongs to its last key.
        window: tokens.
        scale: of the logits; ``d ** -0.5`` by default.

    Returns:
        Output ``[queries, heads, d_v]`` and natural logarithm ``[queries, heads]``.

    Raises:
        ValueError: the sizes or the ends do not fit together.
    """
    check_sizes(q, k, v)
    check_ends(cu_queries, cu_keys, q.shape[0], k.shape[0])
    check_numbers(1, window=window)
    return _attend(q, k, v, *tables.sees_window(cu_queries, cu_keys, q.shape[0], window), scale)


def native_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    entries_k: Tensor,
    entries_v: Tensor,
    gates: Tensor,
    cu_queries: Tensor,
    cu_keys: Tensor,
    cu_entries: Tensor,
    shape: SparseShape,
    *,
    sliding_k: Tensor | None = None,
    sliding_v: Tensor | None = None,
    scale: float | None = None,
    workspace_bytes: int = WORKSPACE_BYTES,
) -> Tensor:
    """The three branches of packed sequences, mixed by their gates (NSA, equation 5).

    Gradients reach all tensors but the choice of blocks, which follows the compressed keys.

    Args:
        q: ``[queries, heads, d]``; head ``h`` reads KV head ``h // (heads / kv_heads)``.
        k: keys of the selected branch ``[keys, kv_heads, d]``.
        v: its values ``[keys, kv_heads, d_v]``.
        entries_k: compressed keys ``[entries, kv_heads, d]``.
        entries_v: compressed values ``[entries, kv_heads, d_v]``.
        gates: of the compressed, selected and sliding branch ``[queries, heads or 1, 3]``.
        cu_queries: ends of the packed sequences ``[sequences + 1]`` int32, from 0.
        cu_keys: the same of the raw keys; the last query of a sequence belongs to its last key.
        cu_entries: the same of the entries.
        shape: sizes.
        sliding_k: keys of the sliding branch, if it has its own.
        sliding_v: its values, likewise.
        scale: of the logits; ``d ** -0.5`` by default.
        workspace_bytes: what partial results may take.

    Returns:
        ``[queries, heads, d_v]``.

    Raises:
        ValueError: the sizes or the ends do not fit together.
    """
    check_sizes(q, k, v)
    check_gates(gates, q)
    ends = (cu_queries, cu_keys)
    every = (*ends, cu_entries, shape)
    coarse, lse = compressed_attention(q, entries_k, entries_v, *every, scale=scale)
    blocks = select_blocks(q, entries_k, *every, scale=scale, lse=lse)
    fine, _ = selected_attention(
        q, k, v, blocks, *ends, block=shape.block, scale=scale, workspace_bytes=workspace_bytes
    )
    near, _ = sliding_attention(
        q,
        k if sliding_k is None else sliding_k,
        v if sliding_v is None else sliding_v,
        *ends,
        window=shape.sliding,
        scale=scale,
    )
    return mixed(coarse, fine, near, gates)


def mixed(coarse: Tensor, fine: Tensor, near: Tensor, gates: Tensor) -> Tensor:
    """The outputs of the branches ``[queries, heads, d_v]``, each times its gate."""
    coarse_gate, fine_gate, near_gate = gates.to(coarse.dtype).unsqueeze(2).unbind(-1)
    return coarse * coarse_gate + fine * fine_gate + near * near_gate


def keep_selection() -> Any:
    """For ``context_fn`` of `torch.utils.checkpoint.checkpoint`: blocks are chosen once.

    What is computed again under activation checkpointing may differ in its last bits, where
    kernels are not deterministic; then it would choose other blocks than the loss was computed
    with, and the gradients would be wrong. With this, the forward's choice is kept (``top``
    integers for each token and KV head), and everything else is computed again.
    """
    from torch.utils.checkpoint import create_selective_checkpoint_contexts

    contexts: Callable[[Any], Any] = create_selective_checkpoint_contexts
    return contexts([torch.ops.trimtab_sparse.select.default])
