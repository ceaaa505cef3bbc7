"""Lists of blocks on a CPU: choosing them, and turning them into lists of queries.

Against what FSA's authors do (arXiv 2508.18224 and its code), written in torch as well as we can.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor
from torch.nn.functional import pad

from trimtab.core.benchmark import Case, Options, Progress
from trimtab.kernels.sparse import SparseShape, naive, select_blocks, tables

SHAPE = SparseShape()
HEADS, HEAD_SIZE = 8, 64
KV_HEADS = 4
"""Of index tables' times; memory is that of one, since the published tables serve one by one."""

_TABLE_BYTES = 10
"""Of the published index tables for each block and token: two of int32, a mask, and to spare."""


def list_cases(options: Options, progress: Progress) -> Iterator[Case]:
    """Of index tables and of the choice; ``quick`` takes short sequences alone."""
    repeats = 3 if options.quick else 5
    for thousands in (16,) if options.quick else (16, 64, 128, 256):
        progress(f"index tables of {thousands}K tokens")
        yield from table_cases(thousands * 1024, repeats if thousands < 128 else 3)
    for thousands in (4,) if options.quick else (4, 16):
        for group in (4,) if options.quick else (1, 4):
            progress(f"choice of blocks for {thousands}K tokens, {group} heads a KV head")
            yield from choice_cases(thousands * 1024, group, repeats)


def some_lists(tokens: int, shape: SparseShape) -> Tensor:
    """Random lists as a choice makes them: ascending, distinct, causal, -1 behind them.

    Returns:
        ``[1, tokens, top]`` int64.
    """
    own = torch.arange(tokens)[:, None] // shape.block
    slots = torch.arange(shape.top)
    room = (own + 2 - shape.top).clamp(min=1)
    spread = (torch.rand(tokens, shape.top) * room).long().sort(-1).values + slots
    return spread.masked_fill(slots > own, -1)[None]


def published_tables(ids: Tensor, blocks: int) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """The index tables of FSA's forward, for each KV head; no statistics of its softmax.

    For each block and token, the token if it chose the block: the lists are what of it is not -1,
    and a second table says where in its list each token stands. All tables are made once, and the
    first is cleared for each head. Of several ways to do each step in torch this is the fastest.

    Args:
        ids: ``[kv_heads, tokens, top]``; -1 is none.
        blocks: how many there are.

    Returns:
        The lists behind one another, their lengths and beginnings, and the second table.
    """
    tokens = ids.shape[1]
    token_of = torch.full((blocks, tokens), -1, dtype=torch.int32)
    place_of = torch.zeros(blocks, tokens, dtype=torch.int32)
    taken = torch.empty(blocks, tokens, dtype=torch.bool)
    every = torch.arange(tokens, dtype=torch.int32)[:, None].expand_as(ids[0])
    found = []
    for number, of_head in enumerate(ids):
        if number:
            token_of.fill_(-1)
        there = of_head >= 0
        block, token = of_head[there], every[there]
        lengths = torch.bincount(block, minlength=blocks)
        token_of.view(-1).index_copy_(0, block * tokens + token, token)
        torch.ge(token_of, 0, out=taken)
        lists = token_of.view(-1)[taken.view(-1).nonzero()[:, 0]]
        begins = pad(lengths.cumsum(0)[:-1], (1, 0))
        its_block = torch.repeat_interleave(lengths)
        place = torch.arange(lists.numel()) - begins[its_block]
        place_of.view(-1).index_copy_(0, its_block * tokens + lists, place.int())
        found.append((lists, lengths, begins, place_of))
    return found


def table_cases(tokens: int, repeats: int) -> Iterator[Case]:
    """Time and peak memory, and what the tables hold with those of the softmax's statistics."""
    blocks, case = tokens // SHAPE.block, f"real/tables/{tokens}"
    entries = blocks * tokens
    baseline = "the published dense index tables, in torch"
    ids = some_lists(tokens, SHAPE).expand(KV_HEADS, -1, -1).contiguous()
    chosen = ids.int()  # as a choice is made; the published calls in torch want 64 bits
    made = tables.block_major(chosen[:1], blocks)
    held = float(made.rows.nbytes + made.query.nbytes + made.place.nbytes)
    yield Case.compare(
        f"model/tables/{tokens}",
        "memory",
        "B",
        "lower",
        "what FSA's forward holds of a KV head: two tables of indices and two of its softmax",
        [(16.0 * entries, held)],
        notes="counted; ours has no statistics before the main pass",
    )
    if _TABLE_BYTES * entries > free_bytes():
        return
    ends = torch.tensor([0, tokens])
    queries = tables.place_queries(ends, ends, tokens, SHAPE.block)
    places = tables.cut(ends, tokens, SHAPE.block)

    def ours() -> object:
        numbered = tables.number_through(chosen, queries, places)
        return tables.block_major(numbered, places.first.numel())

    times = interleaved(lambda: published_tables(ids, blocks), ours, repeats)
    asked = f"{SHAPE.top} blocks a query"
    yield Case.compare(
        *(case, "time", "s", "lower", baseline, times),
        notes=f"{asked}, {KV_HEADS} KV heads; ours checks and orders the lists too",
    )
    yield from _peaks(
        *(case, baseline, lambda: published_tables(ids[:1], blocks)),
        lambda: tables.block_major(chosen[:1], blocks),
        notes=f"{asked}, one KV head; the tables alone",
    )


