"""The algorithms that libraries have: what a plan is compared with."""

from __future__ import annotations

from collections.abc import Sequence

from trimtab.core.collectives import Layout, NetworkTree, Step
from trimtab.core.collectives.combine import exchange, folded, ring, staged
from trimtab.core.collectives.schedule import merged
from trimtab.gentree.schemes import Built


def baselines(tree: NetworkTree, order: Sequence[int]) -> dict[str, list[Step]]:
    """The steps of each algorithm, by its name.

    Args:
        tree: the network; steps are among its leaves.
        order: the leaf of each rank: all but the last know no network and go by ranks.
    """
    if tree.size < 2:
        return {}
    parties = [Layout.whole(leaf) for leaf in order]
    return {
        "ring": [ring(parties)[0]],
        "co-located PS": [exchange(parties)[0]],
        "halving-doubling": halving_doubling(parties),
        "hierarchical": _hierarchical(tree, 0)[0],
    }


def halving_doubling(parties: Sequence[Layout]) -> list[Step]:
    """Recursive halving and doubling; ranks beyond a power of two fold in first."""
    power = 1 << (len(parties).bit_length() - 1)
    twos = (2,) * (power.bit_length() - 1)
    if power == len(parties):
        return staged(parties, twos)[0]
    extras = range(1, 2 * (len(parties) - power), 2)
    return folded(parties, list(extras), twos or (1,))[0]


def _hierarchical(tree: NetworkTree, point: int) -> Built:
    """Direct exchange below each switch, then among what is left of them (BlueConnect)."""
    children = tree.children[point]
    if not children:
        return [], Layout.whole(tree.leaves.index(point))
    below = [_hierarchical(tree, child) for child in children]
    steps = merged(part for part, _ in below)
    if len(below) == 1:
        return steps, below[0][1]
    step, layout = exchange([party for _, party in below])
    return [*steps, step], layout
