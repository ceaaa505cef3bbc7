"""``trimtab bench sparse``: prefill on the CPU, lists of blocks, quality, a real server's TTFT."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from trimtab.core.benchmark import Case, Options, Progress
from trimtab.kernels.sparse.block_sparse import TILE, Choice, KeyStore, Tiles, tiled_attention
from trimtab.sparse.flex_rival import flex_prefill
from trimtab.sparse.lists_bench import interleaved, list_cases, timed
from trimtab.sparse.quality_bench import quality_cases
from trimtab.sparse.server_bench import server_cases

HEADS, HEAD_SIZE, KEPT_BLOCKS = 8, 64, 8


def run(options: Options, progress: Progress) -> list[Case]:
    """All cases; ``quick`` leaves out long prompts and the server."""
    torch.manual_seed(options.seed)
    lengths = (4096,) if options.quick else (4096, 8192, 16384)
    repeats = 3 if options.quick else 5
    cases: list[Case] = []
    for tokens in lengths:
        for dtype in (torch.float32, torch.bfloat16):
            for group in (4,) if options.quick else (1, 4):
                progress(f"prefill of {tokens} tokens in {dtype}, {group} heads a KV head")
                cases += _prefill_cases(tokens, dtype, group, repeats, flex=not options.quick)
    cases += list_cases(options, progress)
    cases += quality_cases(options, progress)
    if not options.quick:
        cases += server_cases(progress)
    return cases


def _prefill_cases(
    tokens: int, dtype: torch.dtype, group: int, repeats: int, *, flex: bool
) -> Iterator[Case]:
    """Eight blocks for each tile and head, against the better of two calls of dense SDPA.

    And, if asked, against compiled flex_attention at the same choice.
    """
    kv_heads = HEADS // group
    q, k, v = (
        torch.randn(tokens, heads, HEAD_SIZE).to(dtype) for heads in (HEADS, kv_heads, kv_heads)
    )
    ends = torch.tensor([0, tokens], dtype=torch.int32)
    store, tiles = KeyStore.packed(k, v, ends), Tiles.of(ends, ends, tokens)
    mask, density = random_choice(tokens // TILE)
    choice = Choice.of_mask(mask)
    out = torch.empty_like(q)
    queries, keys, values = (x.transpose(0, 1)[None] for x in (q, k, v))
    all_keys, all_values = (x.repeat_interleave(group, 1) for x in (keys, values))
    rivals: Mapping[str, Callable[[], object]] = {
        "grouped": lambda: scaled_dot_product_attention(
            queries, keys, values, is_causal=True, enable_gqa=True
        ),
        "repeated": lambda: scaled_dot_product_attention(
            queries, all_keys, all_values, is_causal=True
        ),
    }

    def ours() -> Tensor:
        return tiled_attention(q, store, tiles, choice, out, HEAD_SIZE**-0.5)

    for work in (*rivals.values(), ours):
        work()
    times = [(min(timed(r) for r in rivals.values()), timed(ours)) for _ in range(repeats)]
    case = f"real/prefill/{tokens}/{str(dtype).removeprefix('torch.')}/group-{group}"
    notes = (
        f"{KEPT_BLOCKS} blocks a tile, {density:.1%} of the causal blocks,"
        f" {torch.get_num_threads()} threads"
    )
    yield Case.compare(
        case, "time", "s", "lower", "best of two dense SDPA calls", times, notes=notes
    )
    if flex:
        rival = flex_prefill(queries.contiguous(), keys.contiguous(), values.contiguous(), mask)
        yield Case.compare(
            *(case, "time", "s", "lower", "compiled flex_attention, the same blocks"),
            interleaved(rival, ours, repeats),
            notes="compiled for this length beforehand, its lists of blocks made too",
        )


def random_choice(blocks: int) -> tuple[Tensor, float]:
    """First, own and random other blocks of each tile; and the share of the causal ones kept.

    Returns:
        A mask ``[heads, tiles, blocks]``, and the share.
    """
    ids = torch.arange(blocks)
    causal = ids[:, None] >= ids
    rank = torch.rand(HEADS, blocks, blocks).masked_fill(ids[:, None] == ids, 2.0)
    rank[..., 0] = 3.0
    best = rank.masked_fill(~causal, -1.0).argsort(-1, descending=True)[..., :KEPT_BLOCKS]
    mask = torch.zeros(HEADS, blocks, blocks, dtype=torch.bool).scatter(-1, best, True) & causal
    return mask, int(mask.sum()) / int(causal.sum() * HEADS)
