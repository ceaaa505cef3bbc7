"""Every build of the compiled blocks, whichever instructions it is for, gives the same answers."""

from __future__ import annotations

import ctypes
import platform
from importlib.machinery import EXTENSION_SUFFIXES
from itertools import product
from pathlib import Path

import pytest
import torch

from trimtab.kernels.sparse import block_sparse
from trimtab.kernels.sparse.block_sparse import (
    Choice,
    KeyStore,
    TiledAttention,
    Tiles,
    tiled_attention_in_torch,
)
from trimtab.kernels.sparse.selectors import sampled

pytestmark = pytest.mark.integration

X86 = platform.machine() in ("x86_64", "AMD64")
BUILDS = ("avx512bf16", "avx512", "avx2", "portable") if X86 else ("portable",)
NEAR = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


@pytest.fixture(params=BUILDS)
def build(request, monkeypatch):
    """The compiled code of one build, in place of the best one for this machine."""
    folder = Path(block_sparse.__file__).parent
    paths = [folder / f"block_sparse_{request.param}{suffix}" for suffix in EXTENSION_SUFFIXES]
    built = [path for path in paths if path.exists()]
    assert built, f"{request.param} was not built; pip install -e kernels builds all"
    code = ctypes.CDLL(str(built[0]))
    if not code.trimtab_supported():
        pytest.skip(f"this machine has no {request.param}")
    monkeypatch.setattr(block_sparse, "library", lambda: code)
    return request.param


def ends(*lengths):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


def drawn(heads, kv_heads, d, d_v, queries, keys, dtype):
    generator = torch.Generator().manual_seed(d)
    shapes = (queries, heads, d), (keys, kv_heads, d), (keys, kv_heads, d_v)
    return [torch.randn(s, generator=generator).to(dtype) for s in shapes]


def laid(q, k, v, *lengths):
    """Keys and values, and tiles; of one sequence if no lengths are given."""
    cu_q, cu_k = (ends(*lengths), ends(*lengths)) if lengths else (ends(len(q)), ends(len(k)))
    return KeyStore.packed(k, v, cu_k), Tiles.of(cu_q, cu_k, len(q))


def some_choice(heads, tiles):
    ids = torch.arange(int(tiles.last_block.max()) + 1)
    generator = torch.Generator().manual_seed(heads)
    mask = torch.rand(heads, tiles.query.numel(), len(ids), generator=generator) < 0.6
    return Choice.of_mask(mask & (ids <= tiles.last_block[:, None]))


@pytest.mark.parametrize("dtype", NEAR)
@pytest.mark.parametrize(
    "sizes",
    [
        (1, 1, 64, 64, 70, 150),
        (3, 1, 80, 80, 64, 100),
        (5, 1, 96, 128, 1, 129),
        (14, 2, 192, 128, 65, 65),
        (2, 2, 256, 256, 30, 90),
        (2, 1, 7, 3, 64, 64),
    ],
)
def test_each_build_attends_and_estimates_as_plain_torch(build, sizes, dtype):
    q, k, v = drawn(*sizes, dtype)
    store, tiles = laid(q, k, v)
    choice = some_choice(sizes[0], tiles)
    compiled = TiledAttention(q, store, tiles, 0.1)
    shares = compiled.shares(8)
    wanted = sampled(q.float(), k.float(), len(k) - len(q), 0.1, step=8)
    torch.testing.assert_close(shares[..., : wanted.shape[-1]], wanted, atol=1e-5, rtol=1e-4)
    out, expected = (q.new_full((*q.shape[:2], sizes[3]), float("nan")) for _ in range(2))
    compiled.attend(choice, out)
    tiled_attention_in_torch(q, store, tiles, choice, expected, 0.1)
    torch.testing.assert_close(out, expected, atol=NEAR[dtype], rtol=NEAR[dtype])
    again = torch.empty_like(out)
    TiledAttention(q, store, tiles, 0.1).attend(choice, again)
    assert torch.equal(out, again)


def test_each_build_keeps_out_what_nobody_chose(build):
    q, k, v = drawn(2, 1, 32, 32, 192, 192, torch.float32)
    mask = torch.zeros(2, 3, 3, dtype=torch.bool)
    mask[:, 1, 0] = mask[:, 2, 2] = True  # the first tile has nothing, nobody block 1
    choice, outs = Choice.of_mask(mask), []
    for fault in (0.0, float("nan")):
        k[64:128] += fault
        v[64:128] += fault
        store, tiles = laid(q, k, v)
        outs.append(TiledAttention(q, store, tiles, 0.2).attend(choice, torch.empty_like(q)))
    assert torch.equal(*outs)
    assert not outs[0][:64].any()
    assert outs[0][64:].isfinite().all()


