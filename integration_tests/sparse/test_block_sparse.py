"""Prefill on the CPU: the compiled blocks, the selectors, and when they pay."""

from __future__ import annotations

import re
from importlib.machinery import EXTENSION_SUFFIXES

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from trimtab.kernels.sparse import block_sparse, prefill
from trimtab.kernels.sparse.block_sparse import (
    Choice,
    KeyStore,
    TiledAttention,
    Tiles,
    tiled_attention,
    tiled_attention_in_torch,
)
from trimtab.kernels.sparse.selectors import ESTIMATES, Selection, sampled

pytestmark = pytest.mark.integration

NEAR = {
    torch.float32: {"atol": 1e-5, "rtol": 1e-5},
    torch.float16: {"atol": 2e-3, "rtol": 2e-3},
    torch.bfloat16: {"atol": 2e-2, "rtol": 2e-2},
}


def ends(lengths):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


def drawn(seed, heads, kv_heads, d, d_v, spans, dtype):
    generator = torch.Generator().manual_seed(seed)
    queries, keys = sum(a for a, _ in spans), sum(b for _, b in spans)
    shapes = ((queries, heads, d), (keys, kv_heads, d), (keys, kv_heads, d_v))
    return [torch.randn(s, generator=generator).to(dtype) for s in shapes]


def some_choice(seed, heads, tiles):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.arange(int(tiles.last_block.max()) + 2)
    mask = torch.rand(heads, tiles.query.numel(), len(ids), generator=generator) < 0.5
    return Choice.of_mask(mask & (ids <= tiles.last_block[:, None]))


def blocks_of(selection, q, k, position, scale):
    return selection.keep(selection.estimate(q, k, position, scale), position, q.shape[0])


def dense(q, k, v):
    """Causal attention of the last queries."""
    at = torch.arange(k.shape[0] - q.shape[0], k.shape[0])
    visible = torch.arange(k.shape[0]) <= at[:, None]
    heads_first = (x.transpose(0, 1)[None].float() for x in (q, k, v))
    out = scaled_dot_product_attention(*heads_first, attn_mask=visible, enable_gqa=True)
    return out[0].transpose(0, 1).to(q.dtype)


def test_the_compiled_code_was_built_for_this_machine():
    assert block_sparse.library() is not None


spans = st.lists(
    st.integers(1, 200).flatmap(lambda n: st.tuples(st.integers(1, n), st.just(n))),
    min_size=1,
    max_size=3,
)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 99),
    st.sampled_from([(1, 1), (3, 1), (6, 2)]),
    st.sampled_from([(16, 16), (64, 64), (40, 72), (80, 128)]),
    spans,
    st.sampled_from(list(NEAR)),
)
def test_compiled_blocks_are_the_gathered_ones(seed, heads, sizes, spans, dtype):
    q, k, v = drawn(seed, *heads, *sizes, spans, dtype)
    cu_q, cu_k = ends([a for a, _ in spans]), ends([b for _, b in spans])
    store, tiles = KeyStore.packed(k, v, cu_k), Tiles.of(cu_q, cu_k, q.shape[0])
    choice = some_choice(seed, heads[0], tiles)
    outs = [q.new_empty(*q.shape[:2], sizes[1]) for _ in range(2)]
    tiled_attention(q, store, tiles, choice, outs[0], 0.2)
    tiled_attention_in_torch(q, store, tiles, choice, outs[1], 0.2)
    torch.testing.assert_close(*outs, **NEAR[dtype])


@pytest.mark.parametrize("dtype", NEAR)
def test_all_blocks_are_dense_attention(dtype):
    q, k, v = drawn(1, 6, 2, 64, 64, [(150, 333)], dtype)
    out = torch.empty_like(q)
    everything = Selection(mass=2.0)
    store = KeyStore.packed(k, v, ends([333]))
    kept = prefill.sparse_prefill(q, lambda: k, store, 183, out, 64**-0.5, everything)
    assert kept == 1
    torch.testing.assert_close(out, dense(q, k, v), **NEAR[dtype])


