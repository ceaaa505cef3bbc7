"""Near and far blocks apart; fails where the split shows in a result.

On a GPU, or without one in Triton's interpreter.
Some queries attend to all their blocks by tiles, some only to those near them, some tiles hold
both kinds; sequences are packed, and some queries are not the first of theirs.
"""

from __future__ import annotations

import weakref

import torch

from trimtab.kernels.sparse import launch, naive, selected_attention, selected_plan
from trimtab.kernels.sparse.launch import interpreted

DEVICE = "cpu" if interpreted() else "cuda"
torch.set_default_device(DEVICE)

BLOCK, D, HEADS, KV_HEADS = 16, 16, 2, 1
LENGTHS = ((20, 150), (3, 3), (0, 0), (99, 99))
"""Queries and keys of each sequence."""
SPLITS = (0, 4 * BLOCK, 200)
"""Tokens from which on queries have far blocks: all, some and none of them."""


def ends(counts):
    return torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32)


def some(*shape):
    return torch.randn(*shape, generator=generator)


def naive_by_sequence():
    outs = []
    for number, (queries, _) in enumerate(LENGTHS):
        mine = slice(int(cu_q[number]), int(cu_q[number + 1]))
        its_keys = slice(int(cu_k[number]), int(cu_k[number + 1]))
        if queries:
            its = (q[mine], k[its_keys], v[its_keys], indices[:, mine])
            outs.append(naive.selected(*its, BLOCK, D**-0.5))
    return (torch.cat(x) for x in zip(*outs, strict=True))


generator = torch.Generator(DEVICE).manual_seed(0)
cu_q, cu_k = (ends(counts) for counts in zip(*LENGTHS, strict=True))
q = some(int(cu_q[-1]), HEADS, D)
k, v = (some(int(cu_k[-1]), KV_HEADS, size) for size in (D, 24))
indices = torch.randint(-1, 10, (KV_HEADS, q.shape[0], 4), generator=generator).int()
expected, expected_lse = naive_by_sequence()

whole_segments = launch.segments


def segments(*given, **how):
    """Fails where a segment has more parts than it has room for."""
    for of in whole_segments(*given, **how):
        assert of.table.rows[-1] - of.table.rows[0] <= of.entries
        yield of


launch.segments = segments

for split in SPLITS:
    selected_plan.SelectedPlan.dense_until = lambda *_, split=split: split
    for room in (1 << 24, 20_000):
        out, lse = selected_attention(
            q, k, v, indices, cu_q, cu_k, block=BLOCK, workspace_bytes=room
        )
        torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(lse, expected_lse, atol=1e-4, rtol=1e-4)
        if room == 1 << 24:
            whole = out, lse
        # What shares a tile or a segment with a query does not reach its bits.
        assert torch.equal(out, whole[0])
        assert torch.equal(lse, whole[1])
    tail = slice(int(cu_q[-1]) - 50, int(cu_q[-1]))
    own_keys = slice(int(cu_k[-2]), int(cu_k[-1]))
    part = selected_attention(
        *(q[tail], k[own_keys], v[own_keys], indices[:, tail], ends([50]), ends([99])), block=BLOCK
    )
    assert torch.equal(part[0], whole[0][tail])
    assert torch.equal(part[1], whole[1][tail])


# More blocks than are looked at at once.
selected_plan.SelectedPlan.dense_until = lambda *_: 10_000
last, k_long, v_long = some(5, HEADS, D), some(800, KV_HEADS, D), some(800, KV_HEADS, 24)
many = torch.rand(KV_HEADS, 5, 50, generator=generator).argsort(-1)[..., :40].int()
for x, wanted in zip(
    selected_attention(last, k_long, v_long, many, ends([5]), ends([800]), block=BLOCK),
    naive.selected(last, k_long, v_long, many, BLOCK, D**-0.5),
    strict=True,
):
    torch.testing.assert_close(x, wanted, atol=1e-4, rtol=1e-4)


def most_alive(work):
    """The most bytes that tensors made by ``new_empty`` had at once while ``work`` ran."""
    alive, most, make = {}, 0, torch.Tensor.new_empty

    def noted(self, *sizes, **how):
        nonlocal most
        made = make(self, *sizes, **how)
        alive[id(made)] = made.nbytes
        weakref.finalize(made, alive.pop, id(made))
        most = max(most, sum(alive.values()))
        return made

    torch.Tensor.new_empty = noted
    try:
        kept = work()
    finally:
        torch.Tensor.new_empty = make
    return most, kept


# The parts of one segment make place for the next one's.
selected_plan.SelectedPlan.dense_until = lambda *_: 0
ROOM = 20_000
results = expected.nbytes + expected_lse.nbytes
flags = 4 * HEADS * (q.shape[0] // 32 + len(LENGTHS))
made, _ = most_alive(
    lambda: selected_attention(q, k, v, indices, cu_q, cu_k, block=BLOCK, workspace_bytes=ROOM)
)
assert ROOM / 2 < made - results <= ROOM + flags, made - results
