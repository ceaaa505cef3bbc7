"""What no AllReduce on a tree can beat, from counting the messages that must cross its links."""

from __future__ import annotations

from trimtab.core.collectives.network_tree import NetworkTree


def cut_bound_s_per_byte(tree: NetworkTree) -> float:
    """The least time of an AllReduce for each byte of the payload on each rank.

    Let the network be cut into K parts below different links, which hold all ranks together. An
    element must cross into a part at least K - 1 times to be summed and K - 1 times to be known to
    all. So in a time T the links into the parts, which carry T / β each, carry at least 2·(K - 1)
    payloads, however the network is cut. The worst cut is found from the leaves up, the least T by
    bisection. No switch is taken to add up or to copy messages.
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
    owed = [0.0] * len(tree.names)  # by the parts below each point: two payloads less what they can
    for point in range(len(tree.names) - 1, 0, -1):
        first, last = tree.spans[point]
        beta = max(float(tree.up_s_per_byte[point]), float(tree.down_s_per_byte[point]))
        if time_s < beta and last - first < tree.size:
            return True  # either side has to send and to receive the whole payload once
        own = 2 - time_s / beta if beta > 0 else float("-inf")
        owed[point] = max(owed[point], own) if tree.children[point] else own
        owed[tree.parents[point]] += owed[point]
    return owed[0] > 2