def test_a_paged_cache_with_keys_laid_crosswise_is_read_where_it_lies():
    q, k, v = drawn(2, 4, 2, 32, 32, [(100, 300)], torch.float32)
    page, pages = 128, torch.tensor([5, 0, 3])
    cache = torch.full((7, 2, 2, 32 * page), float("nan"))  # page, head, K or V
    for number, at in enumerate(pages.tolist()):
        part = slice(number * page, min(300, (number + 1) * page))
        length = part.stop - part.start
        for head in range(2):
            cache[at, head, 0].view(32, page)[:, :length] = k[part, head].T
            cache[at, head, 1].view(page, 32)[:length] = v[part, head]
    first = torch.arange(0, 300, 64)
    base = pages[first // page] * cache.stride(0)
    store = KeyStore(
        k=cache,
        v=cache,
        k_base=base,
        v_base=base + cache.stride(2),
        block_token=(first % page).int(),
        block_length=(300 - first).clamp(max=64).int(),
        k_token_at=torch.arange(page).repeat_interleave(2)[::2],
        v_token_at=torch.arange(page) * 32,
        k_dim_at=torch.arange(32) * page,
        v_dim_at=torch.arange(32),
        k_head=cache.stride(1),
        v_head=cache.stride(1),
        kv_heads=2,
        before=torch.tensor([0, 5]),
    )
    out = torch.empty_like(q)
    prefill.sparse_prefill(q, lambda: k, store, 200, out, 32**-0.5, Selection(mass=2.0))
    torch.testing.assert_close(out, dense(q, k, v), **NEAR[torch.float32])


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda a: a.update(k=a["k"].bfloat16(), v=a["v"].bfloat16()), "give one dtype"),
        (lambda a: a.update(v=a["v"].half()), "give one dtype"),
        (lambda a: a.update(q=a["q"][..., :16]), "q is"),
        (lambda a: a.update(q=a["q"][:, :3]), "multiple of 2 heads"),
        (lambda a: a.update(k=a["k"].to("meta")), "must be on a CPU"),
        (lambda a: a.update(out=a["out"].bfloat16()), "it must be .* in torch.float32"),
        (lambda a: a.update(out=a["out"][:-1]), r"it must be \(100, 4, 48\)"),
        (lambda a: a.update(out=a["out"].mT.contiguous().mT), "stride of 4"),
    ],
)
def test_what_the_compiled_code_would_read_or_write_past_its_end_is_refused(change, what):
    q, k, v = drawn(12, 4, 2, 32, 48, [(100, 100)], torch.float32)
    given = {"q": q, "k": k, "v": v, "out": q.new_empty(100, 4, 48)}
    change(given)
    cu = ends([100])
    tiles = Tiles.of(cu, cu, 100)
    store = KeyStore.packed(given["k"], given["v"], cu)
    with pytest.raises(ValueError, match=what):
        tiled_attention(given["q"], store, tiles, some_choice(12, 4, tiles), given["out"], 0.2)


def test_queries_whose_numbers_lie_apart_are_brought_together():
    q, k, v = drawn(13, 4, 2, 32, 32, [(100, 100)], torch.float32)
    apart, out = q.mT.contiguous().mT, torch.empty_like(q)
    store = KeyStore.packed(k, v, ends([100]))
    prefill.sparse_prefill(apart, lambda: k, store, 0, out, 0.2, Selection(mass=2.0))
    expected = torch.empty_like(q)
    prefill.sparse_prefill(q, lambda: k, store, 0, expected, 0.2, Selection(mass=2.0))
    assert torch.equal(out, expected)


def test_what_lies_in_a_block_nobody_chose_does_not_leak():
    q, k, v = drawn(3, 2, 1, 32, 32, [(256, 256)], torch.float32)
    k[64:128], v[64:128] = float("nan"), float("inf")
    mask = torch.ones(2, 4, 4, dtype=torch.bool).tril()
    mask[..., 1] = False
    cu, out = ends([256]), torch.empty_like(q)
    tiles = Tiles.of(cu, cu, 256)
    tiled_attention(q, KeyStore.packed(k, v, cu), tiles, Choice.of_mask(mask), out, 0.2)
    assert out[:64].isfinite().all()
    assert out[128:].isfinite().all()
    assert not out[64:128][:, :, 0].isnan().any()


@pytest.mark.parametrize("name", ESTIMATES)
@pytest.mark.parametrize(("queries", "keys"), [(200, 200), (70, 333), (5, 100)])
def test_an_estimate_shares_the_whole_attention_among_blocks_that_can_be_seen(name, queries, keys):
    q, k, _ = drawn(4, 6, 2, 16, 16, [(queries, keys)], torch.float32)
    shares = ESTIMATES[name](q, k, keys - queries, 0.25)
    tiles, blocks = -(-queries // 64), -(-keys // 64)
    assert shares.shape == (6, tiles, blocks)
    torch.testing.assert_close(shares.sum(-1), torch.ones(6, tiles))
    last = (keys - queries + torch.arange(63, tiles * 64, 64)).clamp(max=keys - 1) // 64
    assert not shares[:, torch.arange(blocks) > last[:, None]].any()


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 99),
    st.sampled_from([(1, 1), (3, 1), (6, 2)]),
    st.sampled_from([16, 40, 64]),
    st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(1, n), st.just(n))),
    st.sampled_from([1, 8, 64]),
    st.sampled_from(list(NEAR)),
)
def test_the_compiled_estimate_is_that_of_plain_torch(seed, heads, d, span, step, dtype):
    q, k, v = drawn(seed, *heads, d, d, [span], dtype)
    queries, keys = span
    tiles = Tiles.of(ends([queries]), ends([keys]), queries)
    found = TiledAttention(q, KeyStore.packed(k, v, ends([keys])), tiles, 0.2).shares(step)
    wanted = sampled(q.float(), k.float(), keys - queries, 0.2, step=step)
    blocks = wanted.shape[-1]
    torch.testing.assert_close(found[..., :blocks], wanted, atol=1e-5, rtol=1e-4)
    assert not found[..., blocks:].any()