def materialised(q: Tensor, entries: Tensor, keys: int, shape: SparseShape) -> Tensor:
    """The choice of the last queries of one sequence, by all their scores and ``torch.topk``.

    Args:
        q: ``[queries, heads, d]``; scores are made in float32.
        entries: the compressed keys that they see ``[entries, kv_heads, d]``.
        keys: tokens of the sequence up to the last query.
        shape: sizes.

    Returns:
        Ids ``[kv_heads, queries, top]``, ascending, -1 behind them. Equal scores are told apart as
        ``torch.topk`` does.
    """
    queries, _, d = q.shape
    count, kv_heads, _ = entries.shape
    rows = (q * d**-0.5).view(queries, kv_heads, -1, d).permute(1, 2, 0, 3)
    logits = (rows.flatten(1, 2) @ entries.permute(1, 2, 0)).float()
    p = logits.unflatten(1, (-1, queries))
    at = naive.positions(queries, keys, q.device)[:, None]
    ends = torch.arange(count, device=q.device) * shape.stride + shape.window - 1
    p.masked_fill_(ends > at, float("-inf"))
    p.sub_(p.amax(-1, keepdim=True).clamp_(min=-1e30)).exp_()
    p.div_(p.sum(-1, keepdim=True).clamp_(min=1e-30))
    blocks = -(-keys // shape.block)
    need = blocks * shape.entries_per_block
    padded = pad(p.sum(1), (shape.reach, max(0, need - count)))
    scores = p.new_zeros(kv_heads, queries, blocks)
    for tap, weight in enumerate(shape.weights):
        scores.add_(padded[..., tap :: shape.entries_per_block][..., :blocks], alpha=weight)
    ids, own = torch.arange(blocks, device=q.device), at // shape.block
    scores.masked_fill_((ids < shape.first) | (ids > own - shape.recent), float("inf"))
    best = scores.masked_fill_(ids > own, -1.0).topk(min(shape.top, blocks), sorted=False)
    found = best.indices.masked_fill_(best.values < 0, blocks).sort(-1).values.int()
    found = found.masked_fill_(found == blocks, -1)
    return pad(found, (0, shape.top - found.shape[-1]), value=-1)


def choice_cases(tokens: int, group: int, repeats: int) -> Iterator[Case]:
    """Time and peak memory of the choice in one stream."""
    kv_heads = HEADS // group
    q, keys = torch.randn(tokens, HEADS, HEAD_SIZE), torch.randn(tokens, kv_heads, HEAD_SIZE)
    entries = naive.mean_compress(keys, SHAPE)
    ends, entry_ends = (torch.tensor([0, n], dtype=torch.int32) for n in (tokens, len(entries)))

    def ours() -> Tensor:
        return select_blocks(q, entries, ends, ends, entry_ends, SHAPE)

    def whole() -> Tensor:
        return materialised(q, entries, tokens, SHAPE)

    def in_parts(size: int = 256) -> list[Tensor]:
        return [
            materialised(q[at : at + size], entries[: SHAPE.entries(at + size)], at + size, SHAPE)
            for at in range(0, tokens, size)
        ]

    for rival, baseline in (
        (whole, "all scores and torch.topk"),
        (in_parts, "scores of 256 queries at a time and torch.topk"),
    ):
        case = f"real/choice/{tokens}/group-{group}"
        times = interleaved(rival, ours, repeats)
        yield Case.compare(case, "time", "s", "lower", baseline, times)
        yield from _peaks(
            *(case, baseline, rival, ours),
            lower_bound=kv_heads * tokens * SHAPE.top * 4.0,
            notes="the bound is what is returned",
        )


def _peaks(
    case: str,
    baseline: str,
    rival: Callable[[], object],
    ours: Callable[[], object],
    notes: str,
    lower_bound: float | None = None,
) -> Iterator[Case]:
    """The peak memory of both, where it can be told."""
    theirs, its = peak_bytes(rival), peak_bytes(ours)
    if theirs is not None and its is not None:
        yield Case.compare(
            *(case, "peak_memory", "B", "lower", baseline, [(float(theirs), float(its))]),
            lower_bound=lower_bound,
            notes=notes,
        )


def interleaved(
    rival: Callable[[], object], ours: Callable[[], object], repeats: int
) -> list[tuple[float, float]]:
    """Seconds of both in turn, after one call of each that is not counted."""
    rival()
    ours()
    return [(timed(rival), timed(ours)) for _ in range(repeats)]


def timed(work: Callable[[], object]) -> float:
    """Seconds of one call."""
    started = perf_counter()
    work()
    return perf_counter() - started


def peak_bytes(work: Callable[[], object]) -> int | None:
    """The most memory that one call adds to the process; None where Linux does not tell."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (AttributeError, OSError):
        return None
    before = _status_bytes("VmRSS")
    kept = work()
    peak = _status_bytes("VmHWM") - before
    del kept
    return max(peak, 1)


def _status_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def free_bytes() -> int:
    """Memory that can be had without swapping; 0 where Linux does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0
    return 1024 * next(int(x.split()[1]) for x in lines if x.startswith("MemAvailable:"))
