"""Prefill on the CPU: the compiled blocks, the selectors, and when they pay."""

from __future__ import annotations

import re
from functools import partial
from importlib.machinery import EXTENSION_SUFFIXES
from itertools import pairwise, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from trimtab.kernels.sparse import block_sparse, compiled, prefill
from trimtab.kernels.sparse.block_sparse import (
    Choice,
    KeyStore,
    TiledAttention,
    Tiles,
    tiled_attention,
    tiled_attention_in_torch,
)
from trimtab.kernels.sparse.paged_prefill import PagedCache, paged_prefill
from trimtab.kernels.sparse.selectors import COUNTED, ESTIMATES, Selection, sampled

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
    everything = Selection(mass=1)
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
    prefill.sparse_prefill(q, lambda: k, store, 200, out, 32**-0.5, Selection(mass=1))
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
    prefill.sparse_prefill(apart, lambda: k, store, 0, out, 0.2, Selection(mass=1))
    expected = torch.empty_like(q)
    prefill.sparse_prefill(q, lambda: k, store, 0, expected, 0.2, Selection(mass=1))
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
    last = (keys - queries) // 64 + torch.arange(tiles)
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


@pytest.mark.parametrize("name", COUNTED)
def test_blocks_to_come_take_no_place_of_those_that_can_be_seen(name):
    q, k, _ = drawn(10, 2, 1, 16, 16, [(640, 640)], torch.float32)
    chosen = blocks_of(Selection(selector=name, top=4), q, k, 0, 0.25)
    assert torch.equal(chosen.sum(-1), torch.arange(1, 11).clamp(max=4).expand(2, -1))


@settings(max_examples=80, deadline=None)
@given(
    st.integers(0, 99),
    st.integers(1, 150),
    st.integers(1, 60),
    st.sampled_from(["mass", "top"]),
    st.floats(0.01, 1),
    st.integers(1, 20),
    st.integers(0, 3),
    st.integers(1, 4),
)
def test_the_compiled_choice_is_that_of_plain_torch(
    seed, blocks, rows, selector, mass, top, first, recent
):
    """Among them equal shares, of which the lower block goes first, and shares of nothing."""
    generator = torch.Generator().manual_seed(seed)
    own = torch.randint(blocks, (rows,), generator=generator)
    shares = torch.randint(0, 5, (3, rows, blocks), generator=generator) / 16
    shares += torch.rand(shares.shape, generator=generator) * (seed % 2)
    shares = shares.masked_fill(torch.arange(blocks) > own[:, None], 0.0)
    shares /= shares.sum(-1, keepdim=True).clamp(min=1e-30)
    selection = Selection(selector, mass, max(top, first + recent), first, recent)
    amount = {"top": selection.top if selector == "top" else 0, "mass": selection.share}
    found = block_sparse.kept_blocks(shares, own, first=first, recent=recent, **amount)
    assert torch.equal(found, selection.keep_in_torch(shares, own))


def test_shares_that_are_no_numbers_end_the_choice():
    shares, own = torch.full((1, 2, 40), float("nan")), torch.tensor([39, 39])
    found = block_sparse.kept_blocks(shares, own, first=1, recent=2, top=0, mass=0.9)
    assert found[..., [0, 38, 39]].all()


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
    assert prefill.plan(4096, 4096, 3, selection).path == "compiled"
    assert prefill.plan(1024, 1024, 3, Selection("oracle")).path == "dense"
    assert prefill.plan(4096, 4096, 3, Selection("fixed", stride=1)).density == 1
    assert prefill.plan(128, 128, 3, selection).path == "dense"
    alone = prefill.plan(4096, 4096, 3, Selection(mass=0.9, by="query"))
    together = prefill.plan(4096, 4096, 3, Selection(mass=0.9))
    assert alone.path == "compiled"
    assert alone.work["compiled"] > 1.5 * together.work["compiled"]
    assert prefill.plan(2048, 2048, 3, Selection(mass=0.99, by="query")).path == "dense"
    sentence = prefill.plan(4096, 4096, 3, selection).explain()
    assert sentence.startswith("compiled: predicted speed against dense attention: dense 1.00x")
    assert "; mass 0.97, 40% of the blocks" in sentence


