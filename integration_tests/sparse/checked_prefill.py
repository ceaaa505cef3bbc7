"""Runs the GPU's sparse prefill on small caches; fails where it differs.

On a GPU, or without one in Triton's interpreter.
"""

from __future__ import annotations

from itertools import product

import torch

from trimtab.kernels.sparse import paged_prefill as paged
from trimtab.kernels.sparse.block_sparse import TILE, KeyStore
from trimtab.kernels.sparse.launch import interpreted
from trimtab.kernels.sparse.paged_prefill import PagedCache, attend, block_shares, paged_prefill
from trimtab.kernels.sparse.prefill import sparse_prefill
from trimtab.kernels.sparse.selectors import Selection, sampled

DEVICE = "cpu" if interpreted() else "cuda"


def request(dtype, heads, kv_heads, d, queries, keys, page, tokens_first=False):
    """Queries, keys and values, and a cache that has them in pages of its own order.

    What is nobody's in the cache is no number.
    """
    generator = torch.Generator().manual_seed(keys)

    def some(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    q, k, v = some(queries, heads, d), some(keys, kv_heads, d), some(keys, kv_heads, d)
    count = -(-keys // page)
    pages = torch.randperm(count + 3, generator=generator)[:count].int()
    sizes = (
        (count + 3, page, kv_heads, 2 * d) if tokens_first else (count + 3, kv_heads, page, 2 * d)
    )
    storage = torch.full(sizes, float("nan"), dtype=dtype)
    cache = storage.transpose(1, 2) if tokens_first else storage
    at = torch.arange(keys)
    cache[pages[at // page].long(), :, at % page] = torch.cat([k, v], -1)
    k_pages, v_pages = cache.to(DEVICE).split(d, -1)
    return q, k, v, PagedCache(k_pages, v_pages, pages.to(DEVICE))


def dense(q, k, v, position, scale):
    queries, keys = q.shape[0], k.shape[0]
    visible = torch.arange(keys) <= (position + torch.arange(queries))[:, None]
    return torch.nn.functional.scaled_dot_product_attention(
        *(x.float().transpose(0, 1) for x in (q, k, v)), visible, scale=scale, enable_gqa=True
    ).transpose(0, 1)


def covers_everything(dtype, tolerance, *sizes, **layout):
    q, k, v, cache = request(dtype, *sizes, **layout)
    position, scale = k.shape[0] - q.shape[0], q.shape[-1] ** -0.5
    out = torch.full_like(q, float("nan"), device=DEVICE)
    every = Selection("top", top=1000)
    kept = paged_prefill(q.to(DEVICE), cache, position, out, scale, every)
    assert kept == 1
    expected = dense(q, k, v, position, scale)
    torch.testing.assert_close(out.cpu().float(), expected, atol=tolerance, rtol=tolerance)


def is_what_a_cpu_does(selection, *sizes):
    q, k, v, cache = request(torch.float32, *sizes)
    position, scale = k.shape[0] - q.shape[0], q.shape[-1] ** -0.5
    store = KeyStore.packed(k, v, torch.tensor([0, k.shape[0]], dtype=torch.int32))
    expected, out = torch.empty_like(q), torch.empty_like(q, device=DEVICE)
    share = sparse_prefill(q, lambda: k, store, position, expected, scale, selection)
    kept = paged_prefill(q.to(DEVICE), cache, position, out, scale, selection)
    assert abs(float(kept) - share) < 1e-6
    assert share < 1
    torch.testing.assert_close(out.cpu(), expected, atol=1e-5, rtol=1e-5)


def shares_are_the_sampled_ones(step, *sizes):
    q, k, _, cache = request(torch.float32, *sizes)
    position, scale = k.shape[0] - q.shape[0], q.shape[-1] ** -0.5
    shares = block_shares(q.to(DEVICE), cache, position, scale, step).cpu()
    expected = sampled(q, k, position, scale, step=step)
    torch.testing.assert_close(shares, expected, atol=1e-6, rtol=1e-5)


def nothing_leaks_from_blocks_that_are_not_chosen():
    q, k, v, cache = request(torch.float32, 1, 1, 16, 150, 150, 16)
    mask = torch.zeros(1, 3, 3, dtype=torch.bool)
    mask[0, :, 0] = mask[0, 2, 2] = True
    wrong = cache.pages[64 // 16 : 128 // 16].long()
    cache.k[wrong], cache.v[wrong] = float("nan"), float("inf")
    out = torch.full_like(q, float("nan"), device=DEVICE)
    attend(q.to(DEVICE), cache, 0, mask.to(DEVICE), out, 0.25)
    visible = torch.arange(150) <= torch.arange(150)[:, None]
    visible &= mask[0].repeat_interleave(TILE, 0).repeat_interleave(TILE, 1)[:150, :150]
    expected = torch.softmax((q[:, 0] @ k[:, 0].T * 0.25).masked_fill(~visible, -torch.inf), -1)
    torch.testing.assert_close(out[:, 0].cpu(), expected @ v[:, 0], atol=1e-5, rtol=1e-5)


def what_is_odd_reaches_those_that_see_it_and_no_others(by):
    """Infinities, and no numbers; who sees a token another value of it changes."""
    q, _, _, cache = request(torch.float32, 1, 1, 16, 100, 100, 16)
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand(1, 100, 2, generator=generator) < 0.6
    mask = mask.to(DEVICE) if by == "query" else torch.ones(1, 2, 2, dtype=torch.bool).tril()
    place = int(cache.pages[40 // 16]), 0, 40 % 16, 3

    def attended(x, value):
        before, x[place] = x[place].clone(), value
        out = torch.full_like(q, float("nan"), device=DEVICE)
        attend(q.to(DEVICE), cache, 0, mask.to(DEVICE), out, 0.25, by)
        x[place] = before
        return out

    # A GPU's second launch is another program, whose last bits may differ.
    bits = {"atol": 0, "rtol": 0} if interpreted() else {}
    clean = attended(cache.v, cache.v[place].clone())
    sees = (attended(cache.v, 5.0) != clean).any(-1)
    assert sees.any()
    assert not sees[40:].all() or by == "tile"
    for odd in (float("nan"), float("inf"), float("-inf")):
        expected = clean.clone()
        expected[..., 3] = expected[..., 3].masked_fill(sees, odd)
        out = attended(cache.v, odd)
        torch.testing.assert_close(out, expected, equal_nan=True, **bits)
    faulty = attended(cache.k, float("nan"))
    torch.testing.assert_close(faulty[~sees], clean[~sees], **bits)
    assert faulty[sees].isnan().all()


for page, tokens_first in product((16, 48), (False, True)):
    covers_everything(torch.float32, 1e-5, 4, 2, 24, 100, 170, page, tokens_first=tokens_first)
covers_everything(torch.float16, 2e-3, 3, 1, 16, 130, 130, 64)
covers_everything(torch.bfloat16, 2e-2, 2, 2, 16, 70, 90, 32)
covers_everything(torch.float32, 1e-5, 1, 1, 16, 1, 65, 16)
for selector in ("mass", "pooled", "antidiagonal", "top"):
    kept = Selection(selector, mass=0.4, top=2, first=0, recent=1)
    is_what_a_cpu_does(kept, 2, 1, 16, 100, 260, 16)
for selector in ("mass", "pooled", "minmax", "fixed"):
    alone = Selection(selector, mass=0.4, top=2, first=0, recent=1, by="query")
    is_what_a_cpu_does(alone, 2, 1, 16, 75, 200, 16)
paged.ESTIMATE_BYTES = 1  # a tile of queries at a time
is_what_a_cpu_does(Selection("mass", mass=0.4, first=0, recent=1), 2, 1, 16, 150, 260, 16)
shares_are_the_sampled_ones(8, 4, 2, 16, 135, 200, 16)
shares_are_the_sampled_ones(1, 2, 2, 16, 70, 100, 32)
nothing_leaks_from_blocks_that_are_not_chosen()
for who in ("tile", "query"):
    what_is_odd_reaches_those_that_see_it_and_no_others(who)
