"""Counts what the kernels of the selected branch load and store, in Triton's interpreter.

Fails where `trimtab.sparse.traffic` counts otherwise.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import islice

import torch
from triton.runtime.interpreter import InterpreterBuilder

from trimtab.kernels.sparse import launch, launch_tables, selected_plan, tables
from trimtab.kernels.sparse.chosen import Chosen
from trimtab.sparse import traffic

TOKENS, KV_HEADS, GROUP, D, BLOCK, TOP, ROOM = 96, 2, 3, 16, 16, 4, 12_000
moved = 0


def counting(method, mask_at, *, least=1):
    def counted(self, pointers, *others):
        global moved
        mask = others[mask_at].data
        if mask.size >= least:
            moved += int(mask.sum()) * (pointers.get_element_ty().primitive_bitwidth // 8)
        return method(self, pointers, *others)

    return counted


InterpreterBuilder.create_masked_load = counting(InterpreterBuilder.create_masked_load, 0)
# Not counted is whether a program found odd values, 4 bytes, nor that further launches read that.
InterpreterBuilder.create_masked_store = counting(
    InterpreterBuilder.create_masked_store, 1, least=2
)
both = launch.Attempt.both
launch.Attempt.both = lambda grid, how, like: islice(both(grid, how, like), 1)

# Tables are counted by `interpreted_tables`.
launch_tables._on_triton = lambda x: False

whole = launch.fitted


def in_short_chains(kernel, chosen):
    chosen, how = whole(kernel, chosen)
    return chosen, replace(how, tiles=1)


launch.fitted = in_short_chains


def lists(chosen, how, part_bytes, busy=TOKENS):
    found = list(launch.segments(chosen, how, part_bytes, shared=True, busy=busy))
    assert all(of.entries * GROUP >= how.chunk for of in found)
    further = torch.cat([of.further.diff() for of in found])
    return traffic.Lists(
        choices=int((chosen.ids >= 0).sum()),
        launched=sum(of.item_row.numel() for of in found),
        items=sum(int((of.item_row >= 0).sum()) for of in found),
        further=int(further.sum()),
        cut=int((further > 0).sum()),
        rows=further.numel(),
        lots=0,
        segments=len(found),
        slices=len({of.kv.start for of in found}),
    )


def lines():
    """The query and the block of each choice."""
    for kv_head in range(KV_HEADS):
        for token in range(TOKENS):
            for number in ids[kv_head, token].tolist():
                if number >= 0:
                    yield token, range(number * BLOCK, (number + 1) * BLOCK)


generator = torch.Generator().manual_seed(0)
q, k, v, above = (
    torch.randn(TOKENS, heads, D, generator=generator).half()
    for heads in (KV_HEADS * GROUP, KV_HEADS, KV_HEADS, KV_HEADS * GROUP)
)
cu = torch.tensor([0, TOKENS])
queries, blocks = tables.place_queries(cu, cu, TOKENS, BLOCK), tables.cut(cu, TOKENS, BLOCK)
indices = torch.randint(-1, TOKENS // BLOCK, (KV_HEADS, TOKENS, TOP), generator=generator)
indices[..., 0], indices[..., 1] = 0, 1
ids = tables.number_through(indices, queries, blocks)
chosen = Chosen(q, k, v, ids, BLOCK, 0.25, queries, blocks, ROOM)
sizes = traffic.Sizes(TOKENS, KV_HEADS, GROUP, D, D, BLOCK, TOP, 2, ROOM)

NEAR_UNTIL = 64
"""Of 4 blocks, and a tile."""
selected_plan.SelectedPlan.dense_until = lambda *_: NEAR_UNTIL
near = launch.Near.of(chosen)
assert near.how.rows == NEAR_UNTIL
near_sizes = replace(sizes, near_until=NEAR_UNTIL)
far_ids = near.far_ids()
assert moved == traffic.far_bytes(near_sizes), (moved, traffic.far_bytes(near_sizes))


def near_programs(found):
    """Of each segment and tile: its KV head, the queries that it has, and its near blocks."""
    for of in found:
        for begin in range(0, TOKENS, NEAR_UNTIL):
            mine = slice(max(begin, of.part.start), min(begin + NEAR_UNTIL, of.part.stop))
            for kv_head in range(of.kv.start, of.kv.stop):
                if mine.start < mine.stop:
                    its = ids[kv_head, mine]
                    is_near = (its >= 0) & (far_ids[kv_head, mine] < 0)
                    yield mine, its[is_near].unique().tolist()


moved = 0
out, lse = launch.forward_by_blocks(chosen)
distant, how = replace(chosen, ids=far_ids), launch.fitted("forward", chosen)[1]
known = lists(distant, how, sizes.forward_part_bytes, TOKENS - NEAR_UNTIL)
assert known.segments > KV_HEADS
assert known.further > 0
found = list(
    launch.segments(distant, how, sizes.forward_part_bytes, shared=True, busy=TOKENS - NEAR_UNTIL)
)
programs = list(near_programs(found))
seen = sum(min(BLOCK, mine.stop - n * BLOCK) for mine, numbers in programs for n in numbers)
panels = seen * GROUP * (D + D) * 2
launched = sum(
    (of.kv.stop - of.kv.start)
    * (min(2, (of.part.stop - 1) // NEAR_UNTIL + 1) - of.part.start // NEAR_UNTIL)
    for of in found
)
empty = 16 * (launched - len(programs)) * GROUP
expected = (
    traffic.far_bytes(near_sizes)
    + traffic.forward_bytes(near_sizes, known)
    + traffic.near_index_bytes(near_sizes, len(programs) * GROUP)
)
assert moved == expected + panels + empty, (moved, expected, panels, empty)

moved = 0
by_query, _ = launch.forward_by_queries(chosen)
torch.testing.assert_close(by_query, out, atol=2e-3, rtol=2e-3)
own = sum(min(of.stop - 1, t) - of.start + 1 for t, of in lines())
panels = own * (D + D) * 2
assert moved == traffic.by_query_bytes(sizes) + panels, (moved, panels)
every = int((chosen.ids >= 0).sum())
assert panels < traffic.by_query_panel_bytes(sizes, replace(known, choices=every))

moved = 0
chosen = replace(chosen, workspace_bytes=20_000)
sizes = replace(sizes, workspace_bytes=20_000)
launch.selected_backward(above, out, lse, chosen)
how = launch.fitted("backward", chosen)[1]
known = lists(chosen, how, sizes.backward_part_bytes(how.chunk))
assert known.cut > 0
assert moved == traffic.backward_bytes(sizes, known), (moved, traffic.backward_bytes(sizes, known))