counted = st.builds(
    lambda selector, others, first, recent, stride: Selection(
        selector,
        top=first + recent + others,
        first=first,
        recent=recent,
        stride=stride * (selector == "fixed"),
    ),
    st.sampled_from(["top", "minmax", "fixed"]),
    st.integers(0, 20),
    first=st.integers(0, 4),
    recent=st.integers(1, 6),
    stride=st.integers(0, 5),
)


@settings(max_examples=60, deadline=None)
@given(counted, st.integers(1, 1000), st.integers(0, 500))
def test_a_plan_of_a_number_of_blocks_knows_how_many_are_kept(selection, queries, position):
    keys = position + queries
    shares = ESTIMATES["fixed"](torch.empty(queries, 1, 2), torch.empty(keys, 1, 2), position, 1)
    mask = selection.keep(shares, position, queries)
    own = position // 64 + torch.arange(mask.shape[1])
    found = torch.tensor([prefill.expected_blocks(int(n) + 1, selection) for n in own])
    assert torch.equal(mask[0].sum(-1), found)
    rows = torch.minimum((own + 1) * 64, torch.tensor(keys)) - (own * 64).clamp(min=position)
    density = float((rows * found).sum() / (rows * (own + 1)).sum())
    planned = prefill.plan(queries, keys, 2, selection)
    assert planned.density == pytest.approx(density)
    assert f"{selection.describe()}, {density:.0%} of the blocks" in planned.explain()


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["mass", "pooled", "antidiagonal", "oracle"]),
    st.floats(0.5, 1),
    st.integers(64, 50_000),
    st.integers(0, 50_000),
)
def test_a_plan_keeps_more_of_more_mass_and_a_smaller_share_of_longer_prompts(
    selector, mass, queries, position
):
    def density(mass, queries, position):
        return prefill.plan(queries, position + queries, 3, Selection(selector, mass)).density

    share = density(mass, queries, position)
    assert 0 < share <= 1
    assert share <= density(min(1.0, mass + 0.1), queries, position) + 1e-9
    assert share >= density(mass, queries, position + 4096) - 1e-9


def test_without_compiled_code_plain_torch_does_it_and_the_plan_knows(monkeypatch):
    monkeypatch.setattr(block_sparse, "library", lambda: None)
    monkeypatch.setattr(prefill, "library", lambda: None)
    monkeypatch.setattr(prefill, "is_compiled_for", lambda q: False)
    q, k, v = drawn(9, 2, 1, 16, 16, [(100, 100)], torch.float32)
    out = torch.empty_like(q)
    store = KeyStore.packed(k, v, ends([100]))
    prefill.sparse_prefill(q, lambda: k, store, 0, out, 0.25, Selection(mass=1))
    torch.testing.assert_close(out, dense(q, k, v), **NEAR[torch.float32])
    assert prefill.plan(4096, 4096, 3, Selection()).path == "dense"


@pytest.mark.parametrize(
    ("built", "what"),
    [(b"", "is for this machine"), (b"no library", "file too short|invalid ELF header")],
)
def test_compiled_code_that_does_not_load_is_told_of(built, what, tmp_path, monkeypatch, caplog):
    if built:
        (tmp_path / f"block_sparse_avx2{EXTENSION_SUFFIXES[0]}").write_bytes(built)
    found = partial(compiled.library, folder=tmp_path)
    monkeypatch.setattr(compiled, "library", found)
    assert block_sparse.library() is None
    (line,) = caplog.messages
    assert line.startswith("prefills on a CPU run by plain torch")
    assert re.search(what, line)


