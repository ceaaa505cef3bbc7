"""The whole of native sparse attention as torch operators, against the mathematics."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from trimtab.kernels.sparse import (
    SparseShape,
    Windows,
    compressed_attention,
    keep_selection,
    naive,
    native_sparse_attention,
    sliding_attention,
    spans,
)

pytestmark = pytest.mark.integration

SMALL = SparseShape(window=8, stride=4, block=16, top=3, first=1, recent=1, sliding=24)


def ends(lengths):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


def drawn(seed, heads, kv_heads, d, d_v, lengths, dtype=torch.float64):
    """Queries, keys, values, keys and values of the sliding branch, gates, and ends."""
    generator = torch.Generator().manual_seed(seed)
    queries, keys = sum(a for a, _ in lengths), sum(b for _, b in lengths)
    shapes = [(queries, heads, d), *((keys, kv_heads, x) for x in (d, d_v, d, d_v))]
    tensors = [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]
    gates = torch.rand(queries, heads, 3, generator=generator, dtype=torch.float64).to(dtype)
    return [*tensors, gates], ends([a for a, _ in lengths]), ends([b for _, b in lengths])


def weights(seed, kv_heads, d, d_v):
    generator = torch.Generator().manual_seed(seed + 1)
    shapes = ((kv_heads, 8 * d, d), (kv_heads, 8 * d_v, d_v), (8, d))
    return [torch.randn(s, generator=generator, dtype=torch.float64) / 5 for s in shapes]


def packed(q, k, v, near_k, near_v, gates, to_k, to_v, position, cu_q, cu_k):
    windows = Windows.of(cu_k, k.shape[0], SMALL)
    entries = windows.linear(k, to_k, position), windows.linear(v, to_v)
    return native_sparse_attention(
        *(q, k, v, *entries, gates, cu_q, cu_k, windows.ends, SMALL),
        sliding_k=near_k,
        sliding_v=near_v,
    )


def separate(q, k, v, near_k, near_v, gates, to_k, to_v, position, cu_q, cu_k):
    """Each sequence by itself, in plain torch."""
    none = torch.zeros(8, v.shape[-1], dtype=v.dtype)
    outs = []
    for number in range(cu_q.numel() - 1):
        a = slice(*cu_q[number : number + 2].tolist())
        b = slice(*cu_k[number : number + 2].tolist())
        entries = (
            naive.linear_compress(k[b], to_k, position, SMALL),
            naive.linear_compress(v[b], to_v, none, SMALL),
        )
        outs.append(
            naive.native_sparse_attention(
                *(q[a], k[b], v[b], *entries, gates[a], SMALL, q.shape[-1] ** -0.5),
                (near_k[b], near_v[b]),
            )
        )
    return torch.cat(outs)


lengths = st.lists(
    st.integers(1, 90).flatmap(lambda n: st.tuples(st.integers(1, n), st.just(n))),
    min_size=1,
    max_size=3,
)
heads = st.sampled_from([(1, 1), (3, 1), (4, 4), (10, 2), (14, 2)])


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 99), heads, st.sampled_from([(8, 8), (6, 10)]), lengths)
@example(0, (4, 2), (8, 12), [(300, 300), (3, 3), (5, 200)])
@example(1, (5, 1), (8, 4), [(1, 70), (1, 9), (1, 7), (1, 50)])
def test_packed_attention_is_that_of_each_sequence_with_all_gradients(seed, counts, sizes, spans):
    tensors, cu_q, cu_k = drawn(seed, *counts, *sizes, spans)
    tensors += weights(seed, counts[1], *sizes)
    results = []
    for attend in (packed, separate):
        leaves = [x.clone().requires_grad_() for x in tensors]
        out = attend(*leaves, cu_q, cu_k)
        out.sin().sum().backward()
        results.append((out, [x.grad for x in leaves]))
    (ours, gradients), (theirs, expected) = results
    torch.testing.assert_close(ours, theirs)
    zero = [torch.zeros_like(x) for x in tensors]
    for a, b, none in zip(gradients, expected, zero, strict=True):
        torch.testing.assert_close(none if a is None else a, none if b is None else b)


def test_gradients_are_those_of_finite_differences():
    tensors, cu_q, cu_k = drawn(2, 3, 1, 2, 3, [(6, 12), (9, 9)])
    inputs = [x.requires_grad_() for x in [*tensors, *weights(2, 1, 2, 3)]]

    def attend(*leaves):
        return packed(*leaves, cu_q, cu_k)

    assert torch.autograd.gradcheck(attend, inputs, fast_mode=True)


@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-2)])
def test_other_types_come_near_to_double(dtype, near):
    tensors, cu_q, cu_k = drawn(3, 4, 2, 8, 8, [(90, 90), (40, 40)], dtype)
    tensors += [x.to(dtype) for x in weights(3, 2, 8, 8)]
    leaves = [x.clone().requires_grad_() for x in tensors]
    out = packed(*leaves, cu_q, cu_k)
    assert out.dtype == dtype
    out.sum().backward()
    assert all(x.grad.isfinite().all() for x in leaves)
    # The branches alone: a selection by rounded scores may be another.
    q, k, v = tensors[:3]
    cu_entries = ends([21, 9])
    for branch in (
        lambda q, k, v: sliding_attention(q, k, v, cu_q, cu_k, window=24)[0],
        lambda q, k, v: compressed_attention(q, k, v, cu_q, cu_k, cu_entries, SMALL)[0],
    ):
        exact = branch(q.double(), k.double(), v.double())
        torch.testing.assert_close(branch(q, k, v).double(), exact, atol=near, rtol=near)


def test_a_later_token_changes_nothing_earlier():
    tensors, cu_q, cu_k = drawn(4, 4, 2, 8, 8, [(100, 100)], torch.float32)
    learned = [x.float() for x in weights(4, 2, 8, 8)]
    before = packed(*tensors, *learned, cu_q, cu_k)
    for at in (1, 37, 64, 99):
        later = [x.clone() for x in tensors]
        for x in later:
            x[at:] += 3
        for x in (later[2], later[4]):
            x[at:] = float("nan")
        after = packed(*later, *learned, cu_q, cu_k)
        assert torch.equal(before[:at], after[:at])
        assert after[at:].isnan().all()


def test_sequences_below_the_window_have_no_compressed_part_and_sound_gradients():
    tensors, cu_q, cu_k = drawn(5, 2, 1, 8, 8, [(7, 7), (1, 1), (3, 3)])
    leaves = [x.requires_grad_() for x in [*tensors, *weights(5, 1, 8, 8)]]
    out = packed(*leaves, cu_q, cu_k)
    out.sum().backward()
    gates = leaves[5].grad
    assert not gates[..., 0].any()
    assert gates[..., 1:].all()
    assert not leaves[6].grad.any()
    assert all(x.grad.isfinite().all() for x in leaves)


def test_queries_in_parts_are_queries_at_once():
    tensors, cu_q, cu_k = drawn(6, 4, 2, 8, 8, [(90, 90)])
    learned = weights(6, 2, 8, 8)
    whole = packed(*tensors, *learned, cu_q, cu_k)
    q, *keys, gates = tensors
    for begin, end in ((0, 33), (33, 70), (70, 90)):
        known = [x[:end] for x in keys]
        part = packed(
            q[begin:end], *known, gates[begin:end], *learned, ends([end - begin]), ends([end])
        )
        torch.testing.assert_close(part, whole[begin:end])


def test_no_queries_and_no_keys_are_no_fault():
    tensors, *_ = drawn(7, 4, 2, 8, 8, [(0, 0)])
    assert packed(*tensors, *weights(7, 2, 8, 8), ends([0]), ends([0])).shape == (0, 4, 8)
    q, k, v = tensors[:3]
    out, lse = sliding_attention(q.new_ones(0, 4, 8), k, v, ends([0]), ends([0]), window=4)
    assert out.shape == (0, 4, 8)
    assert lse.shape == (0, 4)


def test_logits_of_ten_thousand_in_half_precision_stay_finite():
    (q, k, v, *_), cu_q, cu_k = drawn(8, 2, 1, 8, 8, [(64, 64)], torch.float16)
    out, lse = sliding_attention(q * 60, k * 60, v, cu_q, cu_k, window=24)
    exact = naive.sliding(*(x.double() for x in (q * 60, k * 60, v)), 24, 8**-0.5)[0]
    assert lse.abs().max() > 5000
    torch.testing.assert_close(out.double(), exact, atol=2e-3, rtol=0)


def test_long_spans_are_cut_to_keep_the_logits_few(monkeypatch):
    (q, k, v, *_), cu_q, cu_k = drawn(9, 2, 1, 8, 8, [(200, 200)])
    whole = sliding_attention(q, k, v, cu_q, cu_k, window=150)
    monkeypatch.setattr(spans, "_MOST_LOGITS", 1)
    parts = sliding_attention(q, k, v, cu_q, cu_k, window=150)
    torch.testing.assert_close(whole, parts)


def test_autocast_does_not_reach_into_the_operators():
    tensors, cu_q, cu_k = drawn(15, 4, 2, 8, 8, [(60, 60)], torch.float32)
    q, k, v = tensors[:3]
    windows = Windows.of(cu_k, 60, SMALL)
    entries = windows.mean(k), windows.mean(v)

    def attend():
        return native_sparse_attention(
            q, k, v, *entries, tensors[5], cu_q, cu_k, windows.ends, SMALL
        )

    exact = attend()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attend(), exact)


def test_the_operators_keep_torchs_rules():
    (q, k, v, *_), *_ = drawn(10, 4, 2, 8, 6, [(40, 40)], torch.float32)
    low = torch.arange(40).sub(9).clamp(min=0)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(torch.ops.trimtab_sparse.span, (*leaves, low, torch.arange(1, 41), 0.3))


def test_the_whole_compiles_into_one_graph_with_equal_gradients():
    tensors, cu_q, cu_k = drawn(11, 4, 2, 8, 8, [(40, 40), (20, 20)], torch.float32)
    tensors += [x.float() for x in weights(11, 2, 8, 8)]

    def loss(*leaves):
        return packed(*leaves, cu_q, cu_k).square().sum()

    gradients = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = [x.clone().requires_grad_() for x in tensors]
        function(*leaves).backward()
        gradients.append([x.grad for x in leaves])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("kept", [True, False])
def test_checkpointing_differentiates_what_the_forward_chose(kept, monkeypatch):
    """Even where what is computed again differs, as it does with kernels of no fixed order."""
    tensors, cu_q, cu_k = drawn(12, 4, 2, 8, 8, [(100, 100)])
    tensors += weights(12, 2, 8, 8)
    chosen = []
    attend = torch.ops.trimtab_sparse.selected.default
    noise = torch.randn(100, 4, 8, dtype=torch.float64)
    passes = 0

    def noisy(*leaves):
        nonlocal passes
        passes += 1
        return packed(leaves[0] + noise * (passes - 1), *leaves[1:], cu_q, cu_k)

    class Watching(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is attend:
                chosen.append(args[3])
            return function(*args, **(kwargs or {}))

    leaves = [x.requires_grad_() for x in tensors]
    options = {"context_fn": keep_selection} if kept else {}
    with Watching():
        torch.utils.checkpoint.checkpoint(
            noisy, *leaves, use_reentrant=False, preserve_rng_state=False, **options
        ).sum().backward()
    assert passes == 2
    assert len(chosen) == 2
    assert torch.equal(*chosen) == kept


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda a: a.update(gates=a["gates"][:, :3]), "gates is"),
        (lambda a: a.update(entries_v=a["entries_v"][:-1]), "do not fit"),
        (lambda a: a.update(sliding_k=a["k"][:, :0], sliding_v=a["v"][:, :0]), "KV heads"),
        (lambda a: a.update(entries_k=a["entries_k"].float()), "one dtype"),
        (lambda a: a.update(entries_k=a["entries_k"][0]), "dimensions"),
        (lambda a: a.update(cu_entries=ends([30])), "cu_entries ends at 30"),
        (lambda a: a.update(cu_queries=ends([30])), "must end at the 40 queries"),
    ],
)
def test_sizes_that_do_not_fit_are_named(change, what):
    (q, k, v, *_, gates), cu_q, cu_k = drawn(13, 4, 2, 8, 8, [(40, 40)])
    windows = Windows.of(cu_k, 40, SMALL)
    arguments = {"q": q, "k": k, "v": v, "gates": gates, "cu_queries": cu_q, "cu_keys": cu_k}
    arguments |= {"entries_k": windows.mean(k), "entries_v": windows.mean(v)}
    arguments |= {"cu_entries": windows.ends, "shape": SMALL}
    change(arguments)
    with pytest.raises(ValueError, match=what):
        native_sparse_attention(**arguments)


def test_a_window_of_nothing_is_refused():
    (q, k, v, *_), cu_q, cu_k = drawn(14, 2, 1, 8, 8, [(4, 4)])
    with pytest.raises(ValueError, match="window is 0"):
        sliding_attention(q, k, v, cu_q, cu_k, window=0)


def test_a_sliding_window_over_ends_that_do_not_fit_is_refused():
    (q, k, v, *_), cu_q, _ = drawn(15, 2, 1, 8, 8, [(40, 40)])
    for cu_keys, what in (
        (ends([60]), "there are 40 keys"),
        (ends([20]), "40 queries and 20 keys"),
    ):
        with pytest.raises(ValueError, match=what):
            sliding_attention(q, k, v, cu_q, cu_keys, window=4)