def test_each_sequence_of_several_has_its_own_estimate():
    lengths = [130, 70]
    q, k, v = drawn(11, 2, 1, 16, 16, [(n, n) for n in lengths], torch.float32)
    cu = ends(lengths)
    store, tiles = KeyStore.packed(k, v, cu), Tiles.of(cu, cu, 200)
    shares = TiledAttention(q, store, tiles, 0.2).shares(8)
    for part, first, blocks in ((slice(0, 130), 0, 3), (slice(130, 200), 3, 2)):
        wanted = sampled(q[part], k[part], 0, 0.2, step=8)
        found = shares[:, first : first + blocks, :blocks]
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("name", ["mass", "antidiagonal", "oracle"])
def test_a_block_that_all_attention_goes_to_is_chosen(name):
    q, k, _ = drawn(5, 2, 1, 32, 32, [(64, 1024)], torch.float32)
    k[320:384] += 3 * q.mean((0, 1))
    q += q.mean((0, 1)) * 20
    chosen = blocks_of(Selection(selector=name, mass=0.5, first=0, recent=1), q, k, 960, 1.0)
    assert chosen[..., 5].all()
    assert chosen.sum() < 12


def test_the_oracle_keeps_what_it_promises_and_never_more_blocks_than_needed():
    q, k, _ = drawn(6, 2, 2, 16, 16, [(128, 512)], torch.float32)
    shares = ESTIMATES["oracle"](q, k, 384, 1.0)
    promise = Selection(selector="oracle", mass=0.8, first=0, recent=0)
    chosen = blocks_of(promise, q, k, 384, 1.0)
    held = (shares * chosen).sum(-1)
    smallest = (shares.masked_fill(~chosen, 2)).min(-1).values
    assert (held >= 0.8 - 1e-5).all()
    assert (held - smallest < 0.8).all()


def test_a_later_token_changes_no_earlier_tile():
    q, k, v = drawn(7, 2, 1, 32, 32, [(256, 256)], torch.float32)
    results = []
    for change in (0.0, 3.0):
        k[192:] += change
        out = torch.empty_like(q)
        store = KeyStore.packed(k, v, ends([256]))
        prefill.sparse_prefill(q, lambda: k, store, 0, out, 0.5, Selection(mass=0.6))
        results.append(out[:192])
    assert torch.equal(*results)


def test_the_latest_and_the_first_blocks_are_always_kept():
    q, k, _ = drawn(8, 2, 1, 16, 16, [(640, 640)], torch.float32)
    chosen = blocks_of(Selection(selector="top", top=3, first=1, recent=2), q, k, 0, 0.25)
    ids = torch.arange(10)
    assert chosen[:, ids, ids].all()
    assert chosen[:, ids[1:], ids[:-1]].all()
    assert chosen[:, :, 0].all()
    assert (chosen.sum(-1) <= 3).all()


def test_short_prompts_and_full_selections_stay_dense():
    selection = Selection()
    assert prefill.plan(4096, 4096, 3, 0.3, selection).path == "compiled"
    assert prefill.plan(4096, 4096, 3, 1.0, Selection(selector="oracle")).path == "dense"
    assert prefill.plan(128, 128, 3, 0.3, selection).path == "dense"
    sentence = prefill.plan(4096, 4096, 3, 0.3, selection).explain()
    assert sentence.startswith("compiled: predicted speed against dense attention: dense 1.00x")


def test_without_compiled_code_plain_torch_does_it_and_the_plan_knows(monkeypatch):
    monkeypatch.setattr(block_sparse, "library", lambda: None)
    monkeypatch.setattr(prefill, "library", lambda: None)
    monkeypatch.setattr(prefill, "is_compiled_for", lambda q: False)
    q, k, v = drawn(9, 2, 1, 16, 16, [(100, 100)], torch.float32)
    out = torch.empty_like(q)
    store = KeyStore.packed(k, v, ends([100]))
    prefill.sparse_prefill(q, lambda: k, store, 0, out, 0.25, Selection(mass=2.0))
    torch.testing.assert_close(out, dense(q, k, v), **NEAR[torch.float32])
    assert prefill.plan(4096, 4096, 3, 0.3, Selection()).path == "dense"


@pytest.mark.parametrize(
    ("built", "what"),
    [(b"", "is for this machine"), (b"no library", "file too short|invalid ELF header")],
)
def test_compiled_code_that_does_not_load_is_told_of(built, what, tmp_path, monkeypatch, caplog):
    if built:
        (tmp_path / f"block_sparse_avx2{EXTENSION_SUFFIXES[0]}").write_bytes(built)
    monkeypatch.setattr(block_sparse, "__file__", str(tmp_path / "block_sparse.py"))
    assert block_sparse.library.__wrapped__() is None
    (line,) = caplog.messages
    assert line.startswith("prefills on a CPU run by plain torch")
    assert re.search(what, line)
