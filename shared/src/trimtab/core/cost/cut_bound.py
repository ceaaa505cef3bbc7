"""What no AllReduce on a tree can beat, from counting the messages that must cross its links."""

from __future__ import annotations

from trimtab.core.collectives.network_tree import NetworkTree


def cut_bound_s_per_byte(tree: NetworkTree) -> float:
    """The least time of an AllReduce for each byte of the payload on each rank.

    Where K parts of the network below different links hold all data together, each element has to
    cross into a part at least K - 1 times to be summed and K - 1 times to be known to all. So in a
    time T the links into the parts, which carry T / β each, carry at least 2·(K - 1) payloads, for
    every choice of parts. The best choice is found from the leaves up, the best T by bisection. No
    switch is taken to add up or to copy messages.
    """
    if tree.size < 2:
        return 0.0
    high = 2.0 * tree.size * max(tree.down_s_per_byte.max(), tree.up_s_per_byte.max())
    low = 0.0
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        if _is_contradiction(tree, middle):
            low = middle
        else:
            high = middle
    return low


def _is_contradiction(tree: NetworkTree, time_s: float) -> bool:
    """Whether some choice of parts shows that this time is too short for a payload of one byte."""
    owed = [0.0] * len(tree.names)
    for point in range(len(tree.names) - 1, 0, -1):
        first, last = tree.spans[point]
        beta = max(float(tree.up_s_per_byte[point]), float(tree.down_s_per_byte[point]))
        if 0 < last - first < tree.size and beta > 0:
            if time_s < beta:  # either side has to send and receive the whole payload once
                return True
            owed[point] = max(owed[point], 2 - time_s / beta)
        owed[tree.parents[point]] += max(owed[point], 0.0)
    return owed[0] > 2