def filled_in(selection, q, k, v, position, parts):
    """The prefill in parts, one after the other, and what each kept."""
    out, shares = torch.empty_like(q), []
    for part in parts:
        keys = position + part.stop
        store = KeyStore.packed(k[:keys], v[:keys], ends([keys]))
        known = k[:keys]
        at = position + part.start
        shares.append(
            prefill.sparse_prefill(
                q[part], lambda known=known: known, store, at, out[part], 0.5, selection
            )
        )
    return out, shares


def cut_at(queries, cuts):
    edges = sorted({0, queries, *(cut for cut in cuts if cut < queries)})
    return [slice(a, b) for a, b in pairwise(edges)]


SOME = {"mass": 0.6, "top": 3, "first": 0, "recent": 1}


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 99),
    st.integers(1, 400),
    st.integers(0, 200),
    st.sampled_from(["mass", "oracle", "pooled", "top", "minmax", "fixed"]),
    st.lists(st.integers(1, 399), max_size=3),
)
def test_where_queries_choose_any_cut_of_a_prompt_gives_one_answer(
    seed, queries, position, selector, cuts
):
    """The compiled estimate to the bit; torch's products of other sizes differ in the last one."""
    keys = position + queries
    q, k, v = drawn(seed, 4, 2, 16, 16, [(queries, keys)], torch.float32)
    selection = Selection(selector, by="query", stride=3 * (selector == "fixed"), **SOME)
    whole, _ = filled_in(selection, q, k, v, position, [slice(0, queries)])
    cut, _ = filled_in(selection, q, k, v, position, cut_at(queries, cuts))
    if selection.sample_step or selector == "fixed":
        assert torch.equal(cut, whole)
    else:
        off = (cut - whole).abs().amax(-1) > 1e-5
        assert off.float().mean() < 0.01


@settings(max_examples=20, deadline=None)
@given(
    st.integers(0, 99),
    st.integers(65, 400),
    st.integers(0, 200),
    st.sampled_from(["mass", "pooled", "antidiagonal", "minmax", "top"]),
    st.integers(1, 6),
)
def test_where_tiles_choose_a_cut_at_a_multiple_of_64_gives_one_answer(
    seed, queries, position, selector, cut
):
    keys = position + queries
    q, k, v = drawn(seed, 4, 2, 16, 16, [(queries, keys)], torch.float32)
    selection = Selection(selector=selector, **SOME)
    whole, _ = filled_in(selection, q, k, v, position, [slice(0, queries)])
    at = cut * 64 - position % 64
    parts, _ = filled_in(selection, q, k, v, position, cut_at(queries, [at]))
    if selector == "mass":
        assert torch.equal(parts, whole)
    else:
        off = (parts - whole).abs().amax(-1) > 1e-5
        assert off.float().mean() < 0.01


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 99),
    st.integers(1, 300),
    st.integers(0, 150),
    st.sampled_from(["mass", "oracle", "pooled", "top", "minmax", "fixed"]),
    st.sampled_from(list(NEAR)),
    st.data(),
)
def test_where_queries_choose_no_later_token_changes_an_earlier_one(
    seed, queries, position, selector, dtype, data
):
    keys = position + queries
    q, k, v = drawn(seed, 4, 2, 16, 16, [(queries, keys)], dtype)
    selection = Selection(selector, by="query", stride=2 * (selector == "fixed"), **SOME)
    token = data.draw(st.integers(0, queries - 1))
    outs, chosen = [], []
    for change in (0.0, 5.0):
        q[token:] += change
        k[position + token :] -= change
        v[position + token :] += change
        outs.append(filled_in(selection, q, k, v, position, [slice(0, queries)])[0][:token])
        shares = selection.estimate(q, k, position, 0.5)
        chosen.append(selection.keep(shares, position, queries)[:, :token])
    assert torch.equal(*outs)
    assert torch.equal(*chosen)