ODD = [
    {40: float("nan")},
    {40: float("inf")},
    {40: float("-inf"), 100: float("nan")},
    {40: float("inf"), 41: float("-inf")},
]


@pytest.mark.parametrize("dtype", NEAR)
@pytest.mark.parametrize("by", ["tile", "query"])
def test_what_is_infinite_or_no_number_reaches_those_that_see_it_and_no_others(build, by, dtype):
    """Queries before it, and those that did not choose its block as others of their tile did."""
    q, *kv = drawn(2, 1, 20, 24, 150, 150, dtype)
    at = torch.arange(150)
    if by == "query":
        generator = torch.Generator().manual_seed(1)
        mask = torch.rand(2, 150, 3, generator=generator) < 0.6
        choice, shown = Choice.of_queries(mask, 0), mask
    else:
        mask = torch.tensor([[1, 0, 0], [1, 1, 0], [0, 1, 1]]).bool().expand(2, 3, 3)
        choice, shown = Choice.of_mask(mask), mask.repeat_interleave(64, 1)[:, :150]
    shown = shown.repeat_interleave(64, 2)[..., :150] & (at <= at[:, None])

    def attend(way, keys, values):
        store, tiles = laid(q, keys, values)
        out = torch.empty(150, 2, 24, dtype=dtype)
        if way is None:
            return TiledAttention(q, store, tiles, 0.2).attend(choice, out)
        return way(q, store, tiles, choice, out, 0.2)

    clean = attend(None, *kv)
    assert clean.isfinite().all()
    for odd, which in product(ODD, (0, 1)):
        faulty = [x.clone() for x in kv]
        for token, value in odd.items():
            faulty[which][token, 0, 7] = value
        out = attend(None, *faulty)
        sees = shown[..., list(odd)].any(-1).T
        assert torch.equal(out[~sees], clean[~sees])
        expected = attend(tiled_attention_in_torch, *faulty)
        torch.testing.assert_close(
            out, expected, atol=NEAR[dtype], rtol=NEAR[dtype], equal_nan=True
        )
        assert not (
            out[sees].isfinite().all(-1) if which == 0 else out[sees][:, 7].isfinite()
        ).all()


def test_each_build_takes_logits_of_ten_thousand_in_half_precision(build):
    q, k, v = drawn(2, 1, 16, 16, 100, 100, torch.float16)
    q, k = q * 60, k * 60
    store, tiles = laid(q, k, v)
    every = torch.ones(2, 2, 2, dtype=torch.bool).tril()
    out = TiledAttention(q, store, tiles, 0.25).attend(Choice.of_mask(every), torch.empty_like(q))
    logits = torch.einsum("qhd,kd->hqk", q.double(), k[:, 0].double()) * 0.25
    assert logits.abs().max() > 10_000
    hidden = torch.ones(100, 100, dtype=torch.bool).triu(1)
    exact = logits.masked_fill(hidden, -torch.inf).softmax(-1) @ v[:, 0].double()
    torch.testing.assert_close(out.double(), exact.transpose(0, 1), atol=2e-3, rtol=0)


def test_each_build_lets_a_crowd_read_one_block_and_sequences_be_empty(build):
    q, k, v = drawn(2, 2, 16, 16, 200, 200, torch.float32)
    store, tiles = laid(q, k, v, 0, 130, 0, 70)
    mask = torch.zeros(2, tiles.query.numel(), 3, dtype=torch.bool)
    mask[..., 0] = True
    choice, out = Choice.of_mask(mask), torch.empty_like(q)
    TiledAttention(q, store, tiles, 0.2).attend(choice, out)
    expected = torch.empty_like(q)
    tiled_attention_in_torch(q, store, tiles, choice, expected, 0.2)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    none = q[:0]
    store, tiles = laid(none, k[:0], v[:0])
    nothing = Choice.of_mask(torch.zeros(2, 0, 0, dtype=torch.bool))
    assert TiledAttention(none, store, tiles, 0.2).attend(nothing, none.clone()).shape == (0, 2, 16)