@pytest.mark.parametrize("selector", ["mass", "pooled", "antidiagonal", "top", "minmax", "fixed"])
def test_where_tiles_choose_no_token_changes_what_lies_before_its_block(selector):
    """So a page of whole blocks depends on nothing behind it, wherever chunks began."""
    q, k, v = drawn(7, 2, 1, 32, 32, [(256, 301)], torch.float32)
    selection = Selection(selector=selector, mass=0.6, top=2, first=0, recent=1)
    results = []
    for change in (0.0, 3.0):
        q[192 - 45 :] -= change
        k[192:] += change
        v[192:] += change
        results.append(filled_in(selection, q, k, v, 45, [slice(0, 256)])[0][: 192 - 45])
    assert torch.equal(*results)


def one_by_one(q, k, v, mask, position, scale):
    """Attention of each query to its own blocks: the slow twin."""
    at = position + torch.arange(q.shape[0])
    shown = mask.repeat_interleave(64, -1)[..., : k.shape[0]]
    shown = shown & (torch.arange(k.shape[0]) <= at[:, None])
    group = q.shape[1] // k.shape[1]
    logits = torch.einsum("qhd,khd->hqk", q.float(), k.float().repeat_interleave(group, 1)) * scale
    p = logits.masked_fill(~shown, float("-inf")).softmax(-1).nan_to_num(0.0)
    return torch.einsum("hqk,khd->qhd", p, v.float().repeat_interleave(group, 1)).to(q.dtype)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 99),
    st.integers(1, 200),
    st.integers(0, 200),
    st.sampled_from([(16, 16), (40, 72)]),
    st.sampled_from(list(NEAR)),
)
def test_each_query_attends_to_its_own_blocks(seed, queries, position, sizes, dtype):
    keys = position + queries
    q, k, v = drawn(seed, 4, 2, *sizes, [(queries, keys)], dtype)
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(4, queries, -(-keys // 64), generator=generator) < 0.4
    cu_q, cu_k = ends([queries]), ends([keys])
    store, tiles = KeyStore.packed(k, v, cu_k), Tiles.of(cu_q, cu_k, queries)
    choice = Choice.of_queries(mask, position)
    expected = one_by_one(q, k, v, mask, position, 0.2)
    for attend in (tiled_attention, tiled_attention_in_torch):
        out = q.new_full((queries, 4, sizes[1]), float("nan"))
        attend(q, store, tiles, choice, out, 0.2)
        torch.testing.assert_close(out, expected, **NEAR[dtype])


def test_what_lies_in_a_block_that_only_another_query_chose_does_not_leak():
    q, k, v = drawn(3, 2, 1, 32, 32, [(192, 192)], torch.float32)
    mask = torch.ones(2, 192, 3, dtype=torch.bool).tril()
    mask[:, 1::2, 0] = False
    cu = ends([192])
    choice, tiles = Choice.of_queries(mask, 0), Tiles.of(cu, cu, 192)
    before, after = torch.empty_like(q), torch.empty_like(q)
    for attend in (tiled_attention, tiled_attention_in_torch):
        for out, fault in ((before, 0.0), (after, float("nan"))):
            keys, values = k.clone(), v.clone()
            keys[:64] += fault
            values[:64] += fault
            attend(q, KeyStore.packed(keys, values, cu), tiles, choice, out, 0.2)
        assert torch.equal(before[1::2], after[1::2])
        assert after[2::2].isnan().all()


@pytest.mark.parametrize("by", ["tile", "query"])
@pytest.mark.parametrize("selector", ["mass", "pooled", "minmax"])
def test_a_prefill_in_segments_is_that_of_one(selector, by, monkeypatch):
    q, k, v = drawn(14, 4, 2, 16, 16, [(300, 333)], torch.float32)
    selection = Selection(selector=selector, by=by, **SOME)
    whole, (share,) = filled_in(selection, q, k, v, 33, [slice(0, 300)])
    monkeypatch.setattr(prefill, "ESTIMATE_BYTES", 1)
    cut, (cut_share,) = filled_in(selection, q, k, v, 33, [slice(0, 300)])
    torch.testing.assert_close(cut, whole, atol=1e-5, rtol=1e-5)
    assert abs(share - cut_share) < 1e-3


def bounds_one_by_one(q, k, position, scale):
    """The slow twin of `minmax` where queries choose: pools of 16 that are whole before a query."""
    shares = torch.zeros(q.shape[1], q.shape[0], -(-k.shape[0] // 64))
    group = q.shape[1] // k.shape[1]
    for h, t in product(range(q.shape[1]), range(q.shape[0])):
        weights = {}
        for pool in range((position + t + 1) // 16):
            keys = k[pool * 16 : pool * 16 + 16, h // group]
            best = torch.maximum(q[t, h] * keys.amin(0), q[t, h] * keys.amax(0)).sum()
            assert best >= (keys @ q[t, h]).max() - 1e-4
            weights[pool] = (best * scale).exp()
        for pool, weight in weights.items():
            shares[h, t, pool // 4] += weight / sum(weights.values())
    return shares


def test_minmax_is_the_bound_of_each_page():
    q, k, _ = drawn(15, 4, 2, 8, 8, [(20, 150)], torch.float32)
    found = ESTIMATES["minmax"](q, k, 130, 0.3, "query")
    torch.testing.assert_close(found, bounds_one_by_one(q, k, 130, 0.3), atol=1e-5, rtol=1e-4)


def test_fixed_keeps_the_first_the_latest_and_every_so_many_blocks():
    q, k, _ = drawn(16, 2, 1, 16, 16, [(640, 640)], torch.float32)
    selection = Selection(selector="fixed", first=1, recent=2, stride=4)
    chosen = blocks_of(selection, q, k, 0, 0.25)
    ids = torch.arange(10)
    expected = (ids < 1) | (ids % 4 == 0) | (ids > ids[:, None] - 2)
    assert torch.equal(chosen, (expected & (ids <= ids[:, None])).expand(2, -1, -1))


def test_selections_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="antidiagonals go through 16 queries"):
        Selection(selector="antidiagonal", by="query")
    with pytest.raises(ValueError, match="'best' is none of"):
        Selection(selector="best")
    with pytest.raises(ValueError, match="'all' is none of"):
        Selection(by="all")


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"k_base": torch.tensor([0, 10_000])}, "blocks of k lie at 0 to .*; it has 3200 numbers"),
        ({"v_base": torch.tensor([-1, 0])}, "blocks of v lie at -1"),
        ({"v_token_at": torch.arange(64) * 4000}, "blocks of v lie at"),
        ({"k_dim_at": torch.arange(16) - 3}, "blocks of k lie at -3"),
        ({"k_head": 10**6}, "blocks of k lie at 0"),
        ({"block_length": torch.tensor([65, 1], dtype=torch.int32)}, "1 to 65 tokens"),
        ({"block_length": torch.tensor([64, -1], dtype=torch.int32)}, "-1 to 64 tokens"),
        ({"block_token": torch.tensor([0, 40], dtype=torch.int32)}, "end at place 76 of 64"),
        ({"block_token": torch.tensor([0, -2], dtype=torch.int32)}, "end at place"),
        ({"before": torch.tensor([0, 3])}, "rise from 0 to the 2 blocks"),
        ({"k_base": torch.tensor([0])}, r"v_base is \(2,\); it must be \(1,\)"),
        ({"v_token_at": torch.arange(60)}, "64 places of keys and 60 of values"),
    ],
)
def test_keys_and_values_outside_of_their_tensors_are_refused(change, what):
    _, k, v = drawn(12, 2, 2, 16, 16, [(100, 100)], torch.float32)
    at = torch.arange(64)
    given = {
        "k": k,
        "v": v,
        "k_head": 16,
        "v_head": 16,
        "kv_heads": 2,
        "k_base": torch.tensor([0, 2048]),
        "v_base": torch.tensor([0, 2048]),
        "k_token_at": at * 32,
        "v_token_at": at * 32,
        "k_dim_at": torch.arange(16),
        "v_dim_at": torch.arange(16),
        "block_token": torch.tensor([0, 0], dtype=torch.int32),
        "block_length": torch.tensor([64, 36], dtype=torch.int32),
        "before": torch.tensor([0, 2]),
    }
    KeyStore(**given)
    with pytest.raises(ValueError, match=what):
        KeyStore(**(given | change))


@pytest.mark.parametrize("position", [-1, -64, 1, 64])
def test_a_position_that_does_not_fit_the_keys_is_refused(position):
    q, k, v = drawn(12, 2, 1, 16, 16, [(100, 100)], torch.float32)
    store, out = KeyStore.packed(k, v, ends([100])), torch.empty_like(q)
    with pytest.raises(ValueError, match="the position must be 0, and at least 0"):
        prefill.sparse_prefill(q, lambda: k, store, position, out, 0.2, Selection())
    q, _, _ = drawn(12, 2, 1, 16, 16, [(120, 120)], torch.float32)
    with pytest.raises(ValueError, match="the position must be -20, and at least 0"):
        prefill.sparse_prefill(q, lambda: k, store, -20, out, 0.2, Selection())


@pytest.mark.parametrize(
    ("blocks", "rows", "queries", "what"),
    [
        ([0, 2], [0, 1, 2, 2, 2], None, "blocks 0 to 2 are chosen; a sequence has blocks 0 to 1"),
        ([0, -1], [0, 1, 2, 2, 2], None, "blocks -1 to 0 are chosen"),
        ([0, 1], [0, 1, 2], None, "for 2 heads of 2 tiles"),
        ([0, 1], [0, 2, 1, 2, 2], None, "must rise from 0 to 2"),
        ([0, 1], [0, 1, 2, 2, 3], None, "must rise from 0 to 2"),
        ([0, 1], [0, 1, 2, 2, 2], [1], "1 sets of queries are of 2 blocks"),
    ],
)
def test_lists_that_name_no_block_are_refused(blocks, rows, queries, what):
    q, k, v = drawn(12, 2, 1, 16, 16, [(100, 100)], torch.float32)
    cu = ends([100])
    bits = None if queries is None else torch.tensor(queries)
    choice = Choice(torch.tensor(rows), torch.tensor(blocks, dtype=torch.int32), bits)
    given = (q, KeyStore.packed(k, v, cu), Tiles.of(cu, cu, 100), choice, torch.empty_like(q), 0.2)
    for attend in (tiled_attention, tiled_attention_in_torch):
        with pytest.raises(ValueError, match=what):
            attend(*given)


def test_tiles_that_do_not_fit_the_keys_are_refused():
    q, k, v = drawn(12, 2, 1, 16, 16, [(100, 100)], torch.float32)
    store = KeyStore.packed(k, v, ends([100]))
    with pytest.raises(ValueError, match="sequence 0 has more queries than keys"):
        Tiles.of(ends([100]), ends([99]), 100)
    with pytest.raises(ValueError, match="it must end at 100"):
        Tiles.of(ends([99]), ends([100]), 100)
    for tiles, what in (
        (Tiles.of(ends([100]), ends([180]), 100), "to block 2; there are 2 blocks"),
        (Tiles.of(ends([120]), ends([120]), 120), "tiles end at query 120; there are 100"),
        (Tiles.of(ends([50, 50]), ends([50, 50]), 100), "tiles are of 2 sequences"),
    ):
        with pytest.raises(ValueError, match=what):
            TiledAttention(q, store, tiles, 0.2)


def test_a_request_without_enough_pages_is_refused():
    q = torch.zeros(20, 2, 16)
    pages = torch.zeros(3, 1, 16, 32)
    cache = PagedCache(*pages.split(16, -1), torch.tensor([1, 2]))
    for position in (-1, 13):
        with pytest.raises(ValueError, match="do not fit the 32 places"):
            paged_prefill(q, cache, position, torch.empty_like(q), 0.2, Selection())
